"""An output head that is tied with the embedding: quantized once, where a rule names it."""

import json

import pytest
import torch

import posttrain
from posttrain import kernels
from posttrain.errors import UserError
from posttrain.lm.engine import engine
from posttrain.models.linear import QuantLinear, TiedEmbedding
from posttrain.models.rotation import rotate
from posttrain.quantize import quantize

ALL = '{match: "*", weight: int6 | fp16/g32}'
HEADS = {
    "rows": '{match: lm_head, weight: int8 | fp16/row}',
    "groups, quantized input": '{match: lm_head, weight: int8 | fp16/g32, input: int8h | fp32/g32}',
    "rotated": '{match: lm_head, weight: int8 | fp32/row, input: int8h | fp32/row, rotate: true}',
    "rotated, not rounded": '{match: lm_head, weight: int6h | fp16/g64, rotate: true}',
    "zero points": '{match: "lm_*", weight: uint4z | fp16/g32}',
    "per tensor": '{match: lm_head, weight: int8 | fp32/tensor}',
    "nested scales": '{match: lm_head, weight: nf4-dq}',
}  # fmt: skip
IDS = torch.arange(50).reshape(2, 25)


def run(model, tmp_path, rules, more=""):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"layers: [{ALL}, {rules}]\nsolver: rtn\n{more}")
    quantize(model, recipe=recipe, out=tmp_path / "out", progress=False)
    return tmp_path / "out"


def logits(model):
    with torch.inference_mode():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("head", HEADS)
def test_it_is_stored_once_and_loads_alike_everywhere(head, tiny, tmp_path):
    from transformers import AutoModelForCausalLM

    source = tiny("Llama", hidden_size=64, tie_word_embeddings=True)
    out = run(source, tmp_path, HEADS[head])
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["tied"] == {"model.embed_tokens": "lm_head"}
    assert config["tie_word_embeddings"] is False
    ours = posttrain.load(out, dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    reference = logits(ours)
    assert torch.equal(logits(theirs), reference)
    assert isinstance(ours.lm_head, QuantLinear)
    assert isinstance(ours.model.embed_tokens, TiedEmbedding)
    table = ours.lm_head.qweight().dequantize()
    table = rotate(table) if ours.lm_head.layer.rotate else table
    assert torch.equal(ours.model.embed_tokens.weight, table)
    assert torch.equal(ours.model.embed_tokens(IDS), table[IDS])
    plain = posttrain.load(source, dtype="float32")
    words = plain.model.embed_tokens.weight
    assert (table - words).abs().max() < 0.2 * words.abs().max()
    assert ours.posttrain["parameters"] == plain.posttrain["parameters"]
    assert (logits(plain) - reference).abs().max() < 0.3 * logits(plain).abs().max()
    if not kernels.available():
        return
    runner = engine(ours)
    assert runner.name == kernels.isa()
    got = runner.forward([(runner.session(cache="fp32"), IDS[0].tolist())], keep=None)
    share = 1e-2 if "input" in HEADS[head] else 2e-5
    assert (got - reference[0]).abs().max() <= share * reference.abs().max()
    assert torch.equal(logits(ours), reference)  # from the codes in the kernels' layout


def test_a_rule_for_everything_leaves_it_alone(tiny, tmp_path):
    out = run(tiny("Llama", tie_word_embeddings=True), tmp_path, ALL)
    model = posttrain.load(out)
    assert isinstance(model.lm_head, torch.nn.Linear)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_ignore_wins_over_a_rule_that_names_it(tiny, tmp_path):
    out = run(
        tiny("Llama", tie_word_embeddings=True), tmp_path, HEADS["rows"], "ignore: [lm_head]\n"
    )
    assert isinstance(posttrain.load(out).lm_head, torch.nn.Linear)


def test_a_head_is_solved_in_parts_to_the_same_codes(tiny, tmp_path, monkeypatch):
    source = tiny("Llama", tie_word_embeddings=True)
    (tmp_path / "a").mkdir()
    whole = posttrain.load(run(source, tmp_path, HEADS["zero points"])).lm_head
    monkeypatch.setattr("posttrain.quantize.pipeline.HEAD_PART", 700)
    parts = posttrain.load(run(source, tmp_path / "a", HEADS["zero points"])).lm_head
    for name, tensor in whole.stored_buffers().items():
        assert torch.equal(tensor, parts.stored_buffers()[name])


def test_an_embedding_that_scales_is_refused(tiny, tmp_path):
    with pytest.raises(UserError, match="ScaledWordEmbedding.*ignore"):
        run(tiny("Gemma", head_dim=16), tmp_path, HEADS["rows"])


def test_a_config_that_ties_to_nothing_is_refused(tiny, tmp_path):
    out = run(tiny("Llama", tie_word_embeddings=True), tmp_path, HEADS["rows"])
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["tied"] = {"model.embed_tokens": "head"}
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="'tied' must map"):
        posttrain.load(out)
