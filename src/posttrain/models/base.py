"""What every model source offers: named tensors read one by one, a config, a tokenizer."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from posttrain.errors import UserError
from posttrain.models.shards import OpenFiles

# Models that come with the package or a package it needs, by the name that stands for them.
DEMO = "demo"
PICO = "pico"  # benchmarks/train_pico.py made it
# What a model can compute in.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Entry:
    """One tensor that a source can build: what it will look like, and how to make it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    build: Callable[[OpenFiles], torch.Tensor]

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


class Source:
    """A model on disk. Opening it reads headers only; tensors are read when asked for.

    name: what the user typed. kind: "directory", "hub" or "gguf". path: the directory or file.
    config: the transformers config, with config.dtype set. quantization_config: the dict of a
    checkpoint that is already quantized, else None (its tensors then keep their names on disk).
    storage_dtype: the dtype to store unquantized matrices in.
    """

    name: str
    kind: str
    path: Path
    config: Any
    quantization_config: dict[str, Any] | None
    storage_dtype: torch.dtype
    _entries: dict[str, Entry]
    _identity: dict[str, Any]

    @property
    def expanded_from(self) -> str | None:
        """How the file stores weights that `read` expands, such as "GGUF Q4_1"; else None."""
        return None

    @property
    def notes(self) -> list[str]:
        """What every result about this model has to say of its weights, a sentence each."""
        return []

    def tensor_names(self) -> list[str]:
        """Names as the transformers module tree spells them; a tied lm_head is absent."""
        return list(self._entries)

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise UserError(f"{self.path}: there is no tensor named {name}")
        return self._entries[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype `read` returns: as stored, float32 for GGUF."""
        return self._entry(name).dtype

    def nbytes(self, name: str) -> int:
        """Bytes that `read` will allocate for this tensor."""
        return self._entry(name).nbytes

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Read tensors into fresh memory. Files are opened for this call only and never mapped,
        so nothing but the returned tensors stays resident."""
        with OpenFiles() as files:
            return {name: self._entry(name).build(files) for name in names}

    def tokenizer(self) -> Any:
        """The transformers tokenizer. Raises UserError when the source has none."""
        raise NotImplementedError

    def copy_side_files(self, out_dir: str | Path) -> None:
        """Write everything a loader needs besides weights and config.json into out_dir."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """sha256 over the config, tensor headers, sizes and times of the files: changes when the
        model does."""
        text = json.dumps(self._identity, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


def file_states(files: Iterable[Path]) -> dict[str, list[int]]:
    """What changes when a file is written again: name -> size, and time in nanoseconds."""
    states = {file.name: file.stat() for file in set(files)}
    return {name: [state.st_size, state.st_mtime_ns] for name, state in states.items()}


def one_line(error: Exception) -> str:
    """Another library's error as one line of text."""
    return " ".join(str(error).split()) or type(error).__name__


def copy_file(source: Path, out_dir: Path) -> None:
    """Copy one file's bytes, following links (a hub cache holds links)."""
    out_dir.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, out_dir / source.name)
