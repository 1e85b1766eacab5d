"""Rounding to integers: the three modes every grid shares.

`rne`  nearest, ties to even (the default of hardware and of IEEE 754)
`away` nearest, ties away from zero (the default of the MX reference emulator)
`sr`   stochastic: with neighbours v1 <= t <= v2 the result is v2 with probability t - v1, so its
       expectation is t. The draws come from an explicit generator; global random state is not used.

A fourth mode, rounding decided by a solver (GPTQ, AdaRound), needs nothing here: a solver snaps
column by column with `Grid.snap`, or hands finished codes to `QTensor`.
"""

import torch
from torch import Tensor

from posttrain.errors import UserError

ROUNDINGS: dict[str, str] = {
    "rne": "nearest, ties to even",
    "away": "nearest, ties away from zero",
    "sr": "stochastic, unbiased, with an explicit generator",
}


def round_(t: Tensor, rounding: str = "rne", generator: torch.Generator | None = None) -> Tensor:
    """Round float32 `t` to integers in place and return it. NaN and infinities stay."""
    if rounding == "rne":
        return t.round_()
    if rounding == "away":
        return _away_(t)
    if rounding == "sr":
        return _stochastic_(t, generator)
    raise UserError(f"unknown rounding {rounding!r}; choose one of {', '.join(ROUNDINGS)}")


def _away_(t: Tensor) -> Tensor:
    # floor(|t| + 0.5) would round 0.49999997 up: the sum itself rounds. The remainder is exact.
    whole = t.trunc()
    rest = t - whole
    return t.copy_(whole + rest.sign() * (rest.abs() >= 0.5))


def _stochastic_(t: Tensor, generator: torch.Generator | None) -> Tensor:
    u = uniform_like(t, generator)
    # floor(t + u) would be biased for large t, where the sum rounds; the comparison is exact.
    low = t.floor()
    return t.copy_(low + (u < t - low))


def uniform_like(t: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform float32 draws in [0, 1) of the shape of `t`, from `generator`."""
    if generator is None:
        raise UserError(
            "stochastic rounding needs generator=torch.Generator(); global random state is not used"
        )
    # Drawn on the generator's own device: the same seed gives the same draws everywhere.
    u = torch.rand(t.shape, generator=generator, device=generator.device, dtype=torch.float32)
    return u.to(t.device)
