"""What a solver is given, and what the pipeline asks of it.

Two shapes of solver: a `LinearSolver` decides one weight at a time, a `BlockSolver` all planned
linears of a decoder block at once. Either is a frozen dataclass whose fields are its options.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from posttrain.errors import UserError
from posttrain.models.plan import LayerPlan
from posttrain.numbers import QTensor, Scales, Spec, fit_scales, quantize
from posttrain.quantize.calibration import InputMoments

Log = Callable[[str], None]
Track = Callable[[range, str], Iterable[int]]


def _silent(message: str) -> None:
    """A log that nobody reads."""


def untracked(steps: range, what: str) -> Iterable[int]:
    """A progress bar that nobody sees."""
    return steps


@dataclass(frozen=True)
class Problem:
    """One layer to solve.

    Attributes:
        weight: [out, in] float32 (experts: [experts, out, in]).
        spec: what it becomes.
        moments: second moments of the layer's input, for calibrated solvers.
        known: stored scale factors, by index, that are given (a per-tensor factor that layers
            fused by a runtime share).
        log: where a solver says what a user should know.
        track: goes through the steps of a long solve and shows how far it is.
    """

    weight: torch.Tensor
    spec: Spec
    moments: InputMoments | None = None
    known: Mapping[int, torch.Tensor | QTensor] = field(default_factory=dict)
    log: Log = _silent
    track: Track = untracked

    def rounded(self, clip_ratio: float | torch.Tensor = 1.0) -> QTensor:
        """Round to nearest with scales at `clip_ratio` of their absmax value."""
        return quantize(self.weight, self.spec, scales=self.scales(clip_ratio))

    def scales(self, clip_ratio: float | torch.Tensor = 1.0) -> Scales:
        return fit_scales(self.weight, self.spec, clip_ratio=clip_ratio, known=self.known)

    @property
    def reached(self) -> InputMoments | None:
        """The moments; None, said in the log, where no calibration token reached this layer."""
        if self.moments is not None and self.moments.tokens > 0:
            return self.moments
        self.log("no calibration token reached this layer: rounded to nearest")
        return None


@dataclass(frozen=True)
class BlockProblem:
    """One decoder block to solve.

    Attributes:
        problems: full name of each planned linear -> its weight and format.
        layers: full name -> what its input passes through before the product.
        modules: full name -> the module of the block that computes it in full precision.
        samples: calibration windows.
        inputs: what the block is given for a window under the quantized prefix, [1, window, hidden].
        targets: what its output for that window should be, of the same shape.
        run: the block's output for such an input, with gradients where they are wanted.
        seed: of the choice of windows.
        log, track: as in `Problem`.
    """

    problems: Mapping[str, Problem]
    layers: Mapping[str, LayerPlan]
    modules: Mapping[str, nn.Module]
    samples: int
    inputs: Callable[[int], torch.Tensor]
    targets: Callable[[int], torch.Tensor]
    run: Callable[[torch.Tensor], torch.Tensor]
    seed: int = 0
    log: Log = _silent
    track: Track = untracked


class _AnySolver:
    """What both shapes have.

    name: what recipes say. calibrated: whether it has to see text. holds_back: whether it also
    needs the moments of windows that it does not learn from.
    """

    name: ClassVar[str]
    calibrated: ClassVar[bool] = False
    holds_back: ClassVar[bool] = False

    @property
    def needs_moments(self) -> bool:
        """Whether it needs the second moments of what each linear sees."""
        return self.calibrated


class LinearSolver(_AnySolver, ABC):
    """Decides one weight at a time."""

    @abstractmethod
    def solve(self, problem: Problem) -> QTensor: ...


class BlockSolver(_AnySolver, ABC):
    """Decides the weights of a decoder block together."""

    calibrated: ClassVar[bool] = True

    @property
    @abstractmethod
    def teacher(self) -> str:
        """The inputs for which the full-precision block gives the targets: "full" for those of the
        full-precision prefix, "quantized" for those that the quantized block is given."""

    @property
    @abstractmethod
    def first(self) -> LinearSolver:
        """What decides where it starts, and layers that belong to no block."""

    @abstractmethod
    def solve_block(self, problem: BlockProblem) -> dict[str, QTensor]: ...


Solver = LinearSolver | BlockSolver


def held_back(samples: int) -> list[int]:
    """Which of the calibration windows are not learnt from but tell what was learnt: one in eight,
    spread over the text; none if there is just one."""
    return list(range(min(samples, 8) // 2, samples, 8)) if samples > 1 else []


def require(condition: bool, solver: Solver, message: str) -> None:
    """Raise UserError naming the solver and its options unless `condition` holds."""
    if not condition:
        raise UserError(f"solver {solver.name}: {message}; found {solver}")


def within(value: Any, top: float) -> bool:
    """Whether an option is a number in (0, top]."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= top


def count(value: Any) -> bool:
    """Whether an option is a positive whole number."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
