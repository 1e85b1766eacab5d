"""How much memory a run will take, and how much it took."""

import threading
from dataclasses import dataclass
from types import TracebackType

import psutil

GIB = 1 << 30


class PeakMemory:
    """Samples this process's resident memory in the background; `peak` is the largest seen."""

    def __init__(self, interval: float = 0.005) -> None:
        self._process = psutil.Process()
        self._stop = threading.Event()
        self._interval = interval
        self.peak = self.now()

    def now(self) -> int:
        """Resident bytes at this moment."""
        return int(self._process.memory_info().rss)

    def _sample(self) -> None:
        while not self._stop.wait(self._interval):
            self.peak = max(self.peak, self.now())

    def __enter__(self) -> None:
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, self.now())


@dataclass(frozen=True)
class Demand:
    """What a run holds at once, in bytes, above what the process holds when it starts.

    Attributes:
        outside: the tensors outside the decoder blocks, as they are read and stored.
        embed: those of them that turn tokens into block inputs, in float32 (calibrated runs).
        block: the largest decoder block in float32.
        stored: what is written of it.
        solve: workspace of the largest single solve.
        statistics: second moments of a block's inputs.
        activations: the cache of block inputs, as far as it stays in memory.
        forward: intermediate results of one batch through a block.
        distill: the model with what a backward pass through it keeps.
        allocator: freed memory that the C library keeps for reuse.
    """

    outside: int
    embed: int
    block: int
    stored: int
    solve: int
    statistics: int
    activations: int
    forward: int
    distill: int
    allocator: int

    @property
    def peak(self) -> int:
        """The widest moment: embedding, solving, running or copying the rest."""
        solving = self.activations + self.block + self.stored + self.statistics + self.solve
        running = self.activations + self.block + self.stored + self.statistics + self.forward
        embedding = self.activations + self.embed + self.forward
        return max(solving, running, embedding, self.outside, self.distill) + self.allocator
