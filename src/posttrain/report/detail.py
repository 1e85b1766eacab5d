"""The sections of the page about the inside of models: layers, and what they write."""

from collections.abc import Mapping
from typing import Any

from posttrain.report import charts, content, words
from posttrain.report.content import LayerMap, Model
from posttrain.report.html import Child, Markup, tag
from posttrain.report.parts import Report, exact, figure, key, section, table
from posttrain.report.theme import HEAT

QSNR_AND_SENSITIVITY = (
    "QSNR is the power of a layer's weights over the power of the error that quantization put into "
    "them; 6 dB is about one bit. A block's sensitivity is how far the model's predictions move "
    "when that block alone is quantized."
)


def layers(report: Report) -> Child:
    """For each quantized model: QSNR by block and projection, sensitivity by block, the table."""
    parts = [part for model in report.models if (part := _model_layers(model))]
    if not parts:
        return None
    return section("layers", "Layer by layer", tag("p", QSNR_AND_SENSITIVITY, class_="soft"), parts)


def _model_layers(model: Model) -> Child:
    found = content.layer_map(model.values.get("layers"))
    moved = content.sensitivity(model.values.get("block_sensitivity"))
    searched = content.search(model.values.get("search"))
    if found is None and not moved and searched is None:
        return None
    parts: list[Child] = [tag("h3", model.short)]
    if found and found.cells:
        span = min(found.cells.values()), max(found.cells.values())
        legend = _ramp("cleanest {} dB", "{} dB noisiest", span) if span[0] < span[1] else None
        parts.append(figure(None, lambda width: charts.heat(found, width, span), legend))
    if found and found.merged:
        said = "Where several experts share a cell, it shows the worst of them."
        parts.append(tag("p", said, class_="soft"))
    if found and found.outside:
        said = words.join([f"{name} {words.number(qsnr, 1)} dB" for name, qsnr in found.outside])
        parts.append(tag("p", f"QSNR outside the blocks: {said}."))
    if moved:
        title = "KL when this block alone is quantized, nats"
        parts.append(_bars(moved, found, title))
    if searched:
        parts.append(_search(searched))
    return [*parts, _layer_table(model) if found else None]


def _ramp(best: str, worst: str, span: tuple[float, float], decimals: int = 1) -> Markup:
    """The legend of a heat map, what its ends are with a place for the number; its colours span the
    layers of one model."""
    low, high = (words.number(value, decimals) for value in span)
    steps = [tag("i", class_=f"h{step}") for step in range(HEAT)]
    ends = tag("span", best.format(high)), tag("span", worst.format(low))
    return tag("p", ends[0], steps, ends[1], class_="ramp")


def _search(found: content.Search) -> Child:
    """The plan that was found for a budget: bits by block and kind, predicted loss by block."""
    how = "as measured layer by layer" if found.exact else "as estimated from gradients"
    said = (
        f"The formats were searched for: of all plans with at most as many bytes, this one has the "
        f"least predicted loss, {words.loss(found.loss)} nats a token at "
        f"{words.bits(found.bits_per_weight)} bits per weight, the sum over layers {how}."
    )
    if found.measured is not None and found.uniform is not None:
        bits, loss = found.uniform
        if found.is_uniform:
            said = (
                f"The formats were searched for, and none was found to lose less than one width for all: "
                f"{words.loss(loss)} nats a token at {words.bits(bits)} bits per weight."
            )
        else:
            said += (
                f" Measured whole it loses {words.loss(found.measured)}; one width for all, "
                f"{words.bits(bits)} bits, loses {words.loss(loss)}."
            )
    parts: list[Child] = [tag("p", said)]
    if found.bits.cells:
        span = min(found.bits.cells.values()), max(found.bits.cells.values())
        legend = _ramp("most {} bits", "{} bits fewest", span, 2) if span[0] < span[1] else None
        losses = {
            cell: f"predicted loss {words.loss(loss)} nats"
            for cell, loss in found.losses.cells.items()
        }
        caption = "Bits per weight that each group of layers got, scales included."
        draw = lambda width: charts.heat(found.bits, width, span, charts.BITS, losses)
        parts.append(figure(caption, draw, legend))
        parts.append(_bars(found.by_block, found.bits, "predicted loss of the block, nats"))
    if found.bits.outside:
        losses_outside = dict(found.losses.outside)
        listed = [
            f"{name} got {words.bits(bits)} bits (predicted loss {words.loss(losses_outside[name])} nats)"
            for name, bits in found.bits.outside
            if name in losses_outside
        ]
        parts.append(tag("p", f"Outside the blocks, {words.join(listed)}.") if listed else None)
    return parts


def _bars(moved: list[tuple[str, float]], found: LayerMap | None, title: str) -> Markup:
    left = max(charts.layer_left(found.kinds) if found else 0.0, 60.0)
    return figure(
        None,
        lambda width: charts.bars(
            moved,
            width,
            left if width > charts.PHONE else 60.0,
            found.blocks if found else (),
            title,
        ),
    )


def _layer_table(model: Model) -> Markup:
    rows = []
    for layer in content.mappings(model.values["layers"]):
        qsnr, at = (
            layer.get(key) if content.real(layer.get(key)) else None
            for key in ("qsnr", "bits_per_weight")
        )
        rows.append(
            tag(
                "tr",
                tag("th", layer.get("name"), scope="row"),
                [
                    tag("td", layer.get(key) or words.MISSING, class_="left")
                    for key in ("weight", "input")
                ],
                tag("td", exact(qsnr, words.number(qsnr))),
                tag("td", exact(at, words.bits(at))),
            )
        )
    heads = ["layer", "weight", "input", "QSNR, dB", "bits per weight"]
    return tag(
        "details",
        tag("summary", f"All {len(rows)} layers of {model.short} as a table"),
        table(heads, rows, f"layers of {model.short}", "sort"),
    )


GREEDY = "Greedy decoding of the same prompts."
MARKED = (
    f"{GREEDY} The mark starts at the first word that differs from the first text; after that "
    "they are free to differ, so where it starts matters less than whether both make sense."
)


def generations(report: Report) -> Child:
    """The same prompts to every model, marked from the first word that differs."""
    samples = [
        sample
        for sample in content.mappings(report.data.get("generations"))
        if isinstance(sample.get("outputs"), Mapping) and sample["outputs"]
    ]
    if not samples:
        return None
    several = any(len(sample["outputs"]) > 1 for sample in samples)
    return section(
        "generations",
        "Side by side" if several else "Samples",
        tag("p", MARKED if several else GREEDY, class_="soft"),
        [_sample(report, sample) for sample in samples],
    )


def _sample(report: Report, sample: Mapping[str, Any]) -> Child:
    outputs = [
        (str(name), "" if text is None else str(text)) for name, text in sample["outputs"].items()
    ]
    rank = {model.name: (model is not report.reference, model.index) for model in report.models}
    outputs.sort(key=lambda item: rank.get(item[0], (True, len(rank))))
    first = outputs[0][1]
    shown = [_output(report, *outputs[0], None)]
    shown += [_output(report, name, text, first) for name, text in outputs[1:]]
    return [
        tag("h3", "Prompt"),
        tag("div", sample.get("prompt"), class_="prompt", dir="auto"),
        tag("div", shown, class_="pair"),
    ]


def _output(report: Report, name: str, text: str, first: str | None) -> Markup:
    model = report.named(name)
    said: Child = text or tag("em", "(nothing)")
    note = ""
    if first is not None and text == first:
        note = "identical"
    elif first is not None:
        at = content.divergence(first, text)
        said = [text[:at], tag("mark", text[at:]) if text[at:] else tag("em", " (stops here)")]
        note = f"differs from character {at + 1}"
    header = tag(
        "header",
        key(report, model) if model else None,
        model.short if model else name,
        tag("em", note) if note else None,
    )
    return tag("div", header, tag("div", said, class_="text", dir="auto", tabindex=0), class_="out")
