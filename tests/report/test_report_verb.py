"""The compare verb with its page: nothing is measured for a page that cannot be written."""

import inspect
import json
import math
import os

import pytest
from report_samples import comparison

import posttrain
from posttrain import evaluate
from posttrain.errors import UserError
from posttrain.report import verb
from posttrain.report.page import build_page, check_path


@pytest.fixture
def measured(monkeypatch):
    """What was asked to be measured; nothing is."""
    calls = []

    def measure(models, **options):
        calls.append((models, options))
        return comparison() | {"command": "posttrain compare a b"}

    monkeypatch.setattr(verb, "measure", measure)
    return calls


def test_the_verb_is_the_public_function():
    assert posttrain.compare is verb.compare


def test_it_takes_what_evaluate_takes_and_out():
    mine = dict(inspect.signature(verb.compare).parameters)
    assert mine.pop("out").default is None
    assert mine == dict(inspect.signature(evaluate.compare).parameters)


def test_every_argument_is_handed_on(measured):
    parameters = inspect.signature(evaluate.compare).parameters
    given = {name: object() for name in parameters if name != "models"}
    posttrain.compare(["a", "b"], **given)
    assert measured == [(["a", "b"], given)]


def test_out_writes_the_page(measured, tmp_path):
    path = tmp_path / "deep" / "my report.html"
    result = posttrain.compare(["a", "b"], out=str(path))
    assert result["report"] == str(path)
    assert result["command"] == f"posttrain compare a b --out '{path}'"
    assert path.read_text() == build_page(result)
    assert "report" not in posttrain.compare(["a", "b"])


def test_loaded_models_have_no_command_to_complete(monkeypatch, tmp_path):
    monkeypatch.setattr(verb, "measure", lambda *_, **__: comparison() | {"command": None})
    assert posttrain.compare(["a", "b"], out=tmp_path / "r.html")["command"] is None


@pytest.mark.parametrize("name", ["", "folder", "file/report.html", "x" * 300])
def test_a_path_that_cannot_be_written_is_refused_before_any_work(
    name, measured, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="report: ") as error:
        posttrain.compare(["a", "b"], out=name)
    assert "\n" not in str(error.value) and (name or ".") in str(error.value)
    assert not measured
    if name in ("", "folder"):
        assert "is a folder; name a file, such as" in str(error.value)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot write .*: Permission denied"):
        check_path(tmp_path / "r.html")


def test_looking_leaves_nothing_and_changes_nothing(tmp_path):
    check_path(tmp_path / "new" / "r.html")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "old.html").write_text("an older page")
    check_path(tmp_path / "old.html")
    assert (tmp_path / "old.html").read_text() == "an older page"


@pytest.mark.parametrize("nothing", [None, math.nan])
def test_a_page_without_intervals(nothing):
    """What one window of text gives, as it comes back from JSON."""
    data = json.loads(json.dumps(comparison()))
    for entry in [*data["models"], *data["pairs"]]:
        entry.update(ci_low=nothing, ci_high=nothing, nll_ci_low=nothing, nll_ci_high=nothing)
    for curve in data["position_nll"]["models"].values():
        curve["low"] = curve["high"] = [nothing] * len(curve["mean"])
    page = build_page(data)
    assert "too little text for an interval" in page
    quality_and_position = page[page.index('id="quality"') : page.index('id="layers"')]
    assert "interval" not in quality_and_position and "Bands" not in quality_and_position
    assert "band" not in quality_and_position and "nan" not in quality_and_position
