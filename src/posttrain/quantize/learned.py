"""Weights in a number format that gradients can move.

What is stored is

    W^ = (snap(y) - z) s r,    y = (o + u - z) / r + z

with s the scale and z the zero point of each weight where learning starts, o the weight there and u
its change, both counted in steps s, and r the change of the finest scale. `snap` takes the nearest
grid value. It has no useful gradient: going backward it counts as the identity between the lowest
and the highest grid value and as a constant beyond them (a straight-through estimator, Bengio et
al. 2013, arXiv:1308.3432), which makes the gradient of r that of LSQ (Esser et al. 2020,
arXiv:1902.08153). As u and ln r have no unit, one learning rate serves all layers of all models.
"""

from dataclasses import replace

import torch
from torch import Tensor

from posttrain.numbers import QTensor, Spec
from posttrain.numbers.grids import levels
from posttrain.numbers.partition import upsample
from posttrain.numbers.scales import nonzero

# What a start makes of a weight may be far from it (GPTQ). Learning then begins at most this share
# of the way to the edge of its cell: at the edge itself the first step would change most codes.
INSIDE = 0.7


def neighbours(y: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """For each y the last of the ascending `values` that is not above it and the one after that.

    Both are the end of the grid beyond it.
    """
    rank = torch.bucketize(y.contiguous(), values, right=True)
    last = len(values) - 1
    return values[(rank - 1).clamp(0, last)], values[rank.clamp(0, last)]


class LearnedWeight:
    """One weight [out, in], where it starts and what has been learnt.

    Attributes:
        shift: u [out, in], in steps.
        log_ratio: ln r, one for each block of the finest scale; None where that is itself a
            quantized tensor or a power of two, and stays as it is.
    """

    def __init__(self, weight: Tensor, start: QTensor) -> None:
        self.start = start
        values = levels(start.spec.grid)
        assert values is not None  # solvers ask before they begin
        self._low, self._high = float(values[0]), float(values[-1])
        self._step = start.scales.expand(weight.shape).contiguous()
        zero = start.scales.expand_zero_point(weight.shape)
        self._zero = 0.0 if zero is None else zero
        y = weight / nonzero(self._step) + self._zero
        self._origin = _into_cell(y, start.spec.grid.decode(start.codes), values)
        self.shift = torch.zeros_like(weight, requires_grad=True)
        self.log_ratio = None
        if _learnable(start.spec):
            self.log_ratio = torch.zeros_like(start.scales.factors[0], requires_grad=True)

    def value(self) -> Tensor:
        """W^ [out, in], with gradients to `shift` and `log_ratio`."""
        ratio = self._ratio()
        y = (self._origin + self.shift - self._zero) / ratio + self._zero
        y = y.clamp(self._low, self._high)
        snapped = y + (self.start.spec.grid.snap(y.detach()) - y).detach()
        return (snapped - self._zero) * (self._step * ratio)

    @torch.no_grad()
    def qtensor(self) -> QTensor:
        """What `value` says, as it is stored."""
        spec, scales = self.start.spec, self.start.scales
        ratio = self._ratio()
        y = (self._origin + self.shift - self._zero) / ratio + self._zero
        if self.log_ratio is not None:
            finest = spec.factors[0].grid.encode(scales.factors[0] * self.log_ratio.exp())
            scales = replace(scales, stored=(finest, *scales.stored[1:]))
        return QTensor(spec.grid.encode(y), scales, spec)

    def _ratio(self) -> Tensor | float:
        """r for each weight, as far as the grid of the scale can say it."""
        if self.log_ratio is None:
            return 1.0
        before = self.start.scales.factors[0]
        wanted = before * self.log_ratio.exp()
        grid = self.start.spec.factors[0].grid
        stored = grid.snap(wanted.detach().clamp_min(grid.smallest))
        ratio = (wanted + (stored - wanted).detach()) / before
        matrix = self.start.spec.matrix(self.start.shape)
        block = self.start.spec.factors[0].partition.block(matrix)
        return upsample(ratio, block, (1, 1), matrix).expand(matrix).reshape(self.start.shape)


def _learnable(spec: Spec) -> bool:
    return bool(spec.factors) and spec.factors[0].nested is None and (
        spec.factors[0].grid.kind in ("wide", "float")
    )  # fmt: skip


def _into_cell(y: Tensor, chosen: Tensor, values: Tensor) -> Tensor:
    """The point nearest to y among those that snap to `chosen` and are not too near the edge."""
    rank = torch.bucketize(chosen, values)
    gaps = values.diff() / 2
    below = torch.cat([gaps[:1], gaps])[rank]  # the outermost cells are as wide on both sides
    above = torch.cat([gaps, gaps[-1:]])[rank]
    return torch.clamp(y, chosen - INSIDE * below, chosen + INSIDE * above)
