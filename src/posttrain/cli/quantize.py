"""make a model smaller: quantize its linear layers and write a checkpoint

Streams the model block by block from disk, so that memory stays far below the model's size, and
writes a Hugging Face directory. `transformers` loads it after `import posttrain`; what the package
compressed-tensors can read (w8a8-portable, the 4-bit recipes but nf4) loads without. Killed at any
moment, the same command continues where it was and ends with the same bytes.

With a budget, --bits or --max-bytes, every layer gets the precision that pays most for its bytes: a
scan predicts what each layer loses in each format, and the plan with the least summed loss is used.
It is also written to DIR/recipe.yaml, to use again. The scan needs the whole model in memory, with
its squared gradients (8 bytes for every weight, and what one window of text leaves behind).

examples:
  posttrain quantize demo --recipe w6a8 -o small
  posttrain quantize meta-llama/Llama-3.2-1B --recipe w4a16 --memory-budget 2 -o llama-w4
  posttrain quantize ./my-model --recipe w4a16 --solver gptq --calibration mine.jsonl --chat -o out
  posttrain quantize ./my-model --recipe w4a8 --transform awq --solver zq-global -o out
  posttrain recipes show w6a8 > mine.yaml; posttrain quantize demo --recipe mine.yaml -o mine
  posttrain quantize demo --recipe w6a8 --bits 7 -o small7
"""

import argparse
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from posttrain.cli.arguments import (
    Parser,
    add_progress_option,
    byte_count,
    count,
    factor,
    one_of,
    options,
    positive,
    whole,
)
from posttrain.cli.output import bytes_text, facts, notes, number, seconds_text

RESUME = "run the same command again to continue where it stopped"


def arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="a directory, a hub id, a .gguf file, or demo")
    add(
        "--recipe",
        metavar="NAME|FILE",
        default="w6a8",
        help="what becomes what: a shipped recipe (see `posttrain recipes`) or a YAML file",
    )
    add("-o", "--out", metavar="DIR", required=True, help="directory to write")
    add(
        "--solver",
        metavar="NAME",
        help="how codes are chosen: rtn, mse, gptq, adaround, zq-local or zq-global, fast to slow "
        "(default: the recipe's)",
    )
    add(
        "--transform",
        metavar="NAME",
        help="what makes the weights easier to quantize first: smooth, crossquant, awq or none "
        "(default: the recipe's)",
    )
    add_progress_option(parser)
    group = parser.add_argument_group("budget: find the formats of the weights")
    add = group.add_argument
    add(
        "--bits",
        metavar="N",
        type=factor,
        help="bits per weight over the whole model, as the result states them: what is not "
        "quantized, and scales, included",
    )
    add(
        "--max-bytes", metavar="SIZE", type=byte_count, help="or bytes of all tensors, such as 95MB"
    )
    add(
        "--scan",
        metavar="HOW",
        type=one_of("cheap", "exact"),
        help="cheap: an estimate from gradients over four windows of the calibration text; exact: "
        "quantize one layer after the other and measure, many times slower (default: cheap)",
    )
    add(
        "--candidates",
        metavar="FORMATS",
        help="number formats to choose from, separated by commas (default: the recipe's at 3 to 8 "
        "bits)",
    )
    group = parser.add_argument_group(
        "calibration text, for transforms and solvers that look at activations"
    )
    add = group.add_argument
    add(
        "--calibration",
        metavar="FILE",
        help="text file, JSONL or corpus name (default: the recipe's, else prose+python-docs: "
        "prose written for this package, and part of Python's language reference)",
    )
    add("--samples", metavar="N", type=count, help="calibration windows (default: the recipe's)")
    add("--window", metavar="N", type=count, help="tokens in each (default: the recipe's)")
    add(
        "--chat",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="render JSONL messages with the chat template (default: the recipe's)",
    )
    add("--seed", metavar="N", type=whole, default=0, help="of the choice of windows")
    group = parser.add_argument_group("resources")
    add = group.add_argument
    add(
        "--memory-budget",
        metavar="GIB",
        type=positive,
        help="GiB of activations cached in memory before they go to disk (default: a quarter of "
        "what is free)",
    )
    add(
        "--no-resume",
        dest="resume",
        action="store_false",
        help="start anew where the same run was interrupted, instead of continuing",
    )
    add("--overwrite", action="store_true", help="replace another result in DIR")


def call(args: argparse.Namespace) -> dict[str, Any]:
    import posttrain

    return posttrain.quantize(**options(args))


def show(result: dict[str, Any]) -> str:
    peak, predicted = result["peak_rss_bytes"], result["predicted_peak_bytes"]
    done, total = bytes_text(result["bytes_quantized"]), bytes_text(result["bytes_total"])
    lines = [
        ("bits per weight", f"{number(result['bits_per_weight'], 2)} over the whole model"),
        ("quantized", f"{done} of the {total} that the weights took before"),
        ("signal to noise", quality(result["layers"])),
        ("time", seconds_text(result["seconds"])),
        ("peak memory", f"{bytes_text(peak)} (predicted {bytes_text(predicted)})"),
    ]
    if result.get("search"):
        lines[1:1] = found(result["search"], result["out"])
    return "\n".join([facts(f"wrote {result['out']}", lines), *notes(result)])


def found(search: dict[str, Any], out: str) -> list[tuple[str, str]]:
    """What a search found: its loss, and how many layers of each kind got which bits."""
    measured = f"{number(search['measured_loss'])} nats a token before any solver that sees text"
    lines = [("loss of the plan", measured)]
    if beside := search["uniform"]:
        width = number(beside["predicted_bits_per_weight"], 2)
        said = f"{number(beside['measured_loss'])} at {width} bits"
        taken = ", which loses less and was taken" if search["is_uniform"] else ""
        lines.append(("one width for all", said + taken))
    kinds: dict[str, Counter[float]] = {}
    for group in search["groups"]:
        kinds.setdefault(group["group"].rpartition(".")[2], Counter())[group["bits"]] += 1
    for kind, bits in kinds.items():
        shown = [f"{times} x {number(width, 2)}" for width, times in sorted(bits.items())]
        lines.append((kind.replace("_proj", ""), f"{', '.join(shown)} bits"))
    return [*lines, ("plan", f"{Path(out) / 'recipe.yaml'}, to use with --recipe")]


def quality(layers: list[dict[str, Any]]) -> str:
    """The worst and the middle QSNR of the layers' weights."""
    known = [(layer["qsnr"], layer["name"]) for layer in layers if layer.get("qsnr") is not None]
    if not known:
        return "-"
    worst, name = min(known)
    middle = statistics.median(qsnr for qsnr, _ in known)
    return f"median {middle:.1f} dB over {len(layers)} layers, worst {worst:.1f} dB ({name})"
