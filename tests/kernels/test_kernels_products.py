"""Law 2: every kernel equals its reference, whatever the shape, the tokens and the threads."""

import pytest
import torch
from torch import Tensor

from posttrain import kernels
from posttrain.errors import UserError
from posttrain.kernels import InputFormat, PackedWeight, library
from posttrain.kernels.packed import product as product_struct
from posttrain.models.linear import integer_product
from posttrain.models.rotation import rotate
from posttrain.numbers import QTensor, Scales, Spec, fake_quantize, quantize

pytestmark = pytest.mark.skipif(not kernels.available(), reason=kernels.find().reason)

A8, A8_GROUPED = "int8h | fp32/row", "int8 | fp16/g128"
IN_INTEGERS = [  # (weights, activations) summed in integers
    *((f"w{bits}g{group}", A8) for bits in range(2, 9) for group in (16, 32, 64, 128)),
    *((f"w{bits}", A8) for bits in range(2, 9)),
    *((f"w{bits}g{group}z", A8) for bits in (2, 4, 8) for group in (16, 64)),
    *((name, A8_GROUPED) for name in ("w4g32", "w6", "w8g64z")),
    ("w6g128", "int6h | fp32/row"),
    ("w4g16", "int8h | fp16/g16"),
    # Groups that are no whole number of the 32 columns stored together.
    ("int4 | fp16/g48", A8),
    ("int6 | fp16/g80", A8),
    ("w4g64", "int8 | fp32/g48"),
    ("int4", A8),  # no scales
]
LOOKED_UP = [("mxfp4", A8), ("nvfp4", A8), ("fp4-g64", A8_GROUPED)]
IN_FLOATS = [
    *((f"w{bits}g{group}", None) for bits in range(2, 9) for group in (16, 64)),
    *((f"w{bits}g16z", None) for bits in range(2, 9)),
    *((name, None) for name in ("w8g32z", "w6", "nf4", "nf4-dq", "bnb-fp4", "zqfp-m2")),
    *((name, None) for name in ("mxfp4", "nvfp4", "fp6", "mxfp6", "mxfp6-e3m2", "mxfp8", "fp8")),
    ("nf4", A8),
    ("e4m3", None),
    ("fp8-e5m2", A8_GROUPED),
    ("w4g64", "mxfp8"),  # activations the kernels cannot quantize
]
DIGITS = "digits"  # not a format: InputFormat.digits
IN_DIGITS = [(name, DIGITS) for name in (
    *(f"w{bits}g64" for bits in range(2, 9)), *(f"w{bits}" for bits in (2, 6, 8)),
    "w4g16", "w6g32", "w3g128", "w4g32z", "w8g16z", "int4 | fp16/g48", "mxfp4", "nvfp4",
)]  # fmt: skip
SHAPES = [(16, 32), (1, 1), (17, 33), (48, 64), (100, 200), (5, 576), (130, 96), (64, 1000)]
TOKENS = [1, 2, 3, 5, 9, 40]
EPSILON = 2.0**-24
LEFT_OUT = 2.0**-23 * (1 + 1 / 128)  # of a token's largest, when in digits: less than 2^-22


@pytest.fixture(params=kernels.isas() if kernels.available() else ["none"])
def isa(request):
    kernels.use(request.param)
    yield request.param
    kernels.use()


def example(weights: str, rows: int, cols: int, tokens: int) -> tuple[QTensor, Tensor, Tensor]:
    """A quantized weight, a bias and activations with a few outliers."""
    generator = torch.Generator().manual_seed(rows * 1009 + cols * 31 + tokens)
    q = quantize(torch.randn(rows, cols, generator=generator), weights)
    x = torch.randn(tokens, cols, generator=generator)
    x[:, ::13] *= 20
    return q, torch.randn(rows, generator=generator), x


def enters(activations: str | None) -> InputFormat:
    if activations == DIGITS:
        return InputFormat.digits()
    return InputFormat.floats() if activations is None else InputFormat.of(Spec.parse(activations))


def snap(x: Tensor, activations: str | None) -> Tensor:
    return x if activations in (None, DIGITS) else fake_quantize(x, activations)


def product(x: Tensor, q: QTensor, bias: Tensor | None, activations: str | None) -> Tensor:
    (y,) = kernels.linear(x, [PackedWeight.from_qtensor(q, bias)], enters(activations))
    return y


def bound(x: Tensor, q: QTensor, bias: Tensor) -> Tensor:
    """As `models.linear.integer_bound`: both sides round at most K + 4 times on the way."""
    reach = x.double().abs() @ q.dequantize().double().abs().T + bias.double().abs()
    return 2 * (x.shape[1] + 4) * EPSILON * reach


def bound_of_digits(x: Tensor, q: QTensor, bias: Tensor) -> Tensor:
    """Besides, what digits leave out of every activation."""
    left_out = LEFT_OUT * x.double().abs().amax(1, keepdim=True)
    return bound(x, q, bias) + left_out * q.dequantize().double().abs().sum(1)


def takes(weights: str, cols: int) -> bool:
    return kernels.unsupported(Spec.parse(weights), cols) is None


@pytest.mark.parametrize("weights,activations", [*IN_INTEGERS, *LOOKED_UP, *IN_FLOATS, *IN_DIGITS])
def test_products_match_the_reference(isa, weights, activations):
    seen = 0
    for rows, cols in SHAPES:
        if not takes(weights, cols):
            continue
        for tokens in TOKENS if isa != "portable" else (1, 9):
            q, bias, x = example(weights, rows, cols, tokens)
            snapped = snap(x, activations)
            want = snapped.double() @ q.dequantize().double().T + bias
            error = (product(x, q, bias, activations) - want).abs()
            allowed = bound_of_digits if activations == DIGITS else bound
            assert (error <= allowed(snapped, q, bias)).all(), (rows, cols, tokens)
            seen += 1
    assert seen


@pytest.mark.parametrize("weights,activations", IN_FLOATS + IN_DIGITS)
def test_a_token_through_many_rows_comes_out_as_in_a_prompt(isa, weights, activations):
    """Bit for bit; only shares of many rows are read several panels side by side."""
    q, bias, x = example(weights, 4200, 96, 9)
    many = product(x, q, bias, activations)
    assert torch.equal(product(x[:1], q, bias, activations), many[:1])
    assert torch.equal(product(x[:3], q, bias, activations), many[:3])


@pytest.mark.parametrize("weights,activations", IN_INTEGERS[:28])
def test_integer_sums_are_exact(isa, weights, activations):
    """With every scale 1 nothing but the conversion of the exact sum to float32 may round."""
    generator = torch.Generator().manual_seed(7)
    spec = Spec.parse(weights)
    for rows, cols, tokens in [(33, 300, 1), (20, 4100, 3), (70, 1030, 37)]:
        grid = spec.grid
        codes = torch.randint(int(grid.lo), int(grid.hi) + 1, (rows, cols), generator=generator)
        fitted = quantize(torch.randn(rows, cols, generator=generator), spec).scales
        ones = tuple(torch.ones_like(stored) for stored in fitted.stored)
        q = QTensor(codes.to(grid.code_dtype), Scales(spec, ones), spec)
        x = torch.randint(-127, 128, (tokens, cols), generator=generator).float()
        x[:, 0] = -127.5  # so that the scale of every token is 1
        y = product(x, q, None, activations)
        snapped = quantize(x, activations).codes.long()
        if spec.factors[0].partition.cols == 0:
            want = snapped @ codes.T
            assert torch.equal(y, want.to(torch.float32))
        else:  # several exact sums, added in float32: still exact below 2^24
            small = x.clone()
            small[:, 1:] = small[:, 1:].clamp(-3, 3)
            want = quantize(small, activations).codes.long() @ codes.T
            exact = want.abs() < 2**24
            assert torch.equal(product(small, q, None, activations)[exact], want[exact].float())


@pytest.mark.parametrize("weights,activations", [*IN_INTEGERS, *LOOKED_UP, *IN_DIGITS])
def test_how_memory_is_read_changes_no_bit(isa, weights, activations):
    """Odd panels, rows shorter than what is asked for ahead, and one panel alone."""
    for rows, cols, tokens in [(16, 32, 1), (53, 640, 1), (100, 2080, 3), (37, 224, 8)]:
        if not takes(weights, cols) or isa == "portable" and cols > 640:
            continue
        q, bias, x = example(weights, rows, cols, tokens)
        found = []
        for reading in (1, 2, 3, 0):
            library.native().pt_set_reading(reading)
            found.append(product(x, q, bias, activations))
        assert all(torch.equal(y, found[0]) for y in found[1:])


def test_sums_too_long_for_32_bits_are_taken_in_parts(isa):
    """One row of 70,000 products of -128 and 127: 1.1e9 each way, and the two parts stay exact."""
    cols = 70_000
    spec = Spec.parse("int8t | fp32/row")
    codes = torch.full((3, cols), -128, dtype=torch.int8)
    q = QTensor(codes, Scales(spec, (torch.ones(3, 1),)), spec)
    for tokens in (1, 12):
        x = torch.full((tokens, cols), 127.0)
        x[:, 0] = -127.5  # code -128, so that the scale is 1
        want = -128.0 * (127 * (cols - 1) - 128)
        assert (product(x, q, None, A8) / want - 1).abs().max() < 1e-7


@pytest.mark.parametrize("weights,activations", [("w6g64", A8), ("w4g32z", A8_GROUPED), ("w8", A8)])
def test_the_torch_path_is_the_same_product(isa, weights, activations):
    q, bias, x = example(weights, 75, 640, 11)
    torch_path = integer_product(quantize(x, activations), q) + bias
    error = (product(x, q, bias, activations) - torch_path).abs().double()
    assert (error <= bound(fake_quantize(x, activations), q, bias)).all()


SAME_DIGITS = [("w6g64", DIGITS), ("w4g32z", DIGITS), ("w8", DIGITS), ("mxfp4", DIGITS)]
SAME_BITS = [("w6g64", A8), ("w4g32z", A8_GROUPED), ("w8", A8), ("mxfp4", A8), ("nf4", None),
             ("w3g32", None), ("fp6", None), ("w4g16", "int8h | fp16/g16")]  # fmt: skip


@pytest.mark.parametrize("weights,activations", SAME_BITS + SAME_DIGITS)
def test_a_token_comes_out_the_same_in_any_company(isa, weights, activations):
    """Bit for bit: alone, among many, on any number of threads, on any instruction set."""
    q, bias, x = example(weights, 150, 320, 50)
    try:
        kernels.set_threads(1)
        want = product(x, q, bias, activations)
        for threads in (2, 3):
            kernels.set_threads(threads)
            for tokens in (1, 2, 7, 8, 9, 50):
                assert torch.equal(product(x[:tokens], q, bias, activations), want[:tokens])
    finally:
        kernels.set_threads(0)
    kernels.use("portable")
    assert torch.equal(product(x[:9], q, bias, activations), want[:9])


@pytest.mark.parametrize("weights,activations", SAME_BITS[:4] + SAME_BITS[-1:] + SAME_DIGITS)
def test_what_is_cut_into_blocks_comes_out_the_same(isa, weights, activations):
    """Blocks of columns, of rows and of tokens, none of them whole, against a token at a time."""
    q, _, x = example(weights, 290, 1440, 600)
    try:
        for threads in (1, 2, 3):
            kernels.set_threads(threads)
            many = product(x, q, None, activations)
            for token in (0, 31, 511, 512, 599):
                assert torch.equal(
                    many[token : token + 1], product(x[token : token + 1], q, None, activations)
                )
            assert torch.equal(many[::64], product(x[::64], q, None, activations))
    finally:
        kernels.set_threads(0)


def test_digits_are_whole_numbers_of_a_power_of_two_and_miss_no_more_than_they_say(isa):
    """What the unit matrix gives back, about any magnitude and next to where the power changes."""
    cols = 96
    spec = Spec.parse("int8 | fp32/row")
    ones = Scales(spec, (torch.ones(cols, 1),))
    unit_matrix = QTensor(torch.eye(cols, dtype=torch.int8), ones, spec)
    generator = torch.Generator().manual_seed(15)
    largest = torch.tensor([1.0, 127 * 65793 / 2**23, 1.5, 2.0]).repeat(3)
    for exponent in (-103, -60, -1, 0, 3, 90, 126):
        edges = largest * 2.0**exponent
        edges[4:8] = edges[4:8].nextafter(torch.tensor(0.0))
        edges[8:] = edges[8:].nextafter(torch.tensor(torch.inf))
        x = (torch.rand(13, cols, generator=generator) - 0.5) * 2
        x = x ** torch.randint(1, 9, x.shape, generator=generator)
        x[:-1] *= edges[:, None]
        x[:-1, 7] = edges.minimum(torch.tensor(torch.finfo(torch.float32).max))
        x[1::2] *= -1
        x[-1] = 0.0
        for tokens in (1, 13):
            (y,) = kernels.linear(
                x[-tokens:], [PackedWeight.from_qtensor(unit_matrix)], enters(DIGITS)
            )
            absmax = x[-tokens:].abs().amax(1, keepdim=True)
            assert ((y - x[-tokens:]).abs() <= absmax * LEFT_OUT).all()
            power = absmax.log2().floor().exp2()
            whole = y.double() / power.double() * 2.0**22
            assert (absmax == 0).logical_or(whole == whole.round()).all()


def test_tokens_that_are_not_finite_spoil_no_other(isa):
    q, bias, x = example("w6g64", 40, 96, 14)
    whole = product(x, q, bias, DIGITS)
    x[3, 5], x[4, 90], x[9, 0] = torch.nan, torch.inf, -torch.inf
    broken = torch.zeros(14, dtype=torch.bool)
    broken[[3, 4, 9]] = True
    for tokens in (4, 14):
        y = product(x[:tokens], q, bias, DIGITS)
        assert torch.equal(y[~broken[:tokens]], whole[:tokens][~broken[:tokens]])
        assert not y[broken[:tokens]].isfinite().any()


def test_only_weights_of_codes_meet_digits(isa):
    _, bias, x = example("nf4", 40, 96, 11)
    floats = torch.randn(40, 96, generator=torch.Generator().manual_seed(16))
    table = PackedWeight.from_qtensor(quantize(floats, "nf4"), bias)
    for weight in (table, PackedWeight.from_tensor(floats), PackedWeight.in_place(floats)):
        for rotate_first in (False, True):
            whole = kernels.linear(x, [weight], InputFormat.floats(rotate_first))
            digits = kernels.linear(x, [weight], InputFormat.digits(rotate_first))
            assert torch.equal(whole[0], digits[0])
    with pytest.raises(UserError, match="activations"):
        kernels.quantize_input(x, InputFormat.digits())


def test_digits_are_chosen_where_bytes_are_multiplied_fast(isa):
    fast = isa not in ("portable", "avx2", "neon-dotprod")
    assert (InputFormat.of(None).struct.bits == InputFormat.digits().struct.bits) == fast
    q, bias, x = example("w4g64", 70, 640, 5)
    packed = [PackedWeight.from_qtensor(q, bias)]
    for rotate_first in (False, True):
        (y,) = kernels.linear(x, packed, InputFormat.of(None, rotate_first))
        seen = rotate(x) if rotate_first else x
        want = seen.double() @ q.dequantize().double().T + bias
        assert ((y - want).abs() <= bound_of_digits(seen, q, bias)).all()


def test_floats_are_multiplied_as_they_are(isa):
    generator = torch.Generator().manual_seed(3)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for rows, cols in SHAPES:
            for tokens in (1, 3, 20):
                w = torch.randn(rows, cols, generator=generator).to(dtype)
                x = torch.randn(tokens, cols, generator=generator)
                bias = torch.randn(rows, generator=generator)
                packed = PackedWeight.from_tensor(w, bias)
                (y,) = kernels.linear(x, [packed], InputFormat.of(None))
                want = x.double() @ w.double().T + bias
                reach = x.double().abs() @ w.double().abs().T + bias.abs()
                assert ((y - want).abs() <= 2 * (cols + 4) * EPSILON * reach).all()


def test_weights_that_share_activations_equal_each_alone(isa):
    generator = torch.Generator().manual_seed(5)
    for tokens in (1, 30):
        x = torch.randn(tokens, 192, generator=generator)
        packed = [
            PackedWeight.from_qtensor(quantize(torch.randn(rows, 192, generator=generator), spec))
            for rows, spec in [(100, "w4g64"), (20, "w4g64"), (33, "w8"), (7, "nf4"), (50, "w4g64")]
        ]
        together = kernels.linear(x, packed, InputFormat.of(Spec.parse(A8)))
        for weight, y in zip(packed, together, strict=True):
            (alone,) = kernels.linear(x, [weight], InputFormat.of(Spec.parse(A8)))
            assert torch.equal(y, alone)


@pytest.mark.parametrize("activations", [A8, "int8 | fp32/row", A8_GROUPED, "int4h | fp16/g16"])
def test_activations_get_the_codes_that_numbers_gives_them(isa, activations):
    generator = torch.Generator().manual_seed(11)
    for tokens, cols in [(1, 1), (3, 33), (5, 576), (40, 200)]:
        x = torch.randn(tokens, cols, generator=generator)
        x *= 10.0 ** torch.randint(-30, 30, (tokens, 1), generator=generator)
        x[0] = 0.0
        if cols > 40:
            x[1, 3], x[2, 5], x[3, 7], x[4] = torch.inf, -torch.inf, torch.nan, 1e-44
        want = quantize(x, activations)
        codes, scales = kernels.quantize_input(x, InputFormat.of(Spec.parse(activations)))
        torch.testing.assert_close(scales, want.scales.factors[0], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(codes, want.codes)


def test_activations_between_two_codes_go_where_numbers_puts_them(isa):
    generator = torch.Generator().manual_seed(12)
    spec = Spec.parse(A8)
    x = torch.randint(-254, 255, (300, 640), generator=generator) / 2
    x[:, 0] = 127.5
    x *= torch.rand(300, 1, generator=generator) + 0.5  # ties, and floats next to ties
    codes, _ = kernels.quantize_input(x, InputFormat.of(spec))
    assert torch.equal(codes, quantize(x, spec).codes)


def test_rotation_is_that_of_the_model(isa):
    generator = torch.Generator().manual_seed(13)
    for cols in (1, 6, 24, 48, 576, 1536, 2048):
        x = torch.randn(4, cols, generator=generator)
        eye = PackedWeight.from_tensor(torch.eye(cols))
        (y,) = kernels.linear(x, [eye], InputFormat.of(None, rotate=True))
        torch.testing.assert_close(y, rotate(x), rtol=1e-5, atol=1e-5)


def test_products_in_a_row_are_those_of_single_calls(isa):
    """One token and many by turns, and none; weights that share activations."""
    input = InputFormat.of(Spec.parse(A8))
    wanted, found, asked = [], [], []
    for tokens, rows, weights in [
        (1, 200, "w4g64"), (9, 17, "w6"), (1, 999, "w8g32"), (0, 20, "w4"), (3, 40, "w4g64z"),
    ]:  # fmt: skip
        q, bias, x = example(weights, rows, 96, tokens)
        packed = [PackedWeight.from_qtensor(q, bias), PackedWeight.from_qtensor(q)]
        outputs = [torch.empty(tokens, rows) for _ in packed]
        asked.append(product_struct(x, packed, input, outputs))
        wanted += kernels.linear(x, packed, input)
        found += outputs
    structs = (library.Product * len(asked))(*asked)
    try:
        for threads in (1, 2, 3):
            kernels.set_threads(threads)
            for y in found:
                y.fill_(torch.nan)
            assert library.native().pt_linear(structs, len(structs)) == 0
            assert all(map(torch.equal, found, wanted))
    finally:
        kernels.set_threads(0)


def test_empty_batches_and_strangers():
    q, bias, x = example("w4g64", 20, 128, 3)
    assert product(x[:0], q, bias, A8).shape == (0, 20)
    with pytest.raises(UserError, match="128"):
        product(x[:, :64], q, bias, A8)
    with pytest.raises(UserError, match="16"):
        PackedWeight.from_qtensor(quantize(torch.randn(8, 96), "int4 | fp16/g24"))
    with pytest.raises(UserError, match="no kernels for 'avx1024'"):
        kernels.use("avx1024")


def test_packed_bytes_are_the_bits_of_the_format():
    for weights, bits in [("w4g64", 4.25), ("w6g128", 6.125), ("mxfp4", 4.25), ("nvfp4", 4.5)]:
        packed = PackedWeight.from_qtensor(quantize(torch.randn(512, 1024), weights))
        assert packed.nbytes <= 512 * 1024 * bits / 8 + 256


@pytest.mark.parametrize("weights", [*(f"w{bits}g32" for bits in range(2, 9)), "w8g32z", "nf4"])
def test_codes_come_back(weights):
    for rows, cols in [(1, 64), (37, 128), (16, 192)]:
        q = quantize(torch.randn(rows, cols, generator=torch.Generator().manual_seed(1)), weights)
        packed = PackedWeight.from_qtensor(q)
        signed = q.codes.dtype == torch.int8
        codes = packed.codes() - packed.struct.zero if signed else packed.codes()
        assert torch.equal(codes.view(q.codes.dtype), q.codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_in_place_give_the_bits_of_packed_ones(isa, dtype):
    for rows, cols in [*SHAPES, (40, 1152), (31, 31)]:
        generator = torch.Generator().manual_seed(rows + cols)
        weight = torch.randn(rows, cols, generator=generator).to(dtype)
        bias = torch.randn(rows, generator=generator)
        packed = PackedWeight.from_tensor(weight, bias)
        in_place = PackedWeight.in_place(weight, bias)
        assert in_place.tensors["codes"].data_ptr() == weight.data_ptr()
        for tokens in (1, 3, 40) if isa != "portable" else (1, 9):
            x = torch.randn(tokens, cols, generator=generator)
            for activations in (None, A8):
                how = InputFormat.of(activations and Spec.parse(activations))
                a, b = kernels.linear(x, [packed], how), kernels.linear(x, [in_place], how)
                assert torch.equal(a[0], b[0]), (rows, cols, tokens)


def test_a_weight_that_cannot_be_used_in_place_is_refused():
    for weight in (torch.ones(4, 4).T[:, :3], torch.ones(4, 4, dtype=torch.float64)):
        with pytest.raises(UserError, match="in place"):
            PackedWeight.in_place(weight)


@pytest.mark.parametrize("weights", ["w8", "w7g32", "w6g64", "w5", "w4g16z", "w3g64", "w2", "nf4"])
def test_rows_of_codes_are_those_of_all(weights):
    q, _, _ = example(weights, 53, 96, 1)
    packed = PackedWeight.from_qtensor(q)
    index = torch.tensor([52, 0, 17, 17, 31])
    assert torch.equal(packed.code_rows(index), packed.codes()[index])
    with pytest.raises(UserError, match="refused rows"):
        packed.code_rows(torch.tensor([53]))


def test_log_partition_is_logsumexp(isa):
    generator = torch.Generator().manual_seed(0)
    for rows, cols in [(1, 1), (3, 17), (5, 4097)]:
        logits = torch.randn(rows, cols, generator=generator) * 30
        logits[:, ::7] = -torch.inf
        logits[:, 0] = 3.0
        found, wanted = kernels.log_partition(logits), logits.double().logsumexp(-1)
        assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max().clamp(min=1)
    # Every run has a larger maximum than those before, or smaller, or there is nothing in the first.
    slope = torch.linspace(0, 2, 5000).repeat(3, 1)
    slope[1], slope[2, :2000] = slope[1].flip(0), -torch.inf
    found, wanted = kernels.log_partition(slope), slope.double().logsumexp(-1)
    assert (found - wanted).abs().max() < 1e-5
    for cols, at in [(40, 3), (40, 39), (3000, 2500)]:
        broken = torch.zeros(3, cols)
        broken[0, at], broken[1, at], broken[2] = torch.nan, torch.inf, -torch.inf
        found = kernels.log_partition(broken)
        assert found[0].isnan() and found[1] == torch.inf and found[2] == -torch.inf
