"""`posttrain bench`: speed beside the machine's limits and beside other tools, in one run.

Every contender lives in a process of its own. In each round all of them prefill, decode and score
once, one after another, each run between two probes of the memory's bandwidth; figures are medians
over rounds, and ratios are taken round by round, because a machine's speed wanders.
"""

import importlib.util
import statistics
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from posttrain import kernels
from posttrain.bench.ctranslate2_peer import ctranslate2_of
from posttrain.bench.gguf_peer import gguf_of, nearest_type, origin_of
from posttrain.bench.process import Worker
from posttrain.errors import UserError, did_you_mean

# name -> module it needs
PEERS = {"llama.cpp": "llama_cpp", "transformers": "transformers", "ctranslate2": "ctranslate2"}
INSTALL = {
    "llama.cpp": "pip install llama-cpp-python",
    "transformers": "pip install transformers",
    "ctranslate2": "pip install ctranslate2",
}
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
            the GGUF type of the same width), "transformers" (float32), "ctranslate2" (INT8, of the
            model this one was quantized from).
        threads: how many, or several counts; None: one, and one per processor.
        prefill, decode: tokens of a prompt, and of an answer.
        depth: tokens that stand before an answer; their time is not counted.
        rounds: how often everything is repeated.
        cache: what our keys and values are kept in, see `evaluate`'s kv; None: what the model says,
            else int16 where its activations are integers, fp16 elsewhere (scoring: fp32).
        plot: where to draw the result, as SVG.

    Returns:
        For the largest number of threads: `model`, `kernel`, `threads`, `prefill_tps`,
        `decode_tps`, `score_tps` (tokens per second), `first_token_seconds` (of a prompt of 16),
        `bandwidth_share` (of what the memory gives, by decoding: weights, and the keys and values of
        `depth` tokens), `peak_share` (of the integer peak, by prefilling), `rss_bytes`,
        `rss_above_imports_bytes`, `weight_bytes`, `bits_per_weight`, `kv_bytes_per_token`, `probe`
        (bytes and operations per second), `peers`: a list of the same for each, with `name`,
        `prefill_ratio`, `decode_ratio`, `score_ratio` (ours over theirs) and `..._ratio_spread`
        (lowest and highest of the rounds). `by_threads`: this for every count.

    Raises:
        UserError: a peer that is unknown or not installed, a model that cannot be loaded.
    """
    _check(against, rounds, prefill, decode, depth)
    counts = _thread_counts(threads)
    with tempfile.TemporaryDirectory(prefix="posttrain-bench-") as folder:
        sources = {"posttrain": str(model)}
        for name in against:
            sources[name] = origin_of(str(model))
            if name == "llama.cpp":
                kind = nearest_type(str(model))
                sources[name] = str(gguf_of(str(model), kind, Path(folder)))
            elif name == "ctranslate2":
                sources[name] = str(ctranslate2_of(str(model), Path(folder)))
        found = []
        for count in counts:
            plan = _Round(count, prefill, decode, depth, rounds, cache)
            found.append(plan.measure(sources, progress))
            if "llama.cpp" in against:
                _entry(found[-1], "llama.cpp")["type"] = kind
    result = {"model": str(model), **found[-1], "by_threads": found}
    if plot is not None:
        from posttrain.bench.plot import draw

        result["plot"] = str(draw(result, Path(plot)))
    return result


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
        try:
            for name, source in sources.items():
                workers.append(Worker(name, source, self.threads, self.cache or "", longest))
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
        finally:
            for worker in workers:
                worker.close()
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
        bytes_read = found["weight_bytes"] + self.depth * (found["kv_bytes_per_token"] or 0)
        share = [
            bytes_read / seconds / bandwidth
            for seconds, bandwidth in zip(
                ours.seconds["decode"], ours.bandwidth["decode"], strict=True
            )
        ]
        operations = probe.operations()
        found["bandwidth_share"] = statistics.median(share)
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


def _entry(found: dict[str, Any], name: str) -> dict[str, Any]:
    entry: dict[str, Any] = next(peer for peer in found["peers"] if peer["name"] == name)
    return entry


def _check(against: Iterable[str], rounds: int, prefill: int, decode: int, depth: int) -> None:
    if not kernels.available():
        found = kernels.find()
        raise UserError(f"bench measures the native kernels: {found.reason}; fix: {found.fix}")
    for name in against:
        if name not in PEERS:
            raise UserError(f"unknown peer {name!r}{did_you_mean(name, PEERS)}")
        if importlib.util.find_spec(PEERS[name]) is None:
            raise UserError(f"{name} is not installed here: {INSTALL[name]}")
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
    return counts
