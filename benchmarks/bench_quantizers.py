"""Quantizing with posttrain and with llm-compressor: loss, time and memory, in one run.

    python -m venv build/peers/llmcompressor
    build/peers/llmcompressor/bin/pip install torch==2.13.0     # first, so that it stays this one
    build/peers/llmcompressor/bin/pip install llmcompressor==0.14.0.1
    python benchmarks/bench_quantizers.py [MODEL ...] [--peer PYTHON] [--windows 128] [--quick]

For each model (default: demo and pico) writes results/quantizers-MODEL.json. Both tools are given
the same bf16 checkpoint, the same calibration windows (of the embedded text) and the same formats:
INT4 weights in groups of 64, and INT8 weights per channel with INT8 activations per token; both
leave the output head and the embedding alone and write compressed-tensors. posttrain scores all
results on the embedded evaluation text; `duels` pairs ours with theirs. `checks` has the loss of one
checkpoint of each format by plain transformers too.

Every quantization is a process of its own. `seconds` and `peak_gib` are of the whole process, seen
from outside; `import_seconds` and `import_gib` of one that only imports what it needs. llm-compressor
wants other releases of libraries than posttrain runs with, hence its own environment; without it
the benchmark says so and measures only ours. On `demo`, whose weights came from a 4-bit grid, the
4-bit rows flatter.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from bench_gguf_quality import WINDOW
from bench_recipes import WORK
from common import ROOT, run_measured, verdict, write_result
from safetensors.torch import save_file

import posttrain
from posttrain.data import load_text, token_windows
from posttrain.evaluate.perplexity import mean_over_windows
from posttrain.evaluate.windows import Windows
from posttrain.models.load import load

PEER = ROOT / "build/peers/llmcompressor/bin/python"
# Calibration windows; of models that are not named, 256 of 256 tokens.
SAMPLES = {"demo": 32}
# What takes the better part of an hour there: AWQ runs a model twenty times over.
TOO_LONG = {"demo": ("w4 awq",)}
GIB = 2**30
# llm-compressor's GPTQ, option for option: it orders columns by activation unless told not to.
MATCHED = WORK / "gptq-actorder.yaml"
MATCHED_RECIPE = """\
name: gptq-actorder
layers: [{match: "*", weight: int4h | fp16/g64}]
ignore: [lm_head]
solver: {name: gptq, damping: 0.01, actorder: true}
"""
# format -> what ours is called -> (recipe, options)
OURS: dict[str, dict[str, tuple[Any, tuple[str, ...]]]] = {
    "W4 g64": {
        "rtn": ("w4a16", ("--solver", "rtn", "--transform", "none")),
        "gptq": (str(MATCHED), ()),
        "w4a16": ("w4a16", ()),
    },
    "W8A8": {
        "rtn": ("w8a8-portable", ("--transform", "none")),
        "w8a8-portable": ("w8a8-portable", ()),
    },
}
# format -> recipes in quantizer_peers.py
THEIRS = {
    "W4 g64": ("w4 rtn", "w4 gptq", "w4 smoothquant gptq", "w4 awq"),
    "W8A8": ("w8a8 rtn", "w8a8 smoothquant gptq"),
}
DUELS = (  # (format, ours, theirs): the same method, and what each tool would have one use
    ("W4 g64", "rtn", "w4 rtn"),
    ("W4 g64", "gptq", "w4 gptq"),
    ("W4 g64", "w4a16", "w4 gptq"),
    ("W4 g64", "w4a16", "w4 smoothquant gptq"),
    ("W4 g64", "w4a16", "w4 awq"),
    ("W8A8", "rtn", "w8a8 rtn"),
    ("W8A8", "w8a8-portable", "w8a8 smoothquant gptq"),
)
CHECKED = ("w4 gptq", "w8a8 rtn")
KEYS = ("delta_nll", "ci_low", "ci_high", "kl", "greedy_agreement")
# What `posttrain quantize` imports before it begins.
IMPORTS = """
import torch, posttrain.quantize, posttrain.quantize.pipeline
from transformers import AutoModelForCausalLM, LlamaForCausalLM
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="*", default=("demo", "pico"), metavar="MODEL")
    parser.add_argument("--peer", type=Path, default=PEER, help="Python that has llmcompressor")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--quick", action="store_true", help="few windows; writes no result")
    args = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    MATCHED.write_text(MATCHED_RECIPE, encoding="utf-8")
    peer = args.peer if args.peer.is_file() else None
    if peer is None:
        print(f"{args.peer}: no such file, so llm-compressor is left out; see the top of this "
              "script for how to install it, and --peer", file=sys.stderr)  # fmt: skip
    for model in args.models:
        figures = measure(model, peer, 2 if args.quick else args.windows, args.quick)
        if args.quick:
            print(json.dumps(figures, indent=1))
        else:
            write_result(f"quantizers-{Path(model).name}", figures)


def measure(model: str, peer: Path | None, count: int, quick: bool) -> dict[str, Any]:
    """Everything about one model: rows, duels, checks, text."""
    size = WINDOW.get(model, 256)
    folder = WORK / f"quantizers-{Path(model).name}"
    shutil.rmtree(folder, ignore_errors=True)
    plain = folder / "bf16"
    export(model, plain)
    samples = 2 if quick else SAMPLES.get(model, 256)
    made = {}
    for form, named in OURS.items():
        for name, (recipe, options) in named.items():
            made["posttrain", form, name] = _ours(
                plain, folder / f"posttrain {name} {form}", recipe, options, size, samples
            )
    if peer is not None:
        tokens = calibration(plain, folder / "tokens.safetensors", size, samples)
        for form, recipes in THEIRS.items():
            for name in recipes:
                if name in TOO_LONG.get(model, ()):
                    continue
                made["llm-compressor", form, name] = _theirs(
                    peer, plain, folder / f"llm-compressor {name}", name, tokens
                )
    folders = [str(facts.pop("folder")) for facts in made.values()]
    compared = posttrain.compare(
        [str(plain), *folders], window=size, max_tokens=size * count, generations=False
    )
    found = dict(
        zip(made, zip(compared["pairs"], compared["models"][1:], strict=True), strict=True)
    )
    rows = [
        {"tool": tool, "format": form, "method": name}
        | facts
        | {"bits_per_weight": found[tool, form, name][1]["bits_per_weight"]}
        | {key: found[tool, form, name][0][key] for key in KEYS}
        for (tool, form, name), facts in made.items()
    ]
    return {
        "model": model,
        "rows": rows,
        "duels": [
            _duel(form, ours, theirs, found)
            for form, ours, theirs in DUELS
            if ("llm-compressor", form, theirs) in found
        ],
        "checks": [
            _check(name, folder / f"llm-compressor {name}", size) for name in CHECKED if peer
        ],
        "text": compared["text"],
        "window": size,
        "windows": len(compared["models"][0]["window_nll"]),
        "calibration": {"text": load_text(None, "calibration").name, "windows": samples},
        "threads": torch.get_num_threads(),
    }


def export(model: str, out: Path) -> None:
    """The model as a bf16 Hugging Face folder, which both tools read."""
    found = load(model, dtype="bfloat16")
    tokenizer = found.tokenizer
    found.save_pretrained(out)
    tokenizer.save_pretrained(out)


def calibration(plain: Path, out: Path, window: int, samples: int) -> Path:
    """The windows that `posttrain quantize` draws from the embedded text with seed 0."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(plain)
    windows = token_windows(load_text(None, "calibration"), tokenizer, window)
    drawn = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))[:samples]
    save_file({"tokens": windows[drawn.sort().values]}, out)
    return out


def _ours(
    plain: Path, out: Path, recipe: str, options: tuple[str, ...], window: int, samples: int
) -> dict[str, Any]:
    words = ["quantize", str(plain), "--recipe", recipe, "-o", str(out), *options]
    words += ["--calibration", "prose+python-docs"]
    words += ["--window", str(window), "--samples", str(samples), "--json"]
    process = run_measured([sys.executable, "-m", "posttrain", *words])
    imports = run_measured([sys.executable, "-c", IMPORTS])
    return _facts(out, process, json.loads(process["stdout"])["seconds"], imports)


def _theirs(peer: Path, plain: Path, out: Path, recipe: str, tokens: Path) -> dict[str, Any]:
    job = {"model": str(plain), "tokens": str(tokens), "out": str(out), "recipe": recipe}
    path = out.with_suffix(".json")
    path.write_text(json.dumps(job), encoding="utf-8")
    script = str(Path(__file__).with_name("quantizer_peers.py"))
    process = run_measured([str(peer), script, str(path)])
    answer = json.loads(process["stdout"])
    imports = run_measured([str(peer), script])
    found = _facts(out, process, answer["seconds"], imports)
    return found | {"versions": answer["versions"]}


def _facts(out: Path, process: Any, work: float, imports: Any) -> dict[str, Any]:
    return {
        "folder": out,
        "seconds": process["seconds"],
        "work_seconds": work,
        "import_seconds": imports["seconds"],
        "peak_gib": process["peak_rss_bytes"] / GIB,
        "import_gib": imports["peak_rss_bytes"] / GIB,
        "above_imports_gib": (process["peak_rss_bytes"] - imports["peak_rss_bytes"]) / GIB,
    }


def _duel(form: str, ours: str, theirs: str, found: dict[Any, Any]) -> dict[str, Any]:
    """Our loss less theirs, paired window by window; negative: ours predicts better."""
    nll = [
        torch.tensor(found[tool, form, name][1]["window_nll"], dtype=torch.float64)
        for tool, name in (("posttrain", ours), ("llm-compressor", theirs))
    ]
    (delta,) = mean_over_windows([(nll[0] - nll[1])[:, None]])
    return {
        "format": form,
        "ours": f"posttrain {ours}",
        "theirs": f"llm-compressor {theirs}",
        "delta_nll": delta.mean,
        "ci_low": delta.low,
        "ci_high": delta.high,
        "verdict": verdict(delta.low, delta.high),
    }


def _check(name: str, folder: Path, window: int) -> dict[str, Any]:
    """Loss of a peer's checkpoint on four windows, by posttrain and by plain transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"window": window, "max_tokens": 4 * window}
    ours = posttrain.evaluate(str(folder), **options)["nll"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    windows = Windows.cut(load_text(None, "evaluation"), tokenizer, **options).tokens
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(input_ids=windows).logits[:, :-1].flatten(0, 1)
    plain = float(torch.nn.functional.cross_entropy(logits, windows[:, 1:].flatten()))
    return {"what": f"llm-compressor {name}", "posttrain_nll": ours, "transformers_nll": plain}


if __name__ == "__main__":
    main()
