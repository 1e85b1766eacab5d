"""Compile the native kernels: one shared library with a plain C interface.

    python -m posttrain.kernels.build [--output FILE] [--sanitize]

Run by pip when posttrain is installed (setup.py), and by hand after a change in `native/`. Every
instruction set is a file of its own with its own flags; which one runs is decided on the user's
processor, so the library works on any machine of its architecture. Standard library only: pip runs
this before anything else is installed.
"""

import argparse
import hashlib
import os
import platform
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
ARM = {"neon.cpp": ["-march=armv8.2-a+dotprod+fp16"]}
ISA_FLAGS = {"x86_64": X86, "amd64": X86, "aarch64": ARM, "arm64": ARM}


class BuildError(Exception):
    """The library could not be built; the message says why."""


def compiler() -> str:
    """The C++ compiler to use: $CXX, or the first of c++, g++, clang++. Raises BuildError."""
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["c++", "g++", "clang++"]:
        if shutil.which(name):
            return name
    raise BuildError(f"no C++ compiler: {wanted or 'none of c++, g++, clang++'} not found")


def fingerprint() -> str:
    """Hash of all sources, compiled into the library: tells when it is older than they are."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def build(output: Path = LIBRARY, sanitize: bool = False) -> Path:
    """Compile everything in `native/` into `output`. Raises BuildError."""
    with tempfile.TemporaryDirectory() as folder:
        objects = compile_all(sorted(SOURCES.glob("*.cpp")), Path(folder), sanitize)
        fresh = Path(folder) / output.name
        extra = SANITIZE if sanitize else []
        _run(compiler(), *extra, "-shared", "-pthread", *map(str, objects), "-o", str(fresh))
        output.parent.mkdir(parents=True, exist_ok=True)
        # Replaced, not overwritten: a process that has the old one mapped keeps it.
        waiting = output.with_name(f".{output.name}.{os.getpid()}")
        shutil.copy(fresh, waiting)
        os.replace(waiting, output)
    return output


def compile_all(sources: Sequence[Path], folder: Path, sanitize: bool = False) -> list[Path]:
    """Object files of these sources in `folder`, as many at a time as there are cores. Raises
    BuildError."""

    def compile_one(source: Path) -> Path:
        return compile_file(source, folder / f"{source.stem}.o", sanitize)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, sources))


def compile_file(source: Path, output: Path, sanitize: bool = False) -> Path:
    """Compile one file with the flags of its instruction set. Raises BuildError."""
    flags = [*FLAGS, *(SANITIZE if sanitize else []), f'-DPT_SOURCES="{fingerprint()}"']
    flags += ISA_FLAGS.get(platform.machine().lower(), {}).get(source.name, [])
    _run(compiler(), *flags, "-c", str(source), "-o", str(output))
    return output


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error}") from None
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stderr[-4000:]}")


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
