"""One contender in a process of its own, so that its memory and its threads are its own.

    python -m posttrain.bench.worker NAME SOURCE THREADS CACHE LONGEST

Reads a command per line on standard input, answers with a JSON object per line on standard output:
`prefill N`, `begin N ROOM`, `decode N`, `score N` give `{"seconds": ...}`; `facts` what was loaded;
`end` ends.
"""

import json
import sys
from typing import Any

from posttrain.errors import UserError


def main(name: str, source: str, threads: str, cache: str, longest: str) -> None:
    out = sys.stdout
    sys.stdout = sys.stderr  # libraries print; the answers must stay readable
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
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
