"""A quantized tensor as plain tensors, by name: what checkpoints hold and modules keep as buffers.

A quantized weight W is stored as `W_codes` (packed along the last axis, dtype uint8), one `W_scale_<i>`
per factor of its Spec, finest first, in the dtype of the factor's grid, and `W_zero_point` (packed like
the codes) where the grid has one. A factor that is itself quantized adds the same names to its own:
`W_scale_0_codes`, `W_scale_0_scale_0`, ... and `W_scale_0_offset` (float32). For a linear layer, W is
`<module>.weight`; for experts, a 3-D parameter with the reduction axis last.

A layout never changes its meaning; a new one gets a new version, and old readers stay.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from posttrain.errors import UserError
from posttrain.numbers import QTensor, Scales, Spec, pack, packed_bytes, unpack

LAYOUT = "bitstream.v1"
CODES_SUFFIX = "_codes"

Shape = tuple[int, ...]


def layout(prefix: str, spec: Spec, shape: Shape) -> dict[str, tuple[Shape, torch.dtype]]:
    """Name -> (shape, dtype) of everything stored for a weight of this Spec and shape."""
    found = {prefix + CODES_SUFFIX: (_packed(shape, spec), _codes_dtype(spec))}
    matrix = spec.matrix(shape)
    for i, factor in enumerate(spec.factors):
        name, counts = f"{prefix}_scale_{i}", factor.partition.counts(matrix)
        if factor.nested is None:
            found[name] = (counts, factor.grid.code_dtype)
            continue
        found |= layout(name, factor.nested, counts)
        if factor.offset:
            found[f"{name}_offset"] = ((), torch.float32)
    if spec.grid.zero_point:
        counts = spec.factors[0].partition.counts(matrix)
        found[f"{prefix}_zero_point"] = (_packed(counts, spec), torch.uint8)
    return found


def pack_qtensor(prefix: str, q: QTensor) -> dict[str, Tensor]:
    """The tensors that `layout` names, from codes and scales."""
    found = {prefix + CODES_SUFFIX: pack_codes(q.codes, q.spec)}
    for i, stored in enumerate(q.scales.stored):
        name = f"{prefix}_scale_{i}"
        if isinstance(stored, Tensor):
            found[name] = stored
            continue
        found |= pack_qtensor(name, stored)
        if stored.offset is not None:
            found[f"{name}_offset"] = stored.offset.to(torch.float32)
    if q.scales.zero_point is not None:
        found[f"{prefix}_zero_point"] = pack_codes(q.scales.zero_point, q.spec)
    return found


def unpack_qtensor(
    prefix: str, tensors: Mapping[str, Tensor | None], spec: Spec, shape: Shape
) -> QTensor:
    """The inverse of `pack_qtensor`. `tensors` must hold every name of `layout`."""
    codes = unpack_codes(_get(tensors, prefix + CODES_SUFFIX), spec, shape)
    matrix = spec.matrix(shape)
    stored: list[Tensor | QTensor] = []
    for i, factor in enumerate(spec.factors):
        name = f"{prefix}_scale_{i}"
        if factor.nested is None:
            stored.append(_get(tensors, name))
            continue
        nested = unpack_qtensor(name, tensors, factor.nested, factor.partition.counts(matrix))
        offset = _get(tensors, f"{name}_offset") if factor.offset else None
        stored.append(nested if offset is None else nested.with_offset(offset))
    zero_point = None
    if spec.grid.zero_point:
        counts = spec.factors[0].partition.counts(matrix)
        zero_point = unpack_codes(_get(tensors, f"{prefix}_zero_point"), spec, counts)
    return QTensor(codes, Scales(spec, tuple(stored), zero_point), spec)


def check_tensors(
    where: str, prefix: str, tensors: Mapping[str, Tensor], spec: Spec, shape: Shape
) -> None:
    """UserError unless `tensors` holds what `layout` says, in its shapes and dtypes."""
    for name, (expected, dtype) in layout(prefix, spec, shape).items():
        found = tensors.get(name)
        if found is None:
            raise UserError(f"{where}: {name} is missing; a weight stored as {spec} needs it")
        if tuple(found.shape) != tuple(expected) or found.dtype != dtype:
            raise UserError(
                f"{where}: {name} is {list(found.shape)} of {found.dtype}; {spec} of shape "
                f"{list(shape)} needs {list(expected)} of {dtype}"
            )


def put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Fill or create a buffer; buffers made by `layout` stay part of the state dict."""
    module.register_buffer(name, tensor)


def pack_codes(codes: Tensor, spec: Spec) -> Tensor:
    """Codes as stored: a dense bit stream of uint8 along the last axis (raw for 16-bit grids)."""
    return codes if spec.bits > 8 else pack(codes, spec.bits, LAYOUT)


def unpack_codes(packed: Tensor, spec: Spec, shape: Shape) -> Tensor:
    """The inverse of `pack_codes`, in the grid's code dtype."""
    if spec.bits > 8:
        return packed
    signed = spec.grid.code_dtype == torch.int8
    return unpack(packed, spec.bits, shape[-1], LAYOUT, signed=signed)


def _packed(shape: Shape, spec: Spec) -> Shape:
    if spec.bits > 8:
        return tuple(shape)
    return (*shape[:-1], packed_bytes(shape[-1], spec.bits, LAYOUT))


def _codes_dtype(spec: Spec) -> torch.dtype:
    return spec.grid.code_dtype if spec.bits > 8 else torch.uint8


def _get(tensors: Mapping[str, Tensor | None], name: str) -> Tensor:
    found = tensors[name]
    assert found is not None
    return found
