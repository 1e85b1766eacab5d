"""Hidden states between decoder blocks: in memory within a budget, on disk past it.

Cached block inputs, not weights, decide the memory of a calibrated run (samples x window x hidden
size x 4 bytes). Past `budget` they live in two files used in turn, read and written a batch at a
time with plain file calls: a memory map would count as resident memory.
"""

import errno
import os
from pathlib import Path
from typing import Any

import torch

from posttrain.models.checkpoint import writing


class ActivationStore:
    """`[samples, window, hidden]` float32 block inputs, read and replaced a batch at a time.

    `put` writes the next block's inputs; `advance` makes them the current ones. `snapshot` makes
    the current ones survive a crash and `restore` brings them back, whatever the budget was when
    they were written. A `reference` store, what the same samples are elsewhere, is kept in step.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int], budget: int) -> None:
        self.folder, self.shape = folder, shape
        self.reference: ActivationStore | None = None
        self.nbytes = 4 * shape[0] * shape[1] * shape[2]
        self.spilled = self.nbytes > budget
        self._parity = 0
        self._restored: Path | None = None  # a snapshot that is read in place until `advance`
        self._memory = None if self.spilled else torch.empty(shape)
        folder.mkdir(parents=True, exist_ok=True)

    def _file(self, parity: int) -> Path:
        return self.folder / f"activations-{parity}.bin"

    @property
    def _current(self) -> Path:
        return self._restored or self._file(self._parity)

    def get(self, start: int, stop: int) -> torch.Tensor:
        """Current inputs of samples `start..stop` (cut at the last), a copy."""
        stop = min(stop, self.shape[0])
        if self._memory is not None:
            return self._memory[start:stop].clone()
        batch = torch.empty((stop - start, *self.shape[1:]))
        with self._current.open("rb", buffering=0) as file:
            file.seek(start * self._row_bytes)
            _read_exactly(file, _bytes(batch))
        return batch

    def put(self, start: int, batch: torch.Tensor) -> None:
        """Store the next block's inputs of the samples from `start` on."""
        batch = batch.detach().to(torch.float32).contiguous()
        if self._memory is not None:
            # In place is safe: a batch is written only after it was read for the same block.
            self._memory[start : start + batch.shape[0]] = batch
            return
        path = self._file(1 - self._parity)
        with writing(path):
            path.touch()
            with path.open("r+b", buffering=0) as file:
                file.seek(start * self._row_bytes)
                _write_exactly(file, _bytes(batch))

    def advance(self) -> None:
        self._parity, self._restored = 1 - self._parity, None

    def snapshot(self, index: int) -> str:
        """Make the inputs of block `index` durable; the returned file name restores them."""
        if self.reference is not None:
            self.reference.snapshot(index)  # under the same name in its own folder
        if self._memory is None:
            path = self._current
            with writing(path), path.open("rb") as file:
                os.fsync(file.fileno())
            return path.name
        path = self.folder / f"inputs-of-block-{index}.bin"
        with writing(path), path.open("wb", buffering=0) as file:
            for sample in self._memory:
                _write_exactly(file, _bytes(sample))
            os.fsync(file.fileno())
        return path.name

    def restore(self, name: str) -> bool:
        """Bring a snapshot back; False when its file is missing or has another size."""
        if self.reference is not None and not self.reference.restore(name):
            return False
        path = self.folder / name
        if not path.is_file() or path.stat().st_size != self.nbytes:
            return False
        if self._memory is None:
            # The file keeps its name: the next attempt looks for it if this one dies early.
            self._restored = path
            self._parity = int(path != self._file(0))
            return True
        with path.open("rb", buffering=0) as file:
            for sample in self._memory:
                _read_exactly(file, _bytes(sample))
        return True

    def forget_older(self, name: str) -> None:
        """Delete the snapshots that `name` replaces."""
        if self.reference is not None:
            self.reference.forget_older(name)
        for path in self.folder.glob("inputs-of-block-*.bin"):
            if path.name != name:
                path.unlink()

    @property
    def _row_bytes(self) -> int:
        return 4 * self.shape[1] * self.shape[2]


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    values: Any = tensor.numpy()
    return memoryview(values).cast("B")


def _write_exactly(file: Any, view: memoryview) -> None:
    """A plain write may take only part: the disk fills, or there are 2 GiB or more."""
    while view.nbytes:
        count = file.write(view)
        if not count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)
        view = view[count:]


def _read_exactly(file: Any, view: memoryview) -> None:
    while view.nbytes:
        count = file.readinto(view)
        if not count:
            raise OSError(f"{file.name} is shorter than expected")
        view = view[count:]
