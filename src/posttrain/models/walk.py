"""Walk a transformers causal language model: skeleton, decoder blocks, targets, fusion groups.

Nothing here knows a model's name. A *skeleton* is the module tree on the meta device; a *block* is
one element of the decoder's layer list; a *target* is a weight that quantization may replace.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from posttrain.errors import UserError

# Leaf names of projections that runtimes fuse into one matrix multiplication. Each row is one
# fusion; two leaves of a row under the same parent module form a group.
FUSED_LEAVES: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("linear", "linear_v"),
    ("fc_in", "fc_gate"),
)
_FUSION_ROW = {leaf: row for row, leaves in enumerate(FUSED_LEAVES) for leaf in leaves}
_EXPERT_INDEX = re.compile(r"\.experts\.\d+\.")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Target:
    """One quantizable weight.

    kind: "linear" (a module; weight [out, in]) or "experts" (a 3-D parameter, one matrix per expert).
    shape: [out, in] for a linear, the stored [experts, rows, cols] for experts.
    parameters: role -> full parameter name, e.g. {"weight": ..., "bias": ...}.
    transposed: experts stored as [experts, in, out], so the reduction axis is the middle one.
    """

    kind: str
    shape: tuple[int, ...]
    parameters: Mapping[str, str]
    transposed: bool = False


# ------------------------------------------------------------------------------------- skeleton


def skeleton(config: Any, dtype: torch.dtype | None = None) -> nn.Module:
    """The model of `config` on the meta device, in eval mode, weightless but complete.

    Non-persistent buffers (rotary frequencies, causal masks), which no checkpoint stores, are real
    and on the CPU. Parameters carry the dtype that loading will give them: `dtype`, or config.dtype,
    or float32, except those the architecture keeps in float32. To compute in another dtype than the
    config's, say so here: some buffers (Gemma's embedding scale) are rounded to it.
    """
    from transformers import AutoModelForCausalLM

    build: Any = AutoModelForCausalLM.from_config
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    try:
        with torch.device("meta"):
            model: Any = build(deepcopy(config), dtype=dtype)
    except (ValueError, TypeError, ImportError, AttributeError, KeyError) as error:
        raise UserError(
            f"cannot build a {getattr(config, 'model_type', '?')!r} causal language model "
            f"from its config: {' '.join(str(error).split())}"
        ) from error
    if hasattr(model, "tie_weights"):
        model.tie_weights()  # early transformers 5 ties only when loading
    _fill_computed_buffers(model)
    _keep_float32(model, dtype)
    walkable: nn.Module = model.eval().requires_grad_(False)
    return walkable


def _non_persistent(module: nn.Module) -> dict[str, torch.Tensor | None]:
    names = module._non_persistent_buffers_set
    return {name: buffer for name, buffer in module._buffers.items() if name in names}


def _fill_computed_buffers(model: nn.Module) -> None:
    """Give every non-persistent buffer its value, the way transformers itself does when loading.

    A constructor run on the meta device leaves such buffers empty; the architecture's own
    `_init_weights` recomputes them. Parameters are still on meta, so their initialisation costs
    nothing and draws no random numbers.
    """

    def visit(module: nn.Module, owner: Any) -> None:
        owner = module if hasattr(module, "_init_weights") else owner
        for child in module.children():
            visit(child, owner)
        computed = {n: b for n, b in _non_persistent(module).items() if b is not None}
        for name, buffer in computed.items():
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
        if computed:
            owner._init_weights(module)

    visit(model, None)


# Class attribute that lists what an architecture keeps in float32 -> the dtypes it guards against.
KEPT_IN_FLOAT32 = {
    "_keep_in_fp32_modules": (torch.float16,),
    "_keep_in_fp32_modules_strict": (torch.float16, torch.bfloat16),
}


def _keep_float32(model: Any, dtype: torch.dtype) -> None:
    """Retype the tensors that the architecture keeps in float32 whatever the model's dtype."""
    for attribute, guarded in KEPT_IN_FLOAT32.items():
        for pattern in (getattr(model, attribute, None) or ()) if dtype in guarded else ():
            found = re.compile(pattern.replace("*", r".*"))
            for name, tensor in model.state_dict(keep_vars=True).items():
                if found.search(name):
                    tensor.data = tensor.data.to(torch.float32)


# --------------------------------------------------------------------------------------- blocks


def _outer_module_lists(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    """(name, list) for each ModuleList that is not inside another ModuleList."""
    for name, child in module.named_children():
        full = f"{prefix}.{name}" if prefix else name
        if isinstance(child, nn.ModuleList):
            yield full, child
        else:
            yield from _outer_module_lists(child, full)


def _parameter_count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _text_decoder(model: Any) -> tuple[str, nn.Module]:
    """(name, module) of the text decoder: the whole model unless a multimodal one says otherwise."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    for name, module in model.named_modules():
        if module is decoder:
            return name, module
    return "", model


def decoder_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """[(full name, module)] of the decoder blocks in order: ("model.layers.0", ...), ...

    The block list is the outermost ModuleList of the text decoder whose length is the config's
    number of layers; among several, the one that holds the most parameters.
    Raises UserError when there is none.
    """
    prefix, decoder = _text_decoder(model)
    lists = [(name, blocks) for name, blocks in _outer_module_lists(decoder, prefix) if len(blocks)]
    config: Any = getattr(model, "config", None)
    if config is not None:
        layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
        lists = [(n, b) for n, b in lists if layers in (None, len(b))]
    if not lists:
        raise UserError(
            f"found no list of decoder blocks in {type(model).__name__}: "
            "posttrain walks models whose layers are one torch ModuleList"
        )
    name, blocks = max(lists, key=lambda item: _parameter_count(item[1]))
    return [(f"{name}.{index}", block) for index, block in enumerate(blocks)]


# -------------------------------------------------------------------------------------- targets


def quantizable(block_name: str, block: nn.Module) -> dict[str, Target]:
    """Full name -> Target for every weight of a block that quantization may replace.

    A linear is named by its module ("model.layers.0.mlp.up_proj"), experts by their parameter
    ("model.layers.0.mlp.experts.down_proj"). Raises UserError for a projection kind it cannot
    replace (GPT-2's transposed Conv1D): nothing is left out in silence.
    """
    found: dict[str, Target] = {}
    for local, module in block.named_modules():
        full = ".".join(part for part in (block_name, local) if part)
        found.update(_targets_of(full, module))
    return found


def _targets_of(full: str, module: nn.Module) -> dict[str, Target]:
    kind = type(module).__name__
    if kind == "Conv1D" and not isinstance(module, _CONVOLUTIONS):
        raise UserError(
            f"{full} is a Conv1D (GPT-2 stores its projections transposed): "
            "posttrain cannot quantize it; convert the checkpoint to torch Linear layers first"
        )
    if kind == "QuantLinear" or isinstance(module, nn.Linear):
        return {full: _linear_target(full, module)}
    if isinstance(module, _CONVOLUTIONS):
        return {}
    transposed = _is_transposed(module)
    return {
        f"{full}.{name}": _experts_target(full, name, module, transposed)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and min(parameter.shape[1:]) > 1
    }


def _is_transposed(module: Any) -> bool:
    """Whether experts multiply from the right, [experts, in, out] (GPT-OSS, Llama 4)."""
    if hasattr(module, "is_transposed"):
        return bool(module.is_transposed)
    hidden = getattr(module, "hidden_size", getattr(module, "hidden_dim", None))
    up = getattr(module, "gate_up_proj", getattr(module, "up_proj", None))
    if hidden is None or not isinstance(up, torch.Tensor) or up.dim() != 3:
        return False
    return bool(up.shape[1] == hidden != up.shape[2])


def _linear_target(full: str, module: nn.Module) -> Target:
    parameters = {"weight": f"{full}.weight"}
    if getattr(module, "bias", None) is not None:
        parameters["bias"] = f"{full}.bias"
    shape = (int(module.out_features), int(module.in_features))  # type: ignore[arg-type]
    return Target("linear", shape, parameters)


def _experts_target(full: str, name: str, module: nn.Module, transposed: bool) -> Target:
    parameters = {"weight": f"{full}.{name}"}
    if getattr(module, f"{name}_bias", None) is not None:
        parameters["bias"] = f"{full}.{name}_bias"
    return Target("experts", tuple(getattr(module, name).shape), parameters, transposed)


def tied_head(model: Any) -> tuple[str, str] | None:
    """(output head, input embedding) by name where they share one weight, else None."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not isinstance(head, nn.Linear) or head.weight is not getattr(embedding, "weight", None):
        return None
    names = {id(module): name for name, module in model.named_modules()}
    return names[id(head)], names[id(embedding)]


# -------------------------------------------------------------------------------- fusion groups


def _fusion_key(name: str) -> str:
    """Names with equal keys are fused by runtimes: siblings of one row, and all experts of it."""
    name = _EXPERT_INDEX.sub(".experts.*.", name)
    parent, _, leaf = name.rpartition(".")
    row = _FUSION_ROW.get(leaf)
    return f"{parent}.<{row}>" if row is not None else name


def fusion_groups(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Partition names into the groups that must share one format: q/k/v, gate/up, experts.

    Groups come in the order of their first member; members keep the order given. A name that
    nothing is fused with is a group of one.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_fusion_key(name), []).append(name)
    return [tuple(group) for group in groups.values()]


# --------------------------------------------------------------------------------------- assign


def assign(
    module: nn.Module,
    prefix: str,
    tensors: Mapping[str, torch.Tensor],
    dtype: torch.dtype | None = None,
) -> None:
    """Put tensors (full name -> value) into the meta parameters and buffers of `module`, in place.

    prefix: the full name of `module` itself ("" for the whole model); every name must lie under it.
    dtype: floating tensors are cast to it; None casts to the dtype of the slot they fill, which is
    what `from_pretrained` does. A parameter shared by several modules under `module` (tied head)
    is replaced in all of them. Raises UserError for a name without a slot or a wrong shape.
    """
    modules = dict(module.named_modules(remove_duplicate=False))
    alive = list(module.parameters())  # so that no id in `sharers` is given to a new object
    sharers = _sharers(modules.values())
    for name, tensor in tensors.items():
        path, _, leaf = _local_name(prefix, name).rpartition(".")
        owner = modules.get(path)
        old = None if owner is None else _slot(owner, leaf)
        if owner is None or old is None:
            raise UserError(f"tensor {name} has no place in {type(module).__name__}")
        value = _fit(name, tensor, old, dtype)
        if leaf in owner._buffers:
            owner._buffers[leaf] = value
            continue
        parameter = nn.Parameter(value, requires_grad=False)
        sharers[id(parameter)] = sharers[id(old)]
        for sharer, key in sharers[id(old)]:
            sharer._parameters[key] = parameter
    del alive


def _sharers(modules: Iterable[nn.Module]) -> dict[int, list[tuple[nn.Module, str]]]:
    """id of a parameter -> every (module, name) that holds it."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in modules:
        for key, value in module._parameters.items():
            found.setdefault(id(value), []).append((module, key))
    return found


def _local_name(prefix: str, name: str) -> str:
    if not prefix:
        return name
    if not name.startswith(prefix + "."):
        raise UserError(f"tensor {name} does not belong to module {prefix}")
    return name[len(prefix) + 1 :]


def _slot(owner: nn.Module, leaf: str) -> torch.Tensor | None:
    parameter = owner._parameters.get(leaf)
    return parameter if parameter is not None else owner._buffers.get(leaf)


def _fit(
    name: str, tensor: torch.Tensor, slot: torch.Tensor, dtype: torch.dtype | None
) -> torch.Tensor:
    if tensor.shape != slot.shape:
        raise UserError(
            f"tensor {name} has shape {list(tensor.shape)}, the model expects {list(slot.shape)}"
        )
    if not tensor.is_floating_point():
        return tensor
    return tensor.to(dtype or slot.dtype)
