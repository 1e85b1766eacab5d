"""measure speed: prompts, answers and scoring, beside this machine's limits and other tools

Every contender runs in a process of its own, all in turn, round by round; ratios are taken within
a round, shares against what a probe measured right before and after.

examples:
  posttrain bench small
  posttrain bench small --against llama.cpp,transformers --plot speed.svg
  posttrain bench small --depth 4096 --against llama.cpp
  posttrain bench demo --threads 2 --prefill 128 --rounds 3 --json
"""

import argparse
from typing import Any

from posttrain.cli.arguments import Parser, add_progress_option, count, options, whole, words
from posttrain.cli.output import bytes_text, facts, notes, number, table

CACHES = ("fp32", "fp16", "bf16", "int16", "int8", "fp8", "int4")


def arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="a directory, a hub id, a .gguf file, or demo")
    add(
        "--against",
        metavar="NAMES",
        type=words,
        default=(),
        help="peers in the same run, separated by commas: llama.cpp, transformers, ctranslate2",
    )
    add(
        "--threads",
        metavar="N,N",
        type=_counts,
        help="numbers of threads to measure with (default: 1, and one per processor)",
    )
    add("--prefill", metavar="N", type=count, default=512, help="tokens of a prompt")
    add("--decode", metavar="N", type=count, default=64, help="tokens of an answer")
    add(
        "--depth",
        metavar="N",
        type=whole,
        default=0,
        help="tokens that stand before an answer, as in a long chat; their time is not counted",
    )
    add("--rounds", metavar="N", type=count, default=5, help="how often everything is repeated")
    add(
        "--cache",
        choices=CACHES,
        help="what keys and values are kept in (default: what the model says, else "
        "int16 where activations are rounded to integers, fp16 elsewhere)",
    )
    add("--plot", metavar="FILE", help="draw the result, as SVG (a name in .svg)")
    add_progress_option(parser)


def call(args: argparse.Namespace) -> dict[str, Any]:
    import posttrain

    return posttrain.bench(**options(args))


def show(result: dict[str, Any]) -> str:
    probe = result["probe"]
    stored = number(result["bits_per_weight"], 2)
    read = bytes_text(probe["bytes_per_second"])
    peak = number(probe["operations_per_second"] / 1e9, 0)
    own = bytes_text(result["rss_above_imports_bytes"])
    lines = [
        ("kernel", result["kernel"]),
        ("first token", f"{number(1000 * result['first_token_seconds'], 1)} ms after 16 tokens"),
        (
            "weights",
            f"{bytes_text(result['weight_bytes'])} in memory, {stored} bits per weight stored",
        ),
        ("process", f"{bytes_text(result['rss_bytes'])}, {own} of it for the model"),
        ("memory", f"{read} per second at most{_use('answers', result['bandwidth_share'])}"),
        ("integer peak", f"{peak} GOPS{_use('prompts', result['peak_share'])}"),
    ]
    if result["depth"]:
        lines.append(("answers", f"{result['decode']} tokens, after {result['depth']}"))
    rows: list[tuple[str, ...]] = [
        ("tokens per second", "threads", "prompt", "answer", "scoring", "prompt", "answer")
    ]
    for entry in result["by_threads"]:
        rows.append(_row("posttrain", entry["threads"], entry))
        rows += [_row(_name(peer), entry["threads"], peer) for peer in entry["peers"]]
    parts = [facts(str(result["model"]), lines), "", table(rows)]
    if result["peers"]:
        parts.append("the last two columns: how many times as fast posttrain is (median of rounds)")
    if "plot" in result:
        parts.append(f"plot: {result['plot']}")
    return "\n".join([*parts, *notes(result)])


def _use(who: str, share: float | None) -> str:
    return "" if share is None else f"; {who} use {number(100 * share, 0)}%"


def _name(peer: dict[str, Any]) -> str:
    return " ".join(filter(None, (peer["name"], peer.get("type"))))


def _row(name: str, threads: int, entry: dict[str, Any]) -> tuple[str, ...]:
    def ratio(what: str) -> str:
        found = entry.get(f"{what}_ratio")
        return "" if found is None else f"{number(found, 2)}x"

    score = entry.get("score_tps")
    return (
        name, str(threads), number(entry["prefill_tps"], 0), number(entry["decode_tps"], 1),
        "" if score is None else number(score, 0), ratio("prefill"), ratio("decode"),
    )  # fmt: skip


def _counts(text: str) -> list[int]:
    return [count(word) for word in words(text)]
