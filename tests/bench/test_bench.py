"""Bench: every engine runs for real, the figures hang together, and mistakes have one clear error."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch

import posttrain
from posttrain import kernels
from posttrain.bench import contenders, ctranslate2_peer, gguf_peer
from posttrain.bench.process import Worker
from posttrain.cli.main import main
from posttrain.errors import UserError
from posttrain.lm.engine import losses_of

pytestmark = pytest.mark.skipif(not kernels.available(), reason=kernels.find().reason)
llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
)
ctranslate2 = pytest.mark.skipif(
    importlib.util.find_spec("ctranslate2") is None, reason="ctranslate2 is not installed"
)
SHORT = ["--prefill", "20", "--decode", "3", "--rounds", "2", "--threads", "2", "--quiet"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A Llama checkpoint with demo's tokenizer, and the same in 4 bits."""
    import transformers

    folder = tmp_path_factory.mktemp("bench")
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder / "full")
    tokenizer = posttrain.models.source.open_source("demo").tokenizer()
    tokenizer.save_pretrained(folder / "full")
    options = {"recipe": "w4a8", "solver": "rtn", "transform": "none", "progress": False}
    posttrain.quantize(folder / "full", out=folder / "w4", **options)
    return folder


def test_the_json_has_what_it_promises_and_ratios_agree(small, capsys, tmp_path):
    words = ["bench", str(small / "w4"), "--against", "transformers", *SHORT, "--json"]
    assert main([*words, "--plot", str(tmp_path / "p.svg")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() >= {
        "model", "threads", "prefill_tps", "decode_tps", "score_tps", "bandwidth_share",
        "peak_share", "rss_bytes", "weight_bytes", "bits_per_weight", "kernel", "by_threads",
    }  # fmt: skip
    (peer,) = found["peers"]
    assert peer["name"] == "transformers"
    for what in ("prefill", "decode", "score"):
        low, high = peer[f"{what}_ratio_spread"]
        assert 0 < low <= peer[f"{what}_ratio"] <= high
        assert found[f"{what}_tps"] > 0 and peer[f"{what}_tps"] > 0
    assert found["threads"] == 2 and found["kernel"] == kernels.isa()
    assert 0 < found["bandwidth_share"] and 0 < found["peak_share"]
    assert found["depth"] == 0 and found["kv_bytes_per_token"] > 0
    assert found["rss_bytes"] > found["rss_above_imports_bytes"]
    assert "<svg" in (tmp_path / "p.svg").read_text()


def test_the_table_names_every_contender_and_thread_count(small, capsys):
    words = ["--prefill", "20", "--decode", "3", "--rounds", "1", "--threads", "1,2", "--quiet"]
    assert main(["bench", str(small / "full"), *words]) == 0
    shown = capsys.readouterr().out
    assert shown.count("posttrain ") == 2 and kernels.isa() in shown
    assert "after" not in shown.replace("after 16 tokens", "")
    assert main(["bench", str(small / "full"), *words, "--depth", "40"]) == 0
    assert "3 tokens, after 40" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["posttrain", "transformers"])
def test_contenders_compute_what_the_model_says(small, name):
    """The timed code is the real one: its losses are those of the model itself."""
    contender = contenders.contender_named(name)(str(small / "w4"), 2, "fp16")
    ids = contenders.token_ids(30, contender.vocabulary)
    model = posttrain.load(small / "w4", dtype="float32")
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]))
    window = torch.tensor([ids])
    if name == "posttrain":
        losses = contender.engine.window_losses(window, len(ids), 7)
    else:
        losses = losses_of(iter(logits.split(7)), window, len(ids), 7)
    assert abs(losses.mean() - expected) < 1e-3
    assert contender.run("score", 30) > 0
    assert contender.run("begin", 0, 3) > 0 and contender.run("decode", 2) > 0


@pytest.mark.parametrize("name", ["posttrain", "transformers"])
def test_an_answer_follows_what_stands_before_it(small, name):
    contender = contenders.contender_named(name)(str(small / "full"), 2, "fp32")
    ids = contenders.token_ids(30, contender.vocabulary)

    def logits(tokens):
        return contender.engine.forward([(contender.engine.session(), tokens)])

    for depth in (30, 0):
        contender.run("begin", depth, 4)
        contender.run("decode", 3)
        text = [*ids[:depth], 1]
        for _ in range(2):
            text.append(int(logits(text).argmax()))
        found = contender.engine.forward([(contender.session, [5])])
        torch.testing.assert_close(found, logits([*text, 5]), rtol=1e-4, atol=1e-5)


@llama_cpp
def test_llama_cpp_runs_the_same_model(small, tmp_path):
    """Its logits on the GGUF file written for it are those of the checkpoint."""
    plain = gguf_peer.gguf_of(str(small / "full"), "BF16", tmp_path)
    contender = contenders.LlamaCpp(str(plain), 2, "fp16")
    ids = contenders.token_ids(9, contender.vocabulary)
    contender.prefill(ids)
    row = contender.c.llama_get_logits_ith(contender.context, -1)[: contender.vocabulary]
    model = posttrain.load(small / "full", dtype="float32")
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([ids])).logits[0, -1]
    assert torch.corrcoef(torch.stack([torch.tensor(row), expected]))[0, 1] > 0.999
    contender.run("begin", 9, 2)
    contender.run("decode", 1)
    row = contender.c.llama_get_logits_ith(contender.context, -1)[: contender.vocabulary]
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([[*ids, 1]])).logits[0, -1]
    assert torch.corrcoef(torch.stack([torch.tensor(row), expected]))[0, 1] > 0.999
    assert gguf_peer.nearest_type(str(small / "w4")) == "Q4_0"
    assert gguf_peer.nearest_type(str(small / "full")) == "BF16"


def test_a_plan_meets_the_type_of_its_mean_width(tmp_path):
    """Every weight counts, however many layers they come in; the head is llama.cpp's own business."""
    small = [{"name": f"k{i}", "shape": [16, 64], "bits_per_weight": 7.25} for i in range(5)]
    large = {"name": "up", "shape": [256, 64], "bits_per_weight": 6.25}
    head = {"name": "lm_head", "shape": [9999, 64], "bits_per_weight": 8.5}
    report = {"layers": [*small, large, head]}
    (tmp_path / "posttrain.json").write_text(json.dumps(report), encoding="utf-8")
    assert gguf_peer.nearest_type(str(tmp_path)) == "Q6_K"
    large["bits_per_weight"] = 7.25
    (tmp_path / "posttrain.json").write_text(json.dumps(report), encoding="utf-8")
    assert gguf_peer.nearest_type(str(tmp_path)) == "Q8_0"
    (tmp_path / "posttrain.json").write_text(json.dumps({"layers": [head]}), encoding="utf-8")
    assert gguf_peer.nearest_type(str(tmp_path)) == "BF16"


@ctranslate2
def test_ctranslate2_runs_the_same_model(small, tmp_path):
    """Its INT8 losses are near those of the checkpoint; it counts the tokens that it was asked for."""
    made = ctranslate2_peer.ctranslate2_of(str(small / "w4"), tmp_path)
    contender = contenders.CTranslate2(str(made), 2, "fp16")
    ids = contenders.token_ids(9, contender.vocabulary)
    assert contender.run("prefill", 9) > 0 and contender.run("score", 9) > 0
    for depth in (0, 9):
        assert contender.run("begin", depth, 6) > 0 and contender.run("decode", 5) > 0
        drawn = contender._generate([1], 5, contender.context)
        assert drawn == contender._generate([*ids[:depth], 1], 5)
    assert drawn != contender._generate([1], 5)  # the context matters
    (scores,) = contender.generator.score_batch([[contender.words[i] for i in ids]])
    model = posttrain.load(small / "full", dtype="float32")
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert torch.allclose(torch.tensor(scores.log_probs), expected, atol=0.05)
    assert 8 < contender.facts()["bits_per_weight"] < 10


@pytest.mark.parametrize(
    "words, message",
    [
        (["--against", "lama.cpp"], "did you mean 'llama.cpp'"),
        (["--threads", "0"], "0"),
        (["--rounds", "0"], "whole number of at least 1"),
        (["--depth", "-1"], "whole number of at least 0"),
    ],
)
def test_mistakes_are_named(small, capsys, words, message):
    assert main(["bench", str(small / "full"), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_peer_that_is_not_installed_comes_with_its_command(small, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install llama-cpp-python"):
        posttrain.bench(small / "full", against=["llama.cpp"])


def test_a_model_that_is_missing_is_the_workers_error():
    with pytest.raises(UserError, match="posttrain: .*nowhere"):
        Worker("posttrain", "./nowhere", 1)


def test_a_worker_that_dies_is_noticed(small):
    worker = Worker("posttrain", str(small / "w4"), 1)
    worker._process.kill()
    worker._process.wait()
    with pytest.raises(UserError, match="ended with status"):
        worker.seconds("prefill", 3)


def test_a_worker_prints_nothing_but_answers(small):
    done = subprocess.run(
        [sys.executable, "-m", "posttrain.bench.worker", "posttrain", str(small / "w4"), "1", "fp16", "64"],
        input="facts\nprefill 5\nbegin 9 3\ndecode 2\nsing 3\nend\n", capture_output=True, text=True, check=False,
    )  # fmt: skip
    facts, prefill, _, decode, error = map(json.loads, done.stdout.splitlines())
    assert facts["weight_bytes"] > 0 and "sing" in error["error"]
    assert prefill["seconds"] > 0 and decode["seconds"] > 0
