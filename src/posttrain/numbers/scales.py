"""Fitting a chain of scale factors to a tensor, and putting the product back on its elements.

The scale of a block is absmax / top (span / top for grids with a zero point). A chain splits it:
the coarsest factor is the largest finer scale divided by the tops of the finer grids, then each
finer factor is what the *stored* coarser ones leave over, so an error made in storing one factor
is seen by the next and by the elements. MX, NVFP4, M2, double quantization and ShiftQuant are
chains of this kind; CrossQuant is the other kind, a product of powers (absmax / top)^power.

Edge cases, defined for every chain:
- a block of zeros: scale 1 on fp32/fp16/bf16, else the smallest scale of the grid;
- a positive scale too small or large for its grid: the smallest or largest positive value;
- infinities: count as the largest float32 (half of it with a zero point), except on power-of-two grids, where the scale is NaN
  (OCP MX); NaN: the scale is NaN wherever the grid has one, so every block that shares a factor
  with a NaN decodes to NaN.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from posttrain.errors import UserError
from posttrain.numbers.grids import Grid, Pow2Grid
from posttrain.numbers.partition import (
    Partition,
    Shape2d,
    blocked,
    coarsen_max,
    common_block,
    upsample,
)
from posttrain.numbers.spec import Factor, Spec

if TYPE_CHECKING:
    from posttrain.numbers.qtensor import QTensor

_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True, eq=False)
class Scales:
    """The fitted factors of `spec` for one tensor, as stored.

    stored: per factor a 2-D tensor [blocks down, blocks across] in its grid's code dtype, or a
    QTensor for a nested factor. zero_point: uint8 of the shape of the finest factor, or None.
    """

    spec: Spec
    stored: "tuple[Tensor | QTensor, ...]"
    zero_point: Tensor | None = None

    @cached_property
    def factors(self) -> tuple[Tensor, ...]:
        """The factors decoded to float32 (NVFP4's per-tensor factor is s_enc, a divisor)."""
        return tuple(
            decode_factor(factor, stored)
            for factor, stored in zip(self.spec.factors, self.stored, strict=True)
        )

    def combined(self, matrix: Shape2d) -> tuple[Tensor, Shape2d]:
        """The product of the factors on a matrix [rows, K], and the block size it is constant on.

        The product broadcasts: an axis on which it does not vary has size 1.
        """
        partitions = [f.partition for f in self.spec.factors]
        if not partitions:
            return torch.ones(1, 1), (max(1, matrix[0]), max(1, matrix[1]))
        block = common_block(partitions, matrix)
        counts = (-(-matrix[0] // block[0]), -(-matrix[1] // block[1]))
        product = _product(
            self.spec,
            0,
            [
                upsample(factor, partition.block(matrix), block, counts)
                for factor, partition in zip(self.factors, partitions, strict=True)
            ],
        )
        return product, block

    def expand(self, shape: Sequence[int]) -> Tensor:
        """The scale of every element of a tensor of `shape`, float32."""
        matrix = self.spec.matrix(shape)
        product, block = self.combined(matrix)
        return _spread(product, block, matrix).reshape(tuple(shape))

    def expand_zero_point(self, shape: Sequence[int]) -> Tensor | None:
        """The zero point of every element, float32, or None for grids without one."""
        if self.zero_point is None:
            return None
        matrix = self.spec.matrix(shape)
        block = self.spec.factors[0].partition.block(matrix)
        return _spread(self.zero_point.to(torch.float32), block, matrix).reshape(tuple(shape))


def _spread(values: Tensor, block: Shape2d, matrix: Shape2d) -> Tensor:
    for axis in (0, 1):
        if values.shape[axis] > 1 and block[axis] > 1:
            values = values.repeat_interleave(block[axis], axis)
        if values.shape[axis] > 1:
            values = values.narrow(axis, 0, matrix[axis])
    return values.expand(matrix)


def decode_factor(factor: Factor, stored: "Tensor | QTensor") -> Tensor:
    """Float32 values of one stored factor."""
    if isinstance(stored, Tensor):
        return factor.grid.decode(stored)
    return stored.dequantize()


def _product(spec: Spec, first: int, factors: Sequence[Tensor]) -> Tensor:
    """Product of consecutive factors of the chain, the first being factor number `first`."""
    product = factors[0]
    for i, factor in enumerate(factors[1:], first + 1):
        product = product / factor if spec.reciprocal(i) else product * factor
    return product


# ------------------------------------------------------------------------------- fitting


def fit_scales(
    x: Tensor,
    spec: str | Spec,
    clip_ratio: float | Tensor = 1.0,
    known: "Mapping[int, Tensor | QTensor] | None" = None,
) -> Scales:
    """Fit the scale chain of `spec` to `x` (any shape; the last axis is the reduction axis).

    clip_ratio: the finest scale is this share of absmax / top; a number, or one per finest block.
    known: stored factors, by index, to be kept as they are while the others are fitted.
    """
    spec = Spec.parse(spec)
    if not spec.factors:
        return Scales(spec, ())
    fit = _Fit(x.detach().to(torch.float32).reshape(spec.matrix(x.shape)), spec, clip_ratio)
    return fit.run(known or {})


class _Fit:
    """One fit; `stats[i]` is the largest span (absmax, or max - min) in the blocks of factor i."""

    def __init__(self, x: Tensor, spec: Spec, clip_ratio: float | Tensor) -> None:
        self.spec = spec
        self.matrix: Shape2d = (x.shape[0], x.shape[1])
        self.clip_ratio = _check_clip_ratio(clip_ratio, spec, self.matrix)
        self.low, high = block_range(x, spec.factors[0].partition)
        self.stats = self._stats(x, _span(self.low, high, spec.grid))

    def _stats(self, x: Tensor, finest: Tensor) -> list[Tensor]:
        partitions = [f.partition for f in self.spec.factors]
        if self.spec.powered:
            rest = [_span(*block_range(x, p), self.spec.grid) for p in partitions[1:]]
            return [finest, *rest]
        if finest.numel() == 0:
            return [finest.new_zeros(p.counts(self.matrix)) for p in partitions]
        own = partitions[0].block(self.matrix)
        return [finest] + [coarsen_max(finest, own, p.block(self.matrix)) for p in partitions[1:]]

    def run(self, known: "Mapping[int, Tensor | QTensor]") -> Scales:
        factors = self.spec.factors
        stored: list[Tensor | QTensor] = [self.low] * len(factors)
        decoded = list(stored)
        for i in reversed(range(len(factors))):
            stored[i] = known[i] if i in known else self._fit_factor(i, decoded)
            decoded[i] = decode_factor(factors[i], stored[i])
        scales = Scales(self.spec, tuple(stored))
        if not self.spec.grid.zero_point:
            return scales
        return Scales(self.spec, tuple(stored), self._zero_point(scales))

    def _fit_factor(self, i: int, decoded: "list[Tensor | QTensor]") -> "Tensor | QTensor":
        factor, stat = self.spec.factors[i], self.stats[i]
        clipped = stat * self.clip_ratio if i == 0 and not self.spec.powered else stat
        ideal = _divide(clipped.clamp(max=_LARGEST), self._top(i))
        if self.spec.powered:
            target = ideal.pow(factor.power)
            if i == 0:
                target = target * self.clip_ratio
            return _store(factor, target, stat, None, 1.0)
        if self.spec.reciprocal(i):
            target = self._top(i) / stat.clamp(max=_LARGEST)
            return _store(factor, target, stat, None, 1.0)
        if i + 1 == len(self.spec.factors):
            return _store(factor, ideal, clipped, None, self.spec.grid.top)
        return self._fit_below(i, ideal, clipped, decoded)

    def _fit_below(
        self, i: int, ideal: Tensor, stat: Tensor, decoded: "list[Tensor | QTensor]"
    ) -> "Tensor | QTensor":
        """Fit a factor to what the stored coarser factors leave of the ideal scale."""
        partitions = [f.partition for f in self.spec.factors]
        own, counts = partitions[i].block(self.matrix), partitions[i].counts(self.matrix)
        coarser = [
            upsample(value, partition.block(self.matrix), own, counts)
            for value, partition in zip(decoded[i + 1 :], partitions[i + 1 :], strict=True)
            if isinstance(value, Tensor)
        ]
        target = ideal
        for j, value in enumerate(coarser, i + 1):
            target = target * value if self.spec.reciprocal(j) else target / value
        slack = max(_rounding(factor) for factor in self.spec.factors[i + 1 :])
        return _store(self.spec.factors[i], target, stat, target, 1.0, slack)

    def _top(self, i: int) -> float:
        """What the span is divided by for factor i: the tops of the element and finer grids."""
        return math.prod((self.spec.grid.top, *(f.top for f in self.spec.factors[:i])))

    def _zero_point(self, scales: Scales) -> Tensor:
        product, block = scales.combined(self.matrix)
        own = self.spec.factors[0].partition.block(self.matrix)
        if block != own:
            raise UserError(
                f"spec '{self.spec}': a zero point needs every factor constant on the blocks of "
                "the first"
            )
        low = self.low.clamp(-_LARGEST / 2, 0.0) * self.clip_ratio
        zero = -low / nonzero(product)
        return self.spec.grid.encode(zero)


def _check_clip_ratio(ratio: float | Tensor, spec: Spec, matrix: Shape2d) -> float | Tensor:
    counts = spec.factors[0].partition.counts(matrix)
    if isinstance(ratio, Tensor) and ratio.dim() > 0 and tuple(ratio.shape) != counts:
        raise UserError(
            f"clip_ratio has shape {tuple(ratio.shape)}; spec '{spec}' has blocks {counts}"
        )
    return ratio


def block_range(x: Tensor, partition: Partition) -> tuple[Tensor, Tensor]:
    """Smallest and largest element of each block of a matrix, [blocks down, blocks across].

    The zeros that pad edge blocks take part. Blocks of an empty matrix give 0.
    """
    matrix = (x.shape[0], x.shape[1])
    if x.numel() == 0:
        zeros = x.new_zeros(partition.counts(matrix))
        return zeros, zeros
    view = blocked(x, partition.block(matrix))
    if view.shape[1] == 1:  # a reduction over one contiguous axis is several times faster
        view = view.squeeze(1)
        return view.amin(-1), view.amax(-1)
    return view.amin((1, 3)), view.amax((1, 3))


def _span(low: Tensor, high: Tensor, grid: Grid) -> Tensor:
    if grid.zero_point:
        half = _LARGEST / 2  # so that the difference stays finite
        return high.clamp(0.0, half) - low.clamp(-half, 0.0)
    return torch.maximum(high, -low)


def _divide(x: Tensor, divisor: float) -> Tensor:
    # A divisor on the same device: CUDA would multiply by the reciprocal of a plain number.
    return x if divisor == 1.0 else x / x.new_full((), divisor)


def nonzero(scale: Tensor) -> Tensor:
    """Scales for dividing by: infinity for zero, so that the quotient is zero and not NaN."""
    return torch.where(scale == 0, math.inf, scale)


def row_scale(absmax: Tensor, spec: Spec) -> Tensor:
    """The float32 scale of blocks with this absmax: what `fit_scales` stores for one fp32 factor."""
    ideal = _divide(absmax.clamp(max=_LARGEST), spec.grid.top)
    return torch.where(absmax == 0, 1.0, ideal.clamp_(min=spec.factors[0].grid.smallest))


def _rounding(factor: Factor) -> float:
    """How far a stored factor may be from what was meant, relative, where that is a trifle."""
    wide = factor.nested is None and factor.grid.kind == "wide"
    return torch.finfo(factor.grid.code_dtype).eps if wide else 0.0


def _store(
    factor: Factor,
    target: Tensor,
    stat: Tensor,
    shift: Tensor | None,
    top: float,
    slack: float = 0.0,
) -> "Tensor | QTensor":
    """Encode factor values `target`; `stat` is the span they come from, `top` the element's.

    shift: the factor's value as a share of the coarser factors, for power-of-two factors.
    slack: a share so little off a power of two is that power.
    """
    if factor.nested is not None:
        return _store_nested(factor.nested, factor.offset, target)
    grid = factor.grid
    if isinstance(grid, Pow2Grid):
        unusable = ~stat.isfinite()
        exponent = _exponent(factor.rule, target, stat, top) if shift is None else (
            _shift_exponent(factor, shift, slack)
        )  # fmt: skip
        exponent = exponent.masked_fill(stat == 0, grid.lo if factor.limit is None else (
            -factor.limit[1]
        ))  # fmt: skip
        return grid.codes_of_exponents(exponent, unusable)
    target = target.clamp(grid.smallest, grid.max)
    if grid.kind == "wide":
        target = torch.where(stat == 0, 1.0, target)
    return grid.encode(target)


def _store_nested(spec: Spec, offset: str | None, target: Tensor) -> "QTensor":
    from posttrain.numbers.qtensor import quantize  # a scale is itself a quantized tensor

    if offset is None:
        return quantize(target, spec)
    # float64: the sum of large scales would overflow, and that of many would lose digits.
    mean = target.double().mean().float() if target.numel() else target.new_zeros(())
    return quantize(target - mean, spec).with_offset(mean)


def _exponent(rule: str, target: Tensor, stat: Tensor, top: float) -> Tensor:
    """Exponent of a free-standing power-of-two scale by SCALE_RULES, exact (no logarithm)."""
    if rule == "floor":
        return _floor_log2(stat) - (math.frexp(top)[1] - 1)
    return _ceil_log2(target) if rule == "ceil" else _round_log2(target)


def _shift_exponent(factor: Factor, share: Tensor, slack: float) -> Tensor:
    """Exponent -k of a share 2^-k of the coarser factors; the rule rounds k.

    The block that set the coarser factor has a share of 1 but for the rounding of that factor,
    which must not double or halve its scale.
    """
    by_rule = {"floor": _ceil_log2, "ceil": _floor_log2, "nearest": _round_log2}
    tolerance = {"floor": 1 - slack, "ceil": 1 + slack, "nearest": 1.0}
    exponent = by_rule[factor.rule](share * tolerance[factor.rule])
    if factor.limit is None:
        return exponent
    return exponent.clamp(-factor.limit[1], -factor.limit[0])


def _floor_log2(x: Tensor) -> Tensor:
    return torch.frexp(x).exponent - 1


def _ceil_log2(x: Tensor) -> Tensor:
    fraction, exponent = torch.frexp(x)  # fraction in [0.5, 1): exactly 0.5 is a power of two
    return exponent - (fraction == 0.5).to(torch.int32)


def _round_log2(x: Tensor) -> Tensor:
    fraction, exponent = torch.frexp(x)
    return exponent - (fraction < math.sqrt(0.5)).to(torch.int32)
