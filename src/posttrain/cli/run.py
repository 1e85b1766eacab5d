"""run a whole job from a recipe: quantize, compare, chat, report

A second run of the same recipe does only what is missing or has changed; an interrupted one
continues where it stopped. What was measured is in DIR/run.json.

examples:
  posttrain run demo
  posttrain recipes show demo > mine.yaml; posttrain run mine.yaml -o build/mine
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from posttrain.cli import compare, evaluate, quantize
from posttrain.cli.arguments import Parser, add_progress_option, options
from posttrain.cli.output import seconds_text

RESUME = "run the same command again to continue where it stopped"


def arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("recipe", metavar="NAME|FILE", help="a shipped recipe (see `posttrain recipes`) or YAML")
    add("-o", "--out", metavar="DIR", help="output folder (default: the recipe's)")
    add("--overwrite", action="store_true", help="do every stage anew")
    add_progress_option(parser)


def call(args: argparse.Namespace) -> dict[str, Any]:
    import posttrain

    return posttrain.run(**options(args))


def show(result: dict[str, Any]) -> str:
    parts = [_stage(stage) for stage in _notes_once(result["stages"])]
    state = Path(result["out"]) / "run.json"
    parts.append(f"done in {seconds_text(result['seconds'])}; every figure is in {state}")
    return "\n\n".join(parts)


def _notes_once(stages: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The stages, each with the notes that none before it said; `compare` puts the model's name
    before what `quantize` said."""
    said: tuple[str, ...] = ()
    for stage in stages:
        notes = stage["result"].get("notes") or ()
        fresh = [note for note in notes if not note.endswith(said)]
        yield {**stage, "result": {**stage["result"], "notes": fresh}} if notes else stage
        said += tuple(notes)


def _stage(stage: dict[str, Any]) -> str:
    how = "reused" if stage["status"] == "reused" else seconds_text(stage["seconds"])
    title = f"{stage['name']} ({how})"
    shown = _SHOW.get(stage["stage"], str)(stage["result"])
    return "\n".join([title, *(f"  {line}".rstrip() for line in shown.splitlines())])


def _chat(result: dict[str, Any]) -> str:
    return f"> {result['prompt']}\n{result['answer'].strip()}"


def _report(result: dict[str, Any]) -> str:
    return f"open {result['report']} in a browser"


# How each kind of stage prints what it measured; `str` for kinds not listed.
_SHOW = {
    "quantize": quantize.show,
    "evaluate": evaluate.show,
    "compare": compare.show,
    "chat": _chat,
    "report": _report,
}
