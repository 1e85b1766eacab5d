"""The libraries that bench_kernels.py compares, each behind the same linear layer.

    python benchmarks/kernel_peers.py LIBRARY THREADS      (bench_kernels.py starts it)

Reads a JSON object per line on standard input, answers with one per line on standard output:

    {"do": "load", "name": .., "rows": .., "cols": .., "bytes": .., "options": {..}}
    {"do": "time", "name": .., "tokens": .., "cached": ..}     seconds of one product, and its error
    {"do": "unload"}                              forget all layers

Every library gets the same float32 weight [rows, cols], packs it its own way, and is asked for
products of the same float32 activations. One token runs through all copies of the layer, which
together are larger than the caches, or, `cached`, through the same copy again and again, as a prompt
does. Libraries that run graphs get all these products in one graph, as a whole model would be, and so
does our decode in C.
"""

import copy
import ctypes
import gc
import importlib.util
import json
import math
import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

MODULES = {  # library -> what has to be importable
    "posttrain": "posttrain",
    "llama.cpp": "llama_cpp",
    "torch": "torch",
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
}
CHECKED = 16  # tokens whose result is compared with float32
CHECKED_ROWS = 512  # rows of ours that are compared with the plain reference, in float64
LEAST_SECONDS = 0.015  # shorter products are repeated until they have taken so long
LEAST_PROMPTS = 3  # products with a prompt that the median is taken of
CACHED = 200  # products of one run where the same copy is met again and again
MOST_NODES = 1000  # copies in one graph of ONNX Runtime and OpenVINO, which take long to build them

Plan = tuple[Callable[[], Any], Callable[[], Tensor]]  # run all copies; what the first gave


class Unsupported(Exception):
    """The library has no such layer; the message says why."""


class Layer(ABC):
    """One linear layer as a library stores it, in `copies` copies of `nbytes` packed bytes."""

    nbytes: int
    kernel: str

    def __init__(self, weight: Tensor, set_bytes: int, **options: Any) -> None:
        self.rows, self.cols = weight.shape
        self.pack(weight, **options)
        self.copies = max(1, math.ceil(set_bytes / self.nbytes))
        self.fill()

    @abstractmethod
    def pack(self, weight: Tensor, **options: Any) -> None:
        """Pack one layer and set `nbytes`, scales included."""

    def fill(self) -> None:  # noqa: B027 - graphs hold their own
        """Make `copies` of it."""

    def repeated(self, times: int) -> "Layer":
        """A layer all of whose copies are the first. Raises Unsupported where it holds none."""
        if not hasattr(self, "weights"):
            raise Unsupported("its graph holds the weights")
        made = copy.copy(self)
        vars(made)["weights"] = self.weights[:1] * times
        return made

    @abstractmethod
    def plan(self, x: Tensor, copies: int) -> Plan:
        """How x [tokens, cols] is multiplied with so many copies, one after another."""

    def target(self, x: Tensor) -> Tensor:
        """What the layer multiplies its weight with: x, unless it rotates it first."""
        return x

    def check(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        """Further checks of a result, and facts that only now are known."""
        return {}

    def close(self) -> None:  # noqa: B027
        """Free what Python does not."""


# ---------------------------------------------------------------------------------- posttrain


class Posttrain(Layer):
    """`kernels.linear`; for one token also one call of the C function below it for all copies, which
    asks for the memory of each ahead, as the decoder does."""

    packed: ClassVar[
        dict[tuple[Any, ...], Any]
    ] = {}  # formats of activations share the packed weights

    def pack(
        self,
        weight: Tensor,
        *,
        format: str,
        input: str | None,
        rotate: bool,
        isa: str,
        decode: str,
        floats: bool = False,  # activations stay float32 though digits are faster
    ) -> None:
        from posttrain import kernels
        from posttrain.numbers import Spec, quantize

        self.spec = Spec.parse(format)
        self.input_spec = None if input is None else Spec.parse(input)
        enters = kernels.InputFormat.of(self.input_spec, rotate)
        self.input = kernels.InputFormat.floats(rotate) if floats else enters
        self.decode = decode
        self.nbytes = self.spec.stored_bits(weight.shape) // 8
        self.kernel = isa
        self._key = (format, *weight.shape)
        if self._key not in self.packed:
            q = quantize(weight, self.spec)
            dense = q.dequantize()[:CHECKED_ROWS].double()
            self.packed[self._key] = [kernels.PackedWeight.from_qtensor(q)], dense
        self.weights, self.dense = self.packed[self._key]

    def fill(self) -> None:
        while len(self.weights) < self.copies:
            self.weights.append(_copied(self.weights[0]))

    def plan(self, x: Tensor, copies: int) -> Plan:
        from posttrain import kernels

        weights = self.weights[:copies]
        if self.decode == "C" and len(x) == 1:
            return self._from_c(x, weights)
        last: list[Tensor] = []

        def run() -> None:
            kernels.use(self.kernel)
            for weight in weights:
                last[:] = kernels.linear(x, [weight], self.input)

        return run, lambda: last[0]  # the copies are equal

    def _from_c(self, x: Tensor, weights: list[Any]) -> Plan:
        from posttrain.kernels import library
        from posttrain.kernels.packed import product

        y = torch.empty(len(x), self.rows)
        asked = [product(x, [weight], self.input, [y]) for weight in weights]
        products = (library.Product * len(asked))(*asked)

        def run() -> None:
            library.use(self.kernel)
            library.native().pt_linear(products, len(asked))  # `asked` owns what they point to

        return run, lambda: y

    def target(self, x: Tensor) -> Tensor:
        from posttrain.kernels.packed import rotate

        return rotate(x) if self.input.struct.rotate else x

    def check(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        """Beside the plain product of the same codes: both round K + 4 times at most on the way
        (`models.linear.integer_bound`)."""
        from posttrain.numbers import fake_quantize

        dense = self.dense
        seen = self.target(x).double()
        if self.input_spec is not None:
            seen = fake_quantize(self.target(x), self.input_spec).double()
        bound = 2 * (self.cols + 4) * 2.0**-24 * (seen.abs() @ dense.abs().T)
        of_bound = float(((y[:, :CHECKED_ROWS] - seen @ dense.T).abs() / bound).max())
        if not of_bound <= 1:
            raise Unsupported(
                f"{self.spec}: differs from the plain product ({of_bound:.2g} bounds)"
            )
        return {"of_bound": of_bound}

    def close(self) -> None:
        self.packed.clear()


def _copied(weight: Any) -> Any:
    """The same weight elsewhere in memory."""
    from posttrain import kernels
    from posttrain.kernels.library import Weight

    made = kernels.PackedWeight(Weight.from_buffer_copy(weight.struct))
    for name, tensor in weight.tensors.items():
        source = tensor.flatten().view(torch.uint8)
        made.tensors[name] = kernels.allocate(source.numel()).copy_(source)
        setattr(made.struct, name, made.tensors[name].data_ptr())
    return made


# -------------------------------------------------------------------------------------- torch


class Torch(Layer):
    """int8 by the onednn engine, 4 bits by `_weight_int4pack_mm_for_cpu`, or plain floats."""

    def pack(self, weight: Tensor, *, kind: str, group: int = 0) -> None:
        made = getattr(self, f"_{kind}")(weight, group)
        self._another, self._product, self._as, self.nbytes, self.kernel = made

    def fill(self) -> None:
        self.weights = [self._another() for _ in range(self.copies)]

    def plan(self, x: Tensor, copies: int) -> Plan:
        # A prompt gets a copy of its own: onednn lays weights out for the first x they meet.
        weights = self.weights if copies > 1 else [self._another()]
        given = x.to(self._as)
        last: list[Tensor] = []

        def run() -> None:
            for weight in weights:
                last[:] = [self._product(given, weight)]

        return torch.inference_mode()(run), lambda: last[0].float()

    def _fp32(self, weight: Tensor, group: int) -> tuple[Any, ...]:
        linear = torch.nn.functional.linear
        return weight.clone, linear, torch.float32, weight.nbytes, "linear"

    def _bf16(self, weight: Tensor, group: int) -> tuple[Any, ...]:
        linear, half = torch.nn.functional.linear, weight.bfloat16()
        return half.clone, linear, torch.bfloat16, half.nbytes, "linear"

    def _int8(self, weight: Tensor, group: int) -> tuple[Any, ...]:
        torch.backends.quantized.engine = "onednn"
        scale = weight.abs().amax(1).double() / 127
        zero = torch.zeros(self.rows, dtype=torch.long)
        q = torch.quantize_per_channel(weight, scale, zero, 0, torch.qint8)
        ops = torch.ops.quantized
        return (
            lambda: ops.linear_prepack(q, None),
            lambda x, packed: ops.linear_dynamic(x, packed, False),
            torch.float32,
            weight.numel() + 4 * self.rows,
            "quantized.linear_dynamic, onednn",
        )

    def _int4(self, weight: Tensor, group: int) -> tuple[Any, ...]:
        codes, scales = _grouped(weight, group, 4)
        aten = torch.ops.aten
        packed = aten._convert_weight_to_int4pack_for_cpu((codes + 8).int(), 1)
        zeros = torch.zeros_like(scales)
        factors = torch.stack([scales, zeros], -1).transpose(0, 1).contiguous().bfloat16()
        return (
            lambda: (packed.clone(), factors.clone()),
            lambda x, w: aten._weight_int4pack_mm_for_cpu(x, w[0], group, w[1]),
            torch.bfloat16,
            packed.nbytes + factors.nbytes,
            "_weight_int4pack_mm_for_cpu",
        )


def _grouped(weight: Tensor, group: int, bits: int) -> tuple[Tensor, Tensor]:
    """Symmetric integer codes int8 [rows, cols] and scales float32 [rows, groups]."""
    rows, cols = weight.shape
    if cols % group:
        raise Unsupported(f"{cols} columns are no multiple of {group}")
    most = 2 ** (bits - 1) - 1
    parts = weight.reshape(rows, -1, group)
    scales = parts.abs().amax(-1) / most
    codes = (parts / scales[..., None]).round().clamp(-most, most)
    return codes.to(torch.int8).reshape(rows, cols), scales


# ---------------------------------------------------------------------------------- llama.cpp

_p, _size, _i64 = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64


class _Parameters(ctypes.Structure):
    """`ggml_init_params` of ggml.h."""

    _fields_ = [("bytes", _size), ("buffer", _p), ("no_alloc", ctypes.c_bool)]


_GGML = {
    "ggml_init": (_p, [_Parameters]),
    "ggml_free": (None, [_p]),
    "ggml_log_set": (None, [_p, _p]),
    "ggml_new_tensor_2d": (_p, [_p, ctypes.c_int, _i64, _i64]),
    "ggml_mul_mat": (_p, [_p, _p, _p]),
    "ggml_new_graph_custom": (_p, [_p, _size, ctypes.c_bool]),
    "ggml_graph_overhead_custom": (_size, [_size, ctypes.c_bool]),
    "ggml_tensor_overhead": (_size, []),
    "ggml_build_forward_expand": (None, [_p, _p]),
    "ggml_blck_size": (_i64, [ctypes.c_int]),
    "ggml_row_size": (_size, [ctypes.c_int, _i64]),
    "ggml_quantize_chunk": (_size, [ctypes.c_int, _p, _p, _i64, _i64, _i64, _p]),
    "ggml_backend_cpu_init": (_p, []),
    "ggml_backend_cpu_set_n_threads": (None, [_p, ctypes.c_int]),
    "ggml_backend_cpu_reg": (_p, []),
    "ggml_backend_cpu_buffer_type": (_p, []),
    "ggml_backend_reg_dev_get": (_p, [_p, _size]),
    "ggml_backend_reg_get_proc_address": (_p, [_p, ctypes.c_char_p]),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, [_p, _p]),
    "ggml_backend_buft_name": (ctypes.c_char_p, [_p]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_p, [_p, _p]),
    "ggml_backend_buffer_free": (None, [_p]),
    "ggml_backend_tensor_set": (None, [_p, _p, _size, _size]),
    "ggml_backend_tensor_get": (None, [_p, _p, _size, _size]),
    "ggml_backend_graph_compute": (ctypes.c_int, [_p, _p]),
}
_TYPES = {"F32": 0, "Q4_0": 2, "Q8_0": 8, "Q4_K": 12, "Q6_K": 14}  # enum ggml_type


@cache
def _ggml() -> Any:
    """ggml's functions, from the libraries inside the package llama_cpp."""
    spec = importlib.util.find_spec("llama_cpp")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "lib"
    loaded = [
        ctypes.CDLL(str(next(folder.glob(f"libggml-{part}.*"))), mode=ctypes.RTLD_GLOBAL)
        for part in ("base", "cpu")
    ]

    class Functions:
        quiet: Any
        log_set: Any

    for name, (result, arguments) in _GGML.items():
        function = next(getattr(library, name) for library in loaded if hasattr(library, name))
        function.restype, function.argtypes = result, arguments
        setattr(Functions, name.removeprefix("ggml_"), staticmethod(function))
    Functions.quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, _p)(lambda *_: None)
    Functions.log_set(Functions.quiet, None)  # it tells of every weight that it repacks
    return Functions


class LlamaCpp(Layer):
    """A graph of `ggml_mul_mat` on the CPU back end, weights in the buffer type it prefers."""

    def pack(self, weight: Tensor, *, type: str, repack: bool = True) -> None:
        g, self.type = _ggml(), _TYPES[type]
        if self.cols % g.blck_size(self.type):
            raise Unsupported(f"{type} has blocks of {g.blck_size(self.type)}, not {self.cols}")
        self.nbytes = g.row_size(self.type, self.cols) * self.rows
        self.data = np.empty(self.nbytes, np.uint8)
        g.quantize_chunk(
            self.type, weight.data_ptr(), self.data.ctypes.data, 0, self.rows, self.cols, None
        )
        self.repack, self.memory = repack, []

    def fill(self) -> None:
        g, plain = _ggml(), _ggml().backend_cpu_buffer_type()
        best = next(filter(self._taken, [*_extra_buffer_types(), plain]))
        if not self.repack and best == plain:
            raise Unsupported("plain rows are its default for this type")
        chosen = best if self.repack else plain
        self.kernel = f"ggml_mul_mat, {g.backend_buft_name(chosen).decode()}"
        self.weights = self._placed(self.copies, chosen)
        for tensor in self.weights:
            g.backend_tensor_set(tensor, self.data.ctypes.data, 0, self.nbytes)

    def _placed(self, copies: int, buffer_type: Any) -> list[Any]:
        """Tensors for so many copies in a buffer of this type."""
        context = self._context(copies)
        tensors = [
            _ggml().new_tensor_2d(context, self.type, self.cols, self.rows) for _ in range(copies)
        ]
        self._place(context, buffer_type)
        return tensors

    def _taken(self, buffer_type: Any) -> bool:
        """Whether the device multiplies with such a weight in a buffer of this type."""
        g, (weight,), context = _ggml(), self._placed(1, buffer_type), self._context(2)
        x = g.new_tensor_2d(context, _TYPES["F32"], self.cols, 1)
        taken = g.backend_dev_supports_op(_device(), g.mul_mat(context, weight, x))
        g.free(context)
        self.close()
        return bool(taken)

    def _context(self, tensors: int, graph: int = 0) -> Any:
        g = _ggml()
        size = tensors * g.tensor_overhead() + 4096
        if graph:
            size += g.graph_overhead_custom(graph, False)
        return g.init(_Parameters(size, None, True))

    def _place(self, context: Any, buffer_type: Any) -> None:
        """Memory for all tensors of a context that have none."""
        buffer = _ggml().backend_alloc_ctx_tensors_from_buft(context, buffer_type)
        self.memory.append((context, buffer))

    def plan(self, x: Tensor, copies: int) -> Plan:
        g, tokens = _ggml(), len(x)
        context = self._context(copies + 2, graph=copies + 2)
        given = g.new_tensor_2d(context, _TYPES["F32"], self.cols, tokens)
        graph = g.new_graph_custom(context, copies + 2, False)
        products = [g.mul_mat(context, weight, given) for weight in self.weights[:copies]]
        for product in products:
            g.build_forward_expand(graph, product)
        self._place(context, g.backend_cpu_buffer_type())
        g.backend_tensor_set(given, x.data_ptr(), 0, x.nbytes)
        y = torch.empty(tokens, self.rows)

        def output() -> Tensor:
            g.backend_tensor_get(products[0], y.data_ptr(), 0, y.nbytes)
            return y

        return lambda: g.backend_graph_compute(_backend(), graph), output

    def close(self) -> None:
        for context, buffer in self.memory:
            _ggml().backend_buffer_free(buffer)
            _ggml().free(context)
        self.memory = []


@cache
def _backend() -> Any:
    backend = _ggml().backend_cpu_init()
    _ggml().backend_cpu_set_n_threads(backend, torch.get_num_threads())
    return backend


@cache
def _device() -> Any:
    return _ggml().backend_reg_dev_get(_ggml().backend_cpu_reg(), 0)


@cache
def _extra_buffer_types() -> list[Any]:
    """Layouts the CPU back end repacks weights to when a model is loaded, best first."""
    g = _ggml()
    address = g.backend_reg_get_proc_address(
        g.backend_cpu_reg(), b"ggml_backend_dev_get_extra_bufts"
    )
    found = ctypes.CFUNCTYPE(ctypes.POINTER(_p), _p)(address)(_device())
    types = []
    while found[len(types)]:
        types.append(found[len(types)])
    return types


# -------------------------------------------------------------------------------- onnxruntime


class OnnxRuntime(Layer):
    """MatMulNBits with int8 activations, or DynamicQuantizeMatMul (group 0)."""

    def pack(self, weight: Tensor, *, bits: int, group: int) -> None:
        codes, scales = _grouped(weight, group or self.cols, bits)
        if group:
            unsigned = (codes.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
            if bits == 4:
                unsigned = unsigned[:, ::2] | unsigned[:, 1::2] << 4
            packed = unsigned.reshape(self.rows, self.cols // group, -1).numpy()
            self.parts = [packed, scales.flatten().numpy()]
            facts = {"K": self.cols, "N": self.rows, "bits": bits, "block_size": group}
            self.node, self.facts = "MatMulNBits", facts | {"accuracy_level": 4}
        else:
            self.parts = [codes.T.contiguous().numpy(), scales.flatten().numpy()]
            self.node, self.facts = "DynamicQuantizeMatMul", {}
        self.kernel = self.node
        self.nbytes = sum(part.nbytes for part in self.parts)
        self.sessions: dict[int, Any] = {}
        self.kept: list[Any] = []

    def fill(self) -> None:
        self.copies = min(self.copies, MOST_NODES)

    def _session(self, copies: int) -> Any:
        import onnxruntime
        from onnx import TensorProto, helper

        how, nodes, declared, outputs = onnxruntime.SessionOptions(), [], [], []
        how.intra_op_num_threads, how.inter_op_num_threads = torch.get_num_threads(), 1
        given: dict[str, Any] = {}
        for i in range(copies):
            names = [f"codes{i}", f"scales{i}"]
            for name, part in zip(names, self.parts, strict=True):
                # Handed over beside the model, which is quicker; equal ones would be merged.
                distinct = np.roll(part, i, axis=0)
                given[name] = onnxruntime.OrtValue.ortvalue_from_numpy(distinct)
                declared.append(_elsewhere(name, distinct))
            nodes.append(
                helper.make_node(
                    self.node, ["x", *names], [f"y{i}"], domain="com.microsoft", **self.facts
                )
            )
            shape = ["tokens", self.rows]
            outputs.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, shape))
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", self.cols])
        model = helper.make_model(
            helper.make_graph(nodes, "layers", [x], outputs, declared),
            opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)],
            ir_version=10,
        ).SerializeToString()
        how.add_external_initializers(list(given), list(given.values()))
        session = onnxruntime.InferenceSession(model, how, providers=["CPUExecutionProvider"])
        self.kept.append(given)
        return session

    def plan(self, x: Tensor, copies: int) -> Plan:
        if copies not in self.sessions:
            self.sessions[copies] = self._session(copies)
        session = self.sessions[copies]
        bound = session.io_binding()
        bound.bind_cpu_input("x", x.numpy())
        for i in range(copies):
            bound.bind_output(f"y{i}", "cpu")
        return (
            lambda: session.run_with_iobinding(bound),
            lambda: torch.from_numpy(bound.get_outputs()[0].numpy()),
        )


def _elsewhere(name: str, array: Any) -> Any:
    """An initializer that is declared in the model and lies outside of it."""
    from onnx import TensorProto, helper

    declared = TensorProto(
        name=name,
        data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
        dims=array.shape,
        data_location=TensorProto.EXTERNAL,
    )
    entry = declared.external_data.add()
    entry.key, entry.value = "location", "memory"
    return declared


# ----------------------------------------------------------------------------------- openvino


class OpenVino(Layer):
    """MatMul behind a decompression of integer weights, which its CPU plugin fuses."""

    def pack(
        self, weight: Tensor, *, bits: int, group: int, settings: dict[str, Any] | None = None
    ) -> None:
        codes, scales = _grouped(weight, group or self.cols, bits)
        self.group, self.bits = group or self.cols, bits
        self.settings = settings or {}
        if bits == 4:
            nibbles = codes.view(torch.uint8) & 15
            codes = nibbles[:, ::2] | nibbles[:, 1::2] << 4
        self.codes, self.scales = codes.numpy().view(np.uint8), scales.half().numpy()
        self.nbytes = self.codes.nbytes + self.scales.nbytes
        self.kernel, self.compiled = "MatMul", {}

    def fill(self) -> None:
        self.copies = min(self.copies, MOST_NODES)

    def _compile(self, copies: int) -> Any:
        import openvino
        from openvino import opset13 as op

        x = op.parameter([-1, self.cols], np.float32)
        groups = self.cols // self.group
        inside = [self.rows, groups, self.group] if groups > 1 else [self.rows, self.cols]
        kind = openvino.Type.i4 if self.bits == 4 else openvino.Type.i8
        self.kept, products = [], []  # the tensors only point to their arrays
        for i in range(copies):
            self.kept.append(np.roll(self.codes, i, axis=0))  # equal ones might be merged
            codes = openvino.Tensor(self.kept[-1], openvino.Shape(inside), kind)
            scales = self.scales.reshape([*inside[:-1], 1])
            made = op.multiply(op.convert(op.constant(codes), np.float16), op.constant(scales))
            if groups > 1:
                made = op.reshape(made, op.constant(np.array([self.rows, self.cols])), False)
            products.append(op.matmul(x, op.convert(made, np.float32), False, True))
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        model = openvino.Model(products, [x])
        return openvino.Core().compile_model(model, "CPU", settings | self.settings)

    def plan(self, x: Tensor, copies: int) -> Plan:
        import openvino

        if copies not in self.compiled:
            compiled = self._compile(copies)
            self.compiled[copies] = compiled, self.kept
            # What it settled on: bf16 where the processor multiplies that fast, else integers.
            precision = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
            group = compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE")
            self.kernel = f"MatMul, {precision}"
            self.activations = precision if precision == "bf16" else f"int8 per {group}"
        request = self.compiled[copies][0].create_infer_request()
        request.set_input_tensor(openvino.Tensor(x.numpy(), shared_memory=True))

        def run() -> None:
            request.start_async()
            request.wait()

        return run, lambda: torch.from_numpy(request.get_output_tensor(0).data.copy())

    def check(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        return {"activations": self.activations}


# -------------------------------------------------------------------------------- the process

LAYERS: dict[str, type[Layer]] = {
    "posttrain": Posttrain,
    "llama.cpp": LlamaCpp,
    "torch": Torch,
    "onnxruntime": OnnxRuntime,
    "openvino": OpenVino,
}


@dataclass
class Turn:
    """A planned run: `copies` products a run, `times` runs a timing, and what the result is worth."""

    kept: tuple[Any, ...]  # what libraries only point to
    run: Callable[[], Any]
    copies: int
    times: int
    facts: dict[str, Any]


class Desk:
    """The layers of one library and the products that were planned with them."""

    def __init__(self, library: str) -> None:
        self.kind = LAYERS[library]
        self.layers: dict[str, Layer] = {}
        self.turns: dict[tuple[str, int, bool], Turn] = {}
        self._weight = torch.empty(0, 0)

    def load(self, name: str, rows: int, cols: int, bytes: int, options: Any) -> dict[str, Any]:
        if self._weight.shape != (rows, cols):
            self._weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows))
        layer = self.layers[name] = self.kind(self._weight, bytes, **options)
        return {"bytes": layer.nbytes, "copies": layer.copies}

    def time(self, name: str, tokens: int, cached: bool = False) -> dict[str, Any]:
        key = name, tokens, cached
        if key not in self.turns:
            self.turns[key] = self._planned(self.layers[name], tokens, cached)
        turn = self.turns[key]
        turn.run()  # others were here before: threads, weights, page tables come back first
        each = []
        for _ in range(turn.times):
            begun = time.perf_counter()
            turn.run()
            each.append(time.perf_counter() - begun)
        return {"seconds": statistics.median(each) / turn.copies, **turn.facts}

    def _planned(self, layer: Layer, tokens: int, cached: bool) -> Turn:
        x = torch.randn(tokens, layer.cols, generator=torch.Generator().manual_seed(tokens))
        copies = layer.copies if tokens == 1 else 1
        if cached:
            layer, copies = layer.repeated(CACHED), CACHED
        run, output = layer.plan(x, copies)
        run()
        begun = time.perf_counter()
        run()
        times = math.ceil(LEAST_SECONDS / (time.perf_counter() - begun))
        times = max(times, 1 if tokens == 1 else LEAST_PROMPTS)
        first, y = x[:CHECKED], output()[:CHECKED]
        want = layer.target(first) @ self._weight.T
        error = float((y - want).norm() / want.norm())
        facts = {"kernel": layer.kernel, "relative_error": error, **layer.check(first, y)}
        return Turn((x, output), run, copies, times, facts)

    def unload(self) -> dict[str, Any]:
        self.turns.clear()
        for layer in self.layers.values():
            layer.close()
        self.layers.clear()
        gc.collect()
        return {}


def main(library: str, threads: str) -> None:
    out = sys.stdout
    sys.stdout = sys.stderr  # libraries print; the answers must stay readable
    torch.set_num_threads(int(threads))
    if library == "posttrain":
        from posttrain import kernels

        kernels.set_threads(int(threads))
    desk = Desk(library)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = getattr(desk, asked.pop("do"))(**asked)
        except Unsupported as error:
            answer = {"unsupported": str(error)}
        except Exception as error:  # noqa: BLE001 - another library's own: the row says so
            answer = {"unsupported": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
