"""test the claim of a paper on this machine

Runs the experiment that the paper's file describes, prints the claim beside what was measured and
writes results/papers/NAME.json (up to 40 minutes on 2 cores; interrupted, it continues where it was).
With --quick it is a rehearsal of two minutes at most, whose figures are not kept.

examples:
  posttrain reproduce crossquant
  posttrain reproduce all --quick
"""

import argparse
from typing import Any

from posttrain.cli.arguments import Parser, add_progress_option, options
from posttrain.cli.papers import outcome

RESUME = "the same command continues"


def arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("name", metavar="NAME", help="a paper of `posttrain papers`, or all")
    add("--quick", action="store_true", help="little text and few variants")
    add("-o", "--out", metavar="DIR", help="where NAME.json goes (default: results/papers)")
    add_progress_option(parser)


def call(args: argparse.Namespace) -> Any:
    import posttrain

    return posttrain.reproduce(**options(args))


def show(result: Any) -> str:
    several = result if isinstance(result, list) else [result]
    return "\n\n".join(f"{found['key']}: {found['claim']}\n{outcome(found)}" for found in several)
