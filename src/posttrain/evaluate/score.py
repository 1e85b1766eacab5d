"""Score the tokens of windows with one model, and against a reference.

Logits are the largest thing here (a window of 512 tokens and 150,000 words of vocabulary is
300 MB), so they exist for one batch of one model at a time, plus the reference's, and
everything computed from them goes through in chunks of rows that fit the cache. Where losses alone
are wanted, the native decoder never writes them at all.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from posttrain import kernels
from posttrain.errors import UserError
from posttrain.evaluate.divergence import FullTarget, TopTarget
from posttrain.evaluate.windows import Batch, Windows
from posttrain.lm.engine import Engine, scoring_engine

CHUNK_BYTES = 16 * 2**20  # of float32 logits worked on at a time

Target = FullTarget | TopTarget
Keep = Callable[[torch.Tensor, torch.Tensor], Target]  # what of (logits, log_partition) is kept


@dataclass(frozen=True)
class Scores:
    """What one model says of every scored token; float32 ``[windows, window - 1]``, NaN where a
    token is not scored. ``kl`` and ``agree`` (1 or 0: same likeliest token as the reference) are
    None for the reference itself. ``seconds`` is the time spent in this model and its scoring.
    """

    nll: torch.Tensor
    kl: torch.Tensor | None = None
    agree: torch.Tensor | None = None
    seconds: float = 0.0

    def parts(self) -> dict[str, torch.Tensor]:
        found = {"nll": self.nll, "kl": self.kl, "agree": self.agree}
        return {name: value for name, value in found.items() if value is not None}


@dataclass
class Scorer:
    """Scores one model batch by batch, and collects its ``Scores``."""

    model: Any
    name: str
    windows: Windows
    against: bool = False  # whether batches come with targets of a reference
    runner: Engine | None = None  # what computes; None: the best for this model
    shared: int | None = None  # logits that all models compared give; None: as many as this one
    _values: dict[str, torch.Tensor] = field(default_factory=dict)
    _seconds: float = 0.0

    def __post_init__(self) -> None:
        self.runner = self.runner or scoring_engine(self.model)
        shape = len(self.windows), self.windows.window - 1
        for part in ("nll", "kl", "agree") if self.against else ("nll",):
            self._values[part] = torch.full(shape, torch.nan)

    @torch.inference_mode()
    @kernels.fast_float32()
    def __call__(
        self, batch: Batch, targets: list[Target] | None = None, keep: Keep | None = None
    ) -> list[Target]:
        """Score a batch. ``targets`` are the reference's, ``keep`` says what to return of the
        logits as targets for other models; both are one for each chunk of rows, in order."""
        began = time.perf_counter()
        tokens = self.windows.tokens[batch.start : batch.stop].to(self.model.device)
        assert self.runner is not None
        # Of what all models share: chunks of a model and of its reference hold the same rows.
        rows = max(1, CHUNK_BYTES // (4 * (self.shared or vocabulary(self.model))))
        count = tokens.shape[1] - batch.first + 1  # the last position predicts nothing here
        kept: list[Target] = []
        if targets is None and keep is None:
            scored = self.runner.window_losses(tokens, count, rows)[None]
        else:
            scored, kept = self._with_logits(tokens, count, rows, targets, keep)
        self._store(batch, scored.cpu())
        self._seconds += time.perf_counter() - began
        return kept

    def _with_logits(
        self,
        tokens: torch.Tensor,
        count: int,
        rows: int,
        targets: list[Target] | None,
        keep: Keep | None,
    ) -> tuple[torch.Tensor, list[Target]]:
        """What `_store` wants, and what `keep` does."""
        assert self.runner is not None
        targeted = [
            part for row in tokens[:, tokens.shape[1] - count + 1 :] for part in row.split(rows)
        ]
        kept, parts = [], []
        chunks = self.runner.window_logits(tokens, count, rows)
        for i, (chunk, wanted) in enumerate(zip(chunks, targeted, strict=True)):
            log_partition = kernels.log_partition(chunk)
            scored = [log_partition - chunk.gather(-1, wanted[:, None])[:, 0]]
            chunk, log_partition = self._shared(chunk, log_partition)
            if targets is not None:
                scored += [targets[i].kl(chunk, log_partition)]
                scored += [(chunk.argmax(-1) == targets[i].argmax).float()]
            parts.append(torch.stack(scored))
            if keep is not None:
                kept.append(keep(chunk, log_partition))
        return torch.cat(parts, dim=1), kept

    def _shared(
        self, logits: torch.Tensor, log_partition: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits of the tokens that all models know, as a distribution of its own. Models of
        one family pad their heads to different sizes; the rows beyond are no tokens."""
        if self.shared is None or self.shared == logits.shape[-1]:
            return logits, log_partition
        logits = logits[:, : self.shared].contiguous()
        return logits, kernels.log_partition(logits)

    def scores(self) -> Scores:
        return Scores(**self._values, seconds=self._seconds)

    def _store(self, batch: Batch, parts: torch.Tensor) -> None:
        if not parts.isfinite().all():
            raise UserError(
                f"{self.name} gives non-finite logits in windows {batch.start} to "
                f"{batch.stop - 1}: its weights or the dtype it runs in are broken"
            )
        rows = slice(batch.start, batch.stop)
        for values, part in zip(self._values.values(), parts, strict=True):
            values[rows, batch.first - 1 :] = part.view(batch.stop - batch.start, -1)


def vocabulary(model: Any) -> int:
    """Number of logits a model, or a source of one, gives for a position."""
    return int(model.config.get_text_config().vocab_size)
