"""Short names for the formats of the field, each one line of the Spec text form."""

_GROUPED = {
    f"w{bits}g{group}{suffix}": f"int{bits}{suffix} | fp16/g{group}"
    for bits in range(2, 9)
    for group in (16, 32, 64, 128, 256)
    for suffix in ("", "z")
}
_PER_ROW = {f"w{bits}": f"int{bits} | fp32/row" for bits in range(2, 9)}
# Dynamic, per token; scale = absmax / 127.5, as compressed-tensors runs them.
_ACTIVATIONS = {f"a{bits}": f"int{bits}h | fp32/row" for bits in range(2, 9)}

# OCP microscaling: blocks of 32 along the reduction axis under a power-of-two scale. The plain
# names use the ceil rule, which never clips; "-ocp" is the floor rule of the OCP document.
_MX_ELEMENTS = {
    "mxfp8": "e4m3",
    "mxfp8-e5m2": "e5m2",
    "mxfp6": "e2m3",
    "mxfp6-e3m2": "e3m2",
    "mxfp4": "e2m1",
    "mxint8": "int8",
    "mxint6": "int6",
    "mxint4": "int4",
}
_MX = {
    name + suffix: f"{grid} | e8m0.{rule}/g32"
    for name, grid in _MX_ELEMENTS.items()
    for suffix, rule in (("", "ceil"), ("-ocp", "floor"))
}

PRESETS: dict[str, str] = {
    **_PER_ROW,
    **_GROUPED,
    **_ACTIVATIONS,
    "a8g128": "int8 | fp16/g128",
    "a6g128": "int6 | fp16/g128",
    "a8z": "int8z | fp32/row",  # asymmetric per token (ZeroQuant)
    "int8-tensor": "int8 | fp32/tensor",
    "int8z-tensor": "int8z | fp32/tensor",
    # 8-bit floating point
    "fp8": "e4m3 | fp32/row",
    "fp8-tensor": "e4m3 | fp32/tensor",
    "fp8-e5m2": "e5m2 | fp32/row",
    "fp8-e3m4": "e3m4 | fp32/row",
    "fp8-e2m5": "e2m5 | fp32/row",
    "fp8-ieee": "e4m3i | fp32/row",
    "fp8-block": "e4m3 | fp32/t128x128",  # DeepSeek-style weights
    "fp8-g128": "e4m3 | fp32/g128",  # and activations; also COAT's optimizer states
    "fp8-g16": "e4m3 | fp32/g16",  # COAT's saved activations
    # 6- and 4-bit floating point under ordinary scales (ZeroQuant 4+2, ZeroQuant-FP)
    "fp6": "e3m2 | fp16/row",
    "fp6-e2m3": "e2m3 | fp16/row",
    "fp4-g64": "e2m1 | fp16/g64",
    "zqfp": "e2m1 | fp16/g256",
    "zqfp-m1": "e2m1 | pow2.ceil/g256",
    "zqfp-m2": "e2m1 | pow2.floor/g256 * fp16/row",
    "zqfp-m2-ceil": "e2m1 | pow2.ceil/g256 * fp16/row",
    # microscaling and NVIDIA's two-level scales
    **_MX,
    "nvfp4": "e2m1 | e4m3/g16 * fp32/tensor",
    "nvfp4-tile": "e2m1 | e4m3/t16x16 * fp32/tensor",
    "nvint4": "int4 | e4m3/g16 * fp32/tensor",
    # bitsandbytes: blocks of the flattened tensor, optionally doubly quantized
    "nf4": "nf4 | fp32/flat64",
    "nf4-dq": "nf4 | (dyn8 | fp32/g256, offset=mean)/flat64",
    "bnb-fp4": "bnbfp4 | fp32/flat64",
    "bnb-fp4-dq": "bnbfp4 | (dyn8 | fp32/g256, offset=mean)/flat64",
    "fp4": "bnbfp4 | fp32/flat64",
    "fp4-dq": "bnbfp4 | (dyn8 | fp32/g256, offset=mean)/flat64",
    "bnb-8bit": "dyn8 | fp32/flat256",
    # methods
    "flexq": "int6 | fp16/g128",
    "llm-int8": "int8 | fp32/row",
    "crossquant": "int8 | fp32/row^0.15 * fp32/col^0.85",
    "crossquant-4": "int4 | fp32/row^0.15 * fp32/col^0.85",
    "shiftquant": "int4@sr | pow2[0..3].floor/col * fp32/tensor",
    "int2.1": "int2z | fp16/g128",
    "nvfp4-grad": "e2m1@sr | e4m3/g16 * fp32/tensor",
}
