"""`posttrain bench`: speed beside the machine's limits and beside other tools, in one run.

Every contender lives in a process of its own. In each round all of them prefill, decode and score
once, one after another, each run between two probes of the memory's bandwidth; figures are medians
over rounds, and ratios are taken round by round, because a machine's speed wanders.
"""

import os
import statistics
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from posttrain import kernels
from posttrain.bench.ctranslate2_peer import ctranslate2_of
from posttrain.bench.gguf_peer import gguf_of, nearest_type
from posttrain.bench.origin import origin_of
from posttrain.bench.peers import check_peer
from posttrain.bench.plot import check_plot_path, draw
from posttrain.bench.process import Worker, ended_as_by_exit
from posttrain.errors import UserError

PROBE_BYTES = 2**30  # far more than caches hold
FIRST_TOKEN = 16  # tokens of the short prompt whose first answer token is timed


@dataclass
class Runs:
    """Seconds of every round of one contender, and the bandwidth around each."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    bandwidth: dict[str, list[float]] = field(default_factory=dict)

    def add(self, what: str, seconds: float, bandwidth: float) -> None:
        self.seconds.setdefault(what, []).append(seconds)
        self.bandwidth.setdefault(what, []).append(bandwidth)


def bench(
    model: str | Path,
    *,
    against: Sequence[str] = (),
    threads: int | Sequence[int] | None = None,
    prefill: int = 512,
    decode: int = 64,
    depth: int = 0,
    rounds: int = 5,
    cache: str | None = None,
    plot: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure how fast a model runs.

    Args:
        model: a directory, hub id, GGUF file or "demo".
        against: peers in the same run: "llama.cpp" (of the model this one was quantized from, in
            the GGUF type nearest to its width), "transformers" (float32), "ctranslate2" (INT8, of the
            model this one was quantized from).
        threads: how many, or several counts, at most the machine's processors; None: one, and one
            per processor.
        prefill, decode: tokens of a prompt, and of an answer.
        depth: tokens that stand before an answer; their time is not counted.
        rounds: how often everything is repeated.
        cache: what our keys and values are kept in, see `evaluate`'s kv; None: what the model says,
            else int16 where its activations are integers, fp16 elsewhere (scoring: fp32).
        plot: where to draw the result, as SVG; the name ends in .svg.

    Returns:
        Tokens per second and shares of the machine's limits, of ours and of every peer: see
        docs/json.md. `score_tps` is of the weights as they were loaded to generate, in the
        checkpoint's own dtype; `evaluate` loads those of a 16-bit checkpoint as float32 unless told
        otherwise, so its speed differs by those that are not quantized.

    Raises:
        UserError: a peer that is unknown, not installed or broken; a model that cannot be loaded,
            or whose origin is not found; more threads than processors; a plot that cannot be written.
    """
    _check(against, rounds, prefill, decode, depth)
    picture = None if plot is None else check_plot_path(plot)
    with (
        ended_as_by_exit(),
        _threads_restored(),
        tempfile.TemporaryDirectory(prefix="posttrain-bench-") as folder,
    ):
        counts = _thread_counts(threads)
        sources = _sources(str(model), against, Path(folder))
        plans = [_Round(count, prefill, decode, depth, rounds, cache) for count in counts]
        found = [plan.measure(sources, progress) for plan in plans]
    for peer in (peer for entry in found for peer in entry["peers"]):
        if peer["name"] == "llama.cpp":
            peer["type"] = Path(sources["llama.cpp"]).stem  # what `gguf_of` names the file after
    result = {"model": str(model), **found[-1], "by_threads": found}
    return result if picture is None else _drawn(result, picture)


def _sources(model: str, against: Iterable[str], folder: Path) -> dict[str, str]:
    """What each contender loads; files made for peers are in `folder`."""
    sources = {"posttrain": model}
    for name in against:
        if name == "llama.cpp":
            sources[name] = str(gguf_of(model, nearest_type(model), folder))
        elif name == "ctranslate2":
            sources[name] = str(ctranslate2_of(model, folder))
        else:
            sources[name] = origin_of(model)
    return sources


def _drawn(result: dict[str, Any], path: Path) -> dict[str, Any]:
    """The result with its plot; where that fails after all, it says so: the figures took long."""
    try:
        return result | {"plot": str(draw(result, path))}
    except UserError as error:
        return result | {"notes": [*result["notes"], str(error)]}


@dataclass(frozen=True)
class _Round:
    threads: int
    prefill: int
    decode: int
    depth: int
    rounds: int
    cache: str | None

    def measure(self, sources: dict[str, str], progress: bool) -> dict[str, Any]:
        from tqdm import tqdm

        workers: list[Worker] = []
        probe = Probe(self.threads)
        longest = max(self.prefill, self.depth + 1 + self.decode, FIRST_TOKEN)
        with ExitStack() as stack:
            for name, source in sources.items():
                workers.append(Worker(name, source, self.threads, self.cache or "", longest))
                stack.callback(workers[-1].close)
            runs = {worker.name: Runs() for worker in workers}
            bar = tqdm(
                total=(self.rounds + 1) * len(workers),
                desc=f"bench, {self.threads} threads",
                disable=not progress,
            )
            with bar:
                for number in range(self.rounds + 1):  # the first only warms up
                    for worker in workers:
                        self._run(worker, Runs() if number == 0 else runs[worker.name], probe)
                        bar.update()
            facts = {worker.name: worker.ask("facts") for worker in workers}
        return self._result(runs, facts, probe)

    def _run(self, worker: Worker, runs: Runs, probe: "Probe") -> None:
        asked = {"prefill": self.prefill, "decode": self.decode, "score": self.prefill}
        for what, count in asked.items():
            if what == "score" and worker.name == "llama.cpp":
                continue
            if what == "decode":
                worker.seconds("begin", self.depth, 1 + self.decode)
            before = probe.bandwidth()
            seconds = worker.seconds(what, count)
            runs.add(what, seconds / count, (before + probe.bandwidth()) / 2)
        runs.add("first", worker.seconds("prefill", FIRST_TOKEN), probe.bandwidth())

    def _result(
        self, runs: dict[str, Runs], facts: dict[str, dict[str, Any]], probe: "Probe"
    ) -> dict[str, Any]:
        ours = runs.pop("posttrain")
        found = {"threads": self.threads, **_figures(ours), **facts.pop("posttrain")}
        operations = probe.operations()
        found["bandwidth_share"] = found["peak_share"] = None
        if found["bytes_per_token"] is not None:
            kept = self.depth * (found["kv_bytes_per_token"] or 0)
            found["bandwidth_share"] = _share(found["bytes_per_token"] + kept, ours)
        if found["linear_weights"] is not None:
            found["peak_share"] = 2 * found["linear_weights"] * found["prefill_tps"] / operations
        found["probe"] = {
            "bytes_per_second": statistics.median(ours.bandwidth["decode"]),
            "operations_per_second": operations,
        }
        for what in ("rounds", "prefill", "decode", "depth"):
            found[what] = getattr(self, what)
        found["peers"] = [
            {"name": name, **_figures(theirs), **_ratios(ours, theirs), **facts[name]}
            for name, theirs in runs.items()
        ]
        return found


def _share(bytes_read: float, runs: Runs) -> float:
    """Of the bandwidth around each answer, what reading so much for each token took."""
    pairs = zip(runs.seconds["decode"], runs.bandwidth["decode"], strict=True)
    return statistics.median(bytes_read / seconds / bandwidth for seconds, bandwidth in pairs)


def _figures(runs: Runs) -> dict[str, float]:
    found = {
        f"{what}_tps": 1 / statistics.median(seconds)
        for what, seconds in runs.seconds.items()
        if what != "first"
    }
    return found | {"first_token_seconds": statistics.median(runs.seconds["first"])}


def _ratios(ours: Runs, theirs: Runs) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for what in theirs.seconds:
        if what == "first":
            continue
        pairs = zip(ours.seconds[what], theirs.seconds[what], strict=True)
        ratios = [their / our for our, their in pairs]
        found[f"{what}_ratio"] = statistics.median(ratios)
        found[f"{what}_ratio_spread"] = [min(ratios), max(ratios)]
    return found


class Probe:
    """What the machine can do with so many threads, by the instructions our kernels use."""

    def __init__(self, threads: int) -> None:
        from posttrain.kernels import library

        kernels.set_threads(threads)
        self._library = library.native()
        room = psutil.virtual_memory().available // 8
        self._memory = kernels.allocate(min(PROBE_BYTES, room))
        self._memory.fill_(1)

    def bandwidth(self) -> float:
        """Bytes per second read from memory."""
        return float(
            self._library.pt_probe_bandwidth(self._memory.data_ptr(), self._memory.numel())
        )

    def operations(self) -> float:
        """Integer operations per second without memory."""
        return max(float(self._library.pt_probe_peak(0.2)) for _ in range(3))


def _check(against: Iterable[str], rounds: int, prefill: int, decode: int, depth: int) -> None:
    if not kernels.available():
        found = kernels.find()
        raise UserError(f"bench measures the native kernels: {found.reason}; fix: {found.fix}")
    for name in against:
        check_peer(name)
    for what, value in (("rounds", rounds), ("prefill", prefill), ("decode", decode)):
        if value < 1:
            raise UserError(f"{what} must be at least 1, not {value}")
    if depth < 0:
        raise UserError(f"depth must be at least 0, not {depth}")


def _thread_counts(threads: int | Sequence[int] | None) -> list[int]:
    if threads is None:
        kernels.set_threads(0)
        return sorted({1, kernels.threads()})
    counts = [threads] if isinstance(threads, int) else sorted(set(threads))
    if not counts or min(counts) < 1:
        raise UserError(f"threads must be at least 1, not {threads}")
    processors = os.cpu_count() or max(counts)
    if max(counts) > processors:
        raise UserError(
            f"threads={max(counts)}: this machine has {processors} processors; give at most as many"
        )
    return counts


@contextmanager
def _threads_restored() -> Iterator[None]:
    """Leave the kernels with as many threads as they had: they are the whole process's."""
    before = kernels.threads()
    try:
        yield
    finally:
        kernels.set_threads(before)
