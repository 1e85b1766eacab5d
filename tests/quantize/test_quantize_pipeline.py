"""The pipeline: same bytes whatever happens on the way, and nothing left out in silence."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from posttrain.errors import UserError
from posttrain.lm import engine
from posttrain.models.checkpoint import MARKER, CheckpointWriter
from posttrain.models.load import load
from posttrain.quantize import quantize
from posttrain.quantize.recipe import load_recipe

CALIBRATION = {"samples": 6, "window": 32, "calibration": None}
RECIPES = ["w8a8", "w6a8", "w6a16", "w4", "w4a16", "w4a8", "mxfp4", "nvfp4", "nf4"]
GROUP_32 = 'layers: [{match: "*", weight: int4 | fp16/g32, input: int8h | fp32/row}]\n'


def digest(folder: Path) -> dict[str, str]:
    """sha256 of every file of a checkpoint but the one that holds times."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name != "measured.json"
    }


@pytest.fixture()
def gptq(tmp_path) -> Path:
    recipe = tmp_path / "gptq.yaml"
    recipe.write_text(GROUP_32 + "transform: smooth\nsolver: gptq\nignore: [lm_head]\n")
    return recipe


@pytest.fixture()
def smooth(tmp_path) -> Path:
    """Looks at text, with a solver that does not."""
    recipe = tmp_path / "smooth.yaml"
    recipe.write_text(GROUP_32 + "transform: smooth\nignore: [lm_head]\n")
    return recipe


def test_the_checkpoint_says_what_the_recipe_says_of_the_cache(tiny, tmp_path):
    recipe = tmp_path / "kv.yaml"
    recipe.write_text(GROUP_32 + "kv: int4\nsolver: rtn\nignore: [lm_head]\n")
    model = tiny("Llama", hidden_size=64, intermediate_size=128)
    quantize(model, recipe=recipe, out=tmp_path / "out", progress=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["kv"] == "int4 | fp16/row"
    assert str(engine(load(tmp_path / "out")).keeps()) == "int4 | fp16/row"


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_writes_a_model_that_loads(recipe, tiny, tmp_path):
    model = tiny("Llama", hidden_size=64, intermediate_size=128)
    result = quantize(model, recipe=recipe, out=tmp_path / "out", progress=False, **CALIBRATION)
    head = load_recipe(recipe).plan.names("lm_head")
    assert len(result["layers"]) == 3 * 7 + head
    assert result["bytes"] < result["bytes_total"]
    assert set(result) >= {
        "out", "bits_per_weight", "bytes_quantized", "bytes_total", "seconds",
        "peak_rss_bytes", "predicted_peak_bytes", "layers",
    }  # fmt: skip
    tokens = torch.arange(50).reshape(2, 25)
    with torch.no_grad():
        full = load(model, dtype=torch.float32)(tokens).logits
        small = load(tmp_path / "out", dtype=torch.float32)(tokens).logits
    assert torch.nn.functional.cosine_similarity(full, small, dim=-1).min() > 0.9
    assert not torch.equal(full, small)


LEARNING = {
    "adaround": "solver: {name: adaround, steps: 5}\ntransform: awq\n",
    "zq-local": "solver: {name: zq-local, steps: 5, start: gptq}\n",
    "zq-global": "solver: {name: zq-global, steps: 6, batch: 2}\ntransform: smooth\n",
    "zq-global, quantized": "solver: {name: zq-global, steps: 6, start: rtn, teacher: quantized}\n",
}


class Killed(BaseException):
    """What stops a run as a signal would."""


@pytest.mark.parametrize("solver", LEARNING)
def test_learning_solvers_end_with_the_same_bytes_when_killed(
    solver, tiny_llama, tmp_path, monkeypatch
):
    monkeypatch.setattr("posttrain.quantize.pipeline.SNAPSHOT_SECONDS", 0.0)
    recipe = tmp_path / "learn.yaml"
    recipe.write_text(GROUP_32 + LEARNING[solver] + "ignore: [lm_head]\n")

    def go(out: str, **options):
        return quantize(
            tiny_llama, recipe=recipe, out=tmp_path / out, progress=False, **CALIBRATION, **options
        )

    result = go("whole")
    assert {layer["solver"] for layer in result["layers"]} == {solver.partition(",")[0]}
    write, blocks = CheckpointWriter.write_shard, []

    def dies(self, index, tensors):
        blocks.append(index)
        if len(blocks) in (2, 3):  # in the second block, and again when it is resumed
            raise Killed
        write(self, index, tensors)

    monkeypatch.setattr(CheckpointWriter, "write_shard", dies)
    budget = 1e-9 if "quantized" in solver else 1.0  # on disk, in memory
    for _ in range(2):
        with pytest.raises(Killed):
            go("killed", memory_budget=budget)
    go("killed", memory_budget=budget)
    assert blocks == [1, 2, 2, 2, 3, 0]
    assert digest(tmp_path / "killed") == digest(tmp_path / "whole")


def test_zq_global_bettered_every_block(tiny_llama, tmp_path, capsys):
    for teacher in ("full", "quantized"):
        recipe = tmp_path / f"{teacher}.yaml"
        recipe.write_text(
            f"{GROUP_32}solver: {{name: zq-global, steps: 40, rate: 0.02, start: rtn, teacher: {teacher}}}\n"
            "ignore: [lm_head]\n"
        )
        quantize(tiny_llama, recipe=recipe, out=tmp_path / teacher, **CALIBRATION | {"samples": 16})
        said = [line for line in capsys.readouterr().err.splitlines() if "output error" in line]
        shares = [float(line.split("error ")[1].split()[0]) for line in said]
        assert len(shares) == 3 and max(shares) < 0.99


def test_a_head_and_experts_beside_learnt_layers(tiny, tmp_path, capsys):
    model = tiny("Mixtral", num_local_experts=4)
    recipe = tmp_path / "head.yaml"
    recipe.write_text(
        'layers: [{match: "*", weight: int4 | fp16/g32}]\n'
        "solver: {name: zq-global, steps: 4}\nignore: ['*.gate']\n"
    )
    result = quantize(model, recipe=recipe, out=tmp_path / "out", progress=False, **CALIBRATION)
    solvers = {layer["name"]: layer["solver"] for layer in result["layers"]}
    assert solvers["lm_head"] == "gptq"
    assert solvers["model.layers.0.mlp.experts.down_proj"] == "rtn"
    assert solvers["model.layers.0.self_attn.q_proj"] == "zq-global"
    assert "6 layers of experts are rounded to nearest: zq-global" in capsys.readouterr().err


def test_a_repeated_run_gives_the_same_bytes_and_does_no_work_twice(tiny_llama, tmp_path, gptq):
    for out in ("a", "b"):
        quantize(tiny_llama, recipe=gptq, out=tmp_path / out, progress=False, **CALIBRATION)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()}
    result = quantize(tiny_llama, recipe=gptq, out=tmp_path / "a", progress=False, **CALIBRATION)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()} == before
    assert result["layers"] and result["seconds"] > 0


def test_spilled_activations_give_the_same_bytes(tiny_llama, tmp_path, gptq):
    quantize(tiny_llama, recipe=gptq, out=tmp_path / "ram", progress=False, **CALIBRATION)
    quantize(
        tiny_llama, recipe=gptq, out=tmp_path / "disk", progress=False, memory_budget=1e-9,
        **CALIBRATION,
    )  # fmt: skip
    assert digest(tmp_path / "ram") == digest(tmp_path / "disk")


RUN = """
import sys
from posttrain.quantize import pipeline
pipeline.SNAPSHOT_SECONDS = 0.0
pipeline.quantize(sys.argv[1], recipe=sys.argv[2], out=sys.argv[3], samples=6, window=32,
                  memory_budget=float(sys.argv[4]), progress=False)
"""


def test_killed_at_random_moments_it_ends_with_the_same_bytes(tiny, tmp_path, gptq, smooth):
    model = tiny("Llama", num_hidden_layers=12)
    for attempt, (recipe, budget) in enumerate(((gptq, "1"), (gptq, "1e-9"), (smooth, "1"))):
        whole = tmp_path / f"whole-{attempt}"
        quantize(model, recipe=recipe, out=whole, progress=False, **CALIBRATION)
        out = tmp_path / f"killed-{attempt}"
        command = [sys.executable, "-c", RUN, str(model), str(recipe), str(out), budget]
        kills = 0
        chance = random.Random(attempt)
        while kills < 2:
            process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
            while not (out / ".posttrain-progress").exists() and process.poll() is None:
                time.sleep(0.01)
            time.sleep(chance.uniform(0.0, 0.4))
            if process.poll() is not None:
                break
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            if (out / "config.json").exists() and not (out / MARKER).exists():
                break  # it was whole already; only its tidying up was cut short
            with pytest.raises(UserError, match="unfinished|no config.json"):
                load(out)
        assert kills, "the run ended before it could be killed once"
        subprocess.run(command, check=True, capture_output=True)
        assert digest(out) == digest(whole)
        assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}


def test_a_layer_no_rule_covers_is_an_error(tiny_llama, tmp_path):
    recipe = tmp_path / "partial.yaml"
    recipe.write_text('layers: [{match: "*_proj", weight: int8 | fp32/row}]\n')
    with pytest.raises(UserError, match="lm_head"):
        quantize(tiny_llama, recipe=recipe, out=tmp_path / "out", progress=False)


def test_what_is_left_out_is_listed(tiny_llama, tmp_path):
    recipe = tmp_path / "partial.yaml"
    recipe.write_text(
        'layers: [{match: "*", weight: int8 | fp32/row}]\nignore: [lm_head, "*.down_proj"]\n'
    )
    result = quantize(tiny_llama, recipe=recipe, out=tmp_path / "out", progress=False)
    assert "model.layers.0.mlp.down_proj.weight" in result["left_out"]
    assert "lm_head.weight" in result["left_out"]
    names = {layer["name"] for layer in result["layers"]}
    assert not any("down_proj" in name for name in names) and len(names) == 18
    stored = json.loads((tmp_path / "out" / "posttrain.json").read_text())
    assert stored["left_out"] == result["left_out"]


def test_the_head_is_quantized_when_the_plan_says_so(tiny_llama, tmp_path):
    recipe = tmp_path / "all.yaml"
    recipe.write_text('layers: [{match: "*", weight: int8 | fp32/row}]\n')
    result = quantize(tiny_llama, recipe=recipe, out=tmp_path / "out", progress=False)
    assert "lm_head" in {layer["name"] for layer in result["layers"]}
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        full = load(tiny_llama, dtype=torch.float32)(tokens).logits
        small = load(tmp_path / "out", dtype=torch.float32)(tokens).logits
    assert torch.nn.functional.cosine_similarity(full, small, dim=-1).min() > 0.99


def test_experts_are_quantized_not_skipped(tiny, tmp_path):
    model = tiny("Mixtral", num_local_experts=4)
    recipe = tmp_path / "experts.yaml"
    recipe.write_text(
        'layers: [{match: "*", weight: int8 | fp16/g32}]\nignore: [lm_head, "*.gate"]\n'
        "solver: gptq\n"
    )
    result = quantize(model, recipe=recipe, out=tmp_path / "out", progress=False, **CALIBRATION)
    experts = [layer for layer in result["layers"] if "experts" in layer["name"]]
    assert len(experts) == 3 * 2 and all(layer["solver"] == "rtn" for layer in experts)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        full = load(model, dtype=torch.float32)(tokens).logits
        small = load(tmp_path / "out", dtype=torch.float32)(tokens).logits
    assert torch.nn.functional.cosine_similarity(full, small, dim=-1).min() > 0.99


def test_mistakes_have_one_clear_error_each(tiny_llama, tmp_path, gptq):
    busy = tmp_path / "busy"
    busy.mkdir()
    (busy / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        quantize(tiny_llama, recipe="w8a8", out=busy, progress=False)
    with pytest.raises(UserError, match="is a file"):
        quantize(tiny_llama, recipe="w8a8", out=busy / "thesis.txt", progress=False)
    with pytest.raises(UserError, match="budget"):
        quantize(tiny_llama, recipe=gptq, out=tmp_path / "o", memory_budget=-1, progress=False)
    with pytest.raises(UserError, match="does not exist|no such"):
        quantize(tmp_path / "nowhere", recipe="w8a8", out=tmp_path / "o", progress=False)
    done = tmp_path / "done"
    quantize(tiny_llama, recipe="w8a8", out=done, progress=False)
    with pytest.raises(UserError, match="already quantized"):
        quantize(done, recipe="w8a8", out=tmp_path / "o", progress=False)
    with pytest.raises(UserError, match="not empty"):
        quantize(tiny_llama, recipe="w6a8", out=done, progress=False)
    quantize(tiny_llama, recipe=gptq, out=done, overwrite=True, progress=False, **CALIBRATION)
    assert json.loads((done / "posttrain.json").read_text())["recipe"]["name"] == "gptq"
