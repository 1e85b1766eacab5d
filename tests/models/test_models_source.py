"""Sources: what opening and reading return, and one clear error for each thing that can be wrong."""

import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from models_tiny import save_tiny
from safetensors.torch import load_file, save_file

import posttrain
from posttrain.errors import UserError
from posttrain.models import hub
from posttrain.models.direct import open_direct
from posttrain.models.source import open_source, require_unquantized


@pytest.fixture()
def tiny(tmp_path) -> Path:
    """A tiny llama in several shards."""
    save_tiny("llama", tmp_path / "tiny", shards=True)
    return tmp_path / "tiny"


@pytest.fixture()
def single(tmp_path) -> Path:
    """A tiny tied llama in one file."""
    save_tiny("llama-tied", tmp_path / "single")
    return tmp_path / "single"


def shards_of(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def refusal(model) -> str:
    with pytest.raises(UserError) as error:
        open_source(model)
    message = str(error.value)
    assert "\n" not in message
    return message


def edit_config(directory: Path, **fields) -> None:
    file = directory / "config.json"
    config = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


# ------------------------------------------------------------------------------------- what opens


def test_sharded_and_single_directories_give_the_same_tensors(tmp_path):
    model = save_tiny("llama", tmp_path / "one")
    save_tiny("llama", tmp_path / "many", shards=True)
    assert len(shards_of(tmp_path / "many")) > 3
    one, many = open_source(tmp_path / "one"), open_source(str(tmp_path / "many"))
    assert one.tensor_names() == many.tensor_names()
    for name in one.tensor_names():
        a, b = one.read([name])[name], many.read([name])[name]
        assert torch.equal(a, b) and torch.equal(a, model.state_dict()[name])


def test_what_a_source_says_of_itself(tiny):
    source = open_source(tiny)
    assert (source.name, source.kind, source.path) == (str(tiny), "directory", tiny)
    assert source.config.model_type == "llama"
    assert source.quantization_config is None
    assert source.storage_dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_comes_from_the_files_when_the_config_is_silent(single, dtype):
    weights = {n: t.to(dtype) for n, t in load_file(single / "model.safetensors").items()}
    save_file(weights, single / "model.safetensors", metadata={"format": "pt"})
    edit_config(single, dtype=None, torch_dtype=None)
    source = open_source(single)
    assert source.config.dtype == source.storage_dtype == dtype
    name = "model.norm.weight"
    assert source.dtype(name) == source.read([name])[name].dtype == dtype


def test_read_returns_fresh_memory(tiny):
    source = open_source(tiny)
    name = source.tensor_names()[0]
    first = source.read([name])[name]
    kept = first.clone()
    first.zero_()
    assert torch.equal(source.read([name])[name], kept)


def test_every_stored_dtype_is_read_bit_for_bit(tmp_path):
    from posttrain.models.shards import DTYPES, OpenFiles, read_header

    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (3, 8), dtype=torch.uint8, generator=generator)
    tensors = {
        name: raw.clone().view(dtype) for name, dtype in DTYPES.items() if dtype != torch.bool
    }
    tensors |= {"BOOL": raw > 99, "empty": torch.empty(0, 4), "scalar": torch.tensor(3.5)}
    save_file(tensors, tmp_path / "all.safetensors")
    header = read_header(tmp_path / "all.safetensors")
    assert header.keys() == tensors.keys()
    with OpenFiles() as files:
        for name, tensor in tensors.items():
            value = header[name].read(files)
            assert (value.dtype, value.shape) == (tensor.dtype, tensor.shape)
            assert value.reshape(-1).view(torch.uint8).tolist() == (
                tensor.reshape(-1).view(torch.uint8).tolist()
            )


def test_experts_are_stored_one_by_one_and_read_as_one(tmp_path):
    model = save_tiny("qwen3-moe", tmp_path)
    on_disk = load_file(tmp_path / "model.safetensors")
    assert "model.layers.0.mlp.experts.3.gate_proj.weight" in on_disk
    source = open_source(tmp_path)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    value = source.read([name])[name]
    assert torch.equal(value, model.state_dict()[name])
    for expert in range(4):
        stem = f"model.layers.1.mlp.experts.{expert}"
        halves = [on_disk[f"{stem}.{half}_proj.weight"] for half in ("gate", "up")]
        assert torch.equal(value[expert], torch.cat(halves))


def test_more_than_ten_experts_keep_their_numeric_order(tmp_path):
    model = save_tiny("olmoe", tmp_path, shards=True)
    source = open_source(tmp_path)
    name = "model.layers.0.mlp.experts.down_proj"
    assert source.shape(name)[0] == 12
    assert torch.equal(source.read([name])[name], model.state_dict()[name])


def test_fused_matrices_on_disk_are_split(tmp_path):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if "hrm_text" not in CONFIG_MAPPING:
        pytest.skip("this transformers has no architecture that splits matrices on loading")
    state = save_tiny("hrm_text", tmp_path).state_dict()
    assert any("gate_up_proj" in name for name in load_file(tmp_path / "model.safetensors"))
    source = open_source(tmp_path)
    for name, value in source.read(source.tensor_names()).items():
        assert torch.equal(value, state[name]), name


def test_a_checkpoint_of_the_base_model_gets_its_prefix(single):
    file = single / "model.safetensors"
    weights = {n.removeprefix("model."): t for n, t in load_file(file).items()}
    assert "embed_tokens.weight" in weights
    save_file(weights, file, metadata={"format": "pt"})
    assert "model.embed_tokens.weight" in open_source(single).tensor_names()


@pytest.mark.parametrize("stored", ["source", "target", "both"])
def test_tied_heads_are_read_under_either_name(single, stored):
    file = single / "model.safetensors"
    weights = load_file(file)
    embedding = weights.pop("model.embed_tokens.weight")
    if stored != "target":
        weights["model.embed_tokens.weight"] = embedding
    if stored != "source":
        weights["lm_head.weight"] = embedding.clone()
    save_file(weights, file, metadata={"format": "pt"})
    source = open_source(single)
    assert "lm_head.weight" not in source.tensor_names()
    name = "model.embed_tokens.weight"
    assert torch.equal(source.read([name])[name], embedding)


def test_stale_rotary_buffers_are_tolerated(single):
    file = single / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, file, metadata={"format": "pt"})
    assert len(open_source(single).tensor_names()) == len(weights) - 1


# ------------------------------------------------------------------------------------- what fails


def test_a_wrong_path_names_the_nearest(tiny):
    message = refusal(str(tiny)[:-1])
    assert "no such file or directory" in message and f"did you mean {tiny}?" in message


def test_a_home_that_nobody_has():
    assert "~nobody-at-all/model: no such file" in refusal("~nobody-at-all/model")


def test_a_built_in_name_is_never_a_folder(tiny, tmp_path, monkeypatch):
    """Every verb reads the same model by it, and nothing is written where it would not be found."""
    shutil.copytree(tiny, tmp_path / "pico")
    monkeypatch.chdir(tmp_path)
    assert open_source("pico").path != tmp_path / "pico" and open_direct("pico") is None
    assert open_source("./pico").path.resolve() == tmp_path / "pico"
    for name in ("demo", "pico"):
        with pytest.raises(UserError, match=f"'{name}' is the name of a built-in model"):
            posttrain.quantize(str(tiny), out=name)


def test_a_path_whose_parent_is_missing(tmp_path):
    assert f"{tmp_path / 'a'} does not exist either" in refusal(tmp_path / "a" / "b")


def test_a_file_that_is_not_gguf(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    assert "not a GGUF one; pass a .gguf file or a model directory" in refusal(
        tmp_path / "notes.txt"
    )
    (tmp_path / "fake.gguf").write_text("hello")
    assert "not a GGUF file" in refusal(tmp_path / "fake.gguf")


def test_a_shard_instead_of_its_directory(tiny):
    assert f"pass the directory instead: {tiny}" in refusal(shards_of(tiny)[0])


def test_directory_without_config(tiny):
    (tiny / "config.json").unlink()
    assert f"{tiny}: no config.json" in refusal(tiny)


@pytest.mark.parametrize("text", ["{", "[1]", '{"hidden_size": 3}', '{"model_type": 3}'])
def test_config_that_is_none(tiny, text):
    (tiny / "config.json").write_text(text)
    assert str(tiny / "config.json") in refusal(tiny)


def test_config_with_impossible_values(tiny):
    edit_config(tiny, hidden_size="wide")
    assert f"{tiny}/config.json: " in refusal(tiny)


def test_unknown_architecture(tiny):
    edit_config(tiny, model_type="hal9000")
    message = refusal(tiny)
    assert 'no model_type "hal9000"' in message and "config.json" in message
    edit_config(tiny, auto_map={"AutoModelForCausalLM": "modeling_hal.Hal"})
    assert "its own code, which posttrain never runs" in refusal(tiny)


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
        {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
        {"model_type": "vit", "architectures": ["ViTForImageClassification"]},
        {"architectures": ["LlamaForSequenceClassification"]},
    ],
)
def test_not_a_causal_language_model(tiny, fields):
    edit_config(tiny, **fields)
    message = refusal(tiny)
    assert f"{fields['architectures'][0]} is not a causal language model" in message


def test_directory_without_weights(tiny):
    for file in tiny.glob("*.safetensors*"):
        file.unlink()
    assert "the weights are missing" in refusal(tiny)
    (tiny / "pytorch_model.bin").write_bytes(b"pickle")
    message = refusal(tiny)
    assert "only pytorch_model.bin" in message and "safetensors only" in message


def test_safetensors_of_another_name(single):
    (single / "model.safetensors").rename(single / "adapter_model.safetensors")
    assert "found adapter_model.safetensors" in refusal(single)


def test_missing_shard(tiny):
    shard = shards_of(tiny)[1]
    shard.unlink()
    assert f"names the shard {shard.name}" in refusal(tiny)


@pytest.mark.parametrize("keep", [0.999, 0.7])
def test_truncated_shard(tiny, keep):
    shard = max(shards_of(tiny), key=lambda file: file.stat().st_size)
    whole = shard.stat().st_size
    os.truncate(shard, int(whole * keep))
    message = refusal(tiny)
    assert f"{shard}: truncated: the header says {whole} bytes" in message
    assert f"the file has {int(whole * keep)}" in message


def test_shard_cut_inside_its_header(tiny):
    shard = shards_of(tiny)[0]
    for size in (0, 5, 8, 20):
        os.truncate(shard, size) if shard.stat().st_size >= size else shard.write_bytes(
            b"\0" * size
        )
        assert str(shard) in refusal(tiny)


def header_bytes(header: dict) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "content, what",
    [
        (b"\xff" * 64, "not a safetensors file"),
        ((4).to_bytes(8, "little") + b"{{{{", "not JSON"),
        (header_bytes([]), "expected a JSON object"),  # type: ignore[arg-type]
        (header_bytes({"a": {"dtype": "F32"}}), "bad entry for tensor a"),
        (
            header_bytes({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}) + b"\0" * 4,
            "needs 8 bytes, the header gives it 4",
        ),
        (
            header_bytes({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}) + b"\0",
            "dtype F4, which posttrain cannot read",
        ),
        (
            header_bytes({"a": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]}}) + b"\0" * 3,
            "leaves a gap",
        ),
        (
            header_bytes({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}) + b"\0" * 3,
            "the header says",
        ),
    ],
)
def test_corrupt_header(single, content, what):
    (single / "model.safetensors").write_bytes(content)
    message = refusal(single)
    assert what in message and "model.safetensors" in message


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": 3}'])
def test_corrupt_index(tiny, text):
    (tiny / "model.safetensors.index.json").write_text(text)
    assert "not a safetensors index" in refusal(tiny)


def test_index_may_not_leave_the_directory(tiny):
    index = tiny / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = "../../secret.safetensors"
    index.write_text(json.dumps(content))
    assert "not a plain file name" in refusal(tiny)


def test_index_that_lies(tiny):
    index = tiny / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.extra.weight"] = shards_of(tiny)[0].name
    index.write_text(json.dumps(content))
    assert "lacks tensor model.extra.weight" in refusal(tiny)


def rewrite(directory: Path, change) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def test_missing_unexpected_and_misshapen_tensors(single, tmp_path):
    def copy(name):
        return shutil.copytree(single, tmp_path / name)

    rewrite(a := copy("a"), lambda w: w.pop("model.layers.1.mlp.up_proj.weight"))
    assert "lacks 1 tensor (model.layers.1.mlp.up_proj.weight)" in refusal(a)
    rewrite(b := copy("b"), lambda w: w.update({"model.surprise": torch.ones(2)}))
    assert "holds 1 tensor (model.surprise)" in refusal(b)
    rewrite(c := copy("c"), lambda w: w.update({"model.norm.weight": torch.ones(5)}))
    assert "model.norm.weight has shape [5] but its config asks for [32]" in refusal(c)
    rewrite(d := copy("d"), lambda w: w.update({"lm_head.weight": torch.ones(96, 32)}))
    assert "ties lm_head.weight to model.embed_tokens.weight" in refusal(d)


def test_missing_expert(tmp_path):
    save_tiny("mixtral", tmp_path)
    names = [n for n in load_file(tmp_path / "model.safetensors") if ".experts.2." in n]
    rewrite(tmp_path, lambda w: [w.pop(n) for n in names[:1]])
    assert "needs 4 experts, the checkpoint has 3" in refusal(tmp_path)


def test_experts_of_different_dtypes(tmp_path):
    """Each would be read with the bits of the first."""
    save_tiny("mixtral", tmp_path)
    name = next(n for n in load_file(tmp_path / "model.safetensors") if ".experts.2." in n)
    rewrite(tmp_path, lambda w: w.update({name: w[name].bfloat16()}))
    assert "are stored as torch.bfloat16, torch.float32; save all as one" in refusal(tmp_path)


def test_quantized_checkpoint_opens_but_can_be_refused(single):
    require_unquantized(open_source(single))
    edit_config(
        single,
        quantization_config={"quant_method": "compressed-tensors", "format": "pack-quantized"},
    )
    rewrite(single, lambda w: w.update({"x.weight_packed": torch.ones(2, dtype=torch.int32)}))
    source = open_source(single)
    assert source.quantization_config["format"] == "pack-quantized"
    assert "x.weight_packed" in source.tensor_names()
    with pytest.raises(UserError, match="already quantized .compressed-tensors.*full-precision"):
        require_unquantized(source)


def test_unknown_tensor_name(tiny):
    with pytest.raises(UserError, match="no tensor named nonsense"):
        open_source(tiny).read(["nonsense"])


# ------------------------------------------------------------------------ tokenizer and side files


def write_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "a": 1, "b": 2, "</s>": 3}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(directory)


def test_tokenizer_with_its_chat_template(tiny):
    with pytest.raises(UserError, match="no tokenizer"):
        open_source(tiny).tokenizer()
    write_tokenizer(tiny)
    tokenizer = open_source(tiny).tokenizer()
    assert tokenizer.encode("b a") == [2, 1]
    chat = [{"role": "user", "content": "a b"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "a b"


def test_broken_tokenizer(tiny):
    (tiny / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot load its tokenizer"):
        open_source(tiny).tokenizer()


def test_side_files_are_everything_but_weights_config_and_code(tiny, tmp_path):
    write_tokenizer(tiny)
    for name in ("LICENSE", "chat_template.jinja", "generation_config.json", "merges.txt"):
        (tiny / name).write_text("{}")
    for name in ("modeling_x.py", "pytorch_model.bin", "posttrain.json", ".hidden", "m.gguf"):
        (tiny / name).write_text("no")
    (tiny / "original").mkdir()
    open_source(tiny).copy_side_files(tmp_path / "out")
    copied = {file.name for file in (tmp_path / "out").iterdir()}
    assert copied == {
        "LICENSE",
        "chat_template.jinja",
        "generation_config.json",
        "merges.txt",
        "tokenizer.json",
        "tokenizer_config.json",
    }


# ------------------------------------------------------------------------------------ fingerprint


def test_fingerprint_changes_when_and_only_when_the_model_does(tiny, tmp_path):
    before = open_source(tiny).fingerprint()
    assert before == open_source(tiny).fingerprint()
    moved = shutil.copytree(tiny, tmp_path / "moved")
    assert open_source(moved).fingerprint() == before
    (moved / "README.md").write_text("words")
    assert open_source(moved).fingerprint() == before
    file = next(moved.glob("*.safetensors"))
    tensors = {name: tensor + 1 for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})  # as large as before
    trained = open_source(moved).fingerprint()
    assert trained != before
    edit_config(moved, rms_norm_eps=0.5)
    assert open_source(moved).fingerprint() not in (before, trained)
    save_tiny("llama", tmp_path / "single")
    assert open_source(tmp_path / "single").fingerprint() != before


# ----------------------------------------------------------------------------------------- memory

MEMORY = """
import resource, sys, threading, time
from posttrain.models.source import open_source

def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()

def watch():
    while not done:
        seen.append(resident())
        time.sleep(0.001)

source = open_source(sys.argv[1])
source.read(["model.norm.weight"])
start, seen, done = resident(), [], False
watcher = threading.Thread(target=watch)
watcher.start()
values = source.read(["model.embed_tokens.weight"])
seen.append(resident())
done = True
watcher.join()
del values
print(source.nbytes("model.embed_tokens.weight"), max(seen) - start, resident() - start)
"""


def test_reading_costs_the_tensor_and_leaves_nothing(single):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(single)
    config.vocab_size = 1_500_000
    config.dtype = torch.bfloat16
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(single)
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, str(single)], capture_output=True, text=True, check=True
    )
    size, peak, left = map(int, run.stdout.split())
    assert size == 1_500_000 * 32 * 2
    assert size * 0.9 < peak < size + 10e6
    assert left < 10e6


# -------------------------------------------------------------------------------------------- hub


@pytest.mark.parametrize(
    "text, possible",
    [
        ("gpt2", True),
        ("HuggingFaceTB/SmolLM2-135M", True),
        ("a/b/c", False),
        ("./a", False),
        ("/a/b", False),
        ("model.gguf", False),
        ("a b", False),
    ],
)
def test_what_can_be_a_hub_id(text, possible):
    assert hub.looks_like_hub_id(text) == possible


class FakeHub(BaseHTTPRequestHandler):
    """The four requests that downloading a repository makes, answered from a directory."""

    folder: Path
    sha = "0123456789abcdef0123456789abcdef01234567"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        path = self.path.split("?")[0]
        files = sorted(self.folder.iterdir())
        headers = {"X-Repo-Commit": self.sha}
        if path.startswith("/api/models/own/gated") or "own/gated/resolve" in path:
            return self.send(403, b"{}", {"X-Error-Code": "GatedRepo"}, body)
        if not path.removeprefix("/api/models").startswith("/own/tiny"):
            return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        if "/resolve/" in path:
            file = self.folder / path.rpartition("/")[2]
            headers["ETag"] = f'"{file.name}"'
            return self.send(200, file.read_bytes(), headers, body)
        if "/tree/" in path:
            rows = [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name}
                for f in files
            ]
            return self.send(200, json.dumps(rows).encode(), headers, body)
        info = {
            "id": "own/tiny",
            "sha": self.sha,
            "siblings": [{"rfilename": f.name} for f in files],
        }
        return self.send(200, json.dumps(info).encode(), headers, body)

    def send(self, status, content, headers, body):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)


OPEN_HUB = """
import sys
import posttrain
from posttrain.errors import UserError
from posttrain.models.source import open_source
for name in sys.argv[1:]:
    try:
        source = open_source(name)
        print(source.kind, len(source.tensor_names()), sorted(f.name for f in source.path.iterdir()))
    except UserError as error:
        print(error)
"""


def open_from_hub(home: Path, endpoint: str, *names: str, **variables: str) -> list[str]:
    environment = os.environ | {"HF_HOME": str(home), "HF_ENDPOINT": endpoint} | variables
    run = subprocess.run(
        [sys.executable, "-c", OPEN_HUB, *names],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        cwd=home,
    )
    return run.stdout.splitlines()


def test_hub_download_cache_and_refusals(tiny, tmp_path):
    write_tokenizer(tiny)
    (tiny / "pytorch_model.bin").write_text("never fetched")
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (FakeHub,), {"folder": tiny}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    home = tmp_path / "home"
    home.mkdir()
    try:
        found, missing, gated = open_from_hub(
            home, endpoint, "own/tiny", "own/nothing", "own/gated"
        )
    finally:
        server.shutdown()
        server.server_close()
    expected = len(open_source(tiny).tensor_names())
    assert found.startswith(f"hub {expected} ") and "tokenizer.json" in found
    assert "pytorch_model.bin" not in found
    assert "no such public model on the hub" in missing
    assert "accepted its terms" in gated
    # the server is gone: what was fetched still opens, what was not says why
    cached, absent = open_from_hub(home, endpoint, "own/tiny", "own/other")
    assert cached == found
    assert "cannot be reached" in absent and "local directory" in absent
    offline = open_from_hub(home, endpoint, "own/tiny", "own/other", HF_HUB_OFFLINE="1")
    assert offline == [cached, absent]


def test_a_local_directory_wins_over_a_hub_id(tiny, monkeypatch):
    monkeypatch.chdir(tiny.parent)
    monkeypatch.setattr("posttrain.models.source.fetch", lambda *a: pytest.fail("asked the hub"))
    assert open_source("tiny").kind == "directory"
