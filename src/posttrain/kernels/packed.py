"""Weights in the kernels' layout, and products with them.

`PackedWeight` holds what native/layout.h describes. What a format means to a kernel is derived from
its Spec, never from its name: a grid of evenly spaced integers is multiplied as it is; a 4-bit grid
whose values are multiples of a power of two (E2M1) becomes integers by a table of 16 bytes; any
other grid is a table of floats and multiplied in float32. Scales keep their stored type.
"""

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from posttrain.errors import UserError
from posttrain.kernels import library
from posttrain.kernels.library import SCALE_TYPES, STAGES, Input, Product, Weight
from posttrain.numbers import QTensor, Spec, fake_quantize

PANEL = 16  # rows that lie together (layout.h)
GROUP_STEP = 16  # scale groups are multiples of this many columns
LONGEST_GROUP = 32768  # integer sums of longer ones could overflow 32 bits (layout.h)
DIGITS = 24  # PT_DIGITS of posttrain.h
WHOLE_ROWS = 2**31 - 1  # columns of a group that is as long as any row
_FLOATS = {torch.float32: (32, 0), torch.bfloat16: (16, 2), torch.float16: (16, 1)}


def unsupported(spec: Spec, cols: int) -> str | None:
    """Why the kernels cannot take weights [.., cols] of this format, or None if they can."""
    if not 2 <= spec.bits <= 8:
        return f"{spec.grid.name} stores {spec.bits} bits; the kernels take 2 to 8"
    width = scale_width(spec, cols)
    if width < cols and width % GROUP_STEP:
        return f"scale groups of {width} columns are no multiple of {GROUP_STEP}"
    return None


def scale_width(spec: Spec, cols: int) -> int:
    """Columns of a row [cols] over which the scale of `spec` is constant; at most `cols`."""
    width = 0
    for factor in spec.factors:
        partition = factor.partition
        size = partition.cols
        if partition.flat and size and cols % size:
            size = math.gcd(size, cols)  # blocks run on from row to row
        width = math.gcd(width, size)
    return min(width or cols, cols, LONGEST_GROUP)


@dataclass(frozen=True)
class InputFormat:
    """How activations enter a product: as integers of at most 8 bits, as float32, or in digits.

    In digits means: as integers of 24 bits under a power of two for each token, which changes them by
    less than 2^-22 of the token's largest, and these as three of 8 bits, multiplied in integers with
    weights that are. It takes the place of float32 where that is slower.

    `struct` is what the kernels get. `spec` is set where `numbers` has to quantize the activations
    first, because the kernels do not know the format.
    """

    struct: Input
    spec: Spec | None = None

    @classmethod
    def of(cls, spec: Spec | None, rotate: bool = False) -> "InputFormat":
        """For activations of `spec`, rotated first if `rotate`. None: left alone, as float32 or in digits,
        whichever the instruction set in use multiplies faster."""
        if spec is None:
            fast = library.native().pt_digits_are_fast()
            return cls.digits(rotate) if fast else cls.floats(rotate)
        if not _quantized_natively(spec):
            return cls(cls.floats(rotate).struct, spec)
        (factor,) = spec.factors
        low, high = int(spec.grid.lo), int(spec.grid.hi)  # type: ignore[attr-defined]
        group = factor.partition.cols or WHOLE_ROWS
        scale = SCALE_TYPES[factor.grid_name]
        return cls(Input(spec.bits, group, low, high, scale, rotate, spec.grid.top))

    @classmethod
    def floats(cls, rotate: bool = False) -> "InputFormat":
        """As float32."""
        return cls(Input(0, WHOLE_ROWS, 0, 0, 0, rotate, 1.0))

    @classmethod
    def digits(cls, rotate: bool = False) -> "InputFormat":
        """In digits."""
        return cls(Input(DIGITS, WHOLE_ROWS, 0, 0, 0, rotate, 1.0))


def _quantized_natively(spec: Spec) -> bool:
    """Symmetric integers of a byte under one fp32 or fp16 scale per row or group, rounded to nearest
    even."""
    grid = spec.grid
    if grid.kind != "int" or grid.bits > 8 or grid.zero_point or spec.rounding != "rne":
        return False
    if len(spec.factors) != 1:
        return False
    factor = spec.factors[0]
    partition = factor.partition
    along_rows = partition.rows == 1 and not partition.flat and partition.cols % GROUP_STEP == 0
    plain = factor.nested is None and factor.power == 1.0 and factor.grid_name in ("fp32", "fp16")
    return along_rows and plain


@dataclass(eq=False)
class PackedWeight:
    """One weight [rows, cols], packed; keeps alive the memory that `struct` points to."""

    struct: Weight
    tensors: dict[str, Tensor] = field(default_factory=dict)
    scales_dtype: torch.dtype | None = None  # where `scales` are as they were stored

    @property
    def shape(self) -> tuple[int, int]:
        return self.struct.rows, self.struct.cols

    @property
    def nbytes(self) -> int:
        """Bytes held, padding included."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def in_integers(self) -> bool:
        """Whether the product with quantized activations is exact in integers."""
        return bool(self.struct.stage <= STAGES["lookup"])

    @classmethod
    def from_qtensor(cls, q: QTensor, bias: Tensor | None = None) -> "PackedWeight":
        """Pack codes and scales [rows, cols]. Raises UserError for formats that do not fit."""
        rows, cols = q.shape
        reason = unsupported(q.spec, cols)
        if reason is not None or q.offset is not None:
            raise UserError(f"{q.spec} has no kernel: {reason or 'it has an offset'}")
        made = cls(Weight(rows=rows, cols=cols, bits=q.spec.bits, multiplier=1.0))
        width = scale_width(q.spec, cols)
        made.struct.group = width
        made._set_codes(q)
        made._set_scales(q, width)
        made._set_bias(bias)
        return made

    @classmethod
    def from_tensor(cls, weight: Tensor, bias: Tensor | None = None) -> "PackedWeight":
        """Pack float32, bfloat16 or float16 [rows, cols] as it is."""
        rows, cols = weight.shape
        bits, half = _FLOATS[weight.dtype]
        struct = Weight(rows=rows, cols=cols, bits=bits, half=half, group=cols, multiplier=1.0)
        struct.stage = STAGES["float"]
        made = cls(struct)
        source = weight.detach().contiguous()
        packed = library.allocate(library.native().pt_code_bytes(rows, cols, bits))
        status = library.native().pt_pack_floats(
            source.data_ptr(), rows, cols, bits, packed.data_ptr()
        )
        library.check(status, f"a weight {[rows, cols]}")
        made._keep("codes", packed)
        made._set_bias(bias)
        return made

    @staticmethod
    def fits_in_place(weight: Tensor) -> bool:
        return weight.dtype in _FLOATS and weight.is_contiguous() and weight.is_cpu

    @classmethod
    def in_place(cls, weight: Tensor, bias: Tensor | None = None) -> "PackedWeight":
        """Multiply with float32, bfloat16 or float16 [rows, cols] where it lies; nothing is copied.
        Raises UserError for a weight that does not fit (see `fits_in_place`)."""
        if not cls.fits_in_place(weight):
            raise UserError(
                f"only contiguous float weights in main memory can be used in place, not "
                f"{weight.dtype} {list(weight.shape)} on {weight.device}"
            )
        rows, cols = weight.shape
        bits, half = _FLOATS[weight.dtype]
        struct = Weight(rows=rows, cols=cols, bits=bits, half=half, group=cols, multiplier=1.0)
        struct.stage = STAGES["rows"]
        made = cls(struct)
        made._keep("codes", weight.detach())
        made._set_bias(bias)
        return made

    def codes(self) -> Tensor:
        """The codes again as unsigned bytes [rows, cols]; signed ones with `struct.zero` added."""
        rows, cols = self.shape
        codes = torch.empty(rows, cols, dtype=torch.uint8)
        status = library.native().pt_unpack_codes(
            self.struct.codes, rows, cols, self.struct.bits, codes.data_ptr()
        )
        library.check(status, f"a weight {[rows, cols]}")
        return codes

    def code_rows(self, index: Tensor) -> Tensor:
        """Rows of `codes`: unsigned bytes [len(index), cols]."""
        rows, cols = self.shape
        wanted = index.to(torch.int64).contiguous()
        codes = torch.empty(len(wanted), cols, dtype=torch.uint8)
        status = library.native().pt_unpack_rows(
            self.struct.codes, rows, cols, self.struct.bits, wanted.data_ptr(), len(wanted),
            codes.data_ptr(),
        )  # fmt: skip
        library.check(status, f"rows of a weight {[rows, cols]}")
        return codes

    def scales(self, index: Tensor | None = None) -> Tensor | None:
        """Scales as they were stored, [rows, groups], or those of rows `index`; None where only
        products of several are here."""
        if self.scales_dtype is None:
            return None
        rows = self.shape[0]
        panels = self.tensors["scales"].view(self.scales_dtype).view(-(-rows // PANEL), -1, PANEL)
        if index is not None:
            return panels[index // PANEL, :, index % PANEL]
        return panels.transpose(1, 2).flatten(0, 1)[:rows].contiguous()

    def _keep(self, name: str, tensor: Tensor) -> None:
        self.tensors[name] = tensor
        setattr(self.struct, name, tensor.data_ptr())

    def _set_codes(self, q: QTensor) -> None:
        grid = q.spec.grid
        if grid.kind == "int":
            self.struct.stage = STAGES["integer"]
            self.struct.zero = 0 if grid.zero_point else 1 << (q.spec.bits - 1)
        else:
            self._set_table(grid.decode(torch.arange(1 << q.spec.bits, dtype=torch.uint8)))
        unsigned = q.codes.view(torch.uint8)
        if grid.code_dtype == torch.int8:
            unsigned = unsigned + self.struct.zero  # bytes wrap: -1 + 8 is 7
        unsigned = unsigned.contiguous()
        rows, cols = q.shape
        packed = library.allocate(library.native().pt_code_bytes(rows, cols, q.spec.bits))
        status = library.native().pt_pack_codes(
            unsigned.data_ptr(), rows, cols, q.spec.bits, packed.data_ptr()
        )
        library.check(status, f"a weight {[rows, cols]} of {q.spec}")
        self._keep("codes", packed)

    def _set_table(self, values: Tensor) -> None:
        """Values of all codes: 16 small integers times a power of two, or any floats."""
        step = _common_step(values) if len(values) == 16 else None
        self.struct.stage = STAGES["table" if step is None else "lookup"]
        if step is not None:
            values = values / step
            self.struct.zero = int(-values.min())
            self.struct.multiplier = step
            self._keep("lookup", (values + self.struct.zero).to(torch.uint8))
        self._keep("table", values.to(torch.float32).contiguous())

    def _set_scales(self, q: QTensor, width: int) -> None:
        rows, cols = q.shape
        groups = -(-cols // width)
        raw = _stored_scale(q, width)
        if raw is not None:
            kind, scales, multiplier = raw
            self.struct.multiplier *= multiplier
            if scales.shape == (rows, groups):
                self.scales_dtype = scales.dtype
        else:
            kind, scales = "fp32", q.scales.expand((rows, cols))[:, ::width]
        self.struct.scale_type = SCALE_TYPES[kind]
        self._keep("scales", _interleaved(scales.expand(rows, groups)))
        zero_point = q.scales.expand_zero_point((rows, cols))
        if zero_point is not None:
            self._keep("zeros", _interleaved(zero_point[:, ::width].to(torch.uint8)))

    def _set_bias(self, bias: Tensor | None) -> None:
        if bias is not None:
            self._keep("bias", bias.detach().to(torch.float32).contiguous().clone())


def _common_step(values: Tensor) -> float | None:
    """The power of two that all values are small multiples of, or None."""
    for exponent in range(7):
        step = 2.0**-exponent
        whole = values / step
        if bool((whole == whole.round()).all()):
            return step if float(whole.max() - whole.min()) <= 127 else None
    return None


def _stored_scale(q: QTensor, width: int) -> tuple[str, Tensor, float] | None:
    """(type, scales [rows or 1, groups], multiplier) where scales can stay as they are stored."""
    if not q.spec.factors:
        return None
    first, *rest = q.spec.factors
    stored = q.scales.stored[0]
    plain = first.nested is None and first.power == 1.0 and first.grid_name in SCALE_TYPES
    partition = first.partition
    if not plain or not isinstance(stored, Tensor) or partition.flat or partition.rows > 1:
        return None
    if (partition.cols or q.shape[1]) != width and partition.cols < q.shape[1]:
        return None
    multiplier = 1.0
    for i, factor in enumerate(rest, 1):
        value = q.scales.factors[i]
        if value.numel() != 1 or factor.power != 1.0:
            return None
        multiplier *= 1.0 / float(value) if q.spec.reciprocal(i) else float(value)
    if stored.shape[1] * width < q.shape[1]:
        return None
    return first.grid_name, stored, multiplier


def _interleaved(values: Tensor) -> Tensor:
    """[rows, groups] as [panels][groups][16], rows padded with zeros."""
    rows, groups = values.shape
    source = values.contiguous()
    size = source.element_size()
    count = library.native().pt_scale_count(rows, groups, 1)
    packed = library.allocate(count * size)
    status = library.native().pt_pack_scales(
        source.data_ptr(), rows, groups, size, packed.data_ptr()
    )
    library.check(status, f"scales {[rows, groups]}")
    return packed


def linear(x: Tensor, weights: Sequence[PackedWeight], input: InputFormat) -> list[Tensor]:
    """x [tokens, cols] float32 times each weight: float32 [tokens, rows] each.

    The activations are rotated and quantized once for all weights.
    """
    outputs = [torch.empty(x.shape[0], weight.struct.rows) for weight in weights]
    status = library.native().pt_linear(ctypes.byref(product(x, weights, input, outputs)), 1)
    if status:  # saying what was multiplied takes as long as a small product
        library.check(status, f"a product with {[list(w.shape) for w in weights]}")
    return outputs


def product(
    x: Tensor, weights: Sequence[PackedWeight], input: InputFormat, outputs: Sequence[Tensor]
) -> Product:
    """What `linear` asks of the native library, results going to `outputs` [tokens, rows] float32.

    Addresses, not ctypes' pointers: making one takes as long as a small product.
    """
    tokens, cols = x.shape
    for weight in weights:
        if weight.struct.cols != cols:
            raise UserError(f"x has {cols} columns; the weight {list(weight.shape)} needs others")
    struct, x = _prepared(x, input)
    count = len(weights)
    addresses, lengths = ctypes.c_void_p * count, ctypes.c_int64 * count
    structs = addresses(*[ctypes.addressof(weight.struct) for weight in weights])
    results = addresses(*[y.data_ptr() for y in outputs])
    rows = lengths(*[weight.struct.rows for weight in weights])
    made = Product(
        ctypes.addressof(structs), count, x.data_ptr(), cols, tokens, ctypes.addressof(struct),
        ctypes.addressof(results), ctypes.addressof(rows),
    )  # fmt: skip
    made.alive = x, weights, outputs, struct, structs, results, rows
    return made


@dataclass(frozen=True, eq=False)
class PackedLinear:
    """A weight [rows, cols] and how its activations enter: a linear layer on the kernels."""

    weight: PackedWeight
    input: InputFormat

    def __call__(self, x: Tensor) -> Tensor:
        """x [.., cols] to [.., rows], in x's dtype."""
        (y,) = linear(x.reshape(-1, self.weight.shape[1]), [self.weight], self.input)
        return y.to(x.dtype).reshape(*x.shape[:-1], self.weight.shape[0])


def _prepared(x: Tensor, input: InputFormat) -> tuple[Input, Tensor]:
    """What the kernels are told, and get: formats only `numbers` knows are applied here."""
    if x.dtype != torch.float32 or not x.is_contiguous():
        x = x.detach().to(torch.float32).contiguous()
    if input.spec is None:
        return input.struct, x
    if input.struct.rotate:
        x = rotate(x)
    return InputFormat.floats().struct, fake_quantize(x, input.spec)


def rotate(x: Tensor) -> Tensor:
    """x [tokens, cols] float32 times the block-Hadamard matrix of `models.rotation`, as a copy."""
    x = x.detach().to(torch.float32).clone(memory_format=torch.contiguous_format)
    library.check(library.native().pt_rotate(x.data_ptr(), *x.shape), f"a rotation of {x.shape}")
    return x


def quantize_input(x: Tensor, input: InputFormat) -> tuple[Tensor, Tensor]:
    """Codes int8 [tokens, cols] and scales float32 [tokens, groups], as `linear` makes them."""
    tokens, cols = x.shape
    x = x.detach().to(torch.float32).contiguous()
    group = min(int(input.struct.group), cols)
    codes = torch.empty(tokens, cols, dtype=torch.int8)
    scales = torch.empty(tokens, -(-cols // group))
    status = library.native().pt_quantize(
        x.data_ptr(), cols, tokens, cols, ctypes.byref(input.struct), codes.data_ptr(),
        scales.data_ptr(),
    )  # fmt: skip
    library.check(status, f"activations {[tokens, cols]}")
    return codes, scales
