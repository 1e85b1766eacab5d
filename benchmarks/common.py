"""What every benchmark script needs: run a command, say on what machine, write results/NAME.json.

    from common import run_json, write_result

    compared = run_json("compare", "demo", "small", "--max-tokens", "16384")
    write_result("w6a8", {"compare": compared}, seeds=[0])

A result holds the commands that were run, the commit they ran at (`-dirty` with uncommitted
changes), the machine, the seeds and the date: enough to run it again elsewhere.
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil

from posttrain.cli.doctor import machine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"

_commands: list[dict[str, Any]] = []


def run_json(*words: str, timeout: float | None = None) -> dict[str, Any]:
    """Run `posttrain WORDS --json` in a fresh process; its JSON object. Remembers the command.

    Progress is shown. Ends the benchmark with the command's own message where it fails.
    """
    shown = ["posttrain", *words, "--json"]
    print("$", " ".join(shown), file=sys.stderr, flush=True)
    started = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-m", *shown],
        stdout=subprocess.PIPE,
        text=True,
        timeout=timeout,
        check=False,
    )
    if ended.returncode:
        raise SystemExit(f"{' '.join(shown)} ended with status {ended.returncode}")
    _commands.append({"command": _portable(shown), "seconds": time.monotonic() - started})
    result: dict[str, Any] = json.loads(ended.stdout)
    return result


def run_measured(command: Sequence[str]) -> dict[str, Any]:
    """Run a command, whoever's it is, and watch it from outside. Remembers it.

    Returns `stdout`, `seconds` from its start to its end, and `peak_rss_bytes`, the most resident
    memory seen in looks 10 ms apart. Ends the benchmark where the command fails.
    """
    print("$", " ".join(command), file=sys.stderr, flush=True)
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak, ended = [0], threading.Event()

    def watch() -> None:
        seen = psutil.Process(process.pid)
        while not ended.wait(0.01):
            try:
                peak[0] = max(peak[0], seen.memory_info().rss)
            except psutil.NoSuchProcess:
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    stdout, _ = process.communicate()
    seconds = time.monotonic() - started
    ended.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")
    _commands.append({"command": _portable(command), "seconds": seconds})
    return {"stdout": stdout, "seconds": seconds, "peak_rss_bytes": peak[0]}


def verdict(low: float, high: float) -> str:
    """What the interval of a difference of losses, ours less theirs, says of ours."""
    return "better" if high < 0 else "worse" if low > 0 else "not told apart"


def write_result(name: str, figures: dict[str, Any], seeds: Sequence[int] = (0,)) -> Path:
    """Write `results/NAME.json`: the figures and everything needed to measure them again."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    data = {
        "name": name,
        "script": f"python benchmarks/{Path(sys.argv[0]).name}",
        "commands": list(_commands),
        "commit": commit(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "seeds": list(seeds),
        "figures": figures,
    }
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(_without_root(text) + "\n", encoding="utf-8")
    _commands.clear()
    print(f"wrote {path.relative_to(ROOT)}", file=sys.stderr)
    return path


def commit() -> str:
    """The commit this runs at, with `-dirty` where the sources differ from it."""
    head = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--", "src", "benchmarks", "constraints.txt")
    return f"{head}-dirty" if head and changed else head or "unknown"


def _git(*words: str) -> str:
    ended = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return ended.stdout.strip() if ended.returncode == 0 else ""


def _portable(words: Sequence[str]) -> str:
    """A command as one would type it: programs by their names, wherever they lie here."""
    return _without_root(" ".join([Path(words[0]).name, *words[1:]]))


def _without_root(text: str) -> str:
    """Paths as they look from the repository, so that a result names no machine's folders."""
    return text.replace(f"{ROOT}/", "").replace(f"{ROOT.parent}/", "../")
