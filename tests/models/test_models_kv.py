"""Which formats a KV cache can have, how they travel in recipes and checkpoints, what they cost."""

import pytest
import torch
from models_written import rules, save_llama, write
from test_models_decoding import build
from test_models_direct import tokenizer_files
from transformers import AutoConfig

from posttrain import kernels
from posttrain.errors import UserError
from posttrain.lm.chat import Conversation
from posttrain.lm.engine import engine
from posttrain.models import native
from posttrain.models.checkpoint import choose_format
from posttrain.models.direct import open_direct
from posttrain.models.kv import NAMES, describe_kv, parse_kv, stored_kv
from posttrain.models.load import load
from posttrain.models.plan import Plan
from posttrain.numbers import spec

LAYERS = [{"match": "*", "weight": "int6 | fp16/g64"}]


@pytest.mark.parametrize(
    "kv", [*NAMES, "fp16", "fp32", "nf4 | fp16/g32", "mxfp8", "e4m3", "int4z | fp16/row"]
)
def test_a_plan_carries_the_format_of_the_cache(kv):
    plan = Plan.from_dict({"layers": LAYERS, "kv": kv})
    assert plan.kv == spec(NAMES.get(kv, kv))
    assert Plan.from_dict(plan.to_dict()) == plan
    assert "kv" not in Plan.from_dict({"layers": LAYERS}).to_dict()


@pytest.mark.parametrize(
    ("kv", "says"),
    [
        ("int8 | fp16/col", "scales over several tokens"),
        ("int8 | fp16/tensor", "scales over several tokens"),
        ("int4 | fp16/flat32", "scales over several tokens"),
        ("nvfp4", "scales over several tokens"),
        ("int6", "int6 has no scale"),
        ("int4@sr | fp16/row", "rounds by chance"),
        ("int44", "unknown format or preset 'int44'"),
        (8, "found 8"),
    ],
)
def test_what_no_cache_can_have_is_named(kv, says):
    with pytest.raises(UserError, match=rf"(?s)^plan: kv: .*{says}"):
        Plan.from_dict({"layers": LAYERS, "kv": kv})


def test_what_a_format_takes():
    config = AutoConfig.for_model(
        "llama", num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, hidden_size=256
    )
    found = describe_kv(parse_kv("int4"), config)
    assert found == {
        "kv": "int4 | fp16/row", "kv_bits_per_value": 4.25,
        "kv_bytes_per_token": 3 * 2 * 2 * (64 * 4 + 16) / 8,
    }  # fmt: skip
    assert describe_kv(parse_kv("fp16"), config)["kv_bits_per_value"] == 16
    hybrid = AutoConfig.for_model("qwen3_next", num_hidden_layers=8)
    full = hybrid.layer_types.count("full_attention")
    row = 2 * hybrid.num_key_value_heads * hybrid.head_dim * 4
    assert 0 < full < 8 and describe_kv(spec("fp32"), hybrid)["kv_bytes_per_token"] == full * row
    assert (
        describe_kv(spec("fp32"), AutoConfig.for_model("deepseek_v3"))["kv_bytes_per_token"] is None
    )


@pytest.mark.skipif(not kernels.available(), reason=kernels.find().reason)
def test_the_bytes_are_those_of_the_native_cache():
    model = build("llama, wide heads")
    for kv in ("fp16", *NAMES):
        runner = engine(model, kv)
        session = runner.session(16)
        runner.forward([(session, range(3, 19))])
        assert (
            session.nbytes == 16 * describe_kv(runner.keeps(), model.config)["kv_bytes_per_token"]
        )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A checkpoint that says int8, of a model that compressed-tensors could say otherwise."""
    folder = tmp_path_factory.mktemp("kv")
    plan = Plan.from_dict(rules("int6 | fp16/g64").to_dict() | {"kv": "int8"})
    source = save_llama(folder / "llama")
    tokenizer_files(source)
    return write(source, folder / "out", plan)


def test_a_checkpoint_says_what_its_cache_is_kept_in(written):
    assert written.format.name == native.METHOD
    assert "kv_cache_scheme has no scale for each token" in written.format.reason
    model = load(written.out_dir)
    assert stored_kv(model.config) == engine(model).keeps() == parse_kv("int8")
    assert engine(model, "fp32").keeps() == spec("fp32")
    layers = {name: layer for name, layer in written.layers.items() if "down" in name}
    assert choose_format(layers, written.shapes).name == "compressed-tensors"


@pytest.mark.skipif(not kernels.available(), reason=kernels.find().reason)
def test_a_conversation_keeps_it_so_without_being_told(written):
    direct = open_direct(written.out_dir)
    assert engine(direct).session().cache == "int8"
    for kv, kept, computes in ((None, "int8", kernels.isa()), ("int4 | fp16/g8", "int4", "torch")):
        facts = Conversation(written.out_dir, kv=kv).facts()
        assert facts["kv"].startswith(kept) and facts["implementation"] == computes
        assert len(facts["notes"]) == (computes == "torch")


def test_transformers_own_loop_keeps_it_so_too(written):
    """Its beams: scored with rounded keys and values, they are others than with exact ones."""
    model = load(written.out_dir)
    ids = torch.arange(3, 30)[None]
    options = {"max_new_tokens": 2, "num_beams": 2, "output_scores": True, "do_sample": False}
    options |= {"return_dict_in_generate": True, "pad_token_id": 0}
    from posttrain.lm.tokens import generate_tokens

    said = generate_tokens(model, ids, options)
    model.config.quantization_config = {}
    exact = generate_tokens(model, ids, options)
    gap = (said.scores[1] - exact.scores[1]).abs()
    assert 0 < gap[gap.isfinite()].max() < 1


@pytest.mark.parametrize("kv", ["int99 | fp16/row", "int8 | fp16/tensor"])
def test_a_bad_format_in_a_checkpoint_is_named(written, kv):
    config = written.config()["quantization_config"]
    assert config["kv"] == "int8 | fp16/row"
    with pytest.raises(UserError, match="quantization_config.kv"):
        native.read_config(config | {"kv": kv}, "config.json")
