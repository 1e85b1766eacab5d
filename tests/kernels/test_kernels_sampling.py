"""Laws of sampling: the native draw is the reference's, and follows the distribution it cuts."""

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
