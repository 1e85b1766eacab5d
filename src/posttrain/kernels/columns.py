"""Rounding a weight column by column: the inner loops of GPTQ and of coordinate descent.

What rounding one column costs moves into the later ones, so columns come one after the other and in
torch each takes a dozen calls on a vector. Here a run of columns is one call that goes through the
rows side by side. `quantize.gptq` and `quantize.descent` have the same loops in torch.

Weights lie transposed, [columns, rows], contiguous float32, so that a column lies together.
"""

import ctypes

import torch
from torch import Tensor

from posttrain.kernels import library
from posttrain.kernels.library import Columns
from posttrain.numbers import Grid
from posttrain.numbers.grids import edges, levels

MOST_COLUMNS = MOST_LEVELS = 256  # in one call (native/posttrain.h)


def rounds(grid: Grid, weight: Tensor) -> bool:
    """Whether the kernels are here and can round this weight to this grid."""
    values, plain = levels(grid), weight.device.type == "cpu" and weight.dtype == torch.float32
    return plain and values is not None and len(values) <= MOST_LEVELS and library.available()


def round_columns(
    values: Tensor, factor: Tensor, grid: Grid, steps: Tensor, zeros: Tensor | None
) -> tuple[Tensor, Tensor]:
    """GPTQ on the columns of `values` [columns, rows], each becoming the nearest (level - zero) step.

    factor: [columns, columns], of the upper Cholesky factor of the inverse Hessian. Returns the
    codes [columns, rows] and the errors [columns, rows], each divided by its column's diagonal and
    already subtracted, times the factor, from the later of these columns.
    """
    if len(values) > MOST_COLUMNS:
        now, later = slice(MOST_COLUMNS), slice(MOST_COLUMNS, None)
        zero = (None, None) if zeros is None else (zeros[now], zeros[later])
        first = round_columns(values[now], factor[now, now], grid, steps[now], zero[0])
        values[later].addmm_(factor[now, later].T, first[1], alpha=-1)
        rest = round_columns(values[later], factor[later, later], grid, steps[later], zero[1])
        return torch.cat([first[0], rest[0]]), torch.cat([first[1], rest[1]])
    errors = torch.empty_like(values)
    ranks = torch.empty(values.shape, dtype=torch.uint8)
    columns = _columns(factor, grid, steps, zeros)
    status = library.native().pt_round_columns(
        columns, values.data_ptr(), errors.data_ptr(), ranks.data_ptr()
    )
    library.check(status, "columns to round")
    return grid.encode(_levels(grid))[ranks.int()], errors


def descend_columns(
    values: Tensor,
    errors: Tensor,
    slopes: Tensor,
    hessian: Tensor,
    grid: Grid,
    steps: Tensor,
    zeros: Tensor | None,
) -> bool:
    """One visit of coordinate descent to the columns of `values` [columns, rows], in place.

    errors: values minus the weight, changed along. slopes: the Hessian times all errors, rows of
    these columns. hessian: [columns, columns] of these columns. Returns whether anything moved.
    """
    moved = ctypes.c_int32()
    columns = _columns(hessian, grid, steps, zeros)
    status = library.native().pt_descend_columns(
        columns, values.data_ptr(), errors.data_ptr(), slopes.data_ptr(), ctypes.byref(moved)
    )
    library.check(status, "columns to descend on")
    return bool(moved.value)


def _columns(matrix: Tensor, grid: Grid, steps: Tensor, zeros: Tensor | None) -> Columns:
    matrix, (count, rows) = matrix.contiguous(), steps.shape
    values, limits = _levels(grid), edges(grid)
    for tensor in (matrix, steps, *(() if zeros is None else (zeros,))):
        assert tensor.dtype == torch.float32 and tensor.is_contiguous()
    zero = None if zeros is None else zeros.data_ptr()
    pointers = (matrix.data_ptr(), steps.data_ptr(), zero, values.data_ptr(), limits.data_ptr())
    columns = Columns(count, rows, *pointers, len(values))
    columns.alive = (matrix, values, limits)
    return columns


def _levels(grid: Grid) -> Tensor:
    values = levels(grid)
    assert values is not None  # callers ask `rounds` first
    return values
