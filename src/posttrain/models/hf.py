"""Our checkpoint format inside transformers: `AutoModelForCausalLM.from_pretrained` after
`import posttrain` (which installs the hook that calls `register`)."""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from posttrain.models import native
from posttrain.models.load import install


class PosttrainConfig(QuantizationConfigMixin):
    """`quantization_config` of a checkpoint in our format; holds the fields as they are."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)
        self.quant_method = native.METHOD  # type: ignore[assignment]


class PosttrainQuantizer(HfQuantizer):
    """Puts quantized layers into the skeleton; transformers then fills their buffers by name."""

    requires_calibration = True  # only loads what posttrain wrote

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        where = f"{getattr(model.config, '_name_or_path', '') or 'config.json'}"
        install(model, self.quantization_config.to_dict(), where)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def register() -> None:
    """Add our format to transformers' tables; harmless when it is there already."""
    if native.METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(native.METHOD)(PosttrainConfig)
        register_quantizer(native.METHOD)(PosttrainQuantizer)
