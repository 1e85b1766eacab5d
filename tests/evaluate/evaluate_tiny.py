"""Tiny models that evaluate in milliseconds: random weights, a tokenizer of numbered words."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = 61  # vocabulary: w0 .. w60


def word_tokenizer(words=WORDS):
    raw = Tokenizer(models.WordLevel({f"w{i}": i for i in range(words)}, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def tiny_llama(seed, **fields):
    sizes = {
        "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**(sizes | fields))).eval()
    model.tokenizer = word_tokenizer()
    model.name_or_path = f"tiny-{seed}"
    return model


def nudged(model, seed=9, size=0.02):
    """A copy of a model with a little noise on every weight, as quantization would leave it."""
    other = tiny_llama(0, num_hidden_layers=model.config.num_hidden_layers)
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: value + size * torch.randn(value.shape, generator=generator)
        for name, value in model.state_dict().items()
    }
    other.load_state_dict(state)
    other.name_or_path = f"nudged-{seed}"
    return other
