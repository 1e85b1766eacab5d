"""What lets a killed run continue and end with the same bytes."""

import json
import shutil
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from posttrain.errors import UserError
from posttrain.models.checkpoint import PARTS, write_json
from posttrain.models.directory import MARKER

FOLDER = ".posttrain-progress"
RESULT = "posttrain.json"
MEASURED = "measured.json"
RECIPE = "recipe.yaml"  # the plan found for a budget, to use again
SCAN = "sensitivity.json"  # what it was found by
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
    """

    out: Path
    fingerprint: str
    next_block: int = 0
    activations: str | None = None
    layers: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    search: dict[str, Any] | None = None
    scanned: list[dict[str, Any]] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.out / FOLDER

    def save(self) -> None:
        state = asdict(self)
        del state["out"]
        write_json(self.folder / "state.json", state)

    def finish(self) -> None:
        shutil.rmtree(self.folder)


def open_progress(out: Path, fingerprint: str, resume: bool, overwrite: bool) -> Progress:
    """Start in `out`, or continue the same run; never touch somebody else's files.

    Raises:
        UserError: `out` holds something else, and `overwrite` was not asked for.
    """
    state_file = out / FOLDER / "state.json"
    if state_file.is_file() and resume:
        state = json.loads(state_file.read_text(encoding="utf-8"))
        if state["fingerprint"] == fingerprint:
            return Progress(out=out, **state)
        if not overwrite:
            raise UserError(
                f"{out} holds an unfinished run with another model, recipe or calibration; "
                "choose another output, or overwrite it (--overwrite)"
            )
    elif out.exists() and any(out.iterdir()) and not overwrite and not state_file.is_file():
        raise UserError(f"{out} is not empty; choose another output, or --overwrite")
    if overwrite or state_file.is_file():
        _clear(out)
    progress = Progress(out, fingerprint)
    progress.folder.mkdir(parents=True, exist_ok=True)
    progress.save()
    return progress


def finished_result(out: Path, fingerprint: str) -> dict[str, Any] | None:
    """The result of an identical run that already ended in `out`, if there is one."""
    if (out / FOLDER).exists() or not (out / RESULT).is_file():
        return None
    result = json.loads((out / RESULT).read_text(encoding="utf-8"))
    if result.get("fingerprint") != fingerprint:
        return None
    if (out / MEASURED).is_file():
        result |= json.loads((out / MEASURED).read_text(encoding="utf-8"))
    return result


def _clear(out: Path) -> None:
    """Remove what an earlier run of ours wrote, and nothing else."""
    for folder in (FOLDER, PARTS):
        shutil.rmtree(out / folder, ignore_errors=True)
    written = ("model*.safetensors", "model.safetensors.index.json", RESULT, MEASURED, MARKER)
    for pattern in (*written, RECIPE, SCAN):
        for path in out.glob(pattern):
            path.unlink()
    (out / "config.json").unlink(missing_ok=True)
