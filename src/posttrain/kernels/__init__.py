"""The fast paths: native products for packed weights, on the best instruction set of the machine.

Source in `native/` (C++, one file per instruction set, chosen at run time); `build` compiles it,
`library` loads it, `packed` packs weights and multiplies, `columns` rounds weights column by column.
Beside every fast path stands a plain one: `models.linear` computes the same products in torch, and
works where nothing could be compiled.
"""

from posttrain.kernels.decoder import BlockWeights, Decoder, Dimensions, Memory
from posttrain.kernels.float32 import fast_float32
from posttrain.kernels.library import (
    allocate,
    available,
    find,
    isa,
    isas,
    set_threads,
    threads,
    use,
)
from posttrain.kernels.packed import (
    InputFormat,
    PackedLinear,
    PackedWeight,
    linear,
    quantize_input,
    scale_width,
    unsupported,
)
from posttrain.kernels.sampling import Sampling, log_partition

__all__ = [
    "BlockWeights",
    "Decoder",
    "Dimensions",
    "InputFormat",
    "Memory",
    "PackedLinear",
    "PackedWeight",
    "Sampling",
    "allocate",
    "available",
    "fast_float32",
    "find",
    "isa",
    "isas",
    "linear",
    "log_partition",
    "quantize_input",
    "scale_width",
    "set_threads",
    "threads",
    "unsupported",
    "use",
]
