"""Every grid, bit by bit. A new row in GRIDS is tested by the parametrised tests as it stands."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from posttrain.errors import UserError
from posttrain.numbers import GRIDS, Grid

NARROW = [g for g in GRIDS.values() if g.kind != "wide"]


def ids(grid: Grid) -> str:
    return grid.name


def all_codes(grid: Grid) -> Tensor:
    if grid.code_dtype == torch.uint8:
        return torch.arange(2**grid.bits).to(torch.uint8)
    half = 2 ** (grid.bits - 1)
    return torch.arange(-half, half).to(grid.code_dtype)


def finite_values(grid: Grid) -> Tensor:
    """The values `grid` may produce, ascending, by decoding every code it encodes to."""
    values = grid.decode(all_codes(grid))
    values = values[values.isfinite() & (values.abs() <= grid.max)]
    if grid.kind == "int" and not grid.name[-1].isalpha():
        values = values[values.abs() <= grid.top]  # symmetric: the code -2^(b-1) is not used
    return values.unique()


def sweep(grid: Grid) -> Tensor:
    """Grid values, all midpoints between them, their float32 neighbours, and random numbers."""
    values = finite_values(grid)
    middles = ((values[1:].double() + values[:-1].double()) / 2).float()
    points = torch.cat((values, middles))
    up, down = torch.tensor(math.inf), torch.tensor(-math.inf)
    near = torch.cat((points, points.nextafter(up), points.nextafter(down)))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(5000, generator=generator) * grid.max * 0.4
    fine = torch.randn(5000, generator=generator) * grid.smallest * 3
    return torch.cat((near, noise, fine))


@pytest.mark.parametrize("grid", NARROW, ids=ids)
def test_every_code_survives_decode_and_encode(grid: Grid) -> None:
    codes = all_codes(grid)
    values = grid.decode(codes)
    used = values.isfinite() & (values.abs() <= grid.max)
    if grid.kind == "int" and not grid.zero_point:
        used &= values >= float(grid.snap(torch.tensor(-1e9)))
    assert used.sum() >= 0.75 * 2**grid.bits
    assert torch.equal(grid.encode(values[used]), codes[used])
    assert grid.encode(values).dtype == grid.code_dtype


@pytest.mark.parametrize("grid", NARROW, ids=ids)
@pytest.mark.parametrize("rounding", ["rne", "away"])
def test_snap_finds_the_nearest_value(grid: Grid, rounding: str) -> None:
    x, values = sweep(grid).double(), finite_values(grid).double()
    snapped = grid.snap(x.float(), rounding).double()
    above = torch.searchsorted(values, x).clamp(1, len(values) - 1)
    nearest = torch.minimum((x - values[above - 1]).abs(), (x - values[above]).abs())
    assert torch.equal((snapped - x).abs(), nearest)
    assert torch.isin(snapped, values).all()


@pytest.mark.parametrize("grid", NARROW, ids=ids)
def test_encode_then_decode_is_snap(grid: Grid) -> None:
    x = torch.cat((sweep(grid), torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan])))
    for rounding in ("rne", "away"):
        decoded = grid.decode(grid.encode(x, rounding))
        assert_bitwise(decoded, grid.snap(x, rounding))


def assert_bitwise(a: Tensor, b: Tensor) -> None:
    nan = a.isnan()
    assert torch.equal(nan, b.isnan())
    assert torch.equal(a[~nan].view(torch.int32), b[~nan].view(torch.int32))


@pytest.mark.parametrize("name,dtype", [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_8_bit_floats_are_torchs(name: str, dtype: torch.dtype) -> None:
    grid = GRIDS[name]
    codes = torch.arange(256).to(torch.uint8)
    theirs = codes.view(dtype).float()
    assert_bitwise(grid.decode(codes), theirs)
    # torch does not saturate every format: compare where nothing exceeds the largest value.
    x = sweep(grid)
    x = x[x.abs() <= grid.max]
    assert torch.equal(grid.encode(x), x.to(dtype).view(torch.uint8))


def test_e8m0_decodes_as_torchs() -> None:
    codes = torch.arange(256).to(torch.uint8)
    assert_bitwise(GRIDS["e8m0"].decode(codes), codes.view(torch.float8_e8m0fnu).float())


@pytest.mark.parametrize("name,dtype", [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_wide_grids_are_saturating_casts(name: str, dtype: torch.dtype) -> None:
    grid, generator = GRIDS[name], torch.Generator().manual_seed(1)
    x = torch.randn(20000, generator=generator) * torch.exp2(
        torch.randint(-40, 20, (20000,), generator=generator)
    )
    codes = grid.encode(x)
    assert codes.dtype == dtype
    assert torch.equal(codes.float(), x.clamp(-grid.max, grid.max).to(dtype).float())
    assert float(grid.encode(torch.tensor(math.inf)).float()) == grid.max
    assert grid.encode(torch.tensor(math.nan)).isnan()


# Table 1.4 of the formats: name, max, smallest normal, smallest subnormal, number of NaN codes.
FLOATS = [
    ("e4m3", 448, 2**-6, 2**-9, 2, 0),
    ("e4m3i", 240, 2**-6, 2**-9, 14, 2),
    ("e5m2", 57344, 2**-14, 2**-16, 6, 2),
    ("e3m4", 15.5, 2**-2, 2**-6, 30, 2),
    ("e2m5", 7.875, 1.0, 2**-5, 0, 0),
    ("e3m2", 28, 0.25, 0.0625, 0, 0),
    ("e2m3", 7.5, 1.0, 0.125, 0, 0),
    ("e2m1", 6, 1.0, 0.5, 0, 0),
]


@pytest.mark.parametrize("name,largest,normal,subnormal,nans,infinities", FLOATS)
def test_float_formats_have_their_published_ranges(
    name: str, largest: float, normal: float, subnormal: float, nans: int, infinities: int
) -> None:
    grid = GRIDS[name]
    values = grid.decode(all_codes(grid))
    assert (grid.max, grid.top, grid.smallest) == (largest, largest, subnormal)
    assert int(values.isnan().sum()) == nans and int(values.isinf().sum()) == infinities
    positive = values[(values > 0) & values.isfinite()].sort().values
    assert positive[0] == subnormal and positive[-1] == largest
    steps = positive.diff()
    # Equal steps up to twice the smallest normal, then the step doubles.
    assert (steps[positive[:-1] < 2 * normal] == subnormal).all()
    assert steps[positive[:-1] == 2 * normal].item() == 2 * subnormal


def test_every_float_format_is_in_the_table_of_ranges() -> None:
    assert {g.name for g in GRIDS.values() if g.kind == "float"} == {row[0] for row in FLOATS}


E3M2 = (
    "0 .0625 .125 .1875 .25 .3125 .375 .4375 .5 .625 .75 .875 1 1.25 1.5 1.75 2 2.5 3 3.5 4 5 6 7 "
    "8 10 12 14 16 20 24 28"
)
E2M1 = "0 .5 1 1.5 2 3 4 6"


@pytest.mark.parametrize("name,listing", [("e3m2", E3M2), ("e2m1", E2M1)])
def test_small_floats_by_their_listing(name: str, listing: str) -> None:
    positive = torch.tensor([float(v) for v in listing.split()])
    grid = GRIDS[name]
    assert torch.equal(grid.decode(all_codes(grid)), torch.cat((positive, -positive)))


def test_e2m1_ties_go_to_the_even_code() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    expected = torch.tensor([0.0, 1, 1, 2, 2, 4, 4])
    assert torch.equal(GRIDS["e2m1"].snap(ties), expected)
    assert torch.equal(GRIDS["e2m1"].snap(-ties), -expected)


@pytest.mark.parametrize("grid", NARROW, ids=ids)
def test_ties(grid: Grid) -> None:
    values = finite_values(grid).double()
    middles = (values[1:] + values[:-1]) / 2
    exact = middles.float().double() == middles
    middles, low, high = middles[exact].float(), values[:-1][exact], values[1:][exact]
    away = torch.where(middles > 0, high, low) if grid.kind != "pow2" else high
    keep = middles != 0
    assert torch.equal(grid.snap(middles, "away").double()[keep], away[keep])
    if grid.kind == "table":
        towards = torch.where(middles > 0, low, high)
        assert torch.equal(grid.snap(middles).double()[keep], towards[keep])
    elif grid.kind in ("int", "float"):
        assert (grid.encode(middles).to(torch.int32) % 2 == 0).all()


INTEGERS = [
    (bits, suffix, lo, hi, top, zero)
    for bits in range(2, 9)
    for q in [2 ** (bits - 1) - 1]
    for suffix, lo, hi, top, zero in [
        ("", -q, q, q, False),
        ("t", -q - 1, q, q, False),
        ("h", -q - 1, q, q + 0.5, False),
        ("z", 0, 2 * q + 1, 2 * q + 1, True),
    ]
]


@pytest.mark.parametrize("bits,suffix,lo,hi,top,zero", INTEGERS)
def test_integer_ranges(bits: int, suffix: str, lo: int, hi: int, top: float, zero: bool) -> None:
    grid = GRIDS[f"int{bits}{suffix}"]
    ends = grid.encode(torch.tensor([-1e30, 1e30]))
    assert ends.tolist() == [lo, hi]
    assert (grid.bits, grid.top, grid.zero_point) == (bits, top, zero)
    assert grid.max == max(-lo, hi)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=ids)
def test_infinities_saturate_and_nan_is_defined(grid: Grid) -> None:
    low, high, nan = grid.snap(torch.tensor([-math.inf, math.inf, math.nan])).tolist()
    assert max(high, -low) == grid.max and high >= grid.max - 1
    assert math.isfinite(low) and (low <= 0 or grid.kind == "pow2")
    has_nan = grid.kind in ("wide", "pow2") or grid.decode(all_codes(grid)).isnan().any()
    assert math.isnan(nan) if has_nan else nan == 0


def test_zeros_keep_their_sign_where_the_format_has_one() -> None:
    for name, code in (("e4m3", 0x80), ("e5m2", 0x80), ("e2m1", 8), ("bnbfp4", 8), ("int8", 0)):
        assert GRIDS[name].encode(torch.tensor([0.0, -0.0])).tolist() == [0, code]


def test_float32_subnormals_snap_to_zero_or_stay() -> None:
    tiny = torch.tensor([1e-45, -1e-45, 1e-40])
    assert (GRIDS["e4m3"].snap(tiny) == 0).all()
    assert torch.equal(GRIDS["fp32"].snap(tiny), tiny)
    assert GRIDS["e8m0"].snap(tiny).tolist() == [2.0**-127] * 3


def test_nf4_and_bnb_fp4_values() -> None:
    nf4 = torch.tensor(GRIDS["nf4"].values)
    assert (nf4.diff() > 0).all() and nf4[7] == 0 and nf4[0] == -1 and nf4[15] == 1
    printed = [-0.69619, -0.52507, -0.39492, -0.28444, -0.18477, -0.09105, 0.07958, 0.16093]
    assert torch.allclose(nf4[[1, 2, 3, 4, 5, 6, 8, 9]], torch.tensor(printed), atol=5e-6)
    twelfths = torch.tensor(GRIDS["bnbfp4"].values[:8]) * 12
    assert torch.allclose(twelfths.sort().values, torch.tensor([0, 0.0625, 2, 3, 4, 6, 8, 12]))


def test_dynamic_code_by_its_rule() -> None:
    values = torch.tensor(GRIDS["dyn8"].values)
    assert (values.diff() > 0).all() and len(values) == 256
    assert 0.0 in values and values[-1] == 1.0 and values[0] > -1.0
    for i in range(7):  # decade i holds 2^i values of each sign
        inside = (values > 0.1 * 10.0 ** (i - 6)) & (values < 10.0 ** (i - 6))
        assert int(inside.sum()) == 2**i
        assert torch.allclose(values[inside].mean(), torch.tensor(0.55 * 10.0 ** (i - 6)))


@pytest.mark.parametrize("grid", [g for g in GRIDS.values() if g.name != "fp32"], ids=ids)
def test_stochastic_rounding_is_unbiased_between_neighbours(grid: Grid) -> None:
    values = finite_values(grid) if grid.kind != "wide" else torch.tensor([1e-6, 0.1, 1.0, 3.0])
    generator = torch.Generator().manual_seed(2)
    pick = torch.randint(0, len(values) - 1, (40,), generator=generator)
    low, high = values[pick].double(), values[pick + 1].double()
    if grid.kind == "wide":
        wide = low.to(grid.code_dtype)
        low, high = wide.double(), wide.nextafter(wide * 2).double()
    x = (low + (high - low) * torch.rand(40, generator=generator)).float()
    draws = grid.snap(x.expand(20000, 40), "sr", generator).double()
    assert ((draws == low) | (draws == high)).all()
    deviation = (draws.mean(0) - x.double()).abs() / draws.std(0).clamp(min=1e-300)
    unsure = draws.std(0) > 0
    assert unsure.any()
    assert (deviation[unsure] < 5 / math.sqrt(20000)).all()


@pytest.mark.parametrize("grid", NARROW, ids=ids)
def test_stochastic_rounding_leaves_grid_values_alone(grid: Grid) -> None:
    values = finite_values(grid)
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        assert torch.equal(grid.snap(values, "sr", generator), values)


def test_rounding_errors() -> None:
    with pytest.raises(UserError, match="generator"):
        GRIDS["int8"].snap(torch.ones(2), "sr")
    with pytest.raises(UserError, match="rne, away, sr"):
        GRIDS["int8"].snap(torch.ones(2), "up")


def test_away_is_exact_just_below_a_half() -> None:
    below = torch.tensor([0.49999997, -0.49999997, 0.5, -0.5, 2.5])
    assert GRIDS["int8"].snap(below, "away").tolist() == [0, 0, 1, -1, 3]


@given(
    st.sampled_from(sorted(GRIDS)),
    st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20),
)
def test_snap_is_idempotent_and_monotone(name: str, numbers: list[float]) -> None:
    grid = GRIDS[name]
    x = torch.tensor(sorted(numbers), dtype=torch.float32)
    original = x.clone()
    snapped = grid.snap(x)
    assert torch.equal(x, original)  # the input is left alone
    assert torch.equal(grid.snap(snapped), snapped)
    assert (snapped.diff() >= 0).all()
