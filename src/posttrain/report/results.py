"""The sections of the page about whole models: verdict, summary, bits, position."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from posttrain.report import charts, content, verdict, words
from posttrain.report.content import Model, Pair
from posttrain.report.html import Child, Markup, tag
from posttrain.report.parts import (
    Report,
    exact,
    figure,
    legend,
    notes,
    row_head,
    section,
    table,
)


def verdict_section(report: Report) -> Markup:
    pairs = report.main_pairs
    lead: Child = None
    if len(pairs) == 1 and (meaning := verdict.meaning(pairs[0])):
        lead = tag("p", meaning, class_="lead")
    elif len(pairs) > 1:
        said = [verdict.sentence(pair, among_others=True) for pair in pairs]
        lead = tag("ul", [tag("li", sentence) for sentence in said], class_="lead")
    return tag(
        "header",
        tag("p", "posttrain report", class_="eyebrow"),
        tag("h1", verdict.headline(report.models, pairs)),
        lead,
        _tiles(pairs[0]) if len(pairs) == 1 else None,
        id="verdict",
    )


OF_THE_FILE = ("bits_per_weight", "bytes")


def _tiles(pair: Pair) -> Markup:
    """The figures of a single pair, after and before."""

    def tile(title: str, key: str, say: Callable[[float | None], str]) -> Child:
        before, after = pair.a.get(key), pair.b.get(key)
        if before is None or after is None:
            return None
        stored = pair.from_file and key in OF_THE_FILE
        beside = f"{pair.a.short}: {say(before)} in its file" if stored else f"from {say(before)}"
        return _tile(title, exact(after, say(after)), beside)

    agreement = pair.agreement
    tiles = [
        tile("Bits per weight", "bits_per_weight", words.bits),
        tile("Size of the weights", "bytes", words.size),
        tile("Perplexity", "perplexity", words.number),
        agreement is not None
        and _tile(
            "Same next token",
            exact(agreement, words.percent(agreement)),
            "of all positions, greedy",
        )
        or None,
    ]
    return tag("dl", tiles, class_="tiles")


def _tile(title: str, big: Child, small: str) -> Markup:
    return tag(
        "div", tag("dt", title), tag("dd", tag("span", big, class_="big"), tag("small", small))
    )


@dataclass(frozen=True)
class Column:
    """A column of the summary: its heading, and what it says of a model and of its pair."""

    head: Child
    show: Callable[[Model, Pair | None], Child]


def _of_model(head: Child, name: str, say: Callable[[float | None], str]) -> Column:
    return Column(head, lambda model, _: exact(model.get(name), say(model.get(name))))


def _of_pair(head: Child, show: Callable[[Pair], Child]) -> Column:
    return Column(head, lambda _, pair: None if pair is None else show(pair))


MODEL_COLUMNS: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
    ("bits per\u00a0weight", "bits_per_weight", words.bits),
    ("size", "bytes", words.size),
    ("perplexity", "perplexity", words.number),
)


def summary(report: Report) -> Markup:
    """Models in rows; differences against the reference where they were measured in pairs."""
    by_model = {pair.b.index: pair for pair in report.main_pairs}
    columns = _pair_columns(report, report.main_pairs) + [
        _of_model(*column)
        for column in MODEL_COLUMNS
        if any(model.get(column[1]) is not None for model in report.models)
    ]
    rows = []
    for model in report.models:
        said = ["reference"] if by_model and model is report.reference else []
        note = ", ".join([*said, f"{model.file} file"] if model.file else said)
        cells = [tag("td", column.show(model, by_model.get(model.index))) for column in columns]
        rows.append(tag("tr", row_head(report, model, note), cells))
    intro = f"Differences are against {report.reference.short}, token by token on the same text"
    if any(pair.interval for pair in report.main_pairs):
        intro += f"; bars are {words.CONFIDENCE} intervals, the dashed line is no difference"
    return section(
        "summary",
        "Summary",
        tag("p", f"{intro}.", class_="soft") if by_model else None,
        table(["model", *(column.head for column in columns)], rows, "summary of all models"),
        _other_pairs(report),
        notes(report),
    )


def _pair_columns(report: Report, pairs: Sequence[Pair]) -> list[Column]:
    """The columns about pairs that at least one of them has a value for."""
    if not pairs:
        return []
    columns = [_of_pair("\u0394NLL, nats per\u00a0token", _difference)]
    if scale := charts.interval_scale(pairs):
        head = [f"{words.CONFIDENCE} interval", charts.interval_axis(scale)]
        columns.append(
            _of_pair(
                tag("div", head, class_="mid"),
                lambda pair: charts.interval(pair, scale, report.class_(pair.b)),
            )
        )
    if any(pair.kl is not None for pair in pairs):
        columns.append(_of_pair("KL, nats", lambda pair: exact(pair.kl, words.loss(pair.kl))))
    if any(pair.agreement is not None for pair in pairs):
        columns.append(
            _of_pair(
                "same next token",
                lambda pair: exact(pair.agreement, words.percent(pair.agreement)),
            )
        )
    return columns


def _difference(pair: Pair) -> Child:
    return exact(pair.delta, words.delta(pair.delta, pair.low, pair.high)[0])


def _other_pairs(report: Report) -> Child:
    pairs = report.other_pairs
    if not pairs:
        return None
    columns = _pair_columns(report, pairs)
    rows = [
        tag(
            "tr",
            tag("th", f"{pair.b.short} against {pair.a.short}", scope="row"),
            [tag("td", column.show(pair.b, pair)) for column in columns],
        )
        for pair in pairs
    ]
    return [
        tag("h3", "Other pairs"),
        table(["pair", *(column.head for column in columns)], rows, "other pairs of models"),
    ]


def quality(report: Report) -> Child:
    """Bits against the paired difference, or against perplexity where nothing was paired."""
    by_model = {pair.b.index: pair for pair in report.main_pairs if pair.defined}
    spots = [
        spot for model in report.models if (spot := _spot(report, model, by_model)) is not None
    ]
    if len(spots) < 2:
        return None
    paired = bool(by_model)
    unit = "\u0394NLL, nats per token" if paired else "perplexity"
    caption = "Lower and further left is better."
    if paired:
        caption += f" The difference is against {report.reference.short}"
        drawn = any(pair.interval for pair in by_model.values())
        caption += f"; lines are {words.CONFIDENCE} intervals." if drawn else "."
    if packed := [spot.model.short for spot in spots if spot.model.file]:
        caption += f" Bits of {words.join(packed)} are those of the file, before it is expanded."
    return section(
        "quality",
        "Bits against quality",
        figure(
            caption,
            lambda width: charts.quality(spots, width, unit, signed=paired),
            legend(report, [spot.model for spot in spots]) if len(spots) > 2 else None,
        ),
    )


def _spot(report: Report, model: Model, by_model: Mapping[int, Pair]) -> charts.Spot | None:
    at, class_ = model.get("bits_per_weight"), report.class_(model)
    if at is None or not content.finite(at) or at <= 0:
        return None
    if pair := by_model.get(model.index):
        return charts.Spot(model, at, pair.delta, *pair.ends, class_)
    if by_model:
        return charts.Spot(model, at, 0.0, 0.0, 0.0, class_) if model is report.reference else None
    level = model.get("perplexity")
    if level is None or not content.finite(level):
        return None
    return charts.Spot(model, at, level, level, level, class_)


def position(report: Report) -> Child:
    """Loss by position in the window, and the differences from the reference below it."""
    found = report.data.get("position_nll")
    if not isinstance(found, Mapping) or not isinstance(found.get("models"), Mapping):
        return None
    bins, curves = _curves(report, found)
    if bins is None or not curves:
        return None
    shown = [model for model in report.models if model.index in curves]
    drawn = list(curves.values())
    if len(drawn) > 2:  # more bands than two hide each other, and all are about as wide
        drawn = [drawn[0], *(replace(curve, low=(), high=()) for curve in drawn[1:])]
    figures = [
        figure(
            "Loss at each distance from the start of the window: with more context before it, a "
            f"token is easier to predict. {_bands(drawn)}",
            lambda width: charts.position(bins, drawn, width, "NLL, nats per token"),
            legend(report, shown),
        )
    ]
    base = curves.get(report.reference.index)
    others = [
        _minus(curve, base)
        for index, curve in curves.items()
        if base and index != report.reference.index
    ]
    if others:
        figures.append(
            figure(
                f"The same, as difference from {report.reference.short}.",
                lambda width: charts.position(
                    bins, others, width, "\u0394NLL, nats per token", True
                ),
            )
        )
    return section("position", "Loss by position", figures)


def _bands(curves: Sequence[charts.Curve]) -> str:
    """What the caption says of bands: nothing, of one curve, or of all."""
    banded = [curve.name for curve in curves if curve.banded]
    if not banded:
        return ""
    if len(banded) == len(curves):
        return f"Bands are {words.CONFIDENCE} intervals."
    return f"The band is the {words.CONFIDENCE} interval of {banded[0]}."


def _curves(
    report: Report,
    found: Mapping[str, Any],
) -> tuple[charts.Bins | None, dict[int, charts.Curve]]:
    """The bins, and a curve for each model that has as many values as there are bins."""
    edges = [float(edge) for edge in content.items(found.get("edges")) if content.finite(edge)]
    if len(edges) < 2 or edges != sorted(set(edges)) or edges[0] < 0:
        return None, {}
    curves = {}
    for model in report.models:
        measured = found["models"].get(model.name)
        if isinstance(measured, Mapping):
            mean, low, high = (_series(measured.get(key)) for key in ("mean", "low", "high"))
            if len(mean) == len(edges) - 1:
                curves[model.index] = charts.Curve(
                    model.short, report.class_(model), mean, low, high
                )
    return charts.Bins(tuple(edges)), curves


def _series(values: object) -> tuple[float | None, ...]:
    listed = values if isinstance(values, (list, tuple)) else ()
    return tuple(float(v) if content.finite(v) else None for v in listed)


def _minus(curve: charts.Curve, base: charts.Curve) -> charts.Curve:
    mean = tuple(
        None if a is None or b is None else a - b
        for a, b in zip(curve.mean, base.mean, strict=True)
    )
    return charts.Curve(curve.name, curve.class_, mean)
