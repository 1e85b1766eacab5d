"""Branches beside quantized layers: what they add, what they store, what training them keeps."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from posttrain.errors import UserError
from posttrain.models.branches import (
    ColumnsPlan,
    LowRank,
    LowRankPlan,
    branch_dict,
    low_rank_factors,
    make_branch,
    matrix_of,
)
from posttrain.models.linear import QuantLinear
from posttrain.models.plan import LayerPlan, Plan
from posttrain.numbers import fake_quantize, quantize, spec

FACTORS = ["fp16", "int8 | fp16/row", "e4m3 | fp32/row"]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (33, 33)])
def test_factors_are_the_closest_of_their_rank(shape):
    matrix = random(*shape)
    values = torch.linalg.svdvals(matrix)
    for rank in (1, 5, 24):
        up, down = low_rank_factors(matrix, rank)
        assert up.shape == (shape[0], rank) and down.shape == (rank, shape[1])
        lost = (matrix - up @ down).norm()
        torch.testing.assert_close(lost, values[rank:].norm(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("weight", FACTORS)
@pytest.mark.parametrize("rotate", [False, True])
def test_a_layer_with_a_branch_computes_with_the_sum(weight, rotate):
    plan = LowRankPlan(4, spec(weight))
    layer = LayerPlan(spec("int3 | fp16/g32"), None, (plan,), rotate)
    w, x = random(48, 64), random(5, 64, seed=1)
    codes = quantize(w, layer.weight)
    plain = QuantLinear.from_qtensor(codes, replace(layer, branches=()))
    branch = plan.fit(random(48, 64, seed=2), None)
    branched = QuantLinear.from_qtensor(codes, layer, branches=[branch])
    torch.testing.assert_close(branched(x), plain(x) + x @ matrix_of(branch, 64).T)
    assert sum(t.nbytes for t in branch.state_dict().values()) == sum(
        quantize(torch.zeros(shape), weight).nbytes for shape in ((48, 4), (4, 64))
    )


def test_branches_survive_the_state_dict():
    layer = LayerPlan(spec("w4g32"), None, (LowRankPlan(3), ColumnsPlan(2)))
    w = random(48, 64)
    energy = torch.zeros(64).index_fill(0, torch.tensor([7, 50]), 1.0)
    branches = [plan.fit(w, energy) for plan in layer.branches]
    assert branches[1].index.tolist() == [7, 50]
    made = QuantLinear.from_qtensor(quantize(w, layer.weight), layer, branches=branches)
    empty = QuantLinear.empty(48, 64, layer, False, torch.float32)
    empty.load_state_dict(made.state_dict(), assign=True)
    x = random(5, 64, seed=1)
    assert torch.equal(empty(x), made(x))


def test_columns_do_not_widen_the_scales_of_the_quantized_input():
    """Both ways of computing leave them out of the input that is quantized."""
    layer = LayerPlan(spec("int8 | fp32/row"), spec("int8 | fp32/row"), (ColumnsPlan(1),))
    w, x = random(32, 64), random(6, 64, seed=1)
    x[:, 9] *= 1000
    columns = layer.branches[0].fit(w, x.square().mean(0))
    rest = w.index_fill(1, torch.tensor([9]), 0.0)
    made = QuantLinear.from_qtensor(quantize(rest, layer.weight), layer, branches=[columns])
    quiet = fake_quantize(x.index_fill(1, torch.tensor([9]), 0.0), layer.input)
    expected = (
        quiet @ fake_quantize(rest, layer.weight).T + x[:, 9:10] @ w[:, 9:10].half().float().T
    )
    torch.testing.assert_close(made(x), expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(made.integer_forward(x), expected, rtol=1e-4, atol=1e-3)
    made.resident = "native"
    torch.testing.assert_close(made(x), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("resident", ["packed", "dequantized", "native"])
def test_gradients_pass_straight_through_a_frozen_layer(rotate, resident):
    """dX is what plain autograd finds for the dequantized weight."""
    layer = LayerPlan(spec("int4 | fp16/g32"), spec("int8h | fp32/row"), (), rotate)
    made = QuantLinear.from_qtensor(quantize(random(48, 64), layer.weight), layer)
    dense = nn.functional.linear(torch.eye(64), made.weight).T  # of the rotated input
    made.resident = resident
    x = random(2, 5, 64, seed=1).requires_grad_()
    made(x).square().sum().backward()
    y = made(x).detach()
    expected = 2 * y @ (made.rotated_input(dense) if rotate else dense)
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-3)


class LargestFloat(TorchDispatchMode):
    """The largest floating-point tensor that an operation returns inside the context."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.largest = max(self.largest, tensor.numel())
        return found


@pytest.mark.parametrize("resident", ["packed", "native"])
def test_training_a_branch_keeps_and_makes_no_copy_of_the_weight(resident):
    layer = LayerPlan(spec("int4 | fp16/g64"), None, (LowRankPlan(4, start="zero"),))
    w = random(512, 256)
    branch = layer.branches[0].fit(w, None)
    made = QuantLinear.from_qtensor(quantize(w, layer.weight), layer, branches=[branch])
    made.resident = resident
    parameters = made.branches[0].train_factors()
    x = random(8, 256, seed=1).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        y = made(x)
    assert max(kept) < w.numel() / 8
    with LargestFloat() as seen:
        y.square().sum().backward()
    assert 0 < seen.largest <= w.numel() / 4
    assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)
    # What it is held against: autograd through the expanded weight keeps it.
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        nn.functional.linear(x, made.weight)
    assert max(kept) == w.numel()


@pytest.mark.parametrize("weight", FACTORS)
def test_trained_factors_are_rounded_to_their_format(weight):
    branch = LowRankPlan(4, spec(weight), "zero").fit(random(48, 64), None)
    assert not matrix_of(branch, 64).any()
    up = branch.train_factors()[0]
    with torch.no_grad():
        up.copy_(random(48, 4))
    assert len(list(branch.parameters())) == 2
    branch.finish_training()
    assert not list(branch.parameters())
    torch.testing.assert_close(
        branch.factor("up"), fake_quantize(random(48, 4), spec(weight)).float()
    )


def test_branches_of_a_plan():
    rule = {"match": "*", "weight": "int4 | fp16/g64"}
    data = {"layers": [rule | {"branches": [{"name": "lowrank", "rank": 8}]}]}
    plan = Plan.from_dict(data)
    assert plan.rules[0].branches == (LowRankPlan(8),)
    assert Plan.from_dict(plan.to_dict()) == plan
    assert make_branch(branch_dict(ColumnsPlan(3)), "here") == ColumnsPlan(3)


@pytest.mark.parametrize(
    "branches, message",
    [
        ("lowrank", "must be a list"),
        ([{"name": "lowrnk"}], "lowrank, columns"),
        ([{"name": "lowrank"}], "needs rank"),
        ([{"name": "lowrank", "rank": 0}], "rank must be a positive"),
        ([{"name": "lowrank", "rank": 8, "rnk": 3}], "did you mean 'rank'"),
        ([{"name": "lowrank", "rank": 8, "weight": 5}], "number format"),
        ([{"name": "lowrank", "rank": 8, "weight": "int9x"}], "int9x"),
        ([{"name": "lowrank", "rank": 8, "start": "one"}], "svd or zero"),
        ([{"name": "columns", "count": True}], "count must be a positive"),
    ],
)
def test_mistakes_in_branches_are_named(branches, message):
    rule = {"match": "*", "weight": "int4 | fp16/g64", "branches": branches}
    with pytest.raises(UserError, match=message):
        Plan.from_dict({"layers": [rule]})


def test_columns_exclude_rotation_and_need_a_text():
    rule = {"match": "*", "weight": "w8", "branches": [{"name": "columns", "count": 2}]}
    with pytest.raises(UserError, match="exclude"):
        Plan.from_dict({"layers": [rule | {"rotate": True}]})
    with pytest.raises(UserError, match="calibration text"):
        ColumnsPlan(2).fit(random(4, 8), None)


def test_low_rank_is_a_module_with_stored_factors_only():
    branch = LowRank.of(LowRankPlan(2), random(6, 2), random(2, 8))
    assert {name: t.dtype for name, t in branch.state_dict().items()} == {
        "up_codes": torch.float16,
        "down_codes": torch.float16,
    }
