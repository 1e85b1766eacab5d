"""Solvers: given a weight and a Spec, decide the codes.

    rtn    round each weight to the nearest grid value (scale from absmax).
    mse    rtn with each scale shrunk to the ratio that minimises the squared weight error.
    gptq   minimise ||X W^T - X W^^T||^2: round column by column and move each column's error into
           the columns not rounded yet (Frantar et al. 2022, arXiv:2210.17323), for any grid and
           any partition of the scales.

Every solver takes a `Problem` and returns a QTensor. One with `calibrated = True` needs the second
moments of the layer's input.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Protocol

import torch

from posttrain.errors import UserError, did_you_mean
from posttrain.numbers import (
    Factor,
    QTensor,
    Scales,
    Spec,
    decode_scaled,
    encode_scaled,
    fit_scales,
    quantize,
)
from posttrain.numbers.partition import Partition, blocked, matrix_shape
from posttrain.quantize.calibration import InputMoments

Log = Callable[[str], None]


def _silent(message: str) -> None:
    """A log that nobody reads."""


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
    """

    weight: torch.Tensor
    spec: Spec
    moments: InputMoments | None = None
    known: Mapping[int, torch.Tensor | QTensor] = field(default_factory=dict)
    log: Log = _silent

    def rounded(self, clip_ratio: float | torch.Tensor = 1.0) -> QTensor:
        """Round to nearest with scales at `clip_ratio` of their absmax value."""
        return quantize(self.weight, self.spec, scales=self.scales(clip_ratio))

    def scales(self, clip_ratio: float | torch.Tensor = 1.0) -> Scales:
        return fit_scales(self.weight, self.spec, clip_ratio=clip_ratio, known=self.known)


class Solver(Protocol):
    """What the pipeline asks of a solver."""

    name: ClassVar[str]
    calibrated: ClassVar[bool]

    def solve(self, problem: Problem) -> QTensor: ...


@dataclass(frozen=True)
class RTN:
    """Round to nearest; the scale maps each block's absmax to the top of the grid."""

    name: ClassVar[str] = "rtn"
    calibrated: ClassVar[bool] = False

    def solve(self, problem: Problem) -> QTensor:
        return problem.rounded()


@dataclass(frozen=True)
class MSEGrid:
    """Search `steps` ratios from 1 down to `lowest` of the absmax scale, per scale block.

    The best ratio minimises the squared error of the block's weights.
    """

    name: ClassVar[str] = "mse"
    calibrated: ClassVar[bool] = False
    steps: int = 24
    lowest: float = 0.5

    def __post_init__(self) -> None:
        _require(_count(self.steps), self, "steps must be a positive whole number")
        _require(_within(self.lowest, 1), self, "lowest must be in (0, 1]")

    def solve(self, problem: Problem) -> QTensor:
        return problem.rounded(self.best_ratio(problem))

    def best_ratio(self, problem: Problem) -> torch.Tensor:
        """Ratio per finest block, as `fit_scales(clip_ratio=...)` takes it."""
        partition = problem.spec.factors[0].partition
        best_error: torch.Tensor | None = None
        for ratio in torch.linspace(1.0, self.lowest, self.steps).tolist():
            difference = problem.weight - problem.rounded(ratio).dequantize()
            error = block_sum(difference.square(), partition)
            if best_error is None:
                best_error, best = error, torch.full_like(error, ratio)
                continue
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best = torch.where(better, ratio, best)
        return best


@dataclass(frozen=True)
class GPTQ:
    """Second-order rounding.

    Args:
        damping: share of the mean diagonal added to the Hessian X^T X; raised tenfold, with a
            message, while the Cholesky factorisation fails.
        actorder: round the columns of the largest input energy first. Scales are then fixed
            before rounding starts, so the stored layout does not change.
        lazy: columns updated together (speed only).
        clip: "absmax", or "mse" to take each scale from the MSE grid.
    """

    name: ClassVar[str] = "gptq"
    calibrated: ClassVar[bool] = True
    damping: float = 0.01
    actorder: bool = False
    lazy: int = 128
    clip: str = "absmax"

    def __post_init__(self) -> None:
        _require(self.clip in ("absmax", "mse"), self, "clip must be absmax or mse")
        _require(_within(self.damping, 1), self, "damping must be in (0, 1]")
        _require(isinstance(self.actorder, bool), self, "actorder must be true or false")
        _require(_count(self.lazy), self, "lazy must be a positive whole number")

    def solve(self, problem: Problem) -> QTensor:
        if problem.moments is None or problem.moments.tokens == 0:
            problem.log("no calibration token reached this layer: rounded to nearest")
            return problem.rounded()
        factor, order = self._factor(problem.moments, problem.log)
        scales = problem.scales(self._clip_ratio(problem))
        width = 0 if self.actorder else _refit_width(problem.spec)
        coarse = {i: scales.stored[i] for i in range(1, len(scales.stored))}

        def refit(part: torch.Tensor) -> Scales:
            piece = replace(problem, weight=part, known=coarse)
            return piece.scales(self._clip_ratio(piece))

        return _round_columns(problem, scales, factor, order, self.lazy, width, refit)

    def _clip_ratio(self, problem: Problem) -> torch.Tensor | float:
        return MSEGrid().best_ratio(problem) if self.clip == "mse" else 1.0

    def _factor(self, moments: InputMoments, log: Log) -> tuple[torch.Tensor, torch.Tensor]:
        """Upper Cholesky factor of the inverse damped Hessian, and the order of its columns.

        Linears that share an input share the moments, hence the factor.
        """
        key = (self.damping, self.actorder)
        if key not in moments.memo:
            hessian = moments.gram.to(torch.float64) / moments.tokens
            energy = hessian.diagonal()
            order = torch.arange(len(energy))
            if self.actorder:
                order = energy.argsort(descending=True, stable=True)
            hessian = hessian[order][:, order]
            moments.memo[key] = (_inverse_cholesky(hessian, self.damping, log), order)
        return moments.memo[key]


def _inverse_cholesky(hessian: torch.Tensor, damping: float, log: Log) -> torch.Tensor:
    """U with H^-1 = U^T U, U upper triangular, float32; damping raised until H is definite."""
    if not hessian.isfinite().all():
        raise UserError("gptq: calibration met NaN or infinite inputs; use another text, or rtn")
    # A column that is never excited gets unit curvature: its error moves nowhere.
    hessian = hessian + torch.diag((hessian.diagonal() <= 0).to(hessian.dtype))
    mean = hessian.diagonal().mean()
    while True:
        damped = hessian + damping * mean * torch.eye(len(hessian), dtype=hessian.dtype)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            return upper.to(torch.float32)
        if damping >= 1:
            raise UserError(
                "gptq: the Hessian is not positive definite even at damping 1: calibrate on more "
                "text, or use solver rtn"
            )
        raised = min(10 * damping, 1.0)
        log(f"Hessian not positive definite at damping {damping:g}: retrying with {raised:g}")
        damping = raised


def _refit_width(spec: Spec) -> int:
    """Columns per group where each group's scale can be fitted when rounding reaches it.

    0 where scales must be fixed before rounding starts (a scale that is itself quantized across
    groups, or blocks that are not runs of one row).
    """
    first, *rest = spec.factors
    block = first.partition
    alone = block.rows == 1 and block.cols > 0 and not block.flat and first.nested is None
    return block.cols if alone and all(_is_coarse(factor) for factor in rest) else 0


def _is_coarse(factor: Factor) -> bool:
    return factor.partition.cols == 0 and factor.nested is None


def block_sum(x: torch.Tensor, partition: Partition) -> torch.Tensor:
    """Sum of `x` over each block of a partition: [block rows, block columns]."""
    matrix = x.reshape(matrix_shape(tuple(x.shape), partition.flat))
    return blocked(matrix, partition.block((matrix.shape[0], matrix.shape[1]))).sum((1, 3))


def _round_columns(
    problem: Problem,
    scales: Scales,
    factor: torch.Tensor,
    order: torch.Tensor,
    lazy: int,
    width: int,
    refit: Callable[[torch.Tensor], Scales],
) -> QTensor:
    """Round the columns of the weight [out, in] in `order`, feeding each error forward.

    `width` > 0: `refit` fits the scales of the `width` columns about to be rounded.
    """
    weight, grid = problem.weight, problem.spec.grid
    rows, columns = weight.shape
    # Transposed, so that a column of the weight is contiguous.
    left = weight.T[order].contiguous()
    step = scales.expand(weight.shape).T[order].contiguous()
    zero = scales.expand_zero_point(weight.shape)
    zero = None if zero is None else zero.T[order].contiguous()
    codes: list[torch.Tensor] = []
    lazy = max(lazy // width, 1) * width if width else lazy
    for start in range(0, columns, lazy):
        stop = min(start + lazy, columns)
        errors = torch.empty(stop - start, rows)
        for j in range(start, stop):
            if width and j % width == 0:
                end = min(j + width, columns)
                part = refit(left[j:end].T.contiguous())
                _replace_group(scales, part, j // width)
                step[j:end] = part.expand((rows, end - j)).T
                if zero is not None:
                    zero[j:end] = torch.as_tensor(part.expand_zero_point((rows, end - j))).T
            offset = None if zero is None else zero[j]
            code = encode_scaled(left[j], grid, step[j], offset)
            value = decode_scaled(code, grid, step[j], offset)
            error = torch.div(left[j] - value, factor[j, j], out=errors[j - start])
            left[j + 1 : stop].addr_(factor[j, j + 1 : stop], error, alpha=-1)
            codes.append(code)
        left[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    ordered = torch.empty(columns, rows, dtype=codes[0].dtype)
    ordered[order] = torch.stack(codes)
    # A fresh Scales: the old one may have decoded its factors before they were refitted.
    return QTensor(ordered.T.contiguous(), replace(scales), problem.spec)


def _replace_group(scales: Scales, part: Scales, index: int) -> None:
    """Put the refitted scales of one group of columns in their place, in storage."""
    pairs = ((scales.stored[0], part.stored[0]), (scales.zero_point, part.zero_point))
    for whole, piece in pairs:
        if isinstance(whole, torch.Tensor) and isinstance(piece, torch.Tensor):
            whole[:, index] = piece[:, 0]


def _require(condition: bool, solver: Solver, message: str) -> None:
    if not condition:
        raise UserError(f"solver {solver.name}: {message}; found {solver}")


def _within(value: Any, top: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= top


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


SOLVERS: dict[str, type[Any]] = {cls.name: cls for cls in (RTN, MSEGrid, GPTQ)}


def make_solver(name: str, **options: Any) -> Solver:
    """The solver called `name` with its options checked; UserError with the nearest match."""
    if name not in SOLVERS:
        raise UserError(f"unknown solver {name!r}{did_you_mean(name, SOLVERS)}")
    known = {field.name for field in fields(SOLVERS[name])}
    for option in options:
        if option not in known:
            hint = did_you_mean(option, known) or f"; it has no option {option!r}"
            raise UserError(f"solver {name}: unknown option {option!r}{hint}")
    return SOLVERS[name](**options)
