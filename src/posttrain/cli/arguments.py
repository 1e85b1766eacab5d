"""Reading arguments: a parser whose errors help, and the types that several verbs share."""

import argparse
import re
import sys
import textwrap
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, NoReturn

from posttrain.errors import UserError, did_you_mean

DTYPES = ("auto", "float32", "bfloat16", "float16")


def summary(verb: ModuleType) -> str:
    """The first line of a verb's docstring."""
    return (verb.__doc__ or "").partition("\n")[0]


class _Help(argparse.RawDescriptionHelpFormatter):
    """Descriptions as they are written; a default beside each option that has one."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=96)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        hidden = action.default is None or isinstance(action.default, (bool, tuple))
        shown = not hidden and action.default != argparse.SUPPRESS
        return f"{action.help} (default: {action.default})" if shown else action.help


class Parser(argparse.ArgumentParser):
    """The parser of one verb; what it cannot read raises UserError with the nearest match."""

    def __init__(self, name: str, verb: ModuleType) -> None:
        super().__init__(
            f"posttrain {name}",
            description=textwrap.dedent(verb.__doc__ or ""),
            formatter_class=_Help,
            allow_abbrev=False,  # a new option must never change what an old script says
        )
        self.add_argument(
            "--json", action="store_true", help="print one JSON object on standard output"
        )

    def read(self, argv: list[str]) -> argparse.Namespace:
        known = self._option_string_actions
        before_dashes = argv[: argv.index("--")] if "--" in argv else argv
        for word in before_dashes:
            option = word.partition("=")[0]
            if re.match(r"--?[A-Za-z]", option) and option not in known:
                self._refuse_option(option, known)
        args, rest = self.parse_known_args(argv)
        if rest:
            self.error(f"unexpected argument {rest[0]!r}")
        return args

    def _refuse_option(self, option: str, known: Iterable[str]) -> None:
        # "-ofile" is argparse's short form of "-o file", and no unknown option.
        if not option.startswith("--") and option[:2] in known:
            return
        hint = did_you_mean(option, [name for name in known if name.startswith("--")])
        self.error(f"unknown option {option!r}{hint}")

    def error(self, message: str) -> NoReturn:
        raise UserError(with_help(message, self.prog))


def with_help(message: str, program: str) -> str:
    """An error message and where the help is."""
    return f"{message}{' See' if message.endswith('?') else '; see'} `{program} --help`"


def options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of the verb's function: everything parsed except how to print."""
    return {name: value for name, value in vars(args).items() if name != "json"}


def count(text: str) -> int:
    """A whole number of at least 1."""
    return _number(text, int, 1, "a whole number of at least 1")


def whole(text: str) -> int:
    """A whole number of at least 0."""
    return _number(text, int, 0, "a whole number of at least 0")


def positive(text: str) -> float:
    """A number of at least 0."""
    return _number(text, float, 0, "a number of at least 0")


def share(text: str) -> float:
    """A number above 0 and at most 1."""
    value = _number(text, float, 0, "a number above 0 and at most 1")
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and at most 1")
    return value


def fraction(text: str) -> float:
    """A number from 0 to 1."""
    value = _number(text, float, 0, "a number from 0 to 1")
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def factor(text: str) -> float:
    """A number above 0."""
    value = _number(text, float, 0, "a number above 0")
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


SIZES = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "b": 1}


def byte_count(text: str) -> int:
    """A number of bytes: `95000000`, `95MB` or `3.5 GB`, in decimal units."""
    unit = next((unit for unit in SIZES if text.lower().endswith(unit)), "")
    size = SIZES.get(unit, 1)
    number = text[: len(text) - len(unit)]
    return int(size * _number(number, float, 1 / size, "a size such as 95MB or 3.5GB"))


def _number(text: str, kind: Callable[[str], Any], least: float, wanted: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not least <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return value


def one_of(*known: str) -> Callable[[str], str]:
    """A type that accepts the words in `known` and names the nearest one otherwise."""

    def read(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"unknown value {text!r}{did_you_mean(text, known)}")
        return text

    return read


def add_text_options(parser: Parser) -> None:
    """The options of evaluate and compare that say what is read and how."""
    group = parser.add_argument_group("text")
    group.add_argument(
        "--text",
        metavar="FILE",
        help="text to score: .txt, .md or .jsonl, also with .gz, or a corpus name "
        "(default: python-docs, Python's own language reference, evaluation part)",
    )
    group.add_argument(
        "--window", metavar="N", type=count, default=512, help="tokens the model sees at a time"
    )
    group.add_argument(
        "--stride",
        metavar="N",
        type=count,
        help="tokens between the starts of two windows; below --window each token is scored once, "
        "with more context (default: the window)",
    )
    group.add_argument(
        "--chat", action="store_true", help="render JSONL messages with the chat template"
    )
    group.add_argument(
        "--max-tokens",
        metavar="N",
        type=count,
        help="stop after this many tokens of text (default: all of it)",
    )


def add_kv_option(parser: Parser, whose: str = "") -> None:
    """The option of chat, evaluate and compare that says what the KV cache is kept in."""
    parser.add_argument(
        "--kv",
        metavar="FORMAT",
        help=f"what keys and values are kept in, {whose}int8, fp8, int4, int16 (a scale for each "
        'token and head), fp16, fp32, or a number format such as "int4 | fp16/g32" (default: what the '
        "model says, else int16 where its activations are rounded to integers, 16-bit floats elsewhere "
        "(32-bit ones for scoring))",
    )


def words(text: str) -> tuple[str, ...]:
    """Names separated by commas."""
    return tuple(word for word in map(str.strip, text.split(",")) if word)


def add_progress_option(parser: Parser) -> None:
    """`--quiet`: no progress bar, which otherwise goes to standard error."""
    parser.add_argument(
        "--quiet",
        dest="progress",
        action="store_false",
        help="no progress on standard error",
    )


def warn(message: str) -> None:
    """A line for the person, never on standard output."""
    print(f"posttrain: {message}", file=sys.stderr)
