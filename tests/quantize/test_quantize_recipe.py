"""Recipes: what is shipped parses, round-trips, and what is wrong is named."""

import pytest
import yaml

from posttrain.errors import UserError
from posttrain.quantize.recipe import load_recipe, parse_recipe, shipped_recipes

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
