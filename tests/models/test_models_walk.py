"""Walking: a skeleton filled from a source is the model, and every big weight is found."""

import pytest
import torch
from models_tiny import MIXTURES, TINY, save_tiny, tiny_model, tokens
from torch import nn
from transformers import AutoModelForCausalLM

from posttrain.errors import UserError
from posttrain.models.source import open_source
from posttrain.models.walk import (
    assign,
    decoder_blocks,
    fusion_groups,
    quantizable,
    skeleton,
)


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


@pytest.mark.parametrize("name", TINY)
def test_skeleton_filled_from_source_equals_from_pretrained(name, tmp_path):
    save_tiny(name, tmp_path, shards=True)
    source = open_source(tmp_path)
    model = skeleton(source.config)
    assert all(p.is_meta for p in model.parameters())
    for tensor_name in source.tensor_names():  # one by one, as the pipeline streams
        values = source.read([tensor_name])
        value = values[tensor_name]
        assert tuple(value.shape) == source.shape(tensor_name)
        assert value.dtype == source.dtype(tensor_name)
        assert value.numel() * value.element_size() == source.nbytes(tensor_name)
        assign(model, "", values)
    left = [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    assert left == []
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    ours, theirs = model.state_dict(), reference.state_dict()
    assert {n: t.dtype for n, t in ours.items()} == {n: t.dtype for n, t in theirs.items()}
    for tensor_name, value in theirs.items():
        assert torch.equal(ours[tensor_name], value), tensor_name
    assert torch.equal(logits(model), logits(reference))


def test_what_an_architecture_keeps_in_float32_stays_so(tmp_path, monkeypatch):
    keep = "transformers.models.llama.modeling_llama.LlamaForCausalLM._keep_in_fp32_modules_strict"
    monkeypatch.setattr(keep, ["layernorm"])
    save_tiny("llama-bf16", tmp_path)
    source = open_source(tmp_path)
    model = skeleton(source.config)
    assign(model, "", source.read(source.tensor_names()))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    kinds = {n: t.dtype for n, t in reference.state_dict().items()}
    assert set(kinds.values()) == {torch.float32, torch.bfloat16}
    assert {n: t.dtype for n, t in model.state_dict().items()} == kinds


@pytest.mark.parametrize("name", TINY)
def test_tensor_names_are_the_state_dict_with_ties_once(name, tmp_path):
    model = save_tiny(name, tmp_path)
    state = model.state_dict(keep_vars=True)
    distinct = {id(t): n for n, t in reversed(state.items())}
    source = open_source(tmp_path)
    assert set(source.tensor_names()) == set(distinct.values())


@pytest.mark.parametrize("name", TINY)
def test_blocks_cover_all_big_weights(name):
    """Every 2-D or 3-D block parameter is a target, a router or a convolution."""
    model = skeleton(tiny_model(name).config)
    blocks = decoder_blocks(model)
    assert len(blocks) == model.config.num_hidden_layers
    if name == "gpt2":
        with pytest.raises(UserError, match=r"transformer\.h\.0\.attn\.c_attn is a Conv1D"):
            quantizable(*blocks[0])
        return
    for block_name, block in blocks:
        assert model.get_submodule(block_name) is block
        targets = quantizable(block_name, block)
        claimed = {p for target in targets.values() for p in target.parameters.values()}
        for local, parameter in block.named_parameters():
            full = f"{block_name}.{local}"
            known = (
                "mlp.gate.weight",
                "router.weight",
                "router.bias",
                "conv1d.weight",
                "score_correction_bias",
            )
            assert full in claimed or parameter.dim() < 2 or full.endswith(known), full


@pytest.mark.parametrize("name", [n for n in TINY if n != "gpt2"])
def test_target_shapes_and_kinds(name):
    model = skeleton(tiny_model(name).config)
    for block_name, block in decoder_blocks(model):
        targets = quantizable(block_name, block)
        kinds = {target.kind for target in targets.values()}
        assert kinds == ({"linear", "experts"} if name in MIXTURES else {"linear"})
        for full, target in targets.items():
            assert model.get_parameter(target.parameters["weight"]).shape == target.shape
            if target.kind == "linear":
                module = model.get_submodule(full)
                assert target.shape == (module.out_features, module.in_features)
                assert ("bias" in target.parameters) == (module.bias is not None)
            else:
                assert len(target.shape) == 3
                assert target.transposed == (name in ("gpt-oss", "llama4"))


def test_blocks_are_found_in_one_layer_models_and_not_inside_experts():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.small = nn.ModuleList([nn.Linear(2, 2)])
            self.inner = nn.Module()
            self.inner.stack = nn.ModuleList([Block()])

    assert [name for name, _ in decoder_blocks(Model())] == ["inner.stack.0"]


def test_a_model_without_a_block_list_is_refused():
    with pytest.raises(UserError, match="no list of decoder blocks in Sequential"):
        decoder_blocks(nn.Sequential(nn.Linear(2, 2)))


def test_skeleton_draws_no_random_numbers():
    config = tiny_model("gemma3").config
    before = torch.get_rng_state()
    skeleton(config)
    assert torch.equal(before, torch.get_rng_state())


def test_skeleton_buffers_are_real_and_equal_to_the_constructors():
    for name in ("llama", "gemma3", "gpt2", "smollm3"):
        built = tiny_model(name)
        walked = dict(skeleton(built.config).named_buffers())
        for buffer_name, value in built.named_buffers():
            assert torch.equal(walked[buffer_name], value), (name, buffer_name)


def test_skeleton_honours_dtype():
    config = tiny_model("llama").config
    before = config.to_dict()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert {p.dtype for p in skeleton(config, dtype).parameters()} == {dtype}
    assert config.to_dict() == before


# ---------------------------------------------------------------------------------- fusion groups


@pytest.mark.parametrize(
    "leaves, expected",
    [
        (["q_proj", "k_proj", "v_proj", "o_proj"], [("q_proj", "k_proj", "v_proj"), ("o_proj",)]),
        (["gate_proj", "up_proj", "down_proj"], [("gate_proj", "up_proj"), ("down_proj",)]),
        (["w1", "w2", "w3"], [("w1", "w3"), ("w2",)]),
        (["query_key_value", "dense"], [("query_key_value",), ("dense",)]),
        (["up_proj", "gate_proj"], [("up_proj", "gate_proj")]),
        (["k_proj"], [("k_proj",)]),
    ],
)
def test_fusion_of_siblings(leaves, expected):
    def full(leaf):
        return f"model.layers.3.part.{leaf}"

    assert fusion_groups(map(full, leaves)) == [tuple(map(full, group)) for group in expected]


def test_fusion_stays_within_a_parent_and_joins_experts():
    assert fusion_groups(["a.0.q_proj", "a.1.q_proj", "a.1.k_proj"]) == [
        ("a.0.q_proj",),
        ("a.1.q_proj", "a.1.k_proj"),
    ]
    names = [f"m.experts.{e}.{w}" for e in range(3) for w in ("w1", "w2", "w3")]
    assert fusion_groups(names) == [
        tuple(n for n in names if not n.endswith("w2")),
        tuple(n for n in names if n.endswith("w2")),
    ]


@pytest.mark.parametrize("name", [n for n in TINY if n != "gpt2"])
def test_fusion_groups_partition_the_targets(name):
    model = skeleton(tiny_model(name).config)
    names = [n for block in decoder_blocks(model) for n in quantizable(*block)]
    groups = fusion_groups(names)
    assert sorted(n for group in groups for n in group) == sorted(names)


# ----------------------------------------------------------------------------------------- assign


def test_assign_to_a_block_by_its_prefix():
    source_model = tiny_model("llama")
    model = skeleton(source_model.config)
    name, block = decoder_blocks(model)[1]
    state = {n: t for n, t in source_model.state_dict().items() if n.startswith(name + ".")}
    assign(block, name, state, torch.float32)
    for full, value in state.items():
        assert torch.equal(model.get_parameter(full), value)
    assert model.model.layers[0].mlp.up_proj.weight.is_meta


def test_assign_shares_tensors_without_copying_when_the_dtype_fits():
    model = skeleton(tiny_model("llama-tied").config)
    value = torch.randn(96, 32)
    assign(model, "", {"model.embed_tokens.weight": value})
    assert model.model.embed_tokens.weight.data_ptr() == value.data_ptr()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_assign_casts_to_the_dtype_asked_for():
    model = skeleton(tiny_model("llama").config)
    assign(model, "", {"model.norm.weight": torch.ones(32, dtype=torch.float64)}, torch.float16)
    assert model.model.norm.weight.dtype == torch.float16


@pytest.mark.parametrize(
    "prefix, name, shape, message",
    [
        ("", "model.norm.bias", (32,), "tensor model.norm.bias has no place in LlamaForCausalLM"),
        ("", "nowhere.weight", (32,), "has no place"),
        ("", "model.norm.weight", (31,), r"has shape \[31\], the model expects \[32\]"),
        ("model.layers.0", "model.norm.weight", (32,), "does not belong to module model.layers.0"),
    ],
)
def test_assign_refuses_what_does_not_fit(prefix, name, shape, message):
    model = skeleton(tiny_model("llama").config)
    module = model.get_submodule(prefix)
    with pytest.raises(UserError, match=message):
        assign(module, prefix, {name: torch.ones(shape)})
