"""Load any model: full precision, GGUF, compressed-tensors, our own format, or another tool's.

Tensors are read block by block into a skeleton on the meta device, so memory never holds two
copies of the model. Quantized layers become `QuantLinear`; every tensor of the checkpoint must find
its place and every parameter its tensor.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from posttrain import kernels
from posttrain.errors import UserError, did_you_mean
from posttrain.models import compressed_reader, compressed_tensors, experts, native
from posttrain.models.base import DTYPES, Source, one_line
from posttrain.models.branches import Columns, LowRank
from posttrain.models.checkpoint import check_finished
from posttrain.models.linear import (
    QuantLinear,
    TiedEmbedding,
    check_resident,
    require_plain_embedding,
)
from posttrain.models.plan import LayerPlan, shorten
from posttrain.models.source import open_source
from posttrain.models.walk import Target, assign, decoder_blocks, quantizable, skeleton


def load(model: str | Path, *, dtype: str | torch.dtype = "auto", resident: str = "packed") -> Any:
    """Load a model for inference.

    model: a directory, hub id, .gguf file or "demo"; quantized or not.
    dtype: compute dtype: "auto" (what config.json says), "float32", "bfloat16" or "float16".
    resident: "packed" keeps quantized weights packed and expands them for every product;
        "dequantized" also keeps them expanded after their first use (the same results bit for bit);
        "native" packs them for the native kernels (fastest; results differ by float32 rounding).

    Returns the transformers model in eval mode, with `.tokenizer` and `.posttrain`, a dictionary
    of `source`, `format`, `implementation`, `dtype`, `expanded_from` and `notes` (see `Source`),
    `parameters`, `bits_per_weight`, `bytes` and `bytes_quantized` (see `model_size`). Raises
    UserError for anything wrong with the files.
    """
    check_resident(resident)
    path = Path(os.path.expanduser(model))
    if path.is_dir():
        check_finished(path)
    source = open_source(model)
    loaded, how = _load(source, _dtype(dtype, source))
    set_resident(loaded, resident)
    how["implementation"] = how["implementation"] or implementation(loaded)
    info: dict[str, Any] = {"source": source.name, **how, "dtype": _name(loaded.config.dtype)}
    info["notes"] = [*source.notes, *how.get("notes", ())]
    info["expanded_from"] = source.expanded_from
    loaded.posttrain = info | stored_size(source, loaded)
    loaded.tokenizer = _tokenizer(source)
    return loaded.eval()


def load_source(source: Source, dtype: torch.dtype, resident: str = "packed") -> Any:
    """The model of an open source, without tokenizer and without what `load` says of it."""
    model, _ = _load(source, dtype)
    set_resident(model, resident)
    return model.eval()


def set_resident(model: nn.Module, how: str) -> None:
    """Choose what all quantized layers keep in memory and compute with (see `load`)."""
    check_resident(how)
    if how == "native" and not kernels.available():
        found = kernels.find()
        warnings.warn(
            f"no native kernels, so PyTorch computes, several times slower: {found.reason}; "
            f"fix: {found.fix}",
            stacklevel=2,
        )
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.resident = how
        for record in experts.records(module).values():
            record.keep, record.dense = how == "dequantized", None


def implementation(model: nn.Module) -> str:
    """What computes a model's quantized linears, or "torch" where it has none."""
    names = {getattr(module, "implementation", None) for module in model.modules()}
    return ", ".join(sorted(name for name in names if isinstance(name, str))) or "torch"


def _load(source: Source, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    try:
        return _dispatch(source, dtype)
    except UserError as error:
        if str(source.path) in str(error):
            raise
        raise UserError(f"{source.path}: {error}") from error


def _dispatch(source: Source, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    config = source.quantization_config
    if config is None:
        return _load_plain(source, dtype), {"format": "none", "implementation": "torch"}
    method = str(config.get("quant_method"))
    if method == native.METHOD:
        model = _load_native(source, config, dtype)
    elif method == compressed_tensors.METHOD:
        try:
            reader = compressed_reader.Reader(config, f"{source.path}/config.json")
            model = _load_compressed(source, reader, dtype)
        except compressed_tensors.NotExpressible:
            return _load_foreign(source, method, dtype)
    else:
        return _load_foreign(source, method, dtype)
    return model, {"format": method, "implementation": None}


# ------------------------------------------------------------------------------ full precision


def _load_plain(source: Source, dtype: torch.dtype) -> Any:
    model = _skeleton(source, dtype)
    for name in source.tensor_names():
        assign(model, "", source.read([name]))
    return _finished(model, source)


def _skeleton(source: Source, dtype: torch.dtype) -> Any:
    model: Any = skeleton(source.config, dtype)
    model.config.dtype = dtype
    if (source.path / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(source.path)
    return model


def _finished(model: Any, source: Source) -> Any:
    """The model, if every parameter and buffer found its tensor."""
    named = [*model.named_parameters(), *model.named_buffers()]
    lost = [name for name, tensor in named if tensor.is_meta]
    if lost:
        raise UserError(f"{source.path}: the checkpoint lacks {shorten(lost)}")
    return model


# ------------------------------------------------------------------------------ our own format


def install(model: nn.Module, config: Mapping[str, Any], where: str) -> None:
    """Replace every layer that a `quantization_config` of our format names by an empty quantized
    one, on the meta device."""
    layers = native.read_config(config, where)
    _install_layers(model, layers, where)
    for embedding, head in native.read_tied(config, layers, where).items():
        require_plain_embedding(model, embedding)
        model.set_submodule(embedding, TiedEmbedding(model.get_submodule(head)))  # type: ignore[arg-type]


def _install_layers(model: nn.Module, layers: Mapping[str, LayerPlan], where: str) -> None:
    targets = _expert_targets(model, layers, where)
    for name, layer in layers.items():
        parent_name, _, leaf = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        if leaf in parent._parameters:
            if name not in targets:
                raise UserError(f"{where}: {name} is a parameter that cannot be quantized")
            experts.quantize_parameter(parent, leaf, layer, targets[name].transposed)
            continue
        old = _submodule(model, name, name, where)
        if not isinstance(old, nn.Linear) or not compressed_reader.only_multiplies(old):
            raise UserError(
                f"{where}: {name} is a {type(old).__name__}, which QuantLinear cannot replace; "
                "list it under 'ignore' when quantizing"
            )
        new = QuantLinear.empty(
            old.out_features, old.in_features, layer, old.bias is not None, old.weight.dtype
        )
        setattr(parent, leaf, new)


def _expert_targets(
    model: nn.Module, layers: Mapping[str, LayerPlan], where: str
) -> dict[str, Target]:
    """Targets of the modules that own quantized parameters, before anything is replaced."""
    found: dict[str, Target] = {}
    for name in layers:
        parent_name, _, leaf = name.rpartition(".")
        parent = _submodule(model, parent_name, name, where)
        if leaf in parent._parameters and name not in found:
            found |= quantizable(parent_name, parent)
    return found


def _submodule(model: nn.Module, path: str, name: str, where: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise UserError(f"{where}: {name} is quantized, but the model has no such layer") from None


def _load_native(source: Source, config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    model = _skeleton(source, dtype)
    install(model, config, f"{source.path}/config.json")
    _check_names(model, source)
    for names in _units(model, source.tensor_names()):
        tensors = source.read(names)
        assign(model, "", {name: tensors.pop(name) for name in names if not _stored(model, name)})
        for name, tensor in tensors.items():
            _fill_buffer(model, name, tensor, source)
    return _finished(model, source)


def _check_names(model: nn.Module, source: Source) -> None:
    known, stored = set(model.state_dict()), set(source.tensor_names())
    unexpected = sorted(stored - known)
    if unexpected:
        raise UserError(f"{source.path}: the model has no place for {shorten(unexpected)}")


def _stored(model: nn.Module, name: str) -> bool:
    """Whether this tensor is part of a quantized weight, whose dtype must not change."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if isinstance(module, QuantLinear):
        return leaf != "bias"
    if isinstance(module, (LowRank, Columns)):
        return True
    return leaf in module._buffers and any(
        leaf.startswith(parameter) for parameter in experts.records(module)
    )


def _fill_buffer(model: nn.Module, name: str, tensor: Tensor, source: Source) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    expected = module._buffers[leaf]
    assert expected is not None
    if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
        raise UserError(
            f"{source.path}: {name} is {list(tensor.shape)} of {tensor.dtype}; expected "
            f"{list(expected.shape)} of {expected.dtype}"
        )
    module._buffers[leaf] = tensor


# ------------------------------------------------------------------------------ compressed-tensors


def _load_compressed(source: Source, reader: compressed_reader.Reader, dtype: torch.dtype) -> Any:
    model = _skeleton(source, dtype)
    reader.check_names(source.tensor_names())
    grouped = {
        name: group
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (group := reader.group_of(name, module)) is not None
    }
    for names in _units(model, source.tensor_names()):
        tensors = source.read(names)
        for name in {key.rpartition(".")[0] for key in names} & grouped.keys():
            own = {key: tensors.pop(key) for key in names if key.rpartition(".")[0] == name}
            _replace(model, name, own, grouped[name], source, dtype)
        assign(model, "", tensors)
    return _finished(model, source)


def _replace(
    model: nn.Module,
    name: str,
    tensors: Mapping[str, Tensor],
    group: compressed_reader.Group,
    source: Source,
    dtype: torch.dtype,
) -> None:
    parent, _, leaf = name.rpartition(".")
    old: Any = model.get_submodule(name)
    local = {key.rpartition(".")[2]: tensor for key, tensor in tensors.items()}
    where = f"{source.path}: {name}"
    shape = (old.out_features, old.in_features)
    layer, weight = compressed_reader.read_module(where, local, group, shape, dtype)
    bias = local.pop("bias", None)
    if (bias is None) != (old.bias is None) or local:
        wrong = shorten([f"{name}.{key}" for key in local]) if local else f"{name}.bias"
        raise UserError(f"{source.path}: tensors do not fit {name}: {wrong}")
    new = QuantLinear.from_packed(*shape, layer, weight, bias, dtype)
    setattr(model.get_submodule(parent), leaf, new)


# ------------------------------------------------------------------------------ other tools


def _load_foreign(source: Source, method: str, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """Hand a checkpoint of another tool to transformers."""
    from transformers import AutoModelForCausalLM
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as known

    if method not in known and f"{method}_4bit" not in known:
        raise UserError(
            f"{source.path}/config.json: unknown quant_method {method!r}"
            + did_you_mean(method, known)
        )
    try:
        both: Any = AutoModelForCausalLM.from_pretrained(
            source.path, dtype=dtype, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # the libraries of other tools raise whatever their authors chose
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{source.path}: transformers cannot load {method}: {reason}") from error
    model, found = both
    unset = sorted(set(found["missing_keys"]) | {name for name, *_ in found["mismatched_keys"]})
    notes: list[str] = []
    if unset:  # transformers says so in a log
        more = ", ..." if len(unset) > 3 else ""
        notes.append(
            f"{len(unset)} tensors are not in the checkpoint, or not of their shape, and hold what "
            f"transformers began with: {', '.join(unset[:3])}{more}"
        )
    return model, {"format": method, "implementation": "transformers", "notes": notes}


# ------------------------------------------------------------------------------ pieces


def _units(model: nn.Module, names: Iterable[str]) -> list[list[str]]:
    """Tensor names cut into one list per decoder block and one per remaining module."""
    blocks = tuple(f"{name}." for name, _ in decoder_blocks(model))
    units: dict[str, list[str]] = {}
    for name in names:
        unit = next((prefix for prefix in blocks if name.startswith(prefix)), None)
        units.setdefault(unit or name.rpartition(".")[0], []).append(name)
    return list(units.values())


def _dtype(dtype: str | torch.dtype, source: Source) -> torch.dtype:
    if dtype == "auto":
        found: torch.dtype = source.config.dtype
        return found
    if isinstance(dtype, torch.dtype):
        return dtype
    name = dtype.removeprefix("torch.")
    if name not in DTYPES:
        raise UserError(f"dtype={dtype!r} is not known{did_you_mean(name, ['auto', *DTYPES])}")
    return DTYPES[name]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class NoTokenizer:
    """Stands where a tokenizer would; using it raises the UserError that says why there is none."""

    def __init__(self, error: UserError) -> None:
        self.__dict__["error"] = error

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise self.__dict__["error"]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise self.__dict__["error"]

    def __bool__(self) -> bool:
        return False


def _tokenizer(source: Source) -> Any:
    try:
        return source.tokenizer()
    except UserError as error:
        return NoTokenizer(error)


# ------------------------------------------------------------------------------ size


def model_size(model: nn.Module) -> dict[str, Any]:
    """What a model takes when stored.

    `parameters`: weights and biases, each counted once (ties once; scales are not parameters).
    `bytes` = `bytes_total`: all that is stored; `bytes_quantized`: the part of it in quantized
    layers; `bits_per_weight`: 8 * bytes / parameters. For a model from `load` the bytes are those
    of its checkpoint, else those in memory.
    """
    info: Any = getattr(model, "posttrain", None)
    keys = ("parameters", "bytes", "bytes_total", "bytes_quantized", "bits_per_weight")
    if isinstance(info, Mapping):
        return {key: info[key] for key in keys}
    quantized = total = 0
    for owned, is_quantized in _owned_bytes(model):
        total += owned
        quantized += owned if is_quantized else 0
    return _size(total, quantized, count_parameters(model))


def count_parameters(model: nn.Module) -> int:
    """Weights and biases; a quantized weight counts its elements, tied parameters count once."""
    seen = {id(p): p.numel() for p in model.parameters()}
    packed = 0
    for module in model.modules():
        if isinstance(module, QuantLinear):
            packed += module.out_features * module.in_features
        packed += sum(math.prod(record.shape) for record in experts.records(module).values())
    return sum(seen.values()) + packed


def _owned_bytes(model: nn.Module) -> Iterable[tuple[int, bool]]:
    seen: dict[int, Tensor] = {}  # holds what it names, so that no id is given out again
    for module in model.modules():
        buffers = set(module._buffers) - module._non_persistent_buffers_set
        stored = module.stored_buffers() if isinstance(module, QuantLinear) else module._buffers
        own = [*module._parameters.values(), *(stored[name] for name in buffers)]
        quantized = isinstance(module, QuantLinear) or bool(experts.records(module))
        for tensor in own:
            if tensor is not None and id(tensor) not in seen:
                seen[id(tensor)] = tensor
                yield tensor.numel() * tensor.element_size(), quantized


def stored_size(source: Source, model: nn.Module) -> dict[str, Any]:
    """`model_size` from the bytes of a source's tensors."""
    sizes = _stored_bytes(source)
    marks = tuple(
        f"{name}." for name, module in model.named_modules() if isinstance(module, QuantLinear)
    )
    marks += tuple(
        f"{name}.{parameter}_"
        for name, module in model.named_modules()
        for parameter in experts.records(module)
    )
    quantized = sum(size for name, size in sizes.items() if marks and name.startswith(marks))
    parameters = count_parameters(model)
    if source.quantization_config is not None and not marks:  # loaded by transformers
        parameters = count_parameters(skeleton(source.config))
    return _size(sum(sizes.values()), quantized, parameters)


def _stored_bytes(source: Source) -> dict[str, int]:
    """Bytes of every tensor on disk; a GGUF source decodes to float32, so its file is asked."""
    if source.kind != "gguf":
        return {name: source.nbytes(name) for name in source.tensor_names()}
    from posttrain.models.gguf_file import read_gguf_header

    return {name: t.nbytes for name, t in read_gguf_header(source.path).tensors.items()}


def _size(total: int, quantized: int, parameters: int) -> dict[str, Any]:
    return {
        "parameters": parameters,
        "bytes": total,
        "bytes_total": total,
        "bytes_quantized": quantized,
        "bits_per_weight": 8 * total / parameters if parameters else 0.0,
    }
