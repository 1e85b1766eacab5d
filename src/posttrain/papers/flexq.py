"""FlexQ: 6-bit weights and activations, with 8 bits where they are needed."""

from typing import Any

import torch
from torch import Tensor

from posttrain.models.plan import LayerPlan
from posttrain.numbers import quantize, spec
from posttrain.papers.lab import Lab, signed
from posttrain.papers.paper import Evidence, Paper

WEIGHT, A4, A6, A8 = (spec(f"int{bits} | fp16/g64") for bits in (6, 4, 6, 8))
TYPES = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate, up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}


def experiment(lab: Lab) -> Evidence:
    """demo; groups of 64, since its width is no multiple of the paper's 128."""
    model = lab.demo
    windows = lab.windows(model, windows=32)
    reference = lab.reference(model, windows)
    kinds = {
        n: next(k for k, leaves in TYPES.items() if n.endswith(leaves)) for n in lab.linears(model)
    }

    def measure(inputs: dict[str, Any]) -> dict[str, Any]:
        """All weights in INT6, the inputs of each type of layer in this format."""
        layers = {name: LayerPlan(WEIGHT, inputs[kind]) for name, kind in kinds.items()}
        with lab.quantized(model, layers):
            return lab.against(reference, model, windows)

    every = {name: dict.fromkeys(TYPES, form) for name, form in
             {"W6A16": None, "W6A8": A8, "W6A6": A6, "W6A4": A4}.items()}  # fmt: skip
    rows = {name: lab.step(name, measure, inputs) for name, inputs in every.items()}
    alone = {kind: lab.step(f"{kind} in A6", measure, every["W6A8"] | {kind: A6}) for kind in TYPES}
    rise = {kind: found["delta_nll"] - rows["W6A8"]["delta_nll"] for kind, found in alone.items()}
    worst = max(rise, key=lambda kind: rise[kind])
    mixed = lab.step(f"{worst} in A8", measure, every["W6A6"] | {worst: A8})
    gap = rows["W6A6"]["delta_nll"] - rows["W6A8"]["delta_nll"]
    recovered = (rows["W6A6"]["delta_nll"] - mixed["delta_nll"]) / gap
    return Evidence(
        figure=f"delta nll of W6A6 with {worst} in A8: {signed(mixed)}",
        measured={
            "rows": rows | {f"W6A6, {worst} in A8": mixed},
            "rise_by_type": rise,
            "recovered": recovered,
        },
        holds={
            "lossless": mixed["delta_nll"] <= 0.01,
            "sensitive": worst == "down",
            "recovers": recovered >= 0.7,
            "planes": _planes_are_exact(model),
            "seen": rows["W6A4"]["delta_nll"] > 10 * abs(rows["W6A6"]["delta_nll"]),
        },
    )


def _planes_are_exact(model: Any) -> bool:
    """A product of bit planes, as the paper's kernel forms it, against one of integers."""
    layer = model.get_submodule("model.layers.0.mlp.down_proj")
    x = torch.randn(32, layer.in_features, generator=torch.Generator().manual_seed(0))
    weight, inputs = quantize(layer.weight.detach(), WEIGHT).codes, quantize(x, A6).codes
    exact = inputs.long() @ weight.long().T
    return torch.equal(product_of_planes(inputs, weight, 6), exact)


def product_of_planes(x: Tensor, w: Tensor, bits: int) -> Tensor:
    """Integers x [tokens, in] and w [rows, in] of `bits` bits in two's complement: sums of
    2^(i + j) popcount(bit i of x AND bit j of w), the top bits counting negative."""
    value = [1 << i for i in range(bits - 1)] + [-(1 << (bits - 1))]
    planes = [[(codes.long() >> i) & 1 for i in range(bits)] for codes in (x, w)]
    return sum(
        value[i] * value[j] * (a.double() @ b.double().T).long()
        for i, a in enumerate(planes[0])
        for j, b in enumerate(planes[1])
    )  # type: ignore[return-value]


PAPER = Paper(
    key="flexq",
    title="FlexQ: Efficient Post-training INT6 Quantization for LLM Serving via Algorithm-System "
    "Co-Design",
    year=2025,
    area="quantize",
    claim="INT6 weights and activations, the sensitive layers' in INT8, raise perplexity by 0.05 at "
    "most (LLaMA).",
    about="Weights and activations in symmetric INT6 with a scale for each group along the reduction, "
    "rounded to nearest, without calibration. Types of layers whose INT6 activations cost most (the "
    "down projections of LLaMA) get INT8. A kernel of bit planes runs it on GPUs without INT6.",
    usage="posttrain quantize MODEL --recipe w6a8 -o small",
    full_size="posttrain quantize meta-llama/Llama-2-7b-hf --recipe w6a8 --solver rtn --transform none "
    "-o out && posttrain compare meta-llama/Llama-2-7b-hf out --text wikitext2.txt --window 2048",
    conditions={
        "lossless": "with the most sensitive type in INT8, the loss rises by at most 0.01",
        "sensitive": "the most sensitive type is the down projection",
        "recovers": "that type alone recovers at least 70 % of the gap from A6 to A8",
        "planes": "the product of bit planes equals the product of integers exactly",
    },
    controls={"seen": "INT4 activations lose more than ten times what INT6 ones do"},
    experiment=experiment,
)
