"""What a number can be: grids, blocks, scales, rounding, specs, packing. Pure tensors."""

from posttrain.numbers.grids import GRIDS, Grid
from posttrain.numbers.metrics import (
    clip_fraction,
    crest_factor,
    dynamic_range,
    kernel_fraction,
    qsnr,
)
from posttrain.numbers.packing import LAYOUTS, pack, packed_bytes, unpack
from posttrain.numbers.partition import Partition
from posttrain.numbers.presets import PRESETS
from posttrain.numbers.qtensor import (
    QTensor,
    concatenated,
    decode_scaled,
    encode_scaled,
    fake_quantize,
    quantize,
)
from posttrain.numbers.rounding import ROUNDINGS
from posttrain.numbers.scales import Scales, fit_scales
from posttrain.numbers.spec import SCALE_RULES, Factor, Spec, spec, stored_bits
from posttrain.numbers.theory import crossover, predicted_qsnr

__all__ = [
    "GRIDS",
    "LAYOUTS",
    "PRESETS",
    "ROUNDINGS",
    "SCALE_RULES",
    "Factor",
    "Grid",
    "Partition",
    "QTensor",
    "Scales",
    "Spec",
    "clip_fraction",
    "concatenated",
    "crest_factor",
    "crossover",
    "decode_scaled",
    "dynamic_range",
    "encode_scaled",
    "fake_quantize",
    "fit_scales",
    "kernel_fraction",
    "pack",
    "packed_bytes",
    "predicted_qsnr",
    "qsnr",
    "quantize",
    "spec",
    "stored_bits",
    "unpack",
]
