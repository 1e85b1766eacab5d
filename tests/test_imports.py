"""The house: every room imports only rooms below it, and opening the door is quick."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import posttrain

PACKAGE = Path(posttrain.__file__).parent
# From the ground up. A room may import itself and the rooms before it.
ORDER = [
    "errors",
    "quick",
    "numbers",
    "kernels",
    "models",
    "lm",
    "data",
    "evaluate",
    "report",
    "bench",
    "quantize",
    "recipe",
    "papers",
    "cli",
]
HEAVY = {
    "torch",
    "transformers",
    "numpy",
    "safetensors",
    "gguf",
    "huggingface_hub",
    "yaml",
    "tqdm",
    "psutil",
    "compressed_tensors",
    "jinja2",
}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path, source: str | None = None) -> set[str]:
    """Rooms of ours that a file imports anywhere, also inside functions."""
    package = ["posttrain", *path.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text() if source is None else source)):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = base + (node.module.split(".") if node.module else [])
            names = [[*module, alias.name] for alias in node.names]
        else:
            continue
        found |= {name[1] for name in names if name[0] == "posttrain" and len(name) > 1}
    return found & set(ORDER)


def modules() -> list[Path]:
    """Every file in a room; the package's own entrance reaches into all of them, lazily."""
    return [path for path in FILES if path.parent != PACKAGE or room(path) in ORDER]


def test_every_room_is_in_the_order():
    rooms = {room(path) for path in FILES} - {"__init__", "__main__"}
    assert rooms <= set(ORDER), "give the new room its place in ORDER"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_downwards(path):
    below = ORDER[: ORDER.index(room(path)) + 1]
    upwards = imported_rooms(path) - set(below)
    assert not upwards, f"{room(path)} may import {below}, not {sorted(upwards)}"


@pytest.mark.parametrize(
    ("source", "rooms"),
    [
        ("import posttrain.cli.main", {"cli"}),
        ("from posttrain.recipe import run", {"recipe"}),
        ("from posttrain import quantize", {"quantize"}),
        ("from ..report import page", {"report"}),
        ("from .. import evaluate", {"evaluate"}),
        ("from .grids import GRIDS", {"numbers"}),
        ("def f():\n    import posttrain.cli", {"cli"}),
        ("import torch", set()),
    ],
)
def test_the_reader_of_imports_sees_every_form(source, rooms):
    assert imported_rooms(PACKAGE / "numbers" / "any.py", source) == rooms


@pytest.mark.parametrize("module", ["posttrain", "posttrain.cli", "posttrain.recipe"])
def test_nothing_heavy_is_imported_at_the_door(module):
    allowed = {"yaml"} if module == "posttrain.recipe" else set()
    code = f"import sys, {module}; print(*{{m.partition('.')[0] for m in sys.modules}})"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(ran.stdout.split()) & (HEAVY - allowed)


@pytest.mark.parametrize(
    ("words", "seconds"),
    [(["-c", "import posttrain"], 0.3), (["-m", "posttrain", "--help"], 0.5)],
)
def test_the_door_opens_quickly(words, seconds):
    """The best of several: what is measured is our code, not what else the machine does."""
    from time import perf_counter

    best = float("inf")
    for _ in range(7):
        started = perf_counter()
        subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL, check=True)
        best = min(best, perf_counter() - started)
    assert best < seconds


def test_the_public_functions_are_callable_whatever_was_imported_before():
    """`posttrain.evaluate` is a function's name and a sub-package's: both must keep working."""
    code = """
import inspect, posttrain
early = inspect.signature(posttrain.evaluate)
import posttrain.evaluate, posttrain.quantize.recipe
from posttrain import compare, load, quantize, run
from posttrain.evaluate import evaluate
for verb in (posttrain.evaluate, posttrain.quantize, posttrain.compare, posttrain.load,
             posttrain.chat, posttrain.run, quantize, evaluate):
    assert callable(verb), verb
assert inspect.signature(posttrain.evaluate) == early == inspect.signature(evaluate)
assert posttrain.quantize.recipe.load_recipe
try:
    posttrain.nothing
except AttributeError as error:
    assert "nothing" in str(error)
else:
    raise SystemExit("no AttributeError")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
