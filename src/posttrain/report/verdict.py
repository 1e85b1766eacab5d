"""What the measurements say, in sentences: computed from the numbers, honest about intervals."""

import math
from collections.abc import Sequence

from posttrain.report import words
from posttrain.report.content import Model, Pair


def effect(pair: Pair) -> str:
    """What b's loss does against a's, with its interval: the end of a sentence about b."""
    if not pair.defined:
        return "could not be compared: its loss is not a finite number on this text"
    value, low, high = words.delta(pair.delta, pair.low, pair.high)
    if not pair.interval:
        return f"changes the loss by {value} nats per token (too little text for an interval)"
    interval = f"{words.CONFIDENCE} CI {low} to {high}"
    if pair.includes_zero:
        return (
            f"shows no measurable change in loss: {value} nats per token ({interval}, "
            f"which includes zero)"
        )
    if pair.delta > 0:
        return f"costs {value} nats per token ({interval})"
    return f"scores better by {value.lstrip(words.MINUS)} nats per token ({interval})"


def cost(pair: Pair, among_others: bool = False) -> str | None:
    """Bits per weight of b and of a where both are known: 'needs 6.25 bits instead of 32'."""
    before, after = pair.a.get("bits_per_weight"), pair.b.get("bits_per_weight")
    if before is None or after is None:
        return None
    if pair.from_file:
        beside = "" if among_others else f" ({pair.a.short}: {_of_file(pair.a)})"
        return f"needs {words.bits(after)} bits per weight{beside}"
    if before == after:
        return f"needs the same {words.bits(after)} bits per weight"
    if after > before:
        more = f"more than the {words.bits(before)} of {pair.a.short}"
        return f"needs {words.bits(after)} bits per weight, {more},"
    return f"needs {words.bits(after)} bits per weight instead of {words.bits(before)}"


def _of_file(model: Model) -> str:
    """'5.74 in its GGUF Q4_1 file, 32 as it runs'."""
    said = f"{words.bits(model.get('bits_per_weight'))} in its {model.file} file"
    return f"{said}, {model.running_bits} as it runs" if model.running_bits else said


def sentence(pair: Pair, among_others: bool = False) -> str:
    """The whole verdict about one pair; `among_others` against the same reference, without what
    would be the same in each."""
    parts = [part for part in (cost(pair, among_others), effect(pair)) if part]
    return f"{pair.b.short} {' and '.join(parts)}."


def meaning(pair: Pair) -> str | None:
    """What the difference and its interval allow to say beyond the number itself."""
    if not pair.defined:
        return "A loss that is not finite means broken weights or an overflow, not a bad score."
    if not pair.interval:
        return "One window of text says little: evaluate on more to learn whether this is chance."
    rise = _percent(pair.delta)
    if pair.includes_zero:
        return (
            f"No difference was found, which is not proof that there is none: the interval "
            f"allows a change in perplexity between {_percent(pair.low)} and "
            f"{_percent(pair.high)}. More text narrows it."
        )
    if pair.delta > 0:
        return (
            f"Perplexity rises by {rise.lstrip('+')} on this text; the interval excludes zero, "
            f"so the loss is real here, whether or not it matters for your use."
        )
    return (
        "The interval excludes zero in favour of the smaller model. A copy is rarely better "
        "than its original in general: check it on other text before relying on it."
        if _smaller(pair)
        else "The interval excludes zero: the gain is real on this text."
    )


def _percent(delta: float) -> str:
    share = math.expm1(min(delta, 50.0))
    return words.percent(share, words.decimals_for(100 * abs(share), least=1, most=3), signed=True)


def _smaller(pair: Pair) -> bool:
    before, after = pair.a.get("bits_per_weight"), pair.b.get("bits_per_weight")
    if pair.from_file and pair.a.running_bits:
        before = pair.a.running_bits
    return before is not None and after is not None and after < before


def headline(models: Sequence[Model], pairs: Sequence[Pair]) -> str:
    """The one line that a reader takes home. `pairs` are those against the reference."""
    if not pairs:
        return _alone(models)
    if len(pairs) == 1:
        return sentence(pairs[0])
    sound = [pair for pair in pairs if pair.defined]
    lead = f"{len(pairs)} models against {pairs[0].a.short}"
    if not sound:
        return f"{lead}: none could be compared."
    closest = min(sound, key=lambda pair: pair.delta).b.short
    sized = [pair.b for pair in sound if pair.b.get("bits_per_weight") is not None]
    smallest = min(sized, key=lambda b: b.get("bits_per_weight") or 0.0).short if sized else None
    if smallest == closest:
        return f"{lead}: {closest} is the smallest and loses least."
    return f"{lead}: {closest} loses least{f', {smallest} is smallest' if smallest else ''}."


def _alone(models: Sequence[Model]) -> str:
    if len(models) == 1:
        model = models[0]
        at = model.get("bits_per_weight")
        size = "" if at is None else f" at {words.bits(at)} bits per weight"
        size += f" in its {model.file} file" if size and model.file else ""
        return f"{model.short} has perplexity {words.number(model.get('perplexity'))}{size}."
    return f"{len(models)} models, measured one by one."
