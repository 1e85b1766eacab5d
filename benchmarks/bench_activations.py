"""What the granularity of integer activations costs: one scale per token, per group, or none.

    python benchmarks/bench_activations.py [--text FILE] [--windows 48]

The demo model, its linears rounded to nearest in the weight formats of the recipes w8a8 and w6a8,
without smoothing, once for every way of entering activations; all scored on the same tokens.
Writes results/activations.json: `rows` pairs each with the same weights and activations left alone;
the row "none, full-precision weights" shows what those weights cost, with the sign turned.
"""

import argparse
from pathlib import Path
from typing import Any

import yaml
from bench_recipes import WORK, local, wikitext
from common import run_json, write_result

import posttrain
from posttrain.quantize.recipe import load_recipe

WEIGHTS = ("w8a8", "w6a8")  # recipes whose weight format is used
INPUTS = {  # name -> (input, rotate)
    "none": (None, False),
    "int8 per token": ("int8h | fp32/row", False),
    "int8 per token, rotated": ("int8h | fp32/row", True),
    "int8 per 128": ("int8h | fp32/g128", False),
    "int8 per 64": ("int8h | fp32/g64", False),
    "int8 per 32": ("int8h | fp32/g32", False),
}
KEYS = ("delta_nll", "ci_low", "ci_high", "kl", "greedy_agreement")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--text", type=Path, default=wikitext())
    parser.add_argument("--windows", type=int, default=48)
    args = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    options = {"text": local(args.text, "evaluation"), "window": 512, "generations": False}
    options |= {"max_tokens": 512 * args.windows}
    rows = []
    for recipe in WEIGHTS:
        weight = str(load_recipe(recipe).plan.rules[0].weight)
        alone, *made = [_quantize(recipe, weight, *how) for how in INPUTS.values()]
        compared = posttrain.compare([alone, "demo", *made], **options)
        names = ["none, full-precision weights", *list(INPUTS)[1:]]
        rows += [
            {"weights": weight, "activations": name} | {key: pair[key] for key in KEYS}
            for name, pair in zip(names, compared["pairs"], strict=True)
        ]
    figures = {"rows": rows, "text": compared["text"], "windows": args.windows, "window": 512}
    write_result("activations", figures)


def _quantize(recipe: str, weight: str, given: str | None, rotate: bool) -> str:
    """The demo with these formats in every linear of its blocks, and nothing else done to it."""
    name = f"{recipe}-{(given or 'none').rpartition('/')[2]}{'-rotated' * rotate}"
    rule: dict[str, Any] = {"match": "*", "weight": weight}
    if given:
        rule["input"] = given
    if rotate:
        rule["rotate"] = True
    job = {"name": name, "layers": [rule], "ignore": ["lm_head"], "solver": "rtn"}
    path, out = WORK / f"activations-{name}.yaml", WORK / f"activations-{name}"
    path.write_text(yaml.safe_dump(job), encoding="utf-8")
    run_json("quantize", "demo", "--recipe", str(path), "-o", str(out), "--overwrite")
    return str(out)


if __name__ == "__main__":
    main()
