"""The command line in this process, with verbs that only record how they were called."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import posttrain
from posttrain.cli import main

EVALUATED = {
    "model": "m",
    "nll": 2.5,
    "perplexity": 12.18,
    "tokens": 100,
    "bits_per_weight": 6.25,
    "bytes": 1000,
    "kv": "int8 | fp16/row",
    "kv_bits_per_value": 8.25,
    "kv_bytes_per_token": 11880.0,
}
RESULTS: dict[str, dict[str, Any]] = {
    "quantize": {
        "out": "o",
        "bits_per_weight": 6.25,
        "bytes_quantized": 900,
        "bytes_total": 1000,
        "seconds": 1.0,
        "peak_rss_bytes": 10**9,
        "predicted_peak_bytes": 10**9,
        "layers": [{"name": "model.layers.0.mlp.up_proj", "qsnr": 31.0}],
    },
    "evaluate": EVALUATED,
    "compare": {
        "models": [EVALUATED, {**EVALUATED, "model": "n"}],
        "pairs": [
            {
                "a": "m",
                "b": "n",
                "delta_nll": 0.01,
                "ci_low": 0.0,
                "ci_high": 0.02,
                "kl": 0.003,
                "greedy_agreement": 0.97,
            }
        ],
    },
    "chat": {"model": "m", "prompt": "p", "answer": "a", "seconds": 1.0},
    "run": {"recipe": "r", "out": "o", "seconds": 1.0, "stages": []},
}


@pytest.fixture
def results() -> dict[str, dict[str, Any]]:
    """What each stand-in answers."""
    return RESULTS


class Fakes:
    """Stand-ins for the public functions: `calls` keeps what they got."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self._monkeypatch = monkeypatch
        for name in RESULTS:
            self.replace(name, lambda **_: None)

    def replace(self, name: str, does: Callable[..., Any]) -> None:
        """Make the verb do something before it answers; what `does` returns is the answer."""

        def verb(*args: Any, **kwargs: Any) -> dict[str, Any]:
            assert not args, "the command line names every argument"
            self.calls.append((name, kwargs))
            return does(**kwargs) or RESULTS[name]

        # Not setattr: reading the old value would import the real verb and all of PyTorch.
        self._monkeypatch.setitem(vars(posttrain), name, verb)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    return Fakes(monkeypatch)


@pytest.fixture
def posttrain_json(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, Any, str]]:
    """Run with --json: (status, the object on standard output, standard error)."""

    def run(*argv: str) -> tuple[int, Any, str]:
        status = main([*argv, "--json"])
        out, err = capfd.readouterr()
        return status, json.loads(out), err

    return run


CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a random Llama of three blocks and a tokenizer of single bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    specials = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        tie_word_embeddings=True, eos_token_id=0, bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder
