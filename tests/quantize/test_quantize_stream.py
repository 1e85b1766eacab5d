"""Streaming block by block computes what the whole model computes."""

import pytest
import torch

from posttrain.errors import UserError
from posttrain.models.source import open_source
from posttrain.quantize.activations import ActivationStore
from posttrain.quantize.stream import BlockStream

SLIDING = {"head_dim": 8, "sliding_window": 8}
FAMILIES = {
    "Llama": {},
    "Mistral": {"sliding_window": 8},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Gemma2": SLIDING,  # alternates sliding and full attention: blocks get different masks
    "Phi3": {"pad_token_id": 0},
    "Olmo2": {},
    "Mixtral": {"num_local_experts": 4},
    "GPTNeoX": {},  # absolute head layout, parallel residual
}


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_hidden_states_equal_the_models(family, tiny, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = tiny(family, **FAMILIES[family])
    tokens = torch.randint(3, 49152, (5, 24), generator=torch.Generator().manual_seed(0))
    stream = BlockStream(open_source(folder))
    store = ActivationStore(tmp_path, (5, 24, 32), budget=1 << 30)
    stream.embed(tokens, batch=2, store=store)
    inputs = []
    for index in range(len(stream.blocks)):
        inputs.append(store.get(0, 5))
        with stream.loaded(index):
            for start in (0, 2, 4):
                stop = min(start + 2, 5)
                store.put(start, stream.run(index, store.get(start, stop)))
        store.advance()
        assert all(p.is_meta for p in stream.blocks[index][1].parameters())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = model(tokens, output_hidden_states=True).hidden_states
    for streamed, whole in zip(inputs, expected, strict=False):
        torch.testing.assert_close(streamed, whole, rtol=1e-5, atol=1e-5)


def test_a_resumed_stream_learns_the_calls_without_refilling(tiny_llama, tmp_path):
    tokens = torch.arange(40).reshape(5, 8)
    stream = BlockStream(open_source(tiny_llama))
    store = ActivationStore(tmp_path, (5, 8, 32), budget=1 << 30)
    stream.embed(tokens, batch=2, store=store)
    again = BlockStream(open_source(tiny_llama))
    again.embed(tokens, batch=2, store=None)
    for one in (stream, again):
        assert set(one._call) == {1, 2}
    with stream.loaded(0), again.loaded(0):
        x = store.get(0, 2)
        assert torch.equal(stream.run(0, x), again.run(0, x))


@pytest.mark.parametrize("batch", [2, 5])
def test_block_arguments_that_depend_on_the_tokens_are_refused_by_name(tiny_llama, tmp_path, batch):
    tokens = torch.randint(3, 49152, (5, 24), generator=torch.Generator().manual_seed(0))
    stream = BlockStream(open_source(tiny_llama))
    rotary = stream.model.model.rotary_emb
    plain = rotary.forward
    rotary.forward = lambda x, position_ids: (plain(x, position_ids)[0], x[..., :8])
    store = ActivationStore(tmp_path, (5, 24, 32), budget=1 << 30)
    with pytest.raises(UserError, match=r"position_embeddings\[1\], which depends on the tokens"):
        stream.embed(tokens, batch, store)
