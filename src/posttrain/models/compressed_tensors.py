"""The compressed-tensors schema: which number formats it can say and how it stores them.

`quantization_config` holds `config_groups`: each names its `targets` (module names, `re:` patterns or
the class "Linear"), arguments for `weights` and `input_activations`, and a storage `format`:

    pack-quantized        weight_packed I32 (codes + 2^(b-1), dense little-endian bit stream, rows
                          padded to words), weight_scale, weight_shape, weight_zero_point
    int-/float-quantized  weight I8 / F8_E4M3, weight_scale, weight_zero_point I8
    nvfp4-pack-quantized  weight_packed U8 (even element in the low nibble), weight_scale F8_E4M3,
                          weight_global_scale F32 (a divisor)
    mxfp4-/mxfp6-pack-quantized, mxfp8-quantized   codes U8 / F8_E4M3, weight_scale U8 (E8M0)

Source: compressed-tensors 0.20, quantization/quant_args.py and compressors/. Its reader decodes the
last three rows to bfloat16 whatever the model's dtype is, so those checkpoints must declare
bfloat16. Integer and float scales are read in the model's dtype. Readers before 0.18 packed 3, 5, 6
and 7 bits with gaps and refuse this stream; E4M3 tiles and mxfp6 need 0.20.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.models.plan import LayerPlan
from posttrain.numbers import Factor, QTensor, Spec, pack

METHOD = "compressed-tensors"
WORD = 4  # bytes: packed rows are padded to 32-bit words
STRATEGIES = {"tensor": "tensor", "row": "channel"}
FLOAT_SCALES = ("fp32", "fp16", "bf16")
DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class NotExpressible(Exception):
    """The schema, or its reader in transformers, cannot say this; the message says why."""


@dataclass(frozen=True)
class Block:
    """A block-scaled float format that has a storage format of its own."""

    format: str
    bits: int
    group: int
    strategy: str
    scale_dtype: str


# Canonical chain (element grid, then scale grids over partitions, scale rounding left out) -> row.
BLOCK_FORMATS = {
    "e2m1 | e4m3/g16 * fp32/tensor": Block(
        "nvfp4-pack-quantized", 4, 16, "tensor_group", "torch.float8_e4m3fn"
    ),
    "e2m1 | e8m0/g32": Block("mxfp4-pack-quantized", 4, 32, "group", "torch.uint8"),
    "e2m3 | e8m0/g32": Block("mxfp6-pack-quantized", 6, 32, "group", "torch.uint8"),
    "e4m3 | e8m0/g32": Block("mxfp8-quantized", 8, 32, "group", "torch.uint8"),
}
CHAIN_OF_FORMAT = {row.format: chain for chain, row in BLOCK_FORMATS.items()}


@dataclass(frozen=True)
class Scheme:
    """One config group: storage format, `weights` and `input_activations` arguments, and the dtype
    the model must have for the format's reader (None: any)."""

    format: str
    weights: dict[str, Any]
    inputs: dict[str, Any] | None = None
    dtype: torch.dtype | None = field(default=None)


# ------------------------------------------------------------------------------ Spec -> schema


def express(layer: LayerPlan, shape: tuple[int, ...]) -> Scheme:
    """The config group for a layer whose weight has this shape. Raises NotExpressible."""
    assert layer.weight is not None
    if len(shape) != 2:
        raise NotExpressible("experts kept as one 3-D parameter have no module it could target")
    if layer.branches:
        raise NotExpressible("it knows no additive branches")
    if layer.rotate:
        raise NotExpressible("its readers do not rotate inputs")
    if layer.outliers is not None:
        raise NotExpressible("its readers spare no channels of inputs")
    inputs = None if layer.input is None else _input_args(layer.input, shape[1])
    row = BLOCK_FORMATS.get(chain(layer.weight))
    if row is not None:
        return _block_scheme(row, inputs, shape[1])
    return _scaled_scheme(layer.weight, inputs, shape[1])


def chain(spec: Spec) -> str:
    """Grids and partitions of a spec without rounding rules; "" when it has nested factors."""
    if any(f.nested is not None or f.power != 1.0 or f.limit for f in spec.factors):
        return ""
    scales = " * ".join(f"{f.grid_name}/{f.partition}" for f in spec.factors)
    return f"{spec.grid.name} | {scales}"


def express_kv(kv: Spec | None) -> None:
    """Raises NotExpressible for any format of the KV cache: `kv_cache_scheme` has one static scale
    per tensor or head (`k_scale`, `v_scale`), and dynamic ones over all tokens of a call."""
    if kv is not None:
        raise NotExpressible("its kv_cache_scheme has no scale for each token and head")


def _block_scheme(row: Block, inputs: dict[str, Any] | None, columns: int) -> Scheme:
    if columns % row.group:
        raise NotExpressible(f"groups of {row.group} do not divide {columns} inputs")
    if inputs is not None:
        raise NotExpressible(f"its {row.format} does not go with this input format")
    weights = _args(row.bits, "float", row.strategy, group_size=row.group)
    return Scheme(row.format, weights | {"scale_dtype": row.scale_dtype}, None, torch.bfloat16)


def _scaled_scheme(weight: Spec, inputs: dict[str, Any] | None, columns: int) -> Scheme:
    """Integers or E4M3 with one float scale per tensor, row, group or (E4M3) 128 x 128 tile."""
    grid = weight.grid
    factor = _only_float_factor(weight)
    if grid.kind == "int" and grid.bits <= 8:
        strategy = _strategy(factor, columns)
        return _int_scheme(grid.bits, not grid.zero_point, strategy, inputs)
    if grid.name != "e4m3":
        raise NotExpressible(f"it has no {grid.name} codes with a {factor} scale")
    tiles = {"strategy": "block", "block_structure": [128, 128]}
    tiled = str(factor.partition) == "t128x128" and columns % 128 == 0
    strategy = tiles if tiled else _strategy(factor, columns)
    return Scheme("float-quantized", _args(8, "float", **strategy), inputs)


def _int_scheme(
    bits: int, symmetric: bool, strategy: dict[str, Any], inputs: dict[str, Any] | None
) -> Scheme:
    weights = _args(bits, "int", symmetric=symmetric, **strategy)
    whole_bytes = bits == 8 and inputs is not None and strategy["strategy"] != "group"
    if whole_bytes or (bits == 8 and not symmetric):
        return Scheme("int-quantized", weights, inputs)
    if not symmetric and strategy["strategy"] != "tensor":
        raise NotExpressible(
            "transformers reserves unpacked shapes for the packed zero points of pack-quantized, "
            "so it cannot load them"
        )
    # Named in every group: with integer inputs the format would otherwise be inferred as
    # int-quantized, one byte per weight.
    return Scheme("pack-quantized", weights, inputs)


def _input_args(spec: Spec, columns: int) -> dict[str, Any]:
    """Dynamic activations. The reader's own convention is absmax / 127.5 (int8h)."""
    grid = spec.grid
    names = {f"int{bits}h": (bits, "int") for bits in range(2, 9)} | {"e4m3": (8, "float")}
    if grid.name not in names or chain(spec) == "" or chain(spec) in BLOCK_FORMATS:
        raise NotExpressible(f"it has no input format {spec}")
    factor = _only_float_factor(spec)
    if factor.grid_name != "fp32" or spec.rounding != "rne":
        raise NotExpressible(f"inputs ({spec}) are scaled in float32 and rounded to nearest there")
    strategy = _strategy(factor, columns)
    if strategy["strategy"] == "channel":
        strategy = {"strategy": "token"}
    bits, kind = names[grid.name]
    return _args(bits, kind, **strategy) | {"dynamic": True}


def _only_float_factor(spec: Spec) -> Factor:
    if chain(spec) == "" or len(spec.factors) != 1:
        raise NotExpressible("it knows one scale per block, not this chain of factors")
    factor = spec.factors[0]
    if factor.grid_name not in FLOAT_SCALES:
        raise NotExpressible(f"it has no {spec.grid.name} codes with a {factor} scale")
    return factor


def _strategy(factor: Factor, columns: int) -> dict[str, Any]:
    name = str(factor.partition)
    if name in STRATEGIES:
        return {"strategy": STRATEGIES[name]}
    if not re.fullmatch(r"g\d+", name):
        raise NotExpressible(f"it has no scales per {name}")
    group = factor.partition.cols
    if columns % group:
        raise NotExpressible(f"groups of {group} do not divide {columns} inputs")
    return {"strategy": "group", "group_size": group}


def _args(bits: int, kind: str, strategy: str, **rest: Any) -> dict[str, Any]:
    fixed = {"num_bits": bits, "type": kind, "strategy": strategy}
    return {**fixed, "symmetric": True, "dynamic": False, "group_size": None, **rest}


# ------------------------------------------------------------------------------ writing


def quantization_config(
    layers: Mapping[str, LayerPlan],
    shapes: Mapping[str, tuple[int, ...]],
    model: nn.Module,
    kv: Spec | None = None,
) -> dict[str, Any]:
    """The `quantization_config` of config.json. `model`: the skeleton, to list what is ignored."""
    express_kv(kv)
    groups = _groups(layers, shapes)
    formats = sorted({scheme.format for scheme, _ in groups})
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return {
        "quant_method": METHOD,
        "format": formats[0] if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {
                "targets": ["Linear"] if len(groups) == 1 else names,
                "weights": scheme.weights,
                "input_activations": scheme.inputs,
                "output_activations": None,
                "format": scheme.format,
            }
            for i, (scheme, names) in enumerate(groups)
        },
        "ignore": [name for name in linears if name not in layers],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _groups(
    layers: Mapping[str, LayerPlan], shapes: Mapping[str, tuple[int, ...]]
) -> list[tuple[Scheme, list[str]]]:
    groups: list[tuple[Scheme, list[str]]] = []
    for name, layer in layers.items():
        scheme = express(layer, shapes[name])
        for known, names in groups:
            if known == scheme:
                names.append(name)
                break
        else:
            groups.append((scheme, [name]))
    return groups


def store(name: str, q: QTensor, layer: LayerPlan) -> dict[str, Tensor]:
    """The tensors of one layer, under their names in the checkpoint."""
    scheme = express(layer, tuple(q.shape))
    tensors = _store_codes(q, scheme) | _store_scales(q, scheme)
    return {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}


def _store_codes(q: QTensor, scheme: Scheme) -> dict[str, Tensor]:
    packed = pack(q.codes, q.spec.bits)
    if scheme.format == "int-quantized":
        return {
            "weight": (packed if scheme.weights["symmetric"] else packed ^ 128).view(torch.int8)
        }
    if scheme.format in ("float-quantized", "mxfp8-quantized"):
        return {"weight": packed.view(torch.float8_e4m3fn)}
    if scheme.format != "pack-quantized":
        return {"weight_packed": packed}
    if scheme.weights["symmetric"]:
        packed = packed ^ sign_bits(q.spec.bits, q.shape[-1])
    padded = nn.functional.pad(packed, (0, -packed.shape[-1] % WORD))
    return {"weight_packed": padded.view(torch.int32), "weight_shape": torch.tensor(q.shape)}


def sign_bits(bits: int, count: int) -> Tensor:
    """One packed row with the top bit of every code set: XOR with it turns two's complement codes
    (our layout) into codes + 2^(b-1) (theirs) and back, without unpacking."""
    return pack(torch.full((count,), 1 << (bits - 1), dtype=torch.uint8), bits)


def _store_scales(q: QTensor, scheme: Scheme) -> dict[str, Tensor]:
    first, *rest = q.scales.stored
    assert isinstance(first, Tensor)
    tensors = {"weight_scale": first}
    if scheme.weights["strategy"] == "tensor":
        tensors["weight_scale"] = first.reshape(1)
    if scheme.format == "nvfp4-pack-quantized":
        assert isinstance(rest[0], Tensor)
        tensors["weight_scale"] = first.view(torch.float8_e4m3fn)
        tensors["weight_global_scale"] = rest[0].reshape(1)
    if q.scales.zero_point is not None:
        middle = 1 << (scheme.weights["num_bits"] - 1)
        zero_point = (q.scales.zero_point.to(torch.int16) - middle).to(torch.int8)
        tensors["weight_zero_point"] = zero_point.reshape(tensors["weight_scale"].shape)
    return tensors


def rebuilt_by_its_reader(model: nn.Module) -> list[str]:
    """Modules that transformers swaps for others when it loads this schema (Llama 4's experts):
    tensors stored under this model's names would find no place there."""
    from transformers.quantizers import base

    table = getattr(base, "MODULES_TO_PATCH_FOR_QUANTIZATION", {})
    kinds = {kind for kind, row in table.items() if METHOD in row["quantization_methods"]}
    return [name for name, module in model.named_modules() if type(module).__name__ in kinds]
