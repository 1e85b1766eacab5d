"""talk to a model, with history; or one question with --prompt

Type a line and get an answer; the conversation so far is part of every question. /reset forgets
it, /exit (or Ctrl-D) ends. Without a terminal, each line read is one turn.

examples:
  posttrain chat small
  posttrain chat small --prompt "Why is the sky blue?" --max-new-tokens 80
  posttrain chat small --kv int8
  posttrain chat demo --system "Answer in one sentence." --temperature 0.7 --seed 3
"""

import argparse
import gc
import io
import sys
from contextlib import suppress
from typing import Any

from posttrain.cli.arguments import (
    Parser,
    add_kv_option,
    count,
    factor,
    fraction,
    options,
    positive,
    share,
    warn,
    whole,
)
from posttrain.errors import UserError

RESUME = ""


def arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="a directory, a hub id, a .gguf file, or demo")
    add("--prompt", metavar="TEXT", help="ask this one thing, print the answer and end")
    add("--system", metavar="TEXT", help="instructions put before the conversation")
    add(
        "--temperature",
        metavar="T",
        type=positive,
        default=0.0,
        help="0 takes the likeliest token; around 0.7 is varied",
    )
    add(
        "--top-k", metavar="K", type=whole, default=0, help="sample among the K likeliest; 0 is all"
    )
    add(
        "--top-p",
        metavar="P",
        type=share,
        default=1.0,
        help="sample among the likeliest tokens that together have probability P",
    )
    add(
        "--min-p",
        metavar="P",
        type=fraction,
        default=0.0,
        help="leave out tokens less than P times as likely as the likeliest",
    )
    add(
        "--repetition-penalty",
        metavar="R",
        type=factor,
        default=1.0,
        help="above 1 makes tokens that occurred less likely",
    )
    add("--max-new-tokens", metavar="N", type=count, default=256, help="longest answer, in tokens")
    add("--seed", metavar="N", type=whole, default=0, help="of the sampling")
    add_kv_option(parser)


def call(args: argparse.Namespace) -> dict[str, Any]:
    if args.json and args.prompt is None:
        raise UserError("--json needs --prompt: a conversation is no single JSON object")
    _import()
    if isinstance(sys.stdout, io.TextIOWrapper):  # an answer in an alphabet that it cannot show
        sys.stdout.reconfigure(errors="replace")
    if args.prompt is not None:
        import posttrain

        stream = None if args.json else _print_now
        result: dict[str, Any] = posttrain.chat(**options(args), stream=stream)
        if stream is not None:
            print()
        for note in result.get("notes", ()):
            warn(note)
        return result
    _converse(args)
    return {}


def _import() -> None:
    """Import what is needed, without a search for garbage among objects that all stay: it would take
    a tenth of the time until the first token."""
    gc.disable()
    try:
        from posttrain.quick import import_quick_torch

        import_quick_torch()
        import posttrain.lm.chat  # noqa: F401
    finally:
        gc.enable()
    gc.freeze()


def show(result: dict[str, Any]) -> str:
    return ""  # the answer was printed as it was made


def _print_now(piece: str) -> None:
    print(piece, end="", flush=True)


def _converse(args: argparse.Namespace) -> None:
    from posttrain.lm.chat import Conversation, unused

    if sys.stdin is None:
        raise UserError("standard input is closed: ask one thing with --prompt")
    talk = Conversation(args.model, system=args.system, kv=args.kv)
    sampling = {
        name: value
        for name, value in options(args).items()
        if name not in ("model", "prompt", "system", "kv")
    }
    for note in unused(**sampling):
        warn(note)
    interactive = sys.stdin.isatty()
    if interactive:
        with suppress(ImportError):  # not every Python has it
            import readline  # noqa: F401  (arrow keys and history at the prompt)
    warned: set[str] = set()
    while True:
        for note in talk.facts()["notes"]:
            kind = note.partition(":")[0]  # not the same again after every answer
            if kind not in warned:
                warn(note)
            warned.add(kind)
        line = _read_line("> " if interactive else "")
        if line in (None, "/exit", "/quit"):
            break
        if line == "/reset":
            talk.reset()
        elif line:
            _answer(talk, line, sampling)


def _read_line(prompt: str) -> str | None:
    try:
        return input(prompt).strip()
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        raise UserError(
            f"standard input is not {error.encoding.upper()}: {error.reason}"
        ) from error


def _answer(talk: Any, line: str, sampling: dict[str, Any]) -> None:
    try:
        talk.say(line, stream=_print_now, **sampling)
        print("\n", flush=True)
    except KeyboardInterrupt:  # ends this answer, not the conversation
        print(" [interrupted]\n", flush=True)
