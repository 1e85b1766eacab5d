"""LLM.int8(): outlier channels apart, everything else in INT8."""

from typing import Any

from torch import Tensor, nn

from posttrain.models.branches import Columns
from posttrain.models.linear import split
from posttrain.models.plan import LayerPlan
from posttrain.numbers import QTensor, Spec, quantize, spec
from posttrain.papers.lab import Beside, Lab, Solve, signed
from posttrain.papers.paper import Evidence, Paper
from posttrain.quantize.transforms import Outliers, apply

THRESHOLD = 6.0
TENSOR, VECTOR = spec("int8 | fp32/tensor"), spec("int8 | fp32/row")
PLANS = {
    "absmax": LayerPlan(TENSOR, TENSOR),
    "vector-wise": LayerPlan(VECTOR, VECTOR),
    "llm.int8": LayerPlan(VECTOR, VECTOR, outliers=THRESHOLD),
}


def experiment(lab: Lab) -> Evidence:
    """demo, two channels of every normed and gated input made louder, the function preserved. The
    columns of channels that are loud on calibration text are kept in 16 bits; channels that turn out
    loud later meet the dequantized INT8 weight, as they all do in the reference implementation."""
    windows = lab.windows(lab.demo)
    natural = lab.reference(lab.demo, windows)
    factors = lab.pick((1, 5, 20, 60), (1, 60))
    rows: list[dict[str, Any]] = []
    for factor in factors:
        names = [name for name in PLANS if f"{name}, x {factor}" not in lab.finished]
        model = lab.copy(lab.demo) if names else lab.demo
        if names:
            apply(model, Outliers(factor=factor, count=2), lab.calibration(model))

        def measure(name: str, factor: int = factor, model: Any = model) -> dict[str, Any]:
            plan, solve, beside = dict.fromkeys(lab.linears(model), PLANS[name]), None, None
            if name == "llm.int8":
                plan, solve, beside = _apart(lab, model)
            with lab.quantized(model, plan, solve, beside):
                found = lab.against(natural, model, windows)
            share = _outlier_share(lab, model, windows.tokens[:1]) if solve else None
            return {"factor": factor, "method": name, "outlier_share": share} | found

        rows += [lab.step(f"{name}, x {factor}", measure, name) for name in PLANS]
    loss = {(r["method"], r["factor"]): r["delta_nll"] for r in rows}
    vector = [loss["vector-wise", factor] for factor in factors]
    last = next(r for r in rows if (r["method"], r["factor"]) == ("llm.int8", factors[-1]))
    return Evidence(
        figure=f"delta nll with channels {factors[-1]} times as loud: {signed(last)}, vector-wise "
        f"{vector[-1]:+.4f}",
        measured={"rows": rows, "threshold": THRESHOLD},
        holds={
            "lossless": all(abs(loss["llm.int8", factor]) <= 0.005 for factor in factors),
            "degrades": vector[-1] == max(vector) and vector[-1] > 0.05,
            "few": last["outlier_share"] < 0.05,
            "coarser": loss["absmax", factors[-1]] > vector[-1],
        },
    )


def _apart(lab: Lab, model: Any) -> tuple[dict[str, LayerPlan], Solve, Beside]:
    """Every layer with the columns of its outlier channels beside it in 16 bits."""
    layers = lab.linears(model)
    loud = {
        name: (x.abs() >= THRESHOLD).any(0).nonzero()[:, 0]
        for name, x in lab.inputs(model, layers, lab.calibration(model)).items()
    }
    plan = dict.fromkeys(layers, PLANS["llm.int8"])

    def solve(name: str, weight: Tensor, form: Spec) -> QTensor:
        return quantize(weight.index_fill(1, loud[name], 0.0), form)

    def beside(name: str, lost: Tensor) -> list[nn.Module]:
        return [Columns(loud[name], layers[name].weight.detach()[:, loud[name]].half())]

    return plan, solve, beside


def _outlier_share(lab: Lab, model: Any, tokens: Any) -> float:
    """Share of all input channels that are set apart, weighted by the products they take part in."""
    apart = total = 0
    layers = lab.linears(model)
    for name, x in lab.inputs(model, layers, tokens).items():
        loud = split(x, THRESHOLD)[1]
        apart += 0 if loud is None else int(loud.any(0).sum()) * layers[name].out_features
        total += layers[name].weight.numel()
    return apart / total


PAPER = Paper(
    key="llm_int8",
    title="LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale",
    year=2022,
    area="quantize",
    claim="With the channels that reach magnitude 6 in 16 bits (0.1 % of them), INT8 loses nothing up to "
    "175B parameters, where INT8 alone fails from 6.7B on.",
    about="Weights in INT8 with a scale for each row, activations with one for each token; channels of "
    "the input in which any token reaches 6.0 are multiplied in floating point instead.",
    usage="posttrain recipes show w8a8 > mine.yaml  # then add to its rule: outliers: 6.0",
    full_size="posttrain quantize facebook/opt-6.7b --recipe mine.yaml -o out && posttrain compare "
    "facebook/opt-6.7b out --window 2048",
    conditions={
        "lossless": "with outliers apart, the loss stays within 0.005 of full precision however loud "
        "they are",
        "degrades": "INT8 with scales for rows and tokens alone loses most where outliers are loudest, "
        "and there more than 0.05",
        "few": "less than 5 % of the products are in floating point even then",
    },
    controls={"coarser": "one scale for a whole tensor loses more still"},
    experiment=experiment,
)
