"""ZeroQuant-FP: four bits for weights and eight for activations, in floating point."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from posttrain.models.branches import LowRankPlan
from posttrain.models.plan import LayerPlan
from posttrain.numbers import spec
from posttrain.papers.lab import Beside, Lab, signed
from posttrain.papers.paper import Evidence, Paper
from posttrain.quantize.transforms import Outliers, apply

LOUD = Outliers(factor=50.0, count=2)
INPUTS = {"int": "int8 | fp32/row", "fp": "e4m3 | fp32/row"}
EIGHT = {"int": "int8 | fp16/row", "fp": "e4m3 | fp16/row"}
FOUR = {"int": "int4 | fp16/g64", "fp": "e2m1 | fp16/g64"}
SCALES = {
    "free": FOUR["fp"],
    "M1": "e2m1 | pow2.ceil/g64",
    "M2": "e2m1 | pow2.floor/g64 * fp16/row",
    "M2, clipping": "e2m1 | pow2.ceil/g64 * fp16/row",
}
RANKS = (0, 4, 8, 16)
FACTORS = spec("int8 | fp16/row")


def experiment(lab: Lab) -> Evidence:
    """All linear layers of pico's blocks, weights by GPTQ, on its own and with injected outliers; W8A8
    of demo beside it."""
    loud = lab.copy(lab.pico)
    apply(loud, LOUD, lab.calibration(loud))
    sides = {"natural": lab.pico, "injected": loud}
    windows = lab.windows(lab.pico, windows=32)
    reference = {side: lab.reference(model, windows) for side, model in sides.items()}
    moved = (reference["injected"].scores.nll - reference["natural"].scores.nll).nanmean()
    solve = {
        side: lab.gptq(model, lab.calibration(model, windows=lab.pick(32, 8)))
        for side, model in sides.items()
    }

    def measure(side: str, weight: str, inputs: str, rank: int = 0) -> dict[str, Any]:
        model = sides[side]
        plan = LayerPlan(spec(weight), spec(inputs))
        beside = low_rank(rank) if rank else None
        with lab.quantized(model, dict.fromkeys(lab.linears(model), plan), solve[side], beside):
            return lab.against(reference[side], model, windows)

    rows = []
    for side in sides:
        for name, weight, inputs, rank in _variants(lab):
            found = lab.step(f"{side}, {name}", measure, side, weight, inputs, rank)
            rows.append({"side": side, "variant": name} | found)
    loss = {(row["side"], row["variant"]): row for row in rows}
    points = {key: row["delta_nll"] for key, row in loss.items()}
    widths = [row["ci_high"] - row["ci_low"] for row in rows]
    four = points["natural", "FP4-FP8"]
    m1, m2 = (points["natural", f"{name} FP4-FP8"] - four for name in ("M1", "M2"))
    natural = points["natural", "INT8-INT8"] - points["natural", "INT8-FP8"]
    ranked = [
        points["natural", f"FP4-FP8, rank {r}"] if r else four for r in lab.pick(RANKS, (0, 8))
    ]
    other = lab.step("demo", _activations_of_demo, lab)
    return Evidence(
        figure=f"delta nll of FP4 weights, FP8 inputs {signed(loss['natural', 'FP4-FP8'])}, INT4 and "
        f"INT8 {signed(loss['natural', 'INT4-INT8'])}; with outliers {points['injected', 'FP4-FP8']:+.3f} "
        f"and {points['injected', 'INT4-INT8']:+.3f}",
        measured={
            "rows": rows,
            "moved_by_injection": float(moved),
            "penalty": {"M1": m1, "M2": m2},
            "by_rank": ranked,
            "demo": other,
        },
        holds={
            "activations": points["injected", "INT8-FP8"] < 0.5 * points["injected", "INT8-INT8"],
            "tie": abs(natural) < max(0.005, min(widths)),
            "weights": points["natural", "FP4-FP8"]
            <= points["natural", "INT4-FP8"] + widths[0] / 2,
            "scales": m2 < m1 < 0.2 * four,
            "lorc": ranked == sorted(ranked, reverse=True),
            "injected": points["injected", "INT8-INT8"] > 3 * points["natural", "INT8-INT8"],
            "preserved": abs(float(moved)) < 1e-3,
        },
    )


def _variants(lab: Lab) -> Iterator[tuple[str, str, str, int]]:
    """Name, weight, inputs, rank of the branch."""
    yield "INT8-INT8", EIGHT["int"], INPUTS["int"], 0
    yield "INT8-FP8", EIGHT["int"], INPUTS["fp"], 0
    yield "FP8-FP8", EIGHT["fp"], INPUTS["fp"], 0
    yield "INT4-INT8", FOUR["int"], INPUTS["int"], 0
    yield "INT4-FP8", FOUR["int"], INPUTS["fp"], 0
    yield "FP4-FP8", FOUR["fp"], INPUTS["fp"], 0
    for name in lab.pick(("M1", "M2", "M2, clipping"), ("M1", "M2")):
        yield f"{name} FP4-FP8", SCALES[name], INPUTS["fp"], 0
    for rank in lab.pick(RANKS, (0, 8))[1:]:
        yield f"FP4-FP8, rank {rank}", FOUR["fp"], INPUTS["fp"], rank


def low_rank(rank: int) -> Beside:
    """LoRC beside every layer, its factors in INT8."""

    def beside(name: str, lost: Tensor) -> list[nn.Module]:
        return [LowRankPlan(rank, FACTORS).fit(lost, None)]

    return beside


def _activations_of_demo(lab: Lab) -> dict[str, Any]:
    """INT8 and FP8 inputs of the larger model, which 8 bits can be said of."""
    model, windows = lab.demo, lab.windows(lab.demo, windows=8)
    reference, found = lab.reference(model, windows), {}
    for name, inputs in INPUTS.items():
        plan = LayerPlan(spec(EIGHT["int"]), spec(inputs))
        with lab.quantized(model, dict.fromkeys(lab.linears(model), plan)):
            found[name] = lab.against(reference, model, windows)
    return found


PAPER = Paper(
    key="zeroquant_fp",
    title="ZeroQuant-FP: A Leap Forward in LLMs Post-Training W4A8 Quantization Using Floating-Point "
    "Formats",
    year=2023,
    area="quantize",
    claim="FP8 activations beat INT8 where models have outliers, FP4 weights are as good as INT4, scales "
    "restricted to powers of two cost little, and low-rank compensation helps small models most.",
    about="Weights in E2M1 by GPTQ in groups, activations in E4M3 for each token; group scales are a "
    "power of two (M1) or a row's maximum times one (M2), so that FP4 widens to FP8 by adding exponents; "
    "what is lost is compensated by the closest matrix of low rank (LoRC).",
    usage="posttrain recipes show w4a8 > mine.yaml  # weight: e2m1 | pow2.floor/g64 * fp16/row, "
    "input: e4m3 | fp32/row, branches: [{name: lowrank, rank: 8, weight: int8 | fp16/row}]",
    full_size="posttrain quantize huggyllama/llama-7b --recipe mine.yaml -o out && posttrain compare "
    "huggyllama/llama-7b out",
    conditions={
        "activations": "with injected outliers, FP8 inputs lose less than half of what INT8 inputs lose",
        "tie": "without them the two differ by less than 0.005, or than the narrowest interval",
        "weights": "FP4 loses no more than INT4 in groups of 64, within half an interval",
        "scales": "M2 costs less than M1, and M1 less than a fifth of what FP4 costs",
        "lorc": "the loss falls with every step of the rank",
    },
    controls={
        "injected": "INT8 inputs lose more than three times as much with outliers as without",
        "preserved": "injection itself changes the loss by less than 0.001",
    },
    experiment=experiment,
)
