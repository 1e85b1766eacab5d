"""Number formats: the sets of values a code can stand for, in one table.

A `Grid` snaps float32 numbers to its values, encodes them as bit patterns and decodes those; it
knows nothing of tensors' shapes, blocks or scales. Adding a format is one row in `GRIDS`.

What happens at the edges, for every grid:
- beyond the largest value: saturates (infinities too; grids never produce an infinity);
- NaN: encodes as NaN where the format has a NaN, as zero where it has none (integers, E2M1, E2M3,
  E3M2, E2M5, tables);
- subnormals are kept; the sign of zero is kept by the floating-point formats and by bnbfp4.
Rounding ties: `rne` goes to the even code in the integer and floating-point formats, and towards
zero in tables, which have no even codes.
"""

import itertools
import math
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache, cached_property

import torch
from torch import Tensor

from posttrain.numbers.rounding import round_, uniform_like

_EXPONENT_MASK = 0x7F800000  # the exponent field of a float32
_MANTISSA_BITS = 23


@dataclass(frozen=True)
class Grid:
    """One number format.

    name: as written in a Spec. bits: stored per element. max: largest finite magnitude.
    top: what the absmax of a block is mapped to (scale = absmax / top).
    code_dtype: dtype of encoded tensors.
    """

    name: str
    bits: int
    max: float
    top: float
    code_dtype: torch.dtype
    kind: str  # "int", "float", "wide", "table" or "pow2"
    zero_point: bool = field(default=False, kw_only=True)
    signed: bool = field(default=True, kw_only=True)

    def snap_(
        self, y: Tensor, rounding: str = "rne", generator: torch.Generator | None = None
    ) -> Tensor:
        """`snap` that may overwrite the float32 tensor `y`; use the returned tensor."""
        raise NotImplementedError

    def codes(self, snapped: Tensor) -> Tensor:
        """Codes of float32 values that are already on the grid."""
        raise NotImplementedError

    def decode(self, codes: Tensor) -> Tensor:
        """Float32 values of codes of any shape."""
        raise NotImplementedError

    @property
    def smallest(self) -> float:
        """Smallest positive value: what a positive scale that would round to zero becomes."""
        raise NotImplementedError

    def snap(
        self, y: Tensor, rounding: str = "rne", generator: torch.Generator | None = None
    ) -> Tensor:
        """Nearest (or stochastically chosen) grid values of `y`, as a new float32 tensor."""
        return self.snap_(y.to(torch.float32, copy=True), rounding, generator)

    def encode(
        self, y: Tensor, rounding: str = "rne", generator: torch.Generator | None = None
    ) -> Tensor:
        """Codes (dtype `code_dtype`, shape of `y`) of the grid values nearest to `y`."""
        return self.encode_(y.to(torch.float32, copy=True), rounding, generator)

    def encode_(
        self, y: Tensor, rounding: str = "rne", generator: torch.Generator | None = None
    ) -> Tensor:
        """`encode` that may overwrite the float32 tensor `y`."""
        return self.codes(self.snap_(y, rounding, generator))


@dataclass(frozen=True)
class IntGrid(Grid):
    """Integers lo..hi; a code is the value itself (uint8 with a zero point, int16 of more than 8 bits,
    else int8)."""

    lo: int = field(kw_only=True)
    hi: int = field(kw_only=True)

    def snap_(
        self, y: Tensor, rounding: str = "rne", generator: torch.Generator | None = None
    ) -> Tensor:
        # nan_to_num also turns infinities into huge finite numbers, which then clamp.
        y = round_(y.nan_to_num_(), rounding, generator).clamp_(self.lo, self.hi)
        return y.add_(0.0)  # -0.0 becomes 0.0: an integer has no signed zero

    def codes(self, snapped: Tensor) -> Tensor:
        return snapped.to(self.code_dtype)

    def decode(self, codes: Tensor) -> Tensor:
        return codes.to(torch.float32)

    @property
    def smallest(self) -> float:
        return 1.0


@dataclass(frozen=True)
class FloatGrid(Grid):
    """Small floating point: sign, exponent field, mantissa; uint8 bit patterns.

    specials: "none" = every code is a number; "fn" = only S.11..1.11..1 is NaN (OCP E4M3);
    "ieee" = the top exponent holds infinities and NaN.
    """

    mantissa: int = field(kw_only=True)
    bias: int = field(kw_only=True)
    specials: str = field(kw_only=True)

    def snap_(
        self, y: Tensor, rounding: str = "rne", generator: torch.Generator | None = None
    ) -> Tensor:
        if self.specials == "none":
            y.nan_to_num_()
        return snap_float_(y, self.mantissa, 1 - self.bias, self.max, rounding, generator)

    def codes(self, snapped: Tensor) -> Tensor:
        m, sign = self.mantissa, 1 << (self.bits - 1)
        snapped = snapped.contiguous()
        bits = snapped.view(torch.int32)
        normal = bits.bitwise_and(0x7FFFFFFF).bitwise_right_shift_(_MANTISSA_BITS - m)
        normal -= (127 - self.bias) << m
        steps = snapped.abs().mul_(2.0 ** (self.bias - 1 + m))
        # Subnormals count smallest steps; the normal formula takes over at 2^m of them.
        code = torch.where(steps < 2**m, steps, normal).to(torch.uint8)
        if self.specials != "none":
            code.masked_fill_(snapped.isnan(), sign - 1)  # all exponent and mantissa bits set
        return code.bitwise_or_((bits < 0).to(torch.uint8).mul_(sign))

    def decode(self, codes: Tensor) -> Tensor:
        return look_up(_table(self), codes)

    @property
    def values(self) -> tuple[float, ...]:
        """Value of every code, by the definition of the format."""
        return _float_values(self.bits, self.mantissa, self.bias, self.specials)

    @property
    def smallest(self) -> float:
        return math.ldexp(1.0, 1 - self.bias - self.mantissa)


@dataclass(frozen=True)
class WideGrid(Grid):
    """float32, float16, bfloat16: scales, or elements that are kept; codes have that dtype."""

    mantissa: int = field(kw_only=True)
    min_exponent: int = field(kw_only=True)

    def snap_(
        self, y: Tensor, rounding: str = "rne", generator: torch.Generator | None = None
    ) -> Tensor:
        if self.mantissa == _MANTISSA_BITS:
            return y.clamp_(-self.max, self.max)
        if rounding == "rne":
            return y.clamp_(-self.max, self.max).to(self.code_dtype).to(torch.float32)
        # bfloat16 subnormals need steps below float32's normal range, which the exponent
        # arithmetic cannot form: below 2^-119 these two roundings use the step 2^-126.
        low = max(self.min_exponent, -126 + self.mantissa)
        return snap_float_(y, self.mantissa, low, self.max, rounding, generator)

    def codes(self, snapped: Tensor) -> Tensor:
        return snapped.to(self.code_dtype)

    def decode(self, codes: Tensor) -> Tensor:
        return codes.to(torch.float32, copy=True)

    @property
    def smallest(self) -> float:
        return math.ldexp(1.0, self.min_exponent - self.mantissa)


@dataclass(frozen=True)
class TableGrid(Grid):
    """A codebook: code i stands for `build()[i]`."""

    build: Callable[[], tuple[float, ...]] = field(kw_only=True)

    @cached_property
    def values(self) -> tuple[float, ...]:
        """Value of every code."""
        return self.build()

    @cached_property
    def _order(self) -> list[int]:
        # Codes by value; -0.0 sorts before 0.0 so that negatives that vanish keep their sign.
        return sorted(
            range(len(self.values)),
            key=lambda i: (self.values[i], math.copysign(1.0, self.values[i])),
        )

    def _ranks(self, y: Tensor, rounding: str, generator: torch.Generator | None) -> Tensor:
        if rounding == "sr":
            return self._stochastic_ranks(y, generator)
        ranks = _count_below(y, _edges(self, rounding == "away").to(y.device))
        if self._negative_zero:
            # bucketize cannot tell -0.0 from 0.0: step back onto the level of -0.0.
            ranks -= ((y == 0) & y.signbit()).to(torch.int32)
        return ranks

    def _stochastic_ranks(self, y: Tensor, generator: torch.Generator | None) -> Tensor:
        levels = _levels(self).to(y.device)
        y = y.clamp(float(levels[0]), float(levels[-1]))
        upper = torch.bucketize(y.contiguous(), levels, out_int32=True).clamp_(1, len(levels) - 1)
        low, high = levels[upper - 1], levels[upper]
        # -0.0 and 0.0 are neighbours with no distance between them.
        share = ((y - low) / (high - low)).nan_to_num_(nan=1.0)
        return upper - (uniform_like(y, generator) >= share).to(torch.int32)

    def snap_(
        self, y: Tensor, rounding: str = "rne", generator: torch.Generator | None = None
    ) -> Tensor:
        ranks = self._ranks(y.nan_to_num_(), rounding, generator)
        return look_up(_levels(self), ranks)

    def encode_(
        self, y: Tensor, rounding: str = "rne", generator: torch.Generator | None = None
    ) -> Tensor:
        return look_up(_codes_by_rank(self), self._ranks(y.nan_to_num_(), rounding, generator))

    def codes(self, snapped: Tensor) -> Tensor:
        return look_up(_codes_by_rank(self), self._ranks(snapped, "rne", None))

    @cached_property
    def _negative_zero(self) -> bool:
        return any(v == 0 and math.copysign(1.0, v) < 0 for v in self.values)

    def decode(self, codes: Tensor) -> Tensor:
        return look_up(_table(self), codes)

    @property
    def smallest(self) -> float:
        return min(v for v in self.values if v > 0)


@dataclass(frozen=True)
class Pow2Grid(Grid):
    """Powers of two 2^e, e in lo..hi; no zero, no sign. code = e + bias; `nan_code` is NaN.

    Values at or below zero and values too small encode as 2^lo.
    """

    lo: int = field(kw_only=True)
    hi: int = field(kw_only=True)
    bias: int = field(kw_only=True)
    nan_code: int = field(kw_only=True)

    def snap_(
        self, y: Tensor, rounding: str = "rne", generator: torch.Generator | None = None
    ) -> Tensor:
        y = y.clamp_(self.smallest, self.max)
        fraction, exponent = torch.frexp(y)  # y = fraction * 2^exponent, fraction in [0.5, 1)
        # Between 2^(e-1) and 2^e the share of the way, in [0, 1), rounds to either end. The
        # midpoint 1.5 * 2^(e-1) goes up in both nearest modes (a mantissa of no bits is even).
        share = fraction.mul_(2.0).sub_(1.0)
        up = uniform_like(y, generator) < share if rounding == "sr" else share >= 0.5
        exponent = (exponent - 1 + up.to(torch.int32)).clamp_(self.lo, self.hi)
        return torch.where(y.isnan(), y, torch.ldexp(torch.ones_like(y), exponent))

    def codes(self, snapped: Tensor) -> Tensor:
        exponent = torch.frexp(snapped).exponent - 1
        return self.codes_of_exponents(exponent, snapped.isnan())

    def codes_of_exponents(self, exponent: Tensor, nan: Tensor) -> Tensor:
        """Codes of 2^exponent (clamped to the range), NaN where `nan`."""
        code = exponent.clamp(self.lo, self.hi) + self.bias
        return torch.where(nan, self.nan_code, code).to(self.code_dtype)

    def decode(self, codes: Tensor) -> Tensor:
        exponent = codes.to(torch.int32) - self.bias
        value = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)
        return value.masked_fill_(codes == self.nan_code, math.nan)

    @property
    def smallest(self) -> float:
        return math.ldexp(1.0, self.lo)


def snap_float_(
    y: Tensor,
    mantissa: int,
    min_exponent: int,
    largest: float,
    rounding: str,
    generator: torch.Generator | None,
) -> Tensor:
    """Round float32 `y` in place to floating point of `mantissa` bits, saturating.

    The step of a number in [2^e, 2^(e+1)) is 2^(max(e, min_exponent) - mantissa): subnormals and
    the carry into the next binade need no special case. NaN stays NaN.
    """
    y.clamp_(-largest, largest)
    step_bits = y.view(torch.int32).bitwise_and(_EXPONENT_MASK)
    step_bits.clamp_(min=(min_exponent + 127) << _MANTISSA_BITS)
    step = step_bits.sub_(mantissa << _MANTISSA_BITS).view(torch.float32)
    return round_(y.div_(step), rounding, generator).mul_(step)


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """`table[index]` for an index of any shape and integer dtype, on the index's device."""
    flat = table.to(index.device).index_select(0, index.reshape(-1).to(torch.int32))
    return flat.reshape(index.shape)


@cache
def levels(grid: Grid) -> Tensor | None:
    """The finite values of a grid, ascending, float32; None where they are too many to list."""
    if grid.bits > 8:
        return None
    if isinstance(grid, IntGrid):
        return torch.arange(grid.lo, grid.hi + 1, dtype=torch.float32)
    if isinstance(grid, FloatGrid | TableGrid):
        finite = {value + 0.0 for value in grid.values if math.isfinite(value)}  # one zero
        return torch.tensor(sorted(finite), dtype=torch.float32)
    return None


@cache
def edges(grid: Grid) -> Tensor:
    """For neighbouring `levels` i, i+1: the largest float32 that still snaps to level i."""
    values = levels(grid)
    if values is None:
        raise ValueError(f"{grid.name} has too many levels to list")
    low, high = values[:-1], values[1:]
    middle = ((low.double() + high.double()) / 2).float()
    return torch.where(grid.snap(middle) == high, middle.nextafter(low), middle)


def _float_values(bits: int, mantissa: int, bias: int, specials: str) -> tuple[float, ...]:
    sign_bit = 1 << (bits - 1)
    top_exponent = (sign_bit >> mantissa) - 1

    def magnitude(code: int) -> float:
        exponent, fraction = code >> mantissa, code & ((1 << mantissa) - 1)
        if specials == "ieee" and exponent == top_exponent:
            return math.nan if fraction else math.inf
        if specials == "fn" and code == sign_bit - 1:
            return math.nan
        if exponent == 0:
            return math.ldexp(fraction, 1 - bias - mantissa)
        return math.ldexp(fraction + (1 << mantissa), exponent - bias - mantissa)

    positive = [magnitude(code) for code in range(sign_bit)]
    return (*positive, *(-v for v in positive))


@cache
def _table(grid: FloatGrid | TableGrid) -> Tensor:
    return torch.tensor(grid.values, dtype=torch.float32)


@cache
def _levels(grid: TableGrid) -> Tensor:
    return torch.tensor([grid.values[i] for i in grid._order], dtype=torch.float32)


@cache
def _codes_by_rank(grid: TableGrid) -> Tensor:
    return torch.tensor(grid._order, dtype=torch.uint8)


@cache
def _edges(grid: TableGrid, ties_away: bool) -> Tensor:
    """For neighbouring levels i, i+1: the largest float32 that still snaps to level i."""
    levels = _levels(grid).double().tolist()
    return torch.tensor([_edge((a + b) / 2, ties_away) for a, b in itertools.pairwise(levels)])


def _count_below(y: Tensor, edges: Tensor) -> Tensor:
    """Number of edges below each element, int32: its rank among the levels."""
    if len(edges) > 16:
        return torch.bucketize(y.contiguous(), edges, out_int32=True)
    # A few vectorised comparisons are four times faster than a binary search per element.
    ranks = torch.zeros_like(y, dtype=torch.uint8)
    for edge in edges:
        ranks += y > edge
    return ranks.to(torch.int32)


def _edge(middle: float, ties_away: bool) -> float:
    # A tie stays low on the positive side (towards zero) and goes up on the negative one;
    # `ties_away` is the reverse. Middle 0 lies between -0.0 and 0.0, where 0 itself goes up.
    tie_goes_up = middle <= 0 if middle == 0 or not ties_away else middle > 0
    as_float32 = torch.tensor(middle, dtype=torch.float32)
    too_high = as_float32.item() >= middle if tie_goes_up else as_float32.item() > middle
    if too_high:
        as_float32 = torch.nextafter(as_float32, torch.tensor(-math.inf))
    return as_float32.item()


# --------------------------------------------------------------------------- the table


def _ints(bits: int) -> Iterable[Grid]:
    q, codes = 2 ** (bits - 1) - 1, 2**bits

    def row(suffix: str, lo: int, hi: int, top: float) -> Grid:
        z = suffix == "z"
        dtype = torch.uint8 if z else torch.int8
        largest = float(max(-lo, hi))
        return IntGrid(
            f"int{bits}{suffix}", bits, largest, top, dtype, "int", lo=lo, hi=hi, zero_point=z
        )

    yield row("", -q, q, q)
    yield row("t", -q - 1, q, q)
    yield row("h", -q - 1, q, (codes - 1) / 2)
    yield row("z", 0, codes - 1, codes - 1)


def _float(exponent: int, mantissa: int, specials: str, name: str = "") -> Grid:
    bits, bias = 1 + exponent + mantissa, 2 ** (exponent - 1) - 1
    largest = max(v for v in _float_values(bits, mantissa, bias, specials) if v < math.inf)
    return FloatGrid(
        name or f"e{exponent}m{mantissa}",
        bits,
        largest,
        largest,
        torch.uint8,
        "float",
        mantissa=mantissa,
        bias=bias,
        specials=specials,
    )


def _wide(name: str, dtype: torch.dtype, mantissa: int, min_exponent: int) -> Grid:
    info = torch.finfo(dtype)
    return WideGrid(
        name, info.bits, info.max, 1.0, dtype, "wide", mantissa=mantissa, min_exponent=min_exponent
    )


def _codebook(name: str, bits: int, build: Callable[[], tuple[float, ...]]) -> Grid:
    return TableGrid(name, bits, 1.0, 1.0, torch.uint8, "table", build=build)


# NormalFloat4 (QLoRA): quantiles of a normal distribution scaled to [-1, 1], as published.
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# bitsandbytes' FP4 in twelfths, by the three magnitude bits of the code; not OCP E2M1 / 6.
_BNB_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)


def _bnb_fp4() -> tuple[float, ...]:
    positive = [struct.unpack("f", struct.pack("f", v / 12))[0] for v in _BNB_FP4_TWELFTHS]
    return (*positive, *(-v for v in positive))


def _dynamic8() -> tuple[float, ...]:
    """The signed 8-bit dynamic code of bitsandbytes, ascending (Dettmers, arXiv:1511.04561).

    Decade i = 0..6 holds the 2^i midpoints of equal parts of [0.1, 1], times 10^(i-6), with both
    signs; 0 and 1 complete the 256 codes. Computed in float32, as the published table is.
    """
    values = [0.0, 1.0]
    for i in range(7):
        bounds = torch.linspace(0.1, 1.0, 2**i + 1, dtype=torch.float32)
        middles = ((bounds[:-1] + bounds[1:]) / 2 * 10.0 ** (i - 6)).tolist()
        values += middles + [-v for v in middles]
    return tuple(sorted(values))


_ROWS: tuple[Grid, ...] = (
    *(grid for bits in range(2, 9) for grid in _ints(bits)),
    IntGrid("int16", 16, 32767.0, 32767.0, torch.int16, "int", lo=-32767, hi=32767),
    _float(4, 3, "fn"),  # OCP 8-bit, max 448
    _float(4, 3, "ieee", name="e4m3i"),  # IEEE-style, max 240
    _float(5, 2, "ieee"),  # OCP 8-bit, max 57344
    _float(3, 4, "ieee"),  # max 15.5
    _float(2, 5, "none"),  # max 7.875: reserving a top exponent would cost a third of its range
    _float(3, 2, "none"),  # OCP 6-bit, max 28
    _float(2, 3, "none"),  # OCP 6-bit, max 7.5
    _float(2, 1, "none"),  # OCP 4-bit, max 6
    _codebook("nf4", 4, lambda: _NF4),
    _codebook("bnbfp4", 4, _bnb_fp4),
    _codebook("dyn8", 8, _dynamic8),
    _wide("fp32", torch.float32, 23, -126),
    _wide("fp16", torch.float16, 10, -14),
    _wide("bf16", torch.bfloat16, 7, -126),
    Pow2Grid(
        "e8m0", 8, 2.0**127, 1.0, torch.uint8, "pow2",
        signed=False, lo=-127, hi=127, bias=127, nan_code=255,
    ),
    Pow2Grid(
        "pow2", 8, 2.0**127, 1.0, torch.int8, "pow2",
        signed=False, lo=-127, hi=127, bias=0, nan_code=-128,
    ),
)  # fmt: skip
GRIDS: dict[str, Grid] = {grid.name: grid for grid in _ROWS}
