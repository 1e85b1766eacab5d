"""QuantLinear: equal to the field's own arithmetic, exact integers, additive branches."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from posttrain import kernels
from posttrain.errors import UserError
from posttrain.models import storage
from posttrain.models.linear import QuantLinear, integer_bound
from posttrain.models.load import model_size
from posttrain.models.plan import LayerPlan
from posttrain.numbers import quantize, spec

SPECS = [
    "int6 | fp16/g64",
    "int4z | fp16/g32",
    "int3t | fp32/row",
    "int8 | fp32/tensor",
    "int8 | fp32/t16x16",
    "int5 | bf16/g48",
    "nf4-dq",
    "bnb-fp4",
    "nvfp4",
    "mxfp6-e3m2",
    "zqfp-m2",
    "crossquant",
    "e3m4 | fp16/row",
    "fp16",
]
SHAPES = [(1, 1), (3, 7), (48, 100), (33, 192)]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_of(weight: str, shape=(48, 100), inputs: str | None = None, bias: bool = True, seed=0):
    plan = LayerPlan(spec(weight), None if inputs is None else spec(inputs))
    q = quantize(random(*shape, seed=seed), plan.weight)
    return QuantLinear.from_qtensor(q, plan, random(shape[0], seed=1) if bias else None), q


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weight", SPECS)
def test_packing_a_weight_loses_nothing(weight, shape):
    layer, q = layer_of(weight, shape)
    assert torch.equal(layer.weight, q.dequantize())
    assert torch.equal(layer.qweight().codes, q.codes)
    found = {name: (tuple(t.shape), t.dtype) for name, t in layer.named_buffers()}
    assert found == storage.layout("weight", q.spec, shape)


@pytest.mark.parametrize("weight", SPECS)
def test_forward_is_the_product_of_the_dequantized_operands(weight):
    layer, q = layer_of(weight, inputs="a8")
    x = random(2, 5, 100, seed=2)
    xq = quantize(x, "a8").dequantize()
    assert torch.equal(layer(x), nn.functional.linear(xq, q.dequantize(), layer.bias))
    assert layer(x[:, :0]).shape == (2, 0, 48)


# (ours, input, arguments of the peer's QuantizationArgs for weights and inputs)
PEER = [
    ("int6 | fp32/g64", None, {"num_bits": 6, "strategy": "group", "group_size": 64}, None),
    ("int4t | fp32/g16", "a8", {"num_bits": 4, "strategy": "group", "group_size": 16}, "token"),
    ("int8 | fp32/row", "a8", {"num_bits": 8, "strategy": "channel"}, "token"),
    ("int8 | fp32/tensor", "int8h | fp32/tensor", {"num_bits": 8, "strategy": "tensor"}, "tensor"),
    ("int8 | fp32/row", "int8h | fp32/g64", {"num_bits": 8, "strategy": "channel"}, "group"),
    ("e4m3 | fp32/row", "fp8", {"num_bits": 8, "type": "float", "strategy": "channel"}, "token"),
]


@pytest.mark.parametrize(("weight", "inputs", "args", "dynamic"), PEER)
def test_forward_is_bitwise_what_compressed_tensors_computes(weight, inputs, args, dynamic):
    ct = pytest.importorskip("compressed_tensors.quantization")
    shape = (80, 192)
    layer, q = layer_of(weight, shape, inputs)
    peer = nn.Linear(shape[1], shape[0])
    activations = None
    if dynamic:
        size = {"group_size": 64} if dynamic == "group" else {}
        kind = {"num_bits": 8, "type": args.get("type", "int")}
        activations = ct.QuantizationArgs(strategy=dynamic, dynamic=True, **kind, **size)
    scheme = ct.QuantizationScheme(
        targets=["Linear"], weights=ct.QuantizationArgs(**args), input_activations=activations
    )
    ct.initialize_module_for_quantization(peer, scheme)
    peer.weight_scale.data.copy_(q.scales.factors[0].reshape(peer.weight_scale.shape))
    peer.weight.data.copy_(random(*shape))
    peer.bias.data.copy_(layer.bias)
    for seed, scale in ((3, 1.0), (4, 1e-3), (5, 300.0)):
        x = random(2, 17, shape[1], seed=seed) * scale
        assert torch.equal(layer(x), peer(x))


INTEGER = [
    ("int8 | fp32/row", "a8"),
    ("int6 | fp16/g64", "a8"),
    ("int4 | fp16/g48", "a8"),
    ("int4z | fp16/g32", "a8"),
    ("int8 | fp32/row", "a8g128"),
    ("int3 | fp16/g24", "int6 | fp16/g36"),
    ("int8 | fp32/t16x16", "a8z"),
    ("int8z | fp32/tensor", "int8z | fp32/tensor"),
    ("mxint8", "mxint8"),
]


@pytest.mark.parametrize("rows", [1, 5, 300])
@pytest.mark.parametrize("inputs", [1, 63, 100, 257])
@pytest.mark.parametrize(("weight", "activation"), INTEGER)
def test_integer_products_stay_within_the_stated_bound(weight, activation, inputs, rows):
    layer, _ = layer_of(weight, (19, inputs), activation, bias=rows != 5)
    x = random(rows, inputs, seed=rows) * 3
    difference = (layer.integer_forward(x) - layer(x)).abs()
    assert (difference <= integer_bound(layer, x)).all()
    assert layer.integer_forward(x).dtype == x.dtype


def test_integer_products_are_exact_inside_a_scale_block():
    """With one scale per row the result is the exact integer product, scaled in float32."""
    for inputs in (1, 31, 640, 4001):
        layer, q = layer_of("int8t | fp32/row", (13, inputs), "a8", bias=False)
        x = random(7, inputs, seed=9)
        qx = quantize(x, "a8")
        exact = qx.codes.to(torch.int64) @ q.codes.to(torch.int64).T
        scaled = exact.to(torch.float32) * qx.scales.factors[0] * q.scales.factors[0].T
        assert torch.equal(layer.integer_forward(x), scaled)


def test_int32_never_overflows_at_the_largest_codes():
    inputs = 40_000
    plan = LayerPlan(spec("int8z | fp32/tensor"), spec("int8z | fp32/tensor"))
    weight, x = torch.ones(2, inputs), torch.ones(3, inputs)
    weight[:, 0] = x[:, 0] = 0.0
    layer = QuantLinear.from_qtensor(quantize(weight, plan.weight), plan)
    assert torch.allclose(layer.integer_forward(x), x @ weight.T, rtol=1e-5)


@pytest.mark.parametrize("weight", ["nf4", "mxfp4", "fp6"])
def test_integer_forward_refuses_what_is_not_integer(weight):
    with pytest.raises(UserError, match="integers"):
        layer_of(weight, inputs="a8")[0].integer_forward(random(2, 100))
    with pytest.raises(UserError, match="input format"):
        layer_of("w8")[0].integer_forward(random(2, 100))


def test_branches_add_to_both_implementations():
    low_rank = nn.Sequential(nn.Linear(100, 4, bias=False), nn.Linear(4, 48, bias=False))
    plan = LayerPlan(spec("w4g32"), spec("a8"))
    q = quantize(random(48, 100), plan.weight)
    plain = QuantLinear.from_qtensor(q, plan)
    branched = QuantLinear.from_qtensor(q, plan, branches=[low_rank])
    x = random(6, 100, seed=5)
    assert torch.equal(branched(x), plain(x) + low_rank(x))
    assert torch.equal(branched.integer_forward(x), plain.integer_forward(x) + low_rank(x))
    assert [name for name, _ in branched.named_parameters()] == [
        "branches.0.0.weight",
        "branches.0.1.weight",
    ]


@pytest.mark.parametrize("weight", SPECS)
def test_resident_weights_give_the_same_bits(weight):
    layer, _ = layer_of(weight, inputs="a8")
    x = random(3, 100, seed=4)
    packed = layer(x)
    layer.resident = "dequantized"
    assert torch.equal(layer(x), packed) and layer.weight is layer.weight
    layer.resident = "packed"
    assert torch.equal(layer(x), packed) and layer.weight is not layer.weight
    with pytest.raises(UserError, match="packed, dequantized"):
        layer.resident = "unpacked"


@pytest.mark.parametrize("weight", SPECS)
def test_a_change_of_dtype_spares_codes_and_scales(weight):
    layer, q = layer_of(weight)
    before = {name: t.clone() for name, t in layer.named_buffers()}
    layer.resident = "dequantized"
    layer(random(2, 100))
    layer.bfloat16()
    assert layer.weight.dtype == torch.bfloat16 and layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.weight, q.dequantize(torch.bfloat16))
    assert layer(random(2, 100).bfloat16()).dtype == torch.bfloat16
    assert all(
        t.dtype == before[name].dtype and torch.equal(t, before[name])
        for name, t in layer.named_buffers()
    )
    assert torch.equal(layer.float().weight, q.dequantize())


@pytest.mark.parametrize("weight", SPECS)
def test_state_dict_fills_an_empty_layer(weight):
    layer, _ = layer_of(weight, inputs="a8")
    empty = QuantLinear.empty(48, 100, layer.layer, True, torch.float32)
    assert all(t.is_meta for t in (*empty.buffers(), *empty.parameters()))
    empty.load_state_dict(layer.state_dict(), assign=True)
    x = random(3, 100, seed=8)
    assert torch.equal(empty(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


NATIVE = ["w8", "w6g64", "w4g32", "w4g64z", "mxfp4", "nvfp4", "nf4", "fp6", "w3g128"]


@pytest.mark.skipif(not kernels.available(), reason=kernels.find().reason)
@pytest.mark.parametrize("weight", NATIVE)
@pytest.mark.parametrize("inputs", [None, "int8h | fp32/row"])
@pytest.mark.parametrize("rotated", [False, True])
def test_native_layers_compute_the_same_product_and_give_their_codes_back(weight, inputs, rotated):
    generator = torch.Generator().manual_seed(2)
    q = quantize(torch.randn(50, 256, generator=generator), weight)
    plan = LayerPlan(spec(weight), inputs and spec(inputs), rotate=rotated)
    layer = QuantLinear.from_qtensor(q, plan, torch.randn(50, generator=generator))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for tokens in (0, 1, 5, 33):
        x = torch.randn(2, tokens, 256, generator=generator)
        layer.resident = "packed"
        want, bound = layer(x), integer_bound(layer, x)
        layer.resident = "native"
        assert layer.implementation == kernels.isa()
        # A rotation that rounds otherwise may move an activation by one code.
        step = layer.rotated_input(x).abs().amax() / 127 if rotated and inputs and tokens else 0.0
        slack = bound + step * q.dequantize().abs().amax()
        assert ((layer(x) - want).abs() <= slack).all()
        assert torch.equal(layer.qweight().codes, q.codes)
    index = torch.tensor([49, 0, 7, 7])
    assert torch.equal(layer.rows(index), layer.weight[index])
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert model_size(layer)["bytes"] == sum(tensor.nbytes for tensor in before.values())
    after = layer.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    layer.to(torch.bfloat16)
    assert layer(x.to(torch.bfloat16)).dtype == torch.bfloat16
    layer.resident = "packed"
    assert torch.equal(layer.state_dict()["weight_codes"], before["weight_codes"])


@pytest.mark.parametrize("rotated", [False, True])
def test_channels_that_reach_the_threshold_are_not_quantized(rotated):
    generator = torch.Generator().manual_seed(3)
    q = quantize(torch.randn(50, 256, generator=generator), "w8")
    plan = LayerPlan(spec("w8"), spec("int8 | fp32/row"), rotate=rotated, outliers=6.0)
    layer = QuantLinear.from_qtensor(q, plan)
    x = torch.randn(2, 9, 256, generator=generator)
    x[0, 3, [5, 77]] = torch.tensor([50.0, -60.0])  # two of the channels, in one token
    seen, given = layer.quantized_input(x), layer.rotated_input(x)
    loud = (given.abs() >= 6).reshape(-1, 256).any(0)
    assert torch.equal(seen[..., loud], given[..., loud]) and (rotated or loud.sum() == 2)
    quiet = quantize(given.masked_fill(loud, 0).reshape(-1, 256), "int8 | fp32/row").dequantize()
    assert torch.equal(seen[..., ~loud], quiet.reshape(x.shape)[..., ~loud])
    want = seen.double() @ layer.qweight().dequantize().double().T
    for got in (layer.integer_forward(x), layer(x)):  # both round; how much is the processor's
        assert ((got - want).abs() <= integer_bound(layer, x)).all()
        assert (got - want).norm() <= 2**-21 * want.norm()
    assert "outliers" in layer.no_kernel
    layer.resident = "native"  # as "packed", where there is no kernel
    assert layer.implementation == "dequantize"
    calm = x.clamp(-1, 1)
    plain = QuantLinear.from_qtensor(q, replace(plan, outliers=None))
    if not rotated:
        assert torch.equal(layer(calm), plain(calm))


@pytest.mark.skipif(not kernels.available(), reason=kernels.find().reason)
@pytest.mark.parametrize("weight", ["w8", "w6g64", "w4g32", "w3g128"])
def test_codes_and_scales_are_held_once(weight):
    layer = QuantLinear.from_qtensor(quantize(random(64, 512), weight), LayerPlan(spec(weight)))
    stored = model_size(layer)["bytes"]
    layer.resident = "native"
    held = layer.kernel().weight.nbytes + sum(buffer.nbytes for buffer in layer.buffers())
    assert held == stored
