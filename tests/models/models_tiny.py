"""Tiny random-weight models of many architectures, for tests of sources and walking."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

# name -> (model_type, fields besides SIZES)
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-bf16": ("llama", {"dtype": "bfloat16"}),
    "mistral": ("mistral", {"sliding_window": 8}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "gemma": ("gemma", {"head_dim": 8}),
    "gemma2": ("gemma2", {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8, "dtype": "bfloat16"},
    ),
    "phi3": ("phi3", {}),
    "smollm3": ("smollm3", {"num_hidden_layers": 4}),
    "gpt-neox": ("gpt_neox", {"rotary_pct": 0.25}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "qwen2-moe": ("qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 24}),
    "qwen3-moe": ("qwen3_moe", EXPERTS | {"head_dim": 8}),
    "olmoe": ("olmoe", {"num_experts": 12, "num_experts_per_tok": 2}),
    "glm4-moe": (
        "glm4_moe",
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 0,
            "dtype": "bfloat16",
        },
    ),
    "ernie-moe": (
        "ernie4_5_moe",
        {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 16,
            "moe_layer_start_index": 0,
            "dtype": "bfloat16",
        },
    ),
    "llama4": (
        "llama4_text",
        {"num_local_experts": 4, "intermediate_size_mlp": 48, "head_dim": 8},
    ),
    "olmo-hybrid": (
        "olmo_hybrid",
        {
            "num_hidden_layers": 4,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    "gpt-oss": ("gpt_oss", {"num_local_experts": 4, "head_dim": 8, "sliding_window": 8}),
}
# what the installed transformers knows
TINY = {name: row for name, row in TINY.items() if row[0] in CONFIG_MAPPING}
MIXTURES = (
    "mixtral",
    "qwen2-moe",
    "qwen3-moe",
    "olmoe",
    "glm4-moe",
    "ernie-moe",
    "llama4",
    "gpt-oss",
)


def tiny_model(name: str, seed: int = 0, dtype: torch.dtype | None = None) -> Any:
    """A model of TINY, every parameter random (norms and biases too), in its config's dtype."""
    model_type, fields = TINY.get(name, (name, {}))
    config = AutoConfig.for_model(model_type, **(SIZES | fields))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype or torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.2 + (1.0 if parameter.dim() == 1 else 0.0))
    return model.eval()


def save_tiny(name: str, directory: Path, seed: int = 0, shards: bool = False) -> Any:
    """Save tiny_model(name) as `save_pretrained` does (experts one by one); returns the model."""
    model = tiny_model(name, seed)
    model.save_pretrained(directory, max_shard_size="20KB" if shards else "1GB")
    return model


def tokens(batch: int = 2, length: int = 17, vocabulary: int = 96) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(3, vocabulary, (batch, length), generator=generator)
