"""measure a model: perplexity over a text, size, effective bits per weight

Reads the text in windows and scores every token once. The loss is in nats per token.

examples:
  posttrain evaluate demo
  posttrain evaluate small --text notes.txt --window 1024 --stride 512
  posttrain evaluate demo --kv int8
  posttrain evaluate small --max-tokens 16384 --records small.jsonl --json
"""

import argparse
from typing import Any

from posttrain.cli.arguments import (
    DTYPES,
    Parser,
    add_kv_option,
    add_progress_option,
    add_text_options,
    one_of,
    options,
    words,
)
from posttrain.cli.output import bytes_text, facts, kv_text, notes, number


def arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="a directory, a hub id, a .gguf file, or demo")
    add(
        "--tasks",
        metavar="NAMES",
        type=words,
        default=("perplexity",),
        help="what to measure, separated by commas: perplexity (the default)",
    )
    add_text_options(parser)
    add(
        "--dtype",
        type=one_of(*DTYPES),
        default="float32",
        help=f"computing precision: {', '.join(DTYPES)}",
    )
    add_kv_option(parser)
    add(
        "--records", metavar="FILE", help="write the loss of every token: .jsonl, .jsonl.gz or .npz"
    )
    add_progress_option(parser)


def call(args: argparse.Namespace) -> dict[str, Any]:
    import posttrain

    return posttrain.evaluate(**options(args))


def show(result: dict[str, Any]) -> str:
    lines = [
        ("perplexity", number(result["perplexity"], 3)),
        ("loss", f"{number(result['nll'])} nats per token over {result['tokens']:,} tokens"),
        ("bits per weight", number(result["bits_per_weight"], 2)),
        ("size", bytes_text(result["bytes"])),
        ("KV cache", kv_text(result)),
    ]
    return "\n".join([facts(str(result["model"]), lines), *notes(result)])
