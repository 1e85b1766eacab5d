"""The tokenizer of a GGUF file gives the tokens that llama.cpp gives."""

import json
import os
import random

import pytest
from models_tiny import tiny_model
from test_models_gguf import write_gguf

from posttrain.models.gguf_tokenizer import SPLITS
from posttrain.models.load import load
from posttrain.models.source import open_source
from posttrain.models.tokenizer import PlainTokenizer

PIECES = [
    "\n", " ", "  ", "    ", "\t", "\r\n", "1", "42", "\u00b2", "\u0663", "\u00bd", "a", "Hello", "X",
    "'s", "don't", "!", "--", "\u00e9", "\u65e5\u672c", "\U0001f642", "<|im_end|>",
]  # fmt: skip


def texts(count: int = 1000) -> list[str]:
    generator = random.Random(0)
    return ["".join(generator.choices(PIECES, k=generator.randint(1, 14))) for _ in range(count)]


def written(tmp_path, **keys):
    """The source of a tiny model; `pre="..."` is the key tokenizer.ggml.pre."""
    named = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    return open_source(write_gguf(tmp_path / "m.gguf", tiny_model("llama"), "llama", keys=named))


def words(tokenizer, text: str) -> list[str]:
    cut = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return [word.replace("\u0120", " ").replace("\u010a", "\n") for word, _ in cut]


# ------------------------------------------------------------------------------------------- words


@pytest.fixture(scope="module")
def demo():
    return open_source("demo").tokenizer()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\n\n1", ["\n\n", "1"]),
        ("    42", ["    ", "4", "2"]),
        ("a 12 b", ["a", " ", "1", "2", " b"]),
        ("x\n\n  7", ["x", "\n\n  ", "7"]),
    ],
)
def test_the_demo_splits_as_smollm2(demo, text, expected):
    tokens = demo.convert_ids_to_tokens(demo.encode(text))
    assert [t.replace("\u0120", " ").replace("\u010a", "\n") for t in tokens] == expected


def test_the_demo_has_the_tokens_of_llama_cpp(demo):
    llama_cpp = pytest.importorskip("llama_cpp")
    model = llama_cpp.Llama(str(open_source("demo").path), vocab_only=True, verbose=False)
    for text in texts():
        expected = model.tokenize(text.encode(), add_bos=False, special=True)
        assert demo.encode(text) == expected, text


def test_the_short_way_to_a_tokenizer_reads_what_the_demo_saves(demo, tmp_path):
    demo.save_pretrained(tmp_path)
    plain = PlainTokenizer.read(tmp_path, "llama")
    assert plain is not None
    for text in texts(300):
        assert plain(text)["input_ids"] == demo.encode(text), text


@pytest.mark.parametrize("name", SPLITS)
def test_names_without_a_split_in_transformers_have_one(name, tmp_path):
    tokenizer = written(tmp_path, pre=name).tokenizer()
    assert words(tokenizer, "ab 12\n\n3    42") == {
        "deepseek-coder": ["ab", " ", "1", "2", "\n", "\n", "3", "    ", "4", "2"]
    }.get(name, ["ab", " ", "1", "2", "\n\n", "3", "    ", "4", "2"])


def test_a_name_nobody_knows_carries_a_note(tmp_path):
    source = written(tmp_path, pre="mystery")
    (note,) = source.notes
    assert "as for GPT-2, because 'mystery' is unknown (tokenizer.ggml.pre)" in note
    assert load(source.path).posttrain["notes"] == [note]
    assert words(source.tokenizer(), "ab 12") == ["ab", " 12"]


@pytest.mark.parametrize("name", ["default", None])
def test_a_file_that_names_no_split_carries_a_note(name, tmp_path):
    (note,) = written(tmp_path, pre=name).notes
    assert "because the file names no split (tokenizer.ggml.pre)" in note


@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe", "qwen2", "smollm", "deepseek-coder"])
def test_a_name_that_is_known_carries_none(name, tmp_path):
    assert written(tmp_path, pre=name).notes == []


@pytest.mark.parametrize(("name", "count"), [("llama-bpe", 1), ("gpt-2", 3)])
def test_llama3_takes_whole_words_of_the_vocabulary(name, count, tmp_path):
    letters = ["<unk>", "<s>", "</s>", *"abcdz", "ab", "cd", "azd"]
    source = written(tmp_path, pre=name, tokens=letters, add_bos_token=False)
    assert len(source.tokenizer().encode("azd")) == count


# --------------------------------------------------------------------------------------------- BOS


@pytest.mark.parametrize(
    ("keys", "begins"),
    [
        ({"model": "llama", "pre": None}, True),
        ({"model": "llama", "pre": None, "add_bos_token": False}, False),
        *(({"pre": name}, True) for name in ("llama3", "llama-v3", "llama-bpe", "tekken")),
        ({"pre": "llama-bpe", "add_bos_token": False}, False),
        ({"pre": "gpt-2"}, False),
        ({"pre": "smollm"}, False),
        ({"pre": "gpt-2", "add_bos_token": True}, True),
        ({"pre": "llama-bpe", "bos_token_id": None}, False),
    ],
)
def test_texts_begin_with_bos_where_llama_cpp_begins_them_so(keys, begins, tmp_path):
    from transformers import AutoTokenizer

    source = written(tmp_path, **keys)
    assert (source.tokenizer().encode("ab")[0] == 1) == begins
    out = tmp_path / "out"
    source.config.save_pretrained(out)
    source.copy_side_files(out)
    again = AutoTokenizer.from_pretrained(out)
    assert again.encode("ab") == source.tokenizer().encode("ab")
    assert again.encode("ab", add_special_tokens=False)[0] != 1


# ------------------------------------------------------------------------------- what lies beside it


def no_links(*paths):
    raise OSError("no links here")


@pytest.mark.parametrize("links", [True, False])
def test_files_beside_it_change_nothing(links, demo, tmp_path, monkeypatch):
    alone = written(tmp_path, add_bos_token=True).tokenizer()
    demo.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("another")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "a", "eos_token": "b"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if not links:
        monkeypatch.setattr(os, "symlink", no_links)
        monkeypatch.setattr(os, "link", no_links)
    beside = open_source(tmp_path / "m.gguf").tokenizer()
    assert beside.encode("ab z") == alone.encode("ab z") and beside.encode("ab")[0] == 1
    assert beside.chat_template == alone.chat_template
    assert (beside.bos_token, beside.eos_token) == (alone.bos_token, alone.eos_token)
    assert len(beside) == len(alone)
