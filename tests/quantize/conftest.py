"""Tiny real checkpoints to stream: a few architectures, random weights, demo's tokenizer."""

from pathlib import Path

import pytest
import torch

from posttrain.models.source import open_source

SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


@pytest.fixture(scope="session")
def tokenizer():
    return open_source("demo").tokenizer()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, tokenizer):
    """tiny(family, **changes) -> directory of a random model with a tokenizer."""

    def build(family: str = "Llama", **changes) -> Path:
        import transformers

        config = getattr(transformers, f"{family}Config")(**{**SHAPE, **changes})
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = getattr(transformers, f"{family}ForCausalLM")(config)
        folder = tmp_path_factory.mktemp(family.lower())
        model.save_pretrained(folder, max_shard_size="2MB")
        tokenizer.save_pretrained(folder)
        return folder

    return build


@pytest.fixture(scope="session")
def tiny_llama(tiny) -> Path:
    return tiny("Llama")
