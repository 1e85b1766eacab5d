"""Our own checkpoint schema, for number formats that compressed-tensors cannot say.

config.json holds `quantization_config`:

    {"quant_method": "posttrain", "version": 1, "layout": "bitstream.v1",
     "groups": [{"weight": "nf4 | fp32/flat64", "input": null, "modules": ["model.layers.0..."]}]}

Where the output head is quantized and tied with the input embedding, it is stored once, as the head,
and `"tied": {"<embedding>": "<head>"}` names the module that takes its rows from it.

A group whose inputs are rotated also has `"rotate": "hadamard.v1"` (see `rotation`), and its weights
are stored rotated. `"outliers": 6.0`: channels of the input that reach this magnitude are spared.
`"kv": "int8 | fp16/row"` beside the groups: what the KV cache is to be kept in (see `kv`).

A quantized weight W is stored as `W_codes` (packed along the last axis, dtype uint8), one `W_scale_<i>`
per factor of its Spec, finest first, in the dtype of the factor's grid, and `W_zero_point` (packed like
the codes) where the grid has one. A factor that is itself quantized adds the same names to its own:
`W_scale_0_codes`, `W_scale_0_scale_0`, ... and `W_scale_0_offset` (float32). For a linear layer, W is
`<module>.weight`; for experts, a 3-D parameter with the reduction axis last.

A layout never changes its meaning; a new one gets a new version, and old readers stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.errors import UserError, did_you_mean
from posttrain.models.kv import parse_kv
from posttrain.models.plan import LayerPlan
from posttrain.models.walk import tied_head
from posttrain.numbers import QTensor, Scales, Spec, pack, packed_bytes, unpack

METHOD = "posttrain"
VERSION = 1
LAYOUT = "bitstream.v1"
CODES_SUFFIX = "_codes"
CONFIG_KEYS = ("quant_method", "version", "layout", "groups", "tied", "kv")
GROUP_KEYS = ("weight", "input", "modules", "rotate", "outliers")
ROTATION = "hadamard.v1"

Shape = tuple[int, ...]


# ------------------------------------------------------------------------ a QTensor as tensors


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


# --------------------------------------------------------------------------------- the schema


def store(name: str, q: QTensor, layer: LayerPlan) -> dict[str, Tensor]:
    """The tensors of one layer under their names in the checkpoint."""
    return pack_qtensor(weight_name(name, tuple(q.shape)), q)


def weight_name(name: str, shape: Shape) -> str:
    """Prefix of a layer's tensors: experts are named by their parameter, linears by their module."""
    return name if len(shape) == 3 else f"{name}.weight"


def quantization_config(
    layers: Mapping[str, LayerPlan],
    shapes: Mapping[str, Shape],
    model: nn.Module,
    kv: Spec | None = None,
) -> dict[str, Any]:
    """The `quantization_config` of config.json."""
    groups: dict[LayerPlan, list[str]] = {}
    for name, layer in layers.items():
        groups.setdefault(replace(layer, branches=()), []).append(name)
    found = {
        "quant_method": METHOD,
        "version": VERSION,
        "layout": LAYOUT,
        "groups": [
            {
                "weight": str(layer.weight),
                "input": layer.input and str(layer.input),
                "modules": names,
            }
            | ({"rotate": ROTATION} if layer.rotate else {})
            | ({} if layer.outliers is None else {"outliers": layer.outliers})
            for layer, names in groups.items()
        ],
    }
    if kv is not None:
        found["kv"] = str(kv)
    tied = tied_head(model)
    if tied is not None and tied[0] in layers:
        head, embedding = tied
        found["tied"] = {embedding: head}
    return found


def read_tied(
    config: Mapping[str, Any], layers: Mapping[str, LayerPlan], where: str
) -> dict[str, str]:
    """Embedding -> quantized head whose rows it takes."""
    tied = config.get("tied") or {}
    if not isinstance(tied, Mapping) or not all(head in layers for head in tied.values()):
        raise UserError(
            f"{where}: quantization_config: 'tied' must map embeddings to quantized layers; found "
            f"{tied!r}"
        )
    return dict(tied)


def read_config(config: Mapping[str, Any], where: str) -> dict[str, LayerPlan]:
    """Name -> LayerPlan from a `quantization_config`. Raises UserError naming the bad field."""
    where = f"{where}: quantization_config"
    if config.get("version") != VERSION:
        raise UserError(
            f"{where}: version {config.get('version')!r} is not one this posttrain reads "
            f"(it reads {VERSION}); install a newer posttrain"
        )
    _check_keys(config, CONFIG_KEYS, where)
    if config.get("layout") != LAYOUT:
        raise UserError(f"{where}: unknown layout {config.get('layout')!r}; known: {LAYOUT}")
    if config.get("kv") is not None:
        parse_kv(config["kv"], f"{where}.kv")
    groups = config.get("groups")
    if not isinstance(groups, list):
        raise UserError(f"{where}: 'groups' must be a list; found {groups!r}")
    layers: dict[str, LayerPlan] = {}
    for i, group in enumerate(groups):
        for name, layer in _read_group(group, f"{where}: groups[{i}]"):
            if name in layers:
                raise UserError(f"{where}: groups[{i}] names {name}, which another group has")
            layers[name] = layer
    return layers


def _read_group(group: object, where: str) -> Iterator[tuple[str, LayerPlan]]:
    if not isinstance(group, Mapping):
        raise UserError(f"{where}: expected keys {', '.join(GROUP_KEYS)}; found {group!r}")
    _check_keys(group, GROUP_KEYS, where)
    names = group.get("modules")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}: 'modules' must be a list of names; found {names!r}")
    weight = _read_spec(group.get("weight"), f"{where}.weight")
    inputs = group.get("input")
    spec = None if inputs is None else _read_spec(inputs, f"{where}.input")
    rotation = group.get("rotate")
    if rotation not in (None, ROTATION):
        raise UserError(f"{where}: unknown rotation {rotation!r}; known: {ROTATION}")
    outliers = group.get("outliers")
    if outliers is not None and not (isinstance(outliers, (int, float)) and outliers > 0):
        raise UserError(f"{where}.outliers must be a number above 0; found {outliers!r}")
    layer = LayerPlan(weight, spec, rotate=rotation is not None, outliers=outliers)
    for name in names:
        yield name, layer


def _read_spec(text: object, where: str) -> Spec:
    if not isinstance(text, str):
        raise UserError(f"{where}: expected the text of a number format; found {text!r}")
    try:
        return Spec.parse(text)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _check_keys(data: Mapping[Any, Any], known: tuple[str, ...], where: str) -> None:
    for key in data:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}{did_you_mean(str(key), known)}")
