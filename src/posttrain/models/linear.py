"""A quantized linear layer: packed codes, scales, an input format, additive branches.

    y = F.linear(Q_x(x), W) + bias + sum_b branch_b(x),      W = decode(codes) * scale

x is [..., in], W is [out, in]; a layer that rotates has H x for x here, and stores W H for W. Three
ways of computing the product live side by side:

- `forward` ("dequantize"): the product of the dequantized operands in the compute dtype. In float32
  it is bitwise what compressed-tensors computes for the same checkpoint.
- `integer_forward`: integer codes multiplied with exact int32 accumulation inside each block of
  constant scale, then one float32 scale per block. Integer kernels have to match it bit by bit; it
  differs from "dequantize" only by float32 rounding (bound: `integer_bound`).
- the native kernels (`resident = "native"`): the same integers by the processor's own instructions,
  from codes packed for them; formats that have no integers are multiplied in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posttrain import kernels
from posttrain.errors import UserError
from posttrain.models import storage
from posttrain.models.branches import Columns
from posttrain.models.plan import LayerPlan
from posttrain.models.rotation import rotate
from posttrain.numbers import QTensor, Spec, fake_quantize, quantize

NO_SPARING = "outliers are found and set apart in PyTorch"
RESIDENT = ("packed", "dequantized", "native")
# Largest code magnitude times K that int32 accumulation of two 8-bit operands can hold.
MAX_INT32_K = (2**31 - 1) // (255 * 255)
PARTS, PART_WEIGHTS = 4, 1 << 18  # rows of a weight expanded at a time: at most a quarter, 1 MiB
_CODES, _SCALES = "weight" + storage.CODES_SUFFIX, "weight_scale_0"


class QuantLinear(nn.Module):
    """Drop-in for nn.Linear whose weight is stored as packed codes and scales.

    Buffers: `weight_codes` (uint8, packed), `weight_scale_0`, ... and `weight_zero_point`, named by
    `storage.layout`; parameter `bias` (or None); `branches`, modules called with x whose results are
    added. `resident` is "packed" (dequantize in every forward: least memory), "dequantized" (keep
    the dequantized weight too: the same results bit for bit) or "native" (the native kernels
    compute: fastest; as "packed" where there is no kernel). Once a kernel has been asked for, the
    codes live in its layout and nowhere else, whatever `resident` says of `forward`.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        out_features: int,
        in_features: int,
        layer: LayerPlan,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str = "meta",
    ) -> None:
        super().__init__()
        if layer.weight is None:
            raise ValueError("QuantLinear needs a weight format; leave the layer an nn.Linear")
        self.out_features, self.in_features = out_features, in_features
        self.layer = layer
        self.dtype = dtype
        for name, (shape, stored) in storage.layout("weight", layer.weight, self.shape).items():
            self.register_buffer(name, torch.empty(shape, dtype=stored, device=device))
        if bias:
            values = torch.empty(out_features, dtype=dtype, device=device)
            self.bias = nn.Parameter(values, requires_grad=False)
        else:
            self.register_parameter("bias", None)
        self.branches = nn.ModuleList(
            branch.build(out_features, in_features) for branch in layer.branches
        )
        self._resident = "packed"
        self._dense: Tensor | None = None
        self._kernel: kernels.PackedLinear | None = None

    @classmethod
    def empty(
        cls,
        out_features: int,
        in_features: int,
        layer: LayerPlan,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str = "meta",
    ) -> QuantLinear:
        """A layer whose buffers wait to be filled by a loader."""
        return cls(out_features, in_features, layer, bias, dtype, device)

    @classmethod
    def from_qtensor(
        cls,
        qweight: QTensor,
        layer: LayerPlan,
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        branches: Iterable[nn.Module] | None = None,
    ) -> QuantLinear:
        """A layer that computes in `dtype` with this weight [out, in].

        branches: those of the plan with values in them; also others, which no checkpoint holds.
        """
        out_features, in_features = qweight.shape
        packed = storage.pack_qtensor("weight", qweight)
        made = cls.from_packed(out_features, in_features, layer, packed, bias, dtype)
        if branches is not None:
            made.branches = nn.ModuleList(branches)
        return made

    @classmethod
    def from_packed(
        cls,
        out_features: int,
        in_features: int,
        layer: LayerPlan,
        weight: Mapping[str, Tensor],
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> QuantLinear:
        """A layer from the tensors that `storage.layout` names."""
        made = cls(out_features, in_features, layer, bias is not None, dtype)
        storage.check_tensors("QuantLinear", "weight", weight, made.weight_spec, made.shape)
        for name, tensor in weight.items():
            storage.put(made, name, tensor)
        if bias is not None:
            made.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
        return made

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def weight_spec(self) -> Spec:
        assert self.layer.weight is not None
        return self.layer.weight

    def qweight(self) -> QTensor:
        """The weight as codes and scales, unpacked."""
        return storage.unpack_qtensor("weight", self.stored_buffers(), self.weight_spec, self.shape)

    def stored_buffers(self) -> dict[str, Tensor | None]:
        """The buffers, with those that a kernel holds back in their stored layout."""
        return self._buffers | self._from_kernel()

    def rows(self, index: Tensor) -> Tensor:
        """Rows [len(index), in] of `weight`, without expanding the others where that can be."""
        spec = self.weight_spec
        if self._dense is not None or not spec.by_rows:
            return self.weight[index]
        stored = {
            name: None if tensor is None or tensor.numel() == 0 else tensor[index]
            for name, tensor in self._buffers.items()
        } | self._from_kernel(index)
        shape = (len(index), self.in_features)
        return storage.unpack_qtensor("weight", stored, spec, shape).dequantize(self.dtype)

    @property
    def part_rows(self) -> int:
        """How many rows to expand at a time where the whole weight shall not be."""
        if not self.weight_spec.by_rows:
            return self.out_features
        return max(1, min(self.out_features // PARTS, PART_WEIGHTS // self.in_features))

    def _from_kernel(self, index: Tensor | None = None) -> dict[str, Tensor | None]:
        """What only a kernel holds, as it is stored: all rows, or rows `index`."""
        if self._kernel is None:
            return {}
        weight = self._kernel.weight
        codes = weight.codes() if index is None else weight.code_rows(index)
        if self.weight_spec.grid.code_dtype == torch.int8:
            codes = (codes - weight.struct.zero).view(torch.int8)
        found: dict[str, Tensor | None] = {_CODES: storage.pack_codes(codes, self.weight_spec)}
        scales = weight.scales(index)
        return found if scales is None else found | {_SCALES: scales}

    @property
    def weight(self) -> Tensor:
        """The dequantized weight [out, in] in the compute dtype, rotated where the input is."""
        if self._dense is not None:
            return self._dense
        dense = self.qweight().dequantize(self.dtype)
        if self._resident == "dequantized":
            self._dense = dense
        return dense

    @property
    def resident(self) -> str:
        return self._resident

    @resident.setter
    def resident(self, how: str) -> None:
        check_resident(how)
        if how == "native" and self.no_kernel is None:
            self.kernel()
        self._resident = how
        self._dense = None

    def kernel(self) -> kernels.PackedLinear:
        """The weight and input format as the native kernels take them; moves codes and scales there.

        Raises UserError where `no_kernel` says why there is none.
        """
        if self._kernel is None:
            if self.no_kernel is not None:
                raise UserError(f"{self.weight_spec} has no kernel here: {self.no_kernel}")
            self._kernel = pack_linear(self.qweight(), self.layer, self.bias)
            self._buffers[_CODES] = torch.empty(0, dtype=torch.uint8)
            if (scales := self._kernel.weight.scales_dtype) is not None:
                self._buffers[_SCALES] = torch.empty(0, dtype=scales)
        return self._kernel

    def _leave_kernel(self) -> None:
        self._buffers.update(self._from_kernel())
        self._kernel = None

    @property
    def no_kernel(self) -> str | None:
        """Why this layer cannot run on the native kernels, or None where it can."""
        found = kernels.find()
        if self._kernel is not None:
            return None
        if found.library is None:
            return found.reason
        device = self._buffers[_CODES].device  # type: ignore[union-attr]
        if device.type != "cpu":
            return f"the native kernels run on processors; the weight is on {device}"
        if self.layer.outliers is not None:
            return NO_SPARING
        return kernels.unsupported(self.weight_spec, self.in_features)

    @property
    def implementation(self) -> str:
        """What computes the product: an instruction set, or torch."""
        return kernels.isa() if self._native else "dequantize"

    @property
    def _native(self) -> bool:
        """Whether `forward` is the kernels' business."""
        return self._resident == "native" and self._kernel is not None

    def rotated_input(self, x: Tensor) -> Tensor:
        return rotate(x) if self.layer.rotate else x

    def quantized_input(self, x: Tensor) -> Tensor:
        """x as the product sees it: rotated, snapped to the input format and back, dtype kept."""
        return seen(x, self.layer)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return self._add_branches(FrozenProduct.apply(x, self), x)  # type: ignore[no-untyped-call]
        return self._add_branches(self.product(x), x)

    def product(self, x: Tensor) -> Tensor:
        """x W^T + bias, without the branches and without gradients."""
        x = self._own_input(x)
        if self._native:
            assert self._kernel is not None
            return self._kernel(x)
        return F.linear(self.quantized_input(x), self.weight, self.bias)

    def _own_input(self, x: Tensor) -> Tensor:
        """x without the channels that are columns of their own: they shall not widen its scales."""
        for branch in self.branches:
            if isinstance(branch, Columns) and self.layer.input is not None:
                x = x.index_fill(-1, branch.index, 0.0)
        return x

    def integer_forward(self, x: Tensor) -> Tensor:
        """The product in integers: exact int32 sums inside each scale block, float32 across them.

        Needs integer weight and input formats whose scales are constant along blocks of the input
        axis. Raises UserError for others. Returns x's dtype.
        """
        if self.layer.input is None:
            raise UserError("integer_forward needs an input format such as 'int8h | fp32/row'")
        rows = self.rotated_input(self._own_input(x)).reshape(-1, self.in_features)
        quiet, loud = split(rows, self.layer.outliers)
        y = integer_product(quantize(quiet, self.layer.input), self.qweight())
        if loud is not None:
            y = y + F.linear(loud.to(torch.float32), self.qweight().dequantize())
        if self.bias is not None:
            y = y + self.bias.to(torch.float32)
        y = y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)
        return self._add_branches(y, x)

    def _add_branches(self, y: Tensor, x: Tensor) -> Tensor:
        for branch in self.branches:
            y = y + branch(x)
        return y

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        own, self._buffers = self._buffers, self.stored_buffers()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        self._buffers = own

    def __getstate__(self) -> dict[str, Any]:
        """For copies: memory that belongs to a kernel stays where it is, and is packed anew."""
        return self.__dict__ | {"_buffers": self.stored_buffers(), "_kernel": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.resident = self._resident

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """Move like any module, but a change of dtype changes the compute dtype, never the scales."""
        resident = self._resident
        if self._kernel is not None:
            self._leave_kernel()
        self.resident = "packed"
        stored = {
            name: tensor.dtype for name, tensor in self._buffers.items() if tensor is not None
        }
        kept = {name: tensor for name, tensor in self._buffers.items()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, dtype in stored.items():
            moved, old = self._buffers[name], kept[name]
            if moved is not None and old is not None and moved.dtype != dtype:
                self._buffers[name] = old.to(moved.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        self.resident = resident
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"weight={str(self.weight_spec)!r}, input={str(self.layer.input or '')!r}, "
            f"rotate={self.layer.rotate}, bias={self.bias is not None}, {self._resident}"
        )


class FrozenProduct(torch.autograd.Function):
    """`QuantLinear.product` with a gradient for x alone, straight through the rounding of x.

    Nothing is kept for the backward pass: dX = dY W^ expands a share of the rows of W^ at a time, so
    that no copy of the weight in full precision ever exists (EMEF: Chai et al. 2023, INT2.1,
    arXiv:2306.08162).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantLinear) -> Tensor:
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        layer, (grad,) = ctx.layer, grads
        rows = grad.reshape(-1, layer.out_features)
        found = torch.zeros(len(rows), layer.in_features, device=grad.device)
        indices = torch.arange(layer.out_features, device=grad.device)
        for part in torch.split(indices, layer.part_rows):
            found.addmm_(rows[:, part].float(), layer.rows(part).float())
        found = rotate(found) if layer.layer.rotate else found
        return found.to(grad.dtype).reshape(*grad.shape[:-1], layer.in_features), None


def seen(x: Tensor, layer: LayerPlan) -> Tensor:
    """x [..., in] as the product of a layer sees it: rotated, snapped to the input format and back
    but for the channels that are spared, dtype kept."""
    x = rotate(x) if layer.rotate else x
    if layer.input is None or x.numel() == 0:
        return x
    quiet, loud = split(x, layer.outliers)
    snapped = fake_quantize(quiet, layer.input)
    return snapped if loud is None else snapped + loud


def split(x: Tensor, outliers: float | None) -> tuple[Tensor, Tensor | None]:
    """x [..., in] as a sum: channels in which nothing reaches `outliers`, and the others (None where
    there are none)."""
    if outliers is None:
        return x, None
    spared = (x.abs() >= outliers).reshape(-1, x.shape[-1]).any(0)
    return (x.masked_fill(spared, 0), x.masked_fill(~spared, 0)) if spared.any() else (x, None)


def pack_linear(
    qweight: QTensor, layer: LayerPlan, bias: Tensor | None = None
) -> kernels.PackedLinear:
    """A linear layer as the native kernels take it. Raises UserError where they cannot."""
    if layer.outliers is not None:
        raise UserError(f"no kernel spares channels of inputs: {NO_SPARING}")
    weight = kernels.PackedWeight.from_qtensor(qweight, bias)
    return kernels.PackedLinear(weight, kernels.InputFormat.of(layer.input, layer.rotate))


@contextmanager
def on_kernels(layers: Iterable[QuantLinear]) -> Iterator[None]:
    """For a while, `forward` of these layers is the native kernels' business where it can be."""
    before = {layer: layer._resident for layer in layers if layer.no_kernel is None}
    for layer in before:
        layer.kernel()
        layer._resident = "native"  # whatever is expanded stays so
    try:
        yield
    finally:
        for layer, resident in before.items():
            layer._resident = resident


class TiedEmbedding(nn.Module):
    """An input embedding [vocabulary, width] whose rows are those of a quantized output head, turned
    back where that stores them rotated."""

    def __init__(self, head: QuantLinear) -> None:
        super().__init__()
        self._held = [head]  # in a list: the head is its parent's child, and stored there

    @property
    def head(self) -> QuantLinear:
        return self._held[0]

    @property
    def weight(self) -> Tensor:
        return self._turned_back(self.head.weight)

    def forward(self, ids: Tensor) -> Tensor:
        rows = self._turned_back(self.head.rows(ids.reshape(-1)))
        return rows.reshape(*ids.shape, -1)

    def _turned_back(self, rows: Tensor) -> Tensor:
        return rotate(rows) if self.head.layer.rotate else rows


def require_plain_embedding(model: nn.Module, name: str) -> None:
    """UserError unless this embedding only looks rows up: then TiedEmbedding can replace it."""
    embedding = model.get_submodule(name)
    if type(embedding) is not nn.Embedding:
        raise UserError(
            f"{name} is a {type(embedding).__name__}, so the output head that is tied with it "
            "cannot be quantized; list the head under 'ignore'"
        )


def check_resident(how: str) -> None:
    """UserError unless `how` says where dequantized weights live."""
    if how not in RESIDENT:
        raise UserError(f"resident={how!r}: choose one of {', '.join(RESIDENT)}")


def integer_product(qx: QTensor, qw: QTensor) -> Tensor:
    """x W^T for codes of x [tokens, in] and of W [out, in]; float32 [tokens, out].

    Along the input axis both scales are constant inside blocks of `width` columns. Per block the
    codes (minus zero points) are multiplied and summed exactly in int32, and the sum is scaled by
    both scales in float32; blocks are added in order.
    """
    inputs = qx.shape[-1]
    width = math.gcd(_scale_width(qx.spec, inputs), _scale_width(qw.spec, inputs))
    if width > MAX_INT32_K:
        width = math.gcd(width, 2 ** (MAX_INT32_K.bit_length() - 1))
    x, sx = _integers(qx, width)
    w, sw = _integers(qw, width)
    y = torch.zeros(x.shape[0], w.shape[0], dtype=torch.float32, device=x.device)
    for block, start in enumerate(range(0, inputs, width)):
        part = slice(start, start + width)
        exact = torch.matmul(x[:, part], w[:, part].T).to(torch.float32)
        y += exact * sx[:, block, None] * sw[None, :, block]
    return y


def integer_bound(layer: QuantLinear, x: Tensor) -> Tensor:
    """Largest difference between `integer_forward` and `forward` in float32, per output.

    With u = 2^-24, x^ and W^ the dequantized operands and K inputs, both paths sum the same exact
    products; each rounds at most K + 4 times on the way to a term of absolute sum |x^| |W^|^T:

        |difference| <= 2 (K + 4) u (|x^| |W^|^T + |bias|)
    """
    dense = layer.qweight().dequantize(torch.float32).abs()
    reach = layer.quantized_input(x).to(torch.float32).abs() @ dense.T
    if layer.bias is not None:
        reach = reach + layer.bias.to(torch.float32).abs()
    return 2 * (layer.in_features + 4) * 2.0**-24 * reach


def _scale_width(spec: Spec, inputs: int) -> int:
    """Columns over which the scale of a [rows, inputs] matrix is constant."""
    if spec.grid.kind != "int" or spec.bits > 8:
        raise UserError(f"integer_forward needs integers of a byte; {spec} stores {spec.grid.name}")
    partitions = [factor.partition for factor in spec.factors]
    if any(p.flat for p in partitions):
        raise UserError(f"integer_forward cannot use {spec}: its scale blocks straddle rows")
    return math.gcd(*(p.cols for p in partitions)) or inputs


def _integers(q: QTensor, width: int) -> tuple[Tensor, Tensor]:
    """Codes minus zero points as int32 [rows, in], and the scale of each block [rows, blocks]."""
    matrix = tuple(q.shape)
    codes = q.codes.to(torch.int32)
    zero_point = q.scales.expand_zero_point(matrix)
    if zero_point is not None:
        codes = codes - zero_point.to(torch.int32)
    return codes, q.scales.expand(matrix)[:, ::width].to(torch.float32)
