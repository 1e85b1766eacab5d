"""Laws of text loading: what is read is what is in the file, and errors name the place."""

import gzip
import json
import sys

import pytest
import torch

from posttrain.data import load_text, token_windows
from posttrain.data.prose import prose
from posttrain.data.python_docs import _shingles, paragraph_key, python_docs
from posttrain.errors import UserError


class Words:
    """A tokenizer of whitespace-separated words; the id of "w12" is 12."""

    chat_template = "{{ messages }}"

    def __init__(self, bos=None):
        self.bos_token_id = bos
        self.characters = 0

    def __call__(self, text, add_special_tokens=True, verbose=True):
        self.characters += len(text)
        ids = [int(word[1:] or 0) for word in text.split()]
        bos = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        return {"input_ids": bos + ids}

    def apply_chat_template(self, messages, tokenize):
        if messages[0]["role"] == "nobody":
            raise ValueError("roles must alternate")
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)


def paragraphs(documents):
    return {paragraph_key(p) for document in documents for p in document.split("\n\n")}


def test_the_splits_of_the_default_corpus_share_no_paragraph():
    evaluation, calibration = python_docs("evaluation"), python_docs("calibration")
    assert not paragraphs(evaluation) & paragraphs(calibration)


def test_the_splits_of_the_default_corpus_share_no_near_duplicate():
    evaluation = set().union(*map(_shingles, paragraphs(python_docs("evaluation"))))
    for paragraph in paragraphs(python_docs("calibration")):
        shingles = _shingles(paragraph)
        assert len(shingles & evaluation) < 0.5 * len(shingles)


def test_the_default_corpus_repeats_no_paragraph():
    for split in ("evaluation", "calibration"):
        found = [paragraph_key(p) for d in python_docs(split) for p in d.split("\n\n")]
        assert len(found) == len(set(found))


def test_the_default_corpus_is_large_enough():
    # At 4.3 characters a token: 32 windows of 512 to evaluate, 128 to calibrate on.
    assert sum(map(len, python_docs("evaluation"))) > 32 * 512 * 4.3
    assert sum(map(len, python_docs("calibration"))) > 128 * 512 * 4.3


def test_prose_repeats_no_paragraph_and_none_of_the_evaluation_text():
    found = [paragraph_key(p) for d in prose("calibration") for p in d.split("\n\n") if p.strip()]
    long = [key for key in found if len(key.split()) > 8]
    assert len(long) == len(set(long)) > 300
    evaluation = set().union(*map(_shingles, paragraphs(python_docs("evaluation"))))
    assert all(len(_shingles(key) & evaluation) < 0.1 * len(_shingles(key)) for key in long)


def test_prose_has_whole_documents_and_no_evaluation_part():
    documents = prose("calibration")
    assert len(documents) > 30 and sum(map(len, documents)) > 80_000
    assert all(len(document.split()) > 80 and "***" not in document for document in documents)
    with pytest.raises(UserError, match="calibration only"):
        load_text("prose")


def test_corpora_are_joined_by_a_plus_sign():
    joined = load_text("prose+python-docs", split="calibration")
    assert list(joined.documents) == prose("calibration") + python_docs("calibration")
    assert load_text(split="calibration") == joined
    with pytest.raises(UserError, match="does not exist"):
        load_text("prose+novels", split="calibration")


def test_a_python_without_the_corpus_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UserError, match=r"pydoc_data\.topics.*\.jsonl"):
        load_text()


def test_text_is_the_same_whatever_its_container(tmp_path):
    rows = ["Grüße, 世界 🙂\u2028still the same row", "second"]
    jsonl = "".join(json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(jsonl, encoding="utf-8")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(jsonl.encode()))
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbf" + "\n\n".join(rows).encode())
    texts = [load_text(tmp_path / name) for name in ("a.jsonl", "b.jsonl.gz", "c.txt")]
    assert texts[0].documents == tuple(rows)
    assert len({text.sha256 for text in texts}) == 1
    (tmp_path / "c.txt").write_text("\n\n".join(rows) + ".", encoding="utf-8")
    assert load_text(tmp_path / "c.txt").sha256 != texts[0].sha256


BAD_FILES = [
    ("missing.txt", None, "does not exist"),
    ("empty.txt", b"", "is empty"),
    ("blank.jsonl", b'{"text": " "}\n\n', "is empty"),
    ("table.csv", b"a,b", r"cannot read \.csv"),
    ("bare", b"a", "without suffix"),
    ("latin.txt", "ok\nGrüße".encode("latin-1"), r"line 2: byte 0xfc is not UTF-8"),
    ("cut.txt.gz", gzip.compress(b"hello world" * 50)[:-12], "not a whole gzip"),
    ("plain.txt.gz", b"not compressed", "not a whole gzip"),
    ("bad.jsonl", b'{"text": "a"}\n{"text": ', r"bad\.jsonl line 2, column 10: not JSON"),
    ("list.jsonl", b'["a"]', "line 1: expected an object, found a list"),
    ("field.jsonl", b'{"text": "a"}\n{"body": "b"}', r"line 2: needs.*its fields are: body"),
    ("none.jsonl", b'{"text": null}', '"text" must be a string, not null'),
    ("half.jsonl", b'{"text": "ab\\ud800"}', "half of a surrogate pair at character 3"),
    ("chat0.jsonl", b'{"messages": []}', "at least one message, not an empty list"),
    ("chat1.jsonl", b'{"messages": [{"role": "user"}]}', 'message 1: "content" must be a string'),
    ("chat2.jsonl", b'{"messages": ["hi"]}', "message 1: expected an object, found a string"),
    ("deep.jsonl", b"[" * 200_000, "line 1"),
]


@pytest.mark.parametrize("name, content, message", BAD_FILES, ids=[row[0] for row in BAD_FILES])
def test_a_bad_file_is_one_clear_error(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_text(path)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_chat_rows_need_the_template_and_plain_rows_refuse_it(tmp_path):
    (tmp_path / "chat.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}'
    )
    (tmp_path / "plain.txt").write_text("hi")
    chat = load_text(tmp_path / "chat.jsonl")
    assert chat.render(Words(), chat=True) == ["<user>hi<assistant>yo"]
    with pytest.raises(UserError, match="document 1 holds chat messages"):
        chat.render(Words())
    with pytest.raises(UserError, match="plain text"):
        load_text(tmp_path / "plain.txt").render(Words(), chat=True)
    base_model = Words()
    base_model.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        chat.render(base_model, chat=True)


def test_a_refusing_chat_template_names_the_row(tmp_path):
    (tmp_path / "chat.jsonl").write_text('{"messages": [{"role": "nobody", "content": "hi"}]}')
    with pytest.raises(UserError, match="refuses row 1: roles must alternate"):
        load_text(tmp_path / "chat.jsonl").render(Words(), chat=True)


@pytest.fixture
def counting(tmp_path):
    path = tmp_path / "count.txt"
    path.write_text(" ".join(f"w{i}" for i in range(1, 1001)))
    return load_text(path)


@pytest.mark.parametrize("window, stride", [(10, None), (10, 10), (10, 3), (7, 1), (1000, None)])
def test_windows_are_slices_of_the_stream(counting, window, stride):
    windows = token_windows(counting, Words(), window, stride)
    step = stride or window
    assert len(windows) == (1000 - window) // step + 1
    for i, row in enumerate(windows.tolist()):
        assert row == list(range(1 + i * step, 1 + i * step + window))


def test_max_tokens_and_max_windows_take_a_prefix(counting):
    everything = token_windows(counting, Words(), 10)
    assert torch.equal(token_windows(counting, Words(), 10, max_tokens=45), everything[:4])
    assert torch.equal(token_windows(counting, Words(), 10, max_windows=4), everything[:4])
    few = Words()
    token_windows(counting, few, 10, max_windows=4)
    assert few.characters < 1000  # and do not tokenize the rest


def test_a_bos_tokenizer_gets_it_in_every_window_and_loses_no_token(counting):
    windows = token_windows(counting, Words(bos=7777), 11)
    assert (windows[:, 0] == 7777).all()
    assert windows[:, 1:].flatten().tolist() == list(range(1, 1001))


@pytest.mark.parametrize(
    "bounds, message",
    [
        ({"window": 1}, "window must be at least 2"),
        ({"window": 8, "stride": 9}, "stride must be between 1 and 8"),
        ({"window": 8, "stride": 0}, "stride must be between"),
        ({"window": 8, "max_tokens": 0}, "max_tokens must be at least 1"),
        ({"window": 8, "max_tokens": 7}, "max_tokens 7 does not fill one window of 8"),
        ({"window": 1001}, "1000 tokens, fewer than one window of 1001"),
    ],
)
def test_impossible_windows_are_refused(counting, bounds, message):
    with pytest.raises(UserError, match=message):
        token_windows(counting, Words(), **bounds)


def test_an_empty_name_is_no_default():
    with pytest.raises(UserError, match="text is empty"):
        load_text("")


def test_an_unknown_split_is_refused():
    with pytest.raises(UserError, match="'test'"):
        load_text(split="test")
