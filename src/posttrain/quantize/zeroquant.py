"""ZQ-Local and ZQ-Global: weights and scales found by gradient descent.

ZeroQuant-V2 (Yao et al. 2023, arXiv:2303.08302). Both start from what another solver decided, learn
from most of the calibration windows, and look at the windows held back: what is kept is the best
of all that was seen on these, the start included.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posttrain.models.linear import seen
from posttrain.models.plan import LayerPlan
from posttrain.models.rotation import rotate
from posttrain.numbers import QTensor
from posttrain.numbers.grids import levels
from posttrain.quantize.descent import damped, quadratic, settle
from posttrain.quantize.gptq import GPTQ
from posttrain.quantize.learned import LearnedWeight
from posttrain.quantize.nearest import RTN, MSEGrid
from posttrain.quantize.problem import (
    BlockProblem,
    BlockSolver,
    LinearSolver,
    Problem,
    count,
    held_back,
    require,
    within,
)

STARTS = ("rtn", "mse", "gptq")
TEACHERS = ("full", "quantized")
LOOKS = 10  # at the windows held back, evenly spread over the steps


@dataclass(frozen=True)
class ZQLocal(LinearSolver):
    """Minimise ||X W^T - X W^^T||^2 over the weights and scales of one linear.

    By Adam with a straight-through estimator (see `learned`), X being what the product sees: where
    the plan quantizes inputs, quantized ones. The objective is a quadratic form in the second
    moments of X, so that each step sees all calibration tokens and no inputs are kept.

    Args:
        start: "rtn", "mse" or "gptq" (with `damping`, `clip` and `sweeps`).
        steps: of Adam, whose learning rates fall to zero along half a cosine.
        rate: learning rate of weights, in steps of their grid.
        scale_rate: learning rate of scales, relative to them.
        damping: share of the mean diagonal added to the second moments.
        clip: see `GPTQ`.
        sweeps: of coordinate descent (see `descent`), at most, over what was found; 0 for the
            method as published.
    """

    name: ClassVar[str] = "zq-local"
    calibrated: ClassVar[bool] = True
    holds_back: ClassVar[bool] = True
    start: str = "rtn"
    steps: int = 200
    rate: float = 0.002
    scale_rate: float = 0.01
    damping: float = 0.01
    clip: str = "mse"
    sweeps: int = 8

    def __post_init__(self) -> None:
        _check_descent(self)

    def solve(self, problem: Problem) -> QTensor:
        moments = problem.reached
        if moments is None:
            return problem.rounded()
        start = _starting(self).solve(problem)
        if levels(problem.spec.grid) is None:
            problem.log(f"{problem.spec.grid.name} is too fine to learn in: {self.start}")
            return start
        hessian = damped(moments, self.damping, self.name)
        held = moments.held.gram if moments.held is not None else hessian

        def cost(qweight: QTensor) -> float:
            return float(quadratic(qweight.dequantize() - problem.weight, held).sum())

        weight = LearnedWeight(problem.weight, start)
        best, least = start, cost(start)
        unit = 1 / max(float(quadratic(start.dequantize() - problem.weight, hessian).sum()), 1e-30)
        adam = _adam([weight], self)
        for step in problem.track(range(self.steps), self.name):
            _set_rates(adam, self, step)
            error = weight.value() - problem.weight
            # Its gradient is that of the quadratic form, for one product instead of two.
            adam.zero_grad()
            (2 * unit * (error.detach() @ hessian) * error).sum().backward()
            adam.step()
            if _looks(step, self.steps):
                found = weight.qtensor()
                if (now := cost(found)) < least:
                    best, least = found, now
        settled = settle(problem.weight, best, hessian, self.sweeps)
        return settled if cost(settled) < least else best


@dataclass(frozen=True)
class ZQGlobal(BlockSolver):
    """Minimise ||f(x) - f^(x)||^2 over the weights and scales of all planned linears of a block.

    f is the full-precision decoder block and f^ the quantized one, with its inputs quantized where
    the plan says so, going backward as if they were not. By Adam with a straight-through estimator
    (see `learned`) over calibration windows; its state is that of one block. ZeroQuant-V2 calls it
    ZQ-Global and earlier layerwise knowledge distillation; BRECQ (Li et al. 2021, arXiv:2102.05426)
    reconstructs blocks too.

    Args:
        start: "rtn", "mse" or "gptq" (with `damping`, `clip` and `sweeps`).
        teacher: what f is given: "full", the outputs of the full-precision blocks before it, so
            that f^ also makes good what the blocks before it lost; or "quantized", the outputs of
            the quantized blocks, as f^ is in either case.
        steps: of Adam, whose learning rates fall to zero along half a cosine.
        batch: calibration windows in a step.
        rate: learning rate of weights, in steps of their grid.
        scale_rate: learning rate of scales, relative to them.
        damping, clip, sweeps: see `GPTQ`.
    """

    name: ClassVar[str] = "zq-global"
    start: str = "gptq"
    teacher: str = "full"
    steps: int = 60
    batch: int = 2
    rate: float = 0.01
    scale_rate: float = 0.001
    damping: float = 0.1
    clip: str = "mse"
    sweeps: int = 8

    def __post_init__(self) -> None:
        _check_descent(self)
        require(self.teacher in TEACHERS, self, f"teacher must be {' or '.join(TEACHERS)}")
        require(count(self.batch), self, "batch must be a positive whole number")

    @property
    def first(self) -> LinearSolver:
        return _starting(self)

    @property
    def needs_moments(self) -> bool:
        return self.first.calibrated

    def solve_block(self, problem: BlockProblem) -> dict[str, QTensor]:
        best = {name: self.first.solve(layer) for name, layer in problem.problems.items()}
        learnt = {
            name: LearnedWeight(problem.problems[name].weight, start)
            for name, start in best.items()
            if levels(start.spec.grid) is not None
        }
        held = held_back(problem.samples)
        windows = [i for i in range(problem.samples) if i not in held]
        held = held or windows
        first = least = _distance(problem, best, held)
        if not learnt or first == 0:
            return best
        adam = _adam(list(learnt.values()), self)
        order = _endless(windows, problem.seed)
        for step in problem.track(range(self.steps), self.name):
            _set_rates(adam, self, step)
            values = {name: weight.value() for name, weight in learnt.items()}
            adam.zero_grad()
            _backward(problem, best, values, [next(order) for _ in range(self.batch)], first)
            adam.step()
            if _looks(step, self.steps):
                found = best | {name: weight.qtensor() for name, weight in learnt.items()}
                if (now := _distance(problem, found, held)) < least:
                    best, least = found, now
        problem.log(f"output error {math.sqrt(least / first):.3f} of what {self.start} leaves")
        return best


def _backward(
    problem: BlockProblem,
    stored: Mapping[str, QTensor],
    values: Mapping[str, Tensor],
    windows: list[int],
    unit: float,
) -> None:
    """Add the gradients of the block's output error to what `values` were made from.

    Windows go through one by one, so that memory does not grow with the batch.
    """
    leaves = {name: value.detach().requires_grad_() for name, value in values.items()}
    others = {name: q.dequantize() for name, q in stored.items() if name not in leaves}
    with _computing(problem, leaves | others):
        for window in windows:
            output = problem.run(problem.inputs(window))
            loss = _squared(output, problem.targets(window)) / (unit * len(windows))
            loss.backward()
    pairs = [(values[name], leaf.grad) for name, leaf in leaves.items() if leaf.grad is not None]
    torch.autograd.backward([value for value, _ in pairs], [grad for _, grad in pairs])


@torch.no_grad()
def _distance(problem: BlockProblem, stored: Mapping[str, QTensor], windows: list[int]) -> float:
    """Mean output error over windows."""
    total = 0.0
    with _computing(problem, {name: q.dequantize() for name, q in stored.items()}):
        for window in windows:
            output = problem.run(problem.inputs(window))
            total += float(_squared(output, problem.targets(window)))
    return total / len(windows)


def _squared(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


@contextmanager
def _computing(problem: BlockProblem, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """The block's planned linears compute with these weights, as stored, and quantized inputs."""
    for name, weight in weights.items():
        problem.modules[name].forward = _product(problem, name, weight)
    try:
        yield
    finally:
        for name in weights:
            del problem.modules[name].forward


def _product(problem: BlockProblem, name: str, weight: Tensor):
    layer, module = problem.layers[name], problem.modules[name]
    assert isinstance(module, nn.Linear)

    def forward(x: Tensor) -> Tensor:
        return F.linear(straight_through(x, layer), weight, module.bias)

    return forward


def straight_through(x: Tensor, layer: LayerPlan) -> Tensor:
    """`linear.seen`, going backward as if inputs were rotated but not quantized."""
    if layer.input is None:
        return seen(x, layer)
    x = rotate(x) if layer.rotate else x
    return x + (seen(x.detach(), replace(layer, rotate=False)) - x).detach()


def _check_descent(solver: ZQLocal | ZQGlobal) -> None:
    require(solver.start in STARTS, solver, f"start must be {', '.join(STARTS)}")
    require(count(solver.steps), solver, "steps must be a positive whole number")
    require(within(solver.rate, 1), solver, "rate must be in (0, 1]")
    require(within(solver.scale_rate, 1), solver, "scale_rate must be in (0, 1]")
    require(solver.clip in ("absmax", "mse"), solver, "clip must be absmax or mse")
    require(within(solver.damping, 1), solver, "damping must be in (0, 1]")
    require(solver.sweeps == 0 or count(solver.sweeps), solver, "sweeps must be a whole number")


def _starting(solver: ZQLocal | ZQGlobal) -> LinearSolver:
    gptq = GPTQ(damping=solver.damping, clip=solver.clip, sweeps=solver.sweeps)
    return {"rtn": RTN(), "mse": MSEGrid(), "gptq": gptq}[solver.start]


def _adam(weights: list[LearnedWeight], solver: ZQLocal | ZQGlobal) -> torch.optim.Adam:
    ratios = [weight.log_ratio for weight in weights if weight.log_ratio is not None]
    groups = [{"params": [weight.shift for weight in weights], "highest": solver.rate}]
    groups += [{"params": ratios, "highest": solver.scale_rate}] if ratios else []
    return torch.optim.Adam(groups)


def _set_rates(adam: torch.optim.Adam, solver: ZQLocal | ZQGlobal, step: int) -> None:
    for group in adam.param_groups:
        group["lr"] = group["highest"] * (1 + math.cos(math.pi * step / solver.steps)) / 2


def _looks(step: int, steps: int) -> bool:
    return (step + 1) % max(1, steps // LOOKS) == 0 or step + 1 == steps


def _endless(windows: list[int], seed: int) -> Iterator[int]:
    """The windows in random order, again and again."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for i in torch.randperm(len(windows), generator=generator).tolist():
            yield windows[i]
