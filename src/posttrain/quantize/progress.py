"""What lets a killed run continue and end with the same bytes."""

import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two runs apart
    fcntl = None  # type: ignore[assignment]

from tqdm import tqdm

from posttrain.errors import UserError
from posttrain.models.checkpoint import CONFIG, INDEX, PARTS, write_json, writing
from posttrain.models.directory import MARKER, TOKENIZER_FILES

FOLDER = ".posttrain-progress"
RESULT = "posttrain.json"
MEASURED = "measured.json"
RECIPE = "recipe.yaml"  # the plan found for a budget, to use again
SCAN = "sensitivity.json"  # what it was found by
STATE, LOCK = "state.json", "lock"  # in FOLDER
OWN_FILES = (MEASURED, RECIPE, SCAN, RESULT, MARKER)  # in the order they are removed in
# Carried over from the model. Another model may lack some, and would be read with these.
SIDE_FILES = (
    *TOKENIZER_FILES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "merges.txt", "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json",
    "generation_config.json",
)  # fmt: skip
LONG = 3.0  # seconds after which a solve shows how far it is


def nested(steps: range, what: str) -> Iterable[int]:
    """Go through the steps of one solve, with a bar under that of the blocks if it takes long."""
    bar: Iterable[int] = tqdm(
        steps, desc=what, unit="step", leave=False, position=1, delay=LONG, file=sys.stderr
    )
    return bar


@dataclass
class Progress:
    """State of a run in `out/.posttrain-progress/state.json`, replaced atomically.

    Attributes:
        fingerprint: of model, recipe, calibration tokens and versions; a run resumes only its own.
        next_block: first decoder block not done yet.
        activations: snapshot of the block inputs that belong to `next_block`.
        layers: measurements of the layers done.
        seconds: time spent by earlier attempts.
        search: the plan found for a budget.
        scanned: before it is found, what an exact scan has measured.
        lock: keeps other runs out of `out` until `release`.
    """

    out: Path
    fingerprint: str
    next_block: int = 0
    activations: str | None = None
    layers: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    search: dict[str, Any] | None = None
    scanned: list[dict[str, Any]] = field(default_factory=list)
    lock: int | None = None

    def release(self) -> None:
        """Let other runs into `out`."""
        _unlock(self.lock)

    @property
    def folder(self) -> Path:
        return self.out / FOLDER

    def save(self) -> None:
        state = asdict(self)
        del state["out"], state["lock"]
        with writing(self.folder / STATE):
            write_json(self.folder / STATE, state)

    def finish(self) -> None:
        # What stays behind does no harm: `finished_result` tidies up.
        shutil.rmtree(self.folder, ignore_errors=True)


def open_progress(out: Path, fingerprint: str, resume: bool, overwrite: bool) -> Progress:
    """Start in `out`, or continue the same run; never touch somebody else's files.

    Raises:
        UserError: `out` holds something else, and `overwrite` was not asked for; or weights that
            posttrain did not write; or another run is at work there.
    """
    _kept_state(out, fingerprint, resume, overwrite)  # refuses before anything is written
    lock = _lock(out)
    try:
        state = _kept_state(out, fingerprint, resume, overwrite)  # another run may just have ended
        if state is not None:
            return Progress(out=out, **state, lock=lock)
        if _is_ours(out) or _is_left_over(out):
            _clear(out)
        progress = Progress(out, fingerprint, lock=lock)
        progress.save()
    except BaseException:
        _unlock(lock)
        raise
    return progress


def _kept_state(
    out: Path, fingerprint: str, resume: bool, overwrite: bool
) -> dict[str, Any] | None:
    """The state to continue from; None where the run starts anew. UserError where it may not."""
    state_file = out / FOLDER / STATE
    if state_file.is_file():
        state: dict[str, Any] = json.loads(state_file.read_text(encoding="utf-8"))
        if resume and state["fingerprint"] == fingerprint:
            return state
        if resume and not overwrite:
            raise UserError(
                f"{out} holds an unfinished run with another model, recipe or calibration; "
                "choose another output, or overwrite it (--overwrite)"
            )
        return None
    if not out.exists() or _is_left_over(out):
        return None
    if not overwrite:
        raise UserError(f"{out} is not empty; choose another output, or --overwrite")
    foreign = [] if _is_ours(out) else [*_written(out), *out.glob("*.safetensors")]
    if foreign:
        raise UserError(
            f"{out} holds {foreign[0].name}, which posttrain did not write there: it is not "
            "overwritten; choose another output"
        )
    return None


def finished_result(out: Path, fingerprint: str) -> dict[str, Any] | None:
    """The result of an identical run that already ended in `out`, if there is one."""
    whole = (out / RESULT).is_file() and (out / CONFIG).is_file() and not (out / MARKER).exists()
    tidy = not (out / FOLDER).exists()
    if not whole or not (tidy or (out / MEASURED).is_file()):
        return None
    result: dict[str, Any] = json.loads((out / RESULT).read_text(encoding="utf-8"))
    if result.get("fingerprint") != fingerprint:
        return None
    if not tidy:  # it was killed after all was written
        lock = _lock(out)
        shutil.rmtree(out / FOLDER, ignore_errors=True)
        _unlock(lock)
    if (out / MEASURED).is_file():
        result |= json.loads((out / MEASURED).read_text(encoding="utf-8"))
    return result


def _lock(out: Path) -> int | None:
    """Keep other runs out of `out` until `_unlock`, or until this process dies.

    Raises UserError where one is at work there. None where the system has no such locks.
    """
    path = out / FOLDER / LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    while fcntl is not None:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise UserError(
                f"{out}: another run is writing there; wait for it, or choose another output"
            ) from None
        except OSError:  # some network file systems have no locks
            os.close(handle)
            return None
        if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
            return handle
        os.close(handle)  # of a run that ended in this moment, and took its file along
        path.parent.mkdir(parents=True, exist_ok=True)
    return None


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def _is_ours(out: Path) -> bool:
    """Whether posttrain wrote the checkpoint in `out`, or began to."""
    return any((out / name).is_file() for name in (RESULT, MARKER, f"{FOLDER}/{STATE}"))


def _is_left_over(out: Path) -> bool:
    """Whether there is nothing in `out` but what a run of ours left that never ended."""
    written = set(_written(out))
    strangers = set(out.iterdir()) - written - {out / FOLDER, out / PARTS}
    return not strangers and (not written or (out / MARKER).is_file())


def _written(out: Path) -> Iterator[Path]:
    """What a run of ours writes into `out`, as far as it is there; the config first and what tells
    that it is ours last."""
    for name in (CONFIG, INDEX, *SIDE_FILES):
        if (out / name).is_file():
            yield out / name
    yield from sorted(out.glob("model*.safetensors"))
    for name in (f"{CONFIG}.part", f"{INDEX}.part", *(f"{n}.part" for n in OWN_FILES), *OWN_FILES):
        if (out / name).is_file():
            yield out / name


def _clear(out: Path) -> None:
    """Remove what an earlier run of ours wrote, and nothing else: what says that it is ours last, so
    that an interrupted clearing can be repeated. The lock stays."""
    for path in list(_written(out)):
        path.unlink()
    shutil.rmtree(out / PARTS, ignore_errors=True)
    folder = out / FOLDER
    for path in sorted(folder.iterdir(), key=lambda path: path.name == STATE):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()
