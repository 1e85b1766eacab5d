"""list the shipped recipes, or print one to copy and edit

examples:
  posttrain recipes
  posttrain recipes show w6a8 > mine.yaml; posttrain quantize demo --recipe mine.yaml -o mine
"""

import argparse
from pathlib import Path
from typing import Any

from posttrain.cli.arguments import Parser, one_of
from posttrain.cli.output import table
from posttrain.errors import UserError, did_you_mean


def arguments(parser: Parser) -> None:
    parser.add_argument(
        "action",
        nargs="?",
        type=one_of("list", "show"),
        default="list",
        metavar="list|show",
        help="what to do",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="which recipe to show")


def call(args: argparse.Namespace) -> dict[str, Any]:
    from posttrain.recipe import shipped

    recipes = {entry["name"]: entry for entry in shipped()}
    if args.action == "list":
        if args.name:
            raise UserError(
                f"list takes no name; did you mean `posttrain recipes show {args.name}`?"
            )
        return {"recipes": list(recipes.values())}
    if args.name not in recipes:
        found = f"unknown recipe {args.name!r}" if args.name else "show needs the name of a recipe"
        raise UserError(found + did_you_mean(args.name or "", recipes))
    entry = recipes[args.name]
    return {**entry, "text": Path(entry["path"]).read_text(encoding="utf-8")}


def show(result: dict[str, Any]) -> str:
    if "text" in result:
        return str(result["text"]).rstrip("\n")
    rows = [(r["name"], f"posttrain {r['verb']}", r["description"]) for r in result["recipes"]]
    listed = table([("recipe", "used by", "what it does"), *rows])
    return f"{listed}\n\n`posttrain recipes show NAME` prints one, to copy and edit."
