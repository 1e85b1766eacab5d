"""Solvers that learn: neighbours and straight-through gradients, and never worse than the start."""

import pytest
import torch
from torch import nn

from posttrain.models.linear import QuantLinear, seen
from posttrain.models.plan import LayerPlan
from posttrain.numbers import GRIDS, Spec, quantize
from posttrain.quantize.calibration import InputMoments
from posttrain.quantize.descent import damped, quadratic
from posttrain.quantize.learned import LearnedWeight, levels, neighbours
from posttrain.quantize.problem import BlockProblem, Problem, held_back
from posttrain.quantize.solvers import GPTQ, RTN, AdaRound, MSEGrid, ZQGlobal, ZQLocal
from posttrain.quantize.zeroquant import straight_through

ROWS, COLUMNS = 12, 64
SPECS = [
    "int4 | fp16/g32",
    "int3z | fp16/g16",
    "int2 | fp32/row",
    "int4 | fp32/tensor",
    "int4 | fp16/t4x16",
    "int3 | fp16/col",
    "int4 | fp16/g24",  # does not divide: the last group is padded
    "int4 | fp16/flat48",
    "e2m1 | fp16/g32",
    "e3m2 | e4m3/g16",
    "mxfp4",
    "nvfp4",
    "nf4",
    "nf4-dq",
    "int4 | fp32/row^0.5 * fp32/col^0.5",
]
LISTED = [name for name, grid in GRIDS.items() if grid.signed and levels(grid) is not None]


def inputs(seed: int, tokens: int = 200) -> torch.Tensor:
    """Correlated, a few channels loud, [tokens, COLUMNS]."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(COLUMNS, COLUMNS, generator=generator) / COLUMNS**0.5
    x = torch.randn(tokens, COLUMNS, generator=generator) @ (mix + torch.eye(COLUMNS))
    x[:, ::17] *= 5
    return x


def problem(text: str, seed: int) -> Problem:
    """With moments of which a part is held back."""
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(100 + seed))
    moments = InputMoments(torch.zeros(COLUMNS, COLUMNS))
    x = inputs(seed)
    moments.add(x[:150])
    moments.held = InputMoments(torch.zeros(COLUMNS, COLUMNS))
    moments.held.add(x[150:])
    return Problem(weight, Spec.parse(text), moments)


def loss(given: Problem, qweight, hessian: torch.Tensor) -> torch.Tensor:
    return quadratic(qweight.dequantize() - given.weight, hessian)


@pytest.mark.parametrize("name", LISTED)
def test_neighbours_enclose_every_number_inside_the_grid(name):
    grid, values = GRIDS[name], levels(GRIDS[name])
    y = torch.linspace(1.1 * float(values[0]), 1.1 * float(values[-1]), 999)
    below, above = neighbours(y, values)
    inside = (y >= values[0]) & (y < values[-1])
    assert ((below <= y) & (y < above))[inside].all()
    assert torch.equal(below[~inside], above[~inside])
    snapped = grid.snap(y)
    assert ((snapped == below) | (snapped == above)).all()
    assert torch.equal(grid.decode(grid.encode(values)), values)


@pytest.mark.parametrize("clip", ["absmax", "mse"])
@pytest.mark.parametrize("text", SPECS)
def test_adaround_takes_a_neighbour_and_never_loses(text, clip):
    solver = AdaRound(steps=30, clip=clip)
    for seed in range(3):
        given = problem(text, seed)
        hessian = damped(given.moments, solver.damping, "")
        rounded = (MSEGrid() if clip == "mse" else RTN()).solve(given)
        learnt = solver.solve(given)
        before, after = loss(given, rounded, hessian), loss(given, learnt, hessian)
        assert (after <= before * (1 + 1e-5)).all() and after.sum() < 0.8 * before.sum()
        step, zero = learnt.scales.expand((ROWS, COLUMNS)), learnt.scales.expand_zero_point(
            (ROWS, COLUMNS)
        )  # fmt: skip
        y = given.weight / step + (0 if zero is None else zero)
        below, above = neighbours(y, levels(given.spec.grid))
        taken = given.spec.grid.decode(learnt.codes)
        assert ((taken == below) | (taken == above)).all()
        assert torch.equal(step, rounded.scales.expand((ROWS, COLUMNS)))


def test_adaround_learns_also_without_settling():
    given = problem("int4 | fp16/g32", 0)
    hessian = damped(given.moments, 0.01, "")
    learnt = AdaRound(sweeps=0).solve(given)
    assert loss(given, learnt, hessian).sum() < 0.85 * loss(given, given.rounded(), hessian).sum()


def test_what_cannot_be_learnt_is_rounded_and_said():
    weight = torch.randn(ROWS, COLUMNS)
    for solver in (AdaRound(), ZQLocal()):
        said: list[str] = []
        unseen = Problem(weight, Spec.parse("int4 | fp16/g32"), log=said.append)
        assert torch.equal(solver.solve(unseen).codes, unseen.rounded().codes)
        given = Problem(weight, Spec.parse("bf16"), problem("nf4", 0).moments, log=said.append)
        assert torch.equal(solver.solve(given).codes, given.rounded().codes)
        assert "no calibration token" in said[0] and "bf16 is too fine" in said[1]


@pytest.mark.parametrize("start", [RTN(), MSEGrid(lowest=0.6), GPTQ()], ids=lambda s: s.name)
@pytest.mark.parametrize("text", SPECS)
def test_a_learned_weight_begins_with_the_codes_of_the_start(text, start):
    given = problem(text, 0)
    begun = start.solve(given)
    weight = LearnedWeight(given.weight, begun)
    expected = begun.dequantize()
    torch.testing.assert_close(weight.value().detach(), expected)
    torch.testing.assert_close(weight.qtensor().dequantize(), expected)


@pytest.mark.parametrize("text", SPECS)
def test_what_was_learnt_is_what_is_stored(text):
    given = problem(text, 1)
    weight = LearnedWeight(given.weight, given.rounded())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        weight.shift += torch.randn(weight.shift.shape, generator=generator)
        if weight.log_ratio is not None:
            weight.log_ratio += 0.2 * torch.randn(weight.log_ratio.shape, generator=generator)
    value, stored = weight.value().detach(), weight.qtensor().dequantize()
    # A weight within a rounding error of the edge of its cell may fall either way.
    assert ((value - stored).abs() > 1e-5 * value.abs().max()).float().mean() < 0.005


@pytest.mark.parametrize("text", ["int4 | fp32/g32", "int3z | fp32/row", "int2h | fp32/t4x16"])
def test_straight_through_gradients(text):
    """Of u: s r inside the grid, 0 beyond. Of ln r: finite differences where codes do not change
    (W^ r moves with r), less the weight itself, which goes through the rounding unrounded."""
    given = problem(text, 2)
    weight = LearnedWeight(given.weight, MSEGrid(lowest=0.6, steps=5).solve(given))
    direction = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        weight.shift[:, ::5] += 40.0  # beyond the grid
    (weight.value() * direction).sum().backward()
    step, zero = weight._step, weight._zero
    y = (weight._origin + weight.shift).detach()
    inside = (y >= weight._low) & (y <= weight._high)
    assert 0.1 < inside.float().mean() < 0.9
    torch.testing.assert_close(weight.shift.grad, direction * step * inside)
    fixed = weight.value().detach()
    by_weight = direction * (fixed - (y - zero) * step * inside)
    matrix = torch.zeros_like(weight.log_ratio)
    block = given.spec.factors[0].partition.block((ROWS, COLUMNS))
    for row in range(ROWS):
        for column in range(COLUMNS):
            matrix[row // block[0], column // block[1]] += by_weight[row, column]
    torch.testing.assert_close(weight.log_ratio.grad, matrix, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"rotate": True}, {"outliers": 8.0}])
def test_quantized_inputs_go_backward_as_if_they_were_not(options):
    layer = LayerPlan(Spec.parse("int4 | fp16/g32"), Spec.parse("int8h | fp32/row"), **options)
    x = inputs(0).requires_grad_()
    y = straight_through(x, layer)
    torch.testing.assert_close(y, seen(x.detach(), layer))
    assert not torch.equal(y, x)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    (y * direction).sum().backward()
    z = x.detach().clone().requires_grad_()
    (seen(z, LayerPlan(layer.weight, None, rotate=layer.rotate)) * direction).sum().backward()
    torch.testing.assert_close(x.grad, z.grad)


STARTS = {"rtn": RTN(), "mse": MSEGrid(), "gptq": GPTQ(clip="mse", sweeps=8)}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("text", SPECS)
def test_zq_local_never_ends_worse_than_it_began(text, start):
    for seed, rate in ((0, 0.002), (1, 1.0)):  # a rate that destroys, too
        given = problem(text, seed)
        held = given.moments.held.gram
        solver = ZQLocal(start=start, steps=10, rate=rate)
        begun, found = STARTS[start].solve(given), solver.solve(given)
        before, after = loss(given, begun, held).sum(), loss(given, found, held).sum()
        assert after <= before
        if rate < 1 and start == "rtn":
            assert after < 0.9 * before


def test_zq_local_learns_scales_by_gradients_alone():
    given = problem("int2 | fp32/row", 0)
    learnt = ZQLocal(sweeps=0, steps=100).solve(given)
    held = given.moments.held.gram
    assert loss(given, learnt, held).sum() < 0.7 * loss(given, given.rounded(), held).sum()
    assert not torch.equal(learnt.scales.stored[0], given.rounded().scales.stored[0])


def test_a_factor_shared_by_fused_layers_stays():
    given = problem("nvfp4", 0)
    shared = quantize(2 * given.weight, "nvfp4").scales.stored[1]
    given = Problem(given.weight, given.spec, given.moments, known={1: shared})
    for solver in (AdaRound(steps=5), ZQLocal(steps=5), ZQLocal(steps=5, start="gptq")):
        assert torch.equal(solver.solve(given).scales.stored[1], shared)


class Block(nn.Module):
    """A residual block of two linears with something between them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(COLUMNS, 96), nn.Linear(96, COLUMNS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.silu(self.up(x)))


def block_problem(text: str, layer: LayerPlan, samples: int) -> tuple[Block, BlockProblem]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        block = Block().requires_grad_(False)
    x = [inputs(i, tokens=40)[None] for i in range(samples)]
    targets = [block(window) for window in x]
    return block, BlockProblem(
        problems={
            name: Problem(getattr(block, name).weight, Spec.parse(text)) for name in ("up", "down")
        },
        layers={"up": layer, "down": layer},
        modules={"up": block.up, "down": block.down},
        samples=samples,
        inputs=x.__getitem__,
        targets=targets.__getitem__,
        run=block,
    )


def output_error(given: BlockProblem, block: Block, found, windows) -> float:
    """With the layers that will run."""
    replaced = Block()
    for name, qweight in found.items():
        linear = QuantLinear.from_qtensor(qweight, given.layers[name], getattr(block, name).bias)
        setattr(replaced, name, linear)
    with torch.no_grad():
        errors = [(replaced(given.inputs(i)) - given.targets(i)).square().mean() for i in windows]
    return float(sum(errors)) / len(errors)


@pytest.mark.parametrize(
    "text", ["int4 | fp16/g32", "int3z | fp16/g16", "int2 | fp32/row", "nvfp4"]
)
@pytest.mark.parametrize("quantized", [False, True])
def test_zq_global_never_ends_worse_than_it_began(text, quantized):
    plan = LayerPlan(Spec.parse(text))
    if quantized:
        plan = LayerPlan(plan.weight, Spec.parse("int8h | fp32/row"), rotate=True)
    block, given = block_problem(text, plan, samples=9)
    assert held_back(9) == [4]
    if quantized:  # what is solved is the rotated weight
        from posttrain.models.rotation import rotate

        for name in given.problems:
            given.problems[name] = Problem(rotate(given.problems[name].weight), plan.weight)
    begun = {name: RTN().solve(layer) for name, layer in given.problems.items()}
    before = output_error(given, block, begun, [4])
    found = ZQGlobal(start="rtn", steps=40, batch=2).solve_block(given)
    assert output_error(given, block, found, [4]) < 0.85 * before
    ruined = ZQGlobal(start="rtn", steps=3, batch=2, rate=1.0, scale_rate=1.0).solve_block(given)
    assert output_error(given, block, ruined, [4]) <= before
    assert block.up.forward.__func__ is nn.Linear.forward  # as it was


def test_zq_global_is_the_same_every_time_and_leaves_random_state_alone():
    layer = LayerPlan(Spec.parse("int3 | fp16/g32"))
    state = torch.random.get_rng_state()
    runs = []
    for _ in range(2):
        _, given = block_problem("int3 | fp16/g32", layer, samples=5)
        runs.append(ZQGlobal(start="rtn", steps=10, batch=1).solve_block(given))
    assert torch.equal(torch.random.get_rng_state(), state)
    for name in ("up", "down"):
        assert torch.equal(runs[0][name].codes, runs[1][name].codes)


@pytest.mark.parametrize(("samples", "held"), [(1, []), (2, [1]), (6, [3]), (32, [4, 12, 20, 28])])
def test_one_window_in_eight_is_held_back(samples, held):
    assert held_back(samples) == held
