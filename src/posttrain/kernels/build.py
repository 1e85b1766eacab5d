"""Compile the native kernels: one shared library with a plain C interface.

    python -m posttrain.kernels.build [--output FILE] [--sanitize]

Run by pip when posttrain is installed (setup.py), and by hand after a change in `native/`. Every
instruction set is a file of its own with its own flags; which one runs is decided on the user's
processor, so the library works on any machine of its architecture. Standard library only: pip runs
this before anything else is installed.
"""

import argparse
import hashlib
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "native"
LIBRARY = HERE / "_native.so"

# -O2: with -O3 gcc unrolls portable.cpp for minutes and makes nothing faster.
# -ffp-contract=off: all instruction sets give the same floats, so only written fma's are fused.
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
# -O0 and no forced inlining: optimised, the checks take gcc several minutes to compile.
SANITIZE = ["-O0", "-g1", "-DPT_SANITIZED", "-fsanitize=address,undefined"]
SANITIZE += ["-fno-sanitize-recover=undefined"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vnni"))]
X86 = {
    "avx2.cpp": AVX2,
    "avxvnni.cpp": [*AVX2, "-mavxvnni"],
    "avx512.cpp": AVX512,
    "amx.cpp": [*AVX512, "-mamx-tile", "-mamx-int8"],
}
ARM = {"neon.cpp": ["-march=armv8.2-a+dotprod"]}
ISA_FLAGS = {"x86_64": X86, "amd64": X86, "aarch64": ARM, "arm64": ARM}
SUFFIXES = (".cpp", ".h")  # of sources


class BuildError(Exception):
    """The library could not be built; the message says why."""


def compiler() -> list[str]:
    """The command of the C++ compiler: $CXX ("g++", "ccache g++"), or the first of c++, g++, clang++.
    Raises BuildError."""
    wanted = os.environ.get("CXX", "").strip()
    for command in [_words(wanted)] if wanted else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    raise BuildError(f"no C++ compiler: {wanted or 'none of c++, g++, clang++'} not found")


def _words(command: str) -> list[str]:
    """As a shell reads it, unless all of it is the name of a program."""
    try:
        return [command] if shutil.which(command) else shlex.split(command)
    except ValueError as error:
        raise BuildError(f"CXX={command} cannot be read: {error}") from None


def sources() -> list[Path]:
    """The files of `native/`, without what editors and systems leave beside them. Raises OSError."""
    files = (path for path in SOURCES.iterdir() if path.suffix in SUFFIXES and path.is_file())
    return sorted(path for path in files if not path.name.startswith("."))


def fingerprint() -> str:
    """Hash of all sources, compiled into the library: tells when it is older than they are. Raises
    OSError where they cannot be read."""
    digest = hashlib.sha256()
    for path in sources():
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def build(output: Path = LIBRARY, sanitize: bool = False) -> Path:
    """Compile everything in `native/` into `output`. Raises BuildError."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            files = [path for path in sources() if path.suffix == ".cpp"]
            objects = map(str, compile_all(files, Path(folder), sanitize))
            fresh = Path(folder) / output.name
            extra = SANITIZE if sanitize else []
            _run(*compiler(), *extra, "-shared", "-pthread", *objects, "-o", str(fresh))
            _put(fresh, output)
    except OSError as error:
        raise BuildError(
            f"{output} cannot be made: {error}; make room or get the right to write there, or build "
            "another file with --output FILE and name it in POSTTRAIN_NATIVE"
        ) from None
    return output


def _put(fresh: Path, output: Path) -> None:
    """A library in its place. Replaced, not overwritten: a process that has the old one mapped keeps
    it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    waiting = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        shutil.copy(fresh, waiting)
        os.replace(waiting, output)
    finally:
        waiting.unlink(missing_ok=True)


def compile_all(sources: Sequence[Path], folder: Path, sanitize: bool = False) -> list[Path]:
    """Object files of these sources in `folder`, as many at a time as there are processors. Raises
    BuildError."""

    def compile_one(source: Path) -> Path:
        return compile_file(source, folder / f"{source.stem}.o", sanitize)

    with ThreadPoolExecutor(usable_cpus()) as pool:
        return list(pool.map(compile_one, sources))


def compile_file(source: Path, output: Path, sanitize: bool = False) -> Path:
    """Compile one file with the flags of its instruction set. Raises BuildError."""
    flags = [*FLAGS, *(SANITIZE if sanitize else []), f'-DPT_SOURCES="{fingerprint()}"']
    flags += isa_flags(source.name)
    _run(*compiler(), *flags, "-c", str(source), "-o", str(output))
    return output


def isa_flags(source: str) -> list[str]:
    """What a file's instruction set asks of the compiler; nothing, and a line that says so, where the
    compiler does not know it. The file is empty then, and the library does without."""
    flags = ISA_FLAGS.get(platform.machine().lower(), {}).get(source, [])
    if not flags or _knows(flags):
        return flags
    command = " ".join(compiler())
    print(f"left out {source}: {command} does not know {' '.join(flags)}", file=sys.stderr)
    return []


def _knows(flags: Sequence[str]) -> bool:
    try:
        _run(*compiler(), *flags, "-fsyntax-only", "-x", "c++", os.devnull)
    except BuildError:
        return False
    return True


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error}") from None
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stderr[-4000:]}")


def usable_cpus() -> int:
    """Processors that this process may use, at least 1: those it may run on, and no more than its
    control groups (a container's, say) give it the time of."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    return max(1, math.ceil(min(count, cpu_quota())))


def cpu_quota(root: Path = Path("/")) -> float:
    """The least of what the control groups of this process allow, in processors; inf without a limit.

    root: where /proc and /sys are. Inside a container the path that /proc names may begin outside of
    what /sys shows: the groups above it that are there count.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return math.inf
    least = math.inf
    for line in lines:
        _, _, where = line.partition(":")
        controllers, _, group = where.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        folder = root / "sys/fs/cgroup" / ("cpu" if controllers else "")  # version 1, or 2
        for part in ["", *group.split("/")]:
            folder /= part
            least = min(least, _quota_of(folder))
    return least


def _quota_of(group: Path) -> float:
    """The limit of one control group, of version 2 or 1: microseconds of each period."""
    for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
        try:
            quota, period = " ".join((group / name).read_text() for name in names).split()
            return int(quota) / int(period) if int(quota) > 0 else math.inf
        except (OSError, ValueError):  # not there, or "max"
            continue
    return math.inf


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=LIBRARY)
    parser.add_argument("--sanitize", action="store_true", help="with ASan and UBSan, for tests")
    args = parser.parse_args()
    try:
        print(build(args.output, args.sanitize))
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
