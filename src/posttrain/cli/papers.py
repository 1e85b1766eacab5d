"""list published methods with their claims and what was measured, or show one

Each is a composition of this library's parts. The verdict is of the experiment that `posttrain
reproduce NAME` runs: reproduced, partly, not reproduced, needs a GPU, or not run.

examples:
  posttrain papers
  posttrain papers crossquant
"""

import argparse
import textwrap
from typing import Any

from posttrain.cli.arguments import Parser
from posttrain.cli.output import table

WIDTH = 88


def arguments(parser: Parser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="show this one")


def call(args: argparse.Namespace) -> Any:
    import posttrain

    return posttrain.papers(args.name)


def show(result: Any) -> str:
    if isinstance(result, dict):
        return card(result)
    rows = [(p["key"], str(p["year"]), p["area"], p["verdict"], p["figure"] or "-") for p in result]
    listed = table([("paper", "year", "area", "verdict", "measured"), *rows])
    return (
        f"{listed}\n\n`posttrain papers NAME` shows one, `posttrain reproduce NAME` measures again."
    )


def card(paper: dict[str, Any]) -> str:
    """What the method does, how to use it, what was claimed and what was found."""
    parts = [
        f"{paper['title']} ({paper['year']})",
        _paragraph("claim", paper["claim"]),
        _paragraph("what it does", paper["about"]),
        f"use it:\n  {paper['usage']}",
        f"at the size of the paper:\n  {paper['full_size']}",
        f"test it here:\n  posttrain reproduce {paper['key']}",
    ]
    evidence = paper["evidence"]
    if evidence is None:
        texts = {"condition": paper["conditions"], "control": paper["controls"]}
        lines = [f"  {kind}: {text}" for kind, said in texts.items() for text in said.values()]
        return "\n\n".join([*parts, "what will be tested:\n" + _wrapped(lines)])
    return "\n\n".join([*parts, outcome(evidence)])


def outcome(evidence: dict[str, Any]) -> str:
    """The verdict, the figure, and every condition with whether it was met."""
    lines = [
        f"  {'met' if tested['passed'] else 'NOT met'}: {tested['text']}"
        for kind in ("conditions", "controls")
        for tested in evidence[kind]
    ]
    size = " (quick: a rehearsal, not evidence)" if evidence["quick"] else ""
    head = f"{evidence['verdict']}{size}, {evidence['date']}, in {evidence['seconds']:.0f} s"
    return "\n".join([head, f"  {evidence['figure']}", _wrapped(lines)])


def _paragraph(title: str, text: str) -> str:
    return textwrap.fill(f"{title}: {text}", WIDTH, subsequent_indent="  ")


def _wrapped(lines: list[str]) -> str:
    return "\n".join(textwrap.fill(line, WIDTH, subsequent_indent="    ") for line in lines)
