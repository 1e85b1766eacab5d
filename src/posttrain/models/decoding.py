"""A loaded model as a native decoder: which architectures, and where their parts are.

`decoder(model)` reads everything from the model's own modules, so it needs no table of sizes; what
it must know is how an architecture puts them together, and that is only so for MODEL_TYPES.
Weights are not copied: quantized layers lend their codes, all others are multiplied where they lie.
"""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from posttrain import kernels
from posttrain.errors import UserError
from posttrain.kernels import BlockWeights, Decoder, Dimensions, InputFormat, PackedLinear
from posttrain.kernels.packed import PackedWeight
from posttrain.models.linear import QuantLinear, TiedEmbedding
from posttrain.models.memory import trim
from posttrain.models.walk import decoder_blocks

# Blocks of a residual stream with RMS norms, rotary embeddings in halves, grouped queries and a
# gated feed-forward layer, under these module names.
MODEL_TYPES = (
    "llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "gemma", "gemma2", "gemma3_text",
)  # fmt: skip
# Norms of these multiply by 1 + weight, and they scale embeddings by the square root of the width.
GEMMAS = ("gemma", "gemma2", "gemma3_text")
ACTIVATIONS = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "GELUActivation": "gelu",
    "ReLU": "relu",
}
# Scalings whose angles depend on how long the sequence is.
CHANGING_ROPES = ("dynamic", "longrope")


def no_decoder(model: Any) -> str | None:
    """Why this model cannot run on the native decoder, or None where it can. Changes nothing."""
    found = kernels.find()
    if found.library is None:
        return found.reason
    model_type = getattr(model.config, "model_type", None)
    if model_type not in MODEL_TYPES:
        return f"{model_type} is not among {', '.join(MODEL_TYPES)}"
    if getattr(model.config, "use_bidirectional_attention", None):
        return "its attention looks ahead"
    for name, module in model.named_modules():
        reason = _unfit(module, type(model).__module__)
        if reason is not None:
            return f"{name or type(model).__name__}: {reason}"
    return None


def _unfit(module: nn.Module, architecture: str) -> str | None:
    """Why a module would not be computed as it computes itself; `architecture` is where the
    classes of this architecture are defined."""
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
    if isinstance(module, QuantLinear):
        if module.branches:
            return "it has branches"
        if module.no_kernel is not None:
            return module.no_kernel
        if InputFormat.of(module.layer.input).spec is not None:
            return f"activations of {module.layer.input}"
    elif hasattr(module, "act_fn") and type(module.act_fn).__name__ not in ACTIVATIONS:
        return f"its activation is {type(module.act_fn).__name__}"
    return None


def decoder(model: Any) -> Decoder:
    """The native decoder of a loaded model. Raises UserError where `no_decoder` has a reason."""
    reason = no_decoder(model)
    if reason is not None:
        raise UserError(f"no native decoder for this model: {reason}")
    base, config = model.model, model.config
    gemma = config.model_type in GEMMAS
    linears: dict[int, PackedWeight] = {}  # by address: tied weights are one
    blocks = [_block(block, config, gemma, linears) for _, block in decoder_blocks(model)]
    angles = _Angles(base.rotary_emb, {block.rope for block in blocks})
    head = _linear(model.lm_head, linears)
    if isinstance(base.embed_tokens, TiedEmbedding):
        embedding = base.embed_tokens.head.kernel().weight
    else:
        table = base.embed_tokens.weight
        embedding = linears.setdefault(table.data_ptr(), PackedWeight.in_place(table))
    trim()  # codes as they were stored are gone
    return Decoder(
        _dimensions(model, angles.rotary, gemma),
        blocks,
        embedding,
        head,
        _gain(base.norm, gemma),
        angles,
        changing=angles.changing,
    )


def _dimensions(model: Any, rotary: int, gemma: bool) -> Dimensions:
    config, block = model.config, decoder_blocks(model)[0][1]
    attention: Any = block.self_attn
    size = attention.head_dim
    width = config.hidden_size
    return Dimensions(
        width=width,
        heads=_rows(attention.q_proj) // size,
        kv_heads=_rows(attention.k_proj) // size,
        head_size=size,
        rotary=rotary,
        vocabulary=_rows(model.lm_head),
        activation=ACTIVATIONS[type(block.mlp.act_fn).__name__],  # type: ignore[union-attr]
        eps=_eps(model.model.norm),
        attention_scale=float(attention.scaling),
        embedding_scale=width**0.5 if gemma else float(getattr(config, "embedding_multiplier", 1)),
        residual_scale=float(getattr(config, "residual_multiplier", 1)),
        logit_scale=1 / float(getattr(config, "logits_scaling", 1)),
        attention_cap=float(getattr(config, "attn_logit_softcapping", None) or 0),
        logit_cap=float(getattr(config, "final_logit_softcapping", None) or 0),
    )


def _block(block: Any, config: Any, gemma: bool, linears: dict[int, PackedWeight]) -> BlockWeights:
    attention, mlp = block.self_attn, block.mlp
    kind = _layer_type(config, attention.layer_idx)
    sliding = kind == "sliding_attention" or (kind is None and config.model_type == "mistral")
    four_norms = hasattr(block, "pre_feedforward_layernorm")
    after_attention = block.post_attention_layernorm

    def gain(owner: Any, name: str) -> Tensor | None:
        return (
            _gain(getattr(owner, name), gemma) if getattr(owner, name, None) is not None else None
        )

    return BlockWeights(
        q=_linear(attention.q_proj, linears),
        k=_linear(attention.k_proj, linears),
        v=_linear(attention.v_proj, linears),
        o=_linear(attention.o_proj, linears),
        gate=_linear(mlp.gate_proj, linears),
        up=_linear(mlp.up_proj, linears),
        down=_linear(mlp.down_proj, linears),
        attention_norm=_gain(block.input_layernorm, gemma),
        attention_out_norm=_gain(after_attention, gemma) if four_norms else None,
        mlp_norm=_gain(block.pre_feedforward_layernorm if four_norms else after_attention, gemma),
        mlp_out_norm=gain(block, "post_feedforward_layernorm"),
        q_norm=gain(attention, "q_norm"),
        k_norm=gain(attention, "k_norm"),
        window=(getattr(config, "sliding_window", None) or 0) if sliding else 0,
        rope=_rope(attention, config, kind),
    )


def _layer_type(config: Any, index: int) -> str | None:
    kinds = getattr(config, "layer_types", None)
    return kinds[index] if kinds else None


def _rope(attention: Any, config: Any, kind: str | None) -> int:
    """Which angles a block uses: 1 are those of sliding windows where they are their own."""
    if not getattr(attention, "use_rope", True):
        return -1
    own = config.model_type == "gemma3_text" and kind == "sliding_attention"
    return 1 if own else 0


def _linear(layer: Any, linears: dict[int, PackedWeight]) -> PackedLinear:
    if isinstance(layer, QuantLinear):
        return layer.kernel()
    address = layer.weight.data_ptr()
    weight = linears.get(address)
    if weight is None or layer.bias is not None:
        weight = linears[address] = PackedWeight.in_place(layer.weight, layer.bias)
    return PackedLinear(weight, InputFormat.of(None))


def _rows(layer: Any) -> int:
    return int(layer.out_features)


def _gain(norm: Any, gemma: bool) -> Tensor:
    gain: Tensor = norm.weight.detach().to(torch.float32)
    return gain + 1 if gemma else gain


def _eps(norm: Any) -> float:
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)


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
        cos, sin = self._rotary(torch.zeros(1), positions, **options)
        half = cos.shape[-1] // 2
        return torch.cat([cos[0, :, :half], sin[0, :, :half]], dim=-1)
