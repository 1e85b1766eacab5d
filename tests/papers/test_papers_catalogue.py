"""Every paper: a claim that can be tested, an experiment that runs, a card that says it all."""

import json
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import posttrain
from posttrain.cli.arguments import Parser
from posttrain.errors import UserError
from posttrain.papers.lab import Lab, rank_correlation
from posttrain.papers.paper import AREAS, VERDICTS, Evidence, Paper
from posttrain.papers.verb import _reproduce, catalogue

RESULTS = Path(__file__).parents[2] / "results" / "papers"
ENTRY = {"key", "title", "year", "area", "claim", "verdict", "figure", "date"}
RESULT = {"key", "verdict", "claim", "measured", "passed", "conditions", "controls", "seconds"}


@pytest.mark.parametrize("key", catalogue())
def test_a_quick_run_ends_with_a_verdict_on_everything_it_promised(key):
    result = posttrain.reproduce(key, quick=True, progress=False)
    json.dumps(result, allow_nan=False)
    assert set(result) >= RESULT and result["quick"] and result["key"] == key
    assert result["verdict"] in VERDICTS and result["passed"] == (result["verdict"] == "reproduced")
    paper = catalogue()[key]
    for kind in ("conditions", "controls"):
        assert {c["name"]: c["text"] for c in result[kind]} == getattr(paper, kind)
        assert all(type(c["passed"]) is bool for c in result[kind])


@pytest.mark.parametrize("key", catalogue())
def test_what_was_measured_in_full_is_of_the_claim_in_the_file(key):
    path = RESULTS / f"{key}.json"
    assert path.is_file(), f"run posttrain reproduce {key} and commit what it writes"
    found, paper = json.loads(path.read_text()), catalogue()[key]
    assert not found["quick"] and found["claim"] == paper.claim
    assert {c["name"]: c["text"] for c in found["conditions"]} == paper.conditions
    assert {c["name"]: c["text"] for c in found["controls"]} == paper.controls
    holds = {c["name"]: c["passed"] for c in found["conditions"] + found["controls"]}
    assert found["verdict"] == paper.verdict(holds)


def test_an_installed_package_comes_with_what_was_measured(tmp_path):
    root = RESULTS.parents[1]
    words = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(words, cwd=root, check=True, capture_output=True)
    asked = "import json, posttrain; print(json.dumps([posttrain.__file__, posttrain.papers()]))"
    ended = subprocess.run(
        [sys.executable, "-c", asked], cwd=tmp_path, check=True, capture_output=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    where, listed = json.loads(ended.stdout)
    assert Path(where).is_relative_to(tmp_path)
    assert listed == posttrain.papers() and all(entry["date"] for entry in listed)


def test_the_catalogue_lists_every_paper():
    listed = posttrain.papers()
    assert [entry["key"] for entry in listed] == list(catalogue())
    for entry in listed:
        assert set(entry) == ENTRY and entry["area"] in AREAS and entry["verdict"] in VERDICTS
        assert re.fullmatch(r"\w+", entry["key"]) and 1990 < entry["year"] < 2100
        assert (entry["date"] is None) == (entry["verdict"] == "not run")


@pytest.mark.parametrize("key", catalogue())
def test_a_card_holds_what_the_file_says(key):
    card = posttrain.papers(key)
    assert set(card) == ENTRY | {
        "about",
        "usage",
        "full_size",
        "conditions",
        "controls",
        "evidence",
    }
    assert card["about"] and card["usage"].startswith("posttrain") and card["conditions"]


@pytest.mark.parametrize("key", catalogue())
def test_its_commands_are_understood(key):
    for text in (catalogue()[key].usage, catalogue()[key].full_size):
        for line in text.partition("  #")[0].split("&&"):
            name, verb, *words = shlex.split(line.partition(">")[0])
            module = import_module(f"posttrain.cli.{verb}")
            parser = Parser(verb, module)
            module.arguments(parser)
            parser.read(words)  # raises UserError
            assert name == "posttrain"


def test_an_unknown_paper_is_named_with_its_neighbour():
    with pytest.raises(UserError, match="crossqant.*did you mean.*crossquant"):
        posttrain.papers("crossqant")
    with pytest.raises(UserError, match="no paper 'flexqq'"):
        posttrain.reproduce("flexqq", quick=True)


def paper(experiment, **more):
    return Paper(
        key="made_up", title="t", year=2000, area="quantize", claim="c", about="a", usage="posttrain",
        full_size="posttrain", conditions={"one": "1", "two": "2"}, controls={"null": "0"},
        experiment=experiment, **more,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("one", "two", "null", "verdict"),
    [
        (True, True, True, "reproduced"),
        (True, False, True, "partly"),
        (False, False, True, "not reproduced"),
        (True, True, False, "not reproduced"),  # without its control it shows nothing
    ],
)
def test_the_verdict_follows_from_conditions_and_controls(one, two, null, verdict):
    made = paper(lambda lab: Evidence("f", {}, {"one": one, "two": two, "null": null}))
    result = _reproduce(made, True, None, False)
    assert result["verdict"] == verdict and result["passed"] == (verdict == "reproduced")


def test_an_experiment_cannot_leave_out_what_its_file_promised():
    with pytest.raises(ValueError, match="promised"):
        _reproduce(
            paper(lambda lab: Evidence("f", {}, {"one": True, "two": True})), True, None, False
        )


def test_an_interrupted_experiment_continues_with_the_steps_it_has(tmp_path):
    ran = []

    def experiment(lab: Lab) -> Evidence:
        first = lab.step("first", lambda: ran.append("first") or 7)
        if len(ran) == 1:
            raise KeyboardInterrupt
        second = lab.step("second", lambda: ran.append("second") or first + 1)
        return Evidence("f", {"second": second}, {"one": True, "two": True, "null": True})

    made = paper(experiment)
    with pytest.raises(KeyboardInterrupt):
        _reproduce(made, False, tmp_path, False)
    (kept,) = tmp_path.iterdir()
    earlier = json.loads(kept.read_text())
    kept.write_text(json.dumps(earlier | {"seconds": 1000 + earlier["seconds"]}))
    ran.append("again")
    result = _reproduce(made, False, tmp_path, False)
    assert result["seconds"] >= 1000  # what the interrupted run took counts too
    assert ran == ["first", "again", "second"] and result["measured"] == {"second": 8}
    assert [path.name for path in tmp_path.iterdir()] == ["made_up.json"]


def test_a_broken_result_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "results" / "papers"
    folder.mkdir(parents=True)
    for text in ("{", '{"key": "other"}'):
        (folder / "flexq.json").write_text(text)
        with pytest.raises(UserError, match=r"flexq\.json is .*reproduce flexq"):
            posttrain.papers("flexq")


def test_rank_correlation_sees_order_alone():
    x = [1.0, 2.0, 5.0, 9.0]
    assert rank_correlation(x, [v**3 for v in x]) == pytest.approx(1)
    assert rank_correlation(x, [-v for v in x]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 2, 3], [1, 2, 2, 3]) == pytest.approx(1)
    # Spearman's rho of this table, by hand: 1 - 6 * 2 / (4 * 15)
    assert rank_correlation([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
