"""The charts of the report. Each is drawn for a width in px and says in words what it shows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from posttrain.report import svg, words
from posttrain.report.content import LayerMap, Model, Pair
from posttrain.report.html import Markup, tag
from posttrain.report.svg import Frame, Scale
from posttrain.report.theme import HEAT, SERIES

INTERVAL_WIDTH = 210
PHONE = 500  # px; charts drawn narrower than this are laid out for a phone


def series(model: Model, reference: Model) -> str:
    """The colour class of a model: s0 for the reference, then s1.. in the order of the models."""
    if model.index == reference.index:
        return "s0"
    place = model.index - (model.index > reference.index)
    return f"s{place % SERIES + 1}" + (" dashed" if place >= SERIES else "")


# Paired differences -----------------------------------------------------------------------


def interval_scale(pairs: Sequence[Pair]) -> Scale | None:
    """One scale for the interval column of all pairs, with zero on it."""
    values = [v for p in pairs if p.interval for v in (p.low, p.high, p.delta)]
    return Scale(*svg.span([0.0, *values], 0.04), 22, INTERVAL_WIDTH - 22) if values else None


def interval_axis(scale: Scale) -> Markup:
    """The ticks above the interval column."""
    values = svg.ticks(scale.low, scale.high, 3)
    labels = svg.tick_labels(values, signed=True)
    while len(values) > 2 and max(map(svg.text_width, labels)) > 0.9 * (
        scale(values[1]) - scale(values[0])
    ):
        values, labels = values[::2], labels[::2]
    marks = [
        svg.text(scale(v), 12, label, anchor="middle")
        for v, label in zip(values, labels, strict=True)
    ]
    return svg.drawing(INTERVAL_WIDTH, 16, f"scale from {labels[0]} to {labels[-1]}", marks)


def interval(pair: Pair, scale: Scale, class_: str) -> Markup:
    """The difference as a stroke across its interval; the dashed line is zero."""
    if not pair.interval:
        return Markup(words.MISSING)
    value, low, high = words.delta(pair.delta, pair.low, pair.high)
    label = f"{value}, interval {low} to {high}"
    at, start, end = map(scale, (pair.delta, pair.low, pair.high))
    marks = [
        svg.line(scale(0), 0, scale(0), 26, "zero"),
        svg.rect(start, 8, end - start, 10, f"{class_} fill faint", round_=2),
        svg.rect(at - 1.5, 4, 3, 18, f"{class_} fill", tag("title", label), round_=1.5),
    ]
    return svg.drawing(INTERVAL_WIDTH, 26, label, marks)


# Bits against quality ---------------------------------------------------------------------


@dataclass(frozen=True)
class Spot:
    """A model in the plane of bits and quality: y is its difference, or its perplexity."""

    model: Model
    bits: float
    y: float
    low: float
    high: float
    class_: str

    @property
    def tip(self) -> str:
        return f"{self.model.short}\n{words.bits(self.bits)} bits per weight\n{words.loss(self.y)}"


def quality(spots: Sequence[Spot], width: float, y_title: str, signed: bool) -> Markup:
    """Bits per weight (logarithmic) against the loss, with intervals; low and left is better."""
    values = [v for spot in spots for v in (spot.low, spot.high)] + ([0.0] if signed else [])
    box = svg.frame(
        width,
        340 if width > PHONE else 300,
        svg.log_span([s.bits for s in spots]),
        svg.span(values, 0.12),
        log_x=True,
        signed=signed,
    )
    marks = box.axes("bits per weight, scales included", y_title)
    for spot in spots:
        x = box.x(spot.bits)
        marks.append(svg.line(x, box.y(spot.low), x, box.y(spot.high), f"{spot.class_} stroke"))
    marks += [
        svg.dot(box.x(s.bits), box.y(s.y), f"{s.class_} fill ring", tag("title", s.tip), radius=6)
        for s in spots
    ]
    marks += _spot_names(spots, box)
    listed = "; ".join(spot.tip.replace("\n", ", ") for spot in spots)
    return svg.drawing(width, box.height, f"{y_title} against bits per weight: {listed}", marks)


Box = tuple[float, float, float, float]  # x, y, width, height


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[3] and b[1] < a[1] + a[3]


def _spot_names(spots: Sequence[Spot], box: Frame) -> list[Markup]:
    """Each name beside its dot, in the first place where it covers nothing; none where there is
    no such place or dots are so close that it could be either's (the legend has all names)."""
    room = box.x.start, box.y.end - 10, box.x.end + 10, box.y.start - 2
    dots: list[Box] = [(box.x(s.bits) - 7, box.y(s.y) - 7, 14, 14) for s in spots]
    stems = [(box.x(s.bits) - 2, box.y(s.high), 4, box.y(s.low) - box.y(s.high)) for s in spots]
    taken, marks = [*dots, *stems], []
    for spot, dot in zip(spots, dots, strict=True):
        if sum(_overlap(dot, other) for other in dots) > 1:
            continue
        name = svg.shorten(spot.model.short, 0.45 * box.width)
        for place in _places(box.x(spot.bits), box.y(spot.y), svg.text_width(name)):
            inside = (
                place[0] >= room[0]
                and place[1] >= room[1]
                and place[0] + place[2] <= room[2]
                and place[1] + place[3] <= room[3]
            )
            if inside and not any(_overlap(place, other) for other in taken):
                taken.append(place)
                marks.append(svg.text(place[0], place[1] + 12, name, "label"))
                break
    return marks


def _places(x: float, y: float, wide: float) -> list[Box]:
    """Where a name may stand beside a dot, best first: right, left, then above and below."""
    starts = {1: x + 11, -1: x - 11 - wide, 0: x - wide / 2}
    return [(starts[side], y + up, wide, 16.0) for up in (-8, -26, 10) for side in (1, -1, 0)]


# Loss by position -------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """One line over the position in the window, with its band where there is one."""

    name: str
    class_: str
    mean: tuple[float | None, ...]
    low: tuple[float | None, ...] = ()
    high: tuple[float | None, ...] = ()

    @property
    def banded(self) -> bool:
        return all(any(end is not None for end in ends) for ends in (self.low, self.high))


@dataclass(frozen=True)
class Bins:
    """Bins of positions: bin i holds `edges[i]` to `edges[i + 1] - 1`, drawn at their middle."""

    edges: tuple[float, ...]

    @property
    def middles(self) -> list[float]:
        return [(a + b - 1) / 2 for a, b in pairwise(self.edges)]

    @property
    def uneven(self) -> bool:
        """Whether the bins widen so much that a logarithmic axis shows them better."""
        widest, first = self.edges[-1] - self.edges[-2], self.edges[1] - self.edges[0]
        return self.edges[0] >= 1 and widest > 4 * first

    def label(self, i: int) -> str:
        first, last = self.edges[i], self.edges[i + 1] - 1
        return f"position {first:g}" if last <= first else f"positions {first:g}\u2013{last:g}"


def position(
    bins: Bins, curves: Sequence[Curve], width: float, y_title: str, signed: bool = False
) -> Markup:
    """Lines with bands over the position in the window; every bin says its values."""
    values = [v for c in curves for part in (c.mean, c.low, c.high) for v in part if v is not None]
    middles = bins.middles
    x_span = svg.log_span(middles, 0.02) if bins.uneven else (bins.edges[0], bins.edges[-1])
    box = svg.frame(
        width,
        210 if signed else 300,
        x_span,
        svg.span(values + [0.0] * signed),
        log_x=bins.uneven,
        signed=signed,
        left=60,
    )
    marks = box.axes("position in the window, tokens", y_title)
    for curve in curves:
        lower, upper = (_path(box, middles, part) for part in (curve.low, curve.high))
        if lower and len(lower) == len(upper):
            marks.append(svg.band(lower, upper, f"{curve.class_} band"))
    for curve in curves:
        if points := _path(box, middles, curve.mean):
            marks.append(svg.curve(points, f"{curve.class_} stroke"))
            if len(points) < 3:
                marks += [svg.dot(*p, f"{curve.class_} fill", radius=4) for p in points]
    marks += _bin_tips(box, bins, curves, signed)
    names = words.join([curve.name for curve in curves])
    return svg.drawing(width, box.height, f"{y_title} by position in the window: {names}", marks)


def _path(box: Frame, x: Sequence[float], y: Sequence[float | None]) -> list[tuple[float, float]]:
    return [(box.x(a), box.y(b)) for a, b in zip(x, y, strict=False) if b is not None]


def _bin_tips(box: Frame, bins: Bins, curves: Sequence[Curve], signed: bool) -> list[Markup]:
    marks = []
    for i in range(len(bins.edges) - 1):
        left, right = (
            min(max(box.x(max(edge, box.x.low)), box.x.start), box.x.end)
            for edge in bins.edges[i : i + 2]
        )
        said = [
            f"{c.name}: {words.number(c.mean[i], 4, signed)}" for c in curves if i < len(c.mean)
        ]
        marks.append(
            svg.rect(
                left,
                box.y.end,
                right - left,
                box.y.start - box.y.end,
                "hit",
                tag("title", "\n".join([bins.label(i), *said])),
            )
        )
    return marks


# Layers -----------------------------------------------------------------------------------


def heat_step(value: float, span: tuple[float, float]) -> int:
    """0 for the cleanest (highest value) to HEAT - 1 for the noisiest layers of the page."""
    low, high = span
    if high <= low:
        return HEAT // 2
    return min(HEAT - 1, int((high - value) / (high - low) * HEAT))


def kind_labels(kinds: Sequence[str]) -> list[str]:
    """The last component of each projection where that is unique: `q_proj`, `down_proj`.

    >>> kind_labels(["self_attn.q_proj", "mlp.up_proj"]), kind_labels(["a.up", "b.up"])
    (['q_proj', 'up_proj'], ['a.up', 'b.up'])
    """
    last = [kind.rsplit(".", 1)[-1] for kind in kinds]
    return [tail if last.count(tail) == 1 else kind for tail, kind in zip(last, kinds, strict=True)]


def layer_left(kinds: Sequence[str]) -> float:
    """The left margin that the names of the projections need: shared with the bars below."""
    return min(240.0, 12 + max((svg.text_width(name) for name in kind_labels(kinds)), default=40))


@dataclass(frozen=True)
class Measure:
    """What a heat map shows, and how its values are written."""

    name: str
    unit: str
    decimals: int

    def say(self, value: float) -> str:
        return f"{words.number(value, self.decimals)} {self.unit}"


QSNR, BITS = Measure("QSNR", "dB", 1), Measure("bits per weight", "bits", 2)


def heat(
    found: LayerMap,
    width: float,
    span: tuple[float, float],
    measure: Measure = QSNR,
    more: Mapping[tuple[int, str], str] | None = None,
) -> Markup:
    """A value of every quantized linear: blocks across and projections down; turned when narrow.

    more: said of a cell below its value.
    """
    turned = width < PHONE
    names = kind_labels(found.kinds)
    blocks = [str(block) for block in found.blocks]
    if turned:
        names = [name.removesuffix("_proj") for name in names]
    across, down = (names, blocks) if turned else (blocks, names)
    left = 34.0 if turned else layer_left(found.kinds)
    step = min(56.0 if turned else 44.0, (width - left) / max(1, len(across)))
    tall = 18.0 if turned else 26.0
    marks = _heat_labels(across, down, left, step, tall)
    for (block, kind), value in found.cells.items():
        i, j = found.blocks.index(block), found.kinds.index(kind)
        column, row = (j, i) if turned else (i, j)
        tip = f"block {block}, {kind}\n{measure.say(value)}"
        tip += f"\n{more[block, kind]}" if more and (block, kind) in more else ""
        marks += _heat_cell(left + column * step, 22 + row * tall, step, tall, value, span, tip)
    return svg.drawing(width, 24 + len(down) * tall, _heat_words(found, measure), marks)


def _heat_words(found: LayerMap, measure: Measure) -> str:
    (block, kind), value = min(found.cells.items(), key=lambda item: item[1])
    return (
        f"{measure.name} by block and projection: {len(found.cells)} cells from "
        f"{words.number(value, measure.decimals)} to {measure.say(max(found.cells.values()))}; "
        f"lowest in block {block}, {kind}"
    )


def _heat_cell(
    x: float, y: float, wide: float, tall: float, value: float, span: tuple[float, float], tip: str
) -> list[Markup]:
    step = heat_step(value, span)
    gap = 1 if wide > 6 else 0.4
    marks = [svg.rect(x, y, wide - gap, tall - gap, f"h{step} heat", tag("title", tip))]
    if wide >= 20:
        label = words.number(value, 1 if wide >= 24 else 0)
        small = " small" if 24 <= wide < 34 else ""
        marks.append(
            tag("text", label, x=x + wide / 2, y=y + tall / 2 + 4, text_anchor="middle",
                class_=f"cell{small} t{step}", pointer_events="none")
        )  # fmt: skip
    return marks


def _heat_labels(
    across: Sequence[str], down: Sequence[str], left: float, step: float, tall: float
) -> list[Markup]:
    every = label_stride(max(map(svg.text_width, across), default=0), step, across)
    marks = [
        svg.text(
            left + (i + 0.5) * step,
            14,
            svg.shorten(name, max(step, 24) * every - 2),
            anchor="middle",
        )
        for i, name in enumerate(across)
        if i % every == 0
    ]
    every = 1 if tall >= 16 else 2
    return marks + [
        svg.text(left - 8, 22 + (i + 0.5) * tall + 4, svg.shorten(name, left - 12), anchor="end")
        for i, name in enumerate(down)
        if i % every == 0
    ]


def label_stride(widest: float, step: float, labels: Sequence[str]) -> int:
    """Every how many columns a label fits: 1 for names (shortened instead), 1, 2, 5, 10.. for
    block numbers."""
    if not all(label.isdigit() for label in labels):
        return 1
    return next(n for n in (1, 2, 5, 10, 20, 50, 100, 1000) if n * step >= widest + 4)


def bars(
    values: Sequence[tuple[str, float]],
    width: float,
    left: float,
    blocks: Sequence[int],
    y_title: str,
) -> Markup:
    """A bar for each block, in the columns of the heat map above when it is drawn for the same
    `blocks` and `left` margin."""
    order = {str(block): i for i, block in enumerate(blocks)}
    if not all(block in order for block, _ in values):
        order = {block: i for i, (block, _) in enumerate(values)}
    top = max([kl for _, kl in values] + [0.0]) or 1.0
    low = min([kl for _, kl in values] + [0.0])
    step = min(44.0, (width - left) / len(order))
    y, marks = Scale(low, top * 1.08, 150, 28), [svg.text(0, svg.FONT, y_title, "axis")]
    right = left + step * len(order)
    y_ticks = svg.ticks(y.low, y.high, 3)
    for value, label in zip(y_ticks, svg.tick_labels(y_ticks), strict=True):
        marks += [
            svg.line(left, y(value), right, y(value), "base" if value == 0 else "grid"),
            svg.text(left - 8, y(value) + 4, label, anchor="end"),
        ]
    every = label_stride(max(map(svg.text_width, order)), step, list(order))
    for block, kl in values:
        x = left + order[block] * step
        marks.append(
            svg.rect(
                x + 0.1 * step,
                min(y(kl), y(0)),
                0.8 * step,
                max(abs(y(kl) - y(0)), 0.5),
                "s1 fill bar",
                tag("title", f"block {block}\n{words.loss(kl)} nats"),
            )
        )
        if order[block] % every == 0:
            marks.append(
                svg.text(x + step / 2, 166, svg.shorten(block, max(step, 24)), anchor="middle")
            )
    marks.append(svg.text(right, 182, "block", "axis", "end"))
    worst = max(values, key=lambda item: item[1])
    return svg.drawing(
        width,
        186,
        f"{y_title}, {len(values)} blocks; largest in block {worst[0]}: {words.loss(worst[1])}",
        marks,
    )
