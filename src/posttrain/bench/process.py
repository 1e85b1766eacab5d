"""The process of one contender, seen from outside (its inside is `worker`)."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from posttrain.errors import UserError


class Worker:
    """The process of one contender, seen from outside. Raises UserError with its message."""

    def __init__(
        self, name: str, source: str, threads: int, cache: str = "", longest: int = 4096
    ) -> None:
        self.name = name
        command = [sys.executable, "-m", "posttrain.bench.worker"]
        self._process = subprocess.Popen(
            [*command, name, source, str(threads), cache, str(longest)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C in the terminal is for us, who then close it
        )
        try:
            self.facts: dict[str, Any] = self.ask("facts")
        except BaseException:
            self.close()
            raise

    def seconds(self, what: str, *counts: int) -> float:
        """Time of one run."""
        return float(self.ask(" ".join([what, *map(str, counts)]))["seconds"])

    def ask(self, command: str) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            status = self._process.wait()
            raise UserError(f"{self.name} ended with status {status} while asked to {command!r}")
        found: dict[str, Any] = json.loads(answer)
        if "error" in found:
            error = str(found["error"])
            raise UserError(error if error.startswith(self.name) else f"{self.name}: {error}")
        return found

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
        self._process.wait()


@contextmanager
def ended_as_by_exit() -> Iterator[None]:
    """Let SIGTERM end this process by way of every `finally` meanwhile, so that workers and
    temporary folders go too. Only the main thread may choose; a handler of the caller's stays."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _exit(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)
