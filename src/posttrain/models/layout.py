"""From the tensors a checkpoint stores to the parameters a transformers module tree has.

Most names agree. Where they do not (experts stored one by one and held as one 3-D parameter,
renamed modules), transformers keeps a table of conversions for its own loader; this uses the same
table, so a checkpoint that `from_pretrained` reads is read here to the same values.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from posttrain.errors import UserError
from posttrain.models.base import Entry
from posttrain.models.shards import StoredTensor

# Buffers that older checkpoints store and current models recompute.
STALE_BUFFERS = re.compile(
    r"(rotary_emb\.inv_freq|rotary_pos_emb\.inv_freq|position_ids|\.attn\.masked_bias"
    r"|\.attn\.bias|\.attention\.masked_bias|\.attention\.bias)$"
)
# How many names an error lists.
LISTED = 5

Stored = Mapping[str, StoredTensor]


def module_entries(model: Any, stored: Stored, where: Path) -> dict[str, Entry]:
    """Name -> Entry for every parameter and persistent buffer of the skeleton, in module order.

    A tied parameter appears once, under the name of the parameter it is tied to. Raises UserError
    naming what is missing, unexpected or misshapen.
    """
    slots = tensor_slots(model)
    claims = _claims(model, stored)
    found: dict[str, Entry] = {}
    unexpected: list[str] = []
    for (name, pattern), keys in claims.items():
        made = _entries_for(model, name, pattern, keys, stored, slots)
        unexpected += [] if made else keys
        found.update(made)
    check_coverage(model, slots, found, unexpected, where)
    return {name: found[name] for name in slots}


def tensor_slots(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of the state dict, each once: of tied names, the source of the tie."""
    tied = tied_names(model)
    return {n: t for n, t in model.state_dict(keep_vars=True).items() if n not in tied}


def tied_names(model: Any) -> dict[str, str]:
    """Target -> source for parameters that are really one tensor ("lm_head.weight" -> ...)."""
    state = model.state_dict(keep_vars=True)
    declared: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return {
        target: source
        for target, source in declared.items()
        if target in state and source in state and state[target] is state[source]
    }


# -------------------------------------------------------- names, by transformers' conversion table


def _conversions(model: Any) -> tuple[list[Any], list[Any]]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    table = deepcopy(get_model_conversion_mapping(model) or [])
    renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in table if isinstance(entry, WeightConverter)]
    return renamings, converters


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sort key that puts experts.2 before experts.10."""
    return [(0, int(p)) if p.isdigit() else (1, p) for p in name.split(".")]


Claim = tuple[str, int]  # (target name, index of the converter or -1)


def _claims(model: Any, stored: Stored) -> dict[Claim, list[str]]:
    """Group stored names by the parameter they become."""
    from transformers.core_model_loading import rename_source_key

    renamings, converters = _conversions(model)
    by_pattern = {p: i for i, c in enumerate(converters) for p in c.source_patterns}
    state = model.state_dict()
    base = model.base_model_prefix
    claims: dict[Claim, list[str]] = {}
    for key in sorted(stored, key=_natural):
        name, pattern = rename_source_key(key, renamings, converters, base, state)
        if name not in state and key in state:
            name, pattern = key, None
        claims.setdefault((name, by_pattern.get(pattern, -1)), []).append(key)
    return claims


def _entries_for(
    model: Any,
    name: str,
    converter_index: int,
    keys: list[str],
    stored: Stored,
    slots: Mapping[str, torch.Tensor],
) -> dict[str, Entry]:
    """The entries that the stored `keys` make; {} when the model has no place for them."""
    if converter_index < 0:
        if name not in slots:
            return {}
        return {name: Entry(stored[keys[-1]].shape, stored[keys[-1]].dtype, stored[keys[-1]].read)}
    converter = _conversions(model)[1][converter_index]
    targets = [name.replace(converter.target_patterns[0], t, 1) for t in converter.target_patterns]
    if any(target not in slots for target in targets):
        return {}
    dtype = stored[keys[0]].dtype
    return {
        target: Entry(
            tuple(slots[target].shape),
            dtype,
            _conversion(model, name, target, converter, keys, stored, slots[target]),
        )
        for target in targets
    }


# ------------------------------------------------------------------------------------ conversion


def _conversion(
    model: Any,
    name: str,
    target: str,
    converter: Any,
    keys: list[str],
    stored: Stored,
    slot: torch.Tensor,
) -> Callable[[], torch.Tensor]:
    """How to build `target` from several stored tensors."""
    sources = _by_source_pattern(model, converter, keys)
    steps = [(type(op).__name__, getattr(op, "dim", None)) for op in converter.operations]
    if steps in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]):
        columns = [[stored[key] for key in column] for column in sources.values()]
        _check_experts(target, columns, slot)
        return lambda: _stack_experts(columns, tuple(slot.shape))

    def build() -> torch.Tensor:
        # Rare operations (transpose, split, ...): transformers' own code, on tensors read now.
        run = deepcopy(converter)
        for pattern, column in sources.items():
            for key in column:
                run.add_tensor(name, key, pattern, stored[key].read)
        made = run.convert(name, model=model, config=model.config)
        value: torch.Tensor = made[target][0] if isinstance(made[target], list) else made[target]
        return value.contiguous()

    return build


def _by_source_pattern(model: Any, converter: Any, keys: Iterable[str]) -> dict[str, list[str]]:
    """Stored names under the pattern that matches each, patterns in the converter's order."""
    from transformers.core_model_loading import rename_source_key

    renamings = _conversions(model)[0]
    found: dict[str, list[str]] = {pattern: [] for pattern in converter.source_patterns}
    for key in keys:
        _, pattern = rename_source_key(key, renamings, [deepcopy(converter)])
        found[pattern].append(key)
    return {pattern: column for pattern, column in found.items() if column}


def _check_experts(target: str, columns: list[list[StoredTensor]], slot: torch.Tensor) -> None:
    """Every column has one [rows, cols] matrix per expert, and the rows add up to the slot's."""
    experts, rows, cols = slot.shape
    for column in columns:
        if len(column) != experts:
            raise UserError(
                f"{column[0].file}: {target} needs {experts} experts, the checkpoint has {len(column)}"
            )
    shapes = {(sum(column[e].shape[0] for column in columns), cols) for e in range(experts)}
    found = {(sum(c[e].shape[0] for c in columns), c[e].shape[-1]) for e in range(experts) for c in columns}
    if found != shapes or shapes != {(rows, cols)}:
        raise UserError(f"{columns[0][0].file}: experts of {target} do not fit {list(slot.shape)}")


def _stack_experts(
    columns: list[list[StoredTensor]], shape: tuple[int, ...]
) -> torch.Tensor:
    """[experts, rows, cols]: each expert's matrices one above the other, read in place."""
    out = torch.empty(shape, dtype=columns[0][0].dtype)
    top = 0
    for column in columns:
        bottom = top + column[0].shape[0]
        for expert, matrix in enumerate(column):
            matrix.read(out[expert, top:bottom])
        top = bottom
    return out


# -------------------------------------------------------------------------------------- coverage


def check_coverage(
    model: Any,
    slots: Mapping[str, torch.Tensor],
    found: Mapping[str, Entry],
    unexpected: list[str],
    where: Path,
) -> None:
    """Every slot filled with the right shape, nothing left over but known stale buffers."""
    missing = [name for name in slots if name not in found]
    if missing:
        raise UserError(
            f"{where}: the checkpoint lacks {_listing(missing)} "
            f"that {type(model).__name__} needs; it is incomplete or of another architecture"
        )
    for name, slot in slots.items():
        if found[name].shape != tuple(slot.shape):
            raise UserError(
                f"{where}: tensor {name} has shape {list(found[name].shape)} but its config "
                f"asks for {list(slot.shape)}"
            )
    extra = [name for name in unexpected if not _tolerated(model, name)]
    if extra:
        raise UserError(
            f"{where}: the checkpoint holds {_listing(extra)} for which {type(model).__name__} "
            "has no place; its config does not match its weights"
        )


def _tolerated(model: Any, name: str) -> bool:
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    tied = tied_names(model)
    return bool(
        name in tied
        or STALE_BUFFERS.search(name)
        or any(re.search(pattern, name) for pattern in patterns)
    )


def _listing(names: list[str]) -> str:
    shown = ", ".join(names[:LISTED])
    return f"{len(names)} tensor{'s' * (len(names) > 1)} ({shown}{', ...' * (len(names) > LISTED)})"
