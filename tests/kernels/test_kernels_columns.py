"""Rounding column by column: the native loops are those of `quantize` in torch."""

import pytest
import torch
from torch import Tensor

from posttrain import kernels
from posttrain.kernels.columns import descend_columns, round_columns
from posttrain.numbers import GRIDS, decode_scaled
from posttrain.numbers.grids import levels
from posttrain.quantize.descent import one_by_one
from posttrain.quantize.gptq import _one_by_one

pytestmark = pytest.mark.skipif(not kernels.available(), reason=kernels.find().reason)

NAMES = ["int2", "int4", "int4z", "int8h", "nf4", "bnbfp4", "e2m1", "e3m2", "e4m3", "int3z"]
SHAPES = [(1, 1), (5, 17), (64, 16), (100, 37), (256, 3)]  # columns, rows


@pytest.fixture(params=kernels.isas() if kernels.available() else ["none"])
def isa(request):
    kernels.use(request.param)
    yield request.param
    kernels.use()


def example(name: str, columns: int, rows: int, exact: bool = False):
    """Values about the grid, a positive definite matrix, steps (some zero) and zero points.

    exact: all numbers are such that float32 makes no error in a few columns.
    """
    g = torch.Generator().manual_seed(columns * 1009 + rows)
    grid = GRIDS[name]
    steps = 0.5 + torch.rand(columns, rows, generator=g)
    values = torch.randn(columns, rows, generator=g) * min(grid.max, 8) * steps
    square = torch.randn(columns, columns, generator=g)
    matrix = square @ square.T / columns + torch.eye(columns)
    zeros = None
    if grid.zero_point:
        zeros = torch.randint(0, int(grid.max) + 1, (columns, rows), generator=g).float()
    if exact:
        steps = 2.0 ** torch.randint(-1, 2, (columns, rows), generator=g)
        values = (values * 4).round() / 4
        matrix = torch.eye(columns) + (square * 2).round().triu(1) / 4
        matrix = matrix + matrix.triu(1).T
    steps[0, 0] = 0
    return grid, values, matrix, steps, zeros


def fractions(name: str) -> bool:
    """Whether products with the levels are exact."""
    values = levels(GRIDS[name])
    return bool((values * 64 == (values * 64).round()).all())


@pytest.mark.parametrize("name", [*filter(fractions, NAMES)])
@pytest.mark.parametrize("rows", [1, 16, 37, 300])
def test_where_floats_are_exact_so_are_codes_and_errors(isa, name, rows):
    """Ties and the ends of the grid included."""
    grid, values, matrix, steps, zeros = example(name, 4, rows, exact=True)
    ours, theirs = values.clone(), values.clone()
    codes, errors = round_columns(ours, matrix, grid, steps, zeros)
    expected, wanted = _one_by_one(theirs, matrix, grid, steps, zeros)
    assert torch.equal(grid.decode(codes), grid.decode(expected))
    assert torch.equal(errors, wanted)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("columns,rows", [*SHAPES, (600, 20)])
def test_every_column_becomes_what_is_nearest_to_what_is_left(isa, name, columns, rows):
    grid, values, matrix, steps, zeros = example(name, columns, rows)
    codes, errors = round_columns(values.clone(), matrix, grid, steps, zeros)
    chosen = decode_scaled(codes, grid, steps, zeros).double()
    upper = matrix.double().triu(1)
    left = values.double() - upper.T @ errors.double()
    scale = left.abs().max()
    assert (errors - (left - chosen) / matrix.diagonal()[:, None]).abs().max() < 1e-5 * scale
    offset = torch.zeros(()) if zeros is None else zeros
    grid_values = levels(grid)[:, None, None]
    nearest = ((grid_values - offset) * steps - left).abs().amin(0)
    assert ((chosen - left).abs() - nearest).max() < 1e-5 * scale


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("columns,rows", SHAPES)
def test_a_visit_of_descent_is_the_one_in_torch(isa, name, columns, rows):
    grid, weight, hessian, steps, zeros = example(name, columns, rows)
    hessian[columns // 2, columns // 2] = 0.0  # such a column stays
    start = grid.snap(torch.zeros(columns, rows)) * steps
    step = torch.where(steps == 0, 1.0, steps)

    def nearest(j: int, target: Tensor) -> Tensor:
        offset = 0.0 if zeros is None else zeros[j]
        return (grid.snap(target / step[j] + offset) - offset) * steps[j]

    run = slice(0, columns)
    ours, theirs = start.clone(), start.clone()
    errors, wanted = start - weight, start - weight
    slope = hessian @ errors
    moved = descend_columns(ours, errors, slope.clone(), hessian, grid, steps, zeros)
    expected = one_by_one(hessian, nearest)(run, theirs, wanted, slope.clone())
    assert moved == expected
    assert torch.equal(ours[columns // 2], start[columns // 2])
    assert (errors - (ours - weight)).abs().max() < 1e-4 * weight.abs().max()
    # Another rounding of a sum may tip a weight that lies between two levels, and those after it.
    assert (ours != theirs).double().mean() < 0.01
    before, after = (((e.T @ hessian) * e.T).sum(1) for e in (start - weight, ours - weight))
    assert (after <= before * (1 + 1e-5)).all()


@pytest.mark.parametrize("name", NAMES)
def test_all_instruction_sets_give_the_same_bits(name):
    grid, values, matrix, steps, zeros = example(name, 128, 45)
    found = []
    for isa in kernels.isas():
        kernels.use(isa)
        left, moving, errors = values.clone(), values.clone(), values * 0.1
        codes, costs = round_columns(left, matrix, grid, steps, zeros)
        descend_columns(moving, errors, matrix @ errors, matrix, grid, steps, zeros)
        found.append((codes, left, costs, moving, errors))
    kernels.use()
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_nothing_moves_where_all_is_best():
    grid, values, _, steps, _ = example("int4", 16, 20)
    values = grid.snap(torch.randn(16, 20)) * steps
    errors = torch.zeros_like(values)
    before = values.clone()
    slope, hessian = torch.zeros_like(values), torch.eye(16)
    assert not descend_columns(values, errors, slope, hessian, grid, steps, None)
    assert torch.equal(values, before)
