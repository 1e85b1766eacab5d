"""FP8 versus INT8: how many exponent bits do tensors want?"""

from collections import defaultdict
from statistics import mean
from typing import Any

from torch import Tensor

from posttrain.models.plan import LayerPlan
from posttrain.numbers import crest_factor, qsnr, spec
from posttrain.papers.lab import Lab, rank_correlation, signed
from posttrain.papers.paper import Evidence, Paper
from posttrain.quantize.solvers import MSEGrid, Problem
from posttrain.quantize.transforms import Outliers, apply

EXPONENTS = {"int8": 0, "e2m5": 2, "e3m4": 3, "e4m3": 4, "e5m2": 5}
CLIP = MSEGrid(steps=8, lowest=0.3)


def experiment(lab: Lab) -> Evidence:
    """Weights (a scale for each row) and inputs (one scale) of demo's linear layers, each format at
    its own best clipping; then demo with all of its blocks' products in each format."""
    tensors = lab.step("tensors", _tensors, lab)
    weights = [t for t in tensors if t["operand"] == "weight"]
    inputs = [t for t in tensors if t["operand"] == "input"]
    preferred = mean(EXPONENTS[t["best"]] <= 2 for t in weights)
    by_format = defaultdict(list)
    for t in inputs:
        by_format[t["best"]].append(t["crest"])
    tails = rank_correlation([EXPONENTS[t["best"]] for t in inputs], [t["crest"] for t in inputs])

    model = lab.demo
    loud = lab.copy(model)
    apply(loud, Outliers(factor=20.0, count=2), lab.calibration(loud))
    windows = lab.windows(model)
    reference = lab.reference(model, windows)

    def measure(which: Any, form: str, scale: str) -> dict[str, Any]:
        layer = LayerPlan(spec(f"{form} | fp32/row"), spec(f"{form} | fp32/{scale}"))
        with lab.quantized(which, dict.fromkeys(lab.linears(which), layer)):
            return lab.against(reference, which, windows)

    cases = [("natural", form, "tensor") for form in lab.pick(tuple(EXPONENTS), ("int8", "e4m3"))]
    cases += [
        ("natural", "int8", "row"),
        ("injected", "int8", "tensor"),
        ("injected", "e4m3", "tensor"),
    ]
    rows = {
        f"{side} {form}/{scale}": lab.step(
            f"{side} {form}/{scale}",
            measure,
            model if side == "natural" else loud,
            form,
            scale,
        )
        for side, form, scale in cases
    }
    loss = {name: found["delta_nll"] for name, found in rows.items()}
    return Evidence(
        figure=f"INT8 or E2M5 best for {preferred:.0%} of weights; delta nll of INT8 per token "
        f"{signed(rows['natural int8/row'])}, E4M3 per tensor {signed(rows['natural e4m3/tensor'])}",
        measured={
            "weights_that_prefer_int8_or_e2m5": preferred,
            "mean_crest_factor_by_best_format": {
                f: mean(by_format[f]) for f in EXPONENTS if by_format[f]
            },
            "rank_correlation": tails,
            "tensors": tensors,
            "rows": rows,
        },
        holds={
            "weights": preferred > 0.9,
            "tails": tails > 0.5,
            "tokens": loss["natural int8/row"] <= loss["natural e4m3/tensor"],
            "outliers": loss["injected int8/tensor"] > loss["injected e4m3/tensor"],
        },
    )


def _tensors(lab: Lab) -> list[dict[str, Any]]:
    model = lab.demo
    layers = lab.linears(model)
    names = list(layers)[:: lab.pick(1, 15)]
    seen = lab.inputs(model, names, lab.windows(model).tokens[:1])
    found = []
    for name in names:
        found.append(_judged(name, "weight", layers[name].weight.detach(), "row"))
        found.append(_judged(name, "input", seen[name], "tensor"))
    return found


def _judged(name: str, operand: str, tensor: Tensor, scale: str) -> dict[str, Any]:
    noise = {}
    for form in EXPONENTS:
        problem = Problem(tensor, spec(f"{form} | fp32/{scale}"))
        noise[form] = qsnr(tensor, CLIP.solve(problem).dequantize())
    best = max(noise, key=lambda form: noise[form])
    crest = float(crest_factor(tensor, scale).nanmean())
    return {"layer": name, "operand": operand, "best": best, "crest": crest, "qsnr": noise}


PAPER = Paper(
    key="fp8_vs_int8",
    title="FP8 versus INT8 for efficient deep learning inference",
    year=2023,
    area="quantize",
    claim="INT8 (or FP8 with 2 exponent bits) suits well-behaved tensors best, more exponent bits pay only "
    "for tails, and hardware for FP8 costs 50-180 % more: INT8 is the format for inference.",
    about="Five 8-bit formats with 0 to 5 exponent bits, a scale for each row of weights and one for a "
    "tensor of activations, each at its own best clipping.",
    usage="posttrain quantize MODEL --recipe w8a8 -o small",
    full_size="posttrain quantize meta-llama/Llama-2-7b-hf --recipe w8a8 -o out && posttrain compare "
    "meta-llama/Llama-2-7b-hf out --window 2048",
    conditions={
        "weights": "more than 90 % of the weights have least noise in INT8 or E2M5",
        "tails": "the exponent bits an input wants rise with its crest factor: rank correlation above 0.5",
        "tokens": "INT8 with a scale for each token loses no more than E4M3 with one for the tensor",
    },
    controls={
        "outliers": "with injected outliers and one scale for the tensor, INT8 loses more than E4M3"
    },
    experiment=experiment,
)
