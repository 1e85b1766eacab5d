"""Solvers: what each minimises, against plain references."""

import pytest
import torch

from posttrain.errors import UserError
from posttrain.numbers import Spec, quantize
from posttrain.quantize.calibration import InputMoments, MomentCollector
from posttrain.quantize.descent import damped, quadratic, settle
from posttrain.quantize.solvers import GPTQ, RTN, SOLVERS, MSEGrid, Problem, block_sum, make_solver

SPECS = [
    "int4 | fp16/g32",
    "int3 | fp16/g16",
    "int4z | fp16/g32",
    "int2 | fp32/row",
    "int4 | fp32/tensor",
    "int4 | fp16/g48",  # does not divide 128: the last group is padded
    "e2m1 | fp16/g32",
    "mxfp4",
    "nvfp4",
    "nf4",
    "nf4-dq",
]
ROWS, COLUMNS = 24, 128


def problem(seed: int, tokens: int = 512) -> tuple[torch.Tensor, torch.Tensor, InputMoments]:
    """A weight, correlated inputs with a few large channels, and their moments."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    mix = torch.randn(COLUMNS, COLUMNS, generator=generator) / COLUMNS**0.5
    x = torch.randn(tokens, COLUMNS, generator=generator) @ (mix + torch.eye(COLUMNS))
    x[:, ::17] *= 5
    moments = InputMoments(torch.zeros(COLUMNS, COLUMNS))
    moments.add(x)
    return weight, x, moments


def output_error(x: torch.Tensor, weight: torch.Tensor, approximation: torch.Tensor) -> float:
    return float((x @ (weight - approximation).T).square().sum())


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("solver", [GPTQ(), GPTQ(actorder=True), GPTQ(clip="mse")])
def test_gptq_lowers_the_output_error(text, solver):
    for seed in range(3):
        weight, x, moments = problem(seed)
        spec = Spec.parse(text)
        rounded = RTN().solve(Problem(weight, spec, None)).dequantize()
        solved = solver.solve(Problem(weight, spec, moments))
        assert solved.codes.shape == weight.shape
        assert output_error(x, weight, solved.dequantize()) < 0.9 * output_error(x, weight, rounded)


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("actorder", [False, True])
def test_gptq_on_white_inputs_is_rounding(text, actorder):
    """With an identity Hessian no error has anywhere to go."""
    weight, _, _ = problem(0)
    moments = InputMoments(torch.eye(COLUMNS), tokens=1)
    spec = Spec.parse(text)
    solved = GPTQ(actorder=actorder).solve(Problem(weight, spec, moments))
    assert torch.equal(solved.dequantize(), quantize(weight, spec).dequantize())


def textbook_gptq(weight: torch.Tensor, hessian: torch.Tensor, group: int) -> torch.Tensor:
    """Column by column with the whole remaining weight updated at once, in float64, INT4."""
    weight, hessian = weight.double().clone(), hessian.double()
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    result = torch.zeros_like(weight)
    for j in range(weight.shape[1]):
        if j % group == 0:
            block = weight[:, j : j + group].float()
            scale = (block.abs().amax(1) / 7).half().double()
        result[:, j] = (weight[:, j] / scale).round().clamp(-7, 7) * scale
        error = (weight[:, j] - result[:, j]) / upper[j, j]
        weight[:, j + 1 :] -= error[:, None] * upper[j, j + 1 :]
    return result.float()


@pytest.mark.parametrize("lazy", [1, 16, 100, 128])
@pytest.mark.parametrize("group", [16, 32, 64])
def test_gptq_is_the_textbook_algorithm(lazy, group):
    """Lazy batches and refitted groups change speed only (a few ties may fall the other way)."""
    weight, _, moments = problem(1)
    expected = textbook_gptq(weight, moments.gram / moments.tokens, group)
    spec = Spec.parse(f"int4 | fp16/g{group}")
    solved = GPTQ(lazy=lazy).solve(Problem(weight, spec, moments)).dequantize()
    assert (solved != expected).float().mean() < 0.01


@pytest.mark.parametrize("text", SPECS)
def test_sweeps_lower_the_output_error_further(text):
    for seed in range(3):
        weight, _, moments = problem(seed)
        given, hessian = Problem(weight, Spec.parse(text), moments), damped(moments, 0.01, "")
        once, settled = GPTQ().solve(given), GPTQ(sweeps=8).solve(given)
        before = quadratic(once.dequantize() - weight, hessian)
        after = quadratic(settled.dequantize() - weight, hessian)
        assert (after <= before * (1 + 1e-5)).all() and after.sum() < 0.9 * before.sum()
        assert torch.equal(
            once.scales.expand((ROWS, COLUMNS)), settled.scales.expand((ROWS, COLUMNS))
        )


@pytest.mark.parametrize("lazy", [1, 7, 128, 500])
def test_a_settled_weight_cannot_be_bettered_one_by_one(lazy, monkeypatch):
    monkeypatch.setattr("posttrain.quantize.descent.LAZY", lazy)
    weight, _, moments = problem(0)
    spec, hessian = Spec.parse("int3 | fp16/g32"), damped(moments, 0.01, "").double()
    settled = settle(weight, quantize(weight, spec), hessian.float(), 100)
    error, step = (settled.dequantize() - weight).double(), settled.scales.expand(weight.shape)
    slope, curvature = error @ hessian, hessian.diagonal()
    for move in (-1, 1):
        moved = step.double() * move
        change = 2 * moved * slope + moved**2 * curvature
        inside = (settled.codes + move).abs() <= 3
        assert change[inside].min() > -1e-6 * quadratic(error, hessian).max()


def test_gptq_without_a_single_token_says_so_and_rounds():
    weight, _, _ = problem(0)
    spec = Spec.parse("int4 | fp16/g32")
    said: list[str] = []
    solved = GPTQ().solve(Problem(weight, spec, None, log=said.append))
    assert torch.equal(solved.codes, quantize(weight, spec).codes)
    assert "no calibration token" in said[0]


def test_gptq_raises_damping_on_a_degenerate_hessian_and_says_so():
    weight, _, _ = problem(0)
    direction = torch.ones(COLUMNS, 1)
    moments = InputMoments(direction @ direction.T, tokens=1)
    moments.gram[0, 0] -= 0.5  # indefinite: no small damping repairs it
    said: list[str] = []
    GPTQ(damping=1e-6).solve(
        Problem(weight, Spec.parse("int4 | fp16/g32"), moments, log=said.append)
    )
    assert any("retrying" in message for message in said)


def test_gptq_refuses_inputs_that_are_not_finite():
    weight, _, moments = problem(0)
    moments.gram[4, 3] = float("nan")
    with pytest.raises(UserError, match="NaN"):
        GPTQ().solve(Problem(weight, Spec.parse("int4 | fp16/g32"), moments))


def test_dead_inputs_are_rounded_like_any_other():
    weight, x, _ = problem(2)
    x[:, 40:50] = 0
    moments = InputMoments(torch.zeros(COLUMNS, COLUMNS))
    moments.add(x)
    spec = Spec.parse("int8 | fp32/row")
    solved = GPTQ().solve(Problem(weight, spec, moments)).codes
    assert torch.equal(solved[:, 40:50], quantize(weight, spec).codes[:, 40:50])


@pytest.mark.parametrize("text", SPECS)
def test_mse_grid_lowers_the_error_of_every_block(text):
    weight, _, _ = problem(3)
    spec = Spec.parse(text)
    partition = spec.factors[0].partition
    plain = (weight - RTN().solve(Problem(weight, spec, None)).dequantize()).square()
    searched = (weight - MSEGrid().solve(Problem(weight, spec, None)).dequantize()).square()
    assert searched.sum() <= plain.sum()
    if len(spec.factors) == 1 and spec.factors[0].nested is None:
        assert (block_sum(searched, partition) <= block_sum(plain, partition) * (1 + 1e-6)).all()


def test_linears_with_one_input_share_their_moments():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.o = (torch.nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            return self.o(self.q(x) + self.k(x))

    block = Block()
    collector = MomentCollector({"q": block.q, "k": block.k, "o": block.o})
    x = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for batch in x.split(1):
            with collector.listening():
                block(batch)
        rows, seen = x.reshape(-1, 8), block.q(x) + block.k(x)
    assert collector.of("q") is collector.of("k") is not collector.of("o")
    assert collector.of("q").tokens == 20
    torch.testing.assert_close(collector.of("q").gram, rows.T @ rows)
    rows = seen.reshape(-1, 8)
    torch.testing.assert_close(collector.of("o").gram, rows.T @ rows)


@pytest.mark.parametrize("held", [[0], [1, 2], [0, 1, 2]])
def test_windows_held_back_are_counted_apart(held):
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(8, 4), torch.randn(3, 5, 8)
    apart, kept = MomentCollector({"a": linear}), [i for i in range(3) if i not in held]
    with apart.listening(held):
        linear(x)
    for moments, part in ((apart.of("a"), x[kept]), (apart.of("a").held, x[held])):
        torch.testing.assert_close(moments.gram, torch.einsum("bti,btj->ij", part, part))
        assert moments.tokens == 5 * len(part)


@pytest.mark.parametrize("weight", [1.0, 64.0])
def test_the_first_token_of_a_window_counts_as_often_as_asked(weight):
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(8, 4), torch.randn(3, 5, 8)
    collector = MomentCollector({"a": linear}, first_token_weight=weight)
    with collector.listening():
        linear(x[:2])
        linear(x[2:])
    counts = torch.ones(3, 5)
    counts[:, 0] = weight
    expected = torch.einsum("bti,btj,bt->ij", x, x, counts)
    torch.testing.assert_close(collector.of("a").gram, expected)
    assert collector.of("a").tokens == counts.sum()


def test_options_are_checked_by_name():
    assert make_solver("gptq", actorder=True) == GPTQ(actorder=True)
    assert set(SOLVERS) == {"rtn", "mse", "gptq", "adaround", "zq-local", "zq-global"}
    with pytest.raises(UserError, match="did you mean 'gptq'"):
        make_solver("gptqq")


@pytest.mark.parametrize("shape", [(1, 16), (3, 64), (40, 128)])
@pytest.mark.parametrize(
    "text", [*SPECS, "int4 | e8m0.ceil/tensor", "int6 | fp16/row", "int8 | fp32/tensor"]
)
def test_the_search_for_scales_misses_nothing_by_ending_early(text, shape):
    spec = Spec.parse(text)
    for seed in range(5):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        found = Problem(weight, spec)
        ratios = torch.linspace(1.0, 0.5, 24).tolist()
        tried = [weight - found.rounded(ratio).dequantize() for ratio in ratios]
        errors = torch.stack([block_sum(e.square(), spec.factors[0].partition) for e in tried])
        best = torch.tensor(ratios)[errors.argmin(0)]
        assert torch.equal(MSEGrid().best_ratio(found), best)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_dead_inputs_do_not_change_how_the_others_are_damped(scale):
    """Whatever the units of the inputs are, and whether a channel is there or silent."""
    weight, x, _ = problem(4)
    x, spec = x * scale, Spec.parse("int3 | fp32/row")
    x[:, 40:] = 0
    weight[:, 40:] *= 1e-6  # no part in the scale of its row
    moments, without = (InputMoments(torch.zeros(n, n)) for n in (COLUMNS, 40))
    moments.add(x)
    without.add(x[:, :40])
    solver = GPTQ(damping=0.1)
    solved = solver.solve(Problem(weight, spec, moments)).codes[:, :40]
    assert torch.equal(solved, solver.solve(Problem(weight[:, :40], spec, without)).codes)


def test_an_input_that_is_prepared_in_two_ways_is_counted_for_each():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.up = (torch.nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            return self.q(x) + self.k(x) + self.up(x)

    block = Block()
    prepare = {"q": torch.neg, "k": torch.neg, "up": torch.relu}
    kinds = {"q": (True, None), "k": (True, None), "up": (False, None)}
    collector = MomentCollector(dict(block.named_children()), prepare, kinds=kinds)
    x = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))
    for batch in x.split(2):
        with collector.listening(), torch.no_grad():
            block(batch)
    assert collector.of("q") is collector.of("k") is not collector.of("up")
    for name in ("q", "up"):
        rows = prepare[name](x).reshape(-1, 8)
        torch.testing.assert_close(collector.of(name).gram, rows.T @ rows)
