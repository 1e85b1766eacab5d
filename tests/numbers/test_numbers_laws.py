"""Laws that hold for every Spec, run over all presets, every grid, and every kind of chain."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from posttrain.errors import UserError
from posttrain.numbers import (
    GRIDS,
    PRESETS,
    QTensor,
    Spec,
    clip_fraction,
    decode_scaled,
    encode_scaled,
    fake_quantize,
    fit_scales,
    pack,
    quantize,
    spec,
)

# The presets "w4g64" and their like differ only in numbers: a few stand for all.
GROUPED = {f"w{bits}g64{z}" for bits in (2, 3, 4, 6, 8) for z in ("", "z")}
CHAINS = [
    "int4 | int6/g16 * fp16/g64",
    "int4z | e4m3/g16 * fp32/tensor",
    "e2m1 | e4m3/g16 * fp16/row",
    "e2m1 | e8m0.nearest/g32",
    "e2m1 | pow2.nearest/g16 * bf16/row",
    "e2m1 | e4m3/g8 * fp32/g32 * fp32/tensor",
    "nf4 | (dyn8 | fp32/g4)/flat7",
    "int8 | (int8 | fp32/row)/g16 * fp32/tensor",
    "int8 | fp16/t4x8",
    "int8 | bf16/col",
    "int8@away | fp32/row",
    "int5 | fp32/row^0.5 * fp32/col^0.5",
    "bf16",
    "e5m2",
    "fp16 | fp32/row",
]
SPECS = sorted(
    {t for name, t in PRESETS.items() if name in GROUPED or "fp16/g" not in t}
    | {f"{g.name} | fp16/g16" for g in GRIDS.values() if g.signed}
    | set(CHAINS)
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def outlier() -> Tensor:
    x = normal(8, 64)
    x[3, 5] = 1e4
    return x


INPUTS = {
    "normal, blocks that do not divide": normal(33, 100),
    "vector": normal(70),
    "3-D": normal(2, 3, 64),
    "0-D": torch.tensor(0.7),
    "one element": torch.tensor([[-3.0]]),
    "zeros": torch.zeros(4, 64),
    "zero rows": normal(4, 64) * torch.tensor([[1.0], [0], [1], [0]]),
    "constant": torch.full((4, 64), -0.37),
    "outlier": outlier(),
    "wide range": normal(8, 64) * torch.exp(4 * normal(8, 64, seed=1)),
    "subnormal": normal(8, 64) * 1e-42,
    "tiny": normal(8, 64) * 1e-30,
    "huge": normal(8, 64) * 5e37,
    "no rows": torch.zeros(0, 64),
    "no columns": torch.zeros(4, 0),
    "transposed": normal(64, 48).t(),
}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def bits_of(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32)


@pytest.mark.parametrize("text", SPECS)
def test_fake_quantize_is_quantize_then_dequantize_bitwise(text: str) -> None:
    for name, x in INPUTS.items():
        q = quantize(x, text, generator=generator())
        fake = fake_quantize(x, text, generator=generator())
        assert q.codes.shape == x.shape == fake.shape, name
        assert torch.equal(bits_of(q.dequantize()), bits_of(fake)), name
        assert not fake.isnan().any(), name


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_compute_in_float32(text: str, dtype: torch.dtype) -> None:
    x = normal(9, 70).to(dtype)
    fake = fake_quantize(x, text, generator=generator())
    wide = fake_quantize(x.float(), text, generator=generator())
    assert fake.dtype == dtype and torch.equal(fake, wide.to(dtype))
    q = quantize(x, text, generator=generator())
    assert torch.equal(q.dequantize(dtype), fake)


@pytest.mark.parametrize("text", SPECS)
def test_idempotent_with_frozen_scales(text: str) -> None:
    for name, x in INPUTS.items():
        if name == "subnormal":  # a product of subnormals is rounded: not idempotent by nature
            continue
        q = quantize(x, text, generator=generator())
        again = quantize(q.dequantize(), text, scales=q.scales, rounding="rne")
        same = again.codes == q.codes
        # Where the scale itself is 0 (a rounded nested scale) every code decodes to 0.
        assert (same | (q.scales.expand(x.shape) == 0)).all(), name


def element_values(value: Spec) -> Tensor:
    low, high = value.grid.snap(torch.tensor([-math.inf, math.inf])).tolist()
    if value.grid.kind == "int":
        return torch.arange(low, high + 1).float()
    codes = torch.arange(2**value.bits).to(torch.uint8)
    values = value.grid.decode(codes)
    return values[values.isfinite()]


@pytest.mark.parametrize("text", [t for t in SPECS if spec(t).grid.kind != "wide"])
def test_every_element_gets_the_nearest_representable_value(text: str) -> None:
    """Stronger than "half a step when unclipped": no other code is closer, clipped or not."""
    for name, x in INPUTS.items():
        if x.numel() == 0 or name == "subnormal":
            continue
        q = quantize(x, text, rounding="rne")
        scale = q.scales.expand(x.shape).double()[..., None]
        zero = q.scales.expand_zero_point(x.shape)
        offset = 0.0 if zero is None else zero.double()[..., None]
        candidates = (element_values(q.spec).double() - offset) * scale
        best = (candidates - x.double()[..., None]).abs().amin(-1)
        error = (q.dequantize().double() - x.double()).abs()
        reach = x.double().abs() + scale[..., 0].abs() * element_values(q.spec).abs().max()
        # float32 rounds the quotient and the product: a few units in the last place of slack.
        assert (error <= best + 4e-7 * reach).all(), name


SYMMETRIC = [
    t
    for t in SPECS
    if spec(t).grid.kind in ("float", "wide")
    or spec(t).grid.name == "bnbfp4"
    or (spec(t).grid.kind == "int" and spec(t).grid.name.isalnum() and spec(t).grid.name[-1] in
        "2345678")
]  # fmt: skip


@pytest.mark.parametrize("text", SYMMETRIC)
def test_odd_symmetry(text: str) -> None:
    for name, x in INPUTS.items():
        plus = fake_quantize(x, text, rounding="rne")
        minus = fake_quantize(-x, text, rounding="rne")
        assert torch.equal(plus, -minus), name


@pytest.mark.parametrize("text", SPECS)
def test_stochastic_rounding_is_unbiased(text: str) -> None:
    x = normal(4, 48)
    frozen = fit_scales(x, text)
    clipped = clip_mask(x, spec(text), frozen)
    if spec(text).grid.name == "fp32":
        return
    draw = generator()
    draws = torch.stack(
        [
            fake_quantize(x, text, scales=frozen, rounding="sr", generator=draw).double()
            for _ in range(200)
        ]
    )
    spread = draws.std(0)
    gap = (draws.mean(0) - x.double()).abs()
    unsure = (spread > 0) & ~clipped
    assert unsure.any()
    # 192 elements: 5 standard errors; the floor covers elements drawn up once or never in 200.
    step = (draws.amax(0) - draws.amin(0)).clamp(min=1e-12)
    assert (gap[unsure] < (5 * spread / 200**0.5 + 0.04 * step)[unsure]).all()


def clip_mask(x: Tensor, value: Spec, scales: object) -> Tensor:
    low, high = value.grid.snap(torch.tensor([-math.inf, math.inf])).tolist()
    scale = scales.expand(x.shape)  # type: ignore[attr-defined]
    zero = scales.expand_zero_point(x.shape)  # type: ignore[attr-defined]
    y = x / scale + (0.0 if zero is None else zero)
    return (y >= high) | (y <= low)


def parts(q: QTensor) -> Iterator[int]:
    """Bits of each stored piece of a quantized tensor, as bytes really hold them."""
    grid = q.spec.grid
    if grid.bits <= 8:
        yield pack(q.codes.flatten(), grid.bits, "bitstream.v1").numel() * 8
    else:
        yield q.codes.numel() * q.codes.element_size() * 8
    if q.offset is not None:
        yield 32
    if q.scales.zero_point is not None:
        yield pack(q.scales.zero_point.flatten(), grid.bits).numel() * 8
    for factor, stored in zip(q.spec.factors, q.scales.stored, strict=True):
        if isinstance(stored, QTensor):
            yield from parts(stored)
        elif factor.grid.bits < 8:
            yield pack(stored.flatten(), factor.grid.bits).numel() * 8
        else:
            yield stored.numel() * stored.element_size() * 8


@pytest.mark.parametrize("text", SPECS)
def test_packed_size_is_stored_bits(text: str) -> None:
    for name, x in INPUTS.items():
        q = quantize(x, text, generator=generator())
        packed = list(parts(q))
        excess = sum(packed) - q.spec.stored_bits(x.shape)
        assert 0 <= excess < 8 * len(packed), name
        assert q.nbytes == math.ceil(q.spec.stored_bits(x.shape) / 8)


@pytest.mark.parametrize("text", SPECS)
def test_factors_have_the_shape_of_their_blocks(text: str) -> None:
    for name, x in INPUTS.items():
        scales = fit_scales(x, text)
        matrix = scales.spec.matrix(x.shape)
        for factor, stored in zip(scales.spec.factors, scales.stored, strict=True):
            assert tuple(stored.shape) == factor.partition.counts(matrix), name
            if not isinstance(stored, QTensor):
                assert stored.dtype == factor.grid.code_dtype, name
        expanded = scales.expand(x.shape)
        assert expanded.shape == x.shape and expanded.dtype == torch.float32, name


@pytest.mark.parametrize("text", SPECS)
def test_a_solver_that_rounds_columns_in_order_gets_the_same_codes(text: str) -> None:
    x = normal(12, 70)
    q = quantize(x, text, rounding="rne")
    scale, zero = q.scales.expand(x.shape), q.scales.expand_zero_point(x.shape)
    columns = [
        encode_scaled(
            x[:, j], q.spec.grid, scale[:, j], None if zero is None else zero[:, j]
        )
        for j in range(x.shape[1])
    ]  # fmt: skip
    codes = torch.stack(columns, 1)
    assert torch.equal(codes, q.codes)
    built = QTensor(codes, q.scales, q.spec)
    decoded = decode_scaled(codes, q.spec.grid, scale, zero)
    assert torch.equal(built.dequantize(), decoded)


@pytest.mark.parametrize(
    "text", [t for t in SPECS if "/row" in t and "/col" not in t and "/tensor" not in t]
)
def test_rows_do_not_disturb_each_other(text: str) -> None:
    x = normal(6, 48) * torch.logspace(-3, 3, 6)[:, None]
    whole = fake_quantize(x, text, rounding="rne")
    alone = torch.cat([fake_quantize(row[None], text, rounding="rne") for row in x])
    assert torch.equal(whole, alone)


@pytest.mark.parametrize("text", [t for t in SPECS if spec(t).factors])
def test_nan_is_never_hidden(text: str) -> None:
    x = normal(4, 64)
    x[1, 2] = math.nan
    q = quantize(x, text, generator=generator())
    assert q.dequantize()[1, 2].isnan()
    fake = fake_quantize(x, text, generator=generator())
    assert torch.equal(fake.isnan(), q.dequantize().isnan())
    if len(q.spec.factors) == 1 and str(q.spec.factors[0]).endswith(("/row", "/g16", "/g32")):
        assert not fake[[0, 2, 3]].isnan().any()


@pytest.mark.parametrize("text", SPECS)
def test_infinities_saturate_or_are_nan_under_power_of_two_scales(text: str) -> None:
    x = normal(4, 64)
    x[1, 2], x[2, 3] = math.inf, -math.inf
    fake = fake_quantize(x, text, generator=generator())
    if any(f.grid.kind == "pow2" for f in spec(text).factors):
        assert fake[1, 2].isnan()
        return
    assert not fake.isnan().any()
    largest = spec(text).grid.max
    assert fake[1, 2] >= min(largest, 15.0) and fake[2, 3] <= -min(largest, 15.0) / 3


@pytest.mark.parametrize("text", [t for t in SPECS if spec(t).factors])
def test_zeros_stay_zero_and_have_a_usable_scale(text: str) -> None:
    q = quantize(torch.zeros(5, 64), text, generator=generator())
    assert (q.dequantize() == 0).all()
    for factor, stored in zip(q.spec.factors, q.scales.stored, strict=True):
        if factor.nested is None and factor.grid.kind == "wide":
            assert (stored == 1).all()


def test_stochastic_rounding_is_reproducible_and_leaves_global_state_alone() -> None:
    x = normal(8, 64)
    before = torch.get_rng_state()
    first = quantize(x, "int4@sr | fp16/g16", generator=generator())
    second = quantize(x, "int4@sr | fp16/g16", generator=generator())
    other = quantize(x, "int4@sr | fp16/g16", generator=torch.Generator().manual_seed(8))
    assert torch.equal(first.codes, second.codes) and not torch.equal(first.codes, other.codes)
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(UserError, match="generator"):
        fake_quantize(x, "int4@sr | fp16/g16")


@pytest.mark.parametrize("text", SPECS)
def test_inputs_are_left_alone_and_grad_is_not_tracked(text: str) -> None:
    x = normal(5, 48).requires_grad_()
    before = x.detach().clone()
    q = quantize(x, text, generator=generator())
    codes = q.codes.clone()
    assert not q.dequantize().requires_grad
    assert not fake_quantize(x, text, generator=generator()).requires_grad
    assert torch.equal(x.detach(), before) and torch.equal(q.codes, codes)


@pytest.mark.parametrize("rows", [1, 3, 300, 1000])
def test_per_token_path_over_piece_boundaries(rows: int) -> None:
    x = normal(rows, 576) * torch.logspace(-20, 20, rows)[:, None]
    x[rows // 2] = 0
    for text in ("a8", "int6 | fp32/row"):
        whole = fake_quantize(x, text)
        assert torch.equal(bits_of(whole), bits_of(quantize(x, text).dequantize()))
        assert clip_fraction(x, "int6 | fp32/row") == 0
