"""The plain reference of a quantized KV cache: a transformers cache whose keys and values went through
`numbers.fake_quantize`."""

from typing import Any

from torch import Tensor
from transformers import DynamicCache

from posttrain.errors import UserError
from posttrain.numbers import Spec, fake_quantize


class RoundedCache(DynamicCache):
    """A `DynamicCache` that rounds keys (after the rotary embedding) and values [batch, kv_heads,
    tokens, head_dim] to `kv` as they come, row by row. Attention is computed with what was rounded,
    of the newest token too.

    The rounded values are held in the dtype of the model: it shows what a format costs in quality
    and saves no memory. In bfloat16 and float16 they are rounded once more, to that dtype.
    """

    def __init__(self, config: Any, kv: Spec) -> None:
        super().__init__(config=config)
        self.kv = kv
        self.used = False

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.used = True
        keys, values = fake_quantize(key_states, self.kv), fake_quantize(value_states, self.kv)
        return super().update(keys, values, *args, **kwargs)  # type: ignore[no-any-return]

    def check_used(self, model: Any) -> None:
        """UserError where a model that was run with this cache has kept nothing in it."""
        if not self.used:
            raise UserError(
                f"a {type(model).__name__} keeps no keys and values that could be rounded to "
                f"{self.kv}; leave its KV cache as it is (without kv)"
            )
