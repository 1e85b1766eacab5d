"""Our own checkpoint schema, for number formats that compressed-tensors cannot say.

config.json holds `quantization_config`:

    {"quant_method": "posttrain", "version": 1, "layout": "bitstream.v1",
     "groups": [{"weight": "nf4 | fp32/flat64", "input": null, "modules": ["model.layers.0..."]}]}

Where the output head is quantized and tied with the input embedding, it is stored once, as the head,
and `"tied": {"<embedding>": "<head>"}` names the module that takes its rows from it.

A group whose inputs are rotated also has `"rotate": "hadamard.v1"` (see `rotation`), and its weights
are stored rotated. `"outliers": 6.0`: channels of the input that reach this magnitude are spared.
`"branches": [{"name": "lowrank", "rank": 8, "weight": "fp16", "start": "svd"}]`: what is added to the
product (see `branches`); branch i of a module has its tensors under `<module>.branches.<i>.`.
`"kv": "int8 | fp16/row"` beside the groups: what the KV cache is to be kept in (see `kv`).

Weights are stored as `storage` says; for a linear layer, W is `<module>.weight`; for experts, a 3-D
parameter with the reduction axis last.

A layout never changes its meaning; a new one gets a new version, and old readers stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from posttrain.errors import UserError, did_you_mean
from posttrain.models.branches import branch_dict, make_branch
from posttrain.models.kv import parse_kv
from posttrain.models.plan import LayerPlan
from posttrain.models.storage import LAYOUT, Shape, pack_qtensor
from posttrain.models.walk import tied_head
from posttrain.numbers import QTensor, Spec

METHOD = "posttrain"
VERSION = 1
CONFIG_KEYS = ("quant_method", "version", "layout", "groups", "tied", "kv")
GROUP_KEYS = ("weight", "input", "modules", "rotate", "outliers", "branches")
ROTATION = "hadamard.v1"


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
        groups.setdefault(layer, []).append(name)
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
            | ({"branches": list(map(branch_dict, layer.branches))} if layer.branches else {})
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
    listed = group.get("branches", [])
    if not isinstance(listed, list):
        raise UserError(f"{where}.branches must be a list; found {listed!r}")
    branches = tuple(make_branch(data, f"{where}.branches[{i}]") for i, data in enumerate(listed))
    layer = LayerPlan(weight, spec, branches, rotation is not None, outliers)
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
