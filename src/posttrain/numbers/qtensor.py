"""Quantized tensors: codes and the scales they are read with.

    quantize:    code = encode(x / scale)          dequantize: x^ = decode(code) * scale
    zero points: code = encode(x / scale + zero)               x^ = (code - zero) * scale

All arithmetic is float32 with true division, whatever the dtype of `x`, and elements are divided
by the scale as *stored*, so that encoder and decoder agree.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from posttrain.numbers.grids import Grid
from posttrain.numbers.partition import Shape2d, blocked, unblocked
from posttrain.numbers.scales import Scales, _nonzero, fit_scales
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

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values the codes stand for, computed in float32, then cast to `dtype`."""
        matrix = self.spec.matrix(self.shape)
        values = self.spec.grid.decode(self.codes).reshape(matrix)
        values = _rescale_(values, self.scales, matrix).reshape(self.shape)
        if self.offset is not None:
            values += self.offset
        return values.to(dtype)


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
    y, matrix = _normalized(x, scales)
    snapped = spec.grid.snap_(y, rounding or spec.rounding, generator)
    codes = unblocked(spec.grid.codes(snapped), matrix).reshape(x.shape)
    return QTensor(codes, scales, spec)


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
    scales = fit_scales(x, spec, clip_ratio) if scales is None else scales
    y, matrix = _normalized(x, scales)
    y = spec.grid.snap_(y, rounding or spec.rounding, generator)
    return unblocked(_rescale_blocks_(y, scales, matrix), matrix).reshape(x.shape).to(x.dtype)


def encode_scaled(
    x: Tensor,
    grid: Grid,
    scale: Tensor,
    zero_point: Tensor | None = None,
    rounding: str = "rne",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Codes of `x` under scales (and zero points) that broadcast against it: a solver's step."""
    y = x.to(torch.float32) / _nonzero(scale)
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


def _normalized(x: Tensor, scales: Scales) -> tuple[Tensor, Shape2d]:
    """A fresh x / scale (+ zero point) in blocks [R/r, r, K/c, c], and the matrix shape [R, K]."""
    matrix = scales.spec.matrix(x.shape)
    scale, block = _scale_blocks(scales, matrix, x.device)
    y = blocked(x.detach().to(torch.float32).reshape(matrix), block) / _nonzero(scale)
    if scales.zero_point is not None:
        y += _as_blocks(scales.zero_point)
    return y, matrix


def _rescale_(values: Tensor, scales: Scales, matrix: Shape2d) -> Tensor:
    """Multiply grid values [R, K] by their scales, in place where the blocks allow."""
    _, block = scales.combined(matrix)
    return unblocked(_rescale_blocks_(blocked(values, block), scales, matrix), matrix)


def _rescale_blocks_(y: Tensor, scales: Scales, matrix: Shape2d) -> Tensor:
    if scales.zero_point is not None:
        y -= _as_blocks(scales.zero_point)
    return y.mul_(_scale_blocks(scales, matrix, y.device)[0])


def _scale_blocks(scales: Scales, matrix: Shape2d, device: torch.device) -> tuple[Tensor, Shape2d]:
    product, block = scales.combined(matrix)
    return product.to(device)[:, None, :, None], block


def _as_blocks(zero_point: Tensor) -> Tensor:
    return zero_point.to(torch.float32)[:, None, :, None]
