"""Small multiples for what an experiment swept: one panel for each setting, one line for each series."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from posttrain.report.html import Markup
from posttrain.report.svg import band, curve, drawing, frame, line, span, text, text_width

PANEL, HEIGHT, GAP, TOP = 340, 220, 28, 64
COLOURS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#475569")
STYLE = (
    "<style>text{font:12px system-ui,sans-serif;fill:#333}.head{font-weight:600}"
    ".grid{stroke:#e2e8f0}.base,.zero{stroke:#94a3b8}path{fill:none;stroke-width:2}"
    + "".join(
        f".s{i}{{stroke:{c}}}.b{i}{{fill:{c};fill-opacity:.12;stroke:none}}"
        for i, c in enumerate(COLOURS)
    )
    + "@media(prefers-color-scheme:dark){text{fill:#ddd}.grid{stroke:#334155}}</style>"
)


@dataclass(frozen=True)
class Series:
    """y over x, with an interval at each point."""

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def panels(
    label: str, x_title: str, y_title: str, found: Mapping[str, Mapping[str, Series]]
) -> str:
    """An SVG file. found: title of a panel -> name of a series -> what was measured."""
    names = list(dict.fromkeys(name for panel in found.values() for name in panel))
    if len(names) > len(COLOURS):
        raise ValueError(f"{len(names)} series, {len(COLOURS)} colours")
    every = [series for panel in found.values() for series in panel.values()]
    x_span = span([v for s in every for v in s.x])
    y_span = span([v for s in every for v in (*s.low, *s.high)])
    columns = 2 if len(found) > 1 else 1
    marks: list[Markup] = [Markup(STYLE), text(0, 14, label, "head"), *_legend(names)]
    for place, (title, panel) in enumerate(found.items()):
        box = frame(PANEL, HEIGHT, x_span, y_span, signed=True)
        inside: list[Markup] = [
            text(PANEL - 14, 14, title, "head", "end"),
            *box.axes(x_title, y_title),
        ]
        for name, series in panel.items():
            i = names.index(name)
            across = [box.x(v) for v in series.x]
            low, mid, high = (
                list(zip(across, map(box.y, ys), strict=True))
                for ys in (series.low, series.y, series.high)
            )
            inside += [band(low, high, f"b{i}"), curve(mid, f"s{i}")]
        x, y = place % columns * (PANEL + GAP), TOP + place // columns * (HEIGHT + GAP)
        marks.append(Markup(f'<g transform="translate({x} {y})">{"".join(map(str, inside))}</g>'))
    rows = -(-len(found) // columns)
    picture = drawing(
        columns * (PANEL + GAP) - GAP, TOP + rows * (HEIGHT + GAP) - GAP, label, *marks
    )
    return str(picture).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1) + "\n"


def _legend(names: Sequence[str]) -> list[Markup]:
    marks, x = [], 0.0
    for i, name in enumerate(names):
        marks += [line(x, 34, x + 18, 34, f"s{i}"), text(x + 24, 38, name)]
        x += 24 + text_width(name) + 20
    return marks
