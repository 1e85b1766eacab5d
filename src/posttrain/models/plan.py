"""What is quantized how: a Plan maps patterns of module names to number formats.

A Plan is the only place where precision and exceptions live. Its dictionary form is what a user
writes in a recipe:

    layers:
      - {match: "*", weight: "int6 | fp16/g64", input: "int8h | fp32/row"}
      - {match: "*.down_proj", weight: "int8 | fp16/g64", input: "int8h | fp32/row", rotate: true}
    ignore: ["model.layers.0.*"]
    kv: "int8 | fp16/row"

`match` and `ignore` are shell globs over full module names (`*` also crosses dots). The last rule
that matches a layer wins; `ignore` beats every rule. A layer that nothing matches is an error, and
so are layers that runtimes fuse (q/k/v, gate/up) but the Plan treats differently. `kv` is what the
KV cache is kept in (see `kv`); left out, the model says nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from posttrain.errors import UserError, did_you_mean
from posttrain.models.branches import BranchPlan, branch_dict, make_branch
from posttrain.models.kv import parse_kv
from posttrain.models.walk import fusion_groups
from posttrain.numbers import Spec, spec

RULE_KEYS = ("match", "weight", "input", "rotate", "outliers", "branches")
PLAN_KEYS = ("layers", "ignore", "kv")
LISTED = 8  # names spelled out in an error before "and N more"


@dataclass(frozen=True)
class LayerPlan:
    """What one layer stores and computes with.

    `weight`: how its weight is stored. `input`: how its input is quantized on the fly, or None for
    inputs left alone. `branches`: additive side paths (see `branches`). `rotate`: whether
    the input is rotated first, and the weight stored rotated (see `rotation`). `outliers`: channels
    of the input in which any token reaches this magnitude are left unquantized (LLM.int8(), Dettmers
    et al. 2022, arXiv:2208.07339); None: no channel is.
    """

    weight: Spec | None
    input: Spec | None = None
    branches: tuple[BranchPlan, ...] = ()
    rotate: bool = False
    outliers: float | None = None


@dataclass(frozen=True)
class Rule:
    """All layers whose full name matches the glob `match` get these number formats."""

    match: str
    weight: Spec
    input: Spec | None = None
    rotate: bool = False
    outliers: float | None = None
    branches: tuple[BranchPlan, ...] = ()

    @property
    def layer(self) -> LayerPlan:
        return LayerPlan(self.weight, self.input, self.branches, self.rotate, self.outliers)


@dataclass(frozen=True)
class Plan:
    """Ordered rules, the list of layers left alone, and the format of the KV cache."""

    rules: tuple[Rule, ...]
    ignore: tuple[str, ...] = ()
    kv: Spec | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Build from the dictionary form; UserError names the field that is wrong."""
        _check_keys(data, PLAN_KEYS, "plan")
        layers = data.get("layers")
        if not isinstance(layers, Sequence) or isinstance(layers, str) or not layers:
            raise UserError(
                "plan: 'layers' must be a list of rules such as "
                '{match: "*", weight: "int6 | fp16/g64"}; found ' + repr(layers)
            )
        rules = tuple(_rule(entry, f"plan: layers[{i}]") for i, entry in enumerate(layers))
        kv = data.get("kv")
        return cls(
            rules,
            _globs(data.get("ignore") or (), "plan: ignore"),
            None if kv is None else parse_kv(kv, "plan: kv"),
        )

    def to_dict(self) -> dict[str, Any]:
        """The dictionary form: canonical spec texts, keys that are unset left out."""
        layers = []
        for rule in self.rules:
            entry: dict[str, Any] = {"match": rule.match, "weight": str(rule.weight)}
            if rule.input is not None:
                entry["input"] = str(rule.input)
            if rule.rotate:
                entry["rotate"] = True
            if rule.outliers is not None:
                entry["outliers"] = rule.outliers
            if rule.branches:
                entry["branches"] = list(map(branch_dict, rule.branches))
            layers.append(entry)
        kv = {} if self.kv is None else {"kv": str(self.kv)}
        return {"layers": layers, "ignore": list(self.ignore), **kv}

    def resolve(self, names: Iterable[str]) -> dict[str, LayerPlan]:
        """Decide every layer in `names`, in their order; ignored layers are absent.

        `names` may be the mapping that `walk.quantizable` returns; then experts (3-D parameters)
        are also checked: their inputs cannot be quantized.
        Raises UserError for a layer that nothing matches and for fused layers that disagree.
        """
        listed = list(names)
        found = {name: self._layer(name) for name in listed if not self.ignores(name)}
        lost = [name for name, layer in found.items() if layer is None]
        if lost:
            raise UserError(
                f"plan: no rule matches {shorten(lost)}; add a rule for them under 'layers' or "
                "list them under 'ignore'"
            )
        layers = {name: layer for name, layer in found.items() if layer is not None}
        _check_fused(listed, layers)
        if isinstance(names, Mapping):
            _check_experts(names, layers)
        return layers

    def ignores(self, name: str) -> bool:
        """Whether `ignore` lists this layer."""
        return any(fnmatchcase(name, glob) for glob in self.ignore)

    def names(self, name: str) -> bool:
        """Whether a rule other than "*" matches this layer, and `ignore` does not."""
        asked = any(rule.match != "*" and fnmatchcase(name, rule.match) for rule in self.rules)
        return asked and not self.ignores(name)

    def idle_patterns(self, names: Iterable[str]) -> list[str]:
        """Patterns of rules and of `ignore` that match none of `names`: often a typing mistake."""
        listed = list(names)
        patterns = [rule.match for rule in self.rules] + list(self.ignore)
        return [glob for glob in patterns if not any(fnmatchcase(n, glob) for n in listed)]

    def _layer(self, name: str) -> LayerPlan | None:
        matching = [rule for rule in self.rules if fnmatchcase(name, rule.match)]
        return matching[-1].layer if matching else None


def shorten(names: Sequence[str]) -> str:
    """Names for an error message: the first few, and how many more there are."""
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")


def _check_keys(data: object, known: tuple[str, ...], where: str) -> None:
    if not isinstance(data, Mapping):
        raise UserError(f"{where}: expected keys {', '.join(known)}; found {data!r}")
    for key in data:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}{did_you_mean(str(key), known)}")


def _rule(entry: object, where: str) -> Rule:
    _check_keys(entry, RULE_KEYS, where)
    assert isinstance(entry, Mapping)
    match = entry.get("match")
    if not isinstance(match, str) or not match:
        raise UserError(f"{where}: 'match' must be a name pattern such as \"*\"; found {match!r}")
    weight = _spec(entry.get("weight"), f"{where}.weight")
    if weight is None:
        raise UserError(
            f"{where}: 'weight' is missing; to leave {match!r} unquantized list it under 'ignore'"
        )
    inputs = _spec(entry.get("input"), f"{where}.input")
    if inputs is not None and inputs.rounding == "sr":
        raise UserError(f"{where}.input: {inputs} rounds by chance, so no two runs would agree")
    rotate = entry.get("rotate", False)
    if not isinstance(rotate, bool):
        raise UserError(f"{where}.rotate must be true or false; found {rotate!r}")
    outliers = _outliers(entry.get("outliers"), inputs, where)
    branches = _branches(entry.get("branches"), where)
    if rotate and any(branch.first for branch in branches):
        raise UserError(f"{where}: columns of the input and 'rotate' exclude each other")
    return Rule(match, weight, inputs, rotate, outliers, branches)


def _outliers(value: Any, inputs: Spec | None, where: str) -> float | None:
    if value is None:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
        raise UserError(
            f"{where}.outliers must be a magnitude above 0, such as 6.0; found {value!r}"
        )
    if inputs is None:
        raise UserError(f"{where}.outliers needs an 'input' format that they are spared from")
    return float(value)


def _branches(value: Any, where: str) -> tuple[BranchPlan, ...]:
    if value is None:
        return ()
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise UserError(
            f"{where}.branches must be a list such as [{{name: lowrank, rank: 8}}]; found {value!r}"
        )
    return tuple(make_branch(entry, f"{where}.branches[{i}]") for i, entry in enumerate(value))


def _spec(text: object, where: str) -> Spec | None:
    if text is None or isinstance(text, Spec):
        return text
    if not isinstance(text, str):
        raise UserError(
            f'{where}: expected a number format such as "int6 | fp16/g64"; found {text!r}'
        )
    try:
        return spec(text)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _globs(value: object, where: str) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise UserError(f"{where} must be a list of name patterns; found {value!r}")
    for glob in value:
        if not isinstance(glob, str) or not glob:
            raise UserError(f"{where} must hold name patterns; found {glob!r}")
    return tuple(value)


def _check_fused(names: list[str], layers: Mapping[str, LayerPlan]) -> None:
    for group in fusion_groups(names):
        plans = [layers.get(name) for name in group]
        if any(plan != plans[0] for plan in plans):
            detail = ", ".join(
                f"{name}: {_say(plan)}" for name, plan in zip(group, plans, strict=True)
            )
            raise UserError(
                "plan: layers that runtimes fuse must be quantized alike, but the plan says "
                f"{detail}; make one rule match all of them"
            )


def _say(plan: LayerPlan | None) -> str:
    if plan is None:
        return "ignored"
    inputs = f" with input {plan.input}" if plan.input is not None else ""
    spared = "" if plan.outliers is None else f", outliers from {plan.outliers:g}"
    beside = "".join(f", with {branch_dict(branch)}" for branch in plan.branches)
    return f"{plan.weight}{inputs}{', rotated' if plan.rotate else ''}{spared}{beside}"


def _check_experts(targets: Mapping[str, Any], layers: Mapping[str, LayerPlan]) -> None:
    bad = [
        name
        for name, layer in layers.items()
        if getattr(targets[name], "kind", "linear") == "experts"
        and (layer.input or layer.rotate or layer.branches)
    ]
    if bad:
        raise UserError(
            f"plan: {shorten(bad)} hold experts, whose inputs cannot be quantized or rotated, and "
            "which have no branches; add a later rule without input, rotate and branches for them, "
            f'such as {{match: "{bad[0]}", weight: ...}}'
        )
