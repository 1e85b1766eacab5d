"""CrossQuant: scales that cross rows and columns of the activations."""

from typing import Any

import torch
from torch import Tensor

from posttrain.models.plan import LayerPlan
from posttrain.numbers import Spec, fake_quantize, kernel_fraction, spec
from posttrain.papers.lab import Lab, Reference, rank_correlation, signed
from posttrain.papers.paper import Evidence, Paper
from posttrain.quantize.transforms import CrossQuant, Outliers, apply

LOUD = Outliers(factor=50.0, count=2)
WEIGHT, TOKEN = spec("int8 | fp32/row"), spec("int8 | fp32/row")


def crossed(bits: int, alpha: float) -> Spec:
    """Scale of element (i, j): absmax of its token^alpha, times absmax of its channel^(1 - alpha)."""
    if alpha in (0.0, 1.0):
        return spec(f"int{bits} | fp32/{'row' if alpha else 'col'}")
    return spec(f"int{bits} | fp32/row^{alpha} * fp32/col^{1 - alpha:g}")


def experiment(lab: Lab) -> Evidence:
    """Activations of all linear layers of demo's blocks, on its own and with injected outliers."""
    loud = lab.copy(lab.demo)
    apply(loud, LOUD, lab.calibration(loud))
    windows = lab.windows(lab.demo, windows=8)
    sides = {name: (model, lab.reference(model, windows)) for name, model in
             (("natural", lab.demo), ("injected", loud))}  # fmt: skip
    moved = (sides["injected"][1].scores.nll - sides["natural"][1].scores.nll).nanmean()

    def ideal(side: str, bits: int, alpha: float) -> dict[str, Any]:
        model, reference = sides[side]
        form = crossed(bits, alpha)
        with lab.altered(
            model, dict.fromkeys(lab.linears(model), lambda x: fake_quantize(x, form))
        ):
            found = lab.against(reference, model, windows)
        inputs = lab.inputs(model, lab.linears(model), windows.tokens[:2]).values()
        kernel = [kernel_fraction(x, fake_quantize(x, form)) for x in inputs]
        return {
            "side": side,
            "bits": bits,
            "alpha": alpha,
            "kernel": sum(kernel) / len(kernel),
        } | found

    rows = [
        lab.step(f"{side}, A{bits}, alpha {alpha}", ideal, side, bits, alpha)
        for side in sides
        for bits in lab.pick((8, 6, 4), (8,))
        for alpha in lab.pick((1.0, 0.75, 0.55, 0.35, 0.15, 0.0), (1.0, 0.15))
    ]
    zeroed = lab.step("the kernel alone", _zeroed, lab, *sides["injected"], windows)
    folded = lab.step("folded into weights", _folded, lab, sides["natural"][1], windows)
    per_token = next(r for r in rows if (r["side"], r["bits"], r["alpha"]) == ("injected", 8, 1.0))
    natural = next(r for r in rows if (r["side"], r["bits"], r["alpha"]) == ("natural", 8, 1.0))
    best = next(r for r in rows if (r["side"], r["bits"], r["alpha"]) == ("injected", 8, 0.15))
    order = rank_correlation([r["kernel"] for r in rows], [r["delta_nll"] for r in rows])
    share = zeroed["delta_nll"] / per_token["delta_nll"]
    survives = 1 - folded["crossquant"]["delta_nll"] / folded["per token"]["delta_nll"]
    return Evidence(
        figure=f"delta nll of A8 with outliers {signed(per_token)} per token, {signed(best)} crossed",
        measured={
            "ideal": rows,
            "rank_correlation": order,
            "kernel_alone": zeroed | {"share_of_loss": share},
            "folded": folded | {"gain_that_survives": survives},
            "moved_by_injection": float(moved),
        },
        holds={
            "order": order > 0.9,
            "kernel": share > 0.5,
            "folding": survives > 0.5,
            "injected": per_token["delta_nll"] > 3 * max(natural["delta_nll"], 0.0),
            "preserved": abs(float(moved)) < 1e-3,
        },
    )


def _zeroed(lab: Lab, model: Any, reference: Reference, windows: Any) -> dict[str, Any]:
    """Nothing but the elements that 8 bits per token round to zero are lost."""

    def without_kernel(x: Tensor) -> Tensor:
        return torch.where(fake_quantize(x, TOKEN) == 0, 0, x)

    with lab.altered(model, dict.fromkeys(lab.linears(model), without_kernel)):
        return lab.against(reference, model, windows)


def _folded(lab: Lab, reference: Reference, windows: Any) -> dict[str, Any]:
    """W8A8 on the injected model, with the column factor in norms and weights or without."""
    found = {}
    for name, transform in (("per token", None), ("crossquant", CrossQuant())):
        model = lab.copy(lab.demo)
        apply(model, LOUD, lab.calibration(model))
        if transform is not None:
            apply(model, transform, lab.calibration(model))
        plan = dict.fromkeys(lab.linears(model), LayerPlan(WEIGHT, TOKEN))
        with lab.quantized(model, plan):
            found[name] = lab.against(reference, model, windows)
    return found


PAPER = Paper(
    key="crossquant",
    title="CrossQuant: A Post-Training Quantization Method with Smaller Quantization Kernel for "
    "Precise Large Language Model Compression",
    year=2024,
    area="quantize",
    claim="What activations lose is what is rounded to zero; scales that mix a token's and a "
    "channel's absmax shrink that set from 16-19 % to below 1 % and keep W8A8 near-lossless.",
    about="The scale of element (i, j) of the activations is absmax(token i)^alpha times absmax("
    "channel j)^(1 - alpha), alpha 0.15. An integer product cannot use a factor for each channel, so "
    "the deployable form folds a calibrated one into norms and weights (transform: crossquant).",
    usage="posttrain quantize MODEL --recipe w8a8-portable --transform crossquant -o small",
    full_size="posttrain quantize meta-llama/Llama-2-7b-hf --recipe w8a8-portable --transform crossquant -o out"
    " && posttrain compare meta-llama/Llama-2-7b-hf out --text wikitext2.txt --window 2048",
    conditions={
        "order": "over sides, bits and alpha, the loss follows the share of elements rounded to zero: "
        "rank correlation above 0.9",
        "kernel": "with outliers, losing these elements alone costs more than half of what INT8 per "
        "token costs",
        "folding": "folded into norms and weights, W8A8 with outliers loses less than half of what it "
        "loses per token",
    },
    controls={
        "injected": "INT8 per token loses more than three times as much with outliers as without",
        "preserved": "injection itself changes the loss by less than 0.001",
    },
    experiment=experiment,
)
