"""Branches through the pipeline: fitted, stored, loaded, trained, resumed."""

import hashlib
from functools import partial

import pytest
import torch

from posttrain.errors import UserError
from posttrain.models.checkpoint import CheckpointWriter
from posttrain.models.load import load
from posttrain.quantize import distill as distilling
from posttrain.quantize import quantize
from posttrain.quantize.distill import Distillation, _batch
from posttrain.quantize.job import demand, prepare
from posttrain.quantize.recipe import load_recipe, parse_recipe

CALIBRATION = {"samples": 8, "window": 32, "progress": False}
SVD = "{name: lowrank, rank: 4, weight: int8 | fp16/row}"
TRAINED = "{name: lowrank, rank: 4, start: zero}"


@pytest.fixture()
def recipe(tmp_path):
    def write(branches: str = "", rest: str = "solver: rtn\n", weight: str = "int2 | fp16/g32"):
        path = tmp_path / f"recipe-{len(list(tmp_path.iterdir()))}.yaml"
        beside = f", branches: [{branches}]" if branches else ""
        rule = f'{{match: "*", weight: "{weight}"{beside}}}'
        path.write_text(f"layers: [{rule}]\nignore: [lm_head]\n{rest}")
        return path

    return write


def digest(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name != "measured.json"
    }


def logits(folder):
    tokens = torch.arange(50).reshape(2, 25)
    with torch.no_grad():
        return load(folder, dtype="float32")(tokens).logits


@pytest.mark.parametrize("solver", ["rtn", "gptq"])
@pytest.mark.parametrize("rotate", [False, True])
def test_low_rank_branches_bring_the_model_nearer(tiny_llama, tmp_path, recipe, solver, rotate):
    full = logits(tiny_llama)
    distance = {}
    for name, branches in (("without", ""), ("with", SVD), ("whole", SVD.replace("4", "32"))):
        path = recipe(branches, f"solver: {solver}\n")
        if rotate:
            path.write_text(path.read_text().replace("{match", "{rotate: true, match"))
        result = quantize(tiny_llama, recipe=path, out=tmp_path / name, **CALIBRATION)
        distance[name] = float((logits(tmp_path / name) - full).norm())
        assert all(bool(layer["branches"]) == bool(branches) for layer in result["layers"])
    assert distance["whole"] < 0.2 * distance["with"] < 0.2 * distance["without"]


def test_columns_in_16_bits_help_and_cost_bits(tiny_llama, tmp_path, recipe):
    bits = {}
    for name, branches in (("without", ""), ("with", "{name: columns, count: 3}")):
        path = recipe(branches, "solver: gptq\n")
        result = quantize(tiny_llama, recipe=path, out=tmp_path / name, **CALIBRATION)
        bits[name] = result["layers"][0]["bits_per_weight"]
    full = logits(tiny_llama)
    assert (logits(tmp_path / "with") - full).norm() < (logits(tmp_path / "without") - full).norm()
    # [32, 32]: 3 columns of 16 bits and their places.
    assert bits["with"] - bits["without"] == pytest.approx((3 * 32 * 16 + 3 * 64) / 1024)


def test_a_factor_that_fused_layers_share_leaves_out_their_columns(tiny, tmp_path, recipe):
    from transformers import AutoModelForCausalLM

    source = tiny("Llama")
    model = AutoModelForCausalLM.from_pretrained(source)
    block = model.model.layers[0]
    fused = [getattr(block.self_attn, f"{x}_proj").weight for x in "qkv"]
    block.input_layernorm.weight.data[5] *= 1000  # the loudest channel, and the widest column
    for weight in fused:
        weight.data[:, 5] *= 1000
    model.save_pretrained(source)
    path = recipe("{name: columns, count: 1}", "solver: gptq\n", weight="nvfp4")
    quantize(source, recipe=path, out=tmp_path / "out", **CALIBRATION)
    made = load(tmp_path / "out", dtype="float32").model.layers[0].self_attn
    rest = max(float(weight.data.index_fill(1, torch.tensor(5), 0).abs().max()) for weight in fused)
    for layer in (made.q_proj, made.k_proj, made.v_proj):
        factor = layer.qweight().scales.stored[1]  # its reciprocal, as NVFP4 checkpoints have it
        assert float(factor) == pytest.approx(6 * 448 / rest, rel=0.01)


def test_distillation_lowers_the_loss_and_continues_where_it_was_killed(
    tiny_llama, tmp_path, recipe, monkeypatch
):
    path = recipe(TRAINED, "distill: {steps: 12, batch: 2, rate: 0.01}\n")
    whole = quantize(tiny_llama, recipe=path, out=tmp_path / "whole", **CALIBRATION)
    found = whole["distilled"]
    assert found["kept"] and found["loss_after"] < found["loss_before"]
    monkeypatch.setattr(distilling, "SAVE_SECONDS", 0.0)
    save, saved = distilling._save, []

    def save_and_die(*args):
        save(*args)
        saved.append(args[-1])
        if len(saved) in (3, 7):
            raise KeyboardInterrupt

    monkeypatch.setattr(distilling, "_save", save_and_die)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            quantize(tiny_llama, recipe=path, out=tmp_path / "killed", **CALIBRATION)
        with pytest.raises(UserError, match="unfinished|no config.json"):
            load(tmp_path / "killed")
    quantize(tiny_llama, recipe=path, out=tmp_path / "killed", **CALIBRATION)
    assert saved == [*range(1, 13), 12]  # no step twice
    assert digest(tmp_path / "killed") == digest(tmp_path / "whole")


def test_training_that_does_not_help_is_undone(tiny_llama, tmp_path, recipe, monkeypatch):
    monkeypatch.setattr(torch.optim, "AdamW", partial(torch.optim.AdamW, maximize=True))
    uphill = recipe(SVD, "distill: {steps: 12, batch: 2, rate: 0.01}\n")
    result = quantize(tiny_llama, recipe=uphill, out=tmp_path / "uphill", **CALIBRATION)[
        "distilled"
    ]
    assert result["loss_after"] > result["loss_before"] and not result["kept"]
    quantize(tiny_llama, recipe=recipe(SVD), out=tmp_path / "fitted", **CALIBRATION)
    assert torch.equal(logits(tmp_path / "uphill"), logits(tmp_path / "fitted"))


@pytest.mark.parametrize("count, size", [(7, 3), (4, 4), (3, 8)])
def test_every_window_is_seen_once_in_a_pass(count, size):
    drawn = torch.cat([_batch(count, size, step, seed=1) for step in range(3 * count)])
    for lap in drawn[: len(drawn) // count * count].reshape(-1, count):
        assert sorted(lap.tolist()) == list(range(count))


def test_mistakes_are_named(tiny_llama, tmp_path, recipe):
    with pytest.raises(UserError, match="low-rank branches to train"):
        quantize(tiny_llama, recipe=recipe("", "distill: {}\n"), out=tmp_path / "a", **CALIBRATION)
    for entry, message in (
        ("{stepz: 3}", "did you mean 'steps'"),
        ("{steps: 0}", "steps must be a positive"),
        ("{rate: fast}", "rate must be a number"),
        ("[]", "expected a mapping"),
    ):
        with pytest.raises(UserError, match=message):
            load_recipe(recipe(TRAINED, f"distill: {entry}\n"))


def test_a_recipe_with_branches_and_distillation_survives_its_own_yaml(recipe):
    import yaml

    first = load_recipe(recipe(SVD, "distill: {steps: 5}\n"))
    assert first.distill == Distillation(steps=5)
    again = parse_recipe(yaml.safe_dump(first.to_dict()), "again.yaml")
    assert again == first


def test_a_budget_counts_branches(tiny_llama, tmp_path, recipe):
    path = recipe(SVD, weight="int4 | fp16/g32")
    asked = (
        0.02
        + quantize(tiny_llama, recipe=path, out=tmp_path / "a", **CALIBRATION)["bits_per_weight"]
    )
    found = quantize(tiny_llama, recipe=path, out=tmp_path / "b", bits=asked, **CALIBRATION)
    assert found["bits_per_weight"] == found["search"]["predicted_bits_per_weight"] <= asked
    assert all(layer["branches"] for layer in found["layers"])


@pytest.mark.parametrize("rate", ["0.01", "1.0e-12"])  # branches that are kept, or as they were
def test_killed_while_shards_are_written_again_it_ends_with_the_same_bytes(
    tiny_llama, tmp_path, recipe, monkeypatch, rate
):
    path = recipe(SVD, f"distill: {{steps: 6, batch: 2, rate: {rate}}}\n")
    quantize(tiny_llama, recipe=path, out=tmp_path / "whole", **CALIBRATION)
    write, writes = CheckpointWriter.write_shard, []

    def dies(self, index, tensors):
        writes.append(index)
        if len(writes) in (6, 9):  # the second block's shard is due, in this attempt and the next
            raise KeyboardInterrupt
        return write(self, index, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "write_shard", dies)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                quantize(tiny_llama, recipe=path, out=tmp_path / "killed", **CALIBRATION)
    assert writes == [1, 2, 3, 0, 1, 2, 0, 1, 2]
    quantize(tiny_llama, recipe=path, out=tmp_path / "killed", **CALIBRATION)
    assert digest(tmp_path / "killed") == digest(tmp_path / "whole")


def test_a_full_disk_while_training_is_said_with_the_name_of_the_file(
    tiny_llama, tmp_path, recipe, monkeypatch
):
    def full(*args):
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    path = recipe(SVD, "distill: {steps: 2, batch: 2}\n")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(UserError, match=r"distill\.pt: cannot be written: Pytorch"):
            quantize(tiny_llama, recipe=path, out=tmp_path / "out", **CALIBRATION)
    assert quantize(tiny_llama, recipe=path, out=tmp_path / "out", **CALIBRATION)["distilled"]


def test_a_large_seed_orders_windows_too():
    assert sorted(_batch(5, 5, 0, seed=2**63 - 1).tolist()) == list(range(5))


def test_the_memory_of_the_teacher_is_counted_where_it_is_the_larger(tiny_llama, tmp_path, recipe):
    settings = load_recipe(recipe(TRAINED, "distill: {steps: 2, batch: 1}\n"))
    settings = settings.override(samples=8, window=32)
    job = prepare(str(tiny_llama), settings, tmp_path / "out", 0, None)
    assert demand(job).distill > 3 * 4 * job.batch * 32 * 49152 > 10 * 4 * 5 * 32 * 49152
