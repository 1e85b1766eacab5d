/* The vectors of AVX2 with FMA and F16C, for avx2.cpp and avxvnni.cpp. A 64-byte step is two registers. */
#include <immintrin.h>

namespace {
#include "scalar.h"

#define BOTH(i) for (int i = 0; i < 2; i++)

#if defined(__AVXVNNI__)
/* 1 panel x 6 tokens: 12 registers of sums, 2 of weights, 1 of activations. Two panels need more: gcc would
 * keep a sum in memory, and every column would wait for it. */
static constexpr TileShape kTile = {1, 6}, kGroupedTile = {1, 4};
static const bool kDigitsAreFast = true; /* see pt_digits_are_fast */
#else
/* 2 panels x 2 tokens: 8 registers of sums, 4 of weights, 1 of activations, 3 temporaries. */
static constexpr TileShape kTile = {2, 2}, kGroupedTile = {2, 2};
static const bool kDigitsAreFast = false; /* see pt_digits_are_fast */
#endif
static constexpr TileShape kFloatTile = {2, 2};
static const int kGemvTokens = 4;
static const int kRun = kStep; /* columns of a tile's loop at a time */
static constexpr TileShape kAttentionTile = {2, 2}; /* vectors, queries */

struct Bytes { __m256i v[2]; };
struct Quad { __m256i v; };
struct I32 { __m256i v[2]; };
struct F32 { __m256 v[2]; };
template <int Bits> struct FloatTable { const float *values; };
template <> struct FloatTable<4> { __m256 v[2]; };

INLINE Bytes load_bytes(const uint8_t *from) {
  return {{_mm256_loadu_si256((const __m256i *)from), _mm256_loadu_si256((const __m256i *)from + 1)}};
}
INLINE void store_bytes(uint8_t *to, Bytes b) { BOTH(i) _mm256_storeu_si256((__m256i *)to + i, b.v[i]); }
template <int Shift, int Bits>
INLINE Bytes field(Bytes b) {
  BOTH(i) {
    __m256i shifted = Shift ? _mm256_srli_epi16(b.v[i], Shift) : b.v[i];
    b.v[i] = _mm256_and_si256(shifted, _mm256_set1_epi8((1 << Bits) - 1));
  }
  return b;
}
/* low | bits [From, From + Bits) of every byte, moved to bit To */
template <int From, int Bits, int To>
INLINE Bytes insert(Bytes low, Bytes b) {
  BOTH(i) {
    __m256i moved = From > To ? _mm256_srli_epi16(b.v[i], From > To ? From - To : 0)
                              : _mm256_slli_epi16(b.v[i], To > From ? To - From : 0);
    __m256i mask = _mm256_set1_epi8((char)(((1 << Bits) - 1) << To));
    low.v[i] = _mm256_or_si256(low.v[i], _mm256_and_si256(moved, mask));
  }
  return low;
}
INLINE void opaque(Bytes &b) { __asm__ volatile("" : "+x"(b.v[0]), "+x"(b.v[1])); }
INLINE void hold(Bytes &) {}
INLINE Bytes repeat16(const uint8_t *table) {
  __m256i v = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
  return {{v, v}};
}
INLINE Bytes look_up(Bytes table, Bytes index) {
  BOTH(i) index.v[i] = _mm256_shuffle_epi8(table.v[i], index.v[i]);
  return index;
}

INLINE Quad broadcast4(const int8_t *from) {
  int32_t four;
  __builtin_memcpy(&four, from, 4);
  return {_mm256_set1_epi32(four)};
}
INLINE I32 set_i32(int32_t value) { return {{_mm256_set1_epi32(value), _mm256_set1_epi32(value)}}; }
INLINE I32 add(I32 a, I32 b) {
  BOTH(i) a.v[i] = _mm256_add_epi32(a.v[i], b.v[i]);
  return a;
}
#if defined(__AVXVNNI__)
template <bool Wide>
INLINE I32 dot(I32 sum, Bytes w, Quad x) {
  /* Not the intrinsic, as in simd_avx512.h; and not what AVX-512 calls by the same name. */
  BOTH(i) __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum.v[i]) : "x"(w.v[i]), "x"(x.v));
  return sum;
}
#else
/* maddubs adds pairs of products in 16 bits: exact up to codes of 7 bits (127 * 128 * 2 < 2^15).
 * Of 8-bit codes the top bit is multiplied on its own (128 * -128 * 2 = -2^15 just fits). */
template <bool Wide>
INLINE I32 dot(I32 sum, Bytes w, Quad x) {
  const __m256i ones = _mm256_set1_epi16(1);
  BOTH(i) {
    __m256i low = Wide ? _mm256_and_si256(w.v[i], _mm256_set1_epi8(127)) : w.v[i];
    __m256i product = _mm256_madd_epi16(_mm256_maddubs_epi16(low, x.v), ones);
    sum.v[i] = _mm256_add_epi32(sum.v[i], product);
    if constexpr (Wide) {
      __m256i high = _mm256_and_si256(w.v[i], _mm256_set1_epi8(-128));
      product = _mm256_madd_epi16(_mm256_maddubs_epi16(high, x.v), ones);
      sum.v[i] = _mm256_add_epi32(sum.v[i], product);
    }
  }
  return sum;
}
#endif
template <bool Wide>
INLINE I32 dot_at(I32 sum, Bytes w, const int8_t *x) { return dot<Wide>(sum, w, broadcast4(x)); }
/* 16 pairs of integers of 16 bits; one pair, 16 times; sums of products, pair by pair; 16 lanes, saturated. */
INLINE I32 load_pairs(const int16_t *from) {
  return {{_mm256_loadu_si256((const __m256i *)from), _mm256_loadu_si256((const __m256i *)from + 1)}};
}
INLINE I32 repeat_pair(const int16_t *from) {
  int32_t two;
  __builtin_memcpy(&two, from, 4);
  return set_i32(two);
}
INLINE I32 dot_pairs(I32 sum, I32 a, I32 b) {
#if defined(__AVXVNNI__)
  BOTH(i) __asm__("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sum.v[i]) : "x"(a.v[i]), "x"(b.v[i])); /* as in dot */
#else
  BOTH(i) sum.v[i] = _mm256_add_epi32(sum.v[i], _mm256_madd_epi16(a.v[i], b.v[i]));
#endif
  return sum;
}
INLINE void store_shorts(int16_t *to, I32 v) {
  __m256i packed = _mm256_packs_epi32(v.v[0], v.v[1]);
  _mm256_storeu_si256((__m256i *)to, _mm256_permute4x64_epi64(packed, 0b11011000));
}
INLINE int32_t first_lane(I32 a) { return _mm_cvtsi128_si32(_mm256_castsi256_si128(a.v[0])); }
INLINE I32 load_bits(const float *from) {
  return {{_mm256_loadu_si256((const __m256i *)from), _mm256_loadu_si256((const __m256i *)from + 1)}};
}
INLINE void store_bits(float *to, I32 a) {
  UNROLL for (int i = 0; i < 2; i++) _mm256_storeu_si256((__m256i *)to + i, a.v[i]);
}
INLINE I32 load_u8(const uint8_t *from) {
  return {{_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from)),
           _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(from + 8)))}};
}
INLINE I32 subtract_product(I32 sum, const uint8_t *zeros, int32_t x) {
  I32 zero = load_u8(zeros);
  BOTH(i) sum.v[i] = _mm256_sub_epi32(sum.v[i], _mm256_mullo_epi32(zero.v[i], _mm256_set1_epi32(x)));
  return sum;
}
template <int J>
INLINE I32 byte_of(Bytes b) {
  I32 out;
  BOTH(i) out.v[i] = _mm256_and_si256(_mm256_srli_epi32(b.v[i], 8 * J), _mm256_set1_epi32(255));
  return out;
}

INLINE F32 set_f32(float value) { return {{_mm256_set1_ps(value), _mm256_set1_ps(value)}}; }
INLINE F32 to_f32(I32 a) { return {{_mm256_cvtepi32_ps(a.v[0]), _mm256_cvtepi32_ps(a.v[1])}}; }
#define ON_BOTH(name, instruction)            \
  INLINE F32 name(F32 a, F32 b) {             \
    BOTH(i) a.v[i] = instruction(a.v[i], b.v[i]); \
    return a;                                 \
  }
ON_BOTH(add, _mm256_add_ps)
ON_BOTH(subtract, _mm256_sub_ps)
ON_BOTH(mul, _mm256_mul_ps)
ON_BOTH(divide, _mm256_div_ps)
ON_BOTH(maximum, _mm256_max_ps)
ON_BOTH(minimum, _mm256_min_ps)
INLINE F32 fma(F32 a, F32 b, F32 c) {
  BOTH(i) c.v[i] = _mm256_fmadd_ps(a.v[i], b.v[i], c.v[i]);
  return c;
}
INLINE I32 rounded(F32 a) { return {{_mm256_cvtps_epi32(a.v[0]), _mm256_cvtps_epi32(a.v[1])}}; }
/* v 2^n for whole n in [-126, 127] */
INLINE F32 times_power_of_two(F32 v, F32 n) {
  BOTH(i) {
    __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.v[i]), _mm256_set1_epi32(127));
    v.v[i] = _mm256_mul_ps(v.v[i], _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
  }
  return v;
}
/* Lanes i and i + H, for i with bit H clear, change places. */
template <int H>
INLINE F32 swapped(F32 v) {
  if constexpr (H == 8) return {{v.v[1], v.v[0]}};
  const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
  const __m256i from = _mm256_xor_si256(lane, _mm256_set1_epi32(H));
  return {{_mm256_permutevar8x32_ps(v.v[0], from), _mm256_permutevar8x32_ps(v.v[1], from)}};
}
/* They become their sum and difference. */
template <int H>
INLINE F32 butterfly(F32 v) {
  if constexpr (H == 8) return {{_mm256_add_ps(v.v[0], v.v[1]), _mm256_sub_ps(v.v[0], v.v[1])}};
  constexpr int upper = H == 1 ? 0xaa : H == 2 ? 0xcc : 0xf0;
  const F32 other = swapped<H>(v);
  BOTH(i) v.v[i] = _mm256_blend_ps(_mm256_add_ps(v.v[i], other.v[i]), _mm256_sub_ps(other.v[i], v.v[i]), upper);
  return v;
}
INLINE float first_lane(F32 a) { return _mm256_cvtss_f32(a.v[0]); }
INLINE F32 load_floats(const float *from) { return {{_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}}; }
INLINE F32 load_some(const float *from, int64_t count) {
  if (count == 16) return load_floats(from);
  float all[16] = {};
  for (int64_t i = 0; i < count; i++) all[i] = from[i];
  return load_floats(all);
}
INLINE void store_some(float *to, F32 v, int64_t count) {
  if (count == 16) {
    BOTH(i) _mm256_storeu_ps(to + 8 * i, v.v[i]);
    return;
  }
  float all[16];
  BOTH(i) _mm256_storeu_ps(all + 8 * i, v.v[i]);
  for (int64_t i = 0; i < count; i++) to[i] = all[i];
}
template <bool Half>
INLINE F32 load_halves(const uint16_t *from) {
  F32 out;
  BOTH(i) {
    __m128i bits = _mm_loadu_si128((const __m128i *)from + i);
    if constexpr (Half) out.v[i] = _mm256_cvtph_ps(bits);
    else out.v[i] = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  return out;
}
template <bool Half>
INLINE void store_halves(uint16_t *to, F32 v) {
  BOTH(i) {
    if constexpr (Half) {
      _mm_storeu_si128((__m128i *)to + i, _mm256_cvtps_ph(v.v[i], _MM_FROUND_TO_NEAREST_INT));
    } else {
      float all[8];
      _mm256_storeu_ps(all, v.v[i]);
      for (int j = 0; j < 8; j++) to[8 * i + j] = float_to_bfloat16(all[j]);
    }
  }
}
INLINE I32 load_i8(const int8_t *from) {
  return {{_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from)),
           _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(from + 8)))}};
}
/* E4M3 codes, whose values come out times 2^-8: the fields, moved to those of float16, mean that
 * there, and its subnormals cost nothing. */
INLINE F32 load_e4m3(const uint8_t *from) {
  __m256i words = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)from)), 7);
  words = _mm256_and_si256(words, _mm256_set1_epi16((short)0xbfff));
  return {{_mm256_cvtph_ps(_mm256_castsi256_si128(words)), _mm256_cvtph_ps(_mm256_extracti128_si256(words, 1))}};
}
/* The lower or upper nibbles of 16 bytes, signed. */
INLINE F32 load_nibbles(const uint8_t *from, bool upper) {
  const __m128i eight = _mm_set1_epi8(8);
  __m128i bytes = _mm_loadu_si128((const __m128i *)from);
  bytes = _mm_and_si128(upper ? _mm_srli_epi16(bytes, 4) : bytes, _mm_set1_epi8(15));
  bytes = _mm_sub_epi8(_mm_xor_si128(bytes, eight), eight);
  return to_f32({{_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))}});
}
/* Lanes begin <= i < end of v; others are `other`. */
INLINE F32 within(F32 v, int64_t begin, int64_t end, float other) {
  const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
  begin = begin < 0 ? 0 : begin > 16 ? 16 : begin, end = end < 0 ? 0 : end > 16 ? 16 : end;
  BOTH(i) {
    __m256i at = _mm256_add_epi32(lane, _mm256_set1_epi32(8 * i));
    __m256i keep = _mm256_and_si256(_mm256_cmpgt_epi32(at, _mm256_set1_epi32((int)begin - 1)),
                                    _mm256_cmpgt_epi32(_mm256_set1_epi32((int)end), at));
    v.v[i] = _mm256_blendv_ps(_mm256_set1_ps(other), v.v[i], _mm256_castsi256_ps(keep));
  }
  return v;
}
INLINE void transpose(F32 (&v)[16]) { transpose_lanes(v); }
template <bool Half, int Upper>
INLINE F32 half_lanes(F32 pairs) {
  F32 out;
  BOTH(i) {
    __m256i word = _mm256_castps_si256(pairs.v[i]);
    if (Half) {
      word = Upper ? _mm256_srli_epi32(word, 16) : _mm256_and_si256(word, _mm256_set1_epi32(0xffff));
      __m128i bits = _mm_packus_epi32(_mm256_castsi256_si128(word), _mm256_extracti128_si256(word, 1));
      out.v[i] = _mm256_cvtph_ps(bits);
    } else {
      word = Upper ? _mm256_and_si256(word, _mm256_set1_epi32((int)0xffff0000)) : _mm256_slli_epi32(word, 16);
      out.v[i] = _mm256_castsi256_ps(word);
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
INLINE FloatTable<Bits> load_table(const float *values) {
  if constexpr (Bits == 4) return {{_mm256_loadu_ps(values), _mm256_loadu_ps(values + 8)}};
  else return {values};
}
template <int Bits>
INLINE F32 look_up(const FloatTable<Bits> &table, I32 index) {
  F32 out;
  BOTH(i) {
    if constexpr (Bits == 4) {
      __m256 low = _mm256_permutevar8x32_ps(table.v[0], index.v[i]);
      __m256 high = _mm256_permutevar8x32_ps(table.v[1], index.v[i]);
      __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index.v[i], 28));
      out.v[i] = _mm256_blendv_ps(low, high, upper);
    } else {
      out.v[i] = _mm256_i32gather_ps(table.values, index.v[i], 4);
    }
  }
  return out;
}
INLINE void prefetch(const uint8_t *from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch((const char *)from + i, _MM_HINT_T0);
}
INLINE void prefetch_far(const uint8_t *from, int64_t bytes) { /* to the second cache */
  for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch((const char *)from + i, _MM_HINT_T1);
}

INLINE uint32_t largest_magnitude(const float *x, int64_t count) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i most = _mm256_setzero_si256();
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    __m256i bits = _mm256_castps_si256(_mm256_loadu_ps(x + i));
    most = _mm256_max_epu32(most, _mm256_and_si256(bits, magnitude));
  }
  uint32_t lanes[8], largest = 0;
  _mm256_storeu_si256((__m256i *)lanes, most);
  for (uint32_t lane : lanes) largest = lane > largest ? lane : largest;
  for (; i < count; i++) {
    uint32_t bits = bits_of_float(x[i]) & 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}
INLINE void sums_of(const int8_t *codes, int64_t segment, int64_t count, int32_t *sums) {
  for (int64_t begin = 0; begin < count; begin += segment, sums++) {
    const int64_t end = begin + segment < count ? begin + segment : count;
    __m256i sum = _mm256_setzero_si256();
    for (int64_t i = begin; i < end; i += 8)
      sum = _mm256_add_epi32(sum, _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(codes + i))));
    int32_t lanes[8];
    _mm256_storeu_si256((__m256i *)lanes, sum);
    for (int32_t lane : lanes) *sums += lane;
  }
}
INLINE void encode(const float *x, int64_t count, float scale, const pt_input &in, int8_t *codes) {
  const __m256 by = _mm256_set1_ps(scale);
  const __m256 lo = _mm256_set1_ps((float)in.lo), hi = _mm256_set1_ps((float)in.hi);
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    __m256 q = _mm256_div_ps(_mm256_loadu_ps(x + i), by);
    __m256i code = _mm256_cvtps_epi32(_mm256_max_ps(_mm256_min_ps(q, hi), lo)); /* ties to even */
    __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
    _mm_storel_epi64((__m128i *)(codes + i), _mm_packs_epi16(words, words));
  }
  for (; i < count; i++) {
    codes[i] = (int8_t)code_of(x[i], scale, in);
  }
}
}  // namespace

#include "plain_floats.h"
