"""How long `import posttrain` and `posttrain --help` take, beside Python and its peers' imports.

    python benchmarks/bench_startup.py

Writes results/startup.json: medians of interleaved fresh processes, warm file cache. The peers are
whatever of them is installed.
"""

import importlib.util
import statistics
import subprocess
import sys
import time

from common import write_result

ROUNDS = 15
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import posttrain": ["-c", "import posttrain"],
    "posttrain --help": ["-m", "posttrain", "--help"],
    "import torch": ["-c", "import torch"],
    "import transformers": ["-c", "import transformers"],
    "import compressed_tensors": ["-c", "import compressed_tensors"],
    "import llmcompressor": ["-c", "import llmcompressor"],
    "import torchao": ["-c", "import torchao"],
}


def main() -> None:
    commands = {
        name: words
        for name, words in COMMANDS.items()
        if not name.startswith("import ") or importlib.util.find_spec(name.split()[1])
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(ROUNDS + 1):  # the first round warms the file cache and is not counted
        for name, words in commands.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - started)
    rows = [
        {
            "command": name,
            "median_seconds": statistics.median(times[1:]),
            "fastest": min(times[1:]),
            "slowest": max(times[1:]),
        }
        for name, times in seconds.items()
    ]
    write_result("startup", {"rounds": ROUNDS, "rows": rows})


if __name__ == "__main__":
    main()
