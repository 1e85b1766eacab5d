"""Recipes of whole jobs: what is done, what is skipped, and how mistakes are named."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from posttrain import recipe as module
from posttrain.errors import UserError
from posttrain.recipe import STAGES, Kind, load, parse, run, shipped

CALLS: list[tuple[str, dict[str, Any]]] = []


def make(
    model: str,
    *,
    out: str | Path,
    size: int = 1,
    rate: float | None = None,
    mode: Literal["fast", "slow"] = "fast",
    flag: bool = False,
    seed: int = 0,
    progress: bool = True,
    resume: bool = True,
    overwrite: bool = False,
) -> dict[str, Any]:
    """A verb that writes a folder, like quantize."""
    CALLS.append(("make", {"resume": resume, "overwrite": overwrite, "model": model}))
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights.bin").write_bytes(b"w" * size)
    (folder / "config.json").write_text(json.dumps({"model": model}))
    return {"out": str(out), "size": size}


def measure(models: Sequence[Any], *, text: str | Path | Kind | None = None) -> dict[str, Any]:
    """A verb that only reads, like compare."""
    CALLS.append(("measure", {"models": models}))
    return {"models": list(models), "text": text}


def tell(results: list[dict[str, Any]], *, out: str | Path) -> dict[str, Any]:
    """A verb that sees the results before it, like report."""
    CALLS.append(("tell", {"seen": [r["name"] for r in results]}))
    Path(out).write_text(json.dumps([r["result"] for r in results]))
    return {"report": str(out)}


RECIPE = """\
name: trial
out: build/trial
stages:
  - make: {model: start, size: 3}
  - measure:
      models: [start, "{out}"]
      text: notes.txt
  - tell: {}
"""


@pytest.fixture(autouse=True)
def workshop(monkeypatch, tmp_path):
    """An empty current folder, and stages that cost nothing."""
    monkeypatch.chdir(tmp_path)
    CALLS.clear()
    here = __name__
    kinds = {
        "make": Kind(f"{here}:make", ("model",), ("out",), {"out": "{out}"}),
        "measure": Kind(f"{here}:measure", ("models", "text")),
        "tell": Kind(f"{here}:tell", (), ("out",), {"out": "{out}/report.html"}),
    }
    for name, kind in kinds.items():
        monkeypatch.setitem(STAGES, name, kind)
    (tmp_path / "notes.txt").write_text("some words")
    (tmp_path / "trial.yaml").write_text(RECIPE)
    return tmp_path


def called() -> list[str]:
    names = [name for name, _ in CALLS]
    CALLS.clear()
    return names


def statuses(result: dict[str, Any]) -> list[str]:
    return [stage["status"] for stage in result["stages"]]


def test_stages_run_in_order_and_see_each_other():
    result = run("trial.yaml", progress=False)
    assert [name for name, _ in CALLS] == ["make", "measure", "tell"]
    assert CALLS[1][1]["models"] == ["start", "build/trial"]
    assert CALLS[2][1]["seen"] == ["1-make", "2-measure"]
    assert result["recipe"] == "trial" and result["out"] == "build/trial"
    assert [s["stage"] for s in result["stages"]] == ["make", "measure", "tell"]
    assert statuses(result) == ["ran"] * 3
    told = json.loads(Path("build/trial/report.html").read_text())
    assert told == [
        {"out": "build/trial", "size": 3},
        {"models": ["start", "build/trial"], "text": "notes.txt"},
    ]


def test_a_second_run_reuses_everything_and_says_the_same():
    first = run("trial.yaml", progress=False)
    called()
    second = run("trial.yaml", progress=False)
    assert called() == []
    assert statuses(second) == ["reused"] * 3
    assert [s["result"] for s in first["stages"]] == [s["result"] for s in second["stages"]]


def test_results_are_json_whether_a_stage_ran_or_was_reused(monkeypatch):
    odd = {"low": math.nan, "high": math.inf, "pair": (1, 2.5), "path": Path("a/b"), "by": {1: "x"}}
    monkeypatch.setattr(f"{__name__}.measure", lambda models, *, text=None: odd)
    first, second = run("trial.yaml", progress=False), run("trial.yaml", progress=False)
    wanted = {"low": None, "high": None, "pair": [1, 2.5], "path": "a/b", "by": {"1": "x"}}
    assert first["stages"][1]["result"] == second["stages"][1]["result"] == wanted
    assert not {"NaN", "Infinity"} & set(
        re.findall(r"\w+", Path("build/trial/run.json").read_text())
    )


# What is done to the folder after a run -> the stages that have to run again.
CHANGES = {
    "nothing": (lambda: None, []),
    "an option of the first stage": (
        lambda: edit("trial.yaml", "size: 3", "size: 4"),
        ["make", "measure", "tell"],
    ),
    "an option of the second": (
        lambda: edit("trial.yaml", "[start, ", "[other, start, "),
        ["measure", "tell"],
    ),
    "a comment": (lambda: edit("trial.yaml", "stages:", "# done\nstages:"), []),
    "the text that is read": (
        lambda: Path("notes.txt").write_text("other words"),
        ["measure", "tell"],
    ),
    "the same text written again": (lambda: Path("notes.txt").write_text("some words"), []),
    "a file that was written, gone": (lambda: Path("build/trial/weights.bin").unlink(), ["make"]),
    "a file that was written, cut short": (
        lambda: Path("build/trial/weights.bin").write_bytes(b"ww"),
        ["make"],
    ),
    "a file that was written, one byte": (
        lambda: Path("build/trial/weights.bin").write_bytes(b"wxw"),
        ["make"],
    ),
    "the report gone": (lambda: Path("build/trial/report.html").unlink(), ["tell"]),
    "a file of somebody else": (lambda: Path("build/trial/mine.txt").write_text("x"), []),
    "the state gone": (lambda: Path("build/trial/run.json").unlink(), ["make", "measure", "tell"]),
}


def edit(path: str, old: str, new: str) -> None:
    text = Path(path).read_text()
    assert old in text
    Path(path).write_text(text.replace(old, new))


@pytest.mark.parametrize("change", CHANGES)
def test_only_what_a_change_touches_runs_again(change):
    apply, wanted = CHANGES[change]
    run("trial.yaml", progress=False)
    called()
    apply()
    run("trial.yaml", progress=False)
    assert called() == wanted
    run("trial.yaml", progress=False)
    assert called() == [], "and then it is finished"


def test_a_new_version_of_posttrain_does_everything_again(monkeypatch):
    run("trial.yaml", progress=False)
    called()
    monkeypatch.setattr(module, "__version__", "99.0")
    run("trial.yaml", progress=False)
    assert called() == ["make", "measure", "tell"]


def test_a_first_run_never_overwrites_and_a_changed_one_replaces_its_own():
    run("trial.yaml", progress=False)
    assert CALLS[0][1] == {"resume": True, "overwrite": False, "model": "start"}
    called()
    edit("trial.yaml", "model: start, size", "model: other, size")
    run("trial.yaml", progress=False)
    assert CALLS[0][1] == {"resume": True, "overwrite": True, "model": "other"}
    called()
    run("trial.yaml", overwrite=True, progress=False)
    assert CALLS[0][1]["overwrite"] is True
    assert called() == ["make", "measure", "tell"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, UserError, RuntimeError])
def test_an_interrupted_run_goes_on_where_it_stopped(failure, monkeypatch):
    def fails(models: list[str], *, text: str | None = None) -> dict[str, Any]:
        raise failure("stop")

    with monkeypatch.context() as patch:
        patch.setattr(f"{__name__}.measure", fails)
        with pytest.raises(failure):
            run("trial.yaml", progress=False)
    assert called() == ["make"]
    result = run("trial.yaml", progress=False)
    assert called() == ["measure", "tell"]
    assert statuses(result) == ["reused", "ran", "ran"]


def test_out_is_put_in_place_of_the_recipes(tmp_path):
    result = run("trial.yaml", out=tmp_path / "else where", progress=False)
    assert (tmp_path / "else where" / "weights.bin").is_file()
    assert result["stages"][1]["result"]["models"][1] == str(tmp_path / "else where")
    assert not Path("build").exists()


def test_progress_goes_to_standard_error(capfd):
    run("trial.yaml")
    run("trial.yaml")
    out, err = capfd.readouterr()
    assert out == ""
    assert "[1/3] make start -> build/trial\n" in err
    assert "[2/3] measure start build/trial notes.txt: already done" in err


def test_a_state_that_cannot_be_read_is_explained():
    run("trial.yaml", progress=False)
    Path("build/trial/run.json").write_text("[")
    with pytest.raises(UserError, match=r"run\.json.*remove it"):
        run("trial.yaml", progress=False)


def test_errors_of_a_stage_name_where_it_stands(monkeypatch):
    def fails(models: list[str], *, text: str | None = None) -> dict[str, Any]:
        raise UserError("no such model 'start'")

    monkeypatch.setattr(f"{__name__}.measure", fails)
    with pytest.raises(UserError, match="^trial.yaml:5: measure: no such model 'start'$"):
        run("trial.yaml", progress=False)


# (recipe, what the error must say)
WRONG = [
    ("", "x.yaml: expected the keys"),
    ("- a\n", "x.yaml: expected the keys"),
    ("stages: [make\n", r"x.yaml:2: not valid YAML"),
    ("stages:\n\t- make", r"x.yaml:2: not valid YAML"),
    ("nmae: a\nstages: [tell]\n", r"x.yaml:1: unknown key 'nmae'; did you mean 'name'\?"),
    ("name: a\n", "x.yaml: stages must be a list"),
    ("name: a\nstages: []\n", "x.yaml: stages must be a list"),
    ("layers: []\n", "recipe for `posttrain quantize --recipe`"),
    ("stages:\n  - mkae: {}\n", r"x.yaml:2: unknown stage 'mkae'; did you mean 'make'\?"),
    ("stages:\n  - make: {model: m}\n    tell: {}\n", "x.yaml:2: a stage is one verb"),
    ("stages:\n  - make: m\n", "x.yaml:2: the options of make must be a mapping, found 'm'"),
    ("stages:\n  - make: {}\n", "x.yaml:2: make needs the option 'model'"),
    (
        "stages:\n  - make:\n      model: m\n      szie: 3\n",
        r"x.yaml:4: make has no option 'szie'; did you mean 'size'\?",
    ),
    ("stages:\n  - make:\n      model: m\n      model: n\n", "x.yaml:4: 'model' is given twice"),
    (
        "stages:\n  - make: {model: m,\n      size: big}\n",
        "x.yaml:3: make: size must be a whole number, found 'big'",
    ),
    ("stages:\n  - make: {model: m, size: 1.5}\n", "size must be a whole number, found 1.5"),
    ("stages:\n  - make: {model: m, size: yes}\n", "size must be a whole number, found True"),
    ("stages:\n  - make: {model: m, rate: fast}\n", "rate must be a number, found 'fast'"),
    ("stages:\n  - make: {model: m, mode: medium}\n", "mode must be fast or slow"),
    ("stages:\n  - make: {model: m, flag: 1}\n", "flag must be true or false, found 1"),
    ("stages:\n  - make: {model: 3}\n", "model must be text, found 3"),
    ("stages:\n  - measure: {models: start}\n", "models must be a list, found 'start'"),
    ("stages:\n  - measure: {models: [m], text: 3}\n", "text must be text, found 3"),
    ("stages:\n  - make: {model: m, overwrite: true}\n", "make has no option 'overwrite'"),
    ("stages:\n  - make: {model: m, resume: false}\n", "make has no option 'resume'"),
    ("stages:\n  - make: {model: m,\n     seed: -1}\n", "x.yaml:3: make: seed must be at least 0"),
    ("stages:\n  - make: {model: {{out}}}\n", 'x.yaml:2: found braces .* quotes, such as "{out}"'),
    ("name: a\non: x\nstages: [tell]\n", "x.yaml:2: no option is called 'on', .* of type bool"),
    ("stages:\n  - make: {1: x}\n", "x.yaml:2: no option is called '1', .* of type int"),
    ("name: a\nout:\nstages: [tell]\n", "x.yaml:2: out must be text, .* found None"),
    ("out: ''\nstages: [tell]\n", "x.yaml:1: out must be text, .* found ''"),
    ("stages: [tell]\nname: [a]\n", "x.yaml:2: name must be text, .* found \\['a'\\]"),
    ("name: a\nout: \x07\n", r"x.yaml:2: not valid YAML: .*control character '\\x07'; remove it"),
    ("stages: [tell]\nname: 2024-13-45\n", "x.yaml:2: '2024-13-45' looks like .*timestamp.*quotes"),
    ("stages: [tell]\nname: !!int x\n", "x.yaml:2: 'x' looks like a value of YAML's type int"),
    ("stages: [tell]\nname: !!timestamp x\n", "x.yaml:2: 'x' looks like"),
    ("stages: &a [*a]\n", "x.yaml: lists and mappings are nested too deeply"),
    ("stages: " + 2000 * "[", "x.yaml: lists and mappings are nested too deeply"),
    ("<<: {stages: [mkae]}\n", "x.yaml: unknown stage 'mkae'"),
]


@pytest.mark.parametrize(("text", "says"), WRONG)
def test_mistakes_name_file_line_and_field(text, says):
    with pytest.raises(UserError, match=says):
        parse(text, "x.yaml", "x")


@pytest.mark.parametrize(
    "options",
    ["{model: m, size: 2, rate: 1, mode: slow, flag: true}", "{model: m, rate: null, out: here}"],
)
def test_right_options_are_taken(options):
    [stage] = parse(f"stages:\n  - make: {options}\n", "x.yaml", "x").stages
    assert stage.options["model"] == "m"


def test_a_stage_without_options_may_be_a_bare_word():
    [stage] = parse("stages: [tell]\n", "x.yaml", "x").stages
    assert stage.kind == "tell" and stage.options == {"out": "{out}/report.html"}


def test_recipes_that_do_not_exist():
    with pytest.raises(UserError, match="unknown recipe 'dmeo'; did you mean 'demo'"):
        load("dmeo")
    with pytest.raises(UserError, match="nowhere.yaml: no such file"):
        load("nowhere.yaml")
    with pytest.raises(UserError, match="unknown recipe 'w6a8'"):  # a recipe of quantize
        load("w6a8")


def test_a_file_that_is_no_utf8_is_named_with_its_line(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"name: a\ndescription: caf\xe9\n")
    with pytest.raises(UserError, match="latin.yaml:2: not UTF-8 text, found the byte 0xe9; save"):
        load("latin.yaml")


def test_a_merge_key_still_brings_its_options():
    text = "stages:\n  - make: &m {model: m, size: 2}\n  - make: {<<: *m, size: 3}\n"
    first, second = parse(text, "x.yaml", "x").stages
    assert (first.options["size"], second.options["size"]) == (2, 3)
    assert second.options["model"] == "m"


def test_a_redo_killed_while_its_files_are_read_is_not_done_again(monkeypatch):
    """The verb is asked to find its own result, not to overwrite it."""

    def killed(*_: Any) -> dict[str, str]:
        raise KeyboardInterrupt

    run("trial.yaml", progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_digests", killed)
        with pytest.raises(KeyboardInterrupt):
            run("trial.yaml", overwrite=True, progress=False)
    CALLS.clear()
    run("trial.yaml", progress=False)
    assert CALLS[0] == ("make", {"resume": True, "overwrite": False, "model": "start"})
    assert called() == ["make", "measure", "tell"]
    run("trial.yaml", progress=False)
    assert called() == []
    with monkeypatch.context() as patch:
        patch.setattr(module, "_digests", killed)
        with pytest.raises(KeyboardInterrupt):
            run("trial.yaml", overwrite=True, progress=False)
    CALLS.clear()
    edit("trial.yaml", "size: 3", "size: 4")
    run("trial.yaml", progress=False)
    assert CALLS[0][1]["overwrite"], "another result than the one that was left"


@pytest.mark.parametrize("entry", shipped(), ids=lambda e: e["name"])
def test_shipped_recipes_are_described(entry):
    assert entry["description"] and "\n" not in entry["description"]
    assert entry["verb"] in ("quantize", "run")


@pytest.mark.parametrize("name", [e["name"] for e in shipped() if e["verb"] == "run"])
def test_shipped_jobs_are_valid(name):
    assert load(name).stages


def test_the_demo_is_the_main_job():
    demo = load("demo")
    assert [stage.kind for stage in demo.stages] == ["quantize", "compare", "chat", "report"]
    assert demo.out == "build/demo-w6a8"
    assert demo.stages[0].options == {"model": "demo", "recipe": "w6a8", "out": "{out}"}


def test_the_report_of_a_run_holds_its_comparison_and_its_answers(monkeypatch, tmp_path):
    seen = {}

    def render(data: dict[str, Any], out: Path) -> Path:
        seen.update(data)
        return out

    monkeypatch.setattr("posttrain.report.render_report", render)
    compared = {"models": [{"model": "a"}], "pairs": [], "generations": [{"prompt": "p"}]}
    results = [
        {"stage": "quantize", "result": {}},
        {"stage": "compare", "result": compared},
        {"stage": "chat", "result": {"model": "b", "prompt": "q", "answer": "r"}},
    ]
    assert module.report(results, out=tmp_path / "r.html") == {"report": str(tmp_path / "r.html")}
    assert seen["models"] == [{"model": "a"}]
    assert seen["generations"] == [{"prompt": "p"}, {"prompt": "q", "outputs": {"b": "r"}}]
    assert "generations" in compared and len(compared["generations"]) == 1  # not changed in place
    alone = {"model": "a", "text": {"name": "t"}, "notes": ["coarse"]}
    module.report([{"stage": "evaluate", "result": alone}], out=tmp_path / "r.html")
    assert seen["models"] == [alone] and seen["pairs"] == []
    assert (seen["text"], seen["notes"]) == ({"name": "t"}, ["coarse"])
    with pytest.raises(UserError, match="nothing to report"):
        module.report(results[:1], out=tmp_path / "r.html")
