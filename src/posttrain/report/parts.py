"""What the sections share: the models they speak of, and the pieces they are made of."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.report import charts, content, words
from posttrain.report.content import Model, Pair
from posttrain.report.html import Child, Markup, tag

WIDE, NARROW = 880, 300  # px; the style sheet shows one of the two drawings of each chart


@dataclass(frozen=True)
class Report:
    """The raw data and the models and pairs read from it."""

    data: Mapping[str, Any]
    models: Sequence[Model]
    pairs: Sequence[Pair]

    @property
    def reference(self) -> Model:
        return self.pairs[0].a if self.pairs else self.models[0]

    @property
    def main_pairs(self) -> list[Pair]:
        """The first pair of each other model against the reference."""
        found: dict[int, Pair] = {}
        for pair in self.pairs:
            if pair.a is self.reference:
                found.setdefault(pair.b.index, pair)
        return list(found.values())

    @property
    def other_pairs(self) -> list[Pair]:
        main = self.main_pairs
        return [pair for pair in self.pairs if pair not in main]

    def class_(self, model: Model) -> str:
        return charts.series(model, self.reference)

    def named(self, name: object) -> Model | None:
        return next((model for model in self.models if model.name == name), None)


def section(name: str, title: str, *children: Child) -> Markup:
    return tag("section", tag("h2", title), children, id=name)


def figure(caption: Child, draw: Callable[[float], Markup], key: Child = None) -> Markup:
    """A chart with its explanation, drawn once for a page and once for a phone."""
    return tag(
        "figure",
        tag("figcaption", caption) if caption else None,
        key,
        tag("div", draw(WIDE), class_="wide"),
        tag("div", draw(NARROW), class_="narrow"),
    )


def exact(value: float | None, shown: str) -> Markup:
    """A number as a person reads it, with the exact one for machines."""
    return Markup(words.MISSING) if value is None else tag("data", shown, value=repr(value))


def key(report: Report, model: Model) -> Markup:
    return tag("span", class_=f"key {report.class_(model)}", aria_hidden="true")


def row_head(report: Report, model: Model, note: str = "") -> Markup:
    """The row heading of a model: its colour, its short name, and a note below."""
    small = tag("small", note) if note else None
    name = tag("span", model.short, class_="name", title=model.name)
    return tag("th", key(report, model), name, small, scope="row")


def table(heads: Sequence[Child], rows: Sequence[Child], label: str, class_: str = "") -> Markup:
    """A table that scrolls inside its section when the screen is narrower than its columns."""
    head = tag("thead", tag("tr", [tag("th", h, scope="col") for h in heads]))
    table = tag("table", head, tag("tbody", rows), class_=class_)
    return tag("div", table, class_="scroll", tabindex=0, role="region", aria_label=label)


def legend(report: Report, models: Sequence[Model]) -> Markup:
    return tag("ul", [tag("li", key(report, m), m.short) for m in models], class_="legend")


def facts(facts: Sequence[tuple[str, Child]]) -> Markup:
    return tag(
        "dl",
        [[tag("dt", name), tag("dd", value)] for name, value in facts if value],
        class_="facts",
    )


def notes(report: Report) -> list[Markup]:
    """What the reader must know to read the numbers right, from the comparison itself."""
    said = report.data.get("notes")
    listed = [said] if isinstance(said, str) else content.items(said)
    return [tag("p", note, class_="note") for note in listed if note]
