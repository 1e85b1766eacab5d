/* What lies between the products of a decoder block, written once over the vectors of an instruction
 * set: included after product.h. As there, a result is the same to the bit on every instruction set
 * and whatever is computed beside it: each sum is formed in one order, fixed by the position of its
 * terms.
 */

namespace {

/* ----------------------------------------------------------------------- elementary functions */

/* e^x to 2 ulp (Cephes' polynomial) for x clamped to [-87, 88]. NaN stays NaN: of a comparison with
 * it, maximum and minimum give the second operand. */
INLINE F32 exponential(F32 x) {
  x = minimum(set_f32(88.0f), maximum(set_f32(-87.0f), x));
  I32 n = rounded(mul(x, set_f32(1.44269504f)));
  F32 whole = to_f32(n);
  F32 r = fma(whole, set_f32(-0.693359375f), x);
  r = fma(whole, set_f32(2.12194440e-4f), r);
  F32 p = set_f32(1.9875691500e-4f);
  p = fma(p, r, set_f32(1.3981999507e-3f));
  p = fma(p, r, set_f32(8.3334519073e-3f));
  p = fma(p, r, set_f32(4.1665795894e-2f));
  p = fma(p, r, set_f32(1.6666665459e-1f));
  p = fma(p, r, set_f32(5.0000001201e-1f));
  p = add(fma(p, mul(r, r), r), set_f32(1.0f));
  return times_power_of_two(p, n);
}

INLINE F32 sigmoid(F32 x) {
  F32 one = set_f32(1.0f);
  return divide(one, add(one, exponential(subtract(set_f32(0.0f), x))));
}

/* tanh x = 1 - 2 / (1 + e^2x) */
INLINE F32 hyperbolic_tangent(F32 x) {
  return subtract(mul(set_f32(2.0f), sigmoid(mul(set_f32(2.0f), x))), set_f32(1.0f));
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
    case PT_SILU: return mul(x, sigmoid(x));
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

/* y = x / sqrt(mean(x^2) + eps) * gain; x and y may be the same. */
void rms_norm(const float *x, const float *gain, float eps, int64_t n, float *y) {
  F32 squares[4] = {set_f32(0.0f), set_f32(0.0f), set_f32(0.0f), set_f32(0.0f)};
  for (int64_t i = 0; i < n; i += kPanel) {
    F32 v = load_some(x + i, at_most_16(n - i));
    squares[i / kPanel % 4] = fma(v, v, squares[i / kPanel % 4]);
  }
  float sum = sum_lanes(add(add(squares[0], squares[1]), add(squares[2], squares[3])));
  F32 scale = set_f32(1.0f / __builtin_sqrtf(sum / (float)n + eps));
  for (int64_t i = 0; i < n; i += kPanel) {
    int64_t count = at_most_16(n - i);
    F32 v = mul(load_some(x + i, count), scale);
    store_some(y + i, gain ? mul(v, load_some(gain + i, count)) : v, count);
  }
}

/* gate = act(gate) * up */
void gated(int32_t kind, float *gate, const float *up, int64_t n) {
  for (int64_t i = 0; i < n; i += kPanel) {
    int64_t count = at_most_16(n - i);
    F32 g = activate(kind, load_some(gate + i, count));
    store_some(gate + i, mul(g, load_some(up + i, count)), count);
  }
}

/* x += scale * y */
void accumulate(float *x, const float *y, float scale, int64_t n) {
  for (int64_t i = 0; i < n; i += kPanel) {
    int64_t count = at_most_16(n - i);
    F32 sum = fma(load_some(y + i, count), set_f32(scale), load_some(x + i, count));
    store_some(x + i, sum, count);
  }
}

/* One head, its first `rotary` channels rotated in pairs (i, i + rotary / 2) by the angles whose
 * cosines, then sines, are given. */
void rotate_positions(float *head, const float *angles, int64_t rotary) {
  const int64_t half = rotary / 2;
  for (int64_t i = 0; i < half; i += kPanel) {
    int64_t count = at_most_16(half - i);
    F32 c = load_some(angles + i, count), s = load_some(angles + half + i, count);
    F32 a = load_some(head + i, count), b = load_some(head + half + i, count);
    store_some(head + i, subtract(mul(a, c), mul(b, s)), count);
    store_some(head + half + i, fma(b, c, mul(a, s)), count);
  }
}

/* logits = cap * tanh(logits / cap) */
void soft_cap(float *x, float cap, int64_t n) {
  for (int64_t i = 0; i < n; i += kPanel) {
    int64_t count = at_most_16(n - i);
    F32 t = hyperbolic_tangent(divide(load_some(x + i, count), set_f32(cap)));
    store_some(x + i, mul(t, set_f32(cap)), count);
  }
}

/* log sum e^x over n more of the numbers x, in runs that stay in the first cache: one pass over memory.
 * All calls but the last bring whole runs. */
void add_partition(const float *x, int64_t n, PartitionSum &partition) {
  const int64_t run = kPartitionRun;
  const float nothing = -__builtin_inff();
  float largest = partition.largest;
  if (largest == __builtin_inff()) return;
  F32 sums[4];
  for (int i = 0; i < 4; i++) sums[i] = load_floats(partition.sums[i]);
  for (int64_t begin = 0; begin < n; begin += run) {
    const int64_t end = begin + run < n ? begin + run : n;
    auto load = [&](int64_t i) INLINE_LAMBDA {
      return i + kPanel <= end ? load_floats(x + i) : within(load_some(x + i, end - i), 0, end - i, nothing);
    };
    F32 most = set_f32(largest);
    for (int64_t i = begin; i < end; i += kPanel) most = maximum(load(i), most);
    const float before = largest;
    largest = largest_lane(most);
    if (largest == nothing) continue;
    if (largest - largest != 0) break; /* infinite */
    const F32 less = exponential(subtract(set_f32(before), set_f32(largest)));
    if (largest > before)
      UNROLL for (int i = 0; i < 4; i++) sums[i] = mul(sums[i], less);
    for (int64_t i = begin; i < end; i += kPanel) {
      F32 e = exponential(subtract(load(i), set_f32(largest)));
      if (i + kPanel > end) e = within(e, 0, end - i, 0.0f);
      sums[i / kPanel % 4] = add(sums[i / kPanel % 4], e);
    }
  }
  partition.largest = largest;
  for (int i = 0; i < 4; i++) store_some(partition.sums[i], sums[i], kPanel);
}

float log_partition(const PartitionSum &partition) {
  if (partition.largest - partition.largest != 0) return partition.largest; /* no number yet, or infinite */
  F32 sums[4];
  for (int i = 0; i < 4; i++) sums[i] = load_floats(partition.sums[i]);
  return partition.largest + __builtin_logf(sum_lanes(add(add(sums[0], sums[1]), add(sums[2], sums[3]))));
}

}  // namespace
