"""Per-example records: what every model said of every token, kept so that any two evaluations
on the same text can be paired later.

``.jsonl`` and ``.jsonl.gz`` hold one row for each model and window; ``.npz`` holds the same as
arrays. Row keys: ``model``, ``text_sha256``, ``window`` (its index), ``start`` (its first token
in the text's token stream), ``first_scored`` (position in the window), ``tokens`` (ids of the whole
window), ``nll`` of the scored tokens in nats and, against a reference, ``kl`` and ``agree``.
"""

import gzip
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.errors import UserError
from posttrain.evaluate.score import Scores
from posttrain.evaluate.windows import Windows

SUFFIXES = (".jsonl", ".jsonl.gz", ".npz")
Row = dict[str, Any]


def check_records_path(path: str | Path) -> Path:
    """The path, if records can be written there; asked before the work, not after it."""
    path = Path(path).expanduser()
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"records {path}: the name must end in {', '.join(SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise UserError(f"records {path}: the folder does not exist")
    return path


def write_records(
    path: str | Path, windows: Windows, text_sha256: str, scores: Sequence[tuple[str, Scores]]
) -> Path:
    """Write the records of one or more models, whole or not at all."""
    path = check_records_path(path)
    rows = (row for name, s in scores for row in _rows(windows, text_sha256, name, s))
    data = _pack_arrays(rows) if path.suffix == ".npz" else _pack_lines(rows)
    # No time of writing in the header: the same results give the same bytes.
    data = gzip.compress(data, mtime=0) if path.suffix == ".gz" else data
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    os.replace(partial, path)
    return path


def read_records(path: str | Path) -> list[Row]:
    """The rows of a records file, in the order they were written."""
    path = check_records_path(path)
    try:
        data = path.read_bytes()
        if path.suffix == ".npz":
            return list(_unpack_arrays(data))
        data = gzip.decompress(data) if path.suffix == ".gz" else data
        return [json.loads(line) for line in data.decode().split("\n") if line]
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"records {path} cannot be read: {error}") from error


def _rows(windows: Windows, text_sha256: str, name: str, scores: Scores) -> Iterator[Row]:
    for i in range(len(windows)):
        first = windows.first_scored(i)
        row = {
            "model": name,
            "text_sha256": text_sha256,
            "window": i,
            "start": i * windows.offset,
            "first_scored": first,
            "tokens": windows.tokens[i].tolist(),
        }
        for part, values in scores.parts().items():
            row[part] = [_short(value) for value in values[i, first - 1 :].numpy()]
        yield row


def _short(value: np.float32) -> float:
    """The shortest decimal that reads back as the same float32."""
    return float(np.format_float_positional(value, unique=True, trim="0"))


def _pack_lines(rows: Iterator[Row]) -> bytes:
    return "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows).encode()


_ARRAYS = {"tokens": np.int64, "nll": np.float32, "kl": np.float32, "agree": np.float32}


def _pack_arrays(rows: Iterator[Row]) -> bytes:
    """Scalars of a row as JSON; its lists joined over the rows, with their lengths."""
    listed = list(rows)
    scalars = [{k: v for k, v in row.items() if k not in _ARRAYS} for row in listed]
    arrays: dict[str, np.ndarray] = {"rows": np.array(json.dumps(scalars))}
    for key, dtype in _ARRAYS.items():
        values = [row.get(key, []) for row in listed]
        arrays[key] = np.concatenate([np.array(v, dtype) for v in values])
        arrays[f"{key}_lengths"] = np.array([len(v) for v in values], np.int64)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def _unpack_arrays(data: bytes) -> Iterator[Row]:
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        arrays: Mapping[str, np.ndarray] = dict(file)
    scalars = json.loads(str(arrays["rows"]))
    parts = {key: np.split(arrays[key], arrays[f"{key}_lengths"].cumsum()[:-1]) for key in _ARRAYS}
    for i, row in enumerate(scalars):
        lists = {key: [_plain(v) for v in values[i]] for key, values in parts.items()}
        yield row | {key: values for key, values in lists.items() if values}


def _plain(value: Any) -> int | float:
    return _short(value) if isinstance(value, np.float32) else int(value)
