"""Benchmarks beside other tools: both sides see the same tokens, and are counted and measured alike."""

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import posttrain
from posttrain.bench.gguf_peer import gguf_of
from posttrain.evaluate.divergence import FullTarget
from posttrain.evaluate.score import Scorer
from posttrain.evaluate.windows import Windows
from posttrain.models.load import load
from posttrain.models.source import open_source
from posttrain.quantize.job import calibration_windows
from posttrain.quantize.recipe import Calibration

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
llama_cpp = pytest.mark.skipif(
    find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
)


@pytest.fixture
def quality(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module("bench_gguf_quality")


@pytest.fixture
def quantizers(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module("bench_quantizers")


@pytest.fixture
def common(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module("common")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A random Llama checkpoint with demo's tokenizer."""
    import transformers

    folder = tmp_path_factory.mktemp("peers") / "small"
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder)
    open_source("demo").tokenizer().save_pretrained(folder)
    return folder


@llama_cpp
@pytest.mark.parametrize("batch", [512, 7])
def test_llama_cpp_scores_every_position(quality, small, tmp_path, monkeypatch, batch):
    """Its losses, by position, are the model's own, however many tokens it is fed at once."""
    monkeypatch.setattr(quality, "BATCH", batch)
    model = load(small, dtype="float32")
    text = posttrain.data.load_text(None, "evaluation")
    windows = Windows.cut(text, model.tokenizer, 20, max_tokens=60)
    own = Scorer(model, "own", windows)
    engine = quality.LlamaScorer(str(gguf_of(str(small), "F16", tmp_path)), 2, "fp16")
    theirs = Scorer(model, "llama.cpp", windows, True, runner=engine)
    for part in windows.batches(49152):
        theirs(part, own(part, keep=FullTarget))
    assert (theirs.scores().nll - own.scores().nll).abs().max() < 5e-3
    assert theirs.scores().kl.max() < 1e-4 and theirs.scores().nll.isfinite().all()
    # Random weights say much the same everywhere: a shift by one position must show.
    assert (theirs.scores().nll[:, 1:] - own.scores().nll[:, :-1]).abs().max() > 0.1


@llama_cpp
def test_importance_reaches_the_tensor_it_is_for(quality, small, tmp_path):
    """llama.cpp rounds the channels better that matter: in this layer, and in no other."""
    from gguf import GGUFReader, dequantize

    matters = torch.full((64,), 1e-6)
    matters[::32] = 1.0
    name = "model.layers.1.self_attn.v_proj"
    files = {
        "exact": gguf_of(str(small), "F16", tmp_path),
        "plain": gguf_of(str(small), "Q4_0", tmp_path),
        "weighted": gguf_of(str(small), "Q4_0", tmp_path, {name: matters}),
    }
    read = {
        key: {t.name: torch.tensor(dequantize(t.data, t.tensor_type))
              for t in GGUFReader(str(file)).tensors}
        for key, file in files.items()
    }  # fmt: skip
    changed = {n for n in read["plain"] if not read["plain"][n].equal(read["weighted"][n])}
    assert changed == {"blk.1.attn_v.weight"}
    (layer,) = changed
    plain, weighted = ((read[k][layer] - read["exact"][layer])[:, ::32].square().sum()
                       for k in ("plain", "weighted"))  # fmt: skip
    assert weighted < 0.5 * plain


@llama_cpp
def test_bits_are_counted_like_ours(quality, small, tmp_path):
    """All tensors over all weights: 16 bits for matrices, 32 for norms, and no header."""
    model = load(small, dtype="float32")
    sizes = [(p.ndim, p.numel()) for p in model.parameters()]
    stored = sum(count * (2 if axes > 1 else 4) for axes, count in sizes)
    found = quality.stored(gguf_of(str(small), "F16", tmp_path))
    assert found["bytes"] == stored
    assert found["bits_per_weight"] == 8 * stored / sum(count for _, count in sizes)
    assert found["types"] == {"F16": 15}


def test_importance_is_the_mean_square_of_the_inputs(quality, small):
    found = quality.channel_importance(str(small), 16, 3)
    assert len(found) == 14
    model = load(small, dtype="float32")
    tokens = posttrain.data.token_windows(
        posttrain.data.load_text(None, "calibration"), model.tokenizer, 16, max_windows=3
    )
    with torch.inference_mode():
        inputs = model.model.layers[0].input_layernorm(model.model.embed_tokens(tokens))
    expected = inputs.square().mean((0, 1))
    torch.testing.assert_close(found["model.layers.0.self_attn.q_proj"], expected)


def test_peers_are_calibrated_on_the_windows_that_ours_draws(quantizers, small, tmp_path):
    from safetensors.torch import load_file

    file = quantizers.calibration(small, tmp_path / "tokens.safetensors", 64, 5)
    mine, _ = calibration_windows(open_source(small), Calibration(samples=5, window=64), 0)
    assert load_file(file)["tokens"].equal(mine)


def test_a_duel_is_ours_less_theirs(quantizers):
    ours, theirs = [1.0, 2.0, 3.0, 2.5], [1.5, 2.4, 3.6, 3.0]
    found = {
        ("posttrain", "W", "a"): ({}, {"window_nll": ours}),
        ("llm-compressor", "W", "b"): ({}, {"window_nll": theirs}),
    }
    duel = quantizers._duel("W", "a", "b", found)
    assert duel["delta_nll"] == pytest.approx(-0.5) and duel["ci_high"] < 0
    assert duel["verdict"] == "better"


def test_a_missing_peer_is_said(quantizers, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "demo", "--peer", "/nowhere/python", "--quick"])
    monkeypatch.setattr(quantizers, "measure", lambda model, peer, *rest: {"peer": peer})
    quantizers.main()
    shown = capsys.readouterr()
    assert "/nowhere/python: no such file, so llm-compressor is left out" in shown.err
    assert '"peer": null' in shown.out


def test_memory_is_seen_from_outside(common):
    code = "import time; x = bytearray(200 << 20); x[::4096] = b'1' * len(x[::4096]); time.sleep(.1); del x; time.sleep(.1); print(7)"
    found = common.run_measured([sys.executable, "-c", code])
    assert found["stdout"] == "7\n" and found["seconds"] > 0.1
    assert 200 << 20 < found["peak_rss_bytes"] < 260 << 20
    with pytest.raises(SystemExit, match="status 3"):
        common.run_measured([sys.executable, "-c", "raise SystemExit(3)"])
