"""From GGUF metadata to a transformers config, one row per architecture.

Keys are llama.cpp's (gguf-py constants); what each architecture fixes in code rather than in the
file (Gemma's attention scale, SmolLM3's layers without rotary embedding) is taken from the same
places llama.cpp takes it from.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from posttrain.errors import UserError
from posttrain.models.base import one_line
from posttrain.models.gguf_file import GgufHeader
from posttrain.models.shards import OpenFiles

# config field -> metadata key without its architecture prefix
COMMON = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
TOKENS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
GEMMA_ACTIVATION = "gelu_pytorch_tanh"
# Llama 3's frequency scaling, the same in every Llama 3.x model; a GGUF file keeps only its result.
LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# transformers' name of a parameter of yarn -> its key, where both mean the same.
YARN = {
    "original_max_position_embeddings": "original_context_length",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
}
# What transformers has no parameter for -> the values that change nothing (-1 stands for unset).
YARN_FIXED = {
    "yarn_ext_factor": (1.0, -1.0),
    "yarn_attn_factor": (1.0,),
    "yarn_log_multiplier": (0.0,),
}

PLAIN_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
SANDWICH_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@dataclass(frozen=True)
class Architecture:
    """How one `general.architecture` becomes a transformers model.

    block: GGUF tensor stem -> module path inside a block, besides the projections all share.
    rotary_pairs: q and k rows are interleaved for ggml's rotary layout and must be put back.
    norm_offset: what the file adds to norm weights. fixed: config fields the architecture implies.
    optional: config field -> metadata key, taken when present.
    """

    model_type: str
    block: Mapping[str, str]
    rotary_pairs: bool = False
    norm_offset: float = 0.0
    fixed: Mapping[str, Any] = field(default_factory=dict)
    optional: Mapping[str, str] = field(default_factory=dict)


GEMMA2_OPTIONAL = {
    "sliding_window": "attention.sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
GEMMA = {"hidden_activation": GEMMA_ACTIVATION}
ARCHITECTURES = {
    "llama": Architecture("llama", PLAIN_NORMS, rotary_pairs=True),
    "smollm3": Architecture(
        "smollm3", PLAIN_NORMS, rotary_pairs=True, fixed={"no_rope_layer_interval": 4}
    ),
    "qwen2": Architecture("qwen2", PLAIN_NORMS),
    "qwen3": Architecture("qwen3", PLAIN_NORMS | HEAD_NORMS),
    "gemma": Architecture("gemma", PLAIN_NORMS, norm_offset=1.0, fixed=GEMMA),
    "gemma2": Architecture(
        "gemma2", SANDWICH_NORMS, norm_offset=1.0, fixed=GEMMA, optional=GEMMA2_OPTIONAL
    ),
    "gemma3": Architecture(
        "gemma3_text",
        SANDWICH_NORMS | HEAD_NORMS,
        norm_offset=1.0,
        fixed=GEMMA,
        optional={"sliding_window": "attention.sliding_window"},
    ),
}
# Number of layers of the one model of each family whose attention is scaled by hidden/heads
# instead of by the head size (llama.cpp's LLM_TYPE_27B).
WIDE_SCALE_LAYERS = {"gemma2": 46, "gemma3_text": 62}


def architecture(header: GgufHeader, file: Path) -> Architecture:
    """The row for this file; UserError for an architecture or a variant without one."""
    name = header.metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise UserError(
            f"{file}: unsupported GGUF architecture {name!r}; posttrain reads "
            f"{', '.join(ARCHITECTURES)}"
        )
    if header.metadata.get(f"{name}.expert_count"):
        raise UserError(
            f"{file}: a mixture of experts in GGUF is not supported; use its safetensors checkpoint"
        )
    return ARCHITECTURES[name]


def gguf_config(header: GgufHeader, file: Path) -> Any:
    """The transformers config of a GGUF file, config.dtype float32."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    row = architecture(header, file)
    fields = _fields(header, file, row)
    fields["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[row.model_type]]
    try:
        return AutoConfig.for_model(row.model_type, dtype=torch.float32, **fields)
    except Exception as error:  # config classes validate with many exception types
        raise UserError(f"{file}: its metadata makes no valid config: {one_line(error)}") from error


def _fields(header: GgufHeader, file: Path, row: Architecture) -> dict[str, Any]:
    data, arch = header.metadata, header.metadata["general.architecture"]
    fields: dict[str, Any] = dict(row.fixed)
    for name, key in COMMON.items():
        if f"{arch}.{key}" not in data:
            raise UserError(f"{file}: its metadata lacks {arch}.{key}")
        fields[name] = data[f"{arch}.{key}"]
    for name, key in row.optional.items():
        if f"{arch}.{key}" in data:
            fields[name] = data[f"{arch}.{key}"]
    fields |= {name: data.get(key) for name, key in TOKENS.items()}
    heads = fields["num_attention_heads"]
    if isinstance(heads, list):
        raise UserError(f"{file}: layers with different head counts are not supported")
    fields["num_key_value_heads"] = data.get(f"{arch}.attention.head_count_kv", heads)
    fields["head_dim"] = _head_dim(data, arch, fields)
    _check_values(data, f"{arch}.rope.", {"dimension_count": (fields["head_dim"],)}, file)
    fields["vocab_size"] = _rows(header, file, "token_embd.weight")
    fields["tie_word_embeddings"] = "output.weight" not in header.tensors
    if row.model_type == "llama":
        fields["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
    if row.model_type in WIDE_SCALE_LAYERS:
        wide = fields["num_hidden_layers"] == WIDE_SCALE_LAYERS[row.model_type]
        scale = fields["hidden_size"] // heads if wide else fields["head_dim"]
        fields["query_pre_attn_scalar"] = scale
    fields["rope_parameters"] = _rope(header, file, row, fields)
    return fields


def _rows(header: GgufHeader, file: Path, name: str) -> int:
    if name not in header.tensors:
        raise UserError(f"{file}: lacks the tensor {name}; it holds no language model")
    return header.tensors[name].shape[0]


def _head_dim(data: Mapping[str, Any], arch: str, fields: Mapping[str, Any]) -> int:
    default = fields["hidden_size"] // fields["num_attention_heads"]
    return int(data.get(f"{arch}.attention.key_length", default))


# ---------------------------------------------------------------------------------------- rotary


def _rope(
    header: GgufHeader, file: Path, row: Architecture, fields: Mapping[str, Any]
) -> dict[str, Any]:
    data, arch = header.metadata, header.metadata["general.architecture"]
    theta = float(data.get(f"{arch}.rope.freq_base", 10000.0))
    rope = {"rope_theta": theta} | _scaling(data, arch, file)
    if "rope_freqs.weight" in header.tensors:
        rope |= _llama3_scaling(header, file, theta, int(fields["head_dim"]))
    if row.model_type != "gemma3_text":
        return rope
    local = float(data.get(f"{arch}.rope.freq_base_swa", 10000.0))
    return {
        "full_attention": rope,
        "sliding_attention": {"rope_type": "default", "rope_theta": local},
    }


def _scaling(data: Mapping[str, Any], arch: str, file: Path) -> dict[str, Any]:
    """The scaling as llama.cpp reads it: linear where no type is named, off where nothing is."""
    prefix = f"{arch}.rope.scaling."
    factor = data.get(f"{prefix}factor", data.get(f"{arch}.rope.scale_linear"))
    kind = data.get(f"{prefix}type", "linear" if factor else "none")
    if kind not in ("none", "linear", "yarn"):
        raise UserError(f"{file}: rotary scaling {kind!r} is not supported (linear and yarn are)")
    if kind != "yarn":
        _check_values(data, prefix, {"attn_factor": (1.0,)}, file)
    if kind == "none":
        return {"rope_type": "default"}
    if factor is None:
        raise UserError(f"{file}: its rotary scaling is {kind!r}, but {prefix}factor is missing")
    rope = {"rope_type": kind, "factor": float(factor) or 1.0}
    return rope | _yarn(data, prefix, rope["factor"], file) if kind == "yarn" else rope


def _yarn(data: Mapping[str, Any], prefix: str, factor: float, file: Path) -> dict[str, Any]:
    """transformers' further parameters of yarn. Its `attention_factor` is the whole factor of the
    angles' cosines and sines, while attn_factor multiplies what yarn has by itself."""
    _check_values(data, prefix, YARN_FIXED, file)
    found = {name: data[prefix + key] for name, key in YARN.items() if prefix + key in data}
    attention = float(data.get(f"{prefix}attn_factor", 1.0))
    if attention != 1.0:
        found["attention_factor"] = attention * (1 + 0.1 * math.log(max(factor, 1.0)))
    return found


def _check_values(
    data: Mapping[str, Any], prefix: str, allowed: Mapping[str, tuple[float, ...]], file: Path
) -> None:
    for key, values in allowed.items():
        value = data.get(prefix + key, values[0])
        if value not in values:
            raise UserError(
                f"{file}: {prefix}{key} is {value}, which is not supported (only {values[0]} is)"
            )


def _llama3_scaling(header: GgufHeader, file: Path, theta: float, head_dim: int) -> dict[str, Any]:
    """Recognise Llama 3's frequency scaling in the table of factors that the file stores.

    The largest factor is the scaling factor itself; with the constants that all Llama 3.x models
    share, the whole table must come out again, or the scaling is an unknown one.
    """
    with OpenFiles() as files:
        stored = header.tensors["rope_freqs.weight"].read(files)
    rope = LLAMA3_ROPE | {"rope_type": "llama3", "factor": float(stored.max())}
    expected = llama3_factors(theta, head_dim, float(stored.max()))
    if stored.shape != expected.shape or not torch.allclose(stored, expected, rtol=1e-3):
        raise UserError(f"{file}: rope_freqs.weight holds a rotary scaling that is not Llama 3's")
    return rope


def llama3_factors(theta: float, head_dim: int, factor: float) -> torch.Tensor:
    """[head_dim/2]: by how much Llama 3.x divides each rotary frequency (1 for short waves)."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    waves = 2 * torch.pi * theta**exponent
    low, high = LLAMA3_ROPE["low_freq_factor"], LLAMA3_ROPE["high_freq_factor"]
    turns = LLAMA3_ROPE["original_max_position_embeddings"] / waves
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()
