"""From the tensors a checkpoint stores to the parameters a transformers module tree has.

Most names agree. Where they do not (experts stored one by one and held as one 3-D parameter,
renamed modules), transformers keeps a table of conversions for its own loader; this uses the same
table, so a checkpoint that `from_pretrained` reads is read here to the same values.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from posttrain.errors import UserError
from posttrain.models.base import Entry
from posttrain.models.shards import OpenFiles, StoredTensor

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
    table = Conversions(model)
    slots = tensor_slots(model)
    found: dict[str, Entry] = {}
    unexpected: list[str] = []
    for claim, keys in table.claims(stored).items():
        made = _entries_for(table, claim, {key: stored[key] for key in keys})
        unexpected += [] if made else keys
        found.update(made)
    _settle_ties(tied_names(model), found, where)
    check_coverage(model, slots, found, unexpected, where)
    return {name: found[name] for name in slots}


def tensor_slots(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of the state dict, each once: of tied names, the source of the tie."""
    tied = tied_names(model)
    return {n: t for n, t in model.state_dict(keep_vars=True).items() if n not in tied}


# ------------------------------------------------------------------------------------------ ties


def tied_names(model: Any) -> dict[str, str]:
    """Target -> source for parameters that are really one tensor ("lm_head.weight" -> ...)."""
    state = model.state_dict(keep_vars=True)
    declared: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return {
        target: source
        for target, source in declared.items()
        if target in state and source in state and state[target] is state[source]
    }


def _settle_ties(tied: Mapping[str, str], found: dict[str, Entry], where: Path) -> None:
    """Checkpoints may store a tied tensor under either name, or under both if they agree."""
    for target, source in tied.items():
        if target not in found:
            continue
        entry = found.pop(target)
        if source in found and not _same_values(entry, found[source]):
            raise UserError(
                f"{where}: its config ties {target} to {source}, but the checkpoint holds different "
                'values for the two; set "tie_word_embeddings": false in config.json'
            )
        found.setdefault(source, entry)


def _same_values(a: Entry, b: Entry) -> bool:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    with OpenFiles() as files:
        return torch.equal(a.build(files), b.build(files))


# -------------------------------------------------------- names, by transformers' conversion table

Claim = tuple[str, int]  # (name in the model, index of the converter or -1)


class Conversions:
    """transformers' own table of renamings and conversions for one model."""

    def __init__(self, model: Any):
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        table = get_model_conversion_mapping(model) or []
        self.model = model
        self.state: dict[str, torch.Tensor] = model.state_dict()
        self.renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
        self.converters = [entry for entry in table if isinstance(entry, WeightConverter)]

    def rename(self, key: str) -> tuple[str, str | None]:
        """(name in the model, source pattern of the converter that will make it, or None)."""
        from transformers.core_model_loading import rename_source_key

        base = self.model.base_model_prefix
        name, pattern = rename_source_key(key, self.renamings, self.converters, base, self.state)
        return (key, None) if name not in self.state and key in self.state else (name, pattern)

    def claims(self, stored: Stored) -> dict[Claim, list[str]]:
        """Group stored names by the parameter they become, numbered parts in numeric order."""
        index = {p: i for i, c in enumerate(self.converters) for p in c.source_patterns}
        claims: dict[Claim, list[str]] = {}
        for key in sorted(stored, key=_natural):
            name, pattern = self.rename(key)
            claims.setdefault((name, index[pattern] if pattern else -1), []).append(key)
        return claims

    def columns(self, converter: Any, keys: Iterable[str]) -> dict[str, list[str]]:
        """Stored names under the source pattern that matches each, in the converter's order."""
        found: dict[str, list[str]] = {pattern: [] for pattern in converter.source_patterns}
        for key in keys:
            found[self.rename(key)[1] or ""].append(key)
        return {pattern: column for pattern, column in found.items() if column}


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts experts.2 before experts.10."""
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in name.split(".")]


def _entries_for(table: Conversions, claim: Claim, stored: Stored) -> dict[str, Entry]:
    """The entries that the stored tensors of one claim make; {} if the model has no place."""
    name, index = claim
    if index < 0:
        tensor = list(stored.values())[-1]
        return {name: Entry(tensor.shape, tensor.dtype, tensor.read)} if name in table.state else {}
    converter = table.converters[index]
    targets = [name.replace(converter.target_patterns[0], t, 1) for t in converter.target_patterns]
    if any(target not in table.state for target in targets):
        return {}
    dtype = next(iter(stored.values())).dtype
    return {
        target: Entry(
            tuple(table.state[target].shape),
            dtype,
            _conversion(table, converter, name, target, stored),
        )
        for target in targets
    }


# ------------------------------------------------------------------------------------ conversion


def _conversion(
    table: Conversions, converter: Any, name: str, target: str, stored: Stored
) -> Callable[[OpenFiles], torch.Tensor]:
    """How to build `target` from several stored tensors."""
    names = table.columns(converter, stored)
    steps = [(type(op).__name__, getattr(op, "dim", None)) for op in converter.operations]
    if steps in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]):
        columns = [[stored[key] for key in column] for column in names.values()]
        shape = tuple(table.state[target].shape)
        _check_experts(target, columns, shape)
        return lambda files: _stack_experts(files, columns, shape)

    def build(files: OpenFiles) -> torch.Tensor:
        # Rare operations (transpose, split, ...): transformers' own code, on tensors read now.
        run = deepcopy(converter)
        for pattern, column in names.items():
            for key in column:
                run.add_tensor(name, key, pattern, partial(stored[key].read, files))
        made = run.convert(name, model=table.model, config=table.model.config)
        made = made[0] if isinstance(made, tuple) else made  # early versions add a list of errors
        value: torch.Tensor = made[target][0] if isinstance(made[target], list) else made[target]
        return value.contiguous()

    return build


def _check_experts(target: str, columns: list[list[StoredTensor]], shape: tuple[int, ...]) -> None:
    """Every column has one [rows, cols] matrix per expert, and the rows add up to the slot's."""
    experts, rows, cols = shape
    file = columns[0][0].file
    for column in columns:
        if len(column) != experts:
            raise UserError(
                f"{file}: {target} needs {experts} experts, the checkpoint has {len(column)}"
            )
        if {tensor.shape for tensor in column} != {(column[0].shape[0], cols)}:
            raise UserError(f"{file}: the experts of {target} differ in shape")
    dtypes = sorted({str(tensor.dtype) for column in columns for tensor in column})
    if len(dtypes) > 1:
        raise UserError(
            f"{file}: the experts of {target} are stored as {', '.join(dtypes)}; save all as one of them"
        )
    if sum(column[0].shape[0] for column in columns) != rows:
        raise UserError(f"{file}: the experts of {target} do not make up {list(shape)}")


def _stack_experts(
    files: OpenFiles, columns: list[list[StoredTensor]], shape: tuple[int, ...]
) -> torch.Tensor:
    """[experts, rows, cols]: each expert's matrices one above the other, read in place."""
    out = torch.empty(shape, dtype=columns[0][0].dtype)
    top = 0
    for column in columns:
        bottom = top + column[0].shape[0]
        for expert, matrix in enumerate(column):
            matrix.read(files, out[expert, top:bottom])
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
    return bool(STALE_BUFFERS.search(name) or any(re.search(pattern, name) for pattern in patterns))


def _listing(names: list[str]) -> str:
    shown = ", ".join(names[:LISTED])
    return f"{len(names)} tensor{'s' * (len(names) > 1)} ({shown}{', ...' * (len(names) > LISTED)})"
