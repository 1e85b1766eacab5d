"""Decoding sweeps: what a model writes under many settings of the sampler, seed by seed.

A draw depends on its prompt, seed and position alone, so two models that see the same prompt and seed
are paired, and the first n tokens of a long continuation are the continuation of length n.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posttrain.evaluate.bootstrap import Interval, bootstrap_mean
from posttrain.kernels import Sampling
from posttrain.lm.engine import continuations, engine

AT_ONCE = 16
NGRAM = 4


@dataclass(frozen=True)
class Setting:
    """One cell of a sweep. top_k: 0 is all."""

    temperature: float
    top_k: int
    length: int


def grid(
    temperatures: Sequence[float], top_ks: Sequence[int], lengths: Sequence[int]
) -> list[Setting]:
    """Every combination."""
    return [Setting(*values) for values in product(temperatures, top_ks, lengths)]


def write(
    model: Any, prompts: Sequence[Sequence[int]], settings: Sequence[Setting], seeds: Sequence[int]
) -> dict[Setting, list[list[int]]]:
    """Continuations [prompts x seeds], prompt by prompt, of each setting; none stops early."""
    written = {}
    for (temperature, top_k), length in _longest(settings).items():
        pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
        samplings = [Sampling(temperature, top_k, seed=seed) for _, seed in pairs]
        texts: list[list[int]] = [[] for _ in pairs]
        steps = continuations(engine(model), [p for p, _ in pairs], samplings, AT_ONCE, length)
        for index, token, stop in steps:
            texts[index].append(token)
            if len(texts[index]) == length:
                stop()
        for setting in settings:
            if (setting.temperature, setting.top_k) == (temperature, top_k):
                written[setting] = [text[: setting.length] for text in texts]
    return written


def _longest(settings: Sequence[Setting]) -> dict[tuple[float, int], int]:
    found: dict[tuple[float, int], int] = {}
    for s in settings:
        key = s.temperature, s.top_k
        found[key] = max(s.length, found.get(key, 0))
    return found


def distinct(text: Sequence[int], n: int = 2) -> float:
    """Share of the runs of n tokens that are different ones; 1 for a text without any."""
    runs = [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
    return len(set(runs)) / len(runs) if runs else 1.0


def repetition(text: Sequence[int], n: int = NGRAM) -> float:
    """Share of the runs of n tokens that occurred before in the text; 0 for a text without any."""
    return 1.0 - distinct(text, n)


@torch.inference_mode()
def judged(
    model: Any, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]
) -> Iterator[float]:
    """Mean negative log-likelihood of each text after its prompt, by a model that judges."""
    runner = engine(model)
    for prompt, text in zip(prompts, texts, strict=True):
        ids = [*prompt, *text]
        logits = runner.forward([(runner.session(len(ids), "fp32"), ids)], len(text) + 1)[:-1]
        wanted = torch.tensor(text)[:, None]
        yield float((logits.logsumexp(-1) - logits.gather(-1, wanted)[:, 0]).mean())


def divergence(reference: Tensor, other: Tensor, temperature: float) -> float:
    """Mean KL(reference || other) of the next token at a temperature; logits [positions, vocabulary]."""
    p, q = ((x / temperature).log_softmax(-1) for x in (reference, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


def difference(ours: Sequence[float], theirs: Sequence[float], prompts: int) -> Interval:
    """Mean of paired differences [prompts x seeds], with an interval over prompts."""
    gaps = (np.asarray(ours) - np.asarray(theirs)).reshape(prompts, -1)
    counts = np.full((prompts, 1), gaps.shape[1])
    return bootstrap_mean(gaps.sum(1, keepdims=True), counts)[0]
