"""Checkpoints: each format loads again, here and in transformers alone, to identical logits."""

import json
import re
from importlib.metadata import version

import pytest
import torch
from models_tiny import MIXTURES, save_tiny
from models_written import (
    logits_in_fresh_process,
    read_config,
    rules,
    save_llama,
    tokens,
    write,
    writer_for,
)
from safetensors import safe_open

from posttrain.errors import UserError
from posttrain.models import experts, native
from posttrain.models.branches import LowRankPlan
from posttrain.models.checkpoint import MARKER, CheckpointWriter, choose_format
from posttrain.models.linear import QuantLinear
from posttrain.models.load import load
from posttrain.models.plan import LayerPlan, Plan
from posttrain.models.shards import read_header
from posttrain.models.source import open_source
from posttrain.numbers import quantize, spec

A8 = "int8h | fp32/row"
# weight, input, storage format of compressed-tensors
THEIRS = [
    *((f"int{bits} | fp16/g64", None, "pack-quantized") for bits in range(2, 9)),
    *((f"int{bits}t | fp32/row", None, "pack-quantized") for bits in (3, 8)),
    ("int4 | bf16/tensor", None, "pack-quantized"),
    ("int4 | fp16/g128", A8, "pack-quantized"),
    ("int6 | fp16/g64", A8, "pack-quantized"),
    ("int6 | fp16/row", "int8h | fp32/g32", "pack-quantized"),
    ("int8 | fp16/g32", A8, "pack-quantized"),
    ("int4z | fp16/tensor", None, "pack-quantized"),
    ("int8 | fp32/row", A8, "int-quantized"),
    ("int8 | fp16/tensor", "int8h | fp32/tensor", "int-quantized"),
    ("int8z | fp16/g64", A8, "int-quantized"),
    ("int8z | fp32/row", None, "int-quantized"),
    ("e4m3 | fp32/row", "e4m3 | fp32/row", "float-quantized"),
    ("e4m3 | fp16/tensor", None, "float-quantized"),
    ("e4m3 | fp32/t128x128", "e4m3 | fp32/g128", "float-quantized"),
    ("nvfp4", None, "nvfp4-pack-quantized"),
    ("mxfp4", None, "mxfp4-pack-quantized"),
    ("mxfp4-ocp", None, "mxfp4-pack-quantized"),
    ("mxfp6", None, "mxfp6-pack-quantized"),
    ("mxfp8", None, "mxfp8-quantized"),
]
# Formats that older readers lack.
SINCE = {"mxfp6": (0, 20), "e4m3 | fp32/t128x128": (0, 20)}
INSTALLED = tuple(int(part) for part in version("compressed-tensors").split(".")[:2])
THEIRS = [case for case in THEIRS if SINCE.get(case[0], (0, 0)) <= INSTALLED]
# weight, input, a word of the reason why compressed-tensors cannot say it
OURS = [
    ("nf4-dq", None, "chain of factors"),
    ("nf4", None, "codes"),
    ("e3m2 | fp16/row", None, "codes"),
    ("fp8-e2m5", None, "codes"),
    ("e4m3 | fp32/t64x64", None, "scales per t64x64"),
    ("crossquant", "a8", "chain of factors"),
    ("zqfp-m2", None, "codes|chain"),
    ("int6 | fp16/g48", A8, "do not divide"),
    ("int4z | fp16/g32", None, "zero points"),
    ("nvfp4", "a8", "input format"),
    ("int6 | fp16/g64", "a8z", "input format"),
    ("int6 | fp16/g64", "mxfp8", "input format"),
    ("int8 | fp32/row", "int8h@away | fp32/row", "rounded to nearest"),
    ("int4 | pow2[0..3].floor/col * fp32/tensor", None, "chain"),
    ("int8 | fp32/row", "crossquant", "input format"),
]
BF16 = [("int6 | fp16/g64", None), ("int4 | fp32/row", None), ("e4m3 | fp32/row", None)]


def slug(*parts: object) -> str:
    return "".join(c if c.isalnum() else "-" for c in " ".join(map(str, parts)))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def written(tmp_path_factory, llama):
    """All checkpoints of THEIRS, OURS and BF16, their logits by transformers in fresh processes."""
    folder = tmp_path_factory.mktemp("written")
    bf16 = save_llama(folder / "source-bf16", "bfloat16")
    cases = [(llama, *case[:2]) for case in (*THEIRS, *OURS)] + [(bf16, *case) for case in BF16]
    writers = {}
    for source, weight, inputs in cases:
        out = folder / slug(source.name, weight, inputs)
        writers[source.name, weight, inputs] = write(source, out, rules(weight, inputs))
    writers["mixed"] = write(llama, folder / "mixed", MIXED)
    writers["rotated"] = write(llama, folder / "rotated", ROTATED)
    writers["outliers"] = write(llama, folder / "outliers", OUTLIERS)
    writers["16 bits"] = write_kept_in_16_bits(llama, folder / "sixteen")
    theirs = [w.out_dir for w in writers.values() if w.format.name == "compressed-tensors"]
    ours = [w.out_dir for w in writers.values() if w.format.name == "posttrain"]
    logits = logits_in_fresh_process(theirs, folder)
    logits |= logits_in_fresh_process(ours, folder, imports="import posttrain")
    return writers, logits


MIXED = Plan.from_dict(
    {
        "layers": [
            {"match": "*", "weight": "int6 | fp16/g64", "input": A8},
            {"match": "*.down_proj", "weight": "int8 | fp32/row", "input": A8},
        ],
        "ignore": ["model.layers.0.self_attn.*"],
    }
)


ROTATED = Plan.from_dict(
    {
        "layers": [
            {"match": "*", "weight": "int6 | fp16/g64", "input": A8, "rotate": True},
            {"match": "*.o_proj", "weight": "int6 | fp16/g64", "input": A8},
        ]
    }
)


OUTLIERS = Plan.from_dict(
    {"layers": [{"match": "*", "weight": "int8 | fp32/row", "input": A8, "outliers": 1.5}]}
)


def write_kept_in_16_bits(model, out) -> CheckpointWriter:
    """A checkpoint as a GGUF source gives it: float32 to compute in, float16 to keep."""
    source = open_source(model)
    source.storage_dtype = torch.float16
    writer, shards = writer_for(source, out, rules("int6 | fp16/g64", A8))
    for index, tensors in shards.items():
        writer.write_shard(index, tensors)
    writer.finish()
    return writer


def loaded_logits(path, **options) -> torch.Tensor:
    with torch.no_grad():
        return load(path, **options)(tokens()).logits


def check_same(writer, logits, llama, tolerance) -> None:
    mine = loaded_logits(writer.out_dir)
    assert torch.equal(mine, logits[str(writer.out_dir)])
    assert torch.equal(mine, loaded_logits(writer.out_dir, resident="dequantized"))
    reference = loaded_logits(llama).float()
    error = (mine.float() - reference).norm() / reference.norm()
    assert 0 < error < tolerance


@pytest.mark.parametrize(("weight", "inputs", "form"), THEIRS)
def test_compressed_tensors_checkpoints_load_without_us(written, llama, weight, inputs, form):
    writer = written[0]["llama", weight, inputs]
    bits = spec(weight).bits
    check_same(writer, written[1], llama, {2: 2.0, 3: 0.8, 4: 0.6}.get(bits, 0.2))
    config = read_config(writer.out_dir)
    assert config["quantization_config"]["format"] == form
    assert config["dtype"] == ("bfloat16" if form[:2] in ("nv", "mx") else "float32")
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    group = config["quantization_config"]["config_groups"]["group_0"]
    assert group["format"] == form and group["targets"] == ["Linear"]


@pytest.mark.parametrize(("weight", "inputs", "why"), OURS)
def test_what_they_cannot_say_loads_after_import_posttrain(written, llama, weight, inputs, why):
    writer = written[0]["llama", weight, inputs]
    assert writer.format.name == "posttrain"
    assert re.search(why, writer.format.reason)
    check_same(writer, written[1], llama, 0.9)
    assert read_config(writer.out_dir)["quantization_config"]["version"] == 1


def test_rotated_layers_load_after_import_posttrain(written, llama):
    writer = written[0]["rotated"]
    assert "do not rotate" in writer.format.reason
    check_same(writer, written[1], llama, 0.1)
    groups = read_config(writer.out_dir)["quantization_config"]["groups"]
    turned = [name for group in groups if group.get("rotate") for name in group["modules"]]
    assert len(groups) == 2 and not any("o_proj" in name for name in turned)
    assert sum(m.layer.rotate for m in load(writer.out_dir).modules() if isinstance(m, QuantLinear)
               ) == len(turned)  # fmt: skip


def test_layers_that_spare_outliers_load_after_import_posttrain(written, llama):
    writer = written[0]["outliers"]
    assert "spare" in writer.format.reason
    check_same(writer, written[1], llama, 0.1)
    layers = [m.layer for m in load(writer.out_dir).modules() if isinstance(m, QuantLinear)]
    assert layers and all(layer.outliers == 1.5 for layer in layers)
    config = read_config(writer.out_dir)["quantization_config"]
    config["groups"][0]["outliers"] = "loud"
    with pytest.raises(
        UserError, match=r"groups\[0\]\.outliers must be a number above 0; found 'loud'"
    ):
        native.read_config(config, "somewhere")


def test_an_unknown_rotation_is_refused(written, tmp_path):
    config = read_config(written[0]["rotated"].out_dir)["quantization_config"]
    turned = next(group for group in config["groups"] if "rotate" in group)
    turned["rotate"] = "hadamard.v9"
    with pytest.raises(UserError, match="unknown rotation 'hadamard.v9'"):
        native.read_config(config, "somewhere")


@pytest.mark.parametrize(("weight", "inputs"), BF16)
def test_in_a_bfloat16_model_scales_are_read_as_their_reader_reads_them(written, weight, inputs):
    writer = written[0]["source-bf16", weight, inputs]
    mine = loaded_logits(writer.out_dir)
    assert mine.dtype == torch.bfloat16
    assert torch.equal(mine, written[1][str(writer.out_dir)])


@pytest.mark.parametrize(("weight", "inputs", "form"), THEIRS)
def test_stored_bytes_are_those_of_the_number_format(written, llama, weight, inputs, form):
    """No byte per weight where fewer bits were asked for; what is added is 24 bytes of shape."""
    writer = written[0]["llama", weight, inputs]
    stored = {
        name: tensor
        for shard in sorted(writer.out_dir.glob("*.safetensors"))
        for name, tensor in read_header(shard).items()
    }
    for name, layer in writer.layers.items():
        own = [t.nbytes for key, t in stored.items() if key.startswith(f"{name}.weight")]
        bits = layer.weight.stored_bits(writer.shapes[name])
        assert 0 <= sum(own) - bits / 8 <= 24


def test_config_and_kept_tensors(written, llama):
    writer = written[0]["llama", "int6 | fp16/g64", A8]
    config = read_config(writer.out_dir)
    assert config["architectures"] == ["LlamaForCausalLM"]
    index = json.loads((writer.out_dir / "model.safetensors.index.json").read_text())
    assert "lm_head.weight" not in index["weight_map"]
    assert set(index["weight_map"].values()) == {
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    }
    size = sum(t.nbytes for i in range(3) for t in read_header(writer.shard_path(i)).values())
    assert index["metadata"]["total_size"] == size
    model = load(writer.out_dir)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.posttrain["bytes"] == size
    assert model.posttrain["parameters"] == sum(p.numel() for p in load(llama).parameters())
    assert model.posttrain["bits_per_weight"] == 8 * size / model.posttrain["parameters"]
    with safe_open(writer.shard_path(0), "pt") as shard:
        assert shard.metadata() == {"format": "pt"}


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory):
    """Two checkpoints of every mixture of experts, their logits by transformers."""
    folder = tmp_path_factory.mktemp("mixtures")
    written = []
    for name in MIXTURES:
        save_tiny(name, folder / name)
        for weight in ("int6 | fp16/g16", "nf4-dq"):
            plan = rules(weight, "a8", ("*.router",))
            written.append(write(folder / name, folder / slug(name, weight), plan))
    paths = [writer.out_dir for writer in written]
    return written, logits_in_fresh_process(paths, folder, imports="import posttrain")


def test_experts_are_quantized_and_load_again(mixtures):
    written, logits = mixtures
    for writer in written:
        assert any(len(writer.shapes[layer]) == 3 for layer in writer.layers)
        model = load(writer.out_dir)
        assert any(experts.records(m) for m in model.modules())
        with torch.no_grad():
            mine = model(tokens()).logits
        assert torch.equal(mine, logits[str(writer.out_dir)])
        assert torch.equal(mine, loaded_logits(writer.out_dir, resident="dequantized"))
        reference = loaded_logits(writer.source.path)
        assert (mine - reference).norm() / reference.norm() < 1.0


def test_mixed_plans_name_their_layers_in_groups(written):
    out = written[0]["mixed"].out_dir
    config = read_config(out)["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert [group["format"] for group in config["config_groups"].values()] == [
        "pack-quantized",
        "int-quantized",
    ]
    assert config["ignore"] == [
        *(f"model.layers.0.self_attn.{leaf}_proj" for leaf in "qkvo"),
        "lm_head",
    ]
    model = load(out)
    assert isinstance(model.model.layers[0].self_attn.q_proj, torch.nn.Linear)
    assert isinstance(model.model.layers[1].self_attn.q_proj, QuantLinear)
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, written[1][str(out)])


def test_matrices_kept_in_16_bits_are_computed_in_float32(written):
    """A GGUF source computes in float32 and stores float16: transformers must cast up again."""
    writer = written[0]["16 bits"]
    dtypes = {n: t.dtype for i in range(3) for n, t in read_header(writer.shard_path(i)).items()}
    assert dtypes["model.embed_tokens.weight"] == torch.float16
    assert dtypes["model.norm.weight"] == torch.float32
    logits = written[1][str(writer.out_dir)]
    assert logits.dtype == torch.float32
    assert torch.equal(loaded_logits(writer.out_dir), logits)


def test_modules_that_their_reader_rebuilds_get_our_format(tmp_path):
    save_tiny("llama4", tmp_path / "source")
    plan = rules("int6 | fp16/g16", None, ("*.experts.*", "*.router"))
    writer, _ = writer_for(tmp_path / "source", tmp_path / "out", plan)
    assert writer.format.name == "posttrain" and "feed_forward.experts" in writer.format.reason


# --------------------------------------------------------------------------- the writer


def test_the_same_tensors_give_the_same_bytes(tmp_path, llama):
    plan = rules("int6 | fp16/g64", A8)
    for name in ("a", "b"):
        writer, shards = writer_for(llama, tmp_path / name, plan)
        for index in sorted(shards, reverse=name == "b"):  # also in another order, key by key
            writer.write_shard(index, dict(sorted(shards[index].items(), reverse=name == "b")))
        writer.finish({"same": True})
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_an_unfinished_directory_is_never_taken_for_a_checkpoint(tmp_path, llama):
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    write(llama, out, rules("int6 | fp16/g64"))
    for stop in range(3):  # a second run over a finished one, stopped after each shard
        writer, shards = writer_for(llama, out, rules("int4 | fp16/g64"))
        writer.write_shard(stop, shards[stop])
        with pytest.raises(UserError, match="unfinished.*resume with .*posttrain quantize"):
            load(out)
        with pytest.raises((OSError, ValueError)):
            AutoModelForCausalLM.from_pretrained(out)
    writer.finish()
    assert not (out / MARKER).exists()
    assert load(out).model.layers[1].mlp.up_proj.weight_spec == spec("int4t | fp16/g64")
    assert not list(out.glob("*.part"))


def test_finish_refuses_an_incomplete_checkpoint(tmp_path, llama):
    writer, shards = writer_for(llama, tmp_path / "out", rules("int6 | fp16/g64"))
    writer.write_shard(0, shards[0])
    writer.write_shard(2, shards[2])
    with pytest.raises(UserError, match="model-00002-of-00003.safetensors is missing"):
        writer.finish()
    lacking = {k: v for k, v in shards[1].items() if "up_proj" not in k}
    writer.write_shard(1, lacking)
    with pytest.raises(UserError, match=r"no shard holds model\.layers\.1\.mlp\.up_proj"):
        writer.finish()
    writer.write_shard(1, {**shards[1], **shards[2]})
    with pytest.raises(UserError, match="is also in"):
        writer.finish()


def test_the_writer_keeps_off_other_checkpoints(tmp_path, llama):
    with pytest.raises(UserError, match="own source"):
        writer_for(llama, llama, rules("int6 | fp16/g64"))
    other = save_llama(tmp_path / "other", num_hidden_layers=1)
    writer, shards = writer_for(llama, other, rules("int6 | fp16/g64"))
    with pytest.raises(UserError, match=r"another checkpoint \(model.safetensors\)"):
        writer.write_shard(0, shards[0])
    assert load(other).config.num_hidden_layers == 1


def test_a_weight_of_another_shape_is_refused(tmp_path, llama):
    writer, _ = writer_for(llama, tmp_path / "out", rules("int6 | fp16/g64"))
    with pytest.raises(ValueError, match="planned"):
        writer.module_tensors(
            "model.layers.0.mlp.up_proj", quantize(torch.zeros(4, 64), "int6 | fp16/g64")
        )


def test_branches_and_experts_have_reasons_of_their_own():
    plan = LayerPlan(spec("int6 | fp16/g64"))
    assert choose_format({"a": plan}, {"a": (8, 64)}).name == "compressed-tensors"
    assert "3-D" in choose_format({"a": plan}, {"a": (2, 8, 64)}).reason
    branched = LayerPlan(plan.weight, None, (LowRankPlan(8),))
    assert "branches" in choose_format({"a": branched}, {"a": (8, 64)}).reason
