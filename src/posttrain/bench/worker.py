"""One contender in a process of its own, so that its memory and its threads are its own.

    python -m posttrain.bench.worker NAME SOURCE THREADS CACHE LONGEST

Reads a command per line on standard input, answers with a JSON object per line on standard output:
`prefill N`, `begin N ROOM`, `decode N`, `score N` give `{"seconds": ...}`; `facts` what was loaded;
`end` ends, as does the end of the process that started this one.
"""

import json
import os
import select
import sys
import threading
import traceback
from typing import Any, TextIO

from posttrain.errors import UserError


def main(name: str, source: str, threads: str, cache: str, longest: str) -> None:
    out = _answers()
    threading.Thread(target=_end_with_the_reader, args=(out.fileno(),), daemon=True).start()
    contender: Any = None
    for line in sys.stdin:
        what, *counts = line.split() or [""]
        if what == "end":
            break
        try:
            if contender is None:
                from posttrain.bench.contenders import contender_named

                contender = contender_named(name)(source, int(threads), cache, int(longest))
            answer = (
                contender.facts()
                if what == "facts"
                else {"seconds": contender.run(what, *map(int, counts))}
            )
        except UserError as error:
            answer = {"error": str(error)}
        except Exception as error:  # noqa: BLE001 (of ours or of a peer: who asked will say it)
            traceback.print_exc()
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())}
        print(json.dumps(answer), file=out, flush=True)


def _answers() -> TextIO:
    """Where answers go. Libraries print too, in Python and in C: that goes to standard error."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return out


def _end_with_the_reader(pipe: int) -> None:
    """Exit once nobody can read answers any more: loading or a run may take minutes still."""
    waiting = select.poll()
    waiting.register(pipe, 0)  # nothing but that its other end is closed
    waiting.poll()
    os._exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
