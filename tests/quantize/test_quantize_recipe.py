"""Recipes: what is shipped parses, round-trips, and what is wrong is named."""

import itertools
from dataclasses import fields

import pytest
import yaml

from posttrain.errors import UserError
from posttrain.quantize import quantize
from posttrain.quantize.distill import Distillation
from posttrain.quantize.recipe import (
    TEXT_OPTIONS,
    Calibration,
    QuantRecipe,
    load_recipe,
    parse_recipe,
    shipped_recipes,
    with_idle_options_noted,
)
from posttrain.quantize.solvers import SOLVERS
from posttrain.quantize.transforms import TRANSFORMS

MINIMAL = 'layers: [{match: "*", weight: int4 | fp16/g64}]\n'


def test_the_promised_recipes_are_shipped():
    assert set(shipped_recipes()) >= {"w8a8", "w6a8", "w4a16", "w4a8", "mxfp4", "nvfp4", "nf4"}


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipe_round_trips(name):
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.description
    assert parse_recipe(yaml.safe_dump(recipe.to_dict()), name) == recipe


def test_recipe_from_a_copied_file(tmp_path):
    copy = tmp_path / "mine.yaml"
    copy.write_text(MINIMAL + "solver: {name: gptq, actorder: true}\n")
    recipe = load_recipe(copy)
    assert recipe.name == "mine" and recipe.solver.actorder


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("layers: [", "not valid YAML"),
        ("- 1", "expected keys"),
        ("name: x", "no `layers`"),
        (MINIMAL + "name:", "name must be text, in quotes if need be; found None"),
        (
            MINIMAL + "description: [a]",
            "description must be text, in quotes if need be; found ['a']",
        ),
        (MINIMAL + "solvers: rtn", "did you mean 'solver'"),
        (MINIMAL + "solver: gtpq", "did you mean 'gptq'"),
        (MINIMAL + "solver: {name: gptq, dampening: 1}", "did you mean 'damping'"),
        (MINIMAL + "solver: {name: gptq, damping: 7}", "damping must be in (0, 1]"),
        (MINIMAL + "solver: {name: gptq, damping: much}", "damping must be in (0, 1]"),
        (MINIMAL + "solver: {name: gptq, lazy: 0}", "lazy"),
        (MINIMAL + "solver: {name: mse, steps: 0}", "steps"),
        (MINIMAL + "solver: {name: gptq, sweeps: -1}", "sweeps"),
        (MINIMAL + "solver: adround", "did you mean 'adaround'"),
        (MINIMAL + "solver: {name: adaround, warmup: 2}", "warmup must be in (0, 1]"),
        (MINIMAL + "solver: {name: adaround, strength: -1}", "strength"),
        (MINIMAL + "solver: {name: zq-local, start: awq}", "start must be rtn, mse, gptq"),
        (MINIMAL + "solver: {name: zq-local, rate: fast}", "rate must be in (0, 1]"),
        (MINIMAL + "solver: {name: zq-global, teacher: me}", "teacher must be full or quantized"),
        (MINIMAL + "solver: {name: zq-global, batch: 0}", "batch"),
        (MINIMAL + "transform: {name: awq, steps: 1}", "steps must be a whole number from 2 on"),
        (MINIMAL + "transform: {name: awq, balance: 1}", "balance must be true or false"),
        (MINIMAL + "calibration: {sample: 3}", "did you mean 'samples'"),
        (MINIMAL + "calibration: {samples: many}", "positive whole number"),
        (MINIMAL + "calibration: {chat: 3}", "true or false"),
        (MINIMAL + "calibration: {first_token_weight: 0}", "first_token_weight"),
        (MINIMAL + "transform: smoth", "did you mean 'smooth'"),
        (MINIMAL + "transform: {name: smooth, alfa: 1}", "did you mean 'alpha'"),
        (MINIMAL + "transform: {name: smooth, alpha: 2}", "alpha must be between 0 and 1"),
        (MINIMAL + "transform: {name: smooth, samples: 0}", "samples must be a positive"),
        (MINIMAL + "transform: {alpha: 0.5}", "with `name`"),
        ('layers: [{match: "*", weight: int9}]', "int9"),
        ('layers: [{match: "*", weigth: int4}]', "did you mean 'weight'"),
        (MINIMAL + "kv: int8 | fp16/tensor", "plan: kv: int8 | fp16/tensor has scales over"),
        ("stages: []", "posttrain run"),
        (MINIMAL + "solver: rtn\nsolver: mse", "mine.yaml:3: 'solver' is given twice"),
        ('layers: [{match: "*", weight: int4,\n weight: int8}]', "mine.yaml:2: 'weight' is given"),
        (MINIMAL + "solver: {name: 5}", "mine.yaml:2: solver: expected a mapping with `name`"),
        (MINIMAL + "solver: {name: [x]}", "found the name ['x']"),
        (MINIMAL + "transform: {name: [x]}", "mine.yaml:2: transform: expected a mapping with"),
        (MINIMAL + "solver: {1: x, name: rtn}", "mine.yaml:2: no option is called '1'"),
        (MINIMAL[:-3] + ", branches: [{name: [x]}]}]", "mine.yaml:1: layers: expected a mapping"),
        (MINIMAL + "calibration: {first_token_weight: .nan}", "must be a finite number, found nan"),
        (MINIMAL + "calibration: {first_token_weight: .inf}", "must be a finite number, found inf"),
        (MINIMAL + "distill: {rate: .nan}", "mine.yaml:2: rate must be a finite number"),
        (MINIMAL + "calibration: {text: 5}", "text must be a file or a corpus name, found 5"),
    ],
)
def test_mistakes_are_named(text, said):
    with pytest.raises(UserError) as caught:
        parse_recipe(text, "mine.yaml")
    assert said in str(caught.value)
    assert "mine.yaml" in str(caught.value)


def test_a_recipe_says_what_the_cache_is_kept_in():
    recipe = parse_recipe(MINIMAL + "kv: fp8", "mine.yaml")
    assert str(recipe.plan.kv) == "e4m3 | fp16/row"
    assert parse_recipe(yaml.safe_dump(recipe.to_dict()), "mine") == recipe


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'w6a8'"):
        load_recipe("w6a9")


def test_options_override_the_recipe():
    recipe = load_recipe("w4a16").override("rtn", samples=3, text=None)
    assert recipe.solver.name == "rtn" and recipe.calibration.samples == 3
    assert recipe.calibration.window == load_recipe("w4a16").calibration.window
    assert recipe.transform.name == "awq" and recipe.calibrated
    plain = recipe.override(transform="none")
    assert plain.transform is None and not plain.calibrated
    assert parse_recipe(MINIMAL + "transform: none", "mine.yaml").transform is None


ODD = [
    "5", "-1", "1.5", ".nan", "-.inf", "1e999", 400 * "9", "0x" + 5000 * "f", "true", "null", "''", "rtn",
    "[]", "[x]", "[[1]]", "[{}]", "[{name: [x]}]", "{}", "{a: 1}", "{1: x}", "{on: x}", "{name: [x]}",
    "{name: {}}", "{{a}}", "{<<: {name: 5}}", "{<<: 3}", "<<", "2024-01-01", "2024-13-45", "!!int x",
    "!!bool x", "!!timestamp x", "!!set {a}", "!!str [a]", "!other x", "'\x07'", "&a [*a]", "*b", "|",
    "? [a]", "- b",
]  # fmt: skip
DEEP = 2000 * "["  # which takes long to refuse


def odd_places():
    """Texts of recipes with a hole at every place that has a value."""
    tops = ("name", "description", "layers", "ignore", "kv", "transform", "solver", "distill")
    yield "%s"
    yield from (MINIMAL * (key != "layers") + f"{key}: %s" for key in (*tops, "calibration", "on"))
    for part, kinds in (("solver", SOLVERS), ("transform", TRANSFORMS)):
        for name, kind in kinds.items():
            for key in (*(f.name for f in fields(kind)), "name"):
                yield MINIMAL + f"{part}: {{name: {name}, {key}: %s}}".replace("name: %s, ", "")
    for part, kind in (("distill", Distillation), ("calibration", Calibration)):
        yield from (MINIMAL + f"{part}: {{{f.name}: %s}}" for f in fields(kind))
    for key in ("match", "weight", "input", "rotate", "outliers", "branches"):
        known = {"match": "'*'", "weight": "int4 | fp16/g64", "input": "int8 | fp32/row"}
        rule = ", ".join(f"{k}: {v}" for k, v in (known | {key: "%s"}).items())
        yield f"layers: [{{{rule}}}]"
    for branch in ("name: %s", "name: lowrank, rank: %s", "name: lowrank, rank: 8, weight: %s",
                   "name: lowrank, rank: 8, start: %s", "name: columns, count: %s"):  # fmt: skip
        yield MINIMAL[:-3] + f", branches: [{{{branch}}}]}}]"


def test_a_text_is_a_recipe_or_a_mistake_that_names_the_file():
    read = 0
    cases = itertools.product(odd_places(), ODD)
    for text, odd in (*cases, ("%s", DEEP), (MINIMAL + "solver: %s", DEEP)):
        try:
            read += isinstance(parse_recipe(text % odd, "mine.yaml"), QuantRecipe)
        except UserError as error:
            assert str(error).startswith("mine.yaml"), (text, odd)
    assert read > 50


def test_a_file_that_is_no_utf8_is_named_with_its_line(tmp_path):
    path = tmp_path / "latin.yaml"
    path.write_bytes(MINIMAL.encode() + b"description: caf\xe9\n")
    with pytest.raises(UserError, match="latin.yaml:2: not UTF-8 text, found the byte 0xe9; save"):
        load_recipe(path)


NOTHING_GIVEN = dict.fromkeys((*TEXT_OPTIONS, "memory_budget"))


def noted(recipe, text=None, /, **given):
    """The notes of a result by `recipe`; text: the identity of the one it saw."""
    result = {"recipe": recipe.to_dict(), "calibration": text, "notes": ["coarse"]}
    first, *more = with_idle_options_noted(NOTHING_GIVEN | given, result)["notes"]
    assert first == "coarse"
    return more


def test_options_that_nothing_looked_at_are_noted():
    plain = load_recipe("nf4")
    given = {"calibration": "typo.txt", "samples": 3, "window": None, "chat": False}
    (note,) = noted(plain, **given, memory_budget=2.0)
    assert note.startswith("calibration, samples, chat, memory_budget had no effect")
    assert not noted(plain)
    text = {"name": "prose"}
    (note,) = noted(plain, text, **given, memory_budget=2.0)  # a budget: its scan saw the text
    assert note.startswith("memory_budget had no effect")
    smooth = parse_recipe(MINIMAL + "transform: smooth", "mine.yaml")
    assert not noted(smooth, text, **given, memory_budget=2.0)
    assert not noted(plain.override("gptq"), text, **given, memory_budget=2.0)


def test_a_result_notes_options_that_had_no_effect(tiny_llama, tmp_path):
    """Also one that was there already."""
    options = {"recipe": "nf4", "out": tmp_path / "out", "progress": False}
    assert not any("no effect" in note for note in quantize(tiny_llama, **options)["notes"])
    for _ in range(2):
        *_, note = quantize(tiny_llama, **options, memory_budget=2.0)["notes"]
        assert note.startswith("memory_budget had no effect")
