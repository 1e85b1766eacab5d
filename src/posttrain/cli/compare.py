"""compare models on the same tokens: paired differences with intervals, HTML report

The first MODEL is the reference. For each other one: the mean difference of the loss with its
95% bootstrap interval over windows (positive: worse than the reference), the KL divergence from
the reference's predictions, and how often both would say the same next token.

examples:
  posttrain compare demo small -o report.html
  posttrain compare demo demo --kv int4 --no-generations
  posttrain compare demo w8 w6 w4 --max-tokens 16384 --sensitivity -o report.html
"""

import argparse
from typing import Any

from posttrain.cli.arguments import (
    DTYPES,
    Parser,
    add_kv_option,
    add_progress_option,
    add_text_options,
    count,
    one_of,
    options,
    whole,
)
from posttrain.cli.output import bytes_text, notes, number, table


def arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("models", metavar="MODEL", nargs="+", help="two or more; the first is the reference")
    add("-o", "--out", metavar="FILE", help="write an HTML report: one file, no network needed")
    add_text_options(parser)
    add(
        "--dtype",
        type=one_of(*DTYPES),
        default="float32",
        help=f"computing precision: {', '.join(DTYPES)}",
    )
    add_kv_option(parser, "of every model but the first: ")
    add(
        "--kl",
        metavar="full|topk",
        type=one_of("full", "topk"),
        default="full",
        help="KL over the whole vocabulary, or over the reference's --top-k likeliest tokens",
    )
    add("--top-k", metavar="N", type=count, default=64, help="tokens kept with --kl topk")
    add(
        "--sensitivity",
        action="store_true",
        help="also put one quantized block at a time into the reference and measure what each "
        "costs (slower)",
    )
    add(
        "--no-generations",
        dest="generations",
        action="store_false",
        help="no sample answers of the models side by side",
    )
    add(
        "--records", metavar="FILE", help="write the loss of every token: .jsonl, .jsonl.gz or .npz"
    )
    add("--seed", metavar="N", type=whole, default=0, help="of the bootstrap")
    add_progress_option(parser)


def call(args: argparse.Namespace) -> dict[str, Any]:
    import posttrain

    return posttrain.compare(**options(args))


def show(result: dict[str, Any]) -> str:
    parts = [models_table(result["models"])]
    if result["pairs"]:
        parts.append(pairs_table(result["pairs"]))
    parts += notes(result)
    if result.get("report"):
        parts.append(f"report: {result['report']}")
    return "\n\n".join(parts)


def models_table(models: list[dict[str, Any]]) -> str:
    header = ("model", "bits/weight", "size", "KV bits", "tokens", "nll", "perplexity")
    rows = [
        (
            str(m["model"]),
            number(m["bits_per_weight"], 2),
            bytes_text(m["bytes"]),
            number(m["kv_bits_per_value"], 2),
            f"{m['tokens']:,}",
            number(m["nll"]),
            number(m["perplexity"], 3),
        )
        for m in models
    ]
    return table([header, *rows])


def pairs_table(pairs: list[dict[str, Any]]) -> str:
    header = ("model", "against", "delta nll", "95% interval", "KL", "same next token")
    rows = [
        (
            str(p["b"]),
            str(p["a"]),
            number(p["delta_nll"], 4, sign=True),
            interval(p["ci_low"], p["ci_high"]),
            number(p["kl"]),
            percent(p["greedy_agreement"]),
        )
        for p in pairs
    ]
    return table([header, *rows])


def interval(low: Any, high: Any) -> str:
    """A single window of text gives none."""
    ends = [number(end, 4, sign=True) for end in (low, high)]
    return "-" if "-" in ends else " .. ".join(ends)


def percent(share: Any) -> str:
    text = number(share and 100 * share, 1)
    return text if text == "-" else f"{text}%"
