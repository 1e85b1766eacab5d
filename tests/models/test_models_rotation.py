"""Rotations: orthonormal, their own inverse, and invisible in what a layer computes."""

import pytest
import torch

from posttrain.models.linear import QuantLinear, integer_bound
from posttrain.models.plan import LayerPlan
from posttrain.models.rotation import block_size, rotate
from posttrain.numbers import quantize, spec

CHANNELS = [1, 2, 3, 7, 8, 32, 96, 100, 576, 1536, 2048, 5632]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sylvester(n):
    """H[i, j] = (-1)^popcount(i & j) / sqrt(n)."""
    index = torch.arange(n)
    both = index[:, None] & index[None, :]
    ones = sum((both >> bit) & 1 for bit in range(max(n.bit_length(), 1)))
    return torch.where(ones % 2 == 0, 1.0, -1.0) / n**0.5


@pytest.mark.parametrize("channels", CHANNELS)
def test_it_is_the_block_diagonal_hadamard_matrix(channels):
    block = block_size(channels)
    assert channels % block == 0 and (block == 512 or (channels // block) % 2 == 1)
    dense = torch.block_diag(*[sylvester(block)] * (channels // block))
    x = random(5, channels)
    torch.testing.assert_close(rotate(x), x @ dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels", CHANNELS)
def test_it_keeps_lengths_and_undoes_itself(channels):
    x = random(3, 4, channels)
    torch.testing.assert_close(rotate(rotate(x)), x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rotate(x).norm(dim=-1), x.norm(dim=-1))
    assert rotate(x.bfloat16()).dtype == torch.bfloat16
    assert rotate(x[:0]).shape == (0, 4, channels)


@pytest.mark.parametrize("channels", [7, 96, 576])
def test_a_layer_that_rotates_computes_what_one_that_does_not_does(channels):
    weight, x = random(19, channels), random(6, channels, seed=1)
    exact = spec("int8 | fp32/g1")
    layer = QuantLinear.from_qtensor(quantize(rotate(weight), exact), LayerPlan(exact, rotate=True))
    torch.testing.assert_close(layer(x), x @ weight.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", [7, 96, 576])
def test_integer_products_of_rotated_inputs_stay_within_the_bound(channels):
    plan = LayerPlan(spec("int6 | fp16/g64"), spec("int8h | fp32/row"), rotate=True)
    layer = QuantLinear.from_qtensor(quantize(rotate(random(19, channels)), plan.weight), plan)
    x = random(40, channels, seed=2)
    assert ((layer.integer_forward(x) - layer(x)).abs() <= integer_bound(layer, x)).all()


def test_outliers_cost_less_when_rotated():
    weight, x = random(64, 512), random(200, 512, seed=3)
    x[:, 5] *= 100
    inputs = spec("int8h | fp32/row")
    errors = []
    for turned in (False, True):
        plan = LayerPlan(spec("int8 | fp32/g1"), inputs, rotate=turned)
        stored = rotate(weight) if turned else weight
        layer = QuantLinear.from_qtensor(quantize(stored, plan.weight), plan)
        errors.append((layer(x) - x @ weight.T).norm())
    assert errors[1] < 0.3 * errors[0]
