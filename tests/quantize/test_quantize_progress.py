"""Where a run may write, what it removes there, and that only one does at a time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.errors import UserError
from posttrain.models import checkpoint
from posttrain.models.checkpoint import MARKER
from posttrain.quantize import pipeline, quantize
from posttrain.quantize.progress import FOLDER, open_progress

QUIET = {"recipe": "w8a8", "progress": False}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def begin(out: Path, fingerprint: str = "x", **options):
    progress = open_progress(out, fingerprint, **({"resume": True, "overwrite": False} | options))
    progress.release()
    return progress


@pytest.fixture(scope="module")
def whole(tiny_llama, tmp_path_factory):
    """A folder that a run has finished."""
    out = tmp_path_factory.mktemp("whole") / "out"
    quantize(tiny_llama, out=out, **QUIET)
    return out


# ------------------------------------------------------------------------------- what is cleared


def test_a_checkpoint_of_somebody_else_is_never_overwritten(tiny_llama, tiny, tmp_path):
    foreign = tiny("Qwen2")
    before = contents(foreign)
    with pytest.raises(UserError, match=r"config\.json, which posttrain did not write"):
        quantize(tiny_llama, out=foreign, overwrite=True, **QUIET)
    assert contents(foreign) == before and not (foreign / FOLDER).exists()


def test_side_files_of_the_model_before_go_and_what_the_user_added_stays(
    tiny_llama, tmp_path, whole
):
    out = tmp_path / "out"
    quantize(tiny_llama, recipe="w6a8", out=out, progress=False, samples=2, window=16)
    stale = ("chat_template.jinja", "added_tokens.json", "spiece.model", "vocab.txt")
    added = ("README.md", "report.html", "thesis.txt")
    for name in (*stale, *added):
        (out / name).write_text("{}")
    quantize(tiny_llama, out=out, overwrite=True, **QUIET)
    kept = contents(out)
    assert set(kept) - set(contents(whole)) == set(added)
    same = set(kept) - {*added, "measured.json"}
    assert all(kept[name] == contents(whole)[name] for name in same)


def test_a_folder_with_other_files_keeps_them_all(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    begin(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_clearing_cut_short_can_be_repeated(tmp_path, monkeypatch):
    for name in ("config.json", "tokenizer.json", "model-00001-of-00001.safetensors"):
        (tmp_path / name).write_text("old")
    for name in ("posttrain.json", "measured.json"):
        (tmp_path / name).write_text("{}")
    unlink, count = Path.unlink, []

    def dies(self, *args, **options):
        count.append(self)
        if len(count) in (2, 6):
            raise KeyboardInterrupt
        unlink(self, *args, **options)

    monkeypatch.setattr(Path, "unlink", dies)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            begin(tmp_path, overwrite=True)
    begin(tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == [FOLDER]


# ------------------------------------------------------------------------------- where it starts


@pytest.mark.parametrize("left", ["nothing", "folder", "files in it", "marker"])
def test_what_a_killed_start_leaves_is_no_obstacle(left, tmp_path):
    folder = tmp_path / FOLDER
    if left != "nothing":
        folder.mkdir()
    if left in ("files in it", "marker"):
        (folder / "activations-0.bin").write_bytes(b"old")
    if left == "marker":
        (tmp_path / MARKER).write_text("{}")
        (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"old")
    assert begin(tmp_path).next_block == 0
    assert {path.name for path in folder.iterdir()} <= {"state.json", "lock"}
    assert [path.name for path in tmp_path.iterdir()] == [FOLDER]


def test_a_full_disk_at_the_start_leaves_nothing_in_the_way(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("posttrain.quantize.progress.write_json", full)
        with pytest.raises(UserError, match=r"state\.json: cannot be written: .*No space"):
            begin(tmp_path / "out")
    assert begin(tmp_path / "out").next_block == 0


def test_a_tidying_up_cut_short_is_finished_by_the_same_command(tiny_llama, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        # The state went, the rest did not.
        patch.setattr(
            pipeline.Progress, "finish", lambda self: (self.folder / "state.json").unlink()
        )
        first = quantize(tiny_llama, out=out, **QUIET)
    assert (out / FOLDER).exists()
    assert quantize(tiny_llama, out=out, **QUIET) == first
    assert not (out / FOLDER).exists()


def test_another_finished_result_still_needs_to_be_overwritten(whole, tiny_llama):
    with pytest.raises(UserError, match="not empty"):
        quantize(tiny_llama, recipe="w4", out=whole, progress=False)


# ------------------------------------------------------------------------------- one at a time

HOLD = """
import sys
from pathlib import Path
from posttrain.quantize.progress import open_progress
open_progress(Path(sys.argv[1]), "x", True, False)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(os.name == "nt", reason="no fcntl")
def test_two_runs_in_one_folder_are_one_too_many(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", HOLD, str(out)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as other:
        assert other.stdout.readline() == b"held\n"
        state = (out / FOLDER / "state.json").read_bytes()
        for options in ({}, {"overwrite": True}, {"resume": False}):
            with pytest.raises(UserError, match="out: another run is writing there"):
                begin(out, **options)
        assert (out / FOLDER / "state.json").read_bytes() == state
        other.kill()
    assert begin(out).next_block == 0  # the lock died with its process


def test_without_locks_it_runs_all_the_same(tmp_path, monkeypatch, tiny_llama):
    monkeypatch.setattr("posttrain.quantize.progress.fcntl", None)
    quantize(tiny_llama, out=tmp_path / "out", **QUIET)
    assert not (tmp_path / "out" / FOLDER).exists()


# ------------------------------------------------------------------------------- a full disk


def test_a_disk_that_fills_in_a_shard_is_named_and_the_run_goes_on(
    tiny_llama, tmp_path, monkeypatch, whole
):
    from safetensors import SafetensorError

    save, out = checkpoint.save_file, tmp_path / "out"

    def full(tensors, path, **options):
        if "00003" in path.name:
            raise SafetensorError("IoError(Os { code: 28, kind: StorageFull })")
        save(tensors, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(UserError, match=r"model-00003-of-00004\.safetensors: cannot be .*Full"):
            quantize(tiny_llama, out=out, **QUIET)
    quantize(tiny_llama, out=out, **QUIET)
    kept, expected = contents(out), contents(whole)
    assert {n: kept[n] for n in kept if n != "measured.json"} == {
        n: expected[n] for n in expected if n != "measured.json"
    }
    assert json.loads(kept["posttrain.json"])["fingerprint"]
