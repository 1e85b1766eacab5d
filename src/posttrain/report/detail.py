"""The sections of the page about the inside of models: layers, and what they write."""

from collections.abc import Mapping
from typing import Any

from posttrain.report import charts, content, words
from posttrain.report.content import LayerMap, Model
from posttrain.report.html import Child, Markup, tag
from posttrain.report.parts import Report, exact, figure, key, section, table
from posttrain.report.theme import HEAT


def layers(report: Report) -> Child:
    """For each quantized model: QSNR by block and projection, sensitivity by block, the table."""
    maps = {m.index: content.layer_map(m.values.get("layers")) for m in report.models}
    levels = [
        v
        for found in maps.values()
        if found
        for v in [*found.cells.values(), *(q for _, q in found.outside)]
    ]
    span = (min(levels), max(levels)) if levels else (0.0, 0.0)
    parts = [
        part for model in report.models if (part := _model_layers(model, maps[model.index], span))
    ]
    if not parts:
        return None
    intro = tag(
        "p",
        "QSNR is the power of a layer's weights over the power of the error that "
        "quantization put into them, in dB; 6 dB is about one bit. A block's sensitivity is how "
        "far the predictions move when that block alone is quantized.",
        class_="soft",
    )
    return section("layers", "Layer by layer", intro, _ramp(span) if levels else None, parts)


def _ramp(span: tuple[float, float]) -> Markup:
    steps = [tag("i", class_=f"h{step}") for step in range(HEAT)]
    return tag(
        "p",
        tag("span", f"cleaner, {words.number(span[1], 1)} dB"),
        steps,
        tag("span", f"{words.number(span[0], 1)} dB, noisier"),
        class_="ramp",
    )


def _model_layers(model: Model, found: LayerMap | None, span: tuple[float, float]) -> Child:
    moved = content.sensitivity(model.values.get("block_sensitivity"))
    if found is None and not moved:
        return None
    parts: list[Child] = [tag("h3", model.short)]
    if found and found.cells:
        parts.append(figure(None, lambda width: charts.heat(found, width, span)))
    if found and found.merged:
        parts.append(
            tag(
                "p",
                "Where several experts share a cell, it shows the worst of them.",
                class_="soft",
            )
        )
    if found and found.outside:
        said = words.join([f"{name} {words.number(qsnr, 1)} dB" for name, qsnr in found.outside])
        parts.append(tag("p", f"Outside the blocks: {said}."))
    if moved:
        parts.append(_sensitivity(moved, found))
    return [*parts, _layer_table(model) if found else None]


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
    for layer in model.values["layers"]:
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


def generations(report: Report) -> Child:
    """The same prompts to every model, marked from the first word that differs."""
    samples = [
        sample
        for sample in report.data.get("generations") or ()
        if isinstance(sample, Mapping) and isinstance(sample.get("outputs"), Mapping)
    ]
    if not samples:
        return None
    intro = tag(
        "p",
        "Greedy decoding of the same prompts. The mark starts at the first word that "
        "differs from the first column; after that the texts are free to differ, so the "
        "place matters less than whether both still make sense.",
        class_="soft",
    )
    return section(
        "generations", "Side by side", intro, [_sample(report, sample) for sample in samples]
    )


def _sample(report: Report, sample: Mapping[str, Any]) -> Child:
    outputs = [(str(name), str(text)) for name, text in sample["outputs"].items()]
    order = {
        model.name: model.index - len(report.models) * (model is report.reference)
        for model in report.models
    }
    outputs.sort(key=lambda item: order.get(item[0], len(order)))
    first = outputs[0][1] if outputs else ""
    prompt = sample.get("prompt")
    return [
        tag("h3", "Prompt"),
        tag("div", prompt, class_="prompt", dir="auto"),
        tag(
            "div",
            [
                _output(report, name, text, None if i == 0 else first)
                for i, (name, text) in enumerate(outputs)
            ],
            class_="pair",
        ),
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
