"""Layouts: round trips over all codes and odd lengths, and the exact bits of each."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.errors import UserError
from posttrain.numbers import LAYOUTS, pack, packed_bytes, unpack

PAIRS = [(name, bits) for name, layout in LAYOUTS.items() for bits in layout.widths]
LENGTHS = (0, 1, 2, 3, 5, 7, 8, 9, 15, 17, 63, 64, 65)


def codes_of(bits: int, shape: tuple[int, ...], signed: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, shape, generator=generator)
    if signed:
        return (codes - 2 ** (bits - 1)).to(torch.int8)
    return codes.to(torch.uint8)


@pytest.mark.parametrize("layout,bits", PAIRS)
@pytest.mark.parametrize("signed", [False, True])
def test_round_trip(layout: str, bits: int, signed: bool) -> None:
    everything = torch.arange(2**bits) - (2 ** (bits - 1) if signed else 0)
    everything = everything.to(torch.int8 if signed else torch.uint8)
    cases = [everything, *(codes_of(bits, (3, n), signed) for n in LENGTHS)]
    cases += [codes_of(bits, (2, 3, 11), signed), codes_of(bits, (0, 9), signed)]
    for codes in cases:
        packed = pack(codes, bits, layout)
        count = codes.shape[-1]
        assert packed.dtype == torch.uint8
        assert packed.shape == (*codes.shape[:-1], packed_bytes(count, bits, layout))
        back = unpack(packed, bits, count, layout, signed)
        assert back.dtype == codes.dtype and torch.equal(back, codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_bitstream_is_dense_and_little_endian(bits: int) -> None:
    codes = codes_of(bits, (1, 37), signed=False)
    as_number = sum(int(code) << (i * bits) for i, code in enumerate(codes[0]))
    expected = as_number.to_bytes(-(-37 * bits // 8), "little")
    assert bytes(pack(codes, bits, "bitstream.v1")[0].tolist()) == expected


def test_nibbles_put_the_even_element_low() -> None:
    packed = pack(torch.tensor([1, 2, 3], dtype=torch.uint8), 4, "nibbles.v1")
    assert packed.tolist() == [0x21, 0x03]


def test_planes_split_six_bits_into_four_and_two() -> None:
    codes = torch.tensor([0b110001, 0b100010, 0b010011, 0b000100, 0b111111], dtype=torch.uint8)
    packed = pack(codes, 6, "planes4+2.v1")
    assert packed.tolist() == [0x21, 0x43, 0x0F, 0b00011011, 0b11]


@pytest.mark.parametrize("layout,bits", PAIRS)
def test_negative_codes_are_twos_complement(layout: str, bits: int) -> None:
    packed = pack(torch.tensor([-1], dtype=torch.int8), bits, layout)
    assert unpack(packed, bits, 1, layout).tolist() == [2**bits - 1]


def test_rows_can_be_sliced_before_unpacking() -> None:
    codes = codes_of(3, (5, 13), signed=True)
    packed = pack(codes, 3, "bitstream.v1")
    assert torch.equal(unpack(packed[2:4], 3, 13, "bitstream.v1", True), codes[2:4])


def test_packing_leaves_its_input_alone_and_copies() -> None:
    for layout, bits in PAIRS:
        codes = codes_of(bits, (2, 9), signed=False)
        before = codes.clone()
        packed = pack(codes, bits, layout)
        packed += 1
        assert torch.equal(codes, before)


@settings(max_examples=50)
@given(st.sampled_from(PAIRS), st.data())
def test_generated_codes_round_trip(pair: tuple[str, int], data: st.DataObject) -> None:
    layout, bits = pair
    row = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=50))
    codes = torch.tensor(row, dtype=torch.uint8)
    assert unpack(pack(codes, bits, layout), bits, len(row), layout).tolist() == row


def test_strided_codes_pack() -> None:
    codes = codes_of(4, (6, 8), signed=False)
    assert torch.equal(pack(codes.t(), 4), pack(codes.t().contiguous(), 4))


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: pack(torch.zeros(4, dtype=torch.uint8), 4, "nibbles"), "nibbles.v1"),
        (lambda: pack(torch.zeros(4, dtype=torch.uint8), 6, "nibbles.v1"), "not 6"),
        (lambda: pack(torch.zeros(4), 4, "nibbles.v1"), "int8 and uint8"),
        (lambda: unpack(torch.zeros(3, dtype=torch.uint8), 4, 4, "nibbles.v1"), "rows of 2"),
    ],
)
def test_errors_say_what_was_expected(call: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()  # type: ignore[operator]
