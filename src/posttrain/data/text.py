"""Text for calibration and evaluation: where it comes from and how it becomes token windows.

A file is ``.txt`` or ``.md`` (one document) or ``.jsonl`` (one document a line, in the field
``text`` or, for chats, ``messages``), each also as ``.gz``, in UTF-8. A corpus needs no file; two
are joined by a plus sign.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from posttrain.data.prose import prose
from posttrain.data.python_docs import python_docs
from posttrain.errors import UserError

Split = Literal["evaluation", "calibration"]
Message = dict[str, Any]
Document = str | list[Message]

CORPORA = {"python-docs": python_docs, "prose": prose}  # name -> documents of a split
DEFAULT_CORPUS: dict[Split, str] = {
    "evaluation": "python-docs",
    "calibration": "prose+python-docs",
}
SEPARATOR = "\n\n"

# A prefix of the text is enough when few tokens are asked for: with this many characters for
# each token wanted there are tokens to spare in any natural text, and the spare ones at the
# cut, which may differ from those of the whole text, are not used.
CHARACTERS_PER_TOKEN = 16
SPARE_TOKENS = 64


@dataclass(frozen=True)
class Text:
    """Documents in order, each a string or a list of chat messages.

    ``name`` is the file as given, or the corpus and its split; ``sha256`` is over the documents'
    content, so that two results with the same digest were measured on the same text.
    """

    name: str
    documents: tuple[Document, ...]
    sha256: str

    @classmethod
    def of(cls, name: str, documents: list[Document]) -> "Text":
        plain = SEPARATOR.join(d if isinstance(d, str) else _canonical(d) for d in documents)
        return cls(name, tuple(documents), hashlib.sha256(plain.encode()).hexdigest())

    def render(self, tokenizer: Any = None, chat: bool = False) -> list[str]:
        """Documents as strings. With ``chat`` every document must be chat messages, and the
        tokenizer's chat template turns them into text; without it none may be."""
        return [_render(self.name, i, d, tokenizer, chat) for i, d in enumerate(self.documents)]


def load_text(where: str | Path | None = None, split: Split = "evaluation") -> Text:
    """The text of a corpus (``None``: the default one of the split) or of a file.

    ``split`` chooses the part of a corpus; a file is taken whole. Raises UserError for a file
    that is missing, empty, of another type, not UTF-8, or has a malformed row.
    """
    if split not in ("evaluation", "calibration"):
        raise UserError(f'split must be "evaluation" or "calibration", not {split!r}')
    name = str(DEFAULT_CORPUS[split] if where is None else where)
    if not name:
        raise UserError("text is empty: give a file, a corpus, or nothing for the default one")
    corpora = name.split("+")
    if set(corpora) <= set(CORPORA):
        documents: list[Document] = [d for corpus in corpora for d in CORPORA[corpus](split)]
        return Text.of(f"{name} ({split})", documents)
    return Text.of(name, _read_file(Path(name).expanduser()))


def token_windows(
    text: Text,
    tokenizer: Any,
    window: int,
    stride: int | None = None,
    max_tokens: int | None = None,
    max_windows: int | None = None,
    chat: bool = False,
) -> torch.Tensor:
    """Cut the text into windows of token ids, int64 ``[windows, window]``.

    Documents are joined by blank lines into one stream; window i starts ``i * stride`` tokens
    into it (``stride=None``: windows do not overlap). The last, partial window is dropped.
    ``max_tokens`` bounds the tokens of the stream that are used.

    A tokenizer that starts every text with a BOS token (Llama's, Gemma's) gets it at the start
    of every window, since such a model never saw text without; the window then holds
    ``window - 1`` tokens of the stream, and that is also its default stride.
    """
    bos = leading_bos(tokenizer)
    content = window - len(bos)
    step = content if stride is None else stride
    _check_bounds(window, stride, content, max_tokens, max_windows)
    wanted = _tokens_wanted(content, step, max_tokens, max_windows)
    stream = _tokenize(SEPARATOR.join(text.render(tokenizer, chat)), tokenizer, wanted)
    count = (len(stream) - content) // step + 1
    if len(stream) < content:
        _refuse_short(text, len(stream), content, max_tokens)
    starts = torch.arange(count if max_windows is None else min(count, max_windows)) * step
    windows = stream[starts[:, None] + torch.arange(content)]
    return torch.cat([torch.tensor(bos).long().expand(len(windows), -1), windows], dim=1)


def leading_bos(tokenizer: Any) -> list[int]:
    """``[bos_token_id]`` where the tokenizer itself puts one before every text, else ``[]``."""
    bos = tokenizer.bos_token_id
    ids = tokenizer("a")["input_ids"]
    return [bos] if bos is not None and ids[:1] == [bos] else []


def _check_bounds(
    window: int, stride: int | None, content: int, max_tokens: int | None, max_windows: int | None
) -> None:
    if window < 2:
        raise UserError(f"window must be at least 2 tokens, not {window}")
    if stride is not None and not 1 <= stride <= content:
        raise UserError(f"stride must be between 1 and {content} for window {window}, not {stride}")
    for name, value in (("max_tokens", max_tokens), ("max_windows", max_windows)):
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, not {value}")


def _tokens_wanted(
    content: int, step: int, max_tokens: int | None, max_windows: int | None
) -> int | None:
    bounds = [] if max_tokens is None else [max_tokens]
    if max_windows is not None:
        bounds.append(content + (max_windows - 1) * step)
    return min(bounds, default=None)


def _refuse_short(text: Text, tokens: int, needed: int, max_tokens: int | None) -> None:
    if max_tokens is not None and max_tokens < needed:
        raise UserError(
            f"max_tokens {max_tokens} does not fill one window of {needed} tokens of text; "
            "raise it or choose a smaller window"
        )
    raise UserError(
        f"{text.name} has {tokens} tokens, fewer than one window of {needed}; "
        "choose a smaller window or a longer text"
    )


def _tokenize(stream: str, tokenizer: Any, wanted: int | None) -> torch.Tensor:
    """Ids of the first ``wanted`` tokens of the stream, or of all."""
    if wanted is not None:
        ids = _token_ids(stream[: wanted * CHARACTERS_PER_TOKEN + SPARE_TOKENS], tokenizer)
        if len(ids) >= wanted + SPARE_TOKENS:
            return ids[:wanted]
    return _token_ids(stream, tokenizer)[:wanted]


def _token_ids(text: str, tokenizer: Any) -> torch.Tensor:
    # verbose=False: no warning that the stream is longer than the model's context; it is cut.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def _render(name: str, index: int, document: Document, tokenizer: Any, chat: bool) -> str:
    if isinstance(document, str):
        if chat:
            raise UserError(
                f'{name}: chat needs rows with "messages", but document {index + 1} is plain text'
            )
        return document
    if not chat:
        raise UserError(
            f"{name}: document {index + 1} holds chat messages; ask for the chat template "
            "(chat=True) or give rows with a text field"
        )
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(f"{name} holds chat messages, but this model has no chat template")
    try:
        return tokenizer.apply_chat_template(document, tokenize=False)
    except Exception as error:  # templates raise whatever their author chose
        raise UserError(f"{name}: the chat template refuses row {index + 1}: {error}") from error


def _read_file(path: Path) -> list[Document]:
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"text {path} {kind}; give a file, or one of: {', '.join(CORPORA)}")
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if suffix not in READERS:
        raise UserError(
            f"text {path}: cannot read {suffix or 'a file without suffix'}; "
            f"known are {', '.join(READERS)}, each also as .gz"
        )
    content = _decode(path, _read_bytes(path))
    documents = list(READERS[suffix](path, content))
    if not any(isinstance(d, list) or d.strip() for d in documents):
        raise UserError(f"text {path} is empty")
    return documents


def _read_bytes(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix != ".gz":
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"text {path} is not a whole gzip file: {error}") from error


def _decode(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")  # a byte-order mark is no part of the text
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"text {path} line {line}: byte 0x{data[error.start]:02x} is not UTF-8; "
            "convert the file to UTF-8"
        ) from error


def _read_plain(path: Path, content: str) -> Iterator[Document]:
    yield content.replace("\r\n", "\n")


def _read_jsonl(path: Path, content: str) -> Iterator[Document]:
    """One document a line; blank lines hold none. Lines end at a newline only: JSON strings may
    contain the other characters that ``str.splitlines`` splits at."""
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            yield _document(f"{path} line {number}", line)


READERS = {".txt": _read_plain, ".md": _read_plain, ".jsonl": _read_jsonl}


def _document(where: str, line: str) -> Document:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}, column {error.colno}: not JSON ({error.msg})") from error
    except RecursionError as error:
        raise UserError(f"{where}: JSON nested too deeply") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object, found {_json_type(row)}")
    if "text" in row:
        return _text_field(where, row["text"])
    if "messages" in row:
        return _messages_field(where, row["messages"])
    found = ", ".join(sorted(row)) or "none"
    raise UserError(f'{where}: needs a field "text" or "messages"; its fields are: {found}')


def _text_field(where: str, text: Any) -> str:
    if not isinstance(text, str):
        raise UserError(f'{where}: "text" must be a string, not {_json_type(text)}')
    return _encodable(where, "text", text)


def _messages_field(where: str, messages: Any) -> list[Message]:
    if not isinstance(messages, list) or not messages:
        raise UserError(
            f'{where}: "messages" must be a list of at least one message, not '
            f"{_json_type(messages)}"
        )
    for index, message in enumerate(messages):
        _check_message(f"{where}, message {index + 1}", message)
    return messages


def _check_message(where: str, message: Any) -> None:
    if not isinstance(message, dict):
        raise UserError(f"{where}: expected an object, found {_json_type(message)}")
    for field in ("role", "content"):
        value = message.get(field)
        if not isinstance(value, str):
            raise UserError(f'{where}: "{field}" must be a string, not {_json_type(value)}')
        _encodable(where, field, value)


def _encodable(where: str, field: str, value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f'{where}: "{field}" has half of a surrogate pair at character {error.start + 1}'
        ) from error
    return value


def _json_type(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "true or false",
        int: "a number",
        float: "a number",
        type(None): "null or missing",
    }
    return names[type(value)] if value != [] else "an empty list"


def _canonical(document: list[Message]) -> str:
    return json.dumps(document, ensure_ascii=False, sort_keys=True)
