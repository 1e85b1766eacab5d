"""Safetensors files: headers checked against the file, tensors read without mapping it.

A file is an 8-byte little-endian header length, a JSON header {name: {dtype, shape,
data_offsets}}, then the data (https://github.com/huggingface/safetensors). We read the bytes with
plain reads into fresh tensors: a mapped file would count its pages in the resident memory that the
streaming pipeline promises to bound.
"""

import json
import math
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from posttrain.errors import UserError

if TYPE_CHECKING:
    from typing_extensions import Self

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
# The format's own limit; a longer header is a corrupt length.
MAX_HEADER = 100_000_000
# One read call returns at most about 2 GiB on Linux.
READ_CHUNK = 1 << 30


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: `start` is an absolute byte offset in `file`."""

    file: Path
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, files: "OpenFiles", out: torch.Tensor | None = None) -> torch.Tensor:
        """The tensor in fresh memory, or in `out` (contiguous, same shape and dtype)."""
        if out is None:
            out = torch.empty(self.shape, dtype=self.dtype)
        files.read_into(self.file, self.start, out)
        return out


class OpenFiles:
    """Files opened at their first read and closed together, so that reading many small tensors
    does not pay for opening a file each time."""

    def __init__(self) -> None:
        self._streams: dict[Path, FileIO] = {}

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *error: object) -> None:
        for stream in self._streams.values():
            stream.close()

    def read_into(self, file: Path, start: int, out: torch.Tensor) -> None:
        """Fill a contiguous tensor with the file's bytes from `start` on."""
        if file not in self._streams:
            self._streams[file] = FileIO(file)
        stream = self._streams[file]
        array: Any = out.view(-1).view(torch.uint8).numpy()
        view = memoryview(array)
        stream.seek(start)
        done = 0
        while done < len(view):
            count = stream.readinto(view[done : done + READ_CHUNK])
            if not count:
                raise UserError(
                    f"{file}: the file ended {len(view) - done} bytes early; it was changed or "
                    "cut while being read"
                )
            done += count


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Name -> StoredTensor for one safetensors file; UserError when the file is not whole."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or not 2 <= length <= MAX_HEADER:
            raise UserError(f"{file}: corrupt header: this is not a safetensors file")
        if 8 + length > size:
            raise UserError(
                f"{file}: truncated: its header is {length} bytes long but the file has "
                f"{size} bytes; copy or download it again"
            )
        text = stream.read(length)
    header = _parse_header(file, text)
    tensors = {name: _stored(file, 8 + length, name, row) for name, row in header.items()}
    _check_size(file, 8 + length, size, tensors)
    return tensors


def _parse_header(file: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except ValueError as error:
        raise UserError(f"{file}: corrupt header: it is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise UserError(f"{file}: corrupt header: expected a JSON object")
    header.pop("__metadata__", None)
    return header


def _stored(file: Path, data_start: int, name: str, row: Any) -> StoredTensor:
    try:
        dtype_name, shape = row["dtype"], tuple(int(size) for size in row["shape"])
        begin, end = (int(offset) for offset in row["data_offsets"])
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"{file}: corrupt header: bad entry for tensor {name}") from error
    if dtype_name not in DTYPES:
        raise UserError(
            f"{file}: tensor {name} has dtype {dtype_name}, which posttrain cannot read "
            f"(it reads {', '.join(DTYPES)})"
        )
    stored = StoredTensor(file, data_start + begin, shape, DTYPES[dtype_name])
    if begin < 0 or min(shape, default=0) < 0 or end - begin != stored.nbytes:
        raise UserError(
            f"{file}: corrupt header: tensor {name} of shape {list(shape)} and dtype {dtype_name} "
            f"needs {stored.nbytes} bytes, the header gives it {end - begin}"
        )
    return stored


def _check_size(file: Path, data_start: int, size: int, tensors: dict[str, StoredTensor]) -> None:
    """The tensors must lie side by side and end where the file ends."""
    position = data_start
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if stored.start != position:
            raise UserError(
                f"{file}: corrupt header: tensor {name} overlaps another or leaves a gap"
            )
        position += stored.nbytes
    if position > size:
        raise UserError(
            f"{file}: truncated: the header says {position} bytes but the file has {size}; "
            "copy or download it again"
        )
    if position < size:
        raise UserError(
            f"{file}: corrupt: the header says {position} bytes but the file has {size}"
        )
