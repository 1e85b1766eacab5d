"""The library itself: what is in it, what happens without it, and that it can be built here."""

import errno
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain import kernels
from posttrain.errors import UserError
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


@pytest.fixture
def find(monkeypatch):
    """What a process that has not looked yet finds under a value of POSTTRAIN_NATIVE."""

    def found(value: str) -> library.Found:
        monkeypatch.setenv("POSTTRAIN_NATIVE", value)
        return library.find.__wrapped__()

    return found


def test_a_file_that_is_no_library_is_named(tmp_path, find):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    assert f"{broken} cannot be loaded" in find(str(broken)).reason


@pytest.mark.parametrize("value", ["off", "OFF", "Off", "0", "false", "False", "no", "NO"])
def test_the_library_can_be_switched_off_in_any_spelling(value, find):
    found = find(value)
    assert found.library is None
    assert found.reason == f"switched off by POSTTRAIN_NATIVE={value}"


@pytest.mark.parametrize("value", ["nothing.so", "some/where.so", "/no/such/library.so", ".", "1"])
def test_a_library_that_is_not_there_is_named_with_the_variable(value, find):
    found = find(value)
    assert found.library is None
    assert f"POSTTRAIN_NATIVE names {os.path.abspath(value)}" in found.reason


@needs_native
def test_a_bare_name_is_a_file_of_this_folder(tmp_path):
    shutil.copy(os.environ.get("POSTTRAIN_NATIVE") or build.LIBRARY, tmp_path / "mine.so")
    code = f"import os; os.chdir({str(tmp_path)!r}); from posttrain import kernels; kernels.isa()"
    done = run(code, POSTTRAIN_NATIVE="mine.so")
    assert done.returncode == 0, done.stderr


@needs_native
@pytest.mark.parametrize("sources", ["missing", "a file"])
def test_a_library_without_its_sources_works_as_well(sources, monkeypatch, tmp_path, recwarn):
    monkeypatch.setattr(build, "SOURCES", tmp_path / "native")
    if sources == "a file":
        build.SOURCES.touch()
    assert library.find.__wrapped__().library is not None
    assert not recwarn


def test_only_sources_count_as_sources(monkeypatch, tmp_path):
    expected = build.fingerprint()
    monkeypatch.setattr(build, "SOURCES", shutil.copytree(build.SOURCES, tmp_path / "native"))
    for name in (".hidden.h", "._linear.cpp", "linear.cpp~", ".linear.h.swp", "notes.txt"):
        (build.SOURCES / name).write_text("what an editor leaves")
    (build.SOURCES / "folder.h").mkdir()
    (build.SOURCES / "lock.h").symlink_to("nobody@nowhere")
    assert build.fingerprint() == expected
    (build.SOURCES / "one_more.h").touch()
    assert build.fingerprint() != expected


def test_a_missing_compiler_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match="no-such-compiler"):
        build.build(tmp_path / "x.so")


def program(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    "value, command",
    [
        ("cc", ["cc"]),
        ("wrapper cc", ["wrapper", "cc"]),
        ("  wrapper  cc -m64 ", ["wrapper", "cc", "-m64"]),
        ("'wrapper' \"a compiler\"", ["wrapper", "a compiler"]),
        ("a compiler", ["a compiler"]),
    ],
)
def test_the_compiler_is_a_command_as_a_shell_reads_it(value, command, monkeypatch, tmp_path):
    for name in ("cc", "wrapper", "a compiler"):
        program(tmp_path / name, "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", value)
    assert build.compiler() == command


@pytest.mark.parametrize("value", ["'cc", "gone cc", "'' cc"])
def test_a_command_that_is_none_is_named(value, monkeypatch):
    monkeypatch.setenv("CXX", value)
    with pytest.raises(build.BuildError, match=re.escape(value)):
        build.compiler()


def test_instruction_sets_that_a_compiler_does_not_know_are_left_out(monkeypatch, tmp_path, capsys):
    old = program(
        tmp_path / "old",
        'for flag; do case "$flag" in -mavxvnni|-mamx-int8) exit 1;; esac; done',
    )
    monkeypatch.setenv("CXX", str(old))
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    for source, flags in build.X86.items():
        unknown = source in ("avxvnni.cpp", "amx.cpp")
        assert build.isa_flags(source) == ([] if unknown else flags)
        said = capsys.readouterr().err
        assert said.startswith(f"left out {source}: {old} does not know") == unknown
        assert unknown or not said
    assert build.isa_flags("linear.cpp") == []
    assert not capsys.readouterr().err


@pytest.mark.parametrize("obstacle", ["full disk", "read-only", "a file as folder", "a folder"])
def test_a_library_that_cannot_be_written_is_one_line_and_leaves_nothing(
    obstacle, monkeypatch, tmp_path
):
    """Whoever runs the tests may write everywhere, so that two obstacles have to be played."""
    output = tmp_path / "out" / "x.so"

    def failing(number, copy):
        def fail(source, target):
            if copy:
                Path(target).write_bytes(b"half of it")
            raise OSError(number, os.strerror(number), str(target))

        return fail

    if obstacle == "full disk":
        monkeypatch.setattr(build.shutil, "copy", failing(errno.ENOSPC, copy=True))
    elif obstacle == "read-only":
        monkeypatch.setattr(build.os, "replace", failing(errno.EROFS, copy=False))
    elif obstacle == "a folder":
        output.mkdir(parents=True)
    else:
        output.parent.touch()
    monkeypatch.setattr(build, "compiler", lambda: ["c++"])
    monkeypatch.setattr(build, "compile_all", lambda *_: [])
    monkeypatch.setattr(build, "_run", lambda *command: Path(command[-1]).touch())
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(build.BuildError, match=f"{re.escape(str(output))} cannot be made: .*--out"):
        build.build(output)
    assert set(tmp_path.rglob("*")) - {output.parent} <= set(before)


# Files of /proc and /sys, and the processors that they allow.
PLACE = "proc/self/cgroup"
V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/cpu"
QUOTAS = {
    "no control groups": ({}, math.inf),
    "version 2 without a limit": ({PLACE: "0::/", f"{V2}/cpu.max": "max 100000"}, math.inf),
    "version 2 in a container": ({PLACE: "0::/", f"{V2}/cpu.max": "150000 100000\n"}, 1.5),
    "version 2, the group's own": ({PLACE: "0::/a/b", f"{V2}/a/b/cpu.max": "50000 100000"}, 0.5),
    "version 2, of a parent": (
        {PLACE: "0::/a/b", f"{V2}/a/cpu.max": "200000 100000", f"{V2}/a/b/cpu.max": "max 100000"},
        2.0,
    ),
    "version 2, the least": (
        {PLACE: "0::/a/b", f"{V2}/a/cpu.max": "20 10", f"{V2}/a/b/cpu.max": "90 20"},
        2.0,
    ),
    "version 2, of another group": ({PLACE: "0::/a", f"{V2}/b/cpu.max": "20 10"}, math.inf),
    "version 2, outside of what is seen": ({PLACE: "0::/../x", f"{V2}/cpu.max": "30 10"}, 3.0),
    "version 1 without a limit": (
        {PLACE: "2:cpu:/\n0::/", f"{V1}/cpu.cfs_quota_us": "-1", f"{V1}/cpu.cfs_period_us": "10"},
        math.inf,
    ),
    "version 1 with other controllers": (
        {
            PLACE: "5:cpuset:/\n4:cpuacct,cpu:/docker/id\n1:name=systemd:/docker/id",
            f"{V1}/cpu.cfs_quota_us": "250000\n",
            f"{V1}/cpu.cfs_period_us": "100000\n",
        },
        2.5,
    ),
    "version 1, the group's own": (
        {
            PLACE: "4:cpu,cpuacct:/docker/id",
            f"{V1}/docker/id/cpu.cfs_quota_us": "40",
            f"{V1}/docker/id/cpu.cfs_period_us": "10",
            f"{V1}/cpu.cfs_quota_us": "-1",
            f"{V1}/cpu.cfs_period_us": "10",
        },
        4.0,
    ),
    "not what we know": ({PLACE: "\nnothing\n0::/", f"{V2}/cpu.max": "all of them"}, math.inf),
}


@pytest.mark.parametrize("files, processors", QUOTAS.values(), ids=QUOTAS)
def test_control_groups_limit_what_may_be_used(files, processors, monkeypatch, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert build.cpu_quota(tmp_path) == processors
    monkeypatch.setattr(build, "cpu_quota", lambda: processors)
    for allowed in (1, 2, 3, 8):
        may_run_on = set(range(allowed))
        monkeypatch.setattr(build.os, "sched_getaffinity", lambda _, s=may_run_on: s, raising=False)
        assert build.usable_cpus() == max(1, min(allowed, math.ceil(min(processors, 99))))


@needs_native
def test_threads_are_as_many_as_may_be_used(monkeypatch):
    before = kernels.threads()
    try:
        for count in (1, 3):
            monkeypatch.setattr(build, "usable_cpus", lambda n=count: n)
            kernels.set_threads(0)
            assert kernels.threads() == count
            kernels.set_threads(2)
            assert kernels.threads() == 2
            library.find.__wrapped__()
            assert kernels.threads() == count
        for refused in (-1, library.MOST_THREADS + 1, 2**31, 2**32, 2**32 + 1, 2**64, 10**30):
            with pytest.raises(UserError, match=f"threads must be .*, not {refused}"):
                kernels.set_threads(refused)
        assert kernels.threads() == count
    finally:
        kernels.set_threads(before)


@needs_native
@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="ASan ends at an exception")
def test_threads_that_cannot_be_started_are_said_and_fewer_work():
    """There is no address space for the stacks of so many: a limit of processes would not stop root."""
    code = """
import resource, torch
from pathlib import Path
from posttrain import UserError, kernels
from posttrain.kernels import InputFormat, PackedWeight, Sampling, library, linear
from posttrain.kernels.packed import rotate
packed, x = PackedWeight.from_tensor(torch.eye(64)), torch.randn(40, 64)
logits = torch.randn(5000)
kernels.set_threads(2)
greedy = Sampling().draw(logits, [])
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 29), resource.RLIM_INFINITY))
kernels.set_threads(700)
for work in (
    lambda: linear(x, [packed], InputFormat.of(None)),
    lambda: rotate(x),
    lambda: Sampling().draw(logits, []),
    lambda: kernels.log_partition(torch.randn(3, 7)),
):
    try:
        work()
    except UserError as error:
        assert "700 threads" in str(error) and "set_threads" in str(error), error
    else:
        raise SystemExit("700 threads, in half a gigabyte?")
assert library.native().pt_probe_peak(0.01) == 0
kernels.set_threads(2)
assert torch.equal(linear(x, [packed], InputFormat.of(None))[0], x)
assert Sampling().draw(logits, []) == greedy
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


@needs_native
def test_weights_stay_where_they_are_until_the_process_ends():
    """Threads that the interpreter does not wait for may still read them after its finalizers ran."""
    code = """
import atexit
kept = []
atexit.register(lambda: print(sum(int(block[-1]) for block in kept)))  # the last to be called
from posttrain.kernels import allocate
kept += [allocate(100).fill_(1), allocate(40 << 20).fill_(2)]
"""
    done = run(code)
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr


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
def test_a_fork_finds_no_lock_that_another_thread_holds():
    code = """
import os, signal, threading, torch
from posttrain import kernels
from posttrain.kernels import InputFormat, PackedWeight, allocate, linear
packed = PackedWeight.from_tensor(torch.eye(256))
x, form = torch.randn(400, 256), InputFormat.of(None)
kernels.set_threads(2)
stop = threading.Event()
def forever(work):
    while not stop.is_set(): work()
works = [lambda: linear(x, [packed], form), lambda: allocate(100)]
threads = [threading.Thread(target=forever, args=[work]) for work in works]
for thread in threads: thread.start()
try:
    for _ in range(40):
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            allocate(100)
            os._exit(0 if torch.equal(linear(x[:20], [packed], form)[0], x[:20]) else 1)
        assert os.waitpid(child, 0)[1] == 0
finally:
    stop.set()
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
    old = output("qemu-aarch64", "-cpu", "cortex-a72", program, "name")  # without dot products
    assert old == "portable\n"
