"""AdaRound: which of the two grid values next to a weight it becomes is learnt."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from posttrain.numbers import QTensor
from posttrain.numbers.grids import levels
from posttrain.numbers.scales import nonzero
from posttrain.quantize.descent import damped, one_by_one, quadratic, sweep
from posttrain.quantize.learned import neighbours
from posttrain.quantize.nearest import MSEGrid
from posttrain.quantize.problem import LinearSolver, Problem, count, require, within

LOW, HIGH = -0.1, 1.1  # of the stretched sigmoid, so that h reaches 0 and 1 at finite V
FIRST_BETA, LAST_BETA = 20.0, 2.0


@dataclass(frozen=True)
class AdaRound(LinearSolver):
    """Learned rounding: minimise over V, one number for each weight,

        ||X (W - W^)^T||^2 + lambda sum(1 - |2h - 1|^beta)

        W^ = s (below + h (above - below)),    h = clip(1.2 sigmoid(V) - 0.1, 0, 1)

    with `below` and `above` the grid values next to W / s (floor and ceil of an integer grid) and
    fixed scales s. Beta falls from 20 to 2, and the second term drives every h to 0 or 1 (Nagel et
    al. 2020, arXiv:2004.10568). The first is a quadratic form of W - W^ in the second moments of
    the input, so no inputs are kept; it counts relative to its value for rounding to nearest, row
    by row. What was learnt is then settled (not in the paper, and much of the gain where steps are
    few): column by column each weight takes the one of its two values that makes the first term
    least. A row that does not end below rounding to nearest is rounded to nearest.

    Args:
        steps: of Adam.
        rate: its learning rate, of V.
        strength: lambda.
        warmup: share of the steps before the second term counts.
        damping: share of the mean diagonal added to the second moments: errors cost something in
            directions that the calibration text does not show.
        sweeps: over the columns, at most, when settling; 0 for the method as published.
        clip: "absmax", or "mse" to take each scale from the MSE grid.
    """

    name: ClassVar[str] = "adaround"
    calibrated: ClassVar[bool] = True
    steps: int = 100
    rate: float = 0.1
    strength: float = 30.0
    warmup: float = 0.2
    damping: float = 0.01
    sweeps: int = 8
    clip: str = "absmax"

    def __post_init__(self) -> None:
        require(self.clip in ("absmax", "mse"), self, "clip must be absmax or mse")
        require(count(self.steps), self, "steps must be a positive whole number")
        require(within(self.rate, 1), self, "rate must be in (0, 1]")
        require(within(self.strength, 1e6), self, "strength must be positive")
        require(within(self.warmup, 1), self, "warmup must be in (0, 1]")
        require(within(self.damping, 1), self, "damping must be in (0, 1]")
        require(self.sweeps == 0 or count(self.sweeps), self, "sweeps must be a whole number")

    def solve(self, problem: Problem) -> QTensor:
        moments, values = problem.reached, levels(problem.spec.grid)
        if values is None:
            problem.log(f"{problem.spec.grid.name} is too fine to choose in: rounded to nearest")
        if moments is None or values is None:
            return problem.rounded()
        clip_ratio = MSEGrid().best_ratio(problem) if self.clip == "mse" else 1.0
        rounded = problem.rounded(clip_ratio)
        choice = _Choice.of(problem.weight, rounded, values)
        hessian = damped(moments, self.damping, self.name)
        nearest = quadratic(rounded.dequantize() - problem.weight, hessian)
        up = self._learn(choice, hessian, nearest, problem)
        up = self._settle(choice, up, hessian)
        learnt = quadratic(choice.error(up.to(torch.float32)), hessian)
        codes = problem.spec.grid.encode(torch.where(up, choice.above, choice.below))
        better = (learnt < nearest)[:, None]
        return QTensor(torch.where(better, codes, rounded.codes), rounded.scales, problem.spec)

    def _learn(
        self, choice: "_Choice", hessian: Tensor, nearest: Tensor, problem: Problem
    ) -> Tensor:
        """Whether each weight takes the value above it."""
        share = ((choice.share - LOW) / (HIGH - LOW)).clamp(0.02, 0.98)
        v = share.logit().requires_grad_()
        # So that rounding to nearest costs 1 a weight, as the second term does at its most.
        unit = hessian.shape[0] / nearest.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
        adam = torch.optim.Adam([v], lr=self.rate)
        for step in problem.track(range(self.steps), self.name):
            h = _open(v)
            error = choice.error(h)
            # Its gradient is that of the quadratic form, for one product instead of two.
            loss = (2 * unit * (error.detach() @ hessian) * error).sum()
            loss = loss + self.strength * self._undecided(h, step / self.steps)
            adam.zero_grad()
            loss.backward()
            adam.step()
        return _open(v.detach()) > 0.5

    def _settle(self, choice: "_Choice", up: Tensor, hessian: Tensor) -> Tensor:
        low, width = choice.base.T.contiguous(), choice.width.T.contiguous()

        def nearest(j: int, target: Tensor) -> Tensor:
            return low[j] + width[j] * (2 * (target - low[j]) > width[j])

        # In errors instead of weights, the weight to come near to is 0.
        error = choice.error(up.to(torch.float32))
        error = sweep(
            torch.zeros_like(error), error, hessian, self.sweeps, one_by_one(hessian, nearest)
        )
        return 2 * (error - choice.base) > choice.width

    def _undecided(self, h: Tensor, progress: float) -> Tensor:
        """sum(1 - |2h - 1|^beta); 0 while warming up."""
        if progress < self.warmup:
            return h.new_zeros(())
        left = 1 - (progress - self.warmup) / (1 - self.warmup)
        beta = LAST_BETA + (FIRST_BETA - LAST_BETA) * left
        return (1 - (2 * h - 1).abs().pow(beta)).sum()


@dataclass(frozen=True)
class _Choice:
    """The two grid values next to each weight, and what is lost with a mixture of them.

    base: error of `below`. width: distance of the two, in the weight's unit. share: how far up
    between them the weight lies.
    """

    below: Tensor
    above: Tensor
    base: Tensor
    width: Tensor

    @classmethod
    def of(cls, weight: Tensor, rounded: QTensor, values: Tensor) -> "_Choice":
        step = rounded.scales.expand(weight.shape)
        zero = rounded.scales.expand_zero_point(weight.shape)
        offset = 0.0 if zero is None else zero
        below, above = neighbours(weight / nonzero(step) + offset, values)
        return cls(below, above, (below - offset) * step - weight, (above - below) * step)

    @property
    def share(self) -> Tensor:
        return -self.base / torch.where(self.width == 0, torch.inf, self.width)

    def error(self, h: Tensor) -> Tensor:
        """W^ - W."""
        return self.base + h * self.width


def _open(v: Tensor) -> Tensor:
    return ((HIGH - LOW) * v.sigmoid() + LOW).clamp(0, 1)
