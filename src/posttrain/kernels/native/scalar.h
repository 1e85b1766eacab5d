/* Conversions of single numbers, for the instruction sets that lack them and for row ends. Included
 * inside each instruction set's anonymous namespace (see product.h). */

template <int N>
struct Constant {
  static constexpr int value = N;
};

#define SCALAR [[maybe_unused]] static inline

SCALAR float float_of_bits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

SCALAR uint32_t bits_of_float(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

/* float16 to float32: shift the fields into place, rescale the exponent; subnormals come out right. */
SCALAR float half_to_float(uint16_t half) {
  uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = (uint32_t)(half & 0x7fff) << 13;
  if ((half & 0x7c00) == 0x7c00) return float_of_bits(sign | rest | 0x7f800000u);
  return float_of_bits(sign | bits_of_float(float_of_bits(rest) * 0x1p112f));
}

SCALAR float bfloat16_to_float(uint16_t bits) { return float_of_bits((uint32_t)bits << 16); }

/* OCP E4M3 likewise; its NaN codes do not occur in scales. */
SCALAR float e4m3_to_float(uint8_t code) {
  uint32_t sign = (uint32_t)(code & 0x80) << 24, rest = (uint32_t)(code & 0x7f) << 20;
  return float_of_bits(sign | bits_of_float(float_of_bits(rest) * 0x1p120f));
}

SCALAR float e8m0_to_float(uint8_t code) {
  if (code == 255) return __builtin_nanf("");
  return code ? float_of_bits((uint32_t)code << 23) : 0x1p-127f;
}

/* The positive scale as float16 stores it: clamped to its positive range, nearest, ties to even. */
SCALAR float round_to_half(float scale) {
  if (scale > 65504.0f) scale = 65504.0f;
  if (scale < 0x1p-24f) scale = 0x1p-24f;
  int32_t exponent = (int32_t)(bits_of_float(scale) >> 23) - 127;
  if (exponent < -14) exponent = -14;
  float step = float_of_bits((uint32_t)(exponent - 10 + 127) << 23);
  return __builtin_rintf(scale / step) * step;
}

SCALAR float scale_at(const void *scales, int32_t type, int64_t i) {
  switch (type) {
    case PT_F32: return ((const float *)scales)[i];
    case PT_F16: return half_to_float(((const uint16_t *)scales)[i]);
    case PT_BF16: return bfloat16_to_float(((const uint16_t *)scales)[i]);
    case PT_E4M3: return e4m3_to_float(((const uint8_t *)scales)[i]);
    default: return e8m0_to_float(((const uint8_t *)scales)[i]);
  }
}

/* What numbers.quantize makes of x; infinities saturate, NaN becomes 0. */
SCALAR int32_t code_of(float x, float scale, const pt_input &in) {
  float q = x / scale;
  if (q != q) return 0;
  q = q < (float)in.hi ? q : (float)in.hi;
  q = q > (float)in.lo ? q : (float)in.lo;
  return (int32_t)__builtin_rintf(q);
}
