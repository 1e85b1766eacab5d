"""The plan that `--bits` finds beside the same width for every layer, in the same bits.

    python benchmarks/bench_search.py pico|demo [--windows 64]

Writes results/search-NAME.json. All layers, the output head included, have INT weights in groups of
64 by the same solver. `posttrain quantize --bits B` is asked for the bits that a uniform width takes;
both are compared with the original, and with each other, on the same text. `less` is the loss of the
searched less that of the uniform, with its interval.
"""

import argparse
from typing import Any

from bench_recipes import WORK
from common import run_json, verdict, write_result

WIDTHS = {"pico": (3, 4, 5, 6), "demo": (4, 5, 6)}
SCANS = {"pico": ("cheap", "exact"), "demo": ("cheap",)}
RECIPE = """\
name: uniform{bits}
description: INT{bits} weights in groups of 64 for every layer, GPTQ
layers:
  - match: "*"
    weight: int{bits} | fp16/g64
  - match: lm_head
    weight: int{bits} | fp16/g64
solver: {{name: gptq, damping: 0.1, clip: mse, sweeps: 8}}
calibration: {{samples: {samples}, window: 512}}
"""
SAMPLES = {"pico": 128, "demo": 32}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", choices=sorted(WIDTHS))
    parser.add_argument("--windows", type=int, default=64, help="of 512 tokens")
    args = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    rows = [row for width in WIDTHS[args.model] for row in _pair(args.model, width, args.windows)]
    write_result(f"search-{args.model}", {"model": args.model, "rows": rows})


def _pair(model: str, width: int, windows: int) -> list[dict[str, Any]]:
    """Rows for the bits of one uniform width."""
    recipe = WORK / f"uniform{width}.yaml"
    recipe.write_text(RECIPE.format(bits=width, samples=SAMPLES[model]), encoding="utf-8")
    uniform = str(WORK / f"search-{model}-{width}")
    made = run_json("quantize", model, "--recipe", str(recipe), "-o", uniform, "--overwrite")
    # A uniform model is stored in so many bytes; the search may use all of them, and no more.
    budget = made["bits_per_weight"]
    rows = []
    for scan in SCANS[model]:
        searched = f"{uniform}-{scan}"
        options = ("--bits", repr(budget), "--scan", scan)
        found = run_json(
            "quantize", model, "--recipe", str(recipe), *options, "-o", searched, "--overwrite"
        )
        text = ("--no-generations", "--max-tokens", str(512 * windows), "--window", "512")
        beside = run_json("compare", model, uniform, searched, *text)["pairs"]
        (duel,) = run_json("compare", uniform, searched, *text)["pairs"]
        rows.append(
            {
                "uniform": f"int{width} | fp16/g64",
                "scan": scan,
                "bits_per_weight": budget,
                "searched_bits": found["bits_per_weight"],
                "is_uniform": found["search"]["is_uniform"],
                **{f"uniform_{key}": beside[0][key] for key in ("delta_nll", "kl")},
                **{f"searched_{key}": beside[1][key] for key in ("delta_nll", "kl")},
                "less": duel["delta_nll"],
                **{key: duel[key] for key in ("ci_low", "ci_high")},
                "verdict": verdict(duel["ci_low"], duel["ci_high"]),
                "seconds": found["seconds"],
            }
        )
    return rows


if __name__ == "__main__":
    main()
