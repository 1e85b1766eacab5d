"""What reaches standard output and which status: for machines, for people, when things fail."""

import json
import math
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
import torch

from posttrain.cli import doctor, main
from posttrain.cli.output import bytes_text, number, plain, seconds_text, table
from posttrain.errors import UserError

LINES = {
    "quantize": ["quantize", "m", "-o", "o"],
    "evaluate": ["evaluate", "m"],
    "compare": ["compare", "m", "n"],
    "chat": ["chat", "m", "--prompt", "p"],
    "run": ["run", "demo"],
}
# The keys that other programs rely on; they keep their names for ever.
NO_INTERVAL = {"ci_low": None, "ci_high": None}
EVALUATE_KEYS = {"model", "nll", "perplexity", "tokens", "bits_per_weight", "bytes"}


@pytest.mark.parametrize("verb", LINES)
def test_json_is_one_object_whatever_is_printed_meanwhile(verb, fakes, posttrain_json):
    def noisy(**_):
        print("a library prints")
        sys.stdout.write("and writes")
        os.write(1, b"and so does C\n")
        subprocess.run([sys.executable, "-c", "print('and a child')"], check=True)

    fakes.replace(verb, noisy)
    status, result, err = posttrain_json(*LINES[verb])  # json.loads fails on anything more
    assert status == 0
    assert isinstance(result, dict) and "error" not in result
    for words in ("a library prints", "and writes", "and so does C", "and a child"):
        assert words in err


@pytest.mark.parametrize("verb", ["recipes", "doctor"])
def test_json_of_verbs_without_a_function(verb, posttrain_json):
    status, result, _ = posttrain_json(verb)
    assert status == 0 and result


# What pip knows of us: some needed always, some with an extra.
REQUIRES = ["torch>=2.6", 'compressed-tensors>=0.18; extra == "compressed-tensors"', "gguf"]


@pytest.mark.parametrize(
    ("package", "found", "mark", "says"),
    [
        ("torch", "2.6", "ok", "2.6 (for everything)"),
        ("torch", "2.13.0+cpu", "ok", "2.13.0+cpu (for everything)"),
        ("torch", "2.5.9+cu121", "FIX", "pip install --upgrade 'torch>=2.6'"),
        ("torch", None, "FIX", "fix: pip install torch"),
        ("gguf", "0.0.1", "ok", "0.0.1 (for .gguf files"),
        ("compressed-tensors", "0.18.0", "ok", "0.18.0 (for loading results"),
        ("compressed-tensors", "0.17.1", "-", "0.17.1: too old for loading results"),
        ("compressed-tensors", "0.9.4", "-", "pip install --upgrade 'compressed-tensors>=0.18'"),
        ("compressed-tensors", None, "-", "fix: pip install compressed-tensors"),
    ],
)
def test_doctor_names_what_is_missing_or_too_old(package, found, mark, says, monkeypatch, capsys):
    installed = doctor.version

    def version(name):
        return found if name == package else installed(name)

    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setattr("importlib.metadata.requires", lambda name: REQUIRES)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"^{mark} +{package} ", out, re.MULTILINE)
    assert says in out
    assert ("everything required is here" in out) == (mark != "FIX")
    assert ("first mend what says FIX" in out) == (mark == "FIX")


def test_doctor_without_metadata_asks_for_no_version(monkeypatch):
    def requires(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.requires", requires)
    assert doctor.minimum("torch") is None


@pytest.mark.parametrize("verb", LINES)
def test_people_get_text(verb, fakes, capsys):
    assert main(LINES[verb]) == 0
    out = capsys.readouterr().out
    assert "{" not in out
    assert out.strip() or verb == "chat"  # chat prints while it answers


def test_json_has_no_nan(fakes, posttrain_json):
    fakes.replace("evaluate", lambda **_: {"nll": math.nan, "perplexity": math.inf, "tokens": 0})
    _, result, _ = posttrain_json("evaluate", "m")
    assert result == {"nll": None, "perplexity": None, "tokens": 0}


@pytest.mark.parametrize("verb", ["quantize", "evaluate", "compare"])
def test_notes_are_told_to_people_too(verb, fakes, results, capsys):
    note = "demo: most of the weights come from a 4-bit grid, so 4-bit results on it flatter " * 2
    fakes.replace(verb, lambda **_: {**results[verb], "notes": [note.strip(), "b: c"]})
    assert main(LINES[verb]) == 0
    out = capsys.readouterr().out
    assert " ".join(out.split()).endswith(f"note: {note.strip()} note: b: c")
    assert max(map(len, out.splitlines())) <= 96


def test_a_job_says_each_note_once(fakes, results, capsys):
    def stage(verb, notes):
        result = {**results[verb], "notes": notes}
        return {"name": f"1-{verb}", "stage": verb, "status": "ran", "seconds": 1, "result": result}

    stages = [stage("quantize", ["coarse"]), stage("compare", ["m: coarse", "m: other"])]
    fakes.replace("run", lambda **_: {**results["run"], "stages": stages})
    assert main(["run", "demo"]) == 0
    out = capsys.readouterr().out
    assert out.count("note: ") == 2 and out.count("coarse") == out.count("m: other") == 1


def test_no_interval_is_a_dash(fakes, capsys):
    pair = {"a": "m", "b": "n", "delta_nll": 0.01, "kl": 0.003, "greedy_agreement": 0.97}
    fakes.replace("compare", lambda **_: {"models": [], "pairs": [pair | NO_INTERVAL]})
    assert main(["compare", "m", "n"]) == 0
    assert re.search(
        r"^n +m +\+0\.0100 +- +0\.0030 +97\.0%$", capsys.readouterr().out, re.MULTILINE
    )


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("verb", LINES)
def test_user_errors_are_one_line_and_status_2(verb, as_json, fakes, capfd):
    def fails(**_):
        raise UserError("mine.yaml:3: unknown key 'laeyrs'; did you mean 'layers'?")

    fakes.replace(verb, fails)
    assert main([*LINES[verb], *(["--json"] if as_json else [])]) == 2
    out, err = capfd.readouterr()
    assert err == "posttrain: error: mine.yaml:3: unknown key 'laeyrs'; did you mean 'layers'?\n"
    assert (json.loads(out) if as_json else out) == (
        {"error": "mine.yaml:3: unknown key 'laeyrs'; did you mean 'layers'?"} if as_json else ""
    )


@pytest.mark.parametrize("verb", ["quantize", "run"])
def test_interruption_says_how_to_resume(verb, fakes, capfd):
    def interrupted(**_):
        raise KeyboardInterrupt

    fakes.replace(verb, interrupted)
    assert main(LINES[verb]) == 130
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1
    assert "same command again" in err


def test_defects_keep_their_traceback(fakes, posttrain_json):
    fakes.replace("evaluate", lambda **_: {}["defect"])
    status, result, err = posttrain_json("evaluate", "m")
    assert status == 1
    assert "KeyError" in result["error"]
    assert "Traceback" in err and '{}["defect"]' in err


def test_a_full_disk_is_for_the_user_to_mend(fakes, capfd):
    def full(**_):
        raise OSError(28, "No space left on device", "small/model.safetensors")

    fakes.replace("quantize", full)
    assert main(LINES["quantize"]) == 2
    assert capfd.readouterr().err == (
        "posttrain: error: small/model.safetensors: No space left on device\n"
    )


@pytest.mark.parametrize("words", [["recipes"], ["recipes", "--json"], ["--help"]])
def test_a_reader_that_goes_away_is_no_error(words):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "posttrain", *words]
    with os.fdopen(writer, "w") as out:
        ended = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.stderr == ""
    assert ended.returncode == 141


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (torch.tensor([1.0, math.nan]), [1.0, None]),
        (Path("a/b"), "a/b"),
        ((1, (2.0, -math.inf)), [1, [2.0, None]]),
        ({1: True, "k": {"n": np.bool_(False)}}, {"1": True, "k": {"n": False}}),
    ],
)
def test_plain(value, wanted):
    assert plain(value) == wanted
    assert json.loads(json.dumps(plain(value), allow_nan=False)) == wanted


def test_plain_refuses_what_json_cannot_say():
    with pytest.raises(TypeError, match="object"):
        plain({"a": object()})


def test_table_aligns_numbers_right_and_text_left():
    rows = [("model", "bits", "note"), ("a", "32.00", "x"), ("long", "6.25", "-")]
    assert table(rows).splitlines() == [
        "model   bits  note",
        "a      32.00  x",
        "long    6.25  -",
    ]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (number(1.23456), "1.2346"),
        (number(0.01, 3, sign=True), "+0.010"),
        (number(None), "-"),
        (number(math.nan), "-"),
        (bytes_text(134_500_000), "134.5 MB"),
        (bytes_text(2_147_483_648), "2.15 GB"),
        (bytes_text(12), "12 B"),
        (bytes_text(None), "-"),
        (seconds_text(59.94), "59.9 s"),
        (seconds_text(245), "4 min 05 s"),
    ],
)
def test_numbers_as_people_read_them(text, wanted):
    assert text == wanted


def test_recipes_show_prints_the_file_as_it_is(capsys):
    assert main(["recipes", "show", "w6a8"]) == 0
    import posttrain

    path = Path(posttrain.__file__).parent / "recipes" / "w6a8.yaml"
    assert capsys.readouterr().out == path.read_text()
