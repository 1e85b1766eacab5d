"""Single linear layers: our kernels beside those of other libraries, in the same rounds.

    pip install llama-cpp-python onnx onnxruntime openvino     # peers, whichever are wanted
    python benchmarks/bench_kernels.py [--only decode|prefill|cached] [--rounds 7] [--shapes 4096x4096,..]
        [--libraries llama.cpp,torch,..] [--bits 8,6,4] [--threads 2] [--result NAME]

Writes results/kernels.json. A library that is not installed is listed as such. Every library has
processes of its own (kernel_peers.py), which stand still while another's turn lasts: threads that
spin after their work would slow down the next. Small shapes have three times the rounds.

Decode: one token through as many copies of the layer as fill the buffer of `posttrain bench`'s
probe of bandwidth (1 GiB, above any cache), between two runs of that probe. Prefill: prompts
against one layer, between two probes of the VNNI peak, which AMX can pass. Our decode is one
native call for all copies, as in the decoder, and also one of `kernels.linear` for each, as prompts
always are; llama.cpp, ONNX Runtime and OpenVINO get all copies in one graph; torch is called from
Python for each. Cached: one token through the same small layer again and again, for libraries whose
graphs do not hold weights of their own.
Wants 20 GiB of memory; with all peers it takes about 17 minutes on 2 cores.
"""

import argparse
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from common import write_result
from kernel_peers import MODULES

import posttrain
from posttrain import kernels
from posttrain.bench.process import Worker
from posttrain.bench.verb import PROBE_BYTES, Probe
from posttrain.cli.doctor import version
from posttrain.errors import UserError
from posttrain.quantize.recipe import load_recipe

LARGE = ((2048, 2048), (8192, 2048), (2048, 8192), (4096, 4096), (11008, 4096), (4096, 11008))
SMALL = ((576, 576), (1536, 576), (576, 1536))
TYPICAL = (4096, 4096)
PROMPTS = (512, 128)  # the second at small shapes and the typical one only
BITS = (8, 6, 4)
PEAK_SECONDS = 0.01
NO_AMX = "AVX512_CORE_VNNI"  # what oneDNN is held to, beside ours on the same instructions
HOLDING = ("onnxruntime", "openvino")  # whose graphs hold weights of their own
PACKAGES = {"llama.cpp": "llama_cpp_python"}  # where the package is not called as the library is

PER_TOKEN, PER_32 = "int8h | fp32/row", "int8h | fp32/g32"
SCALES = {8: ("row", "g32"), 6: ("row", "g128", "g64", "g32"), 4: ("g128", "g64", "g32")}
WEIGHT_ONLY = {
    "W8 row": "int8 | fp32/row",
    "W6 g64": "int6 | fp16/g64",
    "W4 g64": "int4 | fp16/g64",
    "W4 nf4 g64": "nf4 | fp16/g64",
}
MAIN = ("W8A8 row", "W6A8 g64", "W4A8 g64")  # shown against every peer, others against llama.cpp


@dataclass(frozen=True)
class Contender:
    """One way to multiply: a library and how it packs the weight.

    `bits` is the group it is timed in, `family` the peers of which the fastest counts, `options`
    what `kernel_peers` has to know. `cap` holds oneDNN to an instruction set.
    """

    library: str
    name: str
    bits: int
    activations: str
    options: dict[str, Any]
    family: str = ""
    tasks: tuple[str, ...] = ("decode", "prefill", "cached")
    slow_to_load: bool = False  # decodes at one large shape only
    cap: str = ""
    amx: bool = False  # whether it uses AMX where there is one

    @property
    def ours(self) -> bool:
        return self.library == "posttrain"

    @property
    def process(self) -> tuple[str, str]:
        return self.library, self.cap


def contenders() -> list[Contender]:
    return [*_ours(), *_llama(), *_torch(), *_onnxruntime(), *_openvino()]


def _scale(spec: str) -> str:
    """What shares one: "row", "g64"."""
    return spec.rpartition("/")[2]


def _ours() -> Iterator[Contender]:
    """Weights in all groupings, activations per token and per 32, and what the recipes use; weights
    alone, activations in digits and as floats."""
    forms = [
        (f"int{bits} | {'fp32' if scale == 'row' else 'fp16'}/{scale}", given, False, "")
        for bits, scales in SCALES.items()
        for scale in scales
        for given in ((PER_TOKEN, PER_32) if scale == "g32" else (PER_TOKEN,))
    ]
    for recipe in ("w8a8", "w6a8", "w4a8"):
        for rule in load_recipe(recipe).plan.rules:
            weight = str(rule.weight).replace("h |", " |")  # as fast, with one level more
            forms.append(
                (weight, str(rule.input), rule.rotate, f" rotated, {recipe}" if rule.rotate else "")
            )
    names = {}
    for weight, given, rotate, note in forms:
        scales = _scale(weight) + ("" if given == PER_TOKEN else f"/{_scale(given)}")
        names[weight, given, rotate] = f"W{weight[3]}A8 {scales}{note}"
    best, *others = kernels.isas()
    for name, weight in WEIGHT_ONLY.items():
        options = {"format": weight, "input": None, "rotate": False, "isa": best, "decode": "C"}
        made = Contender("posttrain", f"{name} alone, float32", int(name[1]), "float32", options)
        yield replace(made, options=options | {"floats": True})
        if kernels.InputFormat.of(None).struct.bits and "nf4" not in weight:
            yield replace(made, name=f"{name} alone", activations="3 int8 digits")
    for (weight, given, rotate), name in names.items():
        options = {"format": weight, "input": given, "rotate": rotate, "isa": best, "decode": "C"}
        said = f"int8 per {_scale(given).replace('row', 'token').lstrip('g')}"
        made = Contender("posttrain", name, int(name[1]), said, options)
        yield made
        if name in MAIN:
            python = options | {"decode": "Python"}
            tasks = "decode", "cached"
            yield replace(made, name=f"{name}, from Python", options=python, tasks=tasks)
        if "avx512vnni" in others:
            options = options | {"isa": "avx512vnni"}
            yield replace(made, name=f"{name}, AVX-512", options=options, tasks=("prefill",))


def _llama() -> Iterator[Contender]:
    for kind, bits, group in (("Q8_0", 8, 32), ("Q6_K", 6, 256), ("Q4_0", 4, 32), ("Q4_K", 4, 256)):
        family = f"llama.cpp {bits} bits"
        made = Contender(
            "llama.cpp", f"llama.cpp {kind}", bits, f"int8 per {group}", {"type": kind}, family
        )
        yield made
        plain = {"type": kind, "repack": False}
        yield replace(made, name=f"{made.name}, not repacked", options=plain, tasks=("prefill",))


def _torch() -> Iterator[Contender]:
    int8 = Contender("torch", "torch int8", 8, "int8 per tensor", {"kind": "int8"}, "torch int8")
    yield replace(int8, amx=True)
    yield replace(
        int8, name="torch int8, no AMX", cap=NO_AMX, family="torch int8, no AMX", tasks=("prefill",)
    )
    for kind in ("bf16", "fp32"):
        name, amx = f"torch {kind}", kind == "bf16"
        yield Contender("torch", name, 8, kind, {"kind": kind}, name, amx=amx)
    for group in (128, 32):
        options = {"kind": "int4", "group": group}
        yield Contender("torch", f"torch int4 g{group}", 4, "bf16", options, "torch int4")


def _onnxruntime() -> Iterator[Contender]:
    options: dict[str, Any] = {"bits": 8, "group": 0}
    name, family = "ONNX Runtime DynamicQuantizeMatMul", "ONNX Runtime 8 bits"
    yield Contender("onnxruntime", name, 8, "int8 per tensor", options, family, amx=True)
    for bits, group in ((8, 128), (4, 128), (4, 32)):
        options = {"bits": bits, "group": group}
        name, family = f"ONNX Runtime W{bits} g{group}", f"ONNX Runtime {bits} bits"
        slow = bits == 8 or group == 32  # never the faster of its family in decode
        yield Contender(
            "onnxruntime", name, bits, f"int8 per {group}", options, family, slow_to_load=slow
        )


def _openvino() -> Iterator[Contender]:
    """As it comes, which is bf16 on a processor with AMX, and held to integer activations."""
    for bits, group in ((8, 0), (4, 128), (4, 32)):
        name = f"OpenVINO W{bits} {f'g{group}' if group else 'row'}"
        options: dict[str, Any] = {"bits": bits, "group": group}
        family = f"OpenVINO {bits} bits"
        made = Contender(
            "openvino", name, bits, "its default", options, family, slow_to_load=True, amx=True
        )
        yield made
        inputs = group or 128
        settings = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": inputs}
        yield replace(
            made, name=f"{name}, int8", activations=f"int8 per {inputs}", family=f"{family}, int8",
            options=options | {"settings": settings}, tasks=("prefill",), amx=False,
        )  # fmt: skip


# ---------------------------------------------------------------------------------- measuring


class Turns(Worker):
    """A library's process, which stands still except for its turns."""

    def __init__(self, library: str, cap: str, threads: int) -> None:
        self.name = library
        script = str(Path(__file__).with_name("kernel_peers.py"))
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", script, library, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | ({"ONEDNN_MAX_CPU_ISA": cap} if cap else {}),
        )

    def turn(self, **asked: Any) -> dict[str, Any]:
        self._process.send_signal(signal.SIGCONT)
        try:
            return self.ask(json.dumps(asked))
        except UserError as error:  # it crashed: its rows say so
            return {"unsupported": str(error)}
        finally:
            self._process.send_signal(signal.SIGSTOP)

    def close(self) -> None:
        self._process.send_signal(signal.SIGCONT)
        super().close()


class Probes(Probe):
    """The probes of `posttrain bench`."""

    def peak(self) -> float:
        """Integer operations per second of the VNNI instruction, without memory."""
        return float(self._library.pt_probe_peak(PEAK_SECONDS))


@dataclass
class Cell:
    """All rounds of one contender at one shape and number of tokens; `limits` are the probes'."""

    contender: Contender
    shape: tuple[int, int]
    tokens: int
    cached: bool
    facts: dict[str, Any]
    seconds: list[float] = field(default_factory=list)
    limits: list[float] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        (rows, cols), seconds = self.shape, statistics.median(self.seconds)
        work = self.facts["bytes"] if self.tokens == 1 else 2 * self.tokens * rows * cols
        shares = [work / s / limit for s, limit in zip(self.seconds, self.limits, strict=True)]
        rate = {"gb_per_second" if self.tokens == 1 else "gop_per_second": work / seconds / 1e9}
        return {
            "what": self.contender.name,
            "library": self.contender.library,
            "bits": self.contender.bits,
            "activations": self.contender.activations,
            "shape": _text(self.shape),
            "tokens": self.tokens,
            "cached": self.cached,
            "us": 1e6 * seconds,
            "us_spread": [1e6 * min(self.seconds), 1e6 * max(self.seconds)],
            **rate,
            "share": statistics.median(shares),
            "share_spread": [min(shares), max(shares)],
            **self.facts,
        }


class Bench:
    """All processes, all cells, and what could not be measured."""

    def __init__(self, members: list[Contender], args: argparse.Namespace) -> None:
        self.members, self.args = members, args
        self.probe = Probes(args.threads)
        self.processes = {
            key: Turns(*key, args.threads) for key in dict.fromkeys(c.process for c in members)
        }
        self.cells: list[Cell] = []
        self.left_out: list[dict[str, str]] = []

    def close(self) -> None:
        for process in self.processes.values():
            process.close()

    def measure(self, shape: tuple[int, int], bits: int) -> None:
        """All contenders of one width at one shape, in rounds."""
        rows, cols = shape
        present: dict[str, tuple[Contender, list[str], dict[str, Any]]] = {}
        for one in self.members:
            tasks = [task for task in one.tasks if self.args.only in (None, task)]
            if one.slow_to_load and shape in LARGE and shape != TYPICAL:
                tasks = [task for task in tasks if task != "decode"]
            if shape not in SMALL or one.library in HOLDING:
                tasks = [task for task in tasks if task != "cached"]
            if one.bits != bits or not tasks:
                continue
            fill = PROBE_BYTES if "decode" in tasks else 0
            loaded = self._turn(one, shape, do="load", rows=rows, cols=cols, bytes=fill,
                                options=one.options)  # fmt: skip
            if loaded is not None:
                present[one.name] = one, tasks, loaded
        cells: dict[tuple[str, int, bool], Cell] = {}
        # Rounds of small shapes are over before a disturbance of the machine is.
        rounds = self.args.rounds * (3 if shape in SMALL else 1)
        for number in range(rounds + 1):  # the first only warms up
            prompts = PROMPTS[: 2 if shape in (TYPICAL, *SMALL) else 1]
            runs = ("decode", 1), ("cached", 1), *(("prefill", tokens) for tokens in prompts)
            for task, tokens in runs:
                probe = self.probe.bandwidth if tokens == 1 else self.probe.peak
                here = [(one, facts) for one, tasks, facts in present.values() if task in tasks]
                before = probe() if here else 0.0
                for one, facts in here:
                    cached = task == "cached"
                    timed = self._turn(one, shape, do="time", tokens=tokens, cached=cached)
                    after = probe()
                    if timed is None:  # rounds it had before count for nothing
                        del present[one.name]
                        cells = {key: cell for key, cell in cells.items() if key[0] != one.name}
                    elif number:
                        key, seconds = (one.name, tokens, cached), timed.pop("seconds")
                        made = Cell(one, shape, tokens, cached, timed | facts)
                        cell = cells.setdefault(key, made)
                        cell.seconds.append(seconds)
                        cell.limits.append((before + after) / 2)
                    before = after
        self.cells += cells.values()
        for key, process in self.processes.items():
            if "unsupported" in process.turn(do="unload"):  # it has crashed
                process.close()
                self.processes[key] = Turns(*key, self.args.threads)

    def _turn(self, one: Contender, shape: tuple[int, int], **asked: Any) -> dict[str, Any] | None:
        answer = self.processes[one.process].turn(name=one.name, **asked)
        if "unsupported" not in answer:
            return answer
        self.left_out.append(
            {"what": one.name, "shape": _text(shape), "why": answer["unsupported"]}
        )
        return None


# ------------------------------------------------------------------------------------- tables


def spread_out(cells: list[Cell], members: list[Contender]) -> list[dict[str, Any]]:
    """A row for each contender, a column for each shape: share of the limit, and the figure."""
    made = []
    for one in members:
        mine = [cell for cell in cells if cell.contender == one]
        if not mine:
            continue
        row: dict[str, Any] = {"what": one.name}
        for cell in mine:
            found = cell.row()
            row |= {key: found[key] for key in ("activations", "kernel")}
            row["error"] = max(found["relative_error"], row.get("error", 0.0))
            figure = f"{found['us']:.0f}" if cell.tokens == 1 else f"{found['gop_per_second']:.0f}"
            if found["us"] < 100 and cell.tokens == 1:
                figure = f"{found['us']:.1f}"
            row[_column(cell)] = figure if cell.cached else f"{found['share']:.2f} ({figure})"
        made.append(row)
    return made


def fastest(cells: list[Cell]) -> dict[tuple[Any, ...], Cell]:
    """The fastest member of each family of peers, by (family, bits, shape, tokens, cached)."""
    found: dict[tuple[Any, ...], Cell] = {}
    for cell in cells:
        one = cell.contender
        key = one.family, one.bits, cell.shape, cell.tokens, cell.cached
        if not one.ours and (
            key not in found
            or statistics.median(cell.seconds) < statistics.median(found[key].seconds)
        ):
            found[key] = cell
    return found


def pairs(cells: list[Cell]) -> Iterator[tuple[Cell, Cell]]:
    """Ours and the fastest of every family of peers on the same instructions; prompts of weights alone
    beside those that leave activations 16 bits too."""
    best = fastest(cells)
    for ours in cells:
        if not ours.contender.ours:
            continue
        held = ours.contender.options["isa"] != kernels.isas()[0]
        alone = ours.contender.options["input"] is None and ours.tokens > 1
        for (_, bits, *where), theirs in best.items():
            same = (bits, *where) == (ours.contender.bits, ours.shape, ours.tokens, ours.cached)
            if alone and theirs.contender.activations.startswith("int8"):
                continue
            if same and not (theirs.contender.amx if held else theirs.contender.cap):
                yield ours, theirs


def ratio(ours: Cell, theirs: Cell) -> tuple[float, float, float]:
    """How many times faster ours is: median, lowest and highest of the rounds."""
    each = [their / our for our, their in zip(ours.seconds, theirs.seconds, strict=True)]
    return statistics.median(each), min(each), max(each)


def ratios(cells: list[Cell]) -> list[dict[str, Any]]:
    """Ours over the fastest of each family; a column for each shape."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for ours, theirs in pairs(cells):
        name, peer = ours.contender.name, theirs.contender
        if peer.library != "llama.cpp" and not name.startswith(MAIN):
            continue
        row = found.setdefault((name, peer.family), {"ours": name, "peer": peer.family})
        middle, low, high = ratio(ours, theirs)
        row[_column(ours)] = f"{middle:.2f} ({low:.2f}..{high:.2f})"
    return list(found.values())


def slower(cells: list[Cell]) -> list[dict[str, Any]]:
    """Every pair in which the peer is faster, and what tells the two apart."""
    found = []
    for ours, theirs in pairs(cells):
        middle, low, high = ratio(ours, theirs)
        if middle >= 1:
            continue
        task = "decode" if ours.tokens == 1 else f"prefill {ours.tokens}"
        task = "cached" if ours.cached else task
        found.append(
            {
                "where": f"{task}, {_text(ours.shape)}",
                "ours": ours.contender.name,
                "peer": theirs.contender.name,
                "ratio": f"{middle:.2f} ({low:.2f}..{high:.2f})",
                "why": _difference(ours, theirs),
            }
        )
    return found or [{"where": "nowhere"} | dict.fromkeys(("ours", "peer", "ratio", "why"), "-")]


def _difference(ours: Cell, theirs: Cell) -> str:
    our, their = ours.row(), theirs.row()
    if ours.cached:
        said = f"{their['us']:.1f} us out of the caches, ours {our['us']:.1f}"
    elif ours.tokens == 1:
        said = (
            f"reads {their['bytes'] / our['bytes']:.2f} times our bytes at {their['share']:.2f} of "
            f"the memory limit, ours {our['share']:.2f}"
        )
    else:
        said = (
            f"{their['kernel']}: {their['share']:.2f} of the VNNI peak, "
            f"{our['kernel']}: {our['share']:.2f}"
        )
    return f"{said}; activations {their['activations']}, ours {our['activations']}"


def _column(cell: Cell) -> str:
    run = " cached" if cell.cached else "" if cell.tokens == 1 else f" p{cell.tokens}"
    return _text(cell.shape) + run


def _text(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"


def figures(bench: Bench, libraries: list[dict[str, Any]]) -> dict[str, Any]:
    cells, members = bench.cells, bench.members
    large = [cell for cell in cells if cell.shape in LARGE]
    small = [cell for cell in cells if cell.shape in SMALL]
    decode = [cell for cell in large if cell.tokens == 1]
    prefill = [cell for cell in large if cell.tokens > 1]
    return {
        "decode": spread_out(decode, members),
        "prefill": spread_out(prefill, members),
        "small": spread_out(small, members),
        "decode_ratios": ratios(decode),
        "prefill_ratios": ratios(prefill),
        "small_ratios": ratios(small),
        "slower": slower(cells),
        "libraries": libraries,
        "left_out": bench.left_out,
        "rows": [cell.row() for cell in cells],
        "threads": bench.args.threads,
        "rounds": bench.args.rounds,
        "set_bytes": PROBE_BYTES,
    }


def _version(library: str) -> str | None:
    return (
        posttrain.__version__ if library == "posttrain" else version(PACKAGES.get(library, library))
    )


def main() -> None:
    args = _arguments()
    installed = {name: importlib.util.find_spec(module) for name, module in MODULES.items()}
    libraries = [
        {
            "library": name,
            "version": _version(name) if installed[name] else "not installed",
        }
        for name in MODULES
    ]
    wanted = [one for one in contenders() if installed[one.library] and one.bits in args.bits]
    if args.libraries:
        wanted = [one for one in wanted if one.ours or one.library in args.libraries]
    bench = Bench(wanted, args)
    try:
        for shape in args.shapes:
            for bits in args.bits:
                print(f"{_text(shape)}, {bits} bits", file=sys.stderr, flush=True)
                bench.measure(shape, bits)
    finally:
        bench.close()
    write_result(args.result, figures(bench, libraries))


def _arguments() -> argparse.Namespace:
    def shapes(text: str) -> list[tuple[int, ...]]:
        return [tuple(map(int, shape.split("x"))) for shape in text.split(",")]

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--only", choices=("decode", "prefill", "cached"))
    add("--rounds", type=int, default=7)
    add("--shapes", type=shapes, default=[*SMALL, *LARGE])
    add("--bits", type=lambda text: tuple(map(int, text.split(","))), default=BITS)
    add("--libraries", type=lambda text: text.split(","))
    add("--threads", type=int, default=2)
    add("--result", default="kernels", help="write results/NAME.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
