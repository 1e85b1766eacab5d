"""The verbs for real, on a tiny random model: fresh processes, files, interruptions."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import posttrain as posttrain_module
from posttrain.cli import main

RECIPE = """\
name: trial
stages:
  - quantize: {{model: {model}, recipe: w8a8}}
  - compare:
      {{models: [{model}, "{{out}}"], window: 32, max_tokens: {tokens}, text: text.txt,
        out: "{{out}}/compared.html"}}
  - chat: {{model: "{{out}}", prompt: hello, max_new_tokens: 4}}
  - report: {{}}
"""


def posttrain(*words: object, **options) -> subprocess.CompletedProcess[str]:
    """The command in a fresh process."""
    command = [sys.executable, "-m", "posttrain", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty current folder with a text to read."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("All happy families are alike. " * 400)
    return tmp_path


@pytest.fixture(scope="module")
def quantized(tiny_model, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "small"
    ended = posttrain("quantize", tiny_model, "--recipe", "w6a8", "-o", out, "--json")
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout)
    assert {
        "out", "bits_per_weight", "bytes_quantized", "bytes_total", "seconds", "peak_rss_bytes",
        "predicted_peak_bytes", "layers",
    } <= result.keys()  # fmt: skip
    assert result["out"] == str(out) and len(result["layers"]) == 3 * 7 + 1
    return out


def test_evaluate(quantized, folder):
    words = ["evaluate", quantized, "--text", "text.txt", "--window", "64", "--max-tokens", "640"]
    ended = posttrain(*words, "--records", "records.jsonl", "--json")
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout)
    assert {"model", "nll", "perplexity", "tokens", "bits_per_weight", "bytes"} <= result.keys()
    assert result["model"] == str(quantized)
    assert result["tokens"] == 10 * 63
    assert Path("records.jsonl").is_file()


def test_compare(tiny_model, quantized, folder, posttrain_json):
    words = ["--text", "text.txt", "--window", "64", "--max-tokens", "640", "--no-generations"]
    status, result, _ = posttrain_json(
        "compare", str(tiny_model), str(quantized), *words, "-o", "report.html"
    )
    assert status == 0
    assert {"models", "pairs"} <= result.keys()
    [pair] = result["pairs"]
    assert {"a", "b", "delta_nll", "ci_low", "ci_high", "kl", "greedy_agreement"} <= pair.keys()
    assert (pair["a"], pair["b"]) == (str(tiny_model), str(quantized))
    assert pair["ci_low"] <= pair["delta_nll"] <= pair["ci_high"]
    assert result["report"] == "report.html" and Path("report.html").stat().st_size > 1000


def test_one_window_is_compared_without_an_interval(tiny_model, quantized, folder, posttrain_json):
    words = ["--text", "text.txt", "--window", "64", "--max-tokens", "64", "--no-generations"]
    status, result, _ = posttrain_json(
        "compare", str(tiny_model), str(quantized), *words, "--out", "report.html"
    )
    assert status == 0
    [pair] = result["pairs"]
    assert isinstance(pair["delta_nll"], float) and pair["ci_low"] is pair["ci_high"] is None
    page = Path("report.html").read_text()
    assert "too little text for an interval" in page and "intervals" not in page.split("<h2>")[2]
    assert "--out report.html" in page


def test_compare_in_words(tiny_model, quantized, folder, capsys):
    words = ["--text", "text.txt", "--window", "64", "--max-tokens", "640", "--no-generations"]
    assert main(["compare", str(tiny_model), str(quantized), *words]) == 0
    out = capsys.readouterr().out
    assert "95% interval" in out and "same next token" in out and str(quantized) in out


def test_one_question(quantized, posttrain_json, capfd):
    words = ["chat", str(quantized), "--prompt", "hello", "--max-new-tokens", "4"]
    status, result, _ = posttrain_json(*words)
    assert status == 0
    assert result["prompt"] == "hello" and isinstance(result["answer"], str)
    assert main(words) == 0
    assert capfd.readouterr().out == result["answer"] + "\n"


def test_a_conversation_carries_its_history(quantized, monkeypatch, capsys):
    from posttrain.lm import chat

    asked = []
    monkeypatch.setattr(
        chat, "generate", lambda m, t, messages, **_: asked.append(messages) or f"r{len(asked)}"
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n/reset\nthree\n/exit\nnever\n"))
    assert main(["chat", str(quantized), "--system", "be brief"]) == 0
    said = [[(m["role"], m["content"]) for m in messages] for messages in asked]
    start = ("system", "be brief")
    assert said == [
        [start, ("user", "one")],
        [start, ("user", "one"), ("assistant", "r1"), ("user", "two")],
        [start, ("user", "three")],
    ]


QUICKLY = """
import sys
from posttrain.cli.chat import _import
_import()
path, kv = sys.argv[1], sys.argv[2] or None
from posttrain.lm.chat import Conversation
talk = Conversation(path, kv=kv)
answer = talk.say("hello", max_new_tokens=9)
part = sys.modules["torch._meta_registrations"]
print(type(talk.model).__name__, part.__spec__ is not None, answer.encode().hex())
"""


@pytest.mark.parametrize(
    ("recipe", "kv"),
    [("w8a8", ""), ("w8a8-portable", ""), ("w4a16", ""), ("nf4", "int8 | fp32/g4")],
)
def test_a_quick_start_says_the_same(tiny_model, tmp_path, recipe, kv):
    """A part of torch is left out only where the files are read without transformers."""
    out = tmp_path / "small"
    how = ("--solver", "rtn", "--transform", "none")
    ended = posttrain("quantize", tiny_model, "--recipe", recipe, "-o", out, *how)
    assert ended.returncode == 0, ended.stderr
    ran = subprocess.run(
        [sys.executable, "-c", QUICKLY, out, kv], capture_output=True, text=True, check=True
    )
    direct, whole, answer = ran.stdout.split(" ")
    assert (direct == "DirectModel") == (whole == "False")
    assert whole == "True" or not kv
    from posttrain.lm.chat import Conversation

    said = Conversation(posttrain_module.load(out), kv=kv or None).say("hello", max_new_tokens=9)
    assert bytes.fromhex(answer.strip()).decode() == said


@pytest.mark.parametrize("words", [(), ("--top-k", "5")])
def test_a_question_that_is_no_utf_8_is_one_line(words, quantized):
    """Given as an argument or read; an option that changes nothing is named."""
    command = [sys.executable, "-m", "posttrain", "chat", str(quantized), *words]
    environment = os.environ | {"PYTHONUTF8": "1"}
    for more, read in ((["--prompt", b"caf\xe9"], b""), ([], b"hello\ncaf\xe9\n")):
        done = subprocess.run(
            [*command, "--max-new-tokens", "2", *more],
            input=read,
            env=environment,
            capture_output=True,
            check=False,
        )
        err = done.stderr.decode()
        assert done.returncode == 2 and "UTF-8" in err and "Traceback" not in err
        assert ("top_k without a temperature" in err) == bool(words and not more)


def test_a_screen_that_cannot_show_an_answer_shows_what_it_can(quantized):
    command = [sys.executable, "-m", "posttrain", "chat", str(quantized), "--prompt", "hello"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [*command, "--temperature", "9", "--max-new-tokens", "40"],
        env=environment,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0 and done.stdout.endswith(b"\n"), done.stderr.decode()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["evaluate", "nowhere"], "nowhere"),
        (["evaluate", "MODEL", "--text", ""], "text is empty"),
        (["chat", "n" * 300, "--prompt", "hello"], "nnnn"),
        (["quantize", "nowhere.gguf", "-o", "out"], "nowhere.gguf"),
        (["evaluate", "MODEL", "--text", "none.txt"], "none.txt"),
        (["quantize", "MODEL", "-o", "out", "--recipe", "w6a9"], "did you mean 'w6a8'"),
        (["quantize", "MODEL", "-o", "text.txt"], "text.txt"),
        (["run", "dmeo"], "did you mean 'demo'"),
        (["compare", "MODEL"], "two or more"),
    ],
)
def test_what_the_user_can_mend_is_one_line(words, says, tiny_model, folder, posttrain_json):
    words = [str(tiny_model) if word == "MODEL" else word for word in words]
    status, result, err = posttrain_json(*words)
    assert status == 2
    assert says in result["error"]
    assert "Traceback" not in err


def test_a_job_runs_and_then_has_nothing_to_do(tiny_model, folder, capsys):
    Path("job.yaml").write_text(RECIPE.format(model=tiny_model, tokens=640))
    assert main(["run", "job.yaml", "-o", "out"]) == 0
    out = capsys.readouterr().out
    for words in ("1-quantize", "bits per weight", "95% interval", "> hello", "out/report.html"):
        assert words in out
    for page in ("out/report.html", "out/compared.html"):
        assert Path(page).stat().st_size > 1000
    before = {p: p.stat().st_mtime_ns for p in Path("out").rglob("*")}
    assert main(["run", "job.yaml", "-o", "out"]) == 0
    assert capsys.readouterr().out.count("(reused)") == 4
    assert {p: p.stat().st_mtime_ns for p in Path("out").rglob("*")} == before


def test_ctrl_c_says_how_to_go_on_and_the_next_run_does(tiny_model, folder):
    Path("job.yaml").write_text(RECIPE.format(model=tiny_model, tokens=12000))
    command = [sys.executable, "-m", "posttrain", "run", "job.yaml", "-o", "out", "--json"]
    # Shells start background jobs with interrupts ignored, and children would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("[2/4]"):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "same command again" in json.loads(out)["error"]
    assert "Traceback" not in err
    ended = posttrain("run", "job.yaml", "-o", "out", "--json")
    assert ended.returncode == 0, ended.stderr
    assert [s["status"] for s in json.loads(ended.stdout)["stages"]] == ["reused"] + 3 * ["ran"]
