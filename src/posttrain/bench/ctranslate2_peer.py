"""The same model in CTranslate2's INT8, written by its own converter from a transformers model.

Enough to measure speed: the converter reads the base of the rotary angles where transformers before
version 5 kept it, and takes its default elsewhere.
"""

import json
from pathlib import Path

from posttrain.bench.origin import open_plain, origin_of
from posttrain.errors import UserError
from posttrain.models.base import one_line
from posttrain.models.load import count_parameters, load

FACTS = "facts.json"  # beside the model: what it does not say itself


def ctranslate2_of(model: str, folder: Path) -> Path:
    """A CTranslate2 model in `folder`, of the model that `model` was quantized from."""
    origin = origin_of(model)
    open_plain(origin, "CTranslate2")
    source = load(origin, dtype="float32")
    plain, out = folder / "plain", folder / "ctranslate2"
    source.save_pretrained(plain)
    source.tokenizer.save_pretrained(plain)
    try:
        from ctranslate2.converters import TransformersConverter

        TransformersConverter(str(plain)).convert(str(out), quantization="int8")
    except Exception as error:  # ValueError for an architecture it does not know; others for others
        raise UserError(
            f"{model}: CTranslate2 cannot convert it ({type(error).__name__}: {one_line(error)}); "
            "leave it out of --against"
        ) from error
    facts = {"parameters": count_parameters(source)}
    (out / FACTS).write_text(json.dumps(facts), encoding="utf-8")
    return out
