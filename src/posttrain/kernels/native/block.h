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

/* --------------------------------------------------------------------- the cache of one head */

/* Of a cache that holds codes: the values they stand for are code times scale. */
INLINE constexpr bool holds_codes(int type) { return type >= PT_CACHE_I8; }

/* What the codes of `Type` are multiplied with besides their scale (load_e4m3). */
INLINE constexpr float unit_of(int type) { return type == PT_CACHE_E4M3 ? 256.0f : 1.0f; }

/* 16 elements of a cache of `Type` from element `at` on; those of PT_CACHE_I4 are halves of 16 bytes
 * from byte `at` on. */
template <int Type>
INLINE F32 load_cached(const void *cache, int64_t at, bool upper = false) {
  if constexpr (Type == PT_CACHE_F32) return load_floats((const float *)cache + at);
  else if constexpr (Type == PT_CACHE_I8) return to_f32(load_i8((const int8_t *)cache + at));
  else if constexpr (Type == PT_CACHE_E4M3) return load_e4m3((const uint8_t *)cache + at);
  else if constexpr (Type == PT_CACHE_I4) return load_nibbles((const uint8_t *)cache + at, upper);
  else return load_halves<Type == PT_CACHE_F16>((const uint16_t *)cache + at);
}

/* 16 lanes as elements of a cache. */
template <int Type>
INLINE void store_cached(void *to, F32 v) {
  if constexpr (Type == PT_CACHE_F32) store_some((float *)to, v, kPanel);
  else store_halves<Type == PT_CACHE_F16>((uint16_t *)to, v);
}

INLINE void set_nibble(uint8_t *byte, bool upper, uint8_t code) {
  *byte = upper ? (uint8_t)((*byte & 0x0f) | code << 4) : (uint8_t)((*byte & 0xf0) | (code & 0x0f));
}

/* Calls put(i, code) for every channel of one head's key or value x [size]; returns the scale. */
template <int Type, class F>
INLINE uint16_t encode_row(const float *x, int64_t size, F put) {
  pt_input in{};
  in.top = Type == PT_CACHE_I8 ? 127.0f : Type == PT_CACHE_E4M3 ? 448.0f : 7.0f;
  in.lo = -(int32_t)in.top, in.hi = (int32_t)in.top, in.scale_type = PT_F16;
  const float scale = scale_of(largest_magnitude(x, size), in);
  for (int64_t i = 0; i < size; i++)
    put(i, Type == PT_CACHE_E4M3 ? float_to_e4m3(x[i] / scale) : (uint8_t)code_of(x[i], scale, in));
  return float_to_half(scale);
}

/* Stores one head's key and value [head_size] at a position: keys in panels of 16 positions,
 * channel by channel, so that 16 scores come out side by side; values as they are. */
template <int Type>
void remember_codes(const HeadCache &c, int64_t position, const float *key, const float *value) {
  const int64_t size = c.head_size, width = c.value_width, lane = position % kPanel;
  if constexpr (Type == PT_CACHE_I4) {
    uint8_t *keys = (uint8_t *)c.keys + position / kPanel * ceil_div(size, 2) * kPanel + lane;
    uint8_t *values = (uint8_t *)c.values + position * width / 2;
    for (int64_t i = 0; i < width / 2; i++) values[i] = 0;
    c.key_scales[position] = encode_row<Type>(key, size, [&](int64_t i, uint8_t code) {
      set_nibble(keys + i / 2 * kPanel, i % 2, code);
    });
    c.value_scales[position] = encode_row<Type>(value, size, [&](int64_t i, uint8_t code) {
      set_nibble(values + i / (2 * kPanel) * kPanel + i % kPanel, i / kPanel % 2, code);
    });
  } else {
    uint8_t *keys = (uint8_t *)c.keys + (position - lane) * size + lane;
    uint8_t *values = (uint8_t *)c.values + position * width;
    for (int64_t i = size; i < width; i++) values[i] = 0;
    c.key_scales[position] =
        encode_row<Type>(key, size, [&](int64_t i, uint8_t code) { keys[i * kPanel] = code; });
    c.value_scales[position] =
        encode_row<Type>(value, size, [&](int64_t i, uint8_t code) { values[i] = code; });
  }
}

template <int Type>
void remember_as(const HeadCache &c, int64_t position, const float *key, const float *value) {
  if constexpr (holds_codes(Type)) {
    remember_codes<Type>(c, position, key, value);
  } else {
    const int64_t size = c.head_size, width = c.value_width;
    const int64_t first = position / kPanel * size * kPanel + position % kPanel;
    typedef typename std::conditional<Type == PT_CACHE_F32, float, uint16_t>::type Element;
    Element *keys = (Element *)c.keys + first, *values = (Element *)c.values + position * width;
    Element row[kPanel];
    for (int64_t i = 0; i < size; i += kPanel) {
      int64_t count = at_most_16(size - i);
      store_cached<Type>(row, load_some(key + i, count));
      for (int64_t j = 0; j < count; j++) keys[(i + j) * kPanel] = row[j];
      store_cached<Type>(values + i, load_some(value + i, count));
    }
  }
}

/* -------------------------------------------------------------------------------- attention */

/* Scores of R queries with V panels of keys. */
template <int Type, int R, int V>
INLINE void score_panels(const HeadCache &c, const float *const (&q)[R], int64_t panel,
                         float *scores, int64_t ld) {
  const int64_t size = c.head_size, rows = Type == PT_CACHE_I4 ? ceil_div(size, 2) : size;
  const int64_t stride = rows * kPanel;
  F32 sums[R][V];
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int v = 0; v < V; v++) sums[r][v] = set_f32(0.0f);
  auto add_channel = [&](int64_t d, int64_t row, bool upper) INLINE_LAMBDA {
    F32 k[V];
    UNROLL for (int v = 0; v < V; v++)
      k[v] = load_cached<Type>(c.keys, (panel + v) * stride + row * kPanel, upper);
    UNROLL for (int r = 0; r < R; r++) {
      F32 x = set_f32(q[r][d]);
      UNROLL for (int v = 0; v < V; v++) sums[r][v] = fma(k[v], x, sums[r][v]);
    }
  };
  if constexpr (Type == PT_CACHE_I4) {
    for (int64_t row = 0; row < size / 2; row++) {
      add_channel(2 * row, row, false);
      add_channel(2 * row + 1, row, true);
    }
    if (size % 2) add_channel(size - 1, size / 2, false);
  } else {
    for (int64_t d = 0; d < size; d++) add_channel(d, d, false);
  }
  UNROLL for (int v = 0; v < V; v++) {
    F32 scale = set_f32(c.scale * unit_of(Type));
    if constexpr (holds_codes(Type)) scale = mul(scale, load_halves<true>(c.key_scales + (panel + v) * kPanel));
    UNROLL for (int r = 0; r < R; r++) store_some(scores + r * ld + v * kPanel, mul(sums[r][v], scale), kPanel);
  }
}

/* out[r] = sum over positions j of weights[r][j] * values[j], for V vectors of channels. */
template <int Type, int R, int V>
INLINE void mix_values(const HeadCache &c, const float *weights, int64_t ld, int64_t begin,
                       int64_t end, int64_t channel, const float (&total)[R], float *const (&out)[R]) {
  F32 sums[R][V];
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int v = 0; v < V; v++) sums[r][v] = set_f32(0.0f);
  for (int64_t j = begin; j < end; j++) {
    F32 value[V];
    UNROLL for (int v = 0; v < V; v++) {
      if constexpr (Type == PT_CACHE_I4) {
        /* Of a run of 32 channels, known when compiling where vectors come in pairs. */
        const int64_t vector = channel / kPanel + v;
        const bool upper = V % 2 ? vector % 2 : v % 2;
        value[v] = load_cached<Type>(c.values, j * (c.value_width / 2) + vector / 2 * kPanel, upper);
      } else {
        value[v] = load_cached<Type>(c.values, j * c.value_width + channel + v * kPanel);
      }
    }
    UNROLL for (int r = 0; r < R; r++) {
      F32 w = set_f32(weights[r * ld + j - begin]);
      UNROLL for (int v = 0; v < V; v++) sums[r][v] = fma(value[v], w, sums[r][v]);
    }
  }
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int v = 0; v < V; v++) {
      int64_t at = channel + v * kPanel, count = at_most_16(c.head_size - at);
      if (count > 0) store_some(out[r] + at, divide(sums[r][v], set_f32(total[r])), count);
    }
}

/* Scores of one query become e^(score - largest), 0 outside [begin, end), times the scales of the
 * values; the sum of those powers. */
template <int Type>
INLINE float soften(const HeadCache &c, float *scores, int64_t origin, int64_t begin, int64_t end,
                    int64_t padded_end) {
  if (c.soft_cap > 0) soft_cap(scores, c.soft_cap, padded_end - origin);
  F32 most = set_f32(-__builtin_inff()), sum = set_f32(0.0f);
  auto seen = [&](F32 v, int64_t j, float other) INLINE_LAMBDA {
    return j >= begin && j + kPanel <= end ? v : within(v, begin - j, end - j, other);
  };
  for (int64_t j = origin; j < padded_end; j += kPanel)
    most = maximum(seen(load_floats(scores + j - origin), j, -__builtin_inff()), most);
  most = set_f32(largest_lane(most));
  for (int64_t j = origin; j < padded_end; j += kPanel) {
    F32 e = exponential(subtract(load_floats(scores + j - origin), most));
    e = seen(e, j, 0.0f);
    sum = add(sum, e);
    F32 weight = e;
    if constexpr (holds_codes(Type)) { /* lanes beyond `end` may hold anything */
      F32 scale = seen(load_halves<true>(c.value_scales + j), j, 0.0f);
      weight = mul(mul(e, set_f32(unit_of(Type))), scale);
    }
    store_some(scores + j - origin, weight, kPanel);
  }
  return sum_lanes(sum);
}

/* R queries, the r-th at position[r], over one head's cache. */
template <int Type, int R>
void attend_rows(const HeadCache &c, const float *const (&q)[R], const int64_t (&position)[R],
                 float *const (&out)[R], float *scores) {
  int64_t first = position[0], last = position[0];
  for (int r = 1; r < R; r++) {
    first = position[r] < first ? position[r] : first;
    last = position[r] > last ? position[r] : last;
  }
  auto begin_of = [&](int64_t p) { return c.window && p >= c.window ? p - c.window + 1 : (int64_t)0; };
  const int64_t origin = begin_of(first) / kPanel * kPanel;
  const int64_t panels = ceil_div(last + 1 - origin, kPanel), ld = panels * kPanel;
  for (int64_t p = 0; p < panels;) {
    with_count<kAttentionTile.panels>(panels - p, [&](auto count) {
      score_panels<Type, R, decltype(count)::value>(c, q, origin / kPanel + p, scores + p * kPanel, ld);
      p += count.value;
    });
  }
  float total[R];
  for (int r = 0; r < R; r++)
    total[r] = soften<Type>(c, scores + r * ld, origin, begin_of(position[r]), position[r] + 1, origin + ld);
  const int64_t vectors = c.value_width / kPanel;
  for (int64_t v = 0; v < vectors;) {
    with_count<kAttentionTile.panels>(vectors - v, [&](auto count) {
      mix_values<Type, R, decltype(count)::value>(c, scores, ld, origin, last + 1, v * kPanel, total, out);
      v += count.value;
    });
  }
}

/* Calls f(Constant<type>) for the type of a cache. */
template <class F>
INLINE void with_cache_type(int32_t type, F f) {
  switch (type) {
    case PT_CACHE_F32: return f(Constant<PT_CACHE_F32>{});
    case PT_CACHE_F16: return f(Constant<PT_CACHE_F16>{});
    case PT_CACHE_BF16: return f(Constant<PT_CACHE_BF16>{});
    case PT_CACHE_I8: return f(Constant<PT_CACHE_I8>{});
    case PT_CACHE_E4M3: return f(Constant<PT_CACHE_E4M3>{});
    case PT_CACHE_I4: return f(Constant<PT_CACHE_I4>{});
  }
}

void remember(const HeadCache &c, int64_t position, const float *key, const float *value) {
  with_cache_type(c.type, [&](auto type) { remember_as<decltype(type)::value>(c, position, key, value); });
}

/* `heads` query heads of `tokens` tokens from `position` on, all of which see this cache head.
 * q and out: [tokens, ld], heads side by side. `scores`: attention_scratch(...) floats. */
void attend(const HeadCache &c, const float *q, int64_t ld, int64_t heads, int64_t tokens,
            int64_t position, float *out, float *scores) {
  const int64_t rows = heads * tokens;
  auto at = [&](int64_t row) { return row / heads * ld + row % heads * c.head_size; };
  with_cache_type(c.type, [&](auto type) {
    for (int64_t row = 0; row < rows;) {
      with_count<kAttentionTile.tokens>(rows - row, [&](auto count) {
        constexpr int n = decltype(count)::value;
        const float *from[n];
        float *to[n];
        int64_t positions[n];
        for (int r = 0; r < n; r++) {
          from[r] = q + at(row + r), to[r] = out + at(row + r);
          positions[r] = position + (row + r) / heads;
        }
        attend_rows<decltype(type)::value, n>(c, from, positions, to, scores);
        row += n;
      });
    }
  });
}

}  // namespace
