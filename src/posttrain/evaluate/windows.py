"""The tokens that every model of an evaluation sees, and which of them are scored."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from posttrain.data import Text, token_windows
from posttrain.data.text import leading_bos

LOGITS_BYTES = 256 * 2**20  # of one batch, in float32
LARGEST_BATCH = 16


@dataclass(frozen=True)
class Batch:
    """Windows ``start`` to ``stop``; in each, tokens from position ``first`` on are scored."""

    start: int
    stop: int
    first: int


@dataclass(frozen=True)
class Windows:
    """Token ids ``[windows, window]``, int64, and where in each window scoring starts.

    Without a stride every token but the first of each window is scored. With a stride s smaller
    than the window, windows overlap and each after the first scores its last s tokens, so that
    every token is scored once and has at least ``window - s`` tokens before it. ``offset`` is
    how many tokens of the text stream lie between the starts of two windows.
    """

    tokens: torch.Tensor
    window: int
    stride: int | None
    offset: int
    bos: bool

    @classmethod
    def cut(
        cls,
        text: Text,
        tokenizer: Any,
        window: int,
        stride: int | None = None,
        max_tokens: int | None = None,
        chat: bool = False,
    ) -> "Windows":
        tokens = token_windows(text, tokenizer, window, stride, max_tokens, chat=chat)
        bos = bool(leading_bos(tokenizer))
        return cls(tokens, window, stride, stride or window - bos, bos)

    def __len__(self) -> int:
        return len(self.tokens)

    def head(self, count: int) -> "Windows":
        """The first ``count`` windows."""
        return replace(self, tokens=self.tokens[:count])

    def first_scored(self, index: int) -> int:
        if index == 0 or self.stride is None:
            return 1
        return max(1, self.window - self.stride)

    def scored(self) -> torch.Tensor:
        """Which tokens are scored, bool ``[windows, window - 1]``: column j is position j + 1."""
        first = torch.tensor([self.first_scored(i) for i in range(len(self))])
        return torch.arange(1, self.window) >= first[:, None]

    def batches(self, vocabulary: int, size: int | None = None) -> Iterator[Batch]:
        """Cut into batches of one scoring start each, of ``size`` windows or as many as keep
        the logits within LOGITS_BYTES."""
        start = 0
        while start < len(self):
            first = self.first_scored(start)
            row = 4 * vocabulary * (self.window - first + 1)
            fitting = size or max(1, min(LARGEST_BATCH, LOGITS_BYTES // row))
            # A first window that is scored from another position than the rest goes alone.
            alone = start == 0 and first != self.first_scored(1)
            stop = min(len(self), start + (1 if alone else fitting))
            yield Batch(start, stop, first)
            start = stop
