/* The vectors of AVX-512 with VNNI, for avx512.cpp and amx.cpp. */
#include <immintrin.h>

namespace {
#include "scalar.h"


/* 4 panels x 6 tokens: 24 sums, 4 weights and 1 activation in 32 registers; where groups have scales,
 * 4 x 3: 12 integer sums and as many floats. */
static const int kGemvTokens = 4;
static constexpr TileShape kTile = {4, 6}, kGroupedTile = {4, 3}, kFloatTile = {4, 5};
static const bool kDigitsAreFast = true; /* see pt_digits_are_fast */
static const bool kManyRegisters = true; /* for weights of several panels decoded side by side */
static const int kRun = kUnit / 2; /* columns of a tile's loop at a time */
static constexpr TileShape kAttentionTile = {4, 6}; /* vectors, queries */

struct Bytes { __m512i v; };
struct Quad { __m512i v; };
struct I32 { __m512i v; };
struct F32 { __m512 v; };
template <int Bits> struct FloatTable { __m512 v[Bits > 4 ? 1 << (Bits - 4) : 1]; };
template <> struct FloatTable<7> { const float *values; };
template <> struct FloatTable<8> { const float *values; };

INLINE Bytes load_bytes(const uint8_t *from) { return {_mm512_loadu_si512(from)}; }
INLINE void store_bytes(uint8_t *to, Bytes b) { _mm512_storeu_si512(to, b.v); }
template <int Shift, int Bits>
INLINE Bytes field(Bytes b) {
  __m512i shifted = Shift ? _mm512_srli_epi16(b.v, Shift) : b.v;
  return {_mm512_and_si512(shifted, _mm512_set1_epi8((1 << Bits) - 1))};
}
/* low | bits [From, From + Bits) of every byte, moved to bit To */
template <int From, int Bits, int To>
INLINE Bytes insert(Bytes low, Bytes b) {
  __m512i moved = From > To   ? _mm512_srli_epi16(b.v, From > To ? From - To : 0)
                  : From < To ? _mm512_slli_epi16(b.v, To > From ? To - From : 0)
                              : b.v;
  const __m512i mask = _mm512_set1_epi8((char)(((1 << Bits) - 1) << To));
  return {_mm512_ternarylogic_epi32(low.v, moved, mask, 0xf8)}; /* low | (moved & mask) */
}
INLINE void opaque(Bytes &b) { __asm__ volatile("" : "+v"(b.v)); }
/* Where gcc has other uses for the registers it reads weights anew for every token: it may not. */
INLINE void hold(Bytes &b) { opaque(b); }
INLINE Bytes repeat16(const uint8_t *table) {
  return {_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table))};
}
INLINE Bytes look_up(Bytes table, Bytes index) { return {_mm512_shuffle_epi8(table.v, index.v)}; }

INLINE Quad broadcast4(const int8_t *from) {
  int32_t four;
  __builtin_memcpy(&four, from, 4);
  return {_mm512_set1_epi32(four)};
}
INLINE I32 set_i32(int32_t value) { return {_mm512_set1_epi32(value)}; }
INLINE I32 add(I32 a, I32 b) { return {_mm512_add_epi32(a.v, b.v)}; }
template <bool Wide>
INLINE I32 dot(I32 sum, Bytes w, Quad x) {
  /* Not the intrinsic: gcc 12 copies the accumulator around it, a third of a tile's time. */
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum.v) : "v"(w.v), "v"(x.v));
  return sum;
}
/* The same with the 4 activations at x, for a single product with them: no instruction repeats them. */
template <bool Wide>
INLINE I32 dot_at(I32 sum, Bytes w, const int8_t *x) {
  __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum.v) : "v"(w.v), "m"(*(const int32_t *)x));
  return sum;
}
/* 16 pairs of integers of 16 bits; one pair, 16 times; sums of products, pair by pair; 16 lanes, saturated. */
INLINE I32 load_pairs(const int16_t *from) { return {_mm512_loadu_si512(from)}; }
INLINE I32 repeat_pair(const int16_t *from) {
  int32_t two;
  __builtin_memcpy(&two, from, 4);
  return {_mm512_set1_epi32(two)};
}
INLINE I32 dot_pairs(I32 sum, I32 a, I32 b) {
  __asm__("vpdpwssd %2, %1, %0" : "+v"(sum.v) : "v"(a.v), "v"(b.v)); /* as in dot */
  return sum;
}
INLINE void store_shorts(int16_t *to, I32 v) {
  _mm256_storeu_si256((__m256i *)to, _mm512_cvtsepi32_epi16(v.v));
}
INLINE int32_t first_lane(I32 a) { return _mm_cvtsi128_si32(_mm512_castsi512_si128(a.v)); }
INLINE I32 load_bits(const float *from) { return {_mm512_loadu_si512(from)}; }
INLINE void store_bits(float *to, I32 v) { _mm512_storeu_si512(to, v.v); }
INLINE I32 load_u8(const uint8_t *from) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from))};
}
INLINE I32 subtract_product(I32 sum, const uint8_t *zeros, int32_t x) {
  return {_mm512_sub_epi32(sum.v, _mm512_mullo_epi32(load_u8(zeros).v, _mm512_set1_epi32(x)))};
}
template <int J>
INLINE I32 byte_of(Bytes b) {
  if constexpr (J == 3) return {_mm512_srli_epi32(b.v, 24)};
  return {_mm512_and_si512(_mm512_srli_epi32(b.v, 8 * J), _mm512_set1_epi32(255))};
}

/* Byte J of every lane as an index of tables of 2^Bits floats; of those in registers look_up reads as
 * many bits as it needs. */
template <int Bits, int J>
INLINE I32 index_of(Bytes b) {
  if constexpr (Bits > 6) return byte_of<J>(b);
  else return {J ? _mm512_srli_epi32(b.v, 8 * J) : b.v};
}
/* The nibble at bit Shift of every byte, for index_of: what lies above it may stay. */
template <int Shift>
INLINE Bytes index_nibbles(Bytes b) { return {Shift ? _mm512_srli_epi32(b.v, Shift) : b.v}; }
/* kByteBias + byte J of every lane, the byte being the last of that number's fraction. */
static const float kByteBias = 0x1p23f;
template <int J>
INLINE F32 biased_byte(Bytes b) {
  const __m512i bias = _mm512_castps_si512(_mm512_set1_ps(kByteBias));
  if constexpr (J == 0)
    return {_mm512_castsi512_ps(_mm512_ternarylogic_epi32(b.v, bias, _mm512_set1_epi32(255), 0xec))};
  const __m512i place = _mm512_broadcast_i32x4(_mm_set_epi8(0, 0, 0, 12 + J, 0, 0, 0, 8 + J, 0, 0, 0, 4 + J, 0, 0, 0, J));
  return {_mm512_castsi512_ps(_mm512_mask_shuffle_epi8(bias, 0x1111111111111111, b.v, place))};
}

INLINE F32 set_f32(float value) { return {_mm512_set1_ps(value)}; }
INLINE F32 to_f32(I32 a) { return {_mm512_cvtepi32_ps(a.v)}; }
INLINE F32 mul(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
INLINE F32 subtract(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
INLINE F32 add(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
INLINE F32 divide(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
INLINE F32 maximum(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
INLINE F32 minimum(F32 a, F32 b) { return {_mm512_min_ps(a.v, b.v)}; }
INLINE I32 rounded(F32 a) { return {_mm512_cvtps_epi32(a.v)}; } /* ties to even */
/* v 2^n for whole n in [-126, 127] */
INLINE F32 times_power_of_two(F32 v, F32 n) { return {_mm512_scalef_ps(v.v, n.v)}; }
/* Lanes i and i + H, for i with bit H clear, change places. */
template <int H>
INLINE F32 swapped(F32 v) {
  if constexpr (H == 1) return {_mm512_permute_ps(v.v, 0b10110001)};
  else if constexpr (H == 2) return {_mm512_permute_ps(v.v, 0b01001110)};
  else if constexpr (H == 4) return {_mm512_shuffle_f32x4(v.v, v.v, 0b10110001)};
  else return {_mm512_shuffle_f32x4(v.v, v.v, 0b01001110)};
}
/* They become their sum and difference. */
template <int H>
INLINE F32 butterfly(F32 v) {
  constexpr __mmask16 upper = H == 1 ? 0xaaaa : H == 2 ? 0xcccc : H == 4 ? 0xf0f0 : 0xff00;
  const __m512 sign = _mm512_mask_blend_ps(upper, _mm512_set1_ps(1.0f), _mm512_set1_ps(-1.0f));
  return {_mm512_fmadd_ps(v.v, sign, swapped<H>(v).v)};
}
INLINE float first_lane(F32 a) { return _mm512_cvtss_f32(a.v); }
INLINE __mmask16 first(int64_t count) { return (__mmask16)((1u << count) - 1); }
INLINE F32 load_some(const float *from, int64_t count) {
  return {_mm512_maskz_loadu_ps(first(count), from)};
}
INLINE F32 load_floats(const float *from) { return {_mm512_loadu_ps(from)}; }
INLINE void store_some(float *to, F32 v, int64_t count) { _mm512_mask_storeu_ps(to, first(count), v.v); }
template <bool Half>
INLINE F32 load_halves(const uint16_t *from) {
  __m256i bits = _mm256_loadu_si256((const __m256i *)from);
  if constexpr (Half) return {_mm512_cvtph_ps(bits)};
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
template <bool Half>
INLINE void store_halves(uint16_t *to, F32 v) {
  __m256i bits;
  if constexpr (Half) {
    bits = _mm512_cvtps_ph(v.v, _MM_FROUND_TO_NEAREST_INT);
  } else { /* nearest, ties to even; NaN does not occur */
    __m512i word = _mm512_castps_si512(v.v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(word, 16), _mm512_set1_epi32(1));
    word = _mm512_add_epi32(_mm512_add_epi32(word, _mm512_set1_epi32(0x7fff)), odd);
    bits = _mm512_cvtepi32_epi16(_mm512_srli_epi32(word, 16));
  }
  _mm256_storeu_si256((__m256i *)to, bits);
}
INLINE I32 load_i8(const int8_t *from) {
  return {_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from))};
}
/* E4M3 codes, whose values come out times 2^-8: the fields, moved to those of float16, mean that
 * there, and its subnormals cost nothing. */
INLINE F32 load_e4m3(const uint8_t *from) {
  __m256i words = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)from)), 7);
  return {_mm512_cvtph_ps(_mm256_and_si256(words, _mm256_set1_epi16((short)0xbfff)))};
}
/* The lower or upper nibbles of 16 bytes, signed. Of an index the permutation reads four bits. */
INLINE F32 load_nibbles(const uint8_t *from, bool upper) {
  const __m512 values = _mm512_set_ps(-1, -2, -3, -4, -5, -6, -7, -8, 7, 6, 5, 4, 3, 2, 1, 0);
  __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from));
  return {_mm512_permutexvar_ps(upper ? _mm512_srli_epi32(bytes, 4) : bytes, values)};
}
/* Lanes begin <= i < end of v; others are `other`. */
INLINE F32 within(F32 v, int64_t begin, int64_t end, float other) {
  begin = begin < 0 ? 0 : begin > 16 ? 16 : begin, end = end < 0 ? 0 : end > 16 ? 16 : end;
  return {_mm512_mask_mov_ps(_mm512_set1_ps(other), (__mmask16)(first(end) & ~first(begin)), v.v)};
}
INLINE void transpose(F32 (&v)[16]) {
  __m512i a[16], b[16];
  UNROLL for (int i = 0; i < 16; i++) a[i] = _mm512_castps_si512(v[i].v);
  UNROLL for (int i = 0; i < 8; i++) {
    b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
  }
  UNROLL for (int i = 0; i < 4; i++) {
    a[4 * i] = _mm512_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 1] = _mm512_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 2] = _mm512_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
    a[4 * i + 3] = _mm512_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
  }
  UNROLL for (int i = 0; i < 4; i++) {
    b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
    b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
  }
  UNROLL for (int i = 0; i < 8; i++) {
    v[i].v = _mm512_castsi512_ps(_mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
    v[i + 8].v = _mm512_castsi512_ps(_mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
  }
}
/* The lower (0) or upper (1) 16 bits of every lane as a float. */
template <bool Half, int Upper>
INLINE F32 half_lanes(F32 pairs) {
  __m512i word = _mm512_castps_si512(pairs.v);
  if constexpr (Half) return {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(Upper ? _mm512_srli_epi32(word, 16) : word))};
  if constexpr (Upper) return {_mm512_castsi512_ps(_mm512_and_si512(word, _mm512_set1_epi32((int)0xffff0000)))};
  return {_mm512_castsi512_ps(_mm512_slli_epi32(word, 16))};
}
INLINE F32 load_scales(const pt_weight &w, int64_t at) {
  if (!w.scales) return set_f32(1.0f);
  if (w.scale_type == PT_F16) return load_halves<true>((const uint16_t *)w.scales + at);
  if (w.scale_type == PT_F32) return load_floats((const float *)w.scales + at);
  if (w.scale_type == PT_BF16) return load_halves<false>((const uint16_t *)w.scales + at);
  if (w.scale_type == PT_E4M3) return mul(load_e4m3((const uint8_t *)w.scales + at), set_f32(0x1p8f));
  __m512i code = load_u8((const uint8_t *)w.scales + at).v;
  __mmask16 zero = _mm512_testn_epi32_mask(code, code);
  __mmask16 nan = _mm512_cmpeq_epi32_mask(code, _mm512_set1_epi32(255));
  __m512i bits = _mm512_mask_set1_epi32(_mm512_slli_epi32(code, 23), zero, 0x00400000);
  return {_mm512_castsi512_ps(_mm512_mask_set1_epi32(bits, nan, 0x7fc00000))};
}
static const int kFastTables = 4; /* up to how many bits looking up is faster than arithmetic */
template <int Bits>
INLINE FloatTable<Bits> load_table(const float *values) {
  if constexpr (Bits > 6) {
    return {values};
  } else {
    FloatTable<Bits> table;
    constexpr int vectors = sizeof(table.v) / sizeof(table.v[0]);
    for (int i = 0; i < vectors; i++) table.v[i] = load_some(values + 16 * i, Bits < 4 ? 1 << Bits : 16).v;
    return table;
  }
}
template <int Bits>
INLINE F32 look_up(const FloatTable<Bits> &table, I32 index) {
  if constexpr (Bits > 6) {
    return {_mm512_i32gather_ps(index.v, table.values, 4)};
  } else if constexpr (Bits <= 4) {
    return {_mm512_permutexvar_ps(index.v, table.v[0])};
  } else {
    __m512 low = _mm512_permutex2var_ps(table.v[0], index.v, table.v[1]);
    if constexpr (Bits == 5) return {low};
    else {
      __m512 high = _mm512_permutex2var_ps(table.v[2], index.v, table.v[3]);
      __mmask16 upper = _mm512_test_epi32_mask(index.v, _mm512_set1_epi32(32));
      return {_mm512_mask_blend_ps(upper, low, high)};
    }
  }
}
INLINE void prefetch(const uint8_t *from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch((const char *)from + i, _MM_HINT_T0);
}
INLINE void prefetch_far(const uint8_t *from, int64_t bytes) { /* to the second cache */
  for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch((const char *)from + i, _MM_HINT_T1);
}

INLINE uint32_t largest_magnitude(const float *x, int64_t count) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  auto larger = [&](__m512i most, F32 v) INLINE_LAMBDA {
    return _mm512_max_epu32(most, _mm512_and_si512(_mm512_castps_si512(v.v), magnitude));
  };
  __m512i most = _mm512_setzero_si512();
  int64_t i = 0;
  if (count >= 64) { /* one chain would wait for itself */
    __m512i chains[4] = {};
    for (; i + 64 <= count; i += 64)
      UNROLL for (int j = 0; j < 4; j++) chains[j] = larger(chains[j], load_floats(x + i + 16 * j));
    most = _mm512_max_epu32(_mm512_max_epu32(chains[0], chains[1]), _mm512_max_epu32(chains[2], chains[3]));
  }
  for (; i + 16 <= count; i += 16) most = larger(most, load_floats(x + i));
  if (i < count) most = larger(most, load_some(x + i, count - i));
  return _mm512_reduce_max_epu32(most);
}
/* Adds the sums of `count` codes, `segment` by `segment`; both are multiples of 16. */
INLINE void sums_of(const int8_t *codes, int64_t segment, int64_t count, int32_t *sums) {
  const __m512i ones = _mm512_set1_epi8(1), zero = _mm512_setzero_si512();
  auto summed = [&](__m512i sum, const int8_t *at) INLINE_LAMBDA {
    return _mm512_dpbusd_epi32(sum, ones, _mm512_loadu_si512(at));
  };
  /* Of short segments several are summed side by side: the sum across a vector takes a dozen steps. */
  while ((segment == 32 || segment == 64) && count >= 64) {
    const int64_t vectors = count >= 256 ? 4 : count / 64;
    __m512i v[4];
    UNROLL for (int j = 0; j < 4; j++) v[j] = j < vectors ? summed(zero, codes + 64 * j) : zero;
    auto paired = [](__m512i a, __m512i b) INLINE_LAMBDA {
      return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    };
    const __m512i low = paired(v[0], v[1]), high = paired(v[2], v[3]);
    /* In each quarter what the four vectors have there, */
    __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(low, high), _mm512_unpackhi_epi64(low, high));
    /* in the first and the third what they have in their halves. */
    all = _mm512_add_epi32(all, _mm512_shuffle_i64x2(all, all, 0b10110001));
    if (segment == 64) all = _mm512_add_epi32(all, _mm512_shuffle_i64x2(all, all, 0b01001110));
    else all = _mm512_permutexvar_epi32(_mm512_set_epi32(15, 7, 14, 6, 13, 5, 12, 4, 11, 3, 10, 2, 9, 1, 8, 0), all);
    const int64_t done = 64 / segment * vectors;
    _mm512_mask_storeu_epi32(sums, first(done), _mm512_add_epi32(_mm512_maskz_loadu_epi32(first(done), sums), all));
    codes += 64 * vectors, count -= 64 * vectors, sums += done;
  }
  for (; count > 0; codes += segment, count -= segment, sums++) {
    const int64_t end = segment < count ? segment : count;
    __m512i sum = zero, other = zero;
    int64_t i = 0;
    for (; i + 128 <= end; i += 128) sum = summed(sum, codes + i), other = summed(other, codes + i + 64);
    if (i + 64 <= end) sum = summed(sum, codes + i), i += 64;
    /* Codes were written just now, and a load under a mask waits until they have left for the cache. */
    for (; i < end; i += 16) {
      const __m512i some = _mm512_zextsi128_si512(_mm_loadu_si128((const __m128i *)(codes + i)));
      other = _mm512_dpbusd_epi32(other, ones, some);
    }
    *sums += _mm512_reduce_add_epi32(_mm512_add_epi32(sum, other));
  }
}
/* Dividing is slow: where the product with the reciprocal, a few units in its last place away from
 * the quotient, is not next to the middle between two codes, both round to the same code. */
INLINE void encode(const float *x, int64_t count, float scale, const pt_input &in, int8_t *codes) {
  const __m512 by = _mm512_set1_ps(scale), reciprocal = _mm512_set1_ps(1.0f / scale);
  const __m512 hi = _mm512_set1_ps((float)in.hi);
  const __m512i lo = _mm512_set1_epi8((char)in.lo);
  /* What is left of a number rounded to a whole one, ties to even. */
  auto off = [](__m512 q) INLINE_LAMBDA { return _mm512_reduce_ps(q, 0); };
  auto larger = [](__m512 a, __m512 b) INLINE_LAMBDA { return _mm512_range_ps(a, b, 0b1011); }; /* magnitude */
  const bool endless = scale < 0x1p-126f; /* the reciprocal may be infinite */
  auto near_middle = [&](__m512 off) INLINE_LAMBDA {
    return endless || _mm512_cmp_ps_mask(_mm512_abs_ps(off), _mm512_set1_ps(0.4999f), _CMP_NLT_UQ) != 0;
  };
  /* Saturates at -128 only: the upper end is left to `min`, which infinity needs. */
  auto whole = [&](__m512 q) INLINE_LAMBDA { return _mm512_cvtps_epi32(_mm512_min_ps(q, hi)); };
  const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  int64_t i = 0;
  for (; i + 64 <= count; i += 64) {
    __m512 q[4];
    UNROLL for (int j = 0; j < 4; j++) q[j] = _mm512_mul_ps(_mm512_loadu_ps(x + i + 16 * j), reciprocal);
    if (near_middle(larger(larger(off(q[0]), off(q[1])), larger(off(q[2]), off(q[3])))))
      UNROLL for (int j = 0; j < 4; j++) q[j] = _mm512_div_ps(_mm512_loadu_ps(x + i + 16 * j), by);
    const __m512i bytes = _mm512_packs_epi16(_mm512_packs_epi32(whole(q[0]), whole(q[1])),
                                             _mm512_packs_epi32(whole(q[2]), whole(q[3])));
    _mm512_storeu_si512(codes + i, _mm512_max_epi8(_mm512_permutexvar_epi32(order, bytes), lo));
  }
  /* In small groups the largest number, which may lie in the middle, is too often among sixteen. */
  auto sixteen = [&](__m512 v) INLINE_LAMBDA {
    return _mm_max_epi8(_mm512_cvtsepi32_epi8(whole(_mm512_div_ps(v, by))), _mm512_castsi512_si128(lo));
  };
  for (; i + 16 <= count; i += 16) _mm_storeu_si128((__m128i *)(codes + i), sixteen(_mm512_loadu_ps(x + i)));
  if (i < count) _mm_mask_storeu_epi8(codes + i, first(count - i), sixteen(load_some(x + i, count - i).v));
}
}  // namespace
