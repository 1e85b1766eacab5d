"""Quantized experts: 3-D parameters that dequantize when a module reads them.

Mixture-of-experts modules keep the matrices of all experts in one parameter [experts, out, in] (or
[experts, in, out]) and index it themselves, so there is no nn.Linear to replace. Instead the
parameter becomes a property of the module's class that dequantizes packed buffers on access. Only
weights can be quantized this way: the inputs never pass through a layer of ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.errors import UserError
from posttrain.models import storage
from posttrain.models.plan import LayerPlan
from posttrain.numbers import QTensor, Spec

_RECORDS = "_quantized_parameters"


@dataclass
class ExpertsRecord:
    """What a quantized parameter needs: its Spec, the stored shape with the reduction axis last,
    whether the module wants [experts, in, out], and the compute dtype."""

    spec: Spec
    shape: tuple[int, ...]
    transposed: bool
    dtype: torch.dtype
    keep: bool = False
    dense: Tensor | None = None


def quantize_parameter(
    module: nn.Module,
    name: str,
    layer: LayerPlan,
    transposed: bool,
    device: torch.device | str = "meta",
) -> None:
    """Replace parameter `name` by empty packed buffers `<name>_codes`, ...

    transposed: the module holds [experts, in, out] (see `walk.Target`), else [experts, out, in].
    """
    if layer.input is not None:
        raise UserError(
            f"experts ({name}): their inputs cannot be quantized; add a rule without input for them"
        )
    assert layer.weight is not None
    parameter = module._parameters[name]
    assert parameter is not None
    shape = stored_shape(tuple(parameter.shape), transposed)
    record = ExpertsRecord(layer.weight, shape, transposed, parameter.dtype)
    for buffer, (size, dtype) in storage.layout(name, layer.weight, shape).items():
        module.register_buffer(buffer, torch.empty(size, dtype=dtype, device=device))
    del module._parameters[name]
    module.__dict__.setdefault(_RECORDS, {})[name] = record
    parent = type(module)
    reader = property(lambda self: _dense(self, name))
    module.__class__ = type(parent.__name__, (parent,), {name: reader, "_apply": _apply})


def stored_shape(shape: tuple[int, ...], transposed: bool) -> tuple[int, ...]:
    """Shape with the reduction axis last, which is how experts are quantized and stored."""
    return (shape[0], shape[2], shape[1]) if transposed else shape


def records(module: nn.Module) -> dict[str, ExpertsRecord]:
    """The quantized parameters of this module, by name (empty for an ordinary module)."""
    found: dict[str, ExpertsRecord] = module.__dict__.get(_RECORDS, {})
    return found


def qparameter(module: nn.Module, name: str) -> QTensor:
    """A quantized parameter as codes and scales, reduction axis last."""
    record = records(module)[name]
    return storage.unpack_qtensor(name, module._buffers, record.spec, record.shape)


def fill(module: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Put the tensors of `storage.pack_qtensor(name, ...)` into the module's buffers."""
    for buffer, tensor in tensors.items():
        storage.put(module, buffer, tensor)
    records(module)[name].dense = None


def _dense(module: Any, name: str) -> Tensor:
    record = records(module)[name]
    if record.dense is not None:
        return record.dense
    dense = qparameter(module, name).dequantize(record.dtype)
    if record.transposed:
        dense = dense.transpose(1, 2).contiguous()
    if record.keep:
        record.dense = dense
    return dense


def _apply(self: Any, fn: Any, recurse: bool = True) -> Any:
    """As QuantLinear: a change of dtype changes the compute dtype, never the stored scales."""
    kept = dict(self._buffers)
    nn.Module._apply(self, fn, recurse)  # type: ignore[no-untyped-call]
    for name, record in records(self).items():
        for buffer in storage.layout(name, record.spec, record.shape):
            if self._buffers[buffer].dtype != kept[buffer].dtype:
                self._buffers[buffer] = kept[buffer].to(self._buffers[buffer].device)
        record.dtype = fn(torch.empty(0, dtype=record.dtype)).dtype
        record.dense = None
    return self
