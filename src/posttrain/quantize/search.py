"""Find the plan: one format for each fusion group, the least predicted loss within a budget of bytes.

A multiple-choice knapsack: of every group's formats one is taken, and the sum of their bytes must not
pass the budget. Sizes have a large common divisor (rows times columns over eight, for one bit more), so
dynamic programming over that unit is exact and quick; where they have none, sizes are rounded up
to `STATES` steps, and what comes out is at most a step for each group short of the best.

The budget is that of the whole model as `bits_per_weight` counts it: every stored tensor, scales and
what stays in 16 or 32 bits included, over every weight.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from posttrain import kernels
from posttrain.errors import UserError, did_you_mean
from posttrain.models import storage
from posttrain.models.branches import stored_bytes
from posttrain.models.plan import LayerPlan, Plan, Rule
from posttrain.numbers import Spec
from posttrain.numbers import spec as parse_spec
from posttrain.quantize.sensitivity import CHEAP, SCANS, WEIGHT_BITS, Group, Row, family

STATES = 1 << 18  # steps of the budget at most
WORD, SHAPE_BYTES = 4, 16  # compressed-tensors pads rows to words and stores the shape


@dataclass(frozen=True)
class Search:
    """What is asked for: a budget, how losses are predicted, and the formats to choose from.

    bits: bits per weight of the whole model, or max_bytes: all its tensors; one of the two.
    scan: "cheap" or "exact" (see `sensitivity`). candidates: formats for every group; empty: the
    formats of the recipe at 3 to 8 bits.
    """

    bits: float | None = None
    max_bytes: int | None = None
    scan: str = CHEAP
    candidates: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.scan not in SCANS:
            known = f"one of {', '.join(SCANS)}"
            raise UserError(
                f"scan must be {known}; found {self.scan!r}{did_you_mean(self.scan, SCANS)}"
            )

    @classmethod
    def asked(
        cls,
        bits: float | None,
        max_bytes: int | None,
        scan: str | None,
        candidates: str | Sequence[str] | None,
    ) -> "Search | None":
        """From the arguments of `quantize`; None where no budget is given. Raises UserError."""
        if bits is None and max_bytes is None:
            for name, value in (("scan", scan), ("candidates", candidates)):
                if value is not None:
                    raise UserError(
                        f"{name} says how a plan is searched for: it needs a budget, bits or "
                        "max_bytes"
                    )
            return None
        if bits is not None and max_bytes is not None:
            raise UserError("give a budget in bits or in max_bytes, not in both")
        for name, number in (("bits", bits), ("max_bytes", max_bytes)):
            if number is not None and not 0 < number < math.inf:
                raise UserError(f"{name} must be a number above 0, found {number!r}")
        return cls(bits, max_bytes, CHEAP if scan is None else scan, _formats(candidates))

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value not in (None, ())}

    def options(self, group: Group) -> tuple[Spec, ...]:
        """The formats to choose from for a group, those that the kernels run.

        Raises UserError where there is no choice by itself: the recipe's format has no widths.
        """
        known = tuple(map(parse_spec, self.candidates)) or family(group.weight, WEIGHT_BITS)
        if not known:
            raise UserError(
                f"{group.label} becomes {group.weight}, which has no other widths to choose from: "
                "name the formats with candidates, such as 'mxfp4, int6 | fp16/g64'"
            )
        inputs = group.shapes[0][-1]
        fast = tuple(spec for spec in known if kernels.unsupported(spec, inputs) is None)
        return fast or (group.weight,)


def _formats(candidates: str | Sequence[str] | None) -> tuple[str, ...]:
    """Formats separated by commas, in the order of their bits, in canonical form."""
    if candidates is None:
        return ()
    listed = _split(candidates) if isinstance(candidates, str) else candidates
    try:
        specs = {str(parse_spec(text)): None for text in listed}
    except UserError as error:
        raise UserError(f"candidates: {error}") from None
    if not specs:
        raise UserError("candidates names no format; write such as 'int4 | fp16/g64, w6g64'")
    return tuple(specs)


def _split(text: str) -> list[str]:
    """At the commas outside parentheses."""
    parts, depth = [""], 0
    for char in text:
        depth += (char == "(") - (char == ")")
        if char == "," and not depth:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts if part.strip()]


# ------------------------------------------------------------------------------- the knapsack


@dataclass(frozen=True)
class Option:
    """One format of a group: what it stores and the loss to expect."""

    nbytes: int
    loss: float


def cheapest(groups: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """Per group the index of the option to take: least summed loss with at most `budget` bytes.

    Of equal losses the smaller one. Raises ValueError where even the smallest options do not fit.
    """
    least = [min(option.nbytes for option in options) for options in groups]
    slack = budget - sum(least)
    if slack < 0:
        raise ValueError(f"the smallest choice takes {sum(least)} bytes, the budget is {budget}")
    added = [
        [option.nbytes - small for option in options]
        for options, small in zip(groups, least, strict=True)
    ]
    widest = sum(map(max, added))
    unit = math.gcd(*(size for sizes in added for size in sizes)) or 1
    unit = unit if widest // unit < STATES else -(-widest // STATES)
    steps = [[-(-size // unit) for size in sizes] for sizes in added]
    states = min(slack // unit, sum(map(max, steps))) + 1
    best = np.zeros(states)  # least loss of the groups so far, within that many units
    taken = []
    for options, widths in zip(groups, steps, strict=True):
        now, which = np.full(states, np.inf), np.zeros(states, dtype=np.int16)
        for index in sorted(range(len(options)), key=lambda i: widths[i]):
            step = widths[index]
            if step >= states:
                continue
            reached = best[: states - step] + options[index].loss
            better = reached < now[step:]
            now[step:][better] = reached[better]
            which[step:][better] = index
        best = now
        taken.append(which)
    left, found = states - 1, []
    for which, widths in zip(reversed(taken), reversed(steps), strict=True):
        index = int(which[left])
        left -= widths[index]
        found.append(index)
    return found[::-1]


# ---------------------------------------------------------------------------------- the model


@dataclass(frozen=True)
class Sizes:
    """What the bytes of a plan are made of.

    parameters: weights of the whole model. kept: bytes of everything that no group stores. padded:
    whether rows are padded to words (compressed-tensors).
    """

    parameters: int
    kept: int
    padded: bool

    def of(self, group: Group, weight: Spec) -> int:
        """Bytes that a group stores in this format."""
        beside = sum(
            stored_bytes(branch, shape[-2], shape[-1])
            for shape in group.shapes
            for branch in group.layer.branches
        )
        return beside + sum(self._layer(weight, shape) for shape in group.shapes)

    def _layer(self, weight: Spec, shape: tuple[int, ...]) -> int:
        parts = storage.layout("weight", weight, shape).values()
        nbytes = sum(math.prod(size) * dtype.itemsize for size, dtype in parts)
        if self.padded:
            row = -(-shape[-1] * weight.bits // 8)
            nbytes += -row % WORD * math.prod(shape[:-1]) + SHAPE_BYTES
        return nbytes

    def budget(self, search: Search) -> int:
        """The budget in bytes."""
        if search.max_bytes is not None:
            return search.max_bytes
        assert search.bits is not None
        # A thousandth of a byte more: bits that a result states mean its own bytes again.
        return math.floor(search.bits * self.parameters / 8 + 1e-3)

    def bits(self, nbytes: int) -> float:
        return 8 * nbytes / self.parameters


def check_reachable(search: Search, groups: Sequence[Group], sizes: Sizes) -> None:
    """UserError unless the budget lies between the smallest and the largest choice."""
    totals = [[sizes.of(g, spec) for spec in search.options(g)] for g in groups]
    low, high = (sizes.kept + sum(map(pick, totals)) for pick in (min, max))
    budget = sizes.budget(search)
    if low <= budget and (search.bits is None or budget <= high):
        return
    # Rounded inwards: what is named can be asked for.
    ends = math.ceil(100 * sizes.bits(low)) / 100, math.floor(100 * sizes.bits(high)) / 100
    asked = f"{search.bits:g} bits per weight" if search.bits else f"{budget:,} bytes"
    raise UserError(
        f"a budget of {asked} cannot be met: with these formats the whole model takes from "
        f"{ends[0]:.2f} to {ends[1]:.2f} bits per weight ({low:,} to {high:,} bytes), of which "
        f"{sizes.bits(sizes.kept):.2f} bits are what the recipe leaves as it is"
    )


def best(search: Search, groups: Sequence[Group], rows: Sequence[Row], sizes: Sizes) -> list[Spec]:
    """The format of each group: least predicted loss within the budget."""
    loss = _losses(rows)
    formats = [search.options(group) for group in groups]
    options = [
        [Option(sizes.of(g, spec), loss[g.label, str(spec)]["predicted_loss"]) for spec in specs]
        for g, specs in zip(groups, formats, strict=True)
    ]
    chosen = cheapest(options, sizes.budget(search) - sizes.kept)
    return [specs[i] for specs, i in zip(formats, chosen, strict=True)]


def uniform(search: Search, groups: Sequence[Group], sizes: Sizes) -> list[Spec] | None:
    """The format of each group where all get the same width (or candidate), as wide as the budget
    allows; None where none fits."""
    of_width = [
        {str(spec) if search.candidates else spec.bits: spec for spec in search.options(group)}
        for group in groups
    ]
    # In the order they were named in, so that of equal sizes always the same one is taken.
    shared = [width for width in of_width[0] if all(width in known for known in of_width)]
    plans = [[known[width] for known in of_width] for width in shared]
    weighed = [(_stored(groups, plan, sizes), plan) for plan in plans]
    fitting = [both for both in weighed if both[0] <= sizes.budget(search)]
    return max(fitting, key=lambda both: both[0])[1] if fitting else None


def describe(
    search: Search,
    groups: Sequence[Group],
    formats: Sequence[Spec],
    rows: Sequence[Row],
    sizes: Sizes,
) -> dict[str, Any]:
    """What `quantize` returns as `search` (docs/json.md)."""
    loss, nbytes = _losses(rows), _stored(groups, formats, sizes)
    entries = []
    for group, spec in zip(groups, formats, strict=True):
        row = loss[group.label, str(spec)]
        entries.append({"group": group.label, "layers": list(group.names), "weight": str(spec),
                        **{key: row[key] for key in ("bits", "predicted_loss", "class")}})  # fmt: skip
    return {
        **search.to_dict(),
        "budget_bytes": sizes.budget(search),
        "predicted_bytes": nbytes,
        "predicted_bits_per_weight": sizes.bits(nbytes),
        "predicted_loss": sum(entry["predicted_loss"] for entry in entries),
        "groups": entries,
    }


def _losses(rows: Sequence[Row]) -> dict[tuple[str, str], Row]:
    return {(r["group"], r["format"]): r for r in rows if r["operand"] == "weight"}


def _stored(groups: Sequence[Group], formats: Sequence[Spec], sizes: Sizes) -> int:
    """Bytes of the model with these formats."""
    return sizes.kept + sum(sizes.of(g, spec) for g, spec in zip(groups, formats, strict=True))


# ----------------------------------------------------------------------------------- the plan


def found_plan(base: Plan, layers: Mapping[str, LayerPlan], found: Mapping[str, Any]) -> Plan:
    """The plan that says what was found: the rules of `base`, then one for each kind of layer with
    the format most of its blocks have, then the exceptions by name. Inputs, rotation and all else
    stay as `base` has them.

    layers: what `base` resolves to.
    """
    weights = {
        name: parse_spec(entry["weight"]) for entry in found["groups"] for name in entry["layers"]
    }
    kinds: dict[str, list[str]] = {}
    for name in weights:
        kinds.setdefault(_kind(name), []).append(name)
    common, special = [], []
    for kind, names in kinds.items():
        usual, _ = Counter(_rule(base, name, weights[name], kind) for name in names).most_common(1)[
            0
        ]
        common.append(usual)
        rules = (_rule(base, name, weights[name], name) for name in names)
        special += [rule for rule in rules if replace(rule, match=kind) != usual]
    short = replace(base, rules=(*base.rules, *common, *special))
    wanted = {name: replace(layers[name], weight=weights[name]) for name in weights}
    if short.resolve(layers) == wanted:
        return short
    # A pattern caught a layer of another kind: every layer by its own name.
    each = tuple(_rule(base, name, weight, name) for name, weight in weights.items())
    return replace(base, rules=(*base.rules, *each))


def _rule(base: Plan, name: str, weight: Spec, match: str) -> Rule:
    """The rule of `base` for a layer, with another weight format and another pattern."""
    own = next(rule for rule in reversed(base.rules) if fnmatchcase(name, rule.match))
    return replace(own, match=match, weight=weight)


def _kind(name: str) -> str:
    """`model.layers.*.mlp.up_proj` for all blocks' `model.layers.3.mlp.up_proj`."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
