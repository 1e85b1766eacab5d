"""A model as a native decoder: which architectures, and how each puts its parts together.

`assemble` builds the decoder of an architecture in MODEL_TYPES from its config and its weights by
name. Both can come from a loaded model (`decoder`) or from the files of a checkpoint (`direct`).
Weights are not copied: quantized layers lend their codes, all others are multiplied where they lie.
"""

from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from itertools import product
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from posttrain import kernels
from posttrain.errors import UserError
from posttrain.kernels import BlockWeights, Decoder, Dimensions, InputFormat, PackedLinear
from posttrain.kernels.decoder import Angles
from posttrain.kernels.packed import PackedWeight
from posttrain.models.linear import QuantLinear, TiedEmbedding
from posttrain.models.memory import trim
from posttrain.numbers import Spec

# Blocks of a residual stream with RMS norms, rotary embeddings in halves, grouped queries and a
# gated feed-forward layer, under the module names of Llama.
MODEL_TYPES = (
    "llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "gemma", "gemma2", "gemma3_text",
)  # fmt: skip
# Norms of these multiply by 1 + weight, and they scale embeddings by the square root of the width.
GEMMAS = ("gemma", "gemma2", "gemma3_text")
HEAD_NORMS = ("qwen3", "gemma3_text")  # each head's queries and keys are normed
FOUR_NORMS = ("gemma2", "gemma3_text")  # what attention and the feed-forward layer give is normed
# By the name in the config.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}
# Field of `BlockWeights` -> module.
LINEARS = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
    "o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip
# Formats of the KV cache that the decoder keeps (see `kv`) -> its names for them.
CACHES = {
    "fp32": "fp32", "fp16": "fp16", "bf16": "bf16", "int8 | fp16/row": "int8",
    "e4m3 | fp16/row": "e4m3", "int4 | fp16/row": "int4", "int16 | fp32/row": "int16",
}  # fmt: skip
# Layers that take the same input, and so in the same format.
SHARED_INPUTS = (("q", "k", "v"), ("gate", "up"))
# Scalings whose angles depend on how long the sequence is.
CHANGING_ROPES = ("dynamic", "longrope")

# Fields of config.json that say how a model computes, by architecture -> what transformers takes where
# one is absent; REQUIRED ones are always written or have no one default. An architecture reads its own
# only, whatever else a config says.
REQUIRED = object()
_ALL = {
    "hidden_size": REQUIRED, "intermediate_size": REQUIRED, "num_hidden_layers": REQUIRED,
    "num_attention_heads": REQUIRED, "num_key_value_heads": REQUIRED, "vocab_size": REQUIRED,
    "rms_norm_eps": REQUIRED, "eos_token_id": REQUIRED, "tie_word_embeddings": False,
}  # fmt: skip
_LLAMA = _ALL | {"hidden_act": REQUIRED, "head_dim": None, "attention_bias": False}
_WINDOWS = {"use_sliding_window": False, "sliding_window": REQUIRED, "layer_types": None}
_GEMMA = _LLAMA | {
    "head_dim": REQUIRED, "use_bidirectional_attention": None, "tie_word_embeddings": True,
}  # fmt: skip
_GEMMA2 = {name: value for name, value in _GEMMA.items() if name != "hidden_act"} | {
    "hidden_activation": REQUIRED, "query_pre_attn_scalar": REQUIRED, "sliding_window": REQUIRED,
    "attn_logit_softcapping": REQUIRED, "final_logit_softcapping": REQUIRED,
    "layer_types": REQUIRED,
}  # fmt: skip
FIELDS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA | {"mlp_bias": False},
    "mistral": _ALL | {"hidden_act": REQUIRED, "head_dim": None, "sliding_window": REQUIRED},
    "qwen2": _ALL | {"hidden_act": REQUIRED, "head_dim": None} | _WINDOWS,
    "qwen3": _LLAMA | {"head_dim": REQUIRED} | _WINDOWS,
    "smollm3": _LLAMA
    | _WINDOWS
    | {"mlp_bias": False, "no_rope_layers": REQUIRED, "tie_word_embeddings": True},
    "granite": _LLAMA
    | {
        "mlp_bias": False, "embedding_multiplier": REQUIRED, "residual_multiplier": REQUIRED,
        "logits_scaling": REQUIRED, "attention_multiplier": REQUIRED,
    },
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
}  # fmt: skip


class Weights(Protocol):
    """The weights of one model, by the names of their modules."""

    dtype: torch.dtype  # of those that are not quantized

    def linear(self, name: str) -> PackedLinear: ...

    def embedding(self, name: str) -> PackedWeight: ...

    def gain(self, name: str) -> Tensor:
        """The weight of a norm in float32, as stored."""
        ...


def assemble(
    config: Any, weights: Weights, angles: Angles, *, rotary: int, changing: bool = False
) -> Decoder:
    """The native decoder of one of MODEL_TYPES. Blocks are packed side by side.

    config: FIELDS of its architecture and model_type, as attributes. angles, rotary, changing: see `Decoder`.
    """
    gemma = config.model_type in GEMMAS

    def gain(name: str) -> Tensor:
        return weights.gain(name) + 1 if gemma else weights.gain(name)

    def block(index: int) -> BlockWeights:
        at = f"model.layers.{index}."
        linears = {part: weights.linear(at + name) for part, name in LINEARS.items()}
        gains = {part: gain(at + name) for part, name in norms(config.model_type).items()}
        place = {"window": _window(config, index), "rope": _rope(config, index)}
        return BlockWeights(**linears, **gains, **place)  # type: ignore[arg-type]

    with ThreadPoolExecutor(kernels.threads()) as pool:
        largest = pool.submit(weights.linear, "lm_head")
        blocks = list(pool.map(block, range(config.num_hidden_layers)))
        head = largest.result()
    embedding, norm = weights.embedding("model.embed_tokens"), gain("model.norm")
    trim()  # codes as they were stored are gone
    dimensions = _dimensions(config, rotary, weights.dtype)
    return Decoder(dimensions, blocks, embedding, head, norm, angles, changing)


def norms(model_type: str) -> dict[str, str]:
    """Field of `BlockWeights` -> module, for the norms of a block."""
    found = {"attention_norm": "input_layernorm"}
    if model_type in FOUR_NORMS:
        found["attention_out_norm"] = "post_attention_layernorm"
        found["mlp_norm"] = "pre_feedforward_layernorm"
        found["mlp_out_norm"] = "post_feedforward_layernorm"
    else:
        found["mlp_norm"] = "post_attention_layernorm"
    if model_type in HEAD_NORMS:
        found |= {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
    return found


def head_size(config: Any) -> int:
    """Channels of an attention head."""
    size = getattr(config, "head_dim", None)
    return int(size or config.hidden_size // config.num_attention_heads)


def _dimensions(config: Any, rotary: int, dtype: torch.dtype) -> Dimensions:
    width, size = config.hidden_size, head_size(config)
    scale = getattr(config, "query_pre_attn_scalar", size) ** -0.5
    root = float(torch.tensor(width**0.5).to(dtype))  # Gemma was trained with the rounded one
    capped = config.model_type == "gemma2"  # a gemma3 has the field and leaves it unread
    return Dimensions(
        width=width,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_size=size,
        rotary=rotary,
        vocabulary=config.vocab_size,
        activation=ACTIVATIONS[_activation(config)],
        eps=float(config.rms_norm_eps),
        attention_scale=float(getattr(config, "attention_multiplier", scale)),
        embedding_scale=root
        if config.model_type in GEMMAS
        else float(getattr(config, "embedding_multiplier", 1)),
        residual_scale=float(getattr(config, "residual_multiplier", 1)),
        logit_scale=1 / float(getattr(config, "logits_scaling", 1)),
        attention_cap=float((config.attn_logit_softcapping if capped else None) or 0),
        logit_cap=float(getattr(config, "final_logit_softcapping", None) or 0),
    )


def _activation(config: Any) -> str:
    gemma = config.model_type in FOUR_NORMS
    return str(config.hidden_activation if gemma else config.hidden_act)


def _layer_type(config: Any, index: int) -> str | None:
    kinds = getattr(config, "layer_types", None)
    return kinds[index] if kinds else None


def _window(config: Any, index: int) -> int:
    sliding = _layer_type(config, index) == "sliding_attention" or config.model_type == "mistral"
    return (config.sliding_window or 0) if sliding else 0


def _rope(config: Any, index: int) -> int:
    """Which angles a block uses: 1 are those of sliding windows where they are their own."""
    rotated = getattr(config, "no_rope_layers", None)
    if rotated and not rotated[index]:
        return -1
    sliding = _layer_type(config, index) == "sliding_attention"
    return 1 if sliding and config.model_type == "gemma3_text" else 0


# ------------------------------------------------------------------------------ a loaded model


def no_decoder(model: Any) -> str | None:
    """Why this model cannot run on the native decoder, or None where it can. Changes nothing."""
    found = kernels.find()
    if found.library is None:
        return found.reason
    model_type = getattr(model.config, "model_type", None)
    if model_type not in MODEL_TYPES:
        return f"{model_type} is not among {', '.join(MODEL_TYPES)}"
    if not hasattr(model, "lm_head"):
        return "it does not predict the next token"
    config = _own_fields(model.config)
    ahead = getattr(config, "use_bidirectional_attention", None)
    if ahead or not getattr(model.config, "is_causal", True):
        return "its attention looks ahead"
    activation = _activation(config)
    if activation not in ACTIVATIONS:
        return f"its activation is {activation}"
    for name, module in model.named_modules():
        reason = _unfit(module, type(model).__module__, activation)
        if reason is not None:
            return f"{name or type(model).__name__}: {reason}"
    for index, layers in product(range(config.num_hidden_layers), SHARED_INPUTS):
        names = [f"model.layers.{index}.{LINEARS[part]}" for part in layers]
        if len({_input(model.get_submodule(name)) for name in names}) > 1:
            return f"{', '.join(names)} share their input and quantize it in different ways"
    return None


def _own_fields(config: Any) -> SimpleNamespace:
    """What `assemble` wants of the config of a loaded model."""
    found = {
        name: getattr(config, name, None if default is REQUIRED else default)
        for name, default in FIELDS[config.model_type].items()
    }
    return SimpleNamespace(model_type=config.model_type, **found)


def _input(layer: nn.Module) -> tuple[str, bool]:
    """How a linear layer wants its input: the format and whether it is rotated."""
    if isinstance(layer, QuantLinear):
        return str(layer.layer.input), bool(layer.layer.rotate)
    return str(None), False


def _unfit(module: nn.Module, architecture: str, activation: str) -> str | None:
    """Why a module would not be computed as it computes itself; `architecture` is where the
    classes of this architecture are defined."""
    from transformers.activations import ACT2FN

    home = type(module).__module__
    known = home == architecture and home.startswith("transformers.models.")
    known |= home.startswith(("torch.nn.modules.", "transformers.activations"))
    if not known and type(module) not in (QuantLinear, TiedEmbedding):
        return f"a {home}.{type(module).__name__} is not a part of this architecture"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has forward hooks"
    if "forward" in module.__dict__:
        return "its forward was replaced"
    tensors = [*module._parameters.values(), *module._buffers.values()]
    if any(tensor is not None and not tensor.is_cpu for tensor in tensors):
        return "it is not in main memory"
    if getattr(module, "is_causal", True) is False:
        return "its attention looks ahead"
    if isinstance(module, QuantLinear):
        if module.branches:
            return "it has branches"
        if module.no_kernel is not None:
            return module.no_kernel
        if InputFormat.of(module.layer.input).spec is not None:
            return f"activations of {module.layer.input}"
    elif isinstance(module, (nn.Linear, nn.Embedding)):
        if not PackedWeight.fits_in_place(module.weight):
            return f"its weight is {module.weight.dtype} or not contiguous"
    elif hasattr(module, "act_fn") and type(module.act_fn) is not type(ACT2FN[activation]):
        return f"its activation is {type(module.act_fn).__name__}"
    return None


def no_cache(kv: Spec | None) -> str | None:
    """Why a decoder cannot keep keys and values in this format, or None where it can."""
    if kv is None or str(kv) in CACHES:
        return None
    return f"no kernel keeps a KV cache in {kv} (there are {', '.join(CACHES)})"


def decoder(model: Any) -> Decoder:
    """The native decoder of a loaded model. Raises UserError where `no_decoder` has a reason."""
    reason = no_decoder(model)
    if reason is not None:
        raise UserError(f"no native decoder for this model: {reason}")
    config = _own_fields(model.config)
    used = {_rope(config, index) for index in range(config.num_hidden_layers)}
    angles = _Angles(model.model.rotary_emb, used)
    return assemble(config, _Modules(model), angles, rotary=angles.rotary, changing=angles.changing)


class _Modules:
    """Weights as the modules of a loaded model hold them."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.dtype: torch.dtype = model.dtype
        self._plain: dict[int, PackedWeight] = {}  # by address: tied weights are one

    def linear(self, name: str) -> PackedLinear:
        layer: Any = self._model.get_submodule(name)
        if isinstance(layer, QuantLinear):
            return layer.kernel()
        if layer.bias is None:
            return PackedLinear(self._in_place(layer.weight), InputFormat.of(None))
        return PackedLinear(PackedWeight.in_place(layer.weight, layer.bias), InputFormat.of(None))

    def embedding(self, name: str) -> PackedWeight:
        table: Any = self._model.get_submodule(name)
        if isinstance(table, TiedEmbedding):
            return table.head.kernel().weight
        return self._in_place(table.weight)

    def gain(self, name: str) -> Tensor:
        weight: Tensor = self._model.get_submodule(name).weight
        return weight.detach().to(torch.float32)

    def _in_place(self, weight: Tensor) -> PackedWeight:
        return self._plain.setdefault(weight.data_ptr(), PackedWeight.in_place(weight))


class _Angles:
    """Cosines and sines as the architecture's own rotary module makes them."""

    def __init__(self, rotary: Any, used: set[int]) -> None:
        self._rotary = deepcopy(rotary)  # dynamic scalings change the module
        named = rotary.rope_type
        self._by_kind = isinstance(named, dict)
        types = set(named.values()) if self._by_kind else {named}
        self.changing = bool(types & set(CHANGING_ROPES))
        self.rotary = self(max(used, default=0), 0, 1).shape[1]

    def __call__(self, rope: int, start: int, stop: int) -> Tensor:
        positions = torch.arange(start, stop)[None]
        kind = ("full_attention", "sliding_attention")[rope]
        options = {"layer_type": kind} if self._by_kind else {}
        if self.changing:  # what a longer sequence left is forgotten at a short one
            self._rotary(torch.zeros(1), torch.zeros(1, 1, dtype=torch.int64), **options)
        cos, sin = self._rotary(torch.zeros(1), positions, **options)
        half = cos.shape[-1] // 2
        return torch.cat([cos[0, :, :half], sin[0, :, :half]], dim=-1)
