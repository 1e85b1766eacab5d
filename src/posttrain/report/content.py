"""What `compare` measured, checked, and in the shape the page needs.

Only the loss of each model and the interval of each pair are required; every other key may be
absent or None, and then the part of the page that would show it is absent too.
"""

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.errors import UserError

LONGEST_NAME = 36  # characters, on the page
RUNNING_BITS = {"float32": 32, "bfloat16": 16, "float16": 16}
MODEL_NUMBERS = ("nll", "perplexity", "tokens")
ZERO_WIDTH_JOINER = "\u200d"
_LAYER = re.compile(r"(?P<stack>.*?)\.(?P<block>\d+)\.(?P<kind>.+)")
_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)|(?<=^)\d+(?=\.)")


def real(value: object) -> bool:
    """Whether `value` is a number (NaN and infinities are; True is not)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def finite(value: object) -> bool:
    return real(value) and math.isfinite(value)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Model:
    """One model of the comparison: its measured values, a short name, its place in the order."""

    index: int
    name: str  # as it was named on the command line: the key that pairs refer to
    short: str  # unique on this page, for charts
    values: Mapping[str, Any]

    def get(self, key: str) -> float | None:
        """The number under `key` (perhaps infinite), or None where it was not measured."""
        value: Any = self.values.get(key)
        return value if real(value) and not math.isnan(value) else None

    @property
    def file(self) -> str | None:
        """How its file stores what is expanded to run ("GGUF Q4_1"): its bits and size are those
        of the file. None where the model is stored as it is computed, or packed in memory too."""
        value = self.values.get("expanded_from")
        return value if isinstance(value, str) and value else None

    @property
    def running_bits(self) -> int | None:
        """Bits of a weight as it is computed, where that is known."""
        return RUNNING_BITS.get(str(self.values.get("dtype")))


@dataclass(frozen=True)
class Pair:
    """Model b minus model a on the same tokens, with the interval of the mean difference."""

    a: Model
    b: Model
    delta: float  # nats per token; positive: b is worse
    low: float  # NaN without an interval: a single window of text gives none
    high: float
    kl: float | None
    agreement: float | None

    @property
    def defined(self) -> bool:
        return math.isfinite(self.delta)

    @property
    def interval(self) -> bool:
        """Whether there is an interval."""
        return self.defined and math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def ends(self) -> tuple[float, float]:
        """The interval to draw: where there is none, only its middle."""
        return (self.low, self.high) if self.interval else (self.delta, self.delta)

    @property
    def from_file(self) -> bool:
        """Whether the bits and the size of a are those of a packed file that runs expanded, and
        those of b are not: then they are no measure of what b saves."""
        return self.a.file is not None and self.b.file is None

    @property
    def includes_zero(self) -> bool:
        return self.low <= 0 <= self.high


@dataclass(frozen=True)
class LayerMap:
    """A value of the quantized linears of one model by block (columns) and projection (rows)."""

    blocks: tuple[int, ...]
    kinds: tuple[str, ...]
    cells: Mapping[tuple[int, str], float]  # (block, kind) -> value; the least of merged layers
    outside: tuple[tuple[str, float], ...]  # layers that belong to no block
    merged: bool  # several layers (experts) share a cell


def _require(entry: object, keys: Sequence[str], where: str) -> Mapping[str, Any]:
    if not isinstance(entry, Mapping):
        raise UserError(f"report: {where} is {type(entry).__name__}, expected an object")
    for key in keys:
        if not real(entry.get(key)):
            found = repr(entry[key])[:60] if key in entry else "nothing"
            raise UserError(f"report: {where}.{key} must be a number, found {found}")
    return entry


def _list(data: Mapping[str, Any], key: str) -> list[Any]:
    value = data.get(key)
    if value is None:
        return []
    if not isinstance(value, (list, tuple)):
        raise UserError(f"report: {key} is {type(value).__name__}, expected a list")
    return list(value)


def short_names(names: Sequence[str]) -> list[str]:
    """The last component of each name where that tells them apart, else all of it; the middle of
    long ones cut out; numbered where they still are the same.

    >>> short_names(["hub/demo", "build/demo-w6a8/"]), short_names(["a/x", "b/x", "b/x"])
    (['demo', 'demo-w6a8'], ['a/x', 'b/x', 'b/x (2)'])
    """
    last = [re.split(r"[/\\]", name.rstrip("/\\"))[-1] or name for name in names]
    chosen = [
        tail if last.count(tail) == 1 else name for tail, name in zip(last, names, strict=True)
    ]
    chosen = [
        name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 14]}\u2026{name[-13:]}"
        for name in chosen
    ]
    return [
        name if (seen := chosen[:i].count(name)) == 0 else f"{name} ({seen + 1})"
        for i, name in enumerate(chosen)
    ]


def read_models(data: Mapping[str, Any]) -> list[Model]:
    """The models in their order. Raises UserError naming the field that is missing."""
    if not isinstance(data, Mapping):
        raise UserError(f"report: expected what `compare` returns, found {type(data).__name__}")
    entries = _list(data, "models")
    if not entries:
        raise UserError("report: models is empty; a report needs at least one evaluated model")
    for i, entry in enumerate(entries):
        _require(entry, MODEL_NUMBERS, f"models[{i}]")
        if not isinstance(entry.get("model"), str) or not entry["model"]:
            raise UserError(f"report: models[{i}].model must be the model's name")
    names = [entry["model"] for entry in entries]
    return [
        Model(i, name, short, entry)
        for i, (name, short, entry) in enumerate(
            zip(names, short_names(names), entries, strict=True)
        )
    ]


def read_pairs(data: Mapping[str, Any], models: Sequence[Model]) -> list[Pair]:
    """The paired differences. Raises UserError where a pair names no model of the report."""
    pairs = []
    for i, entry in enumerate(_list(data, "pairs")):
        _require(entry, ("delta_nll",), f"pairs[{i}]")
        a = _find(models, entry.get("a"), f"pairs[{i}].a", first=True)
        b = _find(models, entry.get("b"), f"pairs[{i}].b", first=False)
        low, high, kl, agreement = (
            float(entry[key]) if real(entry.get(key)) else None
            for key in ("ci_low", "ci_high", "kl", "greedy_agreement")
        )
        ends = (math.nan, math.nan) if low is None or high is None else (low, high)
        pairs.append(Pair(a, b, float(entry["delta_nll"]), *ends, kl, agreement))
    return pairs


def _find(models: Sequence[Model], name: object, where: str, first: bool) -> Model:
    # A model compared with itself appears twice under one name: a is the first, b the last.
    for model in models if first else reversed(models):
        if model.name == name:
            return model
    known = ", ".join(model.name for model in models)
    raise UserError(f"report: {where} is {name!r}, which is none of the models: {known}")


def layer_map(layers: object, name: str = "name", value: str = "qsnr") -> LayerMap | None:
    """Layers with a QSNR (or what else stands under `value`) arranged by block and projection, or
    None where there is none.

    `model.layers.3.self_attn.q_proj` is block 3, projection `self_attn.q_proj`; the experts of
    one projection (`mlp.experts.7.up_proj`) share the cell `mlp.experts.*.up_proj`.
    """
    found = [
        (str(layer.get(name)), float(layer[value]))
        for layer in mappings(layers)
        if finite(layer.get(value))
    ]
    if not found:
        return None
    cells: dict[tuple[int, str], float] = {}
    outside, count = [], 0
    for layer, number in found:
        match = _LAYER.fullmatch(layer)
        if match is None:
            outside.append((layer, number))
            continue
        key = int(match["block"]), _INDEX.sub("*", match["kind"])
        cells[key] = min(number, cells.get(key, math.inf))
        count += 1
    blocks = tuple(sorted({block for block, _ in cells}))
    kinds = tuple(dict.fromkeys(kind for _, kind in cells))
    return LayerMap(blocks, kinds, cells, tuple(outside), merged=count > len(cells))


@dataclass(frozen=True)
class Search:
    """The plan that was found for a budget: bits and predicted loss, nats a token, of every group of
    layers by block and kind, and of the whole."""

    bits: LayerMap
    losses: LayerMap
    loss: float
    bits_per_weight: float
    exact: bool
    measured: float | None = None
    uniform: tuple[float, float] | None = None  # bits per weight, measured loss: one width for all
    is_uniform: bool = False

    @property
    def by_block(self) -> list[tuple[str, float]]:
        """The summed loss of each block."""
        return [
            (str(block), sum(loss for (b, _), loss in self.losses.cells.items() if b == block))
            for block in self.losses.blocks
        ]


def search(value: object) -> Search | None:
    """What `quantize` found for a budget, or None where there was none."""
    if not isinstance(value, Mapping):
        return None
    bits, losses = (
        layer_map(value.get("groups"), "group", key) for key in ("bits", "predicted_loss")
    )
    loss, at = value.get("predicted_loss"), value.get("predicted_bits_per_weight")
    if bits is None or losses is None or not (finite(loss) and finite(at)):
        return None
    measured, beside = value.get("measured_loss"), value.get("uniform")
    uniform = None
    if isinstance(beside, Mapping):
        pair = beside.get("predicted_bits_per_weight"), beside.get("measured_loss")
        uniform = (float(pair[0]), float(pair[1])) if finite(pair[0]) and finite(pair[1]) else None  # type: ignore[arg-type]
    return Search(
        bits,
        losses,
        float(loss),  # type: ignore[arg-type]
        float(at),  # type: ignore[arg-type]
        value.get("scan") == "exact",
        float(measured) if finite(measured) else None,  # type: ignore[arg-type]
        uniform,
        value.get("is_uniform") is True,
    )


def sensitivity(entries: object) -> list[tuple[str, float]]:
    """(block, KL in nats) in block order, from `[{"block": 3 or "model.layers.3", "kl": ...}]`."""
    return [
        (re.sub(r"^.*\.(?=\d+$)", "", str(entry.get("block"))), float(entry["kl"]))
        for entry in mappings(entries)
        if finite(entry.get("kl"))
    ]


def items(value: object) -> list[Any]:
    """What an optional list holds; nothing where there is none."""
    return list(value) if isinstance(value, (list, tuple)) else []


def mappings(value: object) -> list[Mapping[str, Any]]:
    """The objects that an optional list holds."""
    return [entry for entry in items(value) if isinstance(entry, Mapping)]


def divergence(reference: str, other: str) -> int:
    """Where `other` first says something else than `reference`: the start of that word.

    >>> divergence("the cat sat", "the car sat"), divergence("same", "same")
    (4, 4)
    """
    shared = 0
    for mine, theirs in zip(reference, other, strict=False):
        if mine != theirs:
            break
        shared += 1
    if shared == len(reference) == len(other):
        return shared
    start = shared
    # Back to the start of the word, but not through text written without spaces.
    while 0 < start < len(other) and shared - start < 24 and _inside_word(other, start):
        start -= 1
    return start if not _inside_word(other, start) else shared


def _inside_word(text: str, at: int) -> bool:
    """Whether cutting before text[at] would cut a word or one visible character in two."""
    if not 0 < at < len(text):
        return False
    before, after = text[at - 1], text[at]
    if before == ZERO_WIDTH_JOINER or unicodedata.category(after) in ("Mn", "Me", "Cf", "Sk"):
        return True
    return _in_word(before) and _in_word(after)


def _in_word(char: str) -> bool:
    return unicodedata.category(char)[0] in "LNM" or char in "'\u2019"
