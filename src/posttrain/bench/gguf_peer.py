"""A GGUF file of the same model for llama.cpp, in the type nearest to our width.

A GGUF source is requantized by llama.cpp itself. A directory of the Llama family is first written
as a GGUF file of floats without a vocabulary and without scalings of the rotary angles: enough to
measure speed, not to read its answers.
"""

import ctypes
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from posttrain.bench.origin import open_plain, origin_of, report_of
from posttrain.errors import UserError
from posttrain.models.gguf import PROJECTIONS
from posttrain.models.source import open_source

# llama.cpp's types -> the bits that they store a weight in, scales included.
TYPES = {
    "Q2_K": 2.625, "Q3_K_S": 3.4375, "Q4_0": 4.5, "Q5_0": 5.5, "Q6_K": 6.5625, "Q8_0": 8.5,
    "BF16": 16.0, "F32": 32.0,
}  # fmt: skip
# What a model that is not quantized is computed in -> the type that stores the same.
FLOATS = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
WRITABLE = ("llama", "mistral")
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_GGUF = {ours: theirs for theirs, ours in PROJECTIONS.items()} | {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def nearest_type(model: str) -> str:
    """The GGUF type to compare a model with: the nearest to the mean width of its quantized blocks,
    or to what they are computed in where none is quantized."""
    layers = report_of(model).get("layers", [])
    inside = [layer for layer in layers if layer["name"] != "lm_head"]
    if not inside:
        return FLOATS.get(open_source(model).config.dtype, "F32")
    sizes = [math.prod(layer["shape"]) for layer in inside]
    stored = sum(n * layer["bits_per_weight"] for n, layer in zip(sizes, inside, strict=True))
    bits = stored / sum(sizes)
    return min(TYPES, key=lambda name: abs(TYPES[name] - bits))


def gguf_of(
    model: str, kind: str, folder: Path, importance: Mapping[str, torch.Tensor] | None = None
) -> Path:
    """A GGUF file of type `kind` in `folder`, of the model that `model` was quantized from.

    importance: for linears of its blocks, by name, the mean square of each input channel over some
    text, float32 [in]: what llama.cpp calls an importance matrix.
    """
    source = open_plain(origin_of(model), "llama.cpp")
    plain = source.path
    if source.kind != "gguf":
        dtype = torch.float32 if kind == "F32" else torch.float16
        plain = _written(source, folder / "plain.gguf", dtype)
    suffix = "" if importance is None else "-imatrix"
    return _requantized(plain, kind, folder / f"{kind}{suffix}.gguf", importance)


def _requantized(
    source: Path, kind: str, out: Path, importance: Mapping[str, torch.Tensor] | None
) -> Path:
    from llama_cpp import llama_cpp as c

    silence()
    how = c.llama_model_quantize_default_params()
    how.ftype = getattr(c, f"LLAMA_FTYPE_{'ALL' if kind == 'F32' else 'MOSTLY'}_{kind}")
    how.allow_requantize = True
    how.nthread = torch.get_num_threads()
    kept = {_gguf_name(name): value.contiguous() for name, value in (importance or {}).items()}
    floats = ctypes.POINTER(ctypes.c_float)
    entries = [
        c.llama_model_imatrix_data(name.encode(), ctypes.cast(value.data_ptr(), floats), len(value))
        for name, value in kept.items()
    ]
    if entries:  # an entry without a name ends the array
        how.imatrix = (c.llama_model_imatrix_data * (len(entries) + 1))(*entries)
    if c.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(how)):
        raise UserError(f"llama.cpp cannot write {source} as {kind}")
    return out


@cache  # llama.cpp keeps a pointer to the callback: what is cached stays alive
def silence() -> Any:
    """Let llama.cpp write no messages in this process from now on."""
    from llama_cpp import llama_cpp as c

    callback = c.llama_log_callback(lambda *_: None)
    c.llama_log_set(callback, None)
    return callback


def _written(source: Any, out: Path, dtype: torch.dtype) -> Path:
    """A Llama checkpoint as GGUF, its matrices in `dtype`."""
    import gguf

    config = source.config
    if config.model_type not in WRITABLE:
        raise UserError(
            f"{source.name}: no GGUF file can be made of a {config.model_type} model here, so "
            "llama.cpp cannot be compared; leave it out of --against"
        )
    writer = gguf.GGUFWriter(str(out), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(size)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    for name in source.tensor_names():
        value = source.read([name])[name]
        stored, tensor = _stored(name, value, config)
        array = tensor.to(torch.float32 if tensor.ndim == 1 else dtype).numpy()
        writer.add_tensor(stored, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def _stored(name: str, value: torch.Tensor, config: Any) -> tuple[str, torch.Tensor]:
    """The GGUF name and value of a tensor: rotary channels lie in pairs there."""
    stem, _, suffix = name.rpartition(".")
    stored = _gguf_name(stem, suffix)
    if stem in _TOP:
        return stored, value
    local = stem.split(".", 3)[-1]
    heads = {"self_attn.q_proj": config.num_attention_heads,
             "self_attn.k_proj": config.num_key_value_heads}.get(local)  # fmt: skip
    if heads:
        halves = value.reshape(heads, 2, -1, *value.shape[1:])
        value = halves.transpose(1, 2).reshape(value.shape)
    return stored, value


def _gguf_name(module: str, suffix: str = "weight") -> str:
    """What GGUF calls a parameter of this module."""
    if module in _TOP:
        return f"{_TOP[module]}.{suffix}"
    _, _, layer, local = module.split(".", 3)
    return f"blk.{layer}.{_GGUF[local]}.{suffix}"
