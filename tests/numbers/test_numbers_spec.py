"""The text form of Spec: round trips, presets, and errors that point at the wrong token."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.errors import UserError
from posttrain.numbers import GRIDS, PRESETS, Factor, Partition, Spec, spec, stored_bits


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip(name: str) -> None:
    parsed = Spec.parse(name)
    assert Spec.parse(str(parsed)) == parsed
    assert hash(Spec.parse(str(parsed))) == hash(parsed)
    assert str(parsed) == str(Spec.parse(PRESETS[name]))
    assert Spec.parse(f"  {name} ") == parsed


ELEMENTS = [g.name for g in GRIDS.values() if g.signed]
SCALES = [g.name for g in GRIDS.values() if not g.zero_point]
CHAINS = [
    (),
    ("g16",),
    ("row",),
    ("col",),
    ("tensor",),
    ("t4x8",),
    ("flat64",),
    ("g16", "tensor"),
    ("g16", "row"),
    ("g16", "g64", "row"),
    ("t16x16", "tensor"),
    ("col", "tensor"),
    ("flat8", "flat64", "tensor"),
]


@st.composite
def factors(draw: st.DrawFn, partition: str, has_coarser: bool, depth: int) -> Factor:
    found = Partition.parse(partition)
    assert found is not None
    if depth and draw(st.booleans()):
        inner = draw(specs(depth - 1))
        offset = draw(st.sampled_from([None, "mean"]))
        return Factor(inner.grid_name, found, nested=inner, offset=offset)
    grid = draw(st.sampled_from(SCALES))
    if GRIDS[grid].kind != "pow2":
        return Factor(grid, found)
    rule = draw(st.sampled_from(["floor", "ceil", "nearest"]))
    limit = draw(st.sampled_from([None, (0, 3), (1, 1)])) if has_coarser else None
    return Factor(grid, found, rule, limit=limit)


@st.composite
def specs(draw: st.DrawFn, depth: int = 1) -> Spec:
    element = draw(st.sampled_from(ELEMENTS))
    chain = draw(st.sampled_from(CHAINS[1:] if GRIDS[element].zero_point else CHAINS))
    drawn = [draw(factors(p, i + 1 < len(chain), depth)) for i, p in enumerate(chain)]
    rounding = draw(st.sampled_from(["rne", "away"]))
    return Spec(element, tuple(drawn), rounding)


@given(specs())
def test_generated_specs_round_trip(value: Spec) -> None:
    assert Spec.parse(str(value)) == value
    assert str(Spec.parse(str(value))) == str(value)


ALONE = [name for name, grid in GRIDS.items() if grid.kind != "pow2" and not grid.zero_point]


@pytest.mark.parametrize("grid", ALONE)
def test_a_grid_alone_round_trips_though_a_preset_has_its_name(grid: str) -> None:
    assert Spec.parse(str(Spec(grid))) == Spec(grid)


@given(st.floats(0.001, 0.999), st.sampled_from(["int4", "int8", "e4m3"]))
def test_generated_powers_round_trip(power: float, grid: str) -> None:
    row, col = Partition.parse("row"), Partition.parse("col")
    assert row and col
    value = Spec(grid, (Factor("fp32", row, power=power), Factor("fp32", col, power=1 - power)))
    assert Spec.parse(str(value)) == value


CANONICAL = {
    "int6@rne|fp16 / g64": "int6 | fp16/g64",
    "e2m1 | e4m3.rne/g16*fp32/tensor": "e2m1 | e4m3/g16 * fp32/tensor",
    "nf4@near | (dyn8@near | fp32/g256, offset=mean)/flat64": PRESETS["nf4-dq"],
    "int8@rne | fp32/row^0.15 * fp32/col^0.85": PRESETS["crossquant"],
    "e4m3 | e8m0/g32": "e4m3 | e8m0.ceil/g32",
    "e2m1 | pow2/g256 * fp16/row": PRESETS["zqfp-m2"],
    "int4@sr | pow2[0..3]/redchan * fp32/tensor": PRESETS["shiftquant"],
    "uint8z | fp32/tensor": "int8z | fp32/tensor",
    "e2m1@sr": "e2m1@sr",
    "int8 | fp32/t1x64": "int8 | fp32/g64",
    "mxfp4": "e2m1 | e8m0.ceil/g32",
    "w6g64": "int6 | fp16/g64",
    "a8": "int8h | fp32/row",
    "int2.1": "int2z | fp16/g128",
}


@pytest.mark.parametrize("text", CANONICAL)
def test_canonical_form(text: str) -> None:
    assert str(spec(text)) == CANONICAL[text]


WRONG = [  # text, the token the caret must be under, what the message must say
    ("int6 | fp61/g64", "fp61", "did you mean 'fp16'"),
    ("int66 | fp16/g64", "int66", "did you mean 'int6'"),
    ("w6g63", "w6g63", "did you mean 'w6g64'"),
    ("mxpf4", "mxpf4", "did you mean 'mxfp4'"),
    ("nf4-db", "nf4-db", "did you mean 'nf4-dq'"),
    ("int6 | fp16/g", "g", "unknown partition"),
    ("int6 | fp16/rows", "rows", "did you mean 'row'"),
    ("int6 | fp16/g0", "g0", "unknown partition"),
    ("int6 | fp16 g64", "g64", "'/'"),
    ("int6 / fp16", "/", "unexpected '/'"),
    ("int6@rnd | fp16/g64", "rnd", "did you mean 'rne'"),
    ("int4@gptq | fp16/g64", "gptq", "recipe"),
    ("e2m1 | e8m0.roof/g32", "roof", "floor, ceil, nearest"),
    ("int8 | fp16.ceil/g32", "ceil", "unknown scale rule"),
    ("int6 | fp16/row * e4m3/g16", "e4m3", "finer factor first"),
    ("int6 | fp16/g24 * fp32/g64", "fp32", "do not lie inside"),
    ("int6 | fp16/row * fp16/col", "fp16/col", "do not lie inside"),
    ("int6 | fp16/flat64 * fp32/row", "fp32", "do not lie inside"),
    ("int8 | fp32/row^0.5 * fp32/col^0.6", "fp32/col", "sum to 1, not 1.1"),
    ("int8 | fp32/row^x", "x", "power"),
    ("int8 | fp32/row^0", "0", "power"),
    ("int8 | fp32/row *", "", "missing scale format"),
    ("int8 |", "", "missing scale format"),
    ("int8z", "int8z", "needs a scale factor"),
    ("e8m0 | fp32/row", "e8m0", "scales only"),
    ("int8 | int4z/g16 * fp16/row", "int4z", "zero point"),
    ("int8 | pow2[0..3]/col", "pow2", "below a coarser factor"),
    ("int8 | pow2[3..0]/col * fp32/tensor", "3..0", "above"),
    ("nf4 | (dyn8 | fp32/g256, shift=mean)/flat64", "shift", "choose one of: offset"),
    ("nf4 | (dyn8 | fp32/g256/flat64", "/flat64", "')'"),
    ("nf4 | (dyn8@sr | fp32/g256)/flat64", "(", "stochastic"),
    ("e4m3 | fp32/row | rht16", "| rht16", "recipe"),
    ("e4m3 | fp32/row + lowrank", "+", "recipe"),
    ("int6 | fp16/g64 junk", "junk", "unexpected 'junk'"),
    ("int6 $ fp16", "$", "unexpected '$'"),
]


@pytest.mark.parametrize("text,token,message", WRONG)
def test_errors_point_at_the_wrong_token(text: str, token: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        spec(text)
    report = str(raised.value)
    assert message in report
    shown, carets = report.splitlines()[1:3]
    assert shown == f"  {text}"
    at = carets.index("^") - 2
    assert at == (text.rindex(token) if token else len(text))


@pytest.mark.parametrize("bad", ["", "   ", None, 8])
def test_what_is_not_text_at_all(bad: object) -> None:
    with pytest.raises(UserError):
        spec(bad)  # type: ignore[arg-type]


def test_a_spec_cannot_be_built_wrong_either() -> None:
    with pytest.raises(UserError, match="scale factor"):
        Spec("int4z")


def test_specs_are_values() -> None:
    a, b = spec("w6g64"), spec("int6 | fp16/g64")
    assert a == b and hash(a) == hash(b) and {a: 1}[b] == 1
    assert spec(a) is a
    assert a != spec("w4g64")
    assert (a.grid.name, a.bits, a.rounding, len(a.factors)) == ("int6", 6, "rne", 1)


# Part 1.3: bits per element with scales, for a 4096 x 4096 matrix.
BITS = {
    "mxfp8": 8.25,
    "mxfp6": 6.25,
    "mxfp4": 4.25,
    "nvfp4": 4.5,
    "int6 | fp16/g128": 6.125,
    "int4 | fp16/g128": 4.125,
    "nf4": 4.5,
    "nf4-dq": 4.127,
    "int2z | fp16/g128": 2.1406,
    "w8": 8 + 32 / 4096,
}


@pytest.mark.parametrize("name", BITS)
def test_bits_per_element(name: str) -> None:
    assert spec(name).bits_per_element((4096, 4096)) == pytest.approx(BITS[name], abs=1e-4)


def test_stored_bits_of_odd_and_empty_shapes() -> None:
    assert stored_bits("w4g64", (3, 65)) == 3 * 65 * 4 + 3 * 2 * 16
    assert stored_bits("w4g64z", (3, 65)) == 3 * 65 * 4 + 3 * 2 * (16 + 4)
    assert stored_bits("nvfp4", (2, 3, 16)) == 96 * 4 + 6 * 8 + 32
    assert stored_bits("nf4-dq", (3, 65)) == 195 * 4 + 4 * 8 + 32 + 32
    assert stored_bits("w4g64", (0, 64)) == 0
    assert spec("w4g64").bits_per_element((0, 64)) == 0.0
    assert stored_bits("int8", (5,)) == 40
