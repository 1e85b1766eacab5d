"""The shipped recipes on the demo model: bits, paired loss, time, memory; beside GGUF's types.

    python benchmarks/bench_recipes.py [--text FILE] [--calibration FILE] [--windows 64]

Recipes run as shipped, unless the name of a row says what differs: no transform, another solver, or
`on NAME`, calibrated on the given text instead of the default one. `int2.1`, which trains, is left to
`posttrain reproduce int2_1`.

Writes results/demo-recipes.json. `rows` pairs each result with the full-precision model on the
same tokens; `gptq_against_rtn` pairs GPTQ with rounding at the same 4-bit format. The peer rows
are weights quantized by the `gguf` package (llama.cpp's formats, no importance matrix), scored in
the same run. 4-bit rows flatter whatever lands near the grid the demo's weights came from.
"""

import argparse
import gzip
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from common import ROOT, run_json, write_result

import posttrain
from posttrain.models.load import load

PLAIN, RTN = ("--transform", "none"), ("--solver", "rtn")
RUNS = [  # (name, recipe, options)
    ("w8a8", "w8a8", ()),
    ("w8a8-portable", "w8a8-portable", ()),
    ("w8a8-portable, no transform", "w8a8-portable", PLAIN),
    ("w6a8", "w6a8", ()),
    ("w6a8, rtn", "w6a8", RTN),
    ("w6a8, no transform", "w6a8", PLAIN),
    ("w6a16", "w6a16", ()),
    ("w4a16", "w4a16", ()),
    ("w4a16, rtn", "w4a16", RTN),
    ("w4a16, no transform", "w4a16", PLAIN),
    ("w4a16, rtn, no transform", "w4a16", (*RTN, *PLAIN)),
    ("w4a8", "w4a8", ()),
    ("w4", "w4", ()),
    ("mxfp4", "mxfp4", ()),
    ("nvfp4", "nvfp4", ()),
    ("nf4", "nf4", ()),
]
PEERS = ["Q8_0", "Q5_0", "Q4_0"]  # what the gguf package can quantize
FOUR_BIT = "weights of this checkpoint came from a 4-bit grid (GGUF Q4_1)"
DATA = Path(os.environ.get("POSTTRAIN_DATA", ROOT.parent / "shared" / "data"))
WORK = ROOT / "build" / "bench"


def main() -> None:
    args = _arguments()
    WORK.mkdir(parents=True, exist_ok=True)
    text, calibration = local(args.text, "evaluation"), local(args.calibration, "calibration")
    runs = list(RUNS)
    if calibration is not None:
        name = f"w4a16, on {args.calibration.parent.name}"
        runs.append((name, "w4a16", ("--calibration", calibration)))
    made = {name: _quantize(name, recipe, options) for name, recipe, options in runs}
    shown = [*((_folder(name), name, facts) for name, facts in made.items()), *map(_peer, PEERS)]
    models = ["demo", *(model for model, _, _ in shown)]
    options = {"text": text, "window": 512, "max_tokens": 512 * args.windows}
    compared = posttrain.compare(models, generations=False, **options)
    rows = [
        _measured(pair, model, name) | facts
        for pair, model, (_, name, facts) in zip(
            compared["pairs"], compared["models"][1:], shown, strict=True
        )
    ]
    rtn, gptq = _folder("w4a16, rtn"), _folder("w4a16")
    versus = posttrain.compare([rtn, gptq], generations=False, **options)
    write_result(
        "demo-recipes",
        {
            "rows": rows,
            "gptq_against_rtn": [
                _measured(versus["pairs"][0], versus["models"][1], "w4a16, gptq minus rtn")
            ],
            "text": compared["text"],
            "mode": compared["mode"],
            "windows": args.windows,
            "window": 512,
            "note": FOUR_BIT,
        },
    )


def wikitext() -> Path | None:
    """The text that results/ are measured on, where it is at hand."""
    path = DATA / "wikitext2/test_raw.txt.gz"
    return path if path.is_file() else None


def _arguments() -> argparse.Namespace:
    c4 = DATA / "c4_sample/docs.jsonl.gz"
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--text", type=Path, default=wikitext())
    parser.add_argument("--calibration", type=Path, default=c4 if c4.is_file() else None)
    parser.add_argument("--windows", type=int, default=64)
    return parser.parse_args()


def local(source: Path | None, role: str) -> str | None:
    """A plain copy under build/, so that results name no folder of this machine."""
    if source is None:
        return None
    names = source.name.removesuffix(".gz")
    copy = WORK / f"{role}-{source.parent.name}-{names}"
    opener = gzip.open if source.suffix == ".gz" else open
    with opener(source, "rb") as read, copy.open("wb") as written:
        shutil.copyfileobj(read, written)
    return str(copy.relative_to(ROOT))


def _folder(name: str) -> str:
    return str(WORK / name.replace(",", "").replace(" ", "-"))


def _quantize(name: str, recipe: str, options: Any) -> dict[str, Any]:
    words = ["quantize", "demo", "--recipe", recipe, "-o", _folder(name), "--overwrite"]
    result = run_json(*words, *options)
    return {
        "recipe": recipe,
        "solver": result["recipe"]["solver"]["name"],
        "quantize_seconds": result["seconds"],
        "peak_gib": result["peak_rss_bytes"] / 2**30,
        "predicted_over_measured": result["predicted_peak_bytes"] / result["peak_rss_bytes"],
        "coverage": result["coverage"],
    }


def _peer(kind: str) -> tuple[Any, str, dict[str, Any]]:
    """The demo with its decoder linears as GGUF `kind` would store them; head and norms kept."""
    import gguf

    model = load("demo", dtype=torch.float32)
    qtype = gguf.GGMLQuantizationType[kind]
    stored = count = 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers." in name:
            packed = gguf.quants.quantize(module.weight.numpy(), qtype)
            stored, count = stored + packed.nbytes, count + module.weight.numel()
            module.weight.data = torch.from_numpy(gguf.quants.dequantize(packed, qtype))
    facts = {
        "recipe": f"gguf {kind}",
        "solver": "gguf package",
        "quantize_seconds": None,
        "peak_gib": None,
        "predicted_over_measured": None,
        "coverage": None,
        "bits_per_weight": None,  # the whole model was never written in this type
        "linear_bits_per_weight": 8 * stored / count,
    }
    return model, f"gguf {kind}, weights only", facts


def _measured(pair: dict[str, Any], model: dict[str, Any], name: str) -> dict[str, Any]:
    layers = model.get("layers") or []
    sizes = [layer["shape"][0] * layer["shape"][1] for layer in layers]
    found = {
        "name": name,
        "bits_per_weight": model["bits_per_weight"],
        "nll": model["nll"],
        "perplexity": model["perplexity"],
        **{key: pair[key] for key in ("delta_nll", "ci_low", "ci_high", "kl", "greedy_agreement")},
    }
    if layers:
        bits = sum(n * x["bits_per_weight"] for n, x in zip(sizes, layers, strict=True))
        found["linear_bits_per_weight"] = bits / sum(sizes)
    return found


if __name__ == "__main__":
    main()
