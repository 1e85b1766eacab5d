"""The benchmark of single products: every layer multiplies, and its tables come from its rounds."""

import json
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from posttrain import kernels

pytestmark = pytest.mark.skipif(not kernels.available(), reason=kernels.find().reason)
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module("bench_kernels")


def answers(library, *asked):
    """What the process of a library says to each of these."""
    ended = subprocess.run(
        [sys.executable, str(BENCHMARKS / "kernel_peers.py"), library, "2"],
        input="".join(json.dumps(one) + "\n" for one in asked),
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    return [json.loads(line) for line in ended.stdout.splitlines()]


@pytest.mark.parametrize("library", ["posttrain", "llama.cpp", "torch", "onnxruntime", "openvino"])
def test_every_contender_multiplies(bench, library):
    if find_spec(import_module("kernel_peers").MODULES[library]) is None:
        pytest.skip(f"{library} is not installed")
    members = [one for one in bench.contenders() if one.library == library]
    shape = {"rows": 48, "cols": 256, "bytes": 2**16}
    found = iter(answers(library, *(
        asked
        for one in members
        for asked in (
            {"do": "load", "name": one.name, "options": one.options, **shape},
            {"do": "time", "name": one.name, "tokens": 1},
            {"do": "time", "name": one.name, "tokens": 5},
            {"do": "time", "name": one.name, "tokens": 1, "cached": True},
        )
    )))  # fmt: skip
    for one, loaded, *timed in zip(members, found, found, found, found, strict=True):
        if "unsupported" in loaded:
            assert "default" in loaded["unsupported"], (one.name, loaded)
            continue
        assert loaded["copies"] * loaded["bytes"] >= 2**16
        if library in bench.HOLDING:
            assert "holds the weights" in timed.pop()["unsupported"]
        for each in timed:
            assert each["seconds"] > 0, (one.name, each)
            assert each["relative_error"] < {8: 0.03, 6: 0.06, 4: 0.2}[one.bits], one.name


def cell(bench, one, seconds, limits, cached=False, **facts):
    known = {"bytes": 10**9, "kernel": "k", "relative_error": 0.0}
    made = bench.Cell(one, (4096, 4096), 1, cached, known | facts)
    made.seconds, made.limits = seconds, limits
    return made


def test_ratios_are_taken_round_by_round(bench):
    one = next(one for one in bench.contenders() if one.name == "W8A8 row")
    peer = bench.Contender("torch", "torch int8", 8, "int8 per tensor", {}, "torch int8")
    other = bench.Contender("torch", "torch slow", 8, "int8 per tensor", {}, "torch int8")
    limits = [1e10] * 3
    ours = cell(bench, one, [1.0, 2.0, 4.0], limits)
    theirs = cell(bench, peer, [2.0, 2.0, 2.0], limits)
    cells = [ours, theirs, cell(bench, other, [9.0] * 3, limits)]
    (row,) = bench.ratios([*cells, cell(bench, peer, [0.1] * 3, limits, cached=True)])
    assert row["peer"] == "torch int8" and row["4096x4096"] == "1.00 (0.50..2.00)"
    assert "4096x4096 cached" not in row  # ours was not measured so
    assert ours.row()["share"] == pytest.approx(0.05)
    assert bench.slower(cells)[0]["where"] == "nowhere"
    ours.seconds = [3.0] * 3
    (worse,) = bench.slower(cells)
    assert worse["peer"] == "torch int8" and worse["ratio"] == "0.67 (0.67..0.67)"
