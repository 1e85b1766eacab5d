"""Read compressed-tensors checkpoints, ours and other tools' (the schema: `compressed_tensors`).

Packed codes are turned into our packed layout without unpacking them. What the schema can say and
our layers cannot compute (fixed input scales, quantized caches) raises NotExpressible.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.errors import UserError
from posttrain.models.compressed_tensors import (
    CHAIN_OF_FORMAT,
    DTYPE_NAMES,
    NotExpressible,
    sign_bits,
)
from posttrain.models.plan import LayerPlan
from posttrain.numbers import Factor, Spec, pack, packed_bytes, spec, unpack

_SCALED_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
_SINGLE_EXPERT = re.compile(r"\.experts\.\d+\.")


class Reader:
    """Reads a checkpoint of this schema, also one that another tool wrote.

    Raises NotExpressible (from the constructor) when the checkpoint uses a part of the schema that
    our layers cannot compute: then transformers has to load it.
    """

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.where = f"{where}: quantization_config"
        self.ignore = list(config.get("ignore") or [])
        self.groups = [
            Group.read(group, config.get("format"), f"{self.where}: config_groups[{name!r}]")
            for name, group in _mapping(config.get("config_groups"), self.where).items()
        ]
        for key in ("kv_cache_scheme", "transform_config"):
            if config.get(key):
                raise NotExpressible(f"it uses {key}")
        if config.get("quantization_status") != "compressed":
            raise NotExpressible("its weights are not stored compressed")

    def check_names(self, names: Iterable[str]) -> None:
        """NotExpressible for experts stored one by one: transformers' own loader merges those."""
        lone = next((name for name in names if _SINGLE_EXPERT.search(name)), None)
        if lone is not None:
            raise NotExpressible(f"{lone} belongs to a single expert")

    def group_of(self, name: str, module: nn.Module) -> Group | None:
        """The group that quantizes this module: exact names before patterns before classes, each in
        alphabetical order; of groups with the same target the last. So compressed-tensors has it."""
        if any(_matches(name, module, target) for target in self.ignore):
            return None
        ranked = sorted(
            (_rank(target, name), target, -i)
            for i, group in enumerate(self.groups)
            for target in group.targets
            if _matches(name, module, target)
        )
        if ranked and not only_multiplies(module):
            raise NotExpressible(f"{name} is a {type(module).__name__}")
        return self.groups[-ranked[0][2]] if ranked else None


@dataclass(frozen=True)
class Group:
    """One config group: the modules it targets, how their weights are stored, and the Spec of
    their inputs."""

    targets: list[str]
    format: str
    weights: dict[str, Any]
    input: Spec | None

    @classmethod
    def read(cls, group: object, fallback: object, where: str) -> Group:
        if not isinstance(group, Mapping) or not isinstance(group.get("targets"), list):
            raise UserError(f"{where}: expected 'targets' and 'weights'; found {group!r}")
        weights = group.get("weights")
        if not isinstance(weights, Mapping) or group.get("output_activations"):
            raise NotExpressible("a group quantizes outputs, or no weights")
        if "Embedding" in group["targets"]:
            raise NotExpressible("it quantizes embeddings")
        found = cls(
            group["targets"],
            str(group.get("format") or fallback),
            dict(weights),
            _input_spec(group.get("input_activations")),
        )
        found.check()
        return found

    def check(self) -> None:
        """NotExpressible unless `read_module` understands these weights."""
        if self.format not in {*CHAIN_OF_FORMAT, *_SCALED_FORMATS}:
            raise NotExpressible(f"its format is {self.format}")
        if self.weights.get("dynamic"):
            raise NotExpressible("its weights are quantized dynamically")
        if self.format in _SCALED_FORMATS:
            _grid_name(self.weights)
            _partition_name(self.weights)

    def weight_spec(self, scale_dtype: torch.dtype) -> Spec:
        """The number format of the weights, given the dtype their scales are held in."""
        text = CHAIN_OF_FORMAT.get(self.format)
        if text is None:
            scale = DTYPE_NAMES.get(scale_dtype, "fp32")
            text = f"{_grid_name(self.weights)} | {scale}/{_partition_name(self.weights)}"
        return spec(text)


def read_module(
    where: str,
    tensors: dict[str, Tensor],
    group: Group,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> tuple[LayerPlan, dict[str, Tensor]]:
    """One layer from its tensors (suffix -> tensor); those used are removed from `tensors`.

    Returns its number formats, and its weight as the tensors `storage.layout` names. Codes are
    never unpacked on the way.
    dtype: the compute dtype. As in the format's own reader, float scales take it; scales stored
    narrower than float32 stay so in memory in a float32 model, which changes no value.
    """
    scale = _pop(where, tensors, "weight_scale")
    if scale.dtype in DTYPE_NAMES and dtype != torch.float32:
        scale = scale.to(dtype)
    weight = group.weight_spec(scale.dtype)
    found = {"weight_codes": _read_codes(where, tensors, group, weight, shape)}
    scales = [scale.view(torch.uint8) if scale.dtype == torch.float8_e4m3fn else scale]
    if group.format == "nvfp4-pack-quantized":
        scales.append(_pop(where, tensors, "weight_global_scale"))
    for i, (factor, tensor) in enumerate(zip(weight.factors, scales, strict=True)):
        found[f"weight_scale_{i}"] = _read_factor(where, factor, tensor, shape)
    if weight.grid.zero_point:
        counts = weight.factors[0].partition.counts(shape)
        found["weight_zero_point"] = _read_zero_point(where, tensors, weight.bits, counts)
    return LayerPlan(weight, group.input), found


def _read_factor(where: str, factor: Factor, tensor: Tensor, shape: tuple[int, int]) -> Tensor:
    counts, dtype = factor.partition.counts(shape), factor.grid.code_dtype
    if tensor.numel() != math.prod(counts) or tensor.dtype != dtype:
        raise UserError(
            f"{where}: its scale ({factor}) is {list(tensor.shape)} of {tensor.dtype}; a weight "
            f"{list(shape)} needs {list(counts)} of {dtype}"
        )
    return tensor.reshape(counts)


def _read_codes(
    where: str, tensors: dict[str, Tensor], group: Group, weight: Spec, shape: tuple[int, int]
) -> Tensor:
    """Codes [out, bytes] in our packed layout."""
    rows, columns = shape
    bits = weight.bits
    if group.format in ("int-quantized", "float-quantized", "naive-quantized", "mxfp8-quantized"):
        stored = torch.int8 if weight.grid.kind == "int" else torch.float8_e4m3fn
        codes = _shaped(where, tensors, "weight", shape, stored).view(torch.uint8)
        if bits < 8:  # one byte each, in which the upper bits repeat the sign
            codes = pack(codes.view(torch.int8), bits)
        return codes ^ sign_bits(bits, columns) if weight.grid.zero_point else codes
    if group.format != "pack-quantized":
        width = packed_bytes(columns, bits)
        return _shaped(where, tensors, "weight_packed", (rows, width), torch.uint8)
    said = _pop(where, tensors, "weight_shape").tolist()
    if said != list(shape):
        raise UserError(f"{where}.weight_shape says {said}; the model has {list(shape)}")
    words = -(-columns * bits // 32)
    packed = _shaped(where, tensors, "weight_packed", (rows, words), torch.int32)
    codes = _bytes_of_words(packed, bits, columns)
    return codes if weight.grid.zero_point else codes ^ sign_bits(bits, columns)


def _read_zero_point(
    where: str, tensors: dict[str, Tensor], bits: int, counts: tuple[int, int]
) -> Tensor:
    """Zero points [rows, bytes]; theirs are bytes, or words packed down the rows."""
    if "weight_zero_point" in tensors and tensors["weight_zero_point"].dtype == torch.int8:
        tensors["weight_zero_point"] = tensors["weight_zero_point"].reshape(counts)
        signed = _shaped(where, tensors, "weight_zero_point", counts, torch.int8)
        return pack((signed.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8), bits)
    words = -(-counts[0] * bits // 32)
    stored = _shaped(where, tensors, "weight_zero_point", (words, counts[1]), torch.int32)
    down = _bytes_of_words(stored.T, bits, counts[0])
    return pack(unpack(down, bits, counts[0]).T, bits)


def _bytes_of_words(words: Tensor, bits: int, count: int) -> Tensor:
    """The bytes of rows of 32-bit words, without the padding after `count` codes."""
    return words.contiguous().view(torch.uint8)[:, : packed_bytes(count, bits)].contiguous()


def _grid_name(args: Mapping[str, Any]) -> str:
    bits, kind = args.get("num_bits"), args.get("type")
    if kind == "int" and isinstance(bits, int) and 2 <= bits <= 8:
        return f"int{bits}t" if args.get("symmetric", True) else f"int{bits}z"
    if kind == "float" and bits == 8 and args.get("symmetric", True):
        return "e4m3"
    raise NotExpressible(f"its weights are {bits}-bit {kind}")


def _partition_name(args: Mapping[str, Any]) -> str:
    strategy, group = args.get("strategy"), args.get("group_size")
    if strategy is None:
        strategy = "tensor" if group is None else "channel" if group == -1 else "group"
    if strategy == "group" and isinstance(group, int) and group > 0:
        return f"g{group}"
    tile = args.get("block_structure")
    if strategy == "block" and isinstance(tile, list) and len(tile) == 2:
        return f"t{tile[0]}x{tile[1]}"
    names = {"tensor": "tensor", "channel": "row", "token": "row"}
    if strategy not in names:
        raise NotExpressible(f"its strategy is {strategy!r}")
    return names[strategy]


def _input_spec(args: object) -> Spec | None:
    if args is None:
        return None
    if not isinstance(args, Mapping) or args.get("dynamic") is not True:
        raise NotExpressible("its inputs use fixed scales")
    if not args.get("symmetric", True) or args.get("scale_dtype"):
        raise NotExpressible("its inputs use zero points or quantized scales")
    grid = "e4m3" if _grid_name(args) == "e4m3" else f"int{args['num_bits']}h"
    return spec(f"{grid} | fp32/{_partition_name(args)}")


def _rank(target: str, name: str) -> int:
    return 0 if target == name else 1 if target.startswith("re:") else 2


def _matches(name: str, module: nn.Module, target: str) -> bool:
    if target.startswith("re:"):
        try:
            return re.match(target[3:], name) is not None
        except re.error as error:
            raise UserError(f"quantization_config: {target!r} is no pattern: {error}") from error
    return target == name or target in (kind.__name__ for kind in type(module).__mro__)


def only_multiplies(module: nn.Module) -> bool:
    """Whether a linear layer computes x W^T + b and nothing else (a router may do more)."""
    return type(module).forward is nn.Linear.forward


def _mapping(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not value:
        raise UserError(f"{where}: 'config_groups' must be a mapping of groups; found {value!r}")
    return value


def _pop(where: str, tensors: dict[str, Tensor], suffix: str) -> Tensor:
    if suffix not in tensors:
        raise UserError(f"{where}.{suffix} is missing from the checkpoint")
    return tensors.pop(suffix)


def _shaped(
    where: str,
    tensors: dict[str, Tensor],
    suffix: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    tensor = _pop(where, tensors, suffix)
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise UserError(
            f"{where}.{suffix} is {list(tensor.shape)} of {tensor.dtype}; expected {list(shape)} "
            f"of {dtype}"
        )
    return tensor
