/* AArch64 with the dot product extension (Armv8.2 and later). A 64-byte step is four registers. */
#include "kernels.h"

#if defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>

namespace {
#include "scalar.h"

#define EACH4(i) for (int i = 0; i < 4; i++)

/* 1 panel x 4 tokens: 16 registers of sums, 4 of weights, 4 of activations. */
static const int kGemvTokens = 4;
static const bool kDigitsAreFast = false; /* see pt_digits_are_fast */
static constexpr TileShape kTile = {1, 4}, kGroupedTile = {1, 4}, kFloatTile = {1, 4};
static const int kRun = kStep; /* columns of a tile's loop at a time */
static constexpr TileShape kAttentionTile = {2, 2}; /* vectors, queries */

struct Bytes { uint8x16_t v[4]; };
struct Quad { int8x16_t v; };
struct I32 { int32x4_t v[4]; };
struct F32 { float32x4_t v[4]; };
template <int Bits> struct FloatTable { const float *values; };

INLINE Bytes load_bytes(const uint8_t *from) {
  Bytes b;
  EACH4(i) b.v[i] = vld1q_u8(from + 16 * i);
  return b;
}
INLINE void store_bytes(uint8_t *to, Bytes b) { EACH4(i) vst1q_u8(to + 16 * i, b.v[i]); }
template <int Shift, int Bits>
INLINE Bytes field(Bytes b) {
  EACH4(i) {
    if constexpr (Shift > 0) b.v[i] = vshrq_n_u8(b.v[i], Shift);
    b.v[i] = vandq_u8(b.v[i], vdupq_n_u8((1 << Bits) - 1));
  }
  return b;
}
/* low | bits [From, From + Bits) of every byte, moved to bit To */
template <int From, int Bits, int To>
INLINE Bytes insert(Bytes low, Bytes b) {
  EACH4(i) {
    uint8x16_t moved = b.v[i];
    if constexpr (From > To) moved = vshrq_n_u8(moved, From - To);
    if constexpr (From < To) moved = vshlq_n_u8(moved, To - From);
    low.v[i] = vorrq_u8(low.v[i], vandq_u8(moved, vdupq_n_u8(((1 << Bits) - 1) << To)));
  }
  return low;
}
INLINE void opaque(Bytes &b) { __asm__ volatile("" : "+m"(b)); }
INLINE void hold(Bytes &) {}
INLINE Bytes repeat16(const uint8_t *table) {
  Bytes b;
  EACH4(i) b.v[i] = vld1q_u8(table);
  return b;
}
INLINE Bytes look_up(Bytes table, Bytes index) {
  EACH4(i) index.v[i] = vqtbl1q_u8(table.v[i], index.v[i]);
  return index;
}

INLINE Quad broadcast4(const int8_t *from) {
  int32_t four;
  __builtin_memcpy(&four, from, 4);
  return {vreinterpretq_s8_s32(vdupq_n_s32(four))};
}
INLINE I32 set_i32(int32_t value) {
  I32 out;
  EACH4(i) out.v[i] = vdupq_n_s32(value);
  return out;
}
INLINE I32 add(I32 a, I32 b) {
  EACH4(i) a.v[i] = vaddq_s32(a.v[i], b.v[i]);
  return a;
}
/* The instruction is signed by signed: of 8-bit codes the top bit is multiplied on its own. */
template <bool Wide>
INLINE I32 dot(I32 sum, Bytes w, Quad x) {
  EACH4(i) {
    if constexpr (Wide) {
      int8x16_t low = vreinterpretq_s8_u8(vandq_u8(w.v[i], vdupq_n_u8(127)));
      int8x16_t high = vreinterpretq_s8_u8(vshrq_n_u8(w.v[i], 7));
      int32x4_t upper = vshlq_n_s32(vdotq_s32(vdupq_n_s32(0), high, x.v), 7);
      sum.v[i] = vaddq_s32(vdotq_s32(sum.v[i], low, x.v), upper);
    } else {
      sum.v[i] = vdotq_s32(sum.v[i], vreinterpretq_s8_u8(w.v[i]), x.v);
    }
  }
  return sum;
}
template <bool Wide>
INLINE I32 dot_at(I32 sum, Bytes w, const int8_t *x) { return dot<Wide>(sum, w, broadcast4(x)); }
/* 16 pairs of integers of 16 bits; one pair, 16 times; sums of products, pair by pair; 16 lanes, saturated. */
INLINE I32 load_pairs(const int16_t *from) {
  I32 a;
  UNROLL for (int i = 0; i < 4; i++) a.v[i] = vreinterpretq_s32_s16(vld1q_s16(from + 8 * i));
  return a;
}
INLINE I32 repeat_pair(const int16_t *from) {
  int32_t two;
  __builtin_memcpy(&two, from, 4);
  return set_i32(two);
}
INLINE I32 dot_pairs(I32 sum, I32 a, I32 b) {
  EACH4(i) {
    int16x8_t x = vreinterpretq_s16_s32(a.v[i]), y = vreinterpretq_s16_s32(b.v[i]);
    int32x4_t low = vmull_s16(vget_low_s16(x), vget_low_s16(y));
    sum.v[i] = vaddq_s32(sum.v[i], vpaddq_s32(low, vmull_high_s16(x, y)));
  }
  return sum;
}
INLINE void store_shorts(int16_t *to, I32 v) {
  UNROLL for (int i = 0; i < 4; i++) vst1_s16(to + 4 * i, vqmovn_s32(v.v[i]));
}
INLINE int32_t first_lane(I32 a) { return vgetq_lane_s32(a.v[0], 0); }
INLINE float first_lane(F32 a) { return vgetq_lane_f32(a.v[0], 0); }
INLINE I32 load_bits(const float *from) {
  I32 a;
  UNROLL for (int i = 0; i < 4; i++) a.v[i] = vld1q_s32((const int32_t *)from + 4 * i);
  return a;
}
INLINE void store_bits(float *to, I32 a) {
  UNROLL for (int i = 0; i < 4; i++) vst1q_s32((int32_t *)to + 4 * i, a.v[i]);
}
INLINE I32 load_u8(const uint8_t *from) {
  uint8x16_t bytes = vld1q_u8(from);
  uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_u8(vget_high_u8(bytes));
  return {{vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(low))),
           vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(low))),
           vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(high))),
           vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(high)))}};
}
INLINE I32 subtract_product(I32 sum, const uint8_t *zeros, int32_t x) {
  I32 zero = load_u8(zeros);
  EACH4(i) sum.v[i] = vmlsq_s32(sum.v[i], zero.v[i], vdupq_n_s32(x));
  return sum;
}
template <int J>
INLINE I32 byte_of(Bytes b) {
  I32 out;
  EACH4(i) {
    uint32x4_t word = vreinterpretq_u32_u8(b.v[i]);
    if constexpr (J > 0) word = vshrq_n_u32(word, 8 * J);
    out.v[i] = vreinterpretq_s32_u32(vandq_u32(word, vdupq_n_u32(255)));
  }
  return out;
}

INLINE F32 set_f32(float value) {
  F32 out;
  EACH4(i) out.v[i] = vdupq_n_f32(value);
  return out;
}
INLINE F32 to_f32(I32 a) {
  F32 out;
  EACH4(i) out.v[i] = vcvtq_f32_s32(a.v[i]);
  return out;
}
#define ON_ALL4(name, instruction)                 \
  INLINE F32 name(F32 a, F32 b) {                  \
    EACH4(i) a.v[i] = instruction(a.v[i], b.v[i]); \
    return a;                                      \
  }
ON_ALL4(add, vaddq_f32)
ON_ALL4(subtract, vsubq_f32)
ON_ALL4(mul, vmulq_f32)
ON_ALL4(divide, vdivq_f32)
INLINE F32 fma(F32 a, F32 b, F32 c) {
  EACH4(i) c.v[i] = vfmaq_f32(c.v[i], a.v[i], b.v[i]);
  return c;
}
/* As on x86, where the second operand is the result of every comparison with NaN. */
INLINE F32 maximum(F32 a, F32 b) {
  EACH4(i) a.v[i] = vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]);
  return a;
}
INLINE F32 minimum(F32 a, F32 b) {
  EACH4(i) a.v[i] = vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]);
  return a;
}
INLINE I32 rounded(F32 a) {
  I32 out;
  EACH4(i) out.v[i] = vcvtnq_s32_f32(a.v[i]);
  return out;
}
/* v 2^n for whole n in [-126, 127] */
INLINE F32 times_power_of_two(F32 v, F32 n) {
  EACH4(i) {
    int32x4_t exponent = vaddq_s32(vcvtnq_s32_f32(n.v[i]), vdupq_n_s32(127));
    v.v[i] = vmulq_f32(v.v[i], vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)));
  }
  return v;
}
INLINE F32 load_floats(const float *from) {
  F32 out;
  EACH4(i) out.v[i] = vld1q_f32(from + 4 * i);
  return out;
}
/* Lanes i and i + H, for i with bit H clear, change places. */
template <int H>
INLINE F32 swapped(F32 v) {
  float in[16], out[16];
  EACH4(i) vst1q_f32(in + 4 * i, v.v[i]);
  for (int i = 0; i < 16; i++) out[i] = in[i ^ H];
  return load_floats(out);
}
/* They become their sum and difference. */
template <int H>
INLINE F32 butterfly(F32 v) {
  float in[16], out[16];
  EACH4(i) vst1q_f32(in + 4 * i, v.v[i]);
  for (int i = 0; i < 16; i++) out[i] = i & H ? in[i ^ H] - in[i] : in[i] + in[i ^ H];
  return load_floats(out);
}
INLINE F32 load_some(const float *from, int64_t count) {
  if (count == 16) return load_floats(from);
  float all[16] = {};
  for (int64_t i = 0; i < count; i++) all[i] = from[i];
  return load_floats(all);
}
INLINE void store_some(float *to, F32 v, int64_t count) {
  float all[16];
  float *out = count == 16 ? to : all;
  EACH4(i) vst1q_f32(out + 4 * i, v.v[i]);
  if (count < 16)
    for (int64_t i = 0; i < count; i++) to[i] = all[i];
}
template <bool Half>
INLINE F32 load_halves(const uint16_t *from) {
  F32 out;
  EACH4(i) {
    uint16x4_t bits = vld1_u16(from + 4 * i);
    if constexpr (Half) out.v[i] = vcvt_f32_f16(vreinterpret_f16_u16(bits));
    else out.v[i] = vreinterpretq_f32_u32(vshll_n_u16(bits, 16));
  }
  return out;
}
template <bool Half>
INLINE void store_halves(uint16_t *to, F32 v) {
  float all[16];
  EACH4(i) {
    if constexpr (Half) vst1_u16(to + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(v.v[i])));
    else vst1q_f32(all + 4 * i, v.v[i]);
  }
  if constexpr (!Half)
    for (int i = 0; i < 16; i++) to[i] = float_to_bfloat16(all[i]);
}
INLINE I32 load_i8(const int8_t *from) {
  int8x16_t bytes = vld1q_s8(from);
  int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_s8(vget_high_s8(bytes));
  return {{vmovl_s16(vget_low_s16(low)), vmovl_s16(vget_high_s16(low)),
           vmovl_s16(vget_low_s16(high)), vmovl_s16(vget_high_s16(high))}};
}
/* E4M3 codes, whose values come out times 2^-8: the fields, moved to those of float16, mean that there. */
INLINE F32 load_e4m3(const uint8_t *from) {
  int8x16_t bytes = vreinterpretq_s8_u8(vld1q_u8(from));
  int16x8_t words[2] = {vmovl_s8(vget_low_s8(bytes)), vmovl_s8(vget_high_s8(bytes))};
  F32 out;
  for (int i = 0; i < 2; i++) {
    int16x8_t fields = vandq_s16(vshlq_n_s16(words[i], 7), vdupq_n_s16((int16_t)0xbfff));
    out.v[2 * i] = vcvt_f32_f16(vreinterpret_f16_s16(vget_low_s16(fields)));
    out.v[2 * i + 1] = vcvt_f32_f16(vreinterpret_f16_s16(vget_high_s16(fields)));
  }
  return out;
}
/* The lower or upper nibbles of 16 bytes, signed. */
INLINE F32 load_nibbles(const uint8_t *from, bool upper) {
  int8x16_t bytes = vreinterpretq_s8_u8(vld1q_u8(from));
  bytes = vshrq_n_s8(upper ? bytes : vshlq_n_s8(bytes, 4), 4);
  int8_t codes[16];
  vst1q_s8(codes, bytes);
  return to_f32(load_i8(codes));
}
/* Lanes begin <= i < end of v; others are `other`. */
INLINE F32 within(F32 v, int64_t begin, int64_t end, float other) {
  float all[16];
  EACH4(i) vst1q_f32(all + 4 * i, v.v[i]);
  for (int i = 0; i < 16; i++) all[i] = i >= begin && i < end ? all[i] : other;
  return load_floats(all);
}
INLINE void transpose(F32 (&v)[16]) { transpose_lanes(v); }
template <bool Half, int Upper>
INLINE F32 half_lanes(F32 pairs) {
  F32 out;
  EACH4(i) {
    uint32x4_t word = vreinterpretq_u32_f32(pairs.v[i]);
    if constexpr (Half) {
      uint16x4_t bits = vmovn_u32(Upper ? vshrq_n_u32(word, 16) : word);
      out.v[i] = vcvt_f32_f16(vreinterpret_f16_u16(bits));
    } else {
      word = Upper ? vandq_u32(word, vdupq_n_u32(0xffff0000u)) : vshlq_n_u32(word, 16);
      out.v[i] = vreinterpretq_f32_u32(word);
    }
  }
  return out;
}
INLINE F32 load_scales(const pt_weight &w, int64_t at) {
  if (!w.scales) return set_f32(1.0f);
  if (w.scale_type == PT_F16) return load_halves<true>((const uint16_t *)w.scales + at);
  if (w.scale_type == PT_F32) return load_floats((const float *)w.scales + at);
  if (w.scale_type == PT_BF16) return load_halves<false>((const uint16_t *)w.scales + at);
  float all[16];
  for (int i = 0; i < 16; i++) all[i] = scale_at(w.scales, w.scale_type, at + i);
  return load_floats(all);
}
template <int Bits>
INLINE FloatTable<Bits> load_table(const float *values) { return {values}; }
template <int Bits>
INLINE F32 look_up(const FloatTable<Bits> &table, I32 index) {
  int32_t at[16];
  float all[16];
  EACH4(i) vst1q_s32(at + 4 * i, index.v[i]);
  for (int i = 0; i < 16; i++) all[i] = table.values[at[i]];
  return load_floats(all);
}
INLINE void prefetch(const uint8_t *from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i);
}
INLINE void prefetch_far(const uint8_t *from, int64_t bytes) { /* to the second cache */
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
}

INLINE uint32_t largest_magnitude(const float *x, int64_t count) {
  uint32x4_t most = vdupq_n_u32(0);
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    uint32x4_t bits = vreinterpretq_u32_f32(vld1q_f32(x + i));
    most = vmaxq_u32(most, vandq_u32(bits, vdupq_n_u32(0x7fffffffu)));
  }
  uint32_t largest = vmaxvq_u32(most);
  for (; i < count; i++) {
    uint32_t bits = bits_of_float(x[i]) & 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}
INLINE void sums_of(const int8_t *codes, int64_t segment, int64_t count, int32_t *sums) {
  for (int64_t begin = 0; begin < count; begin += segment, sums++) {
    const int64_t end = begin + segment < count ? begin + segment : count;
    int32x4_t sum = vdupq_n_s32(0);
    for (int64_t i = begin; i < end; i += 16) sum = vdotq_s32(sum, vld1q_s8(codes + i), vdupq_n_s8(1));
    *sums += vaddvq_s32(sum);
  }
}
INLINE void encode(const float *x, int64_t count, float scale, const pt_input &in, int8_t *codes) {
  const float32x4_t by = vdupq_n_f32(scale);
  const int32x4_t lo = vdupq_n_s32(in.lo), hi = vdupq_n_s32(in.hi);
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    int32x4_t a = vcvtnq_s32_f32(vdivq_f32(vld1q_f32(x + i), by)); /* ties to even */
    int32x4_t b = vcvtnq_s32_f32(vdivq_f32(vld1q_f32(x + i + 4), by));
    a = vmaxq_s32(vminq_s32(a, hi), lo), b = vmaxq_s32(vminq_s32(b, hi), lo);
    vst1_s8(codes + i, vmovn_s16(vcombine_s16(vmovn_s32(a), vmovn_s32(b))));
  }
  for (; i < count; i++) {
    codes[i] = (int8_t)code_of(x[i], scale, in);
  }
}
}  // namespace

#include "plain_floats.h"
#include "product.h"

const Kernels *neon_kernels() {
  static const Kernels kernels = kernels_named("neon-dotprod");
  return &kernels;
}
#else
const Kernels *neon_kernels() { return nullptr; }
#endif
