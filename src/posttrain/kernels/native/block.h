/* What lies between the products of a decoder block, written once over the vectors of an instruction
 * set: included after product.h. As there, a result is the same to the bit on every instruction set
 * and whatever is computed beside it: each sum is formed in one order, fixed by the position of its
 * terms.
 */

namespace {

/* ----------------------------------------------------------------------- elementary functions */

/* e^x for x <= 0, those below -87 as for that. In parts of the result it is off by less than 2e-7 and, for
 * log2(e) is rounded, 1.4e-8 |x|. The polynomial is the one of its degree that is nearest to 2^f, in parts
 * of it, where |f| <= 1/2, of those that are 1 at 0. NaN stays NaN: of a comparison with it, maximum and
 * minimum give the second operand. */
INLINE F32 decay(F32 x) {
  const F32 log2e = set_f32(1.44269504f), in_ones = set_f32(0x1.8p23f); /* so large that nothing is after its point */
  x = maximum(set_f32(-87.0f), x);
  const F32 moved = fma(x, log2e, in_ones), f = fma(x, log2e, subtract(in_ones, moved));
  F32 p = set_f32(1.326472731e-3f);
  p = fma(p, f, set_f32(9.671512991e-3f));
  p = fma(p, f, set_f32(5.550733581e-2f));
  p = fma(p, f, set_f32(2.402224243e-1f));
  p = fma(p, f, set_f32(6.931470037e-1f));
  p = fma(p, f, set_f32(1.0f));
  return times_power_of_two(p, subtract(moved, in_ones));
}

/* The same for any x, those above 88 as for that. */
INLINE F32 exponential(F32 x) { return decay(minimum(set_f32(88.0f), x)); }

/* y / (1 + e^-x), which is y times the sigmoid of x. */
INLINE F32 times_sigmoid(F32 y, F32 x) {
  return divide(y, add(set_f32(1.0f), exponential(subtract(set_f32(0.0f), x))));
}

/* tanh x = 2 / (1 + e^-2x) - 1 */
INLINE F32 hyperbolic_tangent(F32 x) {
  return subtract(times_sigmoid(set_f32(2.0f), mul(set_f32(2.0f), x)), set_f32(1.0f));
}

/* erf x to 2e-7 (Abramowitz and Stegun 7.1.26). */
INLINE F32 error_function(F32 x) {
  F32 magnitude = maximum(x, subtract(set_f32(0.0f), x)), one = set_f32(1.0f);
  F32 t = divide(one, fma(magnitude, set_f32(0.3275911f), one));
  F32 p = set_f32(1.061405429f);
  p = fma(p, t, set_f32(-1.453152027f));
  p = fma(p, t, set_f32(1.421413741f));
  p = fma(p, t, set_f32(-0.284496736f));
  p = fma(p, t, set_f32(0.254829592f));
  p = mul(mul(p, t), exponential(subtract(set_f32(0.0f), mul(x, x))));
  F32 positive = subtract(one, p);
  float in[kPanel], out[kPanel]; /* the sign of x */
  store_some(in, x, kPanel);
  store_some(out, positive, kPanel);
  for (int i = 0; i < kPanel; i++) out[i] = in[i] < 0 ? -out[i] : out[i];
  return load_floats(out);
}

INLINE F32 activate(int32_t kind, F32 x) {
  switch (kind) {
    case PT_SILU: return times_sigmoid(x, x);
    case PT_GELU_TANH: {
      F32 cubic = mul(mul(x, mul(x, x)), set_f32(0.044715f));
      F32 t = hyperbolic_tangent(mul(set_f32(0.79788456f), add(x, cubic)));
      return mul(mul(set_f32(0.5f), x), add(set_f32(1.0f), t));
    }
    case PT_GELU: {
      F32 e = error_function(mul(x, set_f32(0.70710678f)));
      return mul(mul(set_f32(0.5f), x), add(set_f32(1.0f), e));
    }
    default: return maximum(x, set_f32(0.0f)); /* PT_RELU */
  }
}

/* Sum, or largest, of the lanes: by halves, always in this order. */
INLINE float sum_lanes(F32 v) {
  v = add(v, swapped<8>(v)), v = add(v, swapped<4>(v));
  v = add(v, swapped<2>(v)), v = add(v, swapped<1>(v));
  return first_lane(v);
}
INLINE float largest_lane(F32 v) {
  v = maximum(v, swapped<8>(v)), v = maximum(v, swapped<4>(v));
  v = maximum(v, swapped<2>(v)), v = maximum(v, swapped<1>(v));
  return first_lane(v);
}

INLINE int64_t at_most_16(int64_t count) { return count < kPanel ? count : kPanel; }

/* --------------------------------------------------------------------------- rows of floats */

/* f(i, how many) for the vectors of n numbers: 16, known when compiling, for whole ones, as vectors are stored
 * slowly in part. */
template <class F>
INLINE void for_vectors(int64_t n, F f) {
  int64_t i = 0;
  for (; i + kPanel <= n; i += kPanel) f(i, Constant<kPanel>{});
  if (i < n) f(i, n - i);
}

/* The same with sums, of which four are formed side by side, as each waits for the one before:
 * f(i, how many, the sum that the vector is for). */
struct FourSums {
  F32 at[4];
};
template <class F>
INLINE void for_vectors(int64_t n, FourSums &sums, F f) {
  int64_t i = 0;
  for (; i + 4 * kPanel <= n; i += 4 * kPanel)
    UNROLL for (int j = 0; j < 4; j++) f(i + j * kPanel, Constant<kPanel>{}, sums.at[j]);
  UNROLL for (int j = 0; j < 4; j++)
    if (i + j * kPanel < n) f(i + j * kPanel, at_most_16(n - i - j * kPanel), sums.at[j]);
}
INLINE FourSums four_times(F32 v) { return {{v, v, v, v}}; }
INLINE float sum_lanes(const FourSums &s) { return sum_lanes(add(add(s.at[0], s.at[1]), add(s.at[2], s.at[3]))); }
INLINE float largest_lane(const FourSums &s) {
  return largest_lane(maximum(maximum(s.at[0], s.at[1]), maximum(s.at[2], s.at[3])));
}

/* y = x / sqrt(mean(x^2) + eps) * gain; x and y may be the same. */
void rms_norm(const float *x, const float *gain, float eps, int64_t n, float *y) {
  FourSums squares = four_times(set_f32(0.0f));
  for_vectors(n, squares, [&](int64_t i, auto count, F32 &sum) INLINE_LAMBDA {
    F32 v = load_some(x + i, count);
    sum = fma(v, v, sum);
  });
  F32 scale = set_f32(1.0f / __builtin_sqrtf(sum_lanes(squares) / (float)n + eps));
  for_vectors(n, [&](int64_t i, auto count) INLINE_LAMBDA {
    F32 v = mul(load_some(x + i, count), scale);
    store_some(y + i, gain ? mul(v, load_some(gain + i, count)) : v, count);
  });
}

/* gate = act(gate) * up */
void gated(int32_t kind, float *gate, const float *up, int64_t n) {
  for_vectors(n, [&](int64_t i, auto count) INLINE_LAMBDA {
    F32 g = activate(kind, load_some(gate + i, count));
    store_some(gate + i, mul(g, load_some(up + i, count)), count);
  });
}

/* x += scale * y */
void accumulate(float *x, const float *y, float scale, int64_t n) {
  for_vectors(n, [&](int64_t i, auto count) INLINE_LAMBDA {
    store_some(x + i, fma(load_some(y + i, count), set_f32(scale), load_some(x + i, count)), count);
  });
}

/* One head, its first `rotary` channels rotated in pairs (i, i + rotary / 2) by the angles whose
 * cosines, then sines, are given. */
void rotate_positions(float *head, const float *angles, int64_t rotary) {
  const int64_t half = rotary / 2;
  for_vectors(half, [&](int64_t i, auto count) INLINE_LAMBDA {
    F32 c = load_some(angles + i, count), s = load_some(angles + half + i, count);
    F32 a = load_some(head + i, count), b = load_some(head + half + i, count);
    store_some(head + i, subtract(mul(a, c), mul(b, s)), count);
    store_some(head + half + i, fma(b, c, mul(a, s)), count);
  });
}

/* logits = cap * tanh(logits / cap) */
void soft_cap(float *x, float cap, int64_t n) {
  for_vectors(n, [&](int64_t i, auto count) INLINE_LAMBDA {
    F32 t = hyperbolic_tangent(divide(load_some(x + i, count), set_f32(cap)));
    store_some(x + i, mul(t, set_f32(cap)), count);
  });
}

/* log sum e^x over n more of the numbers x, in runs that stay in the first cache: one pass over memory.
 * All calls but the last bring whole runs. */
void add_partition(const float *x, int64_t n, PartitionSum &partition) {
  const int64_t run = kPartitionRun;
  const float nothing = -__builtin_inff();
  float largest = partition.largest;
  if (largest == __builtin_inff()) return;
  FourSums sums;
  for (int i = 0; i < 4; i++) sums.at[i] = load_floats(partition.sums[i]);
  for (int64_t begin = 0; begin < n; begin += run, x += run) {
    const int64_t count = begin + run < n ? run : n - begin;
    FourSums most = four_times(set_f32(largest));
    for_vectors(count, most, [&](int64_t i, auto some, F32 &v) INLINE_LAMBDA {
      v = maximum(some == kPanel ? load_floats(x + i) : within(load_some(x + i, some), 0, some, nothing), v);
    });
    const float before = largest;
    largest = largest_lane(most);
    if (largest == nothing) continue;
    if (largest - largest != 0) break; /* infinite */
    const F32 less = decay(subtract(set_f32(before), set_f32(largest)));
    if (largest > before)
      UNROLL for (int i = 0; i < 4; i++) sums.at[i] = mul(sums.at[i], less);
    for_vectors(count, sums, [&](int64_t i, auto some, F32 &sum) INLINE_LAMBDA {
      F32 e = decay(subtract(load_some(x + i, some), set_f32(largest)));
      sum = add(sum, some == kPanel ? e : within(e, 0, some, 0.0f));
    });
  }
  partition.largest = largest;
  for (int i = 0; i < 4; i++) store_some(partition.sums[i], sums.at[i], kPanel);
}

float log_partition(const PartitionSum &partition) {
  if (partition.largest - partition.largest != 0) return partition.largest; /* no number yet, or infinite */
  FourSums sums;
  for (int i = 0; i < 4; i++) sums.at[i] = load_floats(partition.sums[i]);
  return partition.largest + __builtin_logf(sum_lanes(sums));
}

}  // namespace
