"""Paired differences between models that scored the same tokens."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from posttrain.evaluate.perplexity import mean_over_windows
from posttrain.evaluate.score import Scores
from posttrain.evaluate.windows import Windows

OVERLAP_BINS = 8  # of position, where windows overlap


def pair(a: str, b: str, reference: Scores, other: Scores, seed: int = 0) -> dict[str, Any]:
    """``b`` against ``a`` on the same tokens. ``delta_nll`` is NLL of b minus NLL of a, in nats
    per token: positive means that b predicts the text worse."""
    parts = other.parts()
    difference = parts["nll"].double() - reference.nll.double()
    measured = [difference, parts["kl"], parts["agree"]]
    delta, kl, agreement = mean_over_windows(measured, seed=seed)
    return {
        "a": a,
        "b": b,
        "delta_nll": delta.mean,
        "ci_low": delta.low,
        "ci_high": delta.high,
        "kl": kl.mean,
        "kl_ci_low": kl.low,
        "kl_ci_high": kl.high,
        "greedy_agreement": agreement.mean,
        "tokens": int(other.nll.isfinite().sum()),
    }


def position_nll(
    named: Sequence[tuple[str, Scores]], windows: Windows, seed: int = 0
) -> dict[str, Any]:
    """Loss by position in the window: ``edges`` of the bins (bin i holds positions
    ``edges[i]`` to ``edges[i + 1] - 1``) and, for each model, mean, low and high of each bin."""
    edges = position_edges(windows.first_scored(len(windows) - 1), windows.window)
    models = {}
    for name, scores in named:
        bins = [scores.nll[:, a - 1 : b - 1] for a, b in pairwise(edges)]
        found = mean_over_windows(bins, seed=seed, resamples=2000)
        models[name] = {
            "mean": [interval.mean for interval in found],
            "low": [interval.low for interval in found],
            "high": [interval.high for interval in found],
        }
    return {"edges": edges, "models": models}


def position_edges(first: int, window: int) -> list[int]:
    """Doubling from position 1, where context grows from nothing; equal where windows overlap
    and every scored token has a long context."""
    if first == 1:
        edges = [2**i for i in range(window.bit_length()) if 2**i < window]
    else:
        edges = torch.linspace(first, window, OVERLAP_BINS + 1).int().unique().tolist()[:-1]
    return [*edges, window]
