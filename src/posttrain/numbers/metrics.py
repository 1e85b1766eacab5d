"""Measures of what quantization did to a tensor (all computed in float64 or on exact counts)."""

import math

import torch
from torch import Tensor

from posttrain.errors import UserError
from posttrain.numbers.partition import Partition, blocked, matrix_shape
from posttrain.numbers.scales import Scales, fit_scales
from posttrain.numbers.spec import Spec

_AT_ONCE = 1 << 22  # elements in double precision at a time


def qsnr(x: Tensor, xhat: Tensor) -> float:
    """Signal to quantization noise, -10 log10(|x - x^|^2 / |x|^2), in dB.

    inf when nothing was lost (also for an empty or zero tensor that stayed so), NaN with NaN.
    """
    noise = signal = 0.0
    exact, found = x.reshape(-1), xhat.reshape(-1)
    for start in range(0, len(exact), _AT_ONCE):
        reference = exact[start : start + _AT_ONCE].double()
        noise += (reference - found[start : start + _AT_ONCE].double()).square().sum().item()
        signal += reference.square().sum().item()
    if noise == 0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal > 0 else -math.inf


def crest_factor(x: Tensor, partition: str | Partition) -> Tensor:
    """absmax / RMS of each block, [blocks down, blocks across]; NaN for a block of zeros.

    Only real elements count: the padding of an edge block does not lower its RMS.
    """
    found = Partition.parse(partition) if isinstance(partition, str) else partition
    if found is None:
        raise UserError(f"unknown partition {partition!r}; such as tensor, row, col, g64, t16x16")
    matrix = matrix_shape(tuple(x.shape), found.flat)
    values, block = x.double().reshape(matrix), found.block(matrix)
    count = blocked(torch.ones_like(values), block).sum((1, 3))
    view = blocked(values, block)
    return view.abs().amax((1, 3)) / (view.square().sum((1, 3)) / count).sqrt()


def kernel_fraction(x: Tensor, xhat: Tensor) -> float:
    """Share of the non-zero elements of `x` that became zero ("quantization kernel")."""
    present = x != 0
    total = int(present.sum())
    return int((present & (xhat == 0)).sum()) / total if total else 0.0


def clip_fraction(x: Tensor, spec: str | Spec, scales: Scales | None = None) -> float:
    """Share of elements beyond the largest value their scale can represent."""
    spec = Spec.parse(spec)
    scales = fit_scales(x, spec) if scales is None else scales
    scale = scales.expand(x.shape)
    zero = scales.expand_zero_point(x.shape)
    low, high = grid_range(spec)
    offset = 0.0 if zero is None else zero
    values = x.to(torch.float32)
    # One part in 10^6 of slack: the element that set the scale is not clipped by its rounding.
    slack = 1e-6 * high * scale.abs()
    beyond = (values > (high - offset) * scale + slack) | (values < (low - offset) * scale - slack)
    return int(beyond.sum()) / x.numel() if x.numel() else 0.0


def grid_range(spec: Spec) -> tuple[float, float]:
    """Smallest and largest value of the element grid."""
    grid = spec.grid
    ends = grid.snap(torch.tensor([-math.inf, math.inf]))
    return float(ends[0]), float(ends[1])


def dynamic_range(x: Tensor) -> float:
    """max |x| over min |x| > 0; 1 for a tensor without non-zero elements."""
    magnitude = x.double().abs()
    present = magnitude[magnitude > 0]
    return float(present.max() / present.min()) if present.numel() else 1.0
