"""The library itself: what is in it, what happens without it, and that it can be built here."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain import kernels
from posttrain.kernels import build, library

needs_native = pytest.mark.skipif(not kernels.available(), reason=kernels.find().reason)
# What each file must compile to, and what a processor that runs it may not have.
INSTRUCTIONS = {
    "avx2.cpp": ("vpmaddubsw", "vfmadd"),
    "avxvnni.cpp": ("{vex} vpdpbusd", "vfmadd"),
    "avx512.cpp": ("vpdpbusd", "zmm", "vpternlog"),
    "amx.cpp": ("tdpbsud", "tileloadd"),
}
PLAIN = ("portable.cpp", "linear.cpp", "decoder.cpp", "sampling.cpp")
INSTRUCTIONS |= dict.fromkeys(PLAIN, ())
WIDER = {source: ("ymm", "zmm", "tdpb") for source in PLAIN} | {
    "avx2.cpp": ("zmm", "tdpb", "vpdpbusd"),
    "avxvnni.cpp": ("zmm", "tdpb", "\tvpdpbusd", "vpmaddubsw"),  # the same as AVX-512 encodes it
    "avx512.cpp": ("tdpb",),
}


def test_a_machine_with_a_compiler_has_the_kernels():
    """Without this, a build that fails would pass all tests by skipping them."""
    try:
        build.compiler()
    except build.BuildError:
        pytest.skip("no C++ compiler on this machine")
    if os.environ.get("POSTTRAIN_NATIVE") == "off":
        pytest.skip("switched off")
    assert kernels.available(), kernels.find().reason


@needs_native
def test_the_library_is_as_new_as_its_sources():
    assert library.native().pt_sources().decode() == build.fingerprint()


@pytest.fixture(scope="module")
def listings() -> dict[str, str]:
    """Source file -> disassembly of its functions in the built library."""
    path = os.environ.get("POSTTRAIN_NATIVE") or build.LIBRARY
    owner, current = {}, ""
    for line in output("readelf", "-sW", path).splitlines():  # locals follow their FILE entry
        fields = line.split()
        if len(fields) > 7 and fields[3] == "FILE":
            current = fields[7]
        elif len(fields) > 7 and fields[3:5] == ["FUNC", "LOCAL"]:
            owner[int(fields[1], 16)] = current
    found: dict[str, list[str]] = {}
    lines = found.setdefault("", [])
    for line in output("objdump", "-d", "--no-show-raw-insn", path).splitlines():
        header = re.match(r"([0-9a-f]+) <", line)
        if header:
            lines = found.setdefault(owner.get(int(header[1], 16), ""), [])
        lines.append(line)
    return {name: "\n".join(lines) for name, lines in found.items()}


def output(*command) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@needs_native
@pytest.mark.skipif(platform.machine() != "x86_64", reason="looks for x86 instructions")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump and readelf")
@pytest.mark.parametrize("source", INSTRUCTIONS)
def test_every_file_compiles_to_the_instructions_it_claims_and_to_no_wider_ones(source, listings):
    assert len(listings[source]) > 1000
    for instruction in INSTRUCTIONS[source]:
        assert instruction in listings[source]
    for instruction in WIDER.get(source, ()):
        assert instruction not in listings[source]


@needs_native
@pytest.mark.skipif(platform.machine() != "x86_64", reason="looks for x86 instructions")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump and readelf")
@pytest.mark.parametrize(
    "source, instruction, least",
    [
        ("avx2.cpp", "vpmaddubsw", 8),
        ("avxvnni.cpp", "vpdpbusd", 12),
        ("avx512.cpp", "vpdpbusd", 24),
    ],
)
def test_the_probe_of_the_peak_multiplies_all_that_it_counts(source, instruction, least, listings):
    """As many registers as hold the sums of a tile: a compiler leaves out what nobody reads."""
    body = r"^\w+ <\S*multiply_registers\S*>:\n(.*?)(?=^\w+ <|\Z)"
    (probe,) = re.findall(body, listings[source], re.MULTILINE | re.DOTALL)
    assert probe.count(instruction) >= least


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_the_library_models_still_run_and_the_reason_is_said():
    code = """
import warnings, torch
from posttrain import kernels
from posttrain.models.linear import QuantLinear
from posttrain.models.load import set_resident
from posttrain.models.plan import LayerPlan
from posttrain.numbers import quantize, spec
assert not kernels.available() and "POSTTRAIN_NATIVE" in kernels.find().reason
layer = QuantLinear.from_qtensor(quantize(torch.ones(4, 64), "w4g64"), LayerPlan(spec("w4g64")))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    set_resident(layer, "native")
assert "several times slower" in str(caught[0].message)
assert layer(torch.ones(1, 64)).shape == (1, 4) and layer.implementation == "dequantize"
try:
    kernels.isa()
except kernels.UserError as error:
    assert "fix:" in str(error)
""".replace("kernels.UserError", "__import__('posttrain').UserError")
    done = run(code, POSTTRAIN_NATIVE="off")
    assert done.returncode == 0, done.stderr


def test_a_file_that_is_no_library_is_named(tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    done = run(
        "from posttrain import kernels; print(kernels.find().reason)", POSTTRAIN_NATIVE=str(broken)
    )
    assert "broken.so cannot be loaded" in done.stdout


def test_a_missing_compiler_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match="no-such-compiler"):
        build.build(tmp_path / "x.so")


@needs_native
def test_work_goes_on_after_a_fork():
    """Threads do not survive a fork; the child starts its own."""
    code = """
import os, torch
from posttrain import kernels
from posttrain.kernels import InputFormat, PackedWeight, linear
packed = PackedWeight.from_tensor(torch.eye(64))
x = torch.randn(40, 64)
kernels.set_threads(3)
assert torch.equal(linear(x, [packed], InputFormat.of(None))[0], x)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(linear(x, [packed], InputFormat.of(None))[0], x) else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


@needs_native
def test_several_python_threads_may_multiply_at_once():
    code = """
from concurrent.futures import ThreadPoolExecutor
import torch
from posttrain.kernels import InputFormat, PackedWeight, linear
from posttrain.numbers import quantize, spec
packed = PackedWeight.from_qtensor(quantize(torch.randn(96, 256), "w4g64"))
form = InputFormat.of(spec("a8"))
xs = [torch.randn(t % 20 + 1, 256) for t in range(64)]
want = [linear(x, [packed], form)[0] for x in xs]
with ThreadPoolExecutor(4) as pool:
    found = list(pool.map(lambda x: linear(x, [packed], form)[0], xs))
assert all(map(torch.equal, want, found))
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


@needs_native
def test_many_small_weights_take_no_more_memory_than_their_bytes():
    """A page of 2 MiB for each of them would."""
    code = """
import psutil, torch
from posttrain.kernels import allocate
allocate(100).fill_(1)
before = psutil.Process().memory_info().rss
kept = [allocate(100_000).fill_(1) for _ in range(400)] + [allocate(5 << 20).fill_(1)]
grown = psutil.Process().memory_info().rss - before
assert grown < 1.1 * sum(map(len, kept)) + (4 << 20), grown
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


@needs_native
def test_memory_of_weights_is_given_back_and_never_shared():
    """Small ones, which lie together, and large ones, in any order."""
    code = """
import ctypes, random, psutil
from posttrain.kernels import allocate
order = random.Random(0)
def rss(): return psutil.Process().memory_info().rss
allocate(100).fill_(1)
before = rss()
kept = {}
for step in range(500):
    if kept and order.random() < 0.45:
        value, block = kept.popitem() if order.random() < 0.5 else (k := order.choice(list(kept)), kept.pop(k))
        assert (block == value % 251).all(), step
        del block
    else:
        kept[step] = allocate(order.choice([1, 64, 5000, 300_000, 3 << 20, 20 << 20])).fill_(step % 251)
    if len(kept) > 60: kept.popitem()
for value, block in kept.items(): assert (block == value % 251).all()
addresses = sorted((b.data_ptr(), len(b)) for b in kept.values())
assert all(a + n <= b for (a, n), (b, _) in zip(addresses, addresses[1:]))
assert all(a % 64 == 0 for a, _ in addresses)
kept.clear(); block = None
ctypes.CDLL(None).malloc_trim(0)  # what comparing took
assert rss() - before < 40 << 20, rss() - before
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


@needs_native
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_a_pool_does_every_item_once(tmp_path):
    program = tmp_path / "every_item_once"
    sources = [Path(__file__).with_name("every_item_once.cpp"), build.SOURCES / "threads.cpp"]
    output("c++", "-std=c++17", "-O2", "-pthread", f"-I{build.SOURCES}", *sources, "-o", program)
    output(program)


@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64")),
    reason="needs a compiler and an emulator for Arm (g++-aarch64-linux-gnu, qemu-user)",
)
def test_neon_gives_the_same_bits_on_an_emulated_processor(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "aarch64-linux-gnu-g++")
    monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")
    sources = [*build.SOURCES.glob("*.cpp"), Path(__file__).with_name("same_bits.cpp")]
    monkeypatch.setattr(build, "FLAGS", [*build.FLAGS, f"-I{build.SOURCES}"])
    objects = build.compile_all(sources, tmp_path)
    program = tmp_path / "same_bits"
    output("aarch64-linux-gnu-g++", "-static", "-pthread", *objects, "-o", program)
    assert "neon-dotprod,portable: 1376 cases, 0 differ" in output("qemu-aarch64", program)
