"""Layouts: how codes of 1 to 8 bits lie in bytes. Names carry a version and never change meaning.

All layouts pack along the last axis and every row starts on a byte, so leading axes can be sliced
before unpacking. Signed codes are stored as two's complement in `bits` bits.

    bytes.v1       one code per byte, upper bits zero
    nibbles.v1     4 bits: two codes per byte, the even element in the low nibble
    planes4+2.v1   6 bits: a plane of the low four bits (as nibbles.v1), then a plane of the upper
                   two bits (four per byte, the first in the lowest bits)
    bitstream.v1   1-8 bits, dense and little-endian: element i takes bits [i*b, (i+1)*b) of the
                   row, bit 0 being the lowest of the first byte
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.errors import UserError


@dataclass(frozen=True)
class Layout:
    """A way to pack: allowed bit widths, bytes per row, and the two directions on uint8."""

    name: str
    widths: tuple[int, ...]
    row_bytes: Callable[[int, int], int]  # (count, bits) -> bytes
    pack: Callable[[Tensor, int], Tensor]
    unpack: Callable[[Tensor, int, int], Tensor]  # (packed, bits, count)


def _stream_bytes(count: int, bits: int) -> int:
    return -(-count * bits // 8)


def _groups(row: Tensor, size: int) -> Tensor:
    padded = F.pad(row, (0, -row.shape[-1] % size))
    return padded.reshape(*row.shape[:-1], padded.shape[-1] // size, size)


def _pack_stream(codes: Tensor, bits: int) -> Tensor:
    # A period of `per` codes fills `span` whole bytes; all periods are handled side by side.
    count = codes.shape[-1]
    per, span = 8 // gcd(bits, 8), bits // gcd(bits, 8)
    groups = _groups(codes, per)
    packed = groups.new_zeros((*groups.shape[:-1], span))
    for i in range(per):
        byte, shift = divmod(i * bits, 8)
        packed[..., byte] |= groups[..., i] << shift
        if shift + bits > 8:
            packed[..., byte + 1] |= groups[..., i] >> (8 - shift)
    return packed.flatten(-2)[..., : _stream_bytes(count, bits)].contiguous()


def _unpack_stream(packed: Tensor, bits: int, count: int) -> Tensor:
    if bits == 8:
        return packed.clone(memory_format=torch.contiguous_format)
    if bits == 4:
        return _unpack_nibbles(packed, count)
    per, span = 8 // gcd(bits, 8), bits // gcd(bits, 8)
    groups = _groups(packed, span)
    codes = groups.new_empty((*groups.shape[:-1], per))
    for i in range(per):
        byte, shift = divmod(i * bits, 8)
        code = groups[..., byte] >> shift
        if shift + bits > 8:
            code |= groups[..., byte + 1] << (8 - shift)
        codes[..., i] = code
    codes &= (1 << bits) - 1
    return codes.flatten(-2)[..., :count].contiguous()


def _unpack_nibbles(packed: Tensor, count: int) -> Tensor:
    """Both nibbles of a byte at once, in 16 bits: whole vectors, where single bytes are slow."""
    pairs = packed.to(torch.int16, memory_format=torch.contiguous_format)
    pairs |= pairs << 4
    pairs &= 0x0F0F
    return pairs.view(torch.uint8)[..., :count].contiguous()


def _pack_planes(codes: Tensor, bits: int) -> Tensor:
    return torch.cat((_pack_stream(codes & 15, 4), _pack_stream(codes >> 4, 2)), -1)


def _unpack_planes(packed: Tensor, bits: int, count: int) -> Tensor:
    low_bytes = _stream_bytes(count, 4)
    low = _unpack_stream(packed[..., :low_bytes], 4, count)
    return low | _unpack_stream(packed[..., low_bytes:], 2, count) << 4


LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout(
            "bytes.v1",
            tuple(range(1, 9)),
            lambda count, bits: count,
            lambda codes, bits: codes.clone(),
            lambda packed, bits, count: packed.clone(),
        ),
        Layout("nibbles.v1", (4,), _stream_bytes, _pack_stream, _unpack_stream),
        Layout(
            "planes4+2.v1",
            (6,),
            lambda count, bits: _stream_bytes(count, 4) + _stream_bytes(count, 2),
            _pack_planes,
            _unpack_planes,
        ),
        Layout("bitstream.v1", tuple(range(1, 9)), _stream_bytes, _pack_stream, _unpack_stream),
    )
}


def pack(codes: Tensor, bits: int, layout: str = "bitstream.v1") -> Tensor:
    """Pack int8 or uint8 codes [..., K] of `bits` bits into uint8 [..., packed bytes]."""
    chosen = _layout(layout, bits)
    if codes.dtype not in (torch.int8, torch.uint8):
        raise UserError(f"only int8 and uint8 codes can be packed, not {codes.dtype}")
    return chosen.pack(codes.contiguous().view(torch.uint8) & ((1 << bits) - 1), bits)


def unpack(
    packed: Tensor, bits: int, count: int, layout: str = "bitstream.v1", signed: bool = False
) -> Tensor:
    """The codes [..., count] packed in uint8 [..., bytes]; int8 if `signed`, else uint8."""
    chosen = _layout(layout, bits)
    expected = chosen.row_bytes(count, bits)
    if packed.dtype != torch.uint8 or packed.shape[-1] != expected:
        raise UserError(
            f"{layout}: {count} codes of {bits} bits take rows of {expected} uint8 bytes, found "
            f"{packed.shape[-1]} of {packed.dtype}"
        )
    codes = chosen.unpack(packed, bits, count)
    if signed and bits < 8:
        # Flipping the sign bit and subtracting it extends the sign; uint8 wraps around.
        codes ^= 1 << (bits - 1)
        codes -= 1 << (bits - 1)
    return codes.view(torch.int8) if signed else codes


def packed_bytes(count: int, bits: int, layout: str = "bitstream.v1") -> int:
    """Bytes of one packed row of `count` codes."""
    return _layout(layout, bits).row_bytes(count, bits)


def _layout(name: str, bits: int) -> Layout:
    if name not in LAYOUTS:
        raise UserError(f"unknown layout {name!r}; choose one of {', '.join(LAYOUTS)}")
    if bits not in LAYOUTS[name].widths:
        raise UserError(f"layout {name} holds codes of {LAYOUTS[name].widths} bits, not {bits}")
    return LAYOUTS[name]
