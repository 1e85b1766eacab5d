"""Quantized tensors: codes and the scales they are read with.

    quantize:    code = encode(x / scale)          dequantize: x^ = decode(code) * scale
    zero points: code = encode(x / scale + zero)               x^ = (code - zero) * scale

All arithmetic is float32 with true division, whatever the dtype of `x`, and elements are divided
by the scale as *stored*, so that encoder and decoder agree.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from posttrain.numbers.grids import Grid
from posttrain.numbers.partition import Shape2d, blocked, unblocked
from posttrain.numbers.scales import Scales, fit_scales, nonzero, row_scale
from posttrain.numbers.spec import Spec


@dataclass(frozen=True, eq=False)
class QTensor:
    """A tensor stored as `spec`: `codes` has the tensor's own shape, one code per element.

    Built by `quantize`, or by a solver from codes it decided and the scales it froze.
    offset: a scalar added to every decoded element (double quantization), or None.
    """

    codes: Tensor
    scales: Scales
    spec: Spec
    offset: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """Bytes when stored densely, with scales and zero points, rounded up."""
        return -(-self.spec.stored_bits(self.shape) // 8)

    def with_offset(self, offset: Tensor) -> "QTensor":
        """The same tensor with `offset` added to every decoded element."""
        return replace(self, offset=offset)

    def rows(self, index: Tensor) -> "QTensor":
        """Rows of a matrix whose Spec is `by_rows`."""
        stored = tuple(_tensor(factor)[index] for factor in self.scales.stored)
        zero_point = self.scales.zero_point
        picked = None if zero_point is None else zero_point[index]
        return replace(self, codes=self.codes[index], scales=Scales(self.spec, stored, picked))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values the codes stand for, computed in float32, then cast to `dtype`."""
        matrix = self.spec.matrix(self.shape)
        scale, block = _scale_blocks(self.scales, matrix, self.codes.device)
        values = blocked(self.spec.grid.decode(self.codes).reshape(matrix), block)
        values = _rescaled_(values, scale, self.scales.zero_point)
        values = unblocked(values, matrix).reshape(self.shape)
        if self.offset is not None:
            values += self.offset
        return values.to(dtype)


def concatenated(parts: Iterable[QTensor]) -> QTensor:
    """Matrices of one `by_rows` Spec below each other."""
    found = list(parts)
    factors = zip(*(part.scales.stored for part in found), strict=True)
    stored = tuple(torch.cat([_tensor(part) for part in factor]) for factor in factors)
    zeros = [part.scales.zero_point for part in found]
    zero_point = None if zeros[0] is None else torch.cat([_tensor(zero) for zero in zeros])
    scales = Scales(found[0].spec, stored, zero_point)
    return QTensor(torch.cat([part.codes for part in found]), scales, found[0].spec)


def _tensor(stored: object) -> Tensor:
    assert isinstance(stored, Tensor)  # what `by_rows` promises
    return stored


def quantize(
    x: Tensor,
    spec: str | Spec,
    *,
    scales: Scales | None = None,
    rounding: str | None = None,
    generator: torch.Generator | None = None,
    clip_ratio: float | Tensor = 1.0,
) -> QTensor:
    """Quantize `x` of any shape; blocks run along its last axis.

    scales: frozen scales to use instead of fitting them (then `clip_ratio` has no say).
    rounding: overrides the rounding of `spec`; "sr" needs `generator`.
    """
    spec = Spec.parse(spec)
    scales = fit_scales(x, spec, clip_ratio) if scales is None else scales
    y, _, matrix = _normalized(x, scales)
    codes = spec.grid.encode_(y, rounding or spec.rounding, generator)
    return QTensor(unblocked(codes, matrix).reshape(x.shape), scales, spec)


def fake_quantize(
    x: Tensor,
    spec: str | Spec,
    *,
    scales: Scales | None = None,
    rounding: str | None = None,
    generator: torch.Generator | None = None,
    clip_ratio: float | Tensor = 1.0,
) -> Tensor:
    """`quantize(...).dequantize(x.dtype)`, bitwise, without forming the codes."""
    spec = Spec.parse(spec)
    rounding = rounding or spec.rounding
    if scales is None and rounding == "rne" and clip_ratio == 1.0 and _is_per_token_int(spec):
        return _fake_per_token(x, spec)
    scales = fit_scales(x, spec, clip_ratio) if scales is None else scales
    y, scale, matrix = _normalized(x, scales)
    y = _rescaled_(spec.grid.snap_(y, rounding, generator), scale, scales.zero_point)
    return unblocked(y, matrix).reshape(x.shape).to(x.dtype)


def encode_scaled(
    x: Tensor,
    grid: Grid,
    scale: Tensor,
    zero_point: Tensor | None = None,
    rounding: str = "rne",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Codes of `x` under scales (and zero points) that broadcast against it: a solver's step."""
    y = x.to(torch.float32) / nonzero(scale)
    if zero_point is not None:
        y = y + zero_point
    return grid.encode(y, rounding, generator)


def decode_scaled(
    codes: Tensor, grid: Grid, scale: Tensor, zero_point: Tensor | None = None
) -> Tensor:
    """Float32 values of codes under scales that broadcast; the inverse of `encode_scaled`."""
    values = grid.decode(codes)
    if zero_point is not None:
        values = values - zero_point
    return values * scale


def _normalized(x: Tensor, scales: Scales) -> tuple[Tensor, Tensor, Shape2d]:
    """A fresh x / scale (+ zero point) in blocks, the scale blocks, and the matrix shape [R, K]."""
    matrix = scales.spec.matrix(x.shape)
    scale, block = _scale_blocks(scales, matrix, x.device)
    y = blocked(x.detach().to(torch.float32).reshape(matrix), block) / nonzero(scale)
    if scales.zero_point is not None:
        y += _as_blocks(scales.zero_point.to(torch.float32))
    return y, scale, matrix


def _rescaled_(y: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """(y - zero point) * scale, in place, on blocks [R/r, r, K/c, c]."""
    if zero_point is not None:
        y -= _as_blocks(zero_point.to(torch.float32))
    return y.mul_(scale)


def _scale_blocks(scales: Scales, matrix: Shape2d, device: torch.device) -> tuple[Tensor, Shape2d]:
    product, block = scales.combined(matrix)
    return _as_blocks(product.to(device)), block


def _as_blocks(per_block: Tensor) -> Tensor:
    return per_block[:, None, :, None]


# ------------------------------------------------- the quick path of activation quantization

# Rows are handled in pieces of about this many elements, which stay in a core's cache.
_PIECE = 1 << 18


def _is_per_token_int(spec: Spec) -> bool:
    """Whether `spec` is symmetric integers under one float32 scale per row: "int8h | fp32/row"."""
    if spec.grid.kind != "int" or spec.grid.zero_point or len(spec.factors) != 1:
        return False
    factor = spec.factors[0]
    plain = factor.nested is None and factor.power == 1.0
    return plain and factor.grid_name == "fp32" and str(factor.partition) == "row"


def _fake_per_token(x: Tensor, spec: Spec) -> Tensor:
    """`fake_quantize` under dynamic per-row scales: the forward pass of every W?A8 layer."""
    rows, width = spec.matrix(x.shape)
    if x.numel() == 0:
        return x.clone()
    flat = x.detach().to(torch.float32).reshape(rows, width)
    step = max(1, _PIECE // width)
    if rows <= step:
        out = _fake_rows(flat, spec)
    else:
        out = torch.empty_like(flat)
        for start in range(0, rows, step):
            out[start : start + step] = _fake_rows(flat[start : start + step], spec)
    return out.reshape(x.shape).to(x.dtype)


def _fake_rows(x: Tensor, spec: Spec) -> Tensor:
    absmax = torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True))
    scale = row_scale(absmax, spec)
    return spec.grid.snap_(x / scale).mul_(scale)
