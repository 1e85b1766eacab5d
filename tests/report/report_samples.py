"""Comparisons of the shape that `compare` returns, made up from a seed: realistic numbers without
a model."""

import hashlib
import math
import random
from typing import Any

KINDS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
EDGES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
# name, bits per weight, delta-NLL, half width of its interval, KL, agreement, QSNR of the weights
REFERENCE = ("demo", 32.0, 0.0, 0.0, 0.0, 1.0, 0.0)
SMALL = (
    ("build/demo-w8a8", 8.25, 0.0004, 0.0011, 0.0009, 0.985, 45.0),
    ("build/demo-w6a8", 6.27, 0.0043, 0.0019, 0.0051, 0.967, 33.1),
    ("build/demo-w4a16-gptq", 4.27, 0.0312, 0.0050, 0.038, 0.902, 20.8),
    ("build/demo-mxfp4", 4.26, 0.1281, 0.0101, 0.131, 0.818, 18.2),
    ("build/demo-nvfp4", 4.51, 0.0718, 0.0077, 0.077, 0.861, 20.1),
)
STORY = (
    "The tide had already turned when Mara reached the harbour. She counted the boats twice, "
    "as her mother had taught her, and both times she came out one short. "
)


def layers(
    blocks: int,
    qsnr: float,
    rng: random.Random,
    kinds: tuple[str, ...] = KINDS,
) -> list[dict[str, Any]]:
    """A quantized linear for each block and kind; down projections a little worse."""
    return [
        {
            "name": f"model.layers.{block}.{kind}",
            "weight": "int6 | fp16/g64",
            "input": "int8h | fp32/row",
            "bits_per_weight": 6.25,
            "qsnr": qsnr + rng.gauss(0, 0.5) - 2.5 * (kind == "mlp.down_proj" and block % 9 == 1),
        }
        for block in range(blocks)
        for kind in kinds
    ]


def position(loss: float, rng: random.Random) -> dict[str, list[float]]:
    mean = [loss + 4.5 * math.exp(-0.55 * i) + rng.gauss(0, 0.02) for i in range(len(EDGES) - 1)]
    half = [0.5 * math.exp(-0.25 * i) + 0.05 for i in range(len(mean))]
    return {
        "mean": mean,
        "low": [m - h for m, h in zip(mean, half, strict=True)],
        "high": [m + h for m, h in zip(mean, half, strict=True)],
    }


def comparison(
    small: int = 1,
    blocks: int = 30,
    seed: int = 0,
    chosen: tuple = (),
) -> dict[str, Any]:
    """The reference and `small` quantized models (or the `chosen` rows) with `blocks` blocks."""
    rng = random.Random(seed)
    rows = [REFERENCE, *(chosen or (SMALL[1:2] if small == 1 else SMALL[:small]))]
    models, pairs, positions = [], [], {}
    for name, bits, delta, half, kl, agreement, qsnr in rows:
        nll = 2.9127 + delta
        model = {
            "model": name,
            "nll": nll,
            "perplexity": math.exp(nll),
            "tokens": 32704,
            "bits_per_weight": bits,
            "bytes": int(134_515_008 * bits / 8),
            "window": 512,
            "stride": 512,
            "dtype": "float32",
            "seconds": 61.3,
            "tokens_per_second": 533.5,
        }
        if bits < 32:
            model["layers"] = layers(blocks, qsnr, rng)
            model["block_sensitivity"] = [
                {"block": f"model.layers.{b}", "kl": kl / 9 * rng.lognormvariate(0, 0.6)}
                for b in range(blocks)
            ]
            model["recipe"] = {
                "name": name.rsplit("demo-", 1)[-1],
                "layers": [{"match": "*", "weight": "int6 | fp16/g64", "input": "a8"}],
                "solver": {"name": "rtn"},
            }
            pairs.append(
                {
                    "a": "demo",
                    "b": name,
                    "delta_nll": delta,
                    "ci_low": delta - half,
                    "ci_high": delta + half,
                    "kl": kl,
                    "greedy_agreement": agreement,
                }
            )
        models.append(model)
        positions[name] = position(nll, rng)
    return {
        "models": models,
        "pairs": pairs if small else [],
        **about(),
        "position_nll": {"edges": EDGES, "models": positions},
        "generations": generations([row[0] for row in rows]),
    }


def generations(names: list[str]) -> list[dict[str, Any]]:
    ends = [
        "So she walked to the end of the pier and waited.",
        "So she walked to the end of the jetty and waited for the light.",
        "So she went home.",
        "Nobody else had noticed.",
        "The sea said nothing.",
        "",
    ]
    return [
        {
            "prompt": "Write the first lines of a story about a harbour.",
            "outputs": {name: STORY + ends[i % len(ends)] for i, name in enumerate(names)},
        },
        {
            "prompt": "What is 7 times 6? Answer with a number.",
            "outputs": {
                name: "42" if i < 2 else "7 times 6 is 42.\n\n```python\n7 * 6\n```"
                for i, name in enumerate(names)
            },
        },
    ]


def about() -> dict[str, Any]:
    return {
        "text": {
            "name": "wikitext2 test_raw",
            "tokens": 32704,
            "sha256": hashlib.sha256(b"text").hexdigest(),
        },
        "notes": [
            (
                "demo: 79% of the weights come from a 4-bit grid (GGUF Q4_1, groups of 32): "
                "4-bit results on this model flatter grids that match"
            )
        ],
        "command": "posttrain compare demo build/demo-w6a8 --text wiki.txt --window 512 "
        "--max-tokens 32768 --out report.html",
        "machine": {
            "cpu": "Intel Xeon, 2 cores",
            "memory_bytes": 8160437248,
            "python": "3.11.7",
            "torch": "2.13.0",
            "posttrain": "0.1.0",
        },
        "mode": "lockstep",
        "kl": {"kind": "full", "top_k": None},
        "bootstrap": {
            "method": "BCa over windows",
            "confidence": 0.95,
            "resamples": 10000,
            "seed": 0,
        },
        "created": "2026-03-02T10:11:12Z",
    }


LONG_NAME = "/home/someone/with/a/long/path/" + "avery-very-long-model-name-" * 4 + "w6a8"
UNICODE_NAME = "models/模型-日本語-مرحبا-👩‍👩‍👧"


def renamed(value: Any, names: dict[str, str]) -> Any:
    """`value` with models called by other names, wherever they are keys or values."""
    if isinstance(value, dict):
        return {names.get(key, key): renamed(part, names) for key, part in value.items()}
    if isinstance(value, list):
        return [renamed(part, names) for part in value]
    return names.get(value, value) if isinstance(value, str) else value


def awkward() -> dict[str, Any]:
    """80 blocks, names that are long, unicode or markup, long unbroken texts."""
    names = dict(zip([row[0] for row in SMALL], [LONG_NAME, UNICODE_NAME, "<script>alert(1)</script>"],
                     strict=False))  # fmt: skip
    data = renamed(comparison(3, blocks=80), names)
    texts = ["x" * 900, "y" * 300 + STORY * 12, "今日は天気がいい。" * 40, "مرحبا بالعالم " * 30]
    listed = [model["model"] for model in data["models"]]
    data["generations"] = [
        {"prompt": "word " * 200, "outputs": dict(zip(listed, texts, strict=True))}
    ]
    data["command"] = "posttrain compare " + "a" * 500
    return data


def tiny() -> dict[str, Any]:
    """One layer, one block, an interval that includes zero."""
    data = comparison(blocks=1)
    model = data["models"][1]
    model["layers"], model["block_sensitivity"] = model["layers"][-1:], model["block_sensitivity"]
    data["pairs"][0].update(ci_low=-0.002, ci_high=0.011)
    return data


def experts() -> dict[str, Any]:
    """A mixture of experts, a quantized head, a single window of text, bins of equal width."""
    data = comparison(blocks=6)
    kinds = KINDS[:4] + tuple(f"mlp.experts.{i}.{kind}_proj" for i in range(8)
                              for kind in ("gate", "up", "down"))  # fmt: skip
    head = {"name": "lm_head", "weight": "int8 | fp16/row", "input": None, "qsnr": 45.1,
            "bits_per_weight": 8.02}  # fmt: skip
    data["models"][1]["layers"] = [*layers(6, 33.0, random.Random(3), kinds), head]
    data["pairs"][0].update(ci_low=math.nan, ci_high=math.nan)
    data["position_nll"]["edges"] = [42 * i for i in range(len(EDGES))]
    return data


def searched(blocks: int = 30) -> dict[str, Any]:
    """A plan that was found for a budget, with an output head outside the blocks."""
    data, rng = comparison(blocks=blocks), random.Random(5)
    kinds = ("self_attn.q_proj+k_proj+v_proj", "self_attn.o_proj", "mlp.gate_proj+up_proj",
             "mlp.down_proj")  # fmt: skip
    groups = [f"model.layers.{block}.{kind}" for block in range(blocks) for kind in kinds]
    data["models"][1]["search"] = {
        "scan": "cheap",
        "predicted_loss": 0.0123,
        "predicted_bits_per_weight": 6.98,
        "groups": [
            {"group": group, "layers": [group], "weight": "int6 | fp16/g64",
             "bits": rng.choice((5.25, 6.25, 7.25, 8.25)), "predicted_loss": rng.random() / 5000,
             "class": None}
            for group in [*groups, "lm_head"]
        ],
    }  # fmt: skip
    return data


def crowded() -> dict[str, Any]:
    """Nine models of nearly the same size and loss."""
    rows = [(f"build/demo-variant-{i}", 4.25 + 0.02 * i, 0.05 + 0.001 * (i % 3), 0.01, 0.05, 0.9, 20.0)
            for i in range(9)]  # fmt: skip
    return comparison(chosen=tuple(rows), blocks=4)


CASES = {
    "two": comparison,
    "six": lambda: comparison(5),
    "alone": lambda: comparison(0),
    "awkward": awkward,
    "tiny": tiny,
    "experts": experts,
    "crowded": crowded,
    "searched": searched,
}
