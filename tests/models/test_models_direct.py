"""Laws of the short way to a decoder: it says the same to the bit as the decoder of the loaded
model, or leaves the checkpoint to `models.load`."""

import json
import subprocess
import sys

import pytest
import torch
from models_written import save_llama, write
from safetensors.torch import load_file, save_file
from test_models_decoding import CASES, build, tokens
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from posttrain import kernels
from posttrain.errors import UserError
from posttrain.lm.chat import Conversation
from posttrain.lm.local import prompt_ids, stop_tokens
from posttrain.models.decoding import MODEL_TYPES, decoder
from posttrain.models.direct import (
    FIELDS,
    REQUIRED,
    Angles,
    DirectModel,
    Unfamiliar,
    open_direct,
    parameter_shapes,
    read_decoder,
    read_fields,
)
from posttrain.models.load import load
from posttrain.models.plan import Plan
from posttrain.models.tokenizer import PlainTokenizer

pytestmark = pytest.mark.skipif(not kernels.available(), reason=kernels.find().reason)

UNKNOWN_ROPES = {"llama, dynamic", "llama, yarn", "llama, longrope"}
KNOWN = sorted(set(CASES) - UNKNOWN_ROPES)


def direct_decoder(path):
    raw = json.loads((path / "config.json").read_text())
    return read_decoder(path, raw, read_fields(raw))


def logits(native, ids=None, cache="fp16"):
    ids = tokens(61) if ids is None else ids
    return native.forward([(native.memory(cache=cache), ids)], keep=None)


def change(path, **fields):
    """Change fields of config.json; None removes one."""
    file = path / "config.json"
    raw = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in raw.items() if value is not None}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", KNOWN)
def test_logits_are_those_of_the_loaded_model(case, dtype, tmp_path):
    build(case).to(dtype).save_pretrained(tmp_path)
    assert torch.equal(logits(direct_decoder(tmp_path)), logits(decoder(load(tmp_path))))


@pytest.mark.parametrize("case", sorted(UNKNOWN_ROPES))
def test_other_rotary_scalings_are_left_to_transformers(case, tmp_path):
    build(case).save_pretrained(tmp_path)
    with pytest.raises(Unfamiliar, match="rotary"):
        direct_decoder(tmp_path)


def null(path, *fields):
    file = path / "config.json"
    raw = json.loads(file.read_text()) | dict.fromkeys(fields)
    file.write_text(json.dumps(raw))


# case -> what is done to its config; where null is a rule of transformers', or a name means another thing.
REWRITTEN = {
    "smollm3": lambda path: null(path, "no_rope_layers"),
    "gemma2": lambda path: null(path, "layer_types"),
    "gemma3": lambda path: null(path, "layer_types"),
    "qwen3": lambda path: null(path, "head_dim"),
    "gemma": lambda path: change(path, hidden_act="gelu"),
    "qwen2": lambda path: change(
        path, sliding_window=5, layer_types=["full_attention", "sliding_attention"] * 2
    ),
    "llama": lambda path: change(path, is_causal=False),
}


@pytest.mark.parametrize("case", REWRITTEN)
def test_a_rule_of_transformers_is_left_to_it(case, tmp_path):
    build(case).save_pretrained(tmp_path)
    direct_decoder(tmp_path)
    REWRITTEN[case](tmp_path)
    with pytest.raises(Unfamiliar):
        direct_decoder(tmp_path)


@pytest.mark.parametrize("case", ["qwen2", "qwen3"])
def test_a_window_that_is_not_used_is_none(case, tmp_path):
    build(case).save_pretrained(tmp_path)
    change(tmp_path, sliding_window=5)
    assert torch.equal(logits(direct_decoder(tmp_path)), logits(decoder(load(tmp_path))))


@pytest.mark.parametrize("case", KNOWN)
def test_parameters_and_angles_are_those_of_transformers(case, tmp_path):
    model = build(case)
    model.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    config = read_fields(raw)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    assert parameter_shapes(config) == shapes
    native = decoder(model)
    angles = Angles(raw, config)
    for rope in native._ropes:
        for start, stop in ((0, 1), (0, 700), (5000, 5017)):
            theirs = native._angles(rope, start, stop)
            assert torch.equal(angles(rope, start, stop), theirs)


def test_defaults_are_those_of_transformers():
    from transformers import AutoConfig

    assert set(FIELDS) == set(MODEL_TYPES)
    for model_type, fields in FIELDS.items():
        config = AutoConfig.for_model(model_type)
        for name, default in fields.items():
            if default is REQUIRED or name in ("layer_types", "head_dim"):
                continue  # filled in by rules of their own
            assert (getattr(config, name) or None) == (default or None), (model_type, name)


# name -> (format it is written in, weight, input, rotated)
FORMATS = {
    "groups": ("compressed-tensors", "int4 | fp16/g32", None, False),
    "channels": ("compressed-tensors", "int8t | fp32/row", "int8h | fp32/row", False),
    "six bits": ("compressed-tensors", "int6 | fp16/g64", "int8h | fp32/row", False),
    "4-bit floats": ("compressed-tensors", "nvfp4", None, False),
    "rotated": ("posttrain", "int6 | fp16/g64", "int8h | fp32/row", True),
    "rotated, 4 bits": ("posttrain", "int4 | fp16/g32", "int8h | fp32/row", True),
    "zero points": ("posttrain", "int4z | fp16/g32", None, False),
    "nested scales": ("posttrain", "nf4-dq", None, False),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_quantized_logits_are_those_of_the_loaded_model(name, tied, tmp_path):
    source = save_llama(tmp_path / "source", tie_word_embeddings=tied)
    out = tmp_path / "out"
    form, weight, inputs, rotate = FORMATS[name]
    layer = {"match": "*", "weight": weight, "input": inputs}
    layer |= {"rotate": True} if rotate else {}
    plan = Plan.from_dict({"layers": [layer], "ignore": ["*.0.self_attn.o_proj"]})
    assert write(source, out, plan).format.name == form
    ids = [i % 96 for i in tokens(40)]
    expected = logits(decoder(load(out)), ids)
    assert torch.equal(logits(direct_decoder(out), ids), expected)


@pytest.mark.parametrize("head", ["int8 | fp16/row", "int8 | fp32/row, rotate: true"])
def test_a_quantized_tied_head_is_one_weight_with_the_embedding(head, tmp_path):
    from posttrain.quantize import quantize

    source = save_llama(tmp_path / "source")
    tokenizer_files(source)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        'layers: [{match: "*", weight: int6 | fp16/g32}, '
        f"{{match: lm_head, weight: {head}}}]\nsolver: rtn\n"
    )
    quantize(source, recipe=recipe, out=tmp_path / "out", progress=False)
    native = direct_decoder(tmp_path / "out")
    assert native.embedding is native.head.weight
    ids = [i % 96 for i in tokens(40)]
    assert torch.equal(logits(native, ids), logits(decoder(load(tmp_path / "out")), ids))


# ------------------------------------------------------------------------------ what is left alone


def extra_tensor(path):
    tensors = load_file(path / "model.safetensors")
    save_file(
        tensors | {"model.extra": torch.ones(3)}, path / "model.safetensors", {"format": "pt"}
    )


def missing_tensor(path):
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def other_shape(path):
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(3)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


STRANGE = {
    "an extra tensor": extra_tensor,
    "a missing tensor": missing_tensor,
    "another shape": other_shape,
    "no config": lambda path: (path / "config.json").unlink(),
    "no JSON": lambda path: (path / "config.json").write_text("{"),
    "an unfinished directory": lambda path: (path / "posttrain-unfinished.json").write_text("{}"),
    "a cut file": lambda path: (path / "model.safetensors").write_bytes(b"\x08"),
    "another architecture": lambda path: change(path, model_type="gpt2"),
    "an unknown field": lambda path: change(path, attention_temperature=2.0),
    "a missing field": lambda path: change(path, num_key_value_heads=None),
    "a field of another type": lambda path: change(path, hidden_size="48"),
    "an unknown activation": lambda path: change(path, hidden_act="mish"),
    "an unknown scaling": lambda path: change(path, rope_parameters={"rope_type": "new"}),
    "a scaling that is no mapping": lambda path: change(path, rope_parameters=[1]),
    "no causal model": lambda path: change(path, architectures=["LlamaForTokenClassification"]),
    "no tokenizer": lambda path: (path / "tokenizer.json").unlink(),
    "another tool's format": lambda path: change(path, quantization_config={"quant_method": "x"}),
}


@pytest.mark.parametrize("what", STRANGE)
def test_what_is_not_known_for_certain_is_left_alone(what, tmp_path):
    build("llama").save_pretrained(tmp_path)
    tokenizer_files(tmp_path)
    assert isinstance(open_direct(tmp_path), DirectModel)
    STRANGE[what](tmp_path)
    assert open_direct(tmp_path) is None
    try:
        loaded = load(tmp_path)
    except UserError as error:
        with pytest.raises(UserError) as found:
            Conversation(tmp_path)
        assert str(found.value) == str(error)
    else:
        assert type(Conversation(tmp_path).model) is type(loaded)


# ------------------------------------------------------------------------------ the tokenizer

MESSAGES = [
    {"role": "system", "content": "Be <b>brief</b>."},
    {"role": "user", "content": "né 世界 🙂  <|im_end|> x"},
]
TEMPLATES = {
    "plain": "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>\n{% endfor %}",
    "blocks": "{%- for m in messages %}\n  {% if loop.first %}\n{{ m.role }}\n  {% endif %}\n{% endfor %}",
    "specials": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ unk_token }}",
    "tojson": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}",
    "loop controls": "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %}{% endfor %}",
    "date": "{{ strftime_now('%Y') }}{% set ns = namespace(x=1) %}{% set ns.x = 2 %}{{ ns.x }}",
    "prompt": "{{ messages[1].content }}{% if add_generation_prompt %}<|im_start|>{% endif %}",
    "tools": "{% if tools %}x{% endif %}{% if tools is none %}none{% endif %}{{ documents }}",
}


def tokenizer_files(path, template=TEMPLATES["plain"]):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(["<|end|>", *alphabet])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|end|>", bos_token="<|im_start|>"
    )
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = template
    made.save_pretrained(path)
    file = path / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config.pop("extra_special_tokens", None)
    file.write_text(json.dumps(config))


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_those_of_transformers(name, tmp_path):
    build("llama").save_pretrained(tmp_path)
    tokenizer_files(tmp_path, TEMPLATES[name])
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ours = PlainTokenizer.read(tmp_path, "llama")
    assert isinstance(ours, PlainTokenizer)
    text = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert ours.apply_chat_template(MESSAGES, add_generation_prompt=True) == text
    for prompt in (MESSAGES, "né 世界 🙂  <|im_end|> x", " "):
        ids = prompt_ids(theirs, prompt)
        assert torch.equal(prompt_ids(ours, prompt), ids)
        for skip in (True, False):
            said = theirs.decode(ids.tolist(), skip_special_tokens=skip)
            assert ours.decode(ids.tolist(), skip_special_tokens=skip) == said
    model = build("llama")
    assert stop_tokens(model, ours) == stop_tokens(model, theirs)
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)


def test_a_template_that_refuses_is_reported_alike(tmp_path):
    build("llama").save_pretrained(tmp_path)
    tokenizer_files(tmp_path, "{{ raise_exception('who?') }}")
    for tokenizer in (
        PlainTokenizer.read(tmp_path, "llama"),
        AutoTokenizer.from_pretrained(tmp_path),
    ):
        with pytest.raises(UserError, match="template refuses these messages: who"):
            prompt_ids(tokenizer, MESSAGES)


@pytest.mark.parametrize(
    "change_config",
    [
        {"tokenizer_class": "LlamaTokenizer"},
        {"split_special_tokens": True},
        {"clean_up_tokenization_spaces": True},
        {"eos_token": "<|new|>"},
        {"chat_template": [{"name": "default", "template": "x"}]},
        {"added_tokens_decoder": {"1": {"content": "a", "special": False}}},
    ],
)
def test_other_tokenizers_are_left_to_transformers(change_config, tmp_path):
    tokenizer_files(tmp_path)
    assert PlainTokenizer.read(tmp_path, "llama") is not None
    assert PlainTokenizer.read(tmp_path, "qwen2") is None
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change_config))
    if "chat_template" in change_config:
        (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    assert PlainTokenizer.read(tmp_path, "llama") is None


def test_a_chat_needs_no_transformers(tmp_path):
    build("llama", seed=1).save_pretrained(tmp_path)
    tokenizer_files(tmp_path)
    code = (
        "import sys, posttrain.lm.chat as c; from posttrain.models.direct import open_direct;"
        f"assert open_direct({str(tmp_path)!r}); assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
