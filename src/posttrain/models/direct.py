"""A native decoder directly from the files of a checkpoint, for programs that only generate.

Importing transformers' modelling code and building a tree of modules take longer than all else
until the first token of a small model. Neither is needed where every field of config.json is known
here and every tensor has its place. For anything else, and for anything that is wrong,
`open_direct` gives None: `models.load` then loads the model or says what is wrong with it.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import pi
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from posttrain import kernels
from posttrain.errors import UserError
from posttrain.kernels import Decoder, InputFormat, PackedLinear
from posttrain.kernels.packed import PackedWeight
from posttrain.models import compressed_reader, compressed_tensors, native, storage
from posttrain.models.base import DEMO, DTYPES, PICO
from posttrain.models.decoding import (
    ACTIVATIONS,
    FIELDS,
    LINEARS,
    REQUIRED,
    assemble,
    head_size,
    norms,
)
from posttrain.models.directory import MARKER, read_config_file, read_stored, read_tokenizer
from posttrain.models.linear import pack_linear
from posttrain.models.plan import LayerPlan
from posttrain.models.shards import OpenFiles, StoredTensor
from posttrain.models.tokenizer import PlainTokenizer

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"

ROPES = ("rope_parameters", "rope_scaling", "rope_theta")
# Where null is a value of its own; elsewhere it stands for a rule that transformers has.
NULLABLE = {
    "attn_logit_softcapping", "eos_token_id", "final_logit_softcapping", "sliding_window",
}  # fmt: skip
# Fields that change nothing of what is computed here.
INERT = {
    "_name_or_path", "_sliding_window_pattern", "architectures", "attention_dropout",
    "bos_token_id", "dtype", "initializer_range", "is_llama_config", "max_position_embeddings",
    "max_window_layers", "model_type", "no_rope_layer_interval", "pad_token_id", "pretraining_tp",
    "quantization_config", "torch_dtype", "transformers.js_config", "transformers_version",
    "use_cache",
}  # fmt: skip
# Keys of a rotary scaling besides its type and base.
ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    },
}  # fmt: skip


class Unfamiliar(Exception):
    """The checkpoint has something that is not known here for certain."""


@dataclass(eq=False)
class DirectModel:
    """A model that only generates; `config` and `generation_config` name its ends of text."""

    decoder: Decoder
    tokenizer: Any
    config: Any
    generation_config: Any


def open_direct(model: str | Path) -> DirectModel | None:
    """The model in a directory, if all there is to it is known here; else None."""
    path = Path(os.path.expanduser(model))
    if not kernels.available() or not path.is_dir() or (path / MARKER).exists():
        return None
    if str(model) in (DEMO, PICO):  # whatever lies here under that name
        return None
    try:
        return _open(path)
    except (Unfamiliar, compressed_tensors.NotExpressible, UserError):
        return None
    except (OSError, LookupError, TypeError, ValueError, ArithmeticError):  # fields of odd values
        return None


def _open(path: Path) -> DirectModel:
    raw = read_config_file(path)
    config = read_fields(raw)
    config.quantization_config = raw.get("quantization_config")  # for the format of the KV cache
    config.max_position_embeddings = raw.get("max_position_embeddings")
    decoder = read_decoder(path, raw, config)
    ends = path / "generation_config.json"
    generation = json.loads(ends.read_text(encoding="utf-8")) if ends.is_file() else {}
    eos = SimpleNamespace(eos_token_id=generation.get("eos_token_id"))
    tokenizer = PlainTokenizer.read(path, raw["model_type"]) or read_tokenizer(path)
    return DirectModel(decoder, tokenizer, config, eos)


def read_decoder(path: Path, raw: Mapping[str, Any], config: Any) -> Decoder:
    """The decoder of a directory whose config.json is `raw`, `config` its fields."""
    weights = _Stored(path, raw, config)
    decoder = assemble(config, weights, Angles(raw, config), rotary=head_size(config))
    weights.check_complete()
    return decoder


# ------------------------------------------------------------------------------ the config


def read_fields(raw: Mapping[str, Any]) -> SimpleNamespace:
    """The fields that `decoding.assemble` needs. Raises Unfamiliar for any that is not known."""
    model_type = raw["model_type"]
    fields = FIELDS.get(model_type, {})
    unknown = set(raw) - set(fields) - INERT - set(ROPES)
    found = {name: raw.get(name, default) for name, default in fields.items()}
    missing = [
        name
        for name, value in found.items()
        if value is REQUIRED
        or (value is None and fields[name] is REQUIRED and name not in NULLABLE)
    ]
    if not fields or unknown or missing:
        raise Unfamiliar(f"{model_type}: {sorted(unknown)}, without {missing}")
    _check_fields(SimpleNamespace(**found))
    if not all(name.endswith("ForCausalLM") for name in raw.get("architectures") or ()):
        raise Unfamiliar("it may not predict the next token")
    if model_type == "gemma" and found["hidden_act"] == "gelu":
        raise Unfamiliar("transformers takes this name for another activation")
    if model_type in ("qwen2", "qwen3") and not found["use_sliding_window"]:
        found["sliding_window"] = None
    return SimpleNamespace(model_type=model_type, **found)


def _check_fields(config: Any) -> None:
    """Unfamiliar for values that transformers would refuse or that mean something else."""
    sizes = (
        config.hidden_size, config.intermediate_size, config.num_hidden_layers,
        config.num_attention_heads, config.num_key_value_heads, config.vocab_size,
        head_size(config),
    )  # fmt: skip
    kinds = getattr(config, "layer_types", None)
    rotated = getattr(config, "no_rope_layers", None)
    familiar = (
        all(type(size) is int and size > 0 for size in sizes)
        and type(config.rms_norm_eps) is float
        and config.hidden_size % config.num_attention_heads == 0
        and config.num_attention_heads % config.num_key_value_heads == 0
        and getattr(config, "hidden_act", None) in (None, *ACTIVATIONS)
        and getattr(config, "hidden_activation", None) in (None, *ACTIVATIONS)
        and not getattr(config, "use_bidirectional_attention", None)
        # Which layers have windows is otherwise decided by further fields.
        and (kinds is not None or not getattr(config, "use_sliding_window", False))
        and set(kinds or ()) <= {"full_attention", "sliding_attention"}
        and (
            getattr(config, "use_sliding_window", True) or "sliding_attention" not in (kinds or ())
        )
        and all(len(per) == config.num_hidden_layers for per in (kinds, rotated) if per is not None)
    )
    if not familiar:
        raise Unfamiliar("a field has an unusual value")


def parameter_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Every parameter of the unquantized model; a tied head is absent."""
    width, size = config.hidden_size, head_size(config)
    q, kv = config.num_attention_heads * size, config.num_key_value_heads * size
    inner = config.intermediate_size
    shapes = {
        "q": (q, width), "k": (kv, width), "v": (kv, width), "o": (width, q),
        "gate": (inner, width), "up": (inner, width), "down": (width, inner),
    }  # fmt: skip
    biased = set("qkv") if config.model_type == "qwen2" else set()
    biased |= set("qkvo") if getattr(config, "attention_bias", False) else set()
    biased |= {"gate", "up", "down"} if getattr(config, "mlp_bias", False) else set()
    block: dict[str, tuple[int, ...]] = {f"{LINEARS[x]}.weight": s for x, s in shapes.items()}
    block |= {f"{LINEARS[part]}.bias": shapes[part][:1] for part in biased}
    for part, name in norms(config.model_type).items():
        block[f"{name}.weight"] = (size if part in ("q_norm", "k_norm") else width,)
    found: dict[str, tuple[int, ...]] = {
        f"model.layers.{index}.{name}": shape
        for index in range(config.num_hidden_layers)
        for name, shape in block.items()
    }
    found[f"{EMBEDDING}.weight"] = (config.vocab_size, width)
    found["model.norm.weight"] = (width,)
    if not config.tie_word_embeddings:
        found[f"{HEAD}.weight"] = (config.vocab_size, width)
    return found


# ------------------------------------------------------------------------------ rotary angles


class Angles:
    """Cosines and sines as transformers' rotary modules compute them, to the bit."""

    def __init__(self, raw: Mapping[str, Any], config: Any) -> None:
        size = head_size(config)
        parameters = raw.get("rope_parameters")
        if config.model_type == "gemma3_text":
            if raw.keys() & {"rope_scaling", "rope_theta"}:
                raise Unfamiliar("rotary fields of an early version")
            kinds = ("full_attention", "sliding_attention")
            self._frequencies = [_frequencies(parameters[kind], size) for kind in kinds]  # type: ignore[index]
            return
        scaling = raw.get("rope_scaling")
        if parameters and scaling:
            raise Unfamiliar("two rotary scalings")
        base = {"rope_theta": raw["rope_theta"]} if "rope_theta" in raw else {}
        self._frequencies = [_frequencies(base | (parameters or scaling or {}), size)]

    def __call__(self, rope: int, start: int, stop: int) -> Tensor:
        positions = torch.arange(start, stop)[:, None].float()
        angles = positions * self._frequencies[rope]
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _frequencies(rope: Mapping[str, Any], size: int) -> Tensor:
    """[size / 2]: radians per position."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    more = rope.keys() - {"rope_type", "type", "rope_theta"}
    if kind not in ROPE_KEYS or more != ROPE_KEYS[kind]:
        raise Unfamiliar(f"a rotary scaling {dict(rope)}")
    exponents = torch.arange(0, size, 2, dtype=torch.int64).to(torch.float32) / size
    plain: Tensor = 1.0 / (rope["rope_theta"] ** exponents)
    if kind == "linear":
        plain = plain / rope["factor"]
    return _llama3(plain, rope) if kind == "llama3" else plain


def _llama3(plain: Tensor, rope: Mapping[str, Any]) -> Tensor:
    """Long waves are stretched by `factor`, short ones kept, those between interpolated."""
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    context = rope["original_max_position_embeddings"]
    waves = 2 * pi / plain
    stretched = torch.where(waves > context / low, plain / factor, plain)
    smooth = (context / waves - low) / (high - low)
    between = (1 - smooth) * stretched / factor + smooth * stretched
    medium = ~(waves < context / high) * ~(waves > context / low)
    result: Tensor = torch.where(medium, between, stretched)
    return result


# ------------------------------------------------------------------------------ weights


class _Stored:
    """Weights as a checkpoint stores them; what is quantized goes from the file into its packed
    form and nothing else of it stays. Several threads may ask, each module once."""

    def __init__(self, path: Path, raw: Mapping[str, Any], config: Any) -> None:
        self._path, self._config = path, config
        self.dtype = DTYPES[str(raw.get("dtype") or raw.get("torch_dtype")).removeprefix("torch.")]
        self._shapes = parameter_shapes(config)
        self._modules: dict[str, dict[str, StoredTensor]] = {}  # what was not asked for yet
        for name, stored in read_stored(path).items():
            module, _, leaf = name.rpartition(".")
            self._modules.setdefault(module, {})[leaf] = stored
        self._layers: dict[str, LayerPlan] = {}
        self._tied: dict[str, str] = {}
        self._reader: compressed_reader.Reader | None = None
        self._shared: PackedWeight | None = None  # a tied head is one weight with the embedding
        if raw.get("quantization_config") is not None:
            self._read_quantization(raw["quantization_config"], f"{path}/config.json")

    def _read_quantization(self, how: Mapping[str, Any], where: str) -> None:
        if how.get("quant_method") == native.METHOD:
            self._layers = native.read_config(how, where)
            self._tied = native.read_tied(how, self._layers, where)
            if any(layer.branches for layer in self._layers.values()):
                raise Unfamiliar("branches beside quantized layers")
            if self._tied not in ({}, {EMBEDDING: HEAD}):
                raise Unfamiliar(f"ties: {self._tied}")
        elif how.get("quant_method") == compressed_tensors.METHOD:
            self._reader = compressed_reader.Reader(how, where)
            self._reader.check_names(f"{name}." for name in self._modules)
        else:
            raise Unfamiliar("the format of another tool")

    def linear(self, name: str) -> PackedLinear:
        layer = self._layers.pop(name, None)
        if name == HEAD and layer is None and self._config.tie_word_embeddings:
            return PackedLinear(self.embedding(EMBEDDING), InputFormat.of(None))
        tensors = self._take(name)
        rows, cols = self._shapes[f"{EMBEDDING if name == HEAD else name}.weight"]
        biased = f"{name}.bias" in self._shapes
        bias = self._cast(tensors.pop("bias"), (rows,)) if biased else None
        group = None
        if self._reader is not None:
            group = self._reader.group_of(name, nn.Linear(cols, rows, device="meta"))
        if group is not None:
            layer, stored = compressed_reader.read_module(
                name, tensors, group, (rows, cols), self.dtype
            )
            tensors |= stored
        if layer is None:
            weight = self._cast(tensors.pop("weight"), (rows, cols))
            made = PackedLinear(PackedWeight.in_place(weight, bias), InputFormat.of(None))
        else:
            made = _packed(name, tensors, layer, (rows, cols), bias)
        if tensors:
            raise Unfamiliar(f"{name}: {', '.join(tensors)}")
        if name == HEAD and self._tied:
            self._shared = made.weight
        return made

    def embedding(self, name: str) -> PackedWeight:
        if self._shared is None:
            self._shared = PackedWeight.in_place(self._plain(name))
        return self._shared

    def gain(self, name: str) -> Tensor:
        return self._plain(name).to(torch.float32)

    def check_complete(self) -> None:
        """Unfamiliar unless everything stored was used."""
        if self._modules or self._layers:
            raise Unfamiliar(f"{', '.join({**self._modules, **self._layers})} left over")

    def _take(self, name: str) -> dict[str, Tensor]:
        """All tensors of a module, by the last part of their names."""
        with OpenFiles() as files:
            return {leaf: stored.read(files) for leaf, stored in self._modules.pop(name).items()}

    def _plain(self, name: str) -> Tensor:
        """The weight of a module that has nothing else."""
        tensors = self._take(name)
        weight = self._cast(tensors.pop("weight"), self._shapes[f"{name}.weight"])
        if tensors:
            raise Unfamiliar(f"{name}: {', '.join(tensors)}")
        return weight

    def _cast(self, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        """In the dtype of the model, through which transformers takes every value."""
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise Unfamiliar(f"a tensor {list(tensor.shape)} of {tensor.dtype}")
        return tensor.to(self.dtype)


def _packed(
    name: str, tensors: dict[str, Tensor], layer: LayerPlan, shape: tuple[int, int], bias: Any
) -> PackedLinear:
    """A quantized layer; what it is made of is taken out of `tensors`."""
    assert layer.weight is not None
    storage.check_tensors(name, "weight", tensors, layer.weight, shape)
    parts = {leaf: tensors.pop(leaf) for leaf in storage.layout("weight", layer.weight, shape)}
    return pack_linear(storage.unpack_qtensor("weight", parts, layer.weight, shape), layer, bias)
