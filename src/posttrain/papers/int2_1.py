"""INT2.1: two bits, repaired by low-rank branches that are distilled from the model itself."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from posttrain.evaluate.sweep import Setting, distinct, judged, write
from posttrain.models.branches import LowRank
from posttrain.models.linear import QuantLinear
from posttrain.papers.lab import Lab, signed
from posttrain.papers.paper import Evidence, Paper

RANKS = (8, 32)
PLAIN = "none"
LORC, LREC, BOTH = "LoRC", "LREC", "LREC from LoRC"
STARTS = {LORC: "svd", LREC: "zero", BOTH: "svd"}
WARM = Setting(0.8, 0, 48)  # temperature, all tokens, length


@dataclass(frozen=True)
class Bench:
    """A model and how much of it is measured. variants: (bits, repair, rank) each."""

    model: str
    windows: int
    window: int
    prompts: int
    seeds: int
    steps: int
    samples: int
    variants: list[tuple[int, str, int]]


PICO = Bench(
    "pico", 32, 512, 8, 4, 300, 256,
    [(2, PLAIN, 0)]
    + [(2, repair, rank) for repair in STARTS for rank in RANKS]
    + [(bits, repair, rank) for bits in (3, 4) for repair, rank in ((PLAIN, 0), (LORC, 32), (BOTH, 32))],
)  # fmt: skip
# A step takes seven seconds where pico's takes a quarter of one.
DEMO = Bench(
    "demo", 16, 256, 4, 2, 80, 128,
    [(2, PLAIN, 0), (2, LORC, 8), (2, BOTH, 8)],
)  # fmt: skip
QUICK = Bench("pico", 4, 256, 2, 1, 10, 8, [(2, PLAIN, 0)] + [(2, repair, 8) for repair in STARTS])


def recipe(bits: int, repair: str, rank: int, steps: int, samples: int) -> dict[str, Any]:
    """GPTQ with zero points in groups of 64, and what repairs it."""
    rule: dict[str, Any] = {"match": "*", "weight": f"int{bits}z | fp16/g64"}
    made: dict[str, Any] = {
        "layers": [rule],
        "ignore": ["lm_head"],
        "solver": {"name": "gptq", "damping": 0.1},
        "calibration": {"samples": samples, "window": 256},
    }
    if repair != PLAIN:
        weight = "int8 | fp16/row"
        branch = {"name": "lowrank", "rank": rank, "weight": weight, "start": STARTS[repair]}
        rule["branches"] = [branch]
    if repair in (LREC, BOTH):
        made["distill"] = {"steps": steps, "batch": 4, "rate": 2e-3, "top": 64}
    return made


def experiment(lab: Lab) -> Evidence:
    """pico, whose weights never were on a grid of few bits, and demo, which two bits break."""
    benches = lab.pick((PICO, DEMO), (QUICK,))
    found = {bench.model: _measure(lab, bench) for bench in benches}
    largest = found[benches[-1].model]
    gains = found["pico"]["gain_by_bits"]
    best, plain = largest["best"], largest["plain"]
    return Evidence(
        figure=f"{benches[-1].model}: delta nll of INT2 {signed(plain, 2)}, with {best['repair']} of "
        f"rank {best['rank']} ({best['bits_per_weight']:.2f} bits) {signed(best, 2)}",
        measured=found,
        holds={
            "collapses": plain["delta_nll"] > 0.5 * largest["knows"],
            "recovers": all(
                m["best"]["delta_nll"] < 0.25 * m["plain"]["delta_nll"] for m in found.values()
            ),
            "trained": all(m["trained"] for m in found.values()),
            "shrinks": len(gains) > 1 and gains == sorted(gains, reverse=True),
            "coherent": all(
                m["best"]["written"]["nll"] - m["itself"]["nll"]
                < 0.5 * (m["plain"]["written"]["nll"] - m["itself"]["nll"])
                for m in found.values()
            ),
            "frozen": not any(r["copies"] for m in found.values() for r in m["repaired"]),
        },
        seeds=range(max(bench.seeds for bench in benches)),
    )


def _measure(lab: Lab, bench: Bench) -> dict[str, Any]:
    """Every variant of one model: its loss, its bits, what it writes."""
    original = getattr(lab, bench.model)
    windows = lab.windows(original, bench.windows, bench.window)
    reference = lab.reference(original, windows)
    prompts = [w[:24].tolist() for w in windows.tokens[: bench.prompts]]
    beside = [prompt for prompt in prompts for _ in range(bench.seeds)]

    def written(model: Any) -> dict[str, Any]:
        """Samples at temperature 0.8 and what full precision thinks of them."""
        (texts,) = write(model, prompts, [WARM], range(bench.seeds)).values()
        return {
            "nll": sum(judged(original, beside, texts)) / len(texts),
            "distinct": sum(map(distinct, texts)) / len(texts),
            "sample": original.tokenizer.decode(texts[0]),
        }

    def variant(bits: int, repair: str, rank: int) -> dict[str, Any]:
        made = recipe(bits, repair, rank, bench.steps, bench.samples)
        with lab.recipe(original, made) as model:
            found = lab.against(reference, model, windows)
            found |= {"bits_per_weight": mean_bits(model.made), "written": written(model)}
            if repair != PLAIN:
                found["copies"] = copies_in_backward(model, windows.tokens[:1])
            return found | {"distilled": model.made.get("distilled")}

    rows = []
    for bits, repair, rank in bench.variants:
        name = f"{bench.model}, INT{bits}, {repair}" + (f", rank {rank}" if rank else "")
        found = lab.step(name, variant, bits, repair, rank)
        rows.append({"bits": bits, "repair": repair, "rank": rank} | found)
    itself = lab.step(f"{bench.model} itself writes", written, original)
    loss = {(r["bits"], r["repair"], r["rank"]): r["delta_nll"] for r in rows}
    widest = max(rank for _, _, rank in loss)
    return {
        "plain": rows[0],
        "repaired": [r for r in rows if r["repair"] != PLAIN],
        "unrepaired": [r for r in rows if r["repair"] == PLAIN],
        "best": min((r for r in rows if r["bits"] == 2), key=lambda r: r["delta_nll"]),
        "itself": itself,
        # What a model has over guessing uniformly: a perplexity of 45 among 4,096 tokens leaves no
        # room for a factor of a hundred.
        "knows": math.log(original.config.vocab_size) - float(reference.scores.nll.nanmean()),
        "trained": all(
            loss[2, repair, rank] < loss[2, LORC, rank]
            for bits, repair, rank in loss
            if bits == 2 and repair in (LREC, BOTH)
        ),
        "gain_by_bits": [
            loss[bits, PLAIN, 0] - loss[bits, BOTH, widest]
            for bits in sorted({bits for bits, _, _ in loss})
        ],
    }


def mean_bits(made: dict[str, Any]) -> float:
    """Bits of the quantized layers' weights, scales and branches included."""
    sizes = [math.prod(layer["shape"]) for layer in made["layers"]]
    bits = [layer["bits_per_weight"] for layer in made["layers"]]
    return sum(b * n for b, n in zip(bits, sizes, strict=True)) / sum(sizes)


class _Shapes(TorchDispatchMode):
    """Shapes of all floating-point matrices that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.seen.add(tuple(tensor.shape))
        return found


def copies_in_backward(model: Any, tokens: Tensor) -> list[list[int]]:
    """Shapes of quantized weights that a training step through the branches makes in full precision."""
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    for layer in layers:
        layer.resident = "packed"
    model.requires_grad_(False)
    branches = [m for m in model.modules() if isinstance(m, LowRank)]
    for branch in branches:
        branch.train_factors()
    with torch.enable_grad():
        # A number of tokens that no weight has as a side.
        logits = model(input_ids=tokens[:, :101], use_cache=False).logits
        loss = logits.float().logsumexp(-1).mean()
        with _Shapes() as shapes:
            loss.backward()
    for branch in branches:
        branch.finish_training()
    weights = {layer.shape for layer in layers}
    weights |= {(columns, rows) for rows, columns in weights}
    return [list(shape) for shape in sorted(weights & shapes.seen)]


PAPER = Paper(
    key="int2_1",
    title="INT2.1: Towards Fine-Tunable Quantized Large Language Models with Error Correction through "
    "Low-Rank Adaptation",
    year=2023,
    area="quantize",
    claim="Low-rank branches trained to say what the model said repair INT2, which alone is broken, into "
    "the first coherent 2-bit model at 1.05 times its size; training them takes 5.6 times less memory, "
    "since no weight is copied to full precision.",
    about="GPTQ with zero points to 2 bits; beside every layer a low-rank branch, trained on the "
    "teacher's likeliest tokens (KL and cross-entropy) while the packed weights stay frozen and the "
    "backward pass expands a part of one at a time.",
    usage="posttrain quantize MODEL --recipe int2.1 -o small",
    full_size="posttrain quantize huggyllama/llama-7b --recipe int2.1 -o out && posttrain compare "
    "huggyllama/llama-7b out",
    conditions={
        "collapses": "INT2 alone loses more than half of what demo has over guessing uniformly",
        "recovers": "on both models the best repair brings back more than three quarters of what INT2 loses",
        "trained": "at every rank a distilled branch loses less than the closest matrix of that rank",
        "shrinks": "what the branch gains on pico falls from INT2 to INT3 to INT4",
        "coherent": "on both models full precision finds what repaired INT2 writes less than half as far from its own "
        "writing as what INT2 writes, in nats per token",
    },
    controls={
        "frozen": "no operation of the backward pass returns a quantized weight in full precision"
    },
    experiment=experiment,
)
