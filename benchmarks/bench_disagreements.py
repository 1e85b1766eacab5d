"""Where the papers disagree: one experiment for each question, on the same tensors and texts.

    python benchmarks/bench_disagreements.py

Writes results/disagreements.json, one list of rows for each question; docs/disagreements.md is made
from it. What needs training of low-rank branches is taken from results/papers/. An interrupted run
continues. Takes a quarter of an hour on two cores.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, commit, write_result
from torch import Tensor

from posttrain.models.linear import split
from posttrain.models.plan import LayerPlan
from posttrain.models.rotation import block_size
from posttrain.numbers import (
    crest_factor,
    crossover,
    fake_quantize,
    fit_scales,
    qsnr,
    quantize,
    spec,
)
from posttrain.numbers.scales import Scales
from posttrain.papers.lab import Lab, fingerprint
from posttrain.quantize.transforms import Outliers, Smooth, apply

Rows = list[dict[str, Any]]
PAIRED = ("delta_nll", "ci_low", "ci_high", "kl")


def main() -> None:
    mark = fingerprint(commit(), Path(__file__).read_bytes())
    lab = Lab(partial=Path(f"build/disagreements-{mark}.partial"), name="disagreements")
    figures = {
        name: lab.step(name, lambda ask=ask: list(ask(lab))) for name, ask in QUESTIONS.items()
    }
    lab.close()
    write_result("disagreements", figures)


def fp8_or_int8(lab: Lab) -> Iterator[dict[str, Any]]:
    """Share of demo's operands on which INT8 is nearer than E4M3, by granularity, and the share of
    winners that the crest factor of the blocks names."""
    model = lab.demo
    threshold, _ = crossover("int8 | fp32/g32", "e4m3 | fp32/g32")
    inputs = lab.inputs(model, lab.linears(model), lab.windows(model).tokens[:1])
    weights = {name: layer.weight.detach() for name, layer in lab.linears(model).items()}
    for operand, tensors in (("inputs", inputs), ("weights", weights)):
        for block in ("tensor", "row", "g64", "g32", "g16"):
            wins, named, crests = [], [], []
            for x in tensors.values():
                better = _qsnr(x, f"int8 | fp32/{block}") > _qsnr(x, f"e4m3 | fp32/{block}")
                crest = float(crest_factor(x, block).nanmean())
                wins.append(better)
                crests.append(crest)
                named.append(better == (crest < threshold))
            yield {
                "operand": operand,
                "granularity": block,
                "int8_wins": _share(wins),
                "crest_factor": sorted(crests)[len(crests) // 2],
                "named_by_crest_factor": _share(named),
                "threshold": threshold,
            }


def six_bits(lab: Lab) -> Iterator[dict[str, Any]]:
    """Weights of demo as they are, and with two columns of each input 50 times as loud."""
    forms = {"INT6 g64": "int6 | fp16/g64", "INT6 g32": "int6 | fp16/g32",
             "INT6 row": "int6 | fp16/row", "E3M2 row": "e3m2 | fp16/row"}  # fmt: skip
    for side, model in _sides(lab, Outliers(factor=1 / 50, count=2)):
        windows = lab.windows(model, windows=8)
        reference = lab.reference(model, windows)
        for name, form in forms.items():
            plan = dict.fromkeys(lab.linears(model), LayerPlan(spec(form)))
            with lab.quantized(model, plan):
                found = lab.against(reference, model, windows)
            yield {"weights": side, "format": name, "bits": _bits(lab, model, form)} | _paired(
                found
            )


def removing_outliers(lab: Lab) -> Iterator[dict[str, Any]]:
    """INT8 inputs of demo with two channels of each 50 times as loud; weights left alone."""
    token = spec("int8 | fp32/row")
    plain = LayerPlan(spec("fp16"), token)
    ways = {
        "nothing": plain,
        "split: channels from 6 in 16 bits": LayerPlan(spec("fp16"), token, outliers=6.0),
        "folded into weights": plain,
        "rotated": LayerPlan(spec("fp16"), token, rotate=True),
        "blocks of 32": LayerPlan(spec("fp16"), spec("int8 | fp32/g32")),
    }
    for side, model in _sides(lab, Outliers(factor=50.0, count=2)):
        windows = lab.windows(model, windows=8)
        reference = lab.reference(model, windows)
        for name, layer in ways.items():
            changed = model
            if name.startswith("folded"):
                changed = lab.copy(model)
                apply(changed, Smooth(), lab.calibration(changed))
            with lab.quantized(changed, dict.fromkeys(lab.linears(changed), layer)):
                found = lab.against(reference, changed, windows)
            extra = _extra(lab, model, name, windows.tokens[:1])
            yield {"inputs": side, "way": name} | _paired(found) | extra


def _extra(lab: Lab, model: Any, way: str, tokens: Tensor) -> dict[str, float]:
    """Operations beside the products, and bits for each input value, beyond one scale a token."""
    layers = lab.linears(model)
    products = sum(layer.weight.numel() for layer in layers.values())
    operations, bits = 0.0, 0.0
    if way == "rotated":  # two small products for each channel
        operations = sum(
            layer.in_features * 2 * block_size(layer.in_features) ** 0.5
            for layer in layers.values()
        )
    if way.startswith("split"):
        for name, x in lab.inputs(model, layers, tokens).items():
            loud = split(x, 6.0)[1]
            channels = 0 if loud is None else int(loud.any(0).sum())
            operations += channels * layers[name].out_features
            bits += 8 * channels / x.shape[1] / len(layers)
    if way.startswith("blocks"):
        operations = sum(layer.weight.numel() / 32 for layer in layers.values())
        bits = 32 / 32
    return {"more_operations": operations / products, "more_bits": bits}


def rank_or_bits(lab: Lab) -> Iterator[dict[str, Any]]:
    """What the bytes of a branch buy: from the results of two papers, on pico."""
    measured = _measured("int2_1")["pico"]
    trained = measured["unrepaired"] + measured["repaired"]
    finer = _measured("zeroquant_v2")
    for row in trained:
        name = row["repair"] if row["repair"] == "none" else f"{row['repair']}, rank {row['rank']}"
        yield {"bits": row["bits"], "beside": name, "bits_per_weight": row["bits_per_weight"]} | (
            _paired(row)
        )
    for row in finer["smaller_groups"]:
        if row["bits"] < 8:
            yield {
                "bits": row["bits"],
                "beside": f"nothing, groups of {row['group']}",
                "bits_per_weight": row["bits_per_weight"],
            } | _paired(row)


def _measured(key: str) -> dict[str, Any]:
    path = RESULTS / "papers" / f"{key}.json"
    if not path.is_file():
        raise SystemExit(f"{path} is missing: run posttrain reproduce {key} first")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["measured"]
    return found


def observer_or_mix(lab: Lab) -> Iterator[dict[str, Any]]:
    """Static INT8 ranges for each input tensor of demo, by how and on what they were found."""
    model = lab.demo
    windows = lab.windows(model, windows=8)
    reference = lab.reference(model, windows)
    form = spec("int8 | fp32/tensor")
    texts = {
        name: lab.calibration(model, windows=8, corpus=name) for name in ("prose", "python-docs")
    }
    halves = [tokens[: len(tokens) // 2] for tokens in texts.values()]
    for mix, tokens in (texts | {"half of each": torch.cat(halves)}).items():
        seen = lab.inputs(model, lab.linears(model), tokens)
        for name, observe in OBSERVERS.items():
            scales = {layer: observe(x) for layer, x in seen.items()}
            change = {
                layer: lambda x, s=scale: quantize(x, form, scales=s).dequantize()
                for layer, scale in scales.items()
            }
            with lab.altered(model, change):
                found = lab.against(reference, model, windows)
            yield {"observer": name, "calibrated_on": mix} | _paired(found)


def _absmax(x: Tensor) -> Scales:
    return fit_scales(x, "int8 | fp32/tensor")


def _percentile(x: Tensor) -> Scales:
    top = x.abs().flatten().kthvalue(max(1, int(x.numel() * 0.9999))).values
    return fit_scales(x.clamp(-top, top), "int8 | fp32/tensor")


def _least_squares(x: Tensor) -> Scales:
    ratios = torch.linspace(1.0, 0.2, 33).tolist()
    fitted = [fit_scales(x, "int8 | fp32/tensor", clip_ratio=ratio) for ratio in ratios]
    return min(fitted, key=lambda s: float((quantize(x, s.spec, scales=s).dequantize() - x).norm()))


OBSERVERS: dict[str, Callable[[Tensor], Scales]] = {
    "largest": _absmax,
    "99.99th percentile": _percentile,
    "least squared error": _least_squares,
}


def stochastic_forward(lab: Lab) -> Iterator[dict[str, Any]]:
    """Weights and inputs of pico rounded to nearest or by chance, three seeds of each. What it does to
    gradients is a question for training."""
    windows = lab.windows(lab.pico, windows=32)
    reference = lab.reference(lab.pico, windows)
    layers = lab.linears(lab.pico)
    for form in ("int8 | fp16/row", "int4 | fp16/g64", "e2m1 | e8m0/g32"):
        grid, _, scale = form.partition(" ")
        for rounding in ("nearest", "by chance"):
            for seed in range(1 if rounding == "nearest" else 3):
                generator = torch.Generator().manual_seed(seed)
                text = form if rounding == "nearest" else f"{grid}@sr {scale}"

                def solve(
                    name: str, weight: Tensor, how: Any, text: str = text, g: Any = generator
                ) -> Any:
                    return quantize(weight, text, generator=g)

                with lab.quantized(lab.pico, dict.fromkeys(layers, LayerPlan(spec(text))), solve):
                    found = lab.against(reference, lab.pico, windows)
                yield {"weights": form, "rounding": rounding, "seed": seed} | _paired(found)


def scale_rounding(lab: Lab) -> Iterator[dict[str, Any]]:
    """QSNR in dB of blocks of 32 under one rule for their power-of-two scale or another."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1024, 4096, generator=generator)
    loud = noise.clone()
    loud[:, [1000, 3000]] *= 60
    inputs = lab.inputs(lab.demo, lab.linears(lab.demo), lab.windows(lab.demo).tokens[:1])
    weights = [layer.weight.detach() for layer in lab.linears(lab.demo).values()]
    for element in ("e4m3", "e2m3", "e2m1", "int8"):
        for rule in ("e8m0.floor", "e8m0.ceil", "e8m0.nearest", "e4m3", "fp32"):
            block = "e4m3/g32 * fp32/tensor" if rule == "e4m3" else f"{rule}/g32"
            form = f"{element} | {block}"
            yield {
                "element": element,
                "scale": rule,
                "gaussian": _qsnr(noise, form),
                "two_loud_columns": _qsnr(loud, form),
                "inputs": _mean([_qsnr(x, form) for x in inputs.values()]),
                "weights": _mean([_qsnr(w, form) for w in weights]),
            }


def _sides(lab: Lab, outliers: Outliers) -> Iterator[tuple[str, Any]]:
    yield "natural", lab.demo
    loud = lab.copy(lab.demo)
    apply(loud, outliers, lab.calibration(loud))
    yield "injected", loud


def _bits(lab: Lab, model: Any, form: str) -> float:
    layers = [layer.weight for layer in lab.linears(model).values()]
    stored = sum(quantize(torch.zeros_like(w), form).nbytes for w in layers)
    return 8 * stored / sum(w.numel() for w in layers)


def _qsnr(x: Tensor, form: str) -> float:
    return qsnr(x, fake_quantize(x, spec(form)))


def _paired(found: dict[str, Any]) -> dict[str, Any]:
    return {key: found[key] for key in PAIRED}


def _share(values: list[bool]) -> float:
    return sum(values) / len(values)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


QUESTIONS: dict[str, Callable[[Lab], Iterator[dict[str, Any]]]] = {
    "fp8_or_int8": fp8_or_int8,
    "six_bits": six_bits,
    "removing_outliers": removing_outliers,
    "rank_or_bits": rank_or_bits,
    "observer_or_mix": observer_or_mix,
    "stochastic_forward": stochastic_forward,
    "scale_rounding": scale_rounding,
}

if __name__ == "__main__":
    main()
