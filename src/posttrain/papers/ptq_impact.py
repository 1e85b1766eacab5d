"""The impact of quantization on what a model writes, from temperature 0.1 to 0.9."""

from collections.abc import Mapping
from typing import Any

from posttrain.evaluate.sweep import (
    difference,
    distinct,
    divergence,
    grid,
    judged,
    repetition,
    write,
)
from posttrain.models.plan import LayerPlan
from posttrain.numbers import spec
from posttrain.papers.lab import Lab
from posttrain.papers.paper import Evidence, Paper
from posttrain.papers.picture import Series, panels

FORMS = {
    "nf4": LayerPlan(spec("nf4")),
    "nf4-dq": LayerPlan(spec("nf4-dq")),
    "fp4": LayerPlan(spec("bnb-fp4")),
    "fp4-dq": LayerPlan(spec("bnb-fp4-dq")),
    "int8": LayerPlan(spec("w8"), spec("int8h | fp32/row")),
}
FULL = "full precision"


def experiment(lab: Lab) -> Evidence:
    """demo continues the embedded evaluation text; full precision judges what was written. demo comes
    from a 4-bit grid of its own, in groups of 32. int8 has scales for rows and tokens, no outliers apart."""
    model = lab.demo
    temperatures = lab.pick((0.1, 0.3, 0.5, 0.7, 0.9), (0.1, 0.9))
    top_ks, lengths = lab.pick(((0, 50), (16, 48)), ((0,), (12,)))
    settings = grid(temperatures, top_ks, lengths)
    seeds = range(lab.pick(4, 2))
    windows = lab.windows(model).tokens
    prompts = [window[:24].tolist() for window in windows[: lab.pick(16, 4)]]
    beside = [prompt for prompt in prompts for _ in seeds]
    fixed = windows[:1, : lab.pick(512, 128)]
    expected = lab.logits(model, fixed)

    def measure(variant: Any) -> dict[str, Any]:
        """By setting: what full precision thinks of each text, and how much it repeats itself."""
        written = write(variant, prompts, settings, seeds)
        cells = {}
        for setting, texts in written.items():
            cells[_name(setting)] = {
                "distinct": [distinct(text) for text in texts],
                "repetition": [repetition(text) for text in texts],
                "texts": texts,
            }
        found = lab.logits(variant, fixed)
        kl = {str(t): divergence(expected, found, t) for t in temperatures}
        return {"cells": cells, "kl": kl}

    def judge(texts: list[list[int]]) -> list[float]:
        return list(judged(model, beside, texts))

    forms = {name: FORMS[name] for name in lab.pick(tuple(FORMS), ("nf4", "nf4-dq", "fp4", "int8"))}
    found = {FULL: lab.step(FULL, measure, model)}
    for name, layer in forms.items():
        with lab.quantized(model, dict.fromkeys(lab.linears(model), layer)):
            found[name] = lab.step(name, measure, model)
    for name, of in found.items():
        for setting, cell in of["cells"].items():
            cell["nll"] = lab.step(f"{name} judged, {setting}", judge, cell["texts"])

    def gap(name: str, setting: Any, other: str = FULL) -> list[float]:
        cells = (found[n]["cells"][_name(setting)]["nll"] for n in (name, other))
        return [a - b for a, b in zip(*cells, strict=True)]

    def over(name: str, other: str, chosen: list[Any]) -> Any:
        """Mean gap over settings, with its interval over prompts."""
        each = [gap(name, setting, other) for setting in chosen]
        mean = [sum(values) / len(values) for values in zip(*each, strict=True)]
        return difference(mean, [0.0] * len(mean), len(prompts))

    cold = [s for s in settings if s.temperature == temperatures[0]]
    hot = [s for s in settings if s.temperature == temperatures[-1]]
    rows = [
        {
            "format": name, "temperature": s.temperature, "top_k": s.top_k, "length": s.length,
            "kl": of["kl"][str(s.temperature)],
            **{part: _mean(of["cells"][_name(s)][part]) for part in ("nll", "distinct", "repetition")},
            "gap": vars(difference(gap(name, s), [0.0] * len(beside), len(prompts))),
        }
        for name, of in found.items() for s in settings
    ]  # fmt: skip
    steeper = difference(
        _sum_of(gap("nf4", s) for s in hot), _sum_of(gap("nf4", s) for s in cold), len(prompts)
    )
    twice = over("nf4-dq", "nf4", settings)
    rival = over("fp4", "nf4", settings)
    kl = {name: of["kl"] for name, of in found.items()}
    return Evidence(
        figure=f"loss of what nf4 writes, against full precision: "
        f"{over('nf4', FULL, cold).mean:+.3f} at temperature {temperatures[0]}, "
        f"{over('nf4', FULL, hot).mean:+.3f} at {temperatures[-1]}",
        measured={
            "rows": rows,
            "gap_hot_minus_cold": vars(steeper),
            "nf4_dq_minus_nf4": vars(twice),
            "fp4_minus_nf4": vars(rival),
            "kl": kl,
        },
        holds={
            "temperature": _apart(steeper),
            "double": not _apart(twice),
            "equal": not _apart(rival),
            "int8": all(kl["int8"][str(t)] < kl["nf4"][str(t)] for t in temperatures),
        },
        seeds=seeds,
    )


def _name(setting: Any) -> str:
    return f"T {setting.temperature}, k {setting.top_k}, {setting.length} tokens"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _sum_of(gaps: Any) -> list[float]:
    return [sum(values) for values in zip(*gaps, strict=True)]


def _apart(interval: Any) -> bool:
    """Whether 0 lies outside of an interval."""
    return bool(interval.low > 0 or interval.high < 0)


def picture(measured: Mapping[str, Any]) -> str:
    """What each format loses in writing, over temperature, by top-k and length."""
    found: dict[str, dict[str, list[Any]]] = {}
    for row in measured["rows"]:
        if row["format"] != FULL:
            title = f"top-k {row['top_k'] or 'off'}, {row['length']} tokens"
            found.setdefault(title, {}).setdefault(row["format"], []).append(row)
    return panels(
        "Loss of what quantized models write, against full precision",
        "temperature",
        "nats per token",
        {
            title: {
                name: Series(
                    [r["temperature"] for r in rows],
                    *([r["gap"][part] for r in rows] for part in ("mean", "low", "high")),
                )
                for name, rows in formats.items()
            }
            for title, formats in found.items()
        },
    )


PAPER = Paper(
    key="ptq_impact",
    title="Understanding the Impact of Post-Training Quantization on Large Language Models",
    year=2023,
    area="quantize",
    claim="nf4 and fp4 are equally proficient, double quantization of scales costs nothing, and 4-bit "
    "models react to temperature, most between 0.5 and 0.8.",
    about="bitsandbytes' formats (16 codes for blocks of 64 of the flattened weight, scales optionally "
    "quantized again), under sweeps of temperature, top-k and length, many seeds each.",
    usage="posttrain quantize MODEL --recipe nf4 -o small",
    full_size="posttrain quantize meta-llama/Llama-2-7b-hf --recipe nf4 -o out && posttrain compare "
    "meta-llama/Llama-2-7b-hf out",
    conditions={
        "temperature": "the gap between what nf4 and full precision write (loss by full precision, paired "
        "by prompt and seed) differs between the hottest and the coldest setting: its interval excludes 0",
        "double": "the interval of nf4-dq minus nf4 over all settings holds 0",
        "equal": "the interval of fp4 minus nf4 over all settings holds 0",
    },
    controls={"int8": "INT8 is nearer to full precision than nf4 at every temperature, in KL"},
    experiment=experiment,
    picture=picture,
)
