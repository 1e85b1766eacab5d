"""The KV cache as an operand: which number formats keys and values can be kept in, and what they cost.

A format applies to rows: the head_dim values of one token and one head, of the key after its rotary
embedding and of the value as it is. It is rounded once, when the token is first seen, with scales
fitted to the row itself, and attention sees the rounded rows of every token, its own included.

    kv: "int8 | fp16/row"

is one scale for each token and head. A format without scales that is wide (fp32, fp16, bf16) means
a cache that is not quantized.
"""

from collections.abc import Mapping
from typing import Any

from posttrain.errors import UserError
from posttrain.numbers import Spec

# Short names, which would be no useful cache as Specs.
NAMES = {
    "int8": "int8 | fp16/row", "fp8": "e4m3 | fp16/row", "int4": "int4 | fp16/row",
    "int16": "int16 | fp32/row",
}  # fmt: skip
EXAMPLES = 'int8, fp8, int4, int16, fp16, fp32 or a number format such as "int4 | fp16/g32"'
# Layers of these kinds keep keys and values; others (linear attention, convolutions) a state.
_ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")


def parse_kv(text: str | Spec, where: str = "kv") -> Spec:
    """The format that `text` names. Raises UserError, beginning with `where`, for what is no format
    or cannot keep rows one by one."""
    if not isinstance(text, (str, Spec)):
        raise UserError(f"{where}: expected {EXAMPLES}; found {text!r}")
    try:
        found = Spec.parse(NAMES.get(text, text) if isinstance(text, str) else text)
    except UserError as error:
        raise UserError(f"{where}: {error}\nchoose {EXAMPLES}") from None
    reason = _unsuitable(found)
    if reason is not None:
        raise UserError(f"{where}: {found} {reason}; choose {EXAMPLES}")
    return found


def _unsuitable(kv: Spec) -> str | None:
    if kv.rounding == "sr":
        return "rounds by chance, so no two runs would agree"
    if not kv.by_rows:
        return "has scales over several tokens or heads, but a cache gets them one by one"
    if not kv.factors and kv.grid.kind not in ("wide", "float"):
        return "has no scale, and keys and values are of any magnitude"
    return None


def stored_kv(config: Any) -> Spec | None:
    """The format that a model's config asks for in a `quantization_config` of ours, or None."""
    how = getattr(config, "quantization_config", None) or {}
    fields = how if isinstance(how, Mapping) else vars(how)
    text = fields.get("kv") if fields.get("quant_method") == "posttrain" else None
    return None if text is None else parse_kv(text, "config.json: quantization_config: kv")


def describe_kv(kv: Spec, config: Any) -> dict[str, Any]:
    """`kv` (the format), `kv_bits_per_value` (scales included) and `kv_bytes_per_token` (of the keys
    and values of all layers, for each token of context); the last two are None where the config
    does not say what its cache holds."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = getattr(text, "num_attention_heads", None)
    unusual = ("kv_lora_rank", "num_kv_shared_layers")  # fewer or other vectors than heads have
    if not heads or any(getattr(text, name, None) for name in unusual):
        return {"kv": str(kv), "kv_bits_per_value": None, "kv_bytes_per_token": None}
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    kinds = getattr(text, "layer_types", None)
    layers = sum(kind in _ATTENTION for kind in kinds) if kinds else text.num_hidden_layers
    rows = 2 * layers * (getattr(text, "num_key_value_heads", None) or heads)
    return {
        "kv": str(kv),
        "kv_bits_per_value": kv.bits_per_element((1, size)),
        "kv_bytes_per_token": rows * kv.stored_bits((1, size)) / 8,
    }
