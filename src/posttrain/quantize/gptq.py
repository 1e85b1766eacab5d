"""GPTQ: rounding column by column, each error moved into the columns not rounded yet.

Minimises ||X W^T - X W^^T||^2 (Frantar et al. 2022, arXiv:2210.17323), for any grid and any
partition of the scales.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from posttrain.errors import UserError
from posttrain.kernels.columns import round_columns, rounds
from posttrain.numbers import Factor, Grid, QTensor, Scales, Spec, decode_scaled, encode_scaled
from posttrain.quantize.calibration import InputMoments
from posttrain.quantize.descent import damped, settle
from posttrain.quantize.nearest import MSEGrid
from posttrain.quantize.problem import LinearSolver, Log, Problem, count, require, within


@dataclass(frozen=True)
class GPTQ(LinearSolver):
    """Second-order rounding.

    Args:
        damping: share of the mean diagonal added to the Hessian X^T X; raised tenfold, with a
            message, while the Cholesky factorisation fails.
        actorder: round the columns of the largest input energy first. Scales are then fixed
            before rounding starts, so the stored layout does not change.
        lazy: columns updated together (speed only).
        clip: "absmax", or "mse" to take each scale from the MSE grid.
        sweeps: of coordinate descent afterwards, at most (see `descent`): weights change again
            where that lowers the same error, until nothing does.
    """

    name: ClassVar[str] = "gptq"
    calibrated: ClassVar[bool] = True
    damping: float = 0.01
    actorder: bool = False
    lazy: int = 128
    clip: str = "absmax"
    sweeps: int = 0

    def __post_init__(self) -> None:
        require(self.clip in ("absmax", "mse"), self, "clip must be absmax or mse")
        require(within(self.damping, 1), self, "damping must be in (0, 1]")
        require(isinstance(self.actorder, bool), self, "actorder must be true or false")
        require(count(self.lazy), self, "lazy must be a positive whole number")
        require(self.sweeps == 0 or count(self.sweeps), self, "sweeps must be a whole number")

    def solve(self, problem: Problem) -> QTensor:
        moments = problem.reached
        if moments is None:
            return problem.rounded()
        factor, order = self._factor(moments, problem.log)
        scales = problem.scales(self._clip_ratio(problem))
        width = 0 if self.actorder else _refit_width(problem.spec)
        coarse = {i: scales.stored[i] for i in range(1, len(scales.stored))}

        def refit(part: torch.Tensor) -> Scales:
            piece = replace(problem, weight=part, known=coarse)
            return piece.scales(self._clip_ratio(piece))

        found = _round_columns(problem, scales, factor, order, self.lazy, width, refit)
        hessian = damped(moments, self.damping, self.name) if self.sweeps else moments.gram
        return settle(problem.weight, found, hessian, self.sweeps)

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
    # A column that is never excited gets unit curvature: its error moves nowhere. It has no part in
    # the mean, which is in the units of the inputs.
    dead = hessian.diagonal() <= 0
    hessian = hessian + torch.diag(dead.to(hessian.dtype))
    live = hessian.diagonal() if dead.all() or not dead.any() else hessian.diagonal()[~dead]
    mean = live.mean()
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
    rounded = round_columns if rounds(grid, weight) else _one_by_one
    lazy = max(lazy // width, 1) * width if width else lazy
    size = width or lazy
    for start in range(0, columns, lazy):
        stop = min(start + lazy, columns)
        errors = []
        for begin in range(start, stop, size):
            end = min(begin + size, stop)
            run = slice(begin, end)
            if width:
                part = refit(left[run].T.contiguous())
                _replace_group(scales, part, begin // width)
                step[run] = part.expand((rows, end - begin)).T
                if zero is not None:
                    zero[run] = torch.as_tensor(part.expand_zero_point((rows, end - begin))).T
            offset = None if zero is None else zero[run]
            code, error = rounded(left[run], factor[run, run], grid, step[run], offset)
            left[end:stop].addmm_(factor[run, end:stop].T, error, alpha=-1)
            codes.append(code)
            errors.append(error)
        left[stop:].addmm_(factor[start:stop, stop:].T, torch.cat(errors), alpha=-1)
    ordered = torch.empty(columns, rows, dtype=codes[0].dtype)
    ordered[order] = torch.cat(codes)
    # A fresh Scales: the old one may have decoded its factors before they were refitted.
    return QTensor(ordered.T.contiguous(), replace(scales), problem.spec)


def _one_by_one(
    left: torch.Tensor,
    factor: torch.Tensor,
    grid: Grid,
    step: torch.Tensor,
    zero: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`kernels.columns.round_columns` in plain torch: what that is held to."""
    codes, errors = [], torch.empty_like(left)
    for j, column in enumerate(left):
        offset = None if zero is None else zero[j]
        code = encode_scaled(column, grid, step[j], offset)
        value = decode_scaled(code, grid, step[j], offset)
        error = torch.div(column - value, factor[j, j], out=errors[j])
        left[j + 1 :].addr_(factor[j, j + 1 :], error, alpha=-1)
        codes.append(code)
    return torch.stack(codes), errors


def _replace_group(scales: Scales, part: Scales, index: int) -> None:
    """Put the refitted scales of one group of columns in their place, in storage."""
    pairs = ((scales.stored[0], part.stored[0]), (scales.zero_point, part.zero_point))
    for whole, piece in pairs:
        if isinstance(whole, torch.Tensor) and isinstance(piece, torch.Tensor):
            whole[:, index] = piece[:, 0]
