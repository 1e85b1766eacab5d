"""Laws of sampling: the native draw is the reference's, and follows the distribution it cuts."""

import itertools
import re

import numpy as np
import pytest
import torch

from posttrain import kernels
from posttrain.errors import UserError
from posttrain.kernels import Sampling
from posttrain.kernels.sampling import gumbel

needs_native = pytest.mark.skipif(not kernels.available(), reason=kernels.find().reason)
DRAWS = 4000


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"temperature": 1.0}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 1.0, "top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.6}, [0.625, 0.375, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.5}, [1, 0, 0, 0]),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.9}, [10 / 19, 6 / 19, 3 / 19, 0]),
        ({"temperature": 1.0, "top_p": 1e-9}, [1, 0, 0, 0]),
        ({"temperature": 1.0, "min_p": 0.29}, [10 / 19, 6 / 19, 3 / 19, 0]),
        ({"temperature": 1.0, "min_p": 1.0}, [1, 0, 0, 0]),
        ({"temperature": 0.5}, [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
        ({}, [1, 0, 0, 0]),
    ],
)
def test_draws_follow_the_cut_distribution(options, expected):
    order = [2, 0, 3, 1]
    logits = torch.empty(4)
    logits[order] = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    drawn = [Sampling(**options, seed=seed).draw(logits, [0]) for seed in range(DRAWS)]
    shares = torch.bincount(torch.tensor(drawn), minlength=4)[order] / DRAWS
    expected = torch.tensor(expected)
    error = 4 * (expected * (1 - expected) / DRAWS).sqrt()
    assert ((shares - expected).abs() <= error).all()


def cases(count):
    """Logits and options of all kinds, ties and infinities among them."""
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        size = int(torch.randint(1, 3000, (), generator=generator))
        logits = torch.randn(size, generator=generator) * 4
        if i % 3 == 0:
            logits = logits.round()  # ties
        if i % 7 == 0:
            logits[:: i % 5 + 2] = -torch.inf
            logits[0] = 1.0
        history = torch.randint(0, size + 3, (i % 40,), generator=generator).tolist()
        options = {
            "temperature": [0.0, 0.3, 1.0, 2.5][i % 4],
            "top_k": [0, 1, 5, 5000][i // 4 % 4],
            "top_p": [1.0, 0.9, 0.3][i // 3 % 3],
            "min_p": [0.0, 0.05][i // 2 % 2],
            "repetition_penalty": [1.0, 1.3, 0.8][i % 3],
            "seed": i * 2**40 + i,
        }
        yield logits, history, options


@needs_native
def test_the_native_draw_is_the_references():
    for logits, history, options in cases(600):
        sampling = Sampling(**options)
        expected = sampling.reference(logits.numpy().copy(), history)
        assert sampling.draw(logits, history) == expected, options


INFINITE = float("inf")
EDGES = {  # what float32, and the integers of C, make something else of; the first is nothing special
    "temperature": [1.0, 1e-50, 1e-46, 1e-45, 1e-38, 1e30, 3.4e38, np.float32(0.5), 2],
    "top_k": [0, 2**31 - 1, 2**31, 2**32 + 1, 10**30, np.int64(3), np.uint8(2)],
    "top_p": [1.0, 1e-50, 1e-46, 1e-45, 1 - 1e-9, 1, np.float64(0.5)],
    "min_p": [0.0, 1e-50, 1e-45, 1 - 1e-9, 1, np.float32(0.25)],
    "repetition_penalty": [1.0, 1 + 1e-9, 1.2e-38, 3.4e38, 2, np.float32(1.5)],
    "seed": [0, -1, 2**63, 2**64 + 5, -(10**30), np.int64(-7), np.uint64(2**64 - 1), np.int8(-3)],
}
EDGES_OF_LOGITS = [
    [0.5],
    [-INFINITE],
    [0.0, 1.0, 1.0, -2.0, 0.999],
    [-INFINITE, -1.0, -INFINITE, -1.0],
    [-INFINITE] * 5,
    [1.0, INFINITE, 2.0, INFINITE],
    [3e38, -3e38, 1e-45, -1e-45, 0.0, -0.0],
]


@needs_native
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("first", EDGES)
@pytest.mark.parametrize("second", EDGES)
def test_the_native_draw_is_the_references_at_the_edges(first, second):
    """Each edge of one option with each of another, on logits that are edges themselves."""
    plain = {name: edges[0] for name, edges in EDGES.items()}
    for one, other in itertools.product(EDGES[first], EDGES[second]):
        sampling = Sampling(**plain | {first: one, second: other})
        for values in EDGES_OF_LOGITS:
            logits = torch.tensor(values)
            expected = sampling.reference(logits.numpy().copy(), [0, 1])
            assert 0 <= expected < len(values)
            assert sampling.draw(logits, [0, 1]) == expected, (sampling, values)


def test_options_that_float32_makes_0_leave_the_likeliest():
    logits = torch.tensor([0.0, 1.0, 0.9])
    for seed in range(50):
        for options in ({"temperature": 1e-50}, {"temperature": 1.0, "top_p": 1e-50}):
            sampling = Sampling(**options, seed=seed)
            assert sampling.draw(logits, []) == sampling.reference(logits.numpy(), []) == 1


def test_seeds_are_the_same_as_numbers_of_numpy():
    logits = torch.zeros(100)
    for seed in (-(2**63), -1, 0, 5, 2**63 - 1):
        drawn = {Sampling(1.0, seed=s).draw(logits, [7]) for s in (seed, np.int64(seed))}
        drawn |= {Sampling(1.0, seed=seed % 2**64).reference(logits.numpy(), [7])}
        assert len(drawn) == 1


NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty")
NEVER = [None, "0.7", [1], 1j, float("nan"), INFINITE, -INFINITE, -1, 1e39, 10**400]


@pytest.mark.parametrize(
    "name, value",
    [(name, value) for name in NUMBERS for value in NEVER]
    + [(name, value) for name in ("top_k", "seed") for value in [*NEVER[:7], 50.0, np.float32(1)]]
    + [("top_k", -1), ("top_p", 0), ("top_p", 1.5), ("min_p", 1.5)]
    + [("repetition_penalty", 0), ("repetition_penalty", 1e-50)],
)
def test_an_option_that_cannot_be_is_named(name, value):
    with pytest.raises(UserError, match=f"^{name} must be .*, not {re.escape(repr(value))}$"):
        Sampling(**{name: value})


def test_a_draw_changes_nothing_and_depends_on_its_position():
    logits = torch.zeros(50)
    drawn = {Sampling(temperature=1.0).draw(logits, [3] * n) for n in range(40)}
    assert len(drawn) > 10
    assert torch.equal(logits, torch.zeros(50))


def test_noise_is_standard_gumbel():
    noise = np.concatenate([gumbel(seed, 3, np.arange(20000)) for seed in range(5)])
    assert abs(noise.mean() - 0.5772) < 0.015
    assert abs(noise.var() - np.pi**2 / 6) < 0.04
    assert np.corrcoef(noise[:-1], noise[1:])[0, 1] < 0.01


def test_logits_that_are_not_numbers_are_refused():
    logits = torch.tensor([1.0, float("nan"), 0.0])
    with pytest.raises(UserError, match="not numbers"):
        Sampling().draw(logits, [])
    assert Sampling().reference(logits.numpy(), []) == -1


@pytest.mark.parametrize("size", [1, 5, 16, 1023, 1024, 1025, 3100])
def test_greedy_takes_the_first_of_the_likeliest_wherever_it_is(size):
    torch.manual_seed(size)
    for at in {0, 1, 15, 16, 1022, 1023, 1024, size // 2, size - 2, size - 1} & set(range(size)):
        logits = torch.randn(size).clamp(max=3.0)
        logits[at:] = torch.where(torch.rand(size - at) < 0.1, 3.5, logits[at:])
        logits[at] = 3.5
        assert Sampling().draw(logits, []) == at
        logits[at] = float("nan")
        with pytest.raises(UserError, match="not numbers"):
            Sampling().draw(logits, [])
    assert Sampling().draw(torch.full((size,), -float("inf")), []) == 0


def test_repetition_is_penalised_on_both_sides_of_zero():
    logits = torch.tensor([2.0, 1.9, -1.0])
    assert Sampling().draw(logits, [0]) == 0
    assert Sampling(repetition_penalty=1.5).draw(logits, [0]) == 1
    below = torch.tensor([-1.0, -1.2])
    assert Sampling(repetition_penalty=1.5).draw(below, [0]) == 1
