"""Scales, ticks, axes and marks: the few parts that every chart of the report is made of.

Coordinates are SVG units with y downwards; a chart is drawn for one width in CSS pixels and may
be shown scaled. Colours come from classes (theme.py), so that one drawing serves light, dark and
print.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from posttrain.report.html import Child, Markup, tag
from posttrain.report.words import number

FONT = 12  # px, of all text in charts
_NARROW, _WIDE = frozenset("iljtfrI.,:;'|()[]!/ "), frozenset("mwMW@%\u2026")


def text_width(text: str, size: float = FONT) -> float:
    """A generous estimate of the width of `text`, in px: fonts differ from reader to reader."""
    widths = (
        0.36
        if c in _NARROW
        else 1.0
        if c in _WIDE or ord(c) > 0x1100 and c != "\u2212" and not 0x2000 <= ord(c) < 0x2100
        else 0.75
        if c.isupper()
        else 0.62
        for c in text
    )
    return size * sum(widths)


def shorten(text: str, width: float) -> str:
    """`text`, or as much of its start and end as fits `width`, with an ellipsis between."""
    if text_width(text) <= width:
        return text
    keep = len(text)
    while (
        keep > 2
        and text_width(cut := f"{text[: (keep + 1) // 2]}\u2026{text[-(keep // 2) :]}") > width
    ):
        keep -= 1
    return cut


@dataclass(frozen=True)
class Scale:
    """Maps values of [low, high] to px of [start, end], linearly or by their logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self._warp(self.low), self._warp(self.high)
        share = (self._warp(value) - low) / (high - low)
        return self.start + share * (self.end - self.start)

    def _warp(self, value: float) -> float:
        return math.log2(value) if self.log else value


def span(values: Sequence[float], pad: float = 0.06) -> tuple[float, float]:
    """The interval that holds `values` with room at both ends; never empty."""
    low, high = min(values), max(values)
    room = pad * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + room


def log_span(values: Sequence[float], pad: float = 0.12) -> tuple[float, float]:
    """As `span`, with the room measured in the logarithm. All values are positive."""
    low, high = span([math.log2(value) for value in values], pad)
    return 2**low, 2**high


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round values in [low, high]: multiples of 1, 2 or 5 times a power of ten.

    >>> ticks(0, 0.11), ticks(-3, 17, 4)
    ([0.0, 0.02, 0.04, 0.06, 0.08, 0.1], [0.0, 5.0, 10.0, 15.0])
    """
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= rough * 0.8)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def log_ticks(low: float, high: float, room: float) -> list[float]:
    """Powers of two and, where `room` px allow, the values halfway between; round values on an
    interval too short for three of them.

    >>> log_ticks(3.5, 36, 400), log_ticks(0.5, 512, 300)[-3:]
    ([4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0], [128.0, 256.0, 512.0])
    """
    powers = [2.0**p for p in range(40) if low <= 2.0**p <= high]
    halves = sorted(powers + [1.5 * 2.0**p for p in range(1, 40) if low <= 1.5 * 2.0**p <= high])
    inside = halves if len(halves) * 40 <= room else powers
    return inside if len(inside) >= 3 else ticks(low, high, 4)


def tick_labels(values: Sequence[float], signed: bool = False) -> list[str]:
    """The values with as many decimals as the finest needs; zero without a sign."""
    places = max((len(f"{value:.10f}".rstrip("0").split(".")[1]) for value in values), default=0)
    return [number(value, places, signed) for value in values]


def text(x: float, y: float, content: Child, class_: str = "tick", anchor: str = "start") -> Markup:
    return tag(
        "text", content, x=x, y=y, class_=class_, text_anchor=None if anchor == "start" else anchor
    )


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def rect(
    x: float, y: float, width: float, height: float, class_: str, *inside: Child, round_: float = 0
) -> Markup:
    return tag(
        "rect", *inside, x=x, y=y, width=width, height=height, class_=class_, rx=round_ or None
    )


def dot(x: float, y: float, class_: str, *inside: Child, radius: float = 5) -> Markup:
    return tag("circle", *inside, cx=x, cy=y, r=radius, class_=class_)


def _points(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def curve(points: Sequence[tuple[float, float]], class_: str) -> Markup:
    return tag("path", d=_points(points), class_=class_)


def band(
    lower: Sequence[tuple[float, float]], upper: Sequence[tuple[float, float]], class_: str
) -> Markup:
    return tag("path", d=_points([*upper, *reversed(lower)]) + "Z", class_=class_)


def drawing(width: float, height: float, label: str, *marks: Child, class_: str = "") -> Markup:
    """An SVG image that scales with the page and that a screen reader reads as `label`."""
    return tag(
        "svg",
        marks,
        viewBox=f"0 0 {width:g} {height:g}",
        width=float(width),
        height=float(height),
        role="img",
        aria_label=label,
        class_=class_,
    )


@dataclass(frozen=True)
class Frame:
    """The box of a chart with two axes: where its plot area is, its scales and its ticks."""

    width: float
    height: float
    x: Scale
    y: Scale
    x_ticks: tuple[float, ...]
    y_ticks: tuple[float, ...]
    signed: bool  # y is a difference

    def axes(self, x_title: str, y_title: str) -> list[Markup]:
        """Grid, tick labels, the unit of y above its axis and of x below its end."""
        left, right, bottom = self.x.start, self.x.end, self.y.start
        marks = [text(0, FONT, y_title, "axis")]
        for value, label in zip(self.y_ticks, tick_labels(self.y_ticks, self.signed), strict=True):
            at = self.y(value)
            marks.append(
                line(left, at, right, at, "zero" if self.signed and value == 0 else "grid")
            )
            marks.append(text(left - 8, at + 4, label, anchor="end"))
        marks.append(line(left, bottom, right, bottom, "base"))
        free = -math.inf  # labels that would run into the one before are left out
        for value, label in zip(self.x_ticks, tick_labels(self.x_ticks), strict=True):
            at, half = self.x(value), text_width(label) / 2
            marks.append(line(at, bottom, at, bottom + 4, "base"))
            if at - half >= free:
                marks.append(text(at, bottom + 17, label, anchor="middle"))
                free = at + half + 4
        marks.append(text(right, self.height - 4, x_title, "axis", "end"))
        return marks


def frame(
    width: float,
    height: float,
    x_span: tuple[float, float],
    y_span: tuple[float, float],
    *,
    log_x: bool = False,
    signed: bool = False,
    left: float = 0,
    right: float = 14,
) -> Frame:
    """A frame whose left margin fits its tick labels and is at least `left` px, so that charts
    below each other can share it."""
    y_ticks = ticks(*y_span, count=max(3, int(height // 50)))
    left = max([left, *(12 + text_width(label) for label in tick_labels(y_ticks, signed))])
    x_ticks = (
        log_ticks(*x_span, width - left - right)
        if log_x
        else ticks(*x_span, count=max(4, int(width // 110)))
    )
    return Frame(
        width,
        height,
        Scale(*x_span, left, width - right, log_x),
        Scale(*y_span, height - 42, 28),
        tuple(x_ticks),
        tuple(y_ticks),
        signed,
    )
