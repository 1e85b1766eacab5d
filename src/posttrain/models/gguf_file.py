"""GGUF files: header, metadata and tensors, read without mapping the file.

Version 2 and 3 of the format (docs/gguf.md of ggml): magic, counts, key-value metadata, tensor
table, aligned data. Block sizes and the dequantizer come from the `gguf` package; the header is
parsed here because that package's reader maps the file and takes seconds on a large vocabulary.
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from posttrain.errors import UserError
from posttrain.models.shards import OpenFiles

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
VERSIONS = (2, 3)
# How llama.cpp names the parts of a model: its name, the number of the part, how many there are.
PART = "{stem}-{number:05d}-of-{count:05d}.gguf"
MERGE = "or merge the parts with `llama-gguf-split --merge` and give the merged file"
DEFAULT_ALIGNMENT = 32
# Metadata value types (enum gguf_metadata_value_type) with a fixed size, as struct codes.
SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
# Dequantize this many values at a time: the dequantizer's temporaries then stay in the cache.
CHUNK_VALUES = 1 << 18


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the table: shape in torch order, `start` an absolute byte offset."""

    file: Path
    start: int
    shape: tuple[int, ...]
    type: GGMLQuantizationType

    @property
    def nbytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // block * size

    def read(self, files: OpenFiles) -> torch.Tensor:
        """The values in fresh float32 memory, dequantized a chunk at a time."""
        block, size = GGML_QUANT_SIZES[self.type]
        count = math.prod(self.shape)
        out = torch.empty(count, dtype=torch.float32)
        step = CHUNK_VALUES // block * block
        for first in range(0, count, step):
            values = min(step, count - first)
            raw = torch.empty(values // block * size, dtype=torch.uint8)
            files.read_into(self.file, self.start + first // block * size, raw)
            out[first : first + values] = _dequantize(raw, self.type)
        return out.view(self.shape)


def _dequantize(raw: torch.Tensor, kind: GGMLQuantizationType) -> torch.Tensor:
    """The bytes of whole blocks -> flat float32. Passed as one row: the package loops over rows."""
    plain = PLAIN.get(kind.name)
    if plain is not None:
        return raw.view(plain).float()
    return torch.from_numpy(dequantize(raw.numpy().reshape(1, -1), kind)).reshape(-1)


@cache
def readable() -> tuple[str, ...]:
    """The tensor types that are read: those that the gguf package can dequantize."""
    return tuple(kind.name for kind in GGMLQuantizationType if _has_dequantizer(kind))


def _has_dequantizer(kind: GGMLQuantizationType) -> bool:
    if kind.name in PLAIN:
        return True
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except (NotImplementedError, KeyError):
        return False
    return True


@dataclass(frozen=True)
class GgufHeader:
    """Metadata (key -> value) and tensors (name -> GgufTensor) of one file."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


class _Cursor:
    """Reads little-endian values one after another; the end of the file is a UserError."""

    def __init__(self, stream: BinaryIO, file: Path):
        self.stream, self.file = stream, file

    def bytes(self, count: int) -> bytes:
        left = self.file.stat().st_size - self.stream.tell()
        data = self.stream.read(count) if count <= left else b""
        if len(data) != count:
            raise UserError(
                f"{self.file}: truncated: the file ends inside its header; copy or download it again"
            )
        return data

    def unpack(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.bytes(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        return self.bytes(self.unpack("Q")).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.unpack(SCALARS[kind])
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            return self.array(self.unpack("I"), self.unpack("Q"))
        raise UserError(f"{self.file}: corrupt header: unknown metadata type {kind}")

    def array(self, kind: int, count: int) -> list[Any]:
        if kind not in SCALARS:
            return [self.value(kind) for _ in range(count)]
        code = SCALARS[kind]
        data = self.bytes(count * struct.calcsize(f"<{code}"))
        values: list[Any] = np.frombuffer(data, dtype=np.dtype(code).newbyteorder("<")).tolist()
        return values


def read_gguf_header(file: Path) -> GgufHeader:
    """The header of a model: of one file, with the tensors of the other parts where it was split.

    UserError for a file that is not whole or not readable, and for parts that are missing.
    """
    first = _read_header(file)
    count = int(first.metadata.get("split.count", 1))
    if count <= 1:
        return first
    tensors = dict(first.tensors)
    for part in _parts(file, first, count)[1:]:
        tensors |= _read_header(part).tensors
    return GgufHeader(first.metadata, tensors)


def _parts(file: Path, first: GgufHeader, count: int) -> list[Path]:
    """The files of a split model, in order; `file` must be the first of them."""
    number = int(first.metadata.get("split.no", 0)) + 1
    ending = PART.format(stem="", number=number, count=count)
    said = f"{file}: part {number} of {count} of a split model"
    if not file.name.endswith(ending):
        raise UserError(f"{said}, whose name must end in {ending}: rename it, {MERGE}")
    stem = file.name.removesuffix(ending)
    names = [PART.format(stem=stem, number=i + 1, count=count) for i in range(count)]
    if number != 1:
        raise UserError(f"{said}: give the first part, {names[0]}, {MERGE}")
    missing = [name for name in names if not (file.parent / name).is_file()]
    if missing:
        raise UserError(f"{said}, but {missing[0]} is not beside it: put it there, {MERGE}")
    return [file.parent / name for name in names]


def _read_header(file: Path) -> GgufHeader:
    """Parse and check one GGUF file; UserError when it is not whole or not readable."""
    with file.open("rb") as stream:
        cursor = _Cursor(stream, file)
        if cursor.bytes(4) != b"GGUF":
            raise UserError(f"{file}: not a GGUF file: it does not begin with the letters GGUF")
        _check_version(file, cursor.unpack("I"))
        tensor_count, key_count = cursor.unpack("Q"), cursor.unpack("Q")
        metadata = {cursor.text(): cursor.value(cursor.unpack("I")) for _ in range(key_count)}
        table = list(_table(cursor, tensor_count))
        alignment = int(metadata.get("general.alignment", DEFAULT_ALIGNMENT))
        data_start = -(-stream.tell() // alignment) * alignment
    tensors = {
        name: GgufTensor(file, data_start + offset, shape, _type(file, name, kind))
        for name, shape, kind, offset in table
    }
    _check_size(file, tensors)
    return GgufHeader(metadata, tensors)


def _check_version(file: Path, version: int) -> None:
    if version in VERSIONS:
        return
    if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
        raise UserError(
            f"{file}: a big-endian GGUF file; convert it with `gguf-convert-endian` (of the gguf "
            "package) to little"
        )
    raise UserError(f"{file}: GGUF version {version}; posttrain reads versions 2 and 3")


def _table(cursor: _Cursor, count: int) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
    for _ in range(count):
        name = cursor.text()
        dims = [cursor.unpack("Q") for _ in range(cursor.unpack("I"))]
        # ggml lists the fastest axis first, torch last
        yield name, tuple(reversed(dims)), cursor.unpack("I"), cursor.unpack("Q")


def _type(file: Path, name: str, kind: int) -> GGMLQuantizationType:
    try:
        found = GGMLQuantizationType(kind)
    except ValueError:
        found = None
    if found is None or found.name not in readable():
        label = found.name if found is not None else f"number {kind}"
        raise UserError(
            f"{file}: tensor {name} is stored as type {label}; posttrain reads {', '.join(readable())}"
        )
    return found


def _check_size(file: Path, tensors: dict[str, GgufTensor]) -> None:
    size = file.stat().st_size
    for name, tensor in tensors.items():
        block = GGML_QUANT_SIZES[tensor.type][0]
        if tensor.shape and tensor.shape[-1] % block:
            raise UserError(
                f"{file}: corrupt header: rows of {name} have {tensor.shape[-1]} values, which "
                f"{tensor.type.name} blocks of {block} do not divide"
            )
    end = max((t.start + t.nbytes for t in tensors.values()), default=0)
    if end > size:
        raise UserError(
            f"{file}: truncated: the header says {end} bytes but the file has {size}; "
            "copy or download it again"
        )
