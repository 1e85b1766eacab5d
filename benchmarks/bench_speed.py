"""Speed of whole models beside other engines, and what each costs in quality.

    pip install llama-cpp-python      # built from source, it uses this processor's instructions
    pip install ctranslate2
    python benchmarks/bench_speed.py [--only demo|1b] [--text FILE] [--windows 64] [--rounds 7] [--threads N,N]

`demo` (results/speed-demo.json): the shipped integer recipes, one of them with a plan for more bits
too, and the GGUF types of the same width, timed in the same rounds by `posttrain bench`, and scored
on the same tokens by one `compare`. The GGUF files are made by llama.cpp from the demo's own. `1b`
(results/speed-1b.json): a random checkpoint of Llama-3.2-1B's shape, rounded to nearest; only speed.
"""

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

from bench_recipes import WORK, local, wikitext
from bench_streaming import build
from common import run_json, write_result

import posttrain
from posttrain.bench.gguf_peer import gguf_of, nearest_type

RECIPES = ("w8a8", "w6a8", "w4a8")
PLANNED = "w6a8 --bits 7"  # still fewer than Q6_K, which is Q8_0 where 256 does not divide a row
WIDTHS = {"transformers": "float32", "ctranslate2": "INT8"}  # llama.cpp's says what it was made in
KEYS = ("prefill_tps", "decode_tps", "score_tps", "bits_per_weight", "kernel", "rss_bytes")
RATIOS = [
    f"{what}_ratio{end}" for what in ("prefill", "decode", "score") for end in ("", "_spread")
]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", choices=("demo", "1b"))
    parser.add_argument("--text", type=Path, default=wikitext())
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", help="as of posttrain bench")
    args = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    if args.only != "1b":
        demo(args)
    if args.only != "demo":
        one_billion(args)


def demo(args: argparse.Namespace) -> None:
    made = {}
    for recipe in (*RECIPES, PLANNED):
        made[recipe] = WORK / f"speed-{recipe.replace(' ', '')}"
        words = ("--recipe", *recipe.split(), "-o", str(made[recipe]), "--overwrite")
        run_json("quantize", "demo", *words)
    against = ("--against", "llama.cpp,transformers,ctranslate2", "--rounds", str(args.rounds))
    timed = {
        name: run_json("bench", str(path), *against, *threads(args)) for name, path in made.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        files = {name: gguf_of(str(path), nearest_type(str(path)), Path(folder))
                 for name, path in made.items()}  # fmt: skip
        scored = [*made.values(), *dict.fromkeys(files.values())]
        options = {"text": local(args.text, "evaluation"), "window": 512}
        options |= {"max_tokens": 512 * args.windows, "generations": False}
        compared = posttrain.compare(["demo", *map(str, scored)], **options)
    losses = dict(zip(scored, compared["pairs"], strict=True))
    rows = []
    for recipe, result in timed.items():
        rows += _rows(recipe, result, losses[made[recipe]], losses[files[recipe]])
    write_result(
        "speed-demo",
        {"rows": rows, "benches": timed, "text": compared["text"], "windows": args.windows},
    )


def threads(args: argparse.Namespace) -> list[str]:
    return ["--threads", args.threads] if args.threads else []


def one_billion(args: argparse.Namespace) -> None:
    model = WORK / "random-1b"
    build(model)
    timed, rows = {}, []
    for recipe in RECIPES:
        out = WORK / f"random-1b-{recipe}"
        plain = ("--solver", "rtn", "--transform", "none", "--overwrite")
        run_json("quantize", str(model), "--recipe", recipe, "-o", str(out), *plain)
        words = ["--against", "llama.cpp", "--prefill", "128", "--decode", "32"]
        words += ["--rounds", str(min(args.rounds, 4)), *threads(args)]
        timed[recipe] = run_json("bench", str(out), *words)
        rows += _rows(recipe, timed[recipe], None, None)
        shutil.rmtree(out)
    write_result("speed-1b", {"rows": rows, "benches": timed})
    shutil.rmtree(model)


def _rows(recipe: str, result: dict[str, Any], ours: Any, theirs: Any) -> list[dict[str, Any]]:
    """One row for us and one for each peer, at the largest number of threads."""
    own = ("bandwidth_share", "peak_share", "first_token_seconds")
    rows = [
        {"what": f"posttrain {recipe}"} | {key: result[key] for key in (*KEYS, *own)} | _loss(ours)
    ]
    for peer in result["peers"]:
        name = f"{peer['name']} {peer.get('type') or WIDTHS[peer['name']]}"
        loss = theirs if peer["name"] == "llama.cpp" else None
        found = {key: peer[key] for key in (*KEYS, *RATIOS) if key in peer}
        rows.append({"what": f"{name}, beside {recipe}"} | found | _loss(loss))
    return rows


def _loss(pair: Any) -> dict[str, Any]:
    keys = ("delta_nll", "ci_low", "ci_high", "kl")
    return {} if pair is None else {key: pair[key] for key in keys}


if __name__ == "__main__":
    main()
