"""Laws of block sensitivity: it is what swapping the block by hand gives, and undoes its swaps."""

import copy
import sys

import pytest
import torch
from evaluate_tiny import nudged, tiny_llama
from transformers import Gemma2Config, Gemma2ForCausalLM

from posttrain.errors import UserError
from posttrain.evaluate import block_sensitivity, compare
from posttrain.evaluate.windows import Windows


@pytest.fixture
def windows(tiny, text):
    return Windows.cut(text, tiny.tokenizer, 32).head(2)


def by_hand(reference, other, windows):
    with torch.inference_mode():
        log_p = reference(windows.tokens).logits[:, :-1].double().log_softmax(-1)
        for i, block in enumerate(other.model.layers):
            mixed = copy.deepcopy(reference)
            mixed.model.layers[i] = block
            log_q = mixed(windows.tokens).logits[:, :-1].double().log_softmax(-1)
            yield float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def test_it_is_the_divergence_with_one_block_swapped(tiny, near, windows):
    found = block_sensitivity(tiny, near, windows, progress=False)
    assert [entry["block"] for entry in found] == [f"model.layers.{i}" for i in range(3)]
    expected = list(by_hand(tiny, near, windows))
    assert [entry["kl"] for entry in found] == pytest.approx(expected, rel=1e-3)
    assert min(expected) > 1e-4


def test_blocks_with_different_attention_work(windows):
    """A model that asks its blocks which attention they use gets an answer from all of them."""
    config = Gemma2Config(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=4, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=8, query_pre_attn_scalar=8,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        reference, other = (Gemma2ForCausalLM(config).eval() for _ in range(2))
    found = block_sensitivity(reference, other, windows, progress=False)
    expected = list(by_hand(reference, other, windows))
    assert [entry["kl"] for entry in found] == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_only_the_changed_block_counts(tiny, windows):
    other = nudged(tiny, size=0.0)
    other.model.layers[1].mlp.up_proj.weight.data += 0.05
    found = block_sensitivity(tiny, other, windows, progress=False)
    assert found[0]["kl"] == found[2]["kl"] == 0
    assert found[1]["kl"] > 1e-4


def test_the_reference_is_as_it_was(tiny, near, windows):
    blocks = list(tiny.model.layers)
    before = tiny(windows.tokens).logits
    block_sensitivity(tiny, near, windows, progress=False)
    assert all(a is b for a, b in zip(tiny.model.layers, blocks, strict=True))
    assert torch.equal(tiny(windows.tokens).logits, before)


def test_models_of_different_depth_are_refused(tiny, windows):
    with pytest.raises(UserError, match="found 3 in the reference and 2"):
        block_sensitivity(tiny, tiny_llama(1, num_hidden_layers=2), windows, progress=False)


def test_they_are_refused_before_anything_is_scored(tiny, text, monkeypatch):
    monkeypatch.setattr(sys.modules["posttrain.evaluate.compare"], "score_lockstep", None)
    shallow = tiny_llama(1, num_hidden_layers=2)
    with pytest.raises(UserError, match="has 3, .* 2; leave it out"):
        compare([tiny, shallow], text=text, sensitivity=True, progress=False)
