"""ZeroQuant-V2: which solver for which bits, and what low-rank compensation adds."""

from itertools import pairwise
from typing import Any

from posttrain.papers.int2_1 import mean_bits
from posttrain.papers.lab import Lab, signed
from posttrain.papers.paper import Evidence, Paper
from posttrain.quantize.transforms import Outliers, apply

LOUD = Outliers(factor=50.0, count=2)
SOLVERS = ("rtn", "gptq", "zq-local", "zq-global")
BITS = (8, 4, 3, 2)
RANKS = (4, 8, 16)
GROUP = 64
TOKEN = "int8 | fp32/row"


def recipe(
    bits: int,
    solver: str,
    inputs: str | None = None,
    rank: int = 0,
    group: int = GROUP,
    samples: int = 32,
    window: int = 512,
    steps: int | None = None,
) -> dict[str, Any]:
    """Symmetric integers in groups; inputs in full precision or by token; LoRC of a rank in INT8."""
    rule: dict[str, Any] = {"match": "*", "weight": f"int{bits} | fp16/g{group}"}
    if inputs:
        rule["input"] = inputs
    if rank:
        rule["branches"] = [{"name": "lowrank", "rank": rank, "weight": "int8 | fp16/row"}]
    return {
        "layers": [rule],
        "ignore": ["lm_head"],
        "solver": {"name": solver, **({"steps": steps} if steps and "zq" in solver else {})},
        "calibration": {"samples": samples, "window": window},
    }


def experiment(lab: Lab) -> Evidence:
    """All linear layers of pico's blocks, on its own and with injected outliers (for INT8 inputs)."""
    loud = lab.copy(lab.pico)
    apply(loud, LOUD, lab.calibration(loud))
    sides = {"natural": lab.pico, "injected": loud}
    windows = lab.windows(lab.pico, windows=32)
    reference = {side: lab.reference(model, windows) for side, model in sides.items()}
    samples, window, steps = lab.pick((32, 512, None), (8, 64, 4))

    def measure(side: str, bits: int, solver: str, **options: Any) -> dict[str, Any]:
        made = recipe(bits, solver, samples=samples, window=window, steps=steps, **options)
        with lab.recipe(sides[side], made) as model:
            found = lab.against(reference[side], model, windows)
            return found | {"bits_per_weight": mean_bits(model.made)}

    def step(side: str, bits: int, solver: str, **options: Any) -> dict[str, Any]:
        rest = "".join(f", {key} {value}" for key, value in options.items())
        found = lab.step(
            f"{side}, W{bits} {solver}{rest}", lambda: measure(side, bits, solver, **options)
        )
        return {"side": side, "bits": bits, "solver": solver} | options | found

    all_bits = lab.pick(BITS, (4, 2))
    weights = [step("natural", b, s) for b in all_bits for s in SOLVERS]
    places = lab.pick((("natural", 4), ("injected", 8), ("injected", 4)), (("injected", 4),))
    both = [step(side, b, s, inputs=TOKEN) for side, b in places for s in SOLVERS]
    ranked = [step("natural", b, "gptq", rank=r) for b in all_bits for r in lab.pick(RANKS, (8,))]
    # What the bytes of rank 8 buy in scales instead.
    finer = [
        step("natural", b, "gptq", group=g) for b in all_bits for g in lab.pick((32, 16), (16,))
    ]
    alone = {(r["bits"], r["solver"]): r["delta_nll"] for r in weights}
    loud_four = {
        r["solver"]: r["delta_nll"] for r in both if (r["side"], r["bits"]) == ("injected", 4)
    }
    rank8 = {r["bits"]: r for r in ranked if r["rank"] == 8}
    gains = [alone[b, "gptq"] - rank8[b]["delta_nll"] for b in all_bits]
    low = [b for b in (4, 3) if b in all_bits]
    best = {
        b: min((r for r in finer if r["bits"] == b), key=lambda r: r["delta_nll"]) for b in all_bits
    }
    cheaper = {
        b: [
            r
            for r in finer
            if r["bits"] == b and r["bits_per_weight"] <= rank8[b]["bits_per_weight"]
        ]
        for b in all_bits
    }
    plain = [alone[b, "rtn"] for b in (8, 4, 2) if b in all_bits]
    four = {r["solver"]: r for r in weights if r["bits"] == 4}
    return Evidence(
        figure="delta nll of W4: "
        + ", ".join(f"{s} {signed(four[s], 3)}" for s in SOLVERS)
        + f"; of W2 by GPTQ {alone[2, 'gptq']:+.2f}, with rank 8 {rank8[2]['delta_nll']:+.2f}",
        measured={
            "weights": weights,
            "weights_and_inputs": both,
            "low_rank": ranked,
            "smaller_groups": finer,
            "gain_of_rank_8": gains,
            "best_group": {str(b): r["group"] for b, r in best.items()},
        },
        holds={
            "gptq": all(alone[b, "gptq"] < alone[b, "rtn"] for b in low),
            "block": loud_four["zq-global"] <= loud_four["zq-local"],
            "gradients": loud_four["zq-global"] < loud_four["gptq"],
            "falling bits": gains == sorted(gains),
            "bytes": all(
                rank8[b]["delta_nll"] < min(r["delta_nll"] for r in cheaper[b])
                for b in all_bits
                if b < 8 and cheaper[b]
            ),
            "order": all(3 * more < fewer for more, fewer in pairwise(plain)),
        },
    )


PAPER = Paper(
    key="zeroquant_v2",
    title="ZeroQuant-V2: Exploring Post-training Quantization in LLMs from Comprehensive Study to Low "
    "Rank Compensation",
    year=2023,
    area="quantize",
    claim="GPTQ is the best solver for weights alone, block-wise reconstruction (ZQ-Global) the best where "
    "activations are quantized too, and low-rank compensation of rank 8 helps the more the fewer the bits.",
    about="Round to nearest, GPTQ, and gradients on weights and scales for the output of a linear "
    "(ZQ-Local) or of a block (ZQ-Global), at 8 to 2 bits with activations in full precision or in INT8; "
    "the closest matrix of rank 4 to 16 to what was lost beside each layer (LoRC).",
    usage="posttrain quantize MODEL --recipe w4a8 --solver zq-global -o small",
    full_size="posttrain quantize facebook/opt-6.7b --recipe w4a8 --solver zq-global -o out && posttrain "
    "compare facebook/opt-6.7b out",
    conditions={
        "gptq": "GPTQ loses less than rounding to nearest at 4 and 3 bits",
        "block": "with outliers and INT8 inputs, W4 by ZQ-Global loses no more than by ZQ-Local",
        "gradients": "and less than by GPTQ",
        "falling bits": "what rank 8 gains rises as bits fall",
        "bytes": "at 4 bits and fewer, rank 8 loses less than smaller groups of no more bytes",
    },
    controls={"order": "rounded to nearest, 2 bits lose three times what 4 do, and 4 what 8 do"},
    experiment=experiment,
)
