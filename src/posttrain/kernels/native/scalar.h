/* Conversions of single numbers, for the instruction sets that lack them and for row ends. Included
 * inside each instruction set's anonymous namespace (see product.h). */

template <int N>
struct Constant {
  static constexpr int value = N;
  constexpr operator int64_t() const { return N; }
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

/* Nearest, ties to even; NaN does not occur. */
SCALAR uint16_t float_to_bfloat16(float value) {
  uint32_t bits = bits_of_float(value);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* Nearest, ties to even; beyond 65504 infinity. */
SCALAR uint16_t float_to_half(float value) {
  uint32_t bits = bits_of_float(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest >= 0x47800000u) return (uint16_t)(sign | (rest > 0x7f800000u ? 0x7e00 : 0x7c00));
  if (rest < 0x38800000u) { /* subnormal: adding 2^-1 puts the last bit where float rounds */
    float shifted = float_of_bits(rest) + 0.5f;
    return (uint16_t)(sign | (bits_of_float(shifted) - 0x3f000000u));
  }
  uint32_t rounded = rest - 0x38000000u + 0xfff + (rest >> 13 & 1);
  return (uint16_t)(sign | rounded >> 13);
}

/* OCP E4M3: nearest, ties to even, beyond 448 saturated; NaN stays NaN. */
SCALAR uint8_t float_to_e4m3(float value) {
  uint32_t bits = bits_of_float(value), sign = bits >> 24 & 0x80, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000u) return (uint8_t)(sign | 0x7f);
  if (rest >= 0x43e00000u) return (uint8_t)(sign | 0x7e); /* 448 */
  if (rest < 0x3c800000u) /* below 2^-6: steps of 2^-9 */
    return (uint8_t)(sign | (uint32_t)__builtin_rintf(float_of_bits(rest) * 512.0f));
  uint32_t rounded = rest - (120u << 23) + 0x7ffff + (rest >> 20 & 1);
  return (uint8_t)(sign | rounded >> 20);
}

/* 16 vectors of 16 lanes of 32 bits as a matrix, transposed. */
template <class V>
SCALAR void transpose_lanes(V (&v)[16]) {
  uint32_t in[16][16], out[16][16];
  __builtin_memcpy(in, v, sizeof in);
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++) out[j][i] = in[i][j];
  __builtin_memcpy(v, out, sizeof out);
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

/* The code of row `lane`, column k of a panel (layout.h). */
SCALAR int32_t code_at(const uint8_t *panel, int bits, int64_t lane, int64_t k) {
  const uint8_t *unit = panel + k / kUnit * unit_bytes(bits);
  const int64_t step = k % kUnit / kStep, byte = lane * kStep + k % kStep;
  if (bits == 8) return unit[step * kVector + byte];
  int32_t code = 0, shift = 0;
  for (int width = 4; width; width /= 2) {
    if (!(bits & width)) continue;
    int64_t per = 8 / width;
    int32_t part = unit[step / per * kVector + byte] >> step % per * width & ((1 << width) - 1);
    code |= part << shift;
    unit += kUnit / kStep / per * kVector;
    shift += width;
  }
  return code;
}

/* What numbers.quantize makes of x; infinities saturate, NaN becomes 0. */
SCALAR int32_t code_of(float x, float scale, const pt_input &in) {
  float q = x / scale;
  if (q != q) return 0;
  q = q < (float)in.hi ? q : (float)in.hi;
  q = q > (float)in.lo ? q : (float)in.lo;
  return (int32_t)__builtin_rintf(q);
}
