/* Plain C++: works everywhere, and is the reference the other instruction sets are held to. */
#define PT_NO_VECTORS
#include "kernels.h"

namespace {
#include "scalar.h"

#define EACH(i, n) for (int i = 0; i < (n); i++)

static const int kGemvTokens = 1;
static const bool kDigitsAreFast = false; /* see pt_digits_are_fast */
static constexpr TileShape kTile = {1, 1}, kGroupedTile = {1, 1}, kFloatTile = {1, 1};
static const int kRun = kStep; /* columns of a tile's loop at a time */
static constexpr TileShape kAttentionTile = {1, 1}; /* vectors, queries */

struct Bytes { uint8_t at[64]; };
struct Quad { int8_t at[4]; };
struct I32 { int32_t at[16]; };
struct F32 { float at[16]; };
template <int Bits> struct FloatTable { const float *values; };

static inline Bytes load_bytes(const uint8_t *from) {
  Bytes b;
  __builtin_memcpy(b.at, from, 64);
  return b;
}
static inline void store_bytes(uint8_t *to, Bytes b) { __builtin_memcpy(to, b.at, 64); }
template <int Shift, int Bits>
static inline Bytes field(Bytes b) {
  EACH(i, 64) b.at[i] = (uint8_t)(b.at[i] >> Shift & ((1 << Bits) - 1));
  return b;
}
/* low | bits [From, From + Bits) of every byte, moved to bit To */
template <int From, int Bits, int To>
static inline Bytes insert(Bytes low, Bytes b) {
  EACH(i, 64) low.at[i] = (uint8_t)(low.at[i] | (b.at[i] >> From & ((1 << Bits) - 1)) << To);
  return low;
}
static inline void opaque(Bytes &b) { __asm__ volatile("" : "+m"(b)); }
static inline void hold(Bytes &) {}
static inline Bytes repeat16(const uint8_t *table) {
  Bytes b;
  EACH(i, 64) b.at[i] = table[i % 16];
  return b;
}
static inline Bytes look_up(Bytes table, Bytes index) {
  EACH(i, 64) index.at[i] = table.at[index.at[i]];
  return index;
}

static inline Quad broadcast4(const int8_t *from) {
  Quad q;
  __builtin_memcpy(q.at, from, 4);
  return q;
}
static inline I32 set_i32(int32_t value) {
  I32 v;
  EACH(i, 16) v.at[i] = value;
  return v;
}
static inline I32 add(I32 a, I32 b) {
  EACH(i, 16) a.at[i] += b.at[i];
  return a;
}
template <bool Wide>
static inline I32 dot(I32 sum, Bytes w, Quad x) {
  EACH(i, 16) EACH(j, 4) sum.at[i] += w.at[4 * i + j] * x.at[j];
  return sum;
}
template <bool Wide>
static inline I32 dot_at(I32 sum, Bytes w, const int8_t *x) { return dot<Wide>(sum, w, broadcast4(x)); }
/* 16 pairs of integers of 16 bits; one pair, 16 times; sums of products, pair by pair; 16 lanes, saturated. */
static inline I32 load_pairs(const int16_t *from) {
  I32 a;
  __builtin_memcpy(a.at, from, sizeof a.at);
  return a;
}
static inline I32 repeat_pair(const int16_t *from) {
  int32_t two;
  __builtin_memcpy(&two, from, sizeof two);
  return set_i32(two);
}
static inline I32 dot_pairs(I32 sum, I32 a, I32 b) {
  int16_t x[32], y[32];
  __builtin_memcpy(x, a.at, sizeof x), __builtin_memcpy(y, b.at, sizeof y);
  EACH(i, 16) sum.at[i] += x[2 * i] * y[2 * i] + x[2 * i + 1] * y[2 * i + 1];
  return sum;
}
static inline void store_shorts(int16_t *to, I32 v) {
  EACH(i, 16) to[i] = (int16_t)(v.at[i] > 32767 ? 32767 : v.at[i] < -32768 ? -32768 : v.at[i]);
}
static inline int32_t first_lane(I32 a) { return a.at[0]; }
static inline float first_lane(F32 a) { return a.at[0]; }
static inline I32 load_bits(const float *from) {
  I32 a;
  __builtin_memcpy(a.at, from, sizeof a.at);
  return a;
}
static inline void store_bits(float *to, const I32 &a) { __builtin_memcpy(to, a.at, sizeof a.at); }
static inline I32 load_u8(const uint8_t *from) {
  I32 v;
  EACH(i, 16) v.at[i] = from[i];
  return v;
}
static inline I32 subtract_product(I32 sum, const uint8_t *zeros, int32_t x) {
  EACH(i, 16) sum.at[i] -= zeros[i] * x;
  return sum;
}
template <int J>
static inline I32 byte_of(Bytes b) {
  I32 v;
  EACH(i, 16) v.at[i] = b.at[4 * i + J];
  return v;
}

static inline F32 set_f32(float value) {
  F32 v;
  EACH(i, 16) v.at[i] = value;
  return v;
}
static inline F32 to_f32(I32 a) {
  F32 v;
  EACH(i, 16) v.at[i] = (float)a.at[i];
  return v;
}
static inline F32 mul(F32 a, F32 b) {
  EACH(i, 16) a.at[i] *= b.at[i];
  return a;
}
static inline F32 subtract(F32 a, F32 b) {
  EACH(i, 16) a.at[i] -= b.at[i];
  return a;
}
/* Lanes i and i + H, for i with bit H clear, change places. */
template <int H>
static inline F32 swapped(F32 v) {
  F32 out;
  EACH(i, 16) out.at[i] = v.at[i ^ H];
  return out;
}
/* They become their sum and difference. */
template <int H>
static inline F32 butterfly(F32 v) {
  F32 out;
  EACH(i, 16) out.at[i] = i & H ? v.at[i ^ H] - v.at[i] : v.at[i] + v.at[i ^ H];
  return out;
}
static inline F32 fma(F32 a, F32 b, F32 c) {
  EACH(i, 16) c.at[i] = __builtin_fmaf(a.at[i], b.at[i], c.at[i]);
  return c;
}
static inline F32 add(F32 a, F32 b) {
  EACH(i, 16) a.at[i] += b.at[i];
  return a;
}
static inline F32 divide(F32 a, F32 b) {
  EACH(i, 16) a.at[i] /= b.at[i];
  return a;
}
static inline F32 maximum(F32 a, F32 b) {
  EACH(i, 16) a.at[i] = a.at[i] > b.at[i] ? a.at[i] : b.at[i];
  return a;
}
static inline F32 minimum(F32 a, F32 b) {
  EACH(i, 16) a.at[i] = a.at[i] < b.at[i] ? a.at[i] : b.at[i];
  return a;
}
static inline I32 rounded(F32 a) {
  I32 v;
  EACH(i, 16) v.at[i] = (int32_t)__builtin_rintf(a.at[i]);
  return v;
}
/* v 2^n for whole n in [-126, 127] */
static inline F32 times_power_of_two(F32 v, F32 n) {
  const I32 exponent = rounded(n);
  EACH(i, 16) v.at[i] *= float_of_bits((uint32_t)(exponent.at[i] + 127) << 23);
  return v;
}
static inline F32 load_some(const float *from, int64_t count) {
  F32 v = set_f32(0.0f); /* rows of 16-bit weights start anywhere */
  __builtin_memcpy(v.at, from, (uint64_t)count * sizeof(float));
  return v;
}
static inline F32 load_floats(const float *from) { return load_some(from, 16); }
static inline void store_some(float *to, F32 v, int64_t count) { EACH(i, count) to[i] = v.at[i]; }
template <bool Half>
static inline F32 load_halves(const uint16_t *from) {
  F32 v;
  EACH(i, 16) v.at[i] = Half ? half_to_float(from[i]) : bfloat16_to_float(from[i]);
  return v;
}
template <bool Half>
static inline void store_halves(uint16_t *to, F32 v) {
  EACH(i, 16) to[i] = Half ? float_to_half(v.at[i]) : float_to_bfloat16(v.at[i]);
}
static inline I32 load_i8(const int8_t *from) {
  I32 v;
  EACH(i, 16) v.at[i] = from[i];
  return v;
}
/* E4M3 codes, whose values come out times 2^-8. */
static inline F32 load_e4m3(const uint8_t *from) {
  F32 v;
  EACH(i, 16) v.at[i] = e4m3_to_float(from[i]) * 0x1p-8f;
  return v;
}
/* The lower or upper nibbles of 16 bytes, signed. */
static inline F32 load_nibbles(const uint8_t *from, bool upper) {
  F32 v;
  EACH(i, 16) v.at[i] = (float)((((from[i] >> (upper ? 4 : 0)) & 15) ^ 8) - 8);
  return v;
}
/* Lanes begin <= i < end of v; others are `other`. */
static inline F32 within(F32 v, int64_t begin, int64_t end, float other) {
  EACH(i, 16) v.at[i] = i >= begin && i < end ? v.at[i] : other;
  return v;
}
static inline void transpose(F32 (&v)[16]) { transpose_lanes(v); }
template <bool Half, int Upper>
static inline F32 half_lanes(F32 pairs) {
  uint16_t halves[32];
  __builtin_memcpy(halves, &pairs, sizeof halves);
  EACH(i, 16) {
    uint16_t half = halves[2 * i + Upper];
    pairs.at[i] = Half ? half_to_float(half) : bfloat16_to_float(half);
  }
  return pairs;
}
static inline F32 load_scales(const pt_weight &w, int64_t at) {
  F32 v;
  EACH(i, 16) v.at[i] = w.scales ? scale_at(w.scales, w.scale_type, at + i) : 1.0f;
  return v;
}
template <int Bits>
static inline FloatTable<Bits> load_table(const float *values) { return {values}; }
template <int Bits>
static inline F32 look_up(const FloatTable<Bits> &table, I32 index) {
  F32 v;
  EACH(i, 16) v.at[i] = table.values[index.at[i]];
  return v;
}
static inline void prefetch(const uint8_t *, int64_t) {}
static inline void prefetch_far(const uint8_t *, int64_t) {}

static inline uint32_t largest_magnitude(const float *x, int64_t count) {
  uint32_t most = 0;
  EACH(i, count) {
    uint32_t bits = bits_of_float(x[i]) & 0x7fffffffu;
    most = bits > most ? bits : most;
  }
  return most;
}
static inline void sums_of(const int8_t *codes, int64_t segment, int64_t count, int32_t *sums) {
  EACH(i, count) sums[i / segment] += codes[i];
}
static inline void encode(const float *x, int64_t count, float scale, const pt_input &in,
                          int8_t *codes) {
  EACH(i, count) codes[i] = (int8_t)code_of(x[i], scale, in);
}
}  // namespace

#include "plain_floats.h"
#include "product.h"

const Kernels *portable_kernels() {
  static const Kernels kernels = kernels_named("portable");
  return &kernels;
}
