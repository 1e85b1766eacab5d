"""The native library: found, checked and loaded once; its C structs; `isa` and `threads`.

`$POSTTRAIN_NATIVE` names another library file, or is "off" to do without. ctypes and a plain C interface
instead of an extension module: a call costs 0.6 microseconds more, which a call per decode step
does not feel, and one build serves every version of Python.
"""

import ctypes
import os
import warnings
import weakref
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from posttrain.errors import UserError

ABI = 12
LIBRARY = Path(__file__).with_name("_native.so")
BUILD = "python -m posttrain.kernels.build"
OFF = ("off", "0", "false", "no")  # values of POSTTRAIN_NATIVE, in any case
MOST_THREADS = 1024
STAGES = {"integer": 0, "lookup": 1, "table": 2, "float": 3, "rows": 4}
SCALE_TYPES = {"fp32": 0, "fp16": 1, "bf16": 2, "e4m3": 3, "e8m0": 4}
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3}
CACHE_TYPES = {"fp32": 0, "fp16": 1, "bf16": 2, "int8": 3, "e4m3": 4, "int4": 5, "int16": 6}
STATUS = {
    1: "shapes that do not fit together",
    2: "a format it does not know",
    3: "more memory than there is",
    4: "the system starts no {threads} threads; raise its limit (`ulimit -u`, the pids of a container) "
    "or use fewer (posttrain.kernels.set_threads, or taskset)",
}

_i32, _i64, _pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class Weight(ctypes.Structure):
    """`pt_weight` of native/posttrain.h."""

    _fields_ = [
        *((name, _i32) for name in ("rows", "cols", "stage", "bits", "half", "group")),
        ("scale_type", _i32),
        ("zero", _i32),
        ("multiplier", ctypes.c_float),
        *((name, _pointer) for name in ("codes", "scales", "zeros", "lookup", "table", "bias")),
    ]


class Input(ctypes.Structure):
    """`pt_input` of native/posttrain.h."""

    _fields_ = [
        *((name, _i32) for name in ("bits", "group", "lo", "hi", "scale_type", "rotate")),
        ("top", ctypes.c_float),
    ]


class Product(ctypes.Structure):
    """`pt_product` of native/posttrain.h. alive: what owns the memory it points to; a copy, such as
    an array of these makes, keeps nothing alive."""

    alive: tuple[object, ...] = ()
    _fields_ = [
        ("weights", _pointer),
        ("count", _i32),
        ("x", _pointer),
        ("ldx", _i64),
        ("tokens", _i64),
        ("input", _pointer),
        ("y", _pointer),
        ("ldy", _pointer),
    ]


_NORMS = ("attention_norm", "attention_out_norm", "mlp_norm", "mlp_out_norm", "q_norm", "k_norm")
_LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
_INPUTS = ("qkv_input", "o_input", "mlp_input", "down_input")
_f32 = ctypes.c_float


class Block(ctypes.Structure):
    """`pt_block` of native/posttrain.h."""

    _fields_ = [
        *((name, _pointer) for name in _NORMS),
        *((name, ctypes.POINTER(Weight)) for name in _LINEARS),
        *((name, Input) for name in _INPUTS),
        ("window", _i32),
        ("rope", _i32),
    ]


class Model(ctypes.Structure):
    """`pt_model` of native/posttrain.h."""

    _fields_ = [
        *((name, _i32) for name in ("blocks", "width", "heads", "kv_heads", "head_size", "rotary")),
        *((name, _i32) for name in ("vocabulary", "activation")),
        *((name, _f32) for name in ("eps", "embedding_scale", "residual_scale")),
        *((name, _f32) for name in ("attention_scale", "logit_scale")),
        *((name, _f32) for name in ("attention_cap", "logit_cap")),
        ("block", ctypes.POINTER(Block)),
        ("norm", _pointer),
        ("embedding", ctypes.POINTER(Weight)),
        ("head", ctypes.POINTER(Weight)),
        ("head_input", Input),
    ]


class Memory(ctypes.Structure):
    """`pt_sequence` of native/posttrain.h."""

    _fields_ = [
        *((name, _pointer) for name in ("keys", "values", "key_scales", "value_scales")),
        ("angles", _pointer * 2),
        ("capacity", _i64),
        ("length", _i64),
        ("tokens", _i32),
        ("type", _i32),
        ("passing", _i32),
    ]


class Columns(ctypes.Structure):
    """`pt_columns` of native/posttrain.h. alive: the tensors it points to."""

    alive: tuple[Tensor, ...] = ()
    _fields_ = [
        *((name, _i64) for name in ("columns", "rows")),
        *((name, _pointer) for name in ("matrix", "steps", "zeros", "levels", "edges")),
        ("count", _i32),
    ]


class Draw(ctypes.Structure):
    """`pt_draw` of native/posttrain.h."""

    _fields_ = [
        *((name, _f32) for name in ("temperature", "top_p", "min_p", "repetition_penalty")),
        ("top_k", _i32),
        ("seed", ctypes.c_uint64),
        ("position", _i64),
        ("history", _pointer),
        ("length", _i64),
    ]


_products, _input, _model, _memories, _draws, _columns = (
    ctypes.POINTER(kind) for kind in (Product, Input, Model, Memory, Draw, Columns)
)
_SIGNATURES = {
    "pt_code_bytes": (_i64, [_i32, _i32, _i32]),
    "pt_scale_count": (_i64, [_i32, _i32, _i32]),
    "pt_pack_codes": (_i32, [_pointer, _i32, _i32, _i32, _pointer]),
    "pt_unpack_codes": (_i32, [_pointer, _i32, _i32, _i32, _pointer]),
    "pt_unpack_rows": (_i32, [_pointer, _i32, _i32, _i32, _pointer, _i64, _pointer]),
    "pt_pack_floats": (_i32, [_pointer, _i32, _i32, _i32, _pointer]),
    "pt_pack_scales": (_i32, [_pointer, _i32, _i32, _i32, _pointer]),
    "pt_linear": (_i32, [_products, _i32]),
    "pt_quantize": (_i32, [_pointer, _i64, _i64, _i32, _input, _pointer, _pointer]),
    "pt_rotate": (_i32, [_pointer, _i64, _i32]),
    "pt_forward": (_i32, [_model, _memories, _i32, _pointer, _pointer, _i32, _pointer, _pointer]),
    "pt_step": (_i32, [_model, _memories, _i32, _pointer, _draws, _pointer]),
    "pt_head": (_i32, [_model, _pointer, _i64, _pointer]),
    "pt_losses": (_i32, [_model, _pointer, _pointer, _i64, _pointer]),
    "pt_log_partition": (_i32, [_pointer, _i64, _i32, _pointer]),
    "pt_round_columns": (_i32, [_columns, _pointer, _pointer, _pointer]),
    "pt_descend_columns": (_i32, [_columns, _pointer, _pointer, _pointer, _pointer]),
    "pt_sample": (_i32, [_pointer, _i32, _draws]),
    "pt_probe_bandwidth": (ctypes.c_double, [_pointer, _i64]),
    "pt_probe_peak": (ctypes.c_double, [ctypes.c_double]),
    "pt_sources": (ctypes.c_char_p, []),
    "pt_isa": (ctypes.c_char_p, []),
    "pt_isas": (ctypes.c_char_p, []),
    "pt_digits_are_fast": (_i32, []),
    "pt_use": (_i32, [ctypes.c_char_p]),
    "pt_set_threads": (None, [_i32]),
    "pt_set_reading": (None, [_i32]),
    "pt_threads": (_i32, []),
    "pt_allocate": (_pointer, [_i64]),
    "pt_free": (None, [_pointer]),
}


@dataclass(frozen=True)
class Found:
    """The loaded library, or why there is none and what to do about it."""

    library: ctypes.CDLL | None
    reason: str = ""
    fix: str | None = None


@cache
def find() -> Found:
    """Load the library once per process. Never raises; a missing library has its reason."""
    wanted = os.environ.get("POSTTRAIN_NATIVE", "")
    if wanted.lower() in OFF:
        return Found(None, f"switched off by POSTTRAIN_NATIVE={wanted}", "unset POSTTRAIN_NATIVE")
    path = os.path.abspath(wanted or LIBRARY)  # a bare name would be looked for elsewhere
    if not os.path.isfile(path):
        return _misnamed(path) if wanted else _unbuilt()
    try:
        library = ctypes.CDLL(path)
        abi = library.pt_abi()
        if abi != ABI:
            return Found(None, f"{path} has interface {abi}, this posttrain needs {ABI}", BUILD)
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        return Found(None, f"{path} cannot be loaded ({error})", BUILD)
    library.pt_set_threads(_usable_cpus())
    _warn_if_stale(library)
    return Found(library)


def _misnamed(path: str) -> Found:
    reason = f"POSTTRAIN_NATIVE names {path}, which is no file"
    return Found(None, reason, "unset POSTTRAIN_NATIVE, or name a library that is there")


def _unbuilt() -> Found:
    from posttrain.kernels import build  # not above: it is also run as a program

    try:
        command = " ".join(build.compiler())
        return Found(None, f"not built yet ({command} is here to build them)", BUILD)
    except build.BuildError as error:
        return Found(None, f"{LIBRARY.name} is missing and {error}", f"install g++, then {BUILD}")


def _warn_if_stale(library: ctypes.CDLL) -> None:
    from posttrain.kernels import build

    try:
        sources = build.fingerprint()
    except OSError:  # installed without them, or not for everybody to read
        return
    if library.pt_sources().decode() != sources:
        warnings.warn(f"the native kernels are older than their sources; run {BUILD}", stacklevel=2)


def _usable_cpus() -> int:
    from posttrain.kernels import build

    return build.usable_cpus()


def native() -> ctypes.CDLL:
    """The library. Raises UserError, with what to do, where there is none."""
    found = find()
    if found.library is None:
        raise UserError(f"the native kernels are not available: {found.reason}; fix: {found.fix}")
    return found.library


def available() -> bool:
    """Whether the native kernels can be used in this process."""
    return find().library is not None


def isas() -> list[str]:
    """Instruction sets this library has and this processor runs, best first."""
    return native().pt_isas().decode().split(",")  # type: ignore[no-any-return]


def isa() -> str:
    """The instruction set in use."""
    return native().pt_isa().decode()  # type: ignore[no-any-return]


def use(name: str = "") -> None:
    """Run on the instruction set `name`, or on the best ("")."""
    if not native().pt_use(name.encode()):
        raise UserError(f"no kernels for {name!r} here; there are {', '.join(isas())}")


def threads() -> int:
    """Number of threads the kernels use."""
    return int(native().pt_threads())


def set_threads(count: int) -> None:
    """Use `count` threads, at most MOST_THREADS; 0 is one per processor this process may use, as it
    is without this."""
    if not 0 <= count <= MOST_THREADS:
        raise UserError(f"threads must be from 0 (all processors) to {MOST_THREADS}, not {count}")
    native().pt_set_threads(count or _usable_cpus())


def check(status: int, what: str) -> None:
    """UserError unless a native function returned 0."""
    if status:
        reason = STATUS.get(status, str(status)).format(threads=threads())
        raise UserError(f"the native kernels refused {what}: {reason}")


def allocate(nbytes: int) -> Tensor:
    """uint8 [nbytes], not cleared, on 2 MiB pages where the system gives them."""
    library = native()
    address = library.pt_allocate(nbytes)
    if not address:
        raise MemoryError(f"no {nbytes} bytes for packed weights")
    owner = (ctypes.c_uint8 * nbytes).from_address(address)
    release = weakref.finalize(owner, library.pt_free, address)
    release.atexit = False  # another thread may still be multiplying when the interpreter ends
    return torch.frombuffer(owner, dtype=torch.uint8)
