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
    if found is None and not moved:
        return None
    parts: list[Child] = [tag("h3", model.short)]
    if found and found.cells:
        span = min(found.cells.values()), max(found.cells.values())
        legend = _ramp(span) if span[0] < span[1] else None
        parts.append(figure(None, lambda width: charts.heat(found, width, span), legend))
    if found and found.merged:
        said = "Where several experts share a cell, it shows the worst of them."
        parts.append(tag("p", said, class_="soft"))
    if found and found.outside:
        said = words.join([f"{name} {words.number(qsnr, 1)} dB" for name, qsnr in found.outside])
        parts.append(tag("p", f"QSNR outside the blocks: {said}."))
    if moved:
        parts.append(_sensitivity(moved, found))
    return [*parts, _layer_table(model) if found else None]


def _ramp(span: tuple[float, float]) -> Markup:
    """The legend of the heat map; its colours span the layers of one model."""
    low, high = (words.number(value, 1) for value in span)
    steps = [tag("i", class_=f"h{step}") for step in range(HEAT)]
    ends = tag("span", f"cleanest {high} dB"), tag("span", f"{low} dB noisiest")
    return tag("p", ends[0], steps, ends[1], class_="ramp")


def _sensitivity(moved: list[tuple[str, float]], found: LayerMap | None) -> Markup:
    left = max(charts.layer_left(found.kinds) if found else 0.0, 60.0)
    return figure(
        None,
        lambda width: charts.bars(
            moved,
            width,
            left if width > charts.PHONE else 60.0,
            found.blocks if found else (),
            "KL when this block alone is quantized, nats",
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
