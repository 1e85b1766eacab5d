"""Bench: every engine runs for real, the figures hang together, and mistakes have one clear error."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

import posttrain
from posttrain import kernels
from posttrain.bench import contenders, ctranslate2_peer, gguf_peer, verb
from posttrain.bench.origin import origin_of
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


def documented():
    """Every word that docs/json.md has for keys of a bench."""
    page = Path(__file__).resolve().parents[2] / "docs" / "json.md"
    (about,) = re.findall(r"\*\*bench\*\*.*?\n\n", page.read_text(encoding="utf-8"), re.DOTALL)
    return set(re.findall(r"`(\w+)`", about)) - {"null"}


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
    (entry,) = found["by_threads"]
    assert found.keys() - entry.keys() == {"model", "plot", "by_threads"}
    keys = {*found, *entry, *peer, *found["probe"]}
    assert keys | {"type"} == documented()


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
@pytest.mark.parametrize("kind", ["BF16", "F32"])
def test_llama_cpp_runs_the_same_model(small, tmp_path, kind):
    """Its logits on the GGUF file written for it are those of the checkpoint."""
    plain = gguf_peer.gguf_of(str(small / "full"), kind, tmp_path)
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
    assert gguf_peer.nearest_type(str(small / "full")) == "F32"


def reported(folder, layers):
    (folder / "posttrain.json").write_text(json.dumps({"layers": layers}), encoding="utf-8")
    return gguf_peer.nearest_type(str(folder))


def test_a_plan_meets_the_type_of_its_mean_width(tmp_path):
    """Every weight counts, however many layers they come in; the head is llama.cpp's own business."""
    small = [{"name": f"k{i}", "shape": [16, 64], "bits_per_weight": 8.25} for i in range(5)]
    large = {"name": "up", "shape": [256, 64], "bits_per_weight": 6.25}
    head = {"name": "lm_head", "shape": [9999, 64], "bits_per_weight": 4.25}
    assert reported(tmp_path, [*small, large, head]) == "Q6_K"
    large["bits_per_weight"] = 8.25
    assert reported(tmp_path, [*small, large, head]) == "Q8_0"


@pytest.mark.parametrize(
    "bits, kind",
    [
        (2.25, "Q2_K"), (3.25, "Q3_K_S"), (4.125, "Q4_0"), (5.25, "Q5_0"), (6.25, "Q6_K"),
        (7.25, "Q6_K"), (8.0, "Q8_0"), (9.0, "Q8_0"), (10.0, "Q8_0"), (16.0, "BF16"),
    ],
)  # fmt: skip
def test_the_type_is_the_nearest(tmp_path, bits, kind):
    assert reported(tmp_path, [{"name": "k", "shape": [4, 4], "bits_per_weight": bits}]) == kind


@pytest.mark.parametrize(
    "dtype, kind", [("float32", "F32"), ("bfloat16", "BF16"), ("float16", "F16")]
)
def test_what_is_not_quantized_meets_its_own_type(small, tmp_path, dtype, kind):
    folder = shutil.copytree(small / "full", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
    assert gguf_peer.nearest_type(str(folder)) == kind
    head = {"name": "lm_head", "shape": [9999, 64], "bits_per_weight": 8.5}
    assert reported(folder, [head]) == kind


@llama_cpp
def test_buffers_of_old_checkpoints_are_passed_over(small, tmp_path):
    from gguf import GGUFReader
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(small / "full", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    written = GGUFReader(str(gguf_peer.gguf_of(str(folder), "F16", tmp_path)))
    assert len(written.tensors) == len(tensors) - 1


@pytest.mark.parametrize("peer", [gguf_peer.gguf_of, ctranslate2_peer.ctranslate2_of])
def test_a_checkpoint_of_another_tool_is_refused(small, tmp_path, peer):
    folder = shutil.copytree(small / "full", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    kind = ["Q4_0"] if peer is gguf_peer.gguf_of else []
    with pytest.raises(UserError, match="model: already quantized .gptq.*leave it out"):
        peer(str(folder), *kind, tmp_path)


@pytest.fixture
def project(small, tmp_path, monkeypatch):
    """A folder with out/w4, quantized from what was called my/models/full there; we are elsewhere."""
    made = shutil.copytree(small / "w4", tmp_path / "project" / "out" / "w4")
    report = json.loads((made / "posttrain.json").read_text())
    (made / "posttrain.json").write_text(json.dumps(report | {"model": "my/models/full"}))
    (tmp_path / "project" / "my" / "models").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "project"


def test_the_origin_is_found_from_anywhere(small, project, random_llama):
    made, origin = str(project / "out" / "w4"), project / "my" / "models" / "full"
    origin.symlink_to(small / "full")
    assert origin_of(made) == str(origin)
    random_llama.save_pretrained("my/models/full")  # another model of that name
    assert origin_of(made) == str(origin)
    origin.unlink()
    with pytest.raises(
        UserError, match="posttrain.json: .model. is 'my/models/full'.*vocab_size 97"
    ):
        origin_of(made)
    shutil.rmtree("my/models/full")
    with pytest.raises(UserError, match="my/models/full: no such file"):
        origin_of(made)
    assert origin_of(str(small / "full")) == str(small / "full")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("cache", ["fp16", "int4 | fp16/g16"])  # the second is PyTorch's
def test_a_token_meets_all_but_an_embedding_that_is_no_head(small, tmp_path, tied, cache):
    import transformers

    source = small / "full"
    if tied:
        source = tmp_path
        config = transformers.AutoConfig.from_pretrained(small / "full")
        config.tie_word_embeddings, config.vocab_size = True, 97
        transformers.LlamaForCausalLM(config).save_pretrained(source)
    found = contenders.Posttrain(str(source), 2, cache).describe()
    left_out = found["weight_bytes"] - found["bytes_per_token"]
    assert left_out == (0 if tied else 4 * 64 * 49151 if cache == "fp16" else 4 * 64 * 49152)
    assert (found["kernel"] == "torch") == (cache != "fp16")


def test_experts_have_no_shares(tmp_path, capsys):
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    before = kernels.threads()
    words = ["--prefill", "5", "--decode", "2", "--rounds", "1", "--threads", "1", "--quiet"]
    assert main(["bench", str(tmp_path), *words]) == 0
    shown = capsys.readouterr().out
    assert "only some of this model's experts" in " ".join(shown.split())
    assert "answers use" not in shown and "prompts use" not in shown
    assert kernels.threads() == before


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
        (["--threads", "100000"], "threads=100000: this machine has"),
        (["--plot", "nowhere/p.svg"], "the folder does not exist"),
        (["--plot", "p.png"], "must end in .svg"),
    ],
)
def test_mistakes_are_named(small, capsys, words, message):
    assert main(["bench", str(small / "full"), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_peer_that_is_not_installed_comes_with_its_command(small, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install llama-cpp-python"):
        posttrain.bench(small / "full", against=["llama.cpp"])


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """A llama-cpp-python that prints past Python and then cannot be imported."""
    code = "import os\nos.write(1, b'noise\\n')\nraise RuntimeError('no such symbol')\n"
    (tmp_path / "llama_cpp.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delitem(sys.modules, "llama_cpp", raising=False)


def test_a_peer_that_is_broken_is_named(small, broken):
    message = "^llama.cpp cannot be imported .RuntimeError: no such symbol.*leave it out"
    with pytest.raises(UserError, match=message):
        posttrain.bench(small / "full", against=["llama.cpp"])
    with pytest.raises(UserError, match=message):
        Worker("llama.cpp", "any.gguf", 1)


def test_what_fails_in_a_worker_is_said():
    with pytest.raises(UserError, match="posttrain: ValueError: invalid literal"):
        Worker("posttrain", "demo", "many")


@ctranslate2
def test_what_the_converter_raises_is_said(small, tmp_path, monkeypatch):
    from ctranslate2.converters import TransformersConverter

    def convert(*args, **kwargs):
        raise RuntimeError("odd weights")

    monkeypatch.setattr(TransformersConverter, "convert", convert)
    with pytest.raises(UserError, match="RuntimeError: odd weights.*leave it out"):
        ctranslate2_peer.ctranslate2_of(str(small / "full"), tmp_path)


def test_a_plot_that_fails_loses_no_result(monkeypatch, tmp_path):
    def measure(self, sources, progress):
        (tmp_path / "p.svg").mkdir()  # meanwhile
        speeds = {"threads": 1, "prefill_tps": 1.0, "decode_tps": 1.0, "score_tps": 1.0}
        return speeds | {"depth": 0, "peers": [], "notes": []}

    monkeypatch.setattr(verb._Round, "measure", measure)
    found = posttrain.bench("demo", threads=1, plot=tmp_path / "p.svg")
    assert found["prefill_tps"] == 1 and "plot" not in found
    assert found["notes"] == [f"{tmp_path / 'p.svg'}: the plot cannot be written: Is a directory"]


@pytest.mark.parametrize(
    "number, status",
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)],
    ids=lambda value: getattr(value, "name", None),
)
def test_nothing_is_left_when_it_is_ended(small, tmp_path, number, status):
    """Whatever ends a bench, by Ctrl-C or otherwise, ends its workers, also one that is loading."""
    command = [sys.executable, "-m", "posttrain", "bench", str(small / "full"), "--quiet"]
    # Shells start background jobs with interrupts ignored, and children would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    ended = subprocess.Popen(
        command, env=os.environ | {"TMPDIR": str(tmp_path)}, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    signal.signal(signal.SIGINT, before)
    process = psutil.Process(ended.pid)
    until = time.monotonic() + 60
    while not (workers := process.children()) and time.monotonic() < until:
        time.sleep(0.05)
    assert workers
    os.killpg(ended.pid, number)  # as a terminal does
    _, said = ended.communicate(timeout=60)
    assert ended.returncode == status
    assert "Traceback" not in said
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive
    left = [entry.name for entry in tmp_path.iterdir() if "posttrain" in entry.name]
    assert not left or number == signal.SIGKILL


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
