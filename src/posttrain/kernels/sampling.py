"""The next token from logits: greedy, or a seeded draw that depends on nothing but its inputs.

The rule, in order: logits of tokens that occurred are divided (if negative, multiplied) by
`repetition_penalty`; all are divided by the temperature; the `top_k` likeliest stay; of these the
fewest likeliest whose probabilities reach `top_p`; of these the ones at least `min_p` times as
likely as the likeliest. Among those the largest of logit + noise wins, with standard Gumbel noise
hashed from (seed, position, token): a draw from their softmax (Gumbel-max), the same whatever was
drawn elsewhere, in whatever batch, on whatever machine. Ties go to the lower token.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from posttrain.errors import UserError
from posttrain.kernels import library

Logits = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]

# What an option may be: its kind, which of that kind, and that in words. The kernels compute with
# float32: what would be infinite there, or a penalty of 0, is refused.
_LEAST, _MOST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
_RULES: dict[str, tuple[type, Callable[[Any], bool], str]] = {
    "temperature": (Real, lambda x: 0 <= x <= _MOST, "a number from 0 (greedy) to 3.4e38"),
    "top_k": (Integral, lambda x: x >= 0, "a whole number, 0 (all tokens) or more"),
    "top_p": (Real, lambda x: 0 < x <= 1, "a number above 0 and at most 1"),
    "min_p": (Real, lambda x: 0 <= x <= 1, "a number from 0 to 1"),
    "repetition_penalty": (Real, lambda x: _LEAST <= x <= _MOST, "a number from 1.2e-38 to 3.4e38"),
    "seed": (Integral, lambda x: True, "a whole number"),
}
_ANY_TOKENS = 2**31 - 1  # more than a vocabulary has


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. temperature: 0 takes the likeliest; top_k: 0 is all."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (kind, allowed, words) in _RULES.items():
            value = getattr(self, name)
            if not isinstance(value, kind) or not allowed(value):
                raise UserError(f"{name} must be {words}, not {value!r}")

    def draw(self, logits: Tensor, history: Sequence[int]) -> int:
        """The token after `history` (the text so far, prompt included), by `logits` [vocabulary].

        Raises UserError for logits that are not numbers.
        """
        # numpy copies in this thread; torch's threads would spin on while our own want the cores.
        z = logits.detach().to("cpu", torch.float32).numpy().copy()
        if library.available():
            how = self.struct(history)
            token = library.native().pt_sample(z.ctypes.data, len(z), ctypes.byref(how))
        else:
            token = self.reference(z, history)
        return drawn(token)

    def struct(self, history: Sequence[int]) -> library.Draw:
        """How the token after `history` is drawn, as the kernels want to know it."""
        how = library.Draw(
            self.temperature, self.top_p, self.min_p, self.repetition_penalty,
            min(int(self.top_k), _ANY_TOKENS), int(self.seed) % 2**64, len(history),
        )  # fmt: skip
        if self.repetition_penalty != 1:
            how.past = np.asarray(history, dtype=np.int32)  # lives as long as what points to it
            how.history, how.length = how.past.ctypes.data, len(how.past)
        return how

    def reference(self, z: Logits, history: Sequence[int]) -> int:
        """The rule in numpy, on logits that a penalty changes: what native/sampling.cpp is held to.
        -1 for NaN."""
        if self.repetition_penalty != 1:
            past = np.asarray(history, dtype=np.int32)
            seen = np.unique(past[(past >= 0) & (past < len(z))])
            penalty = np.float32(self.repetition_penalty)
            with np.errstate(over="ignore"):
                z[seen] = np.where(z[seen] > 0, z[seen] / penalty, z[seen] * penalty)
        if np.isnan(z).any():
            return -1
        best = int(z.argmax())
        temperature = float(np.float32(self.temperature))
        if temperature == 0 or np.isinf(z[best]):
            return best
        scores = (z.astype(np.float64) - float(z[best])) / temperature
        order = np.argsort(-z, kind="stable")  # likeliest first, the lower token of equals
        order = order[: self.top_k or None]
        order = order[np.isfinite(scores[order])]
        weights = np.exp(scores[order])
        top_p = np.float32(self.top_p)
        if top_p < 1:
            before = np.concatenate([[0.0], np.cumsum(weights)[:-1]])
            likely = before < float(top_p) * weights.sum()
            likely[0] = True  # also by a top_p that is 0 in float32
            order = order[likely]
        order = order[np.exp(scores[order]) >= float(np.float32(self.min_p))]
        values = scores[order] + gumbel(self.seed, len(history), order)
        return int(min(order[values == values.max()]))


def drawn(token: int) -> int:
    """A token that was drawn. Raises UserError for -1, which stands for logits that are NaN, and for
    less, where the kernels could not draw (`pt_sample` of native/posttrain.h)."""
    if token < -1:
        library.check(-1 - token, "to draw a token")
    if token < 0:
        raise UserError("the model gives logits that are not numbers: its weights are broken")
    return token


def gumbel(seed: int, position: int, tokens: npt.NDArray[np.int64]) -> Floats:
    """Standard Gumbel noise of each token at a position."""
    start = _mixed(np.array([int(seed) % 2**64], dtype=np.uint64))
    key = _mixed(start ^ np.uint64(position))
    bits = _mixed(key ^ tokens.astype(np.uint64)) >> np.uint64(12)
    noise: Floats = -np.log(-np.log((bits.astype(np.float64) + 0.5) * 2.0**-52))
    return noise


def _mixed(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64: every bit of the result depends on every bit of x."""
    x = x + np.uint64(0x9E3779B97F4A7C15)  # wraps
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = x ^ x >> np.uint64(31)
    return mixed


def log_partition(logits: Tensor) -> Tensor:
    """log sum exp of each row of float32 [rows, vocabulary], on the kernels' own threads: torch's
    would spin on and keep them from the next product."""
    if not library.available() or not logits.is_cpu or logits.dtype != torch.float32:
        return logits.logsumexp(-1)
    rows = logits.contiguous()
    out = torch.empty(len(rows))
    status = library.native().pt_log_partition(rows.data_ptr(), *rows.shape, out.data_ptr())
    library.check(status, f"logits {list(rows.shape)}")
    return out
