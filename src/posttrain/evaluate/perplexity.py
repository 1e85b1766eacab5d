"""The perplexity task, and what is said of one model's scores wherever they appear."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from posttrain.data import Text, load_text
from posttrain.evaluate.bootstrap import Interval, bootstrap_mean
from posttrain.evaluate.records import check_records_path, write_records
from posttrain.evaluate.run import score_one
from posttrain.evaluate.score import Scores
from posttrain.evaluate.subject import Subject
from posttrain.evaluate.windows import Windows


@dataclass(frozen=True)
class Options:
    """What is scored and how; the arguments of ``evaluate`` that belong to its tasks."""

    text: str | Path | Text | None = None
    window: int = 512
    stride: int | None = None
    max_tokens: int | None = None
    chat: bool = False
    records: str | Path | None = None
    progress: bool = True

    def load_text(self) -> Text:
        return self.text if isinstance(self.text, Text) else load_text(self.text, "evaluation")

    def cut(self, text: Text, tokenizer: Any) -> Windows:
        return Windows.cut(
            text, tokenizer, self.window, self.stride, self.max_tokens, chat=self.chat
        )


def perplexity(subject: Subject, options: Options) -> dict[str, Any]:
    """Mean negative log-likelihood of the next token, in nats, and its exponential."""
    if options.records is not None:
        check_records_path(options.records)
    text = options.load_text()
    subject.open()
    windows = options.cut(text, subject.tokenizer)
    scores = score_one(subject, windows, options.progress)
    result = describe_scores(scores, windows)
    result["text"] = describe_text(text, windows)
    if options.records is not None:
        named = [(subject.name, scores)]
        result["records"] = str(write_records(options.records, windows, text.sha256, named))
    return result


def describe_scores(scores: Scores, windows: Windows) -> dict[str, Any]:
    interval = mean_over_windows([scores.nll])[0]
    tokens = int(windows.scored().sum())
    return {
        "nll": interval.mean,
        "perplexity": math.exp(min(interval.mean, 700)),
        "tokens": tokens,
        "nll_ci_low": interval.low,
        "nll_ci_high": interval.high,
        "window": windows.window,
        "stride": windows.offset,
        "windows": len(windows),
        "bos": windows.bos,
        "seconds": scores.seconds,
        "tokens_per_second": tokens / scores.seconds,
        "window_nll": scores.nll.double().nanmean(1).tolist(),
    }


def describe_text(text: Text, windows: Windows) -> dict[str, Any]:
    """Identity of the text; ``tokens`` is how many of its tokens the windows cover."""
    covered = (len(windows) - 1) * windows.offset + windows.window - windows.bos
    return {"name": text.name, "sha256": text.sha256, "tokens": covered}


def mean_over_windows(values: Sequence[torch.Tensor], **bootstrap: Any) -> list[Interval]:
    """Mean per token, and its interval, of each tensor ``[windows, tokens]``; NaN is no token."""
    sums = np.stack([v.double().nansum(1).numpy() for v in values], axis=1)
    counts = np.stack([v.isfinite().sum(1).numpy() for v in values], axis=1)
    return bootstrap_mean(sums, counts, **bootstrap)
