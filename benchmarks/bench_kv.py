"""What a quantized KV cache costs and what it gives.

    python benchmarks/bench_kv.py

Writes results/kv-cache.json. Quality: each model against itself with its cache in another format, on
the same tokens; weights untouched. Speed: one token after a context of LENGTHS tokens, all formats in
turn, in random order, round by round; ratios to fp16 are taken within a round.
"""

import random
import statistics
import time

from bench_recipes import WORK
from common import run_json, write_result

import posttrain
from posttrain import kernels
from posttrain.bench.contenders import token_ids
from posttrain.lm.engine import engine

FORMATS = ("int16", "int8", "fp8", "int4")
TEXT = ("--max-tokens", "8192", "--window", "512")
LENGTHS, ROUNDS, TOKENS = (2048, 8192), 24, 8


def main() -> None:
    WORK.mkdir(parents=True, exist_ok=True)
    small = str(WORK / "kv-w6a8")
    run_json("quantize", "demo", "--recipe", "w6a8", "-o", small)
    quality = [
        row for name, model in (("demo", "demo"), ("w6a8", small)) for row in costs(name, model)
    ]
    loaded = posttrain.load(small)
    speed = [row for length in LENGTHS for row in token_times(loaded, length)]
    isa, threads = kernels.isa(), kernels.threads()
    write_result("kv-cache", {"isa": isa, "threads": threads, "quality": quality, "speed": speed})


def costs(name: str, model: str) -> list[dict[str, object]]:
    rows = []
    for kv in ("fp16", *FORMATS):
        found = run_json("compare", model, model, "--kv", kv, "--no-generations", *TEXT)
        (pair,), entry = found["pairs"], found["models"][1]
        keys = ("delta_nll", "ci_low", "ci_high", "kl", "greedy_agreement")
        facts = {key: entry[key] for key in ("kv", "kv_bits_per_value", "kv_bytes_per_token")}
        rows.append({"model": name, **facts, **{key: pair[key] for key in keys}})
    return rows


def token_times(model: object, length: int) -> list[dict[str, object]]:
    """Median seconds of a token after `length` tokens of context, and of the prompt before."""
    runners = {kv: engine(model, kv) for kv in ("fp16", *FORMATS)}
    sessions, prompts = {}, {}
    for kv, runner in runners.items():
        sessions[kv] = runner.session(length + TOKENS)
        started = time.perf_counter()
        runner.forward([(sessions[kv], token_ids(length, 40000))])
        prompts[kv] = time.perf_counter() - started
    seconds: dict[str, list[float]] = {kv: [] for kv in runners}
    for number in range(ROUNDS + 1):  # the first only warms up
        for kv in random.Random(number).sample(list(runners), len(runners)):
            started = time.perf_counter()
            for _ in range(TOKENS):
                runners[kv].step([(sessions[kv], [7])], [kernels.Sampling()], [[7]])
            seconds[kv].append((time.perf_counter() - started) / TOKENS)
            sessions[kv].forget(length)
    return [
        {
            "kv": str(runners[kv].keeps()),
            "context": length,
            "cache_mb": sessions[kv].nbytes / 1e6,
            "token_ms": 1e3 * statistics.median(times[1:]),
            "speed_over_fp16": statistics.median(
                theirs / ours for theirs, ours in zip(seconds["fp16"][1:], times[1:], strict=True)
            ),
            "prompt_seconds": prompts[kv],
        }
        for kv, times in seconds.items()
    ]


if __name__ == "__main__":
    main()
