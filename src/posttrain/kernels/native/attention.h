/* The cache of keys and values, and attention over it, over the vectors of an instruction set: included
 * after block.h, to whose law it keeps.
 */

namespace {

/* --------------------------------------------------------------------- the cache of one head */

/* Of a cache that holds codes: the values they stand for are code times scale. */
INLINE constexpr bool holds_codes(int type) { return type >= PT_CACHE_I8; }

/* The scales of 16 positions. */
template <int Type>
INLINE F32 load_scales(const void *scales, int64_t position) {
  if constexpr (Type == PT_CACHE_I16) return load_floats((const float *)scales + position);
  else return load_halves<true>((const uint16_t *)scales + position);
}

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
  uint16_t &key_scale = ((uint16_t *)c.key_scales)[position];
  uint16_t &value_scale = ((uint16_t *)c.value_scales)[position];
  if constexpr (Type == PT_CACHE_I4) {
    uint8_t *keys = (uint8_t *)c.keys + position / kPanel * ceil_div(size, 2) * kPanel + lane;
    uint8_t *values = (uint8_t *)c.values + position * width / 2;
    for (int64_t i = 0; i < width / 2; i++) values[i] = 0;
    key_scale = encode_row<Type>(key, size, [&](int64_t i, uint8_t code) {
      set_nibble(keys + i / 2 * kPanel, i % 2, code);
    });
    value_scale = encode_row<Type>(value, size, [&](int64_t i, uint8_t code) {
      set_nibble(values + i / (2 * kPanel) * kPanel + i % kPanel, i / kPanel % 2, code);
    });
  } else {
    uint8_t *keys = (uint8_t *)c.keys + (position - lane) * size + lane;
    uint8_t *values = (uint8_t *)c.values + position * width;
    for (int64_t i = size; i < width; i++) values[i] = 0;
    key_scale = encode_row<Type>(key, size, [&](int64_t i, uint8_t code) { keys[i * kPanel] = code; });
    value_scale = encode_row<Type>(value, size, [&](int64_t i, uint8_t code) { values[i] = code; });
  }
}

/* v clamped to [-top, top], NaN to top, as 16 integers of 16 bits. */
INLINE void store_clamped(int16_t *to, F32 v, float top) {
  store_shorts(to, rounded(maximum(minimum(v, set_f32(top)), set_f32(-top))));
}

/* The same of PT_CACHE_I16: pairs of channels of 16 positions, and pairs of positions, lie side by side. */
void remember_pairs(const HeadCache &c, int64_t position, const float *key, const float *value) {
  pt_input in{};
  in.top = 32767.0f, in.scale_type = PT_F32;
  const int64_t size = c.head_size, pairs = ceil_div(size, 2), lane = position % kPanel;
  int16_t *keys = (int16_t *)c.keys + 2 * ((position - lane) * pairs + lane);
  int16_t *values = (int16_t *)c.values + 2 * (position / 2 * c.value_width) + position % 2;
  const float key_scale = scale_of(largest_magnitude(key, size), in);
  const float value_scale = scale_of(largest_magnitude(value, size), in);
  ((float *)c.key_scales)[position] = key_scale, ((float *)c.value_scales)[position] = value_scale;
  int16_t row[kPanel];
  for (int64_t i = 0; i < size; i += kPanel) {
    const int64_t count = at_most_16(size - i);
    store_clamped(row, divide(load_some(key + i, count), set_f32(key_scale)), in.top);
    for (int64_t j = 0; j < count; j += 2) __builtin_memcpy(keys + (i + j) * kPanel, row + j, 2 * sizeof(int16_t));
    store_clamped(row, divide(load_some(value + i, count), set_f32(value_scale)), in.top);
    for (int64_t j = 0; j < count; j++) values[2 * (i + j)] = row[j];
  }
}

template <int Type>
void remember_as(const HeadCache &c, int64_t position, const float *key, const float *value) {
  if constexpr (Type == PT_CACHE_I16) {
    remember_pairs(c, position, key, value);
  } else if constexpr (holds_codes(Type)) {
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

/* Where queries are too few for a tile they wait for memory, and ask for the keys after these and for values
 * so many positions ahead. */
INLINE constexpr bool waits(int queries) { return queries < kAttentionTile.tokens; }
static const int64_t kPositionsAhead = 16;

/* Bytes of 16 elements; of PT_CACHE_I4 they hold 32. */
INLINE constexpr int64_t vector_bytes(int type) {
  return type == PT_CACHE_F32 || type == PT_CACHE_I16 ? 64 : type < PT_CACHE_I8 ? 32 : 16;
}

/* Scores of R queries with V panels of keys. */
template <int Type, int R, int V>
INLINE void score_panels(const HeadCache &c, const float *const (&q)[R], int64_t panel,
                         float *scores, int64_t ld) {
  const int64_t size = c.head_size, rows = Type == PT_CACHE_I4 ? ceil_div(size, 2) : size;
  const int64_t stride = rows * kPanel;
  F32 sums[R][V];
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int v = 0; v < V; v++) sums[r][v] = set_f32(0.0f);
  const uint8_t *next = (const uint8_t *)c.keys + (panel + V) * rows * vector_bytes(Type);
  auto add_channel = [&](int64_t d, int64_t row, bool upper) INLINE_LAMBDA {
    if constexpr (waits(R)) prefetch(next + row * V * vector_bytes(Type), V * vector_bytes(Type));
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
    if constexpr (holds_codes(Type)) scale = mul(scale, load_scales<Type>(c.key_scales, (panel + v) * kPanel));
    UNROLL for (int r = 0; r < R; r++) store_some(scores + r * ld + v * kPanel, mul(sums[r][v], scale), kPanel);
  }
}

/* out[r] = sum over positions j of weights[r][j] * values[j], for V vectors of channels. */
template <int Type, int R, int V>
INLINE void mix_values(const HeadCache &c, const float *weights, int64_t ld, int64_t begin,
                       int64_t end, int64_t channel, float *const (&out)[R]) {
  F32 sums[R][V];
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int v = 0; v < V; v++) sums[r][v] = set_f32(0.0f);
  const int64_t row_bytes = c.value_width / kPanel * vector_bytes(Type);
  const uint8_t *next = (const uint8_t *)c.values + channel / kPanel * vector_bytes(Type) + kPositionsAhead * row_bytes;
  for (int64_t j = begin; j < end; j++) {
    if constexpr (waits(R)) prefetch(next + j * row_bytes, V * vector_bytes(Type));
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
    UNROLL for (int v = 0; v < V; v++) store_some(out[r] + channel + v * kPanel, sums[r][v], kPanel);
}

/* Positions that softmax goes over at a time. In integers of 16 bits their products with weights share a sum. */
static const int64_t kShortRun = 64;

/* One query's scores with `count` positions from `origin` on, of which it sees [begin, end): whole vectors, the
 * first of a short run. */
struct Scores {
  float *at;
  int64_t origin, count, begin, end;

  Scores(const HeadCache &c, float *at, int64_t position, int64_t origin, int64_t count)
      : at(at), origin(origin), count(count) {
    begin = first_seen(c.window, position) - origin, end = position + 1 - origin;
    if (end > count) end = count;
  }

  /* Calls f(each) for every short run, where each(g) calls g(i, seen, j) for its vectors, the j-th of four:
   * seen(v, other) is v with the lanes that are not seen made other. */
  template <class F>
  INLINE_MEMBER void for_runs(F f) const {
    auto at_an_edge = [&](int64_t run) INLINE_LAMBDA {
      f([&](auto g) INLINE_LAMBDA {
        UNROLL for (int j = 0; j < 4; j++) {
          const int64_t i = run + j * kPanel;
          auto seen = [&](F32 v, float other) INLINE_LAMBDA { return within(v, begin - i, end - i, other); };
          if (i < count) g(i, seen, j);
        }
      });
    };
    int64_t run = 0;
    for (; run < begin && run < count; run += kShortRun) at_an_edge(run);
    for (; run + kShortRun <= end; run += kShortRun) /* known when compiling, as most are seen whole */
      f([&](auto g) INLINE_LAMBDA {
        auto all = [](F32 v, float) INLINE_LAMBDA { return v; };
        UNROLL for (int j = 0; j < 4; j++) g(run + j * kPanel, all, j);
      });
    for (; run < count; run += kShortRun) at_an_edge(run);
  }

  float largest() const {
    FourSums most = four_times(set_f32(-__builtin_inff()));
    for_runs([&](auto each) INLINE_LAMBDA {
      each([&](int64_t i, auto seen, int j) INLINE_LAMBDA {
        most.at[j] = maximum(seen(load_floats(at + i), -__builtin_inff()), most.at[j]);
      });
    });
    return largest_lane(most);
  }
};

/* The sum of e^(score - largest). Of the weights, for PT_CACHE_I16: what those of a short run add up to at most,
 * the largest, and a sum that is infinite or NaN where any of them is. */
struct Softened {
  float total, most_of_run = 0, largest_weight = 0, weights = 0;
};

/* Scores become weights: e^(score - largest), 0 of what is not seen, times the scales of the values. */
template <int Type>
Softened soften(const HeadCache &c, const Scores &scores, float largest) {
  FourSums sums = four_times(set_f32(0.0f));
  F32 most_of_run = set_f32(0.0f), largest_weight = most_of_run, weights = most_of_run;
  scores.for_runs([&](auto each) INLINE_LAMBDA {
    F32 of_run = set_f32(0.0f);
    each([&](int64_t i, auto seen, int j) INLINE_LAMBDA {
      F32 w = seen(decay(subtract(load_floats(scores.at + i), set_f32(largest))), 0.0f);
      sums.at[j] = add(sums.at[j], w);
      if constexpr (holds_codes(Type)) { /* lanes beyond the last may hold anything */
        F32 scale = seen(load_scales<Type>(c.value_scales, scores.origin + i), 0.0f);
        if constexpr (unit_of(Type) != 1) w = mul(w, set_f32(unit_of(Type)));
        w = mul(w, scale);
      }
      if constexpr (Type == PT_CACHE_I16) of_run = add(of_run, w), largest_weight = maximum(w, largest_weight);
      store_some(scores.at + i, w, kPanel);
    });
    if constexpr (Type == PT_CACHE_I16) most_of_run = maximum(of_run, most_of_run), weights = add(weights, of_run);
  });
  Softened s;
  s.total = sum_lanes(sums);
  if constexpr (Type == PT_CACHE_I16) {
    s.most_of_run = sum_lanes(most_of_run), s.weights = sum_lanes(weights);
    s.largest_weight = largest_lane(largest_weight);
  }
  return s;
}

/* ---------------------------------------------------------------- attention in integers of 16 bits */

/* A sum of products of a row's codes with others of 16 bits fits in 32 if the magnitudes of the row's add
 * up to so much at most; roundings add a half for each of up to kMostChannels: 65,512 * 32,768 < 2^31. */
static const float kMostOfRow = 65000.0f;

/* A row [count] as codes of 16 bits, padded with zeros to whole vectors. `sum`: what the magnitudes of those
 * that meet in one sum add up to at most; infinite or NaN where any of the row is. Returns what a code
 * stands for; of rows too small to be seen beside others, zeros, that is 0. */
INLINE float encode_shorts(const float *x, int64_t count, float sum, float largest, int16_t *codes) {
  const bool finite = sum - sum == 0;
  const float bound = sum > 2 * largest ? sum : 2 * largest; /* no code is beyond 16 bits */
  const float factor = finite && bound > 0x1p-100f ? kMostOfRow / bound : 0.0f;
  for_vectors(count, [&](int64_t i, auto some) INLINE_LAMBDA {
    store_shorts(codes + i, rounded(finite ? mul(load_some(x + i, some), set_f32(factor)) : set_f32(0.0f)));
  });
  return !finite ? __builtin_nanf("") : factor > 0 ? 1.0f / factor : 0.0f;
}

INLINE float encode_query(const float *q, int64_t size, int16_t *codes) {
  F32 sum = set_f32(0.0f), most = set_f32(0.0f);
  for (int64_t i = 0; i < size; i += kPanel) {
    F32 v = load_some(q + i, at_most_16(size - i)), magnitude = maximum(v, subtract(set_f32(0.0f), v));
    sum = add(sum, magnitude), most = maximum(magnitude, most);
  }
  return encode_shorts(q, size, sum_lanes(sum), largest_lane(most), codes);
}

/* The weights of one query that `soften` left. */
INLINE float encode_weights(const float *weights, int64_t count, const Softened &s, int16_t *codes) {
  return encode_shorts(weights, count, s.most_of_run + (s.weights - s.weights), s.largest_weight, codes);
}

/* Scores of R queries with V panels of keys. */
template <int R, int V>
INLINE void score_pairs(const HeadCache &c, const int16_t *q, int64_t ldq, const float (&unit)[R], int64_t panel,
                        float *scores, int64_t ld) {
  const int64_t pairs = ceil_div(c.head_size, 2);
  const int16_t *keys = (const int16_t *)c.keys + panel * pairs * 2 * kPanel;
  I32 sums[R][V];
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int v = 0; v < V; v++) sums[r][v] = set_i32(0);
  for (int64_t d = 0; d < pairs; d++) {
    if constexpr (waits(R)) prefetch((const uint8_t *)(keys + (V * pairs + V * d) * 2 * kPanel), V * 64);
    I32 k[V];
    UNROLL for (int v = 0; v < V; v++) k[v] = load_pairs(keys + (v * pairs + d) * 2 * kPanel);
    UNROLL for (int r = 0; r < R; r++) {
      I32 x = repeat_pair(q + r * ldq + 2 * d);
      UNROLL for (int v = 0; v < V; v++) sums[r][v] = dot_pairs(sums[r][v], k[v], x);
    }
  }
  UNROLL for (int v = 0; v < V; v++) {
    F32 scale = mul(set_f32(c.scale), load_scales<PT_CACHE_I16>(c.key_scales, (panel + v) * kPanel));
    UNROLL for (int r = 0; r < R; r++)
      store_some(scores + r * ld + v * kPanel, mul(to_f32(sums[r][v]), mul(scale, set_f32(unit[r]))), kPanel);
  }
}

/* out[r] = unit[r] * sum over positions j of weights[r][j] * values[j], for V vectors of channels. */
template <int R, int V>
INLINE void mix_pairs(const HeadCache &c, const int16_t *weights, int64_t ld, int64_t begin, int64_t end,
                      int64_t channel, const float (&unit)[R], float *const (&out)[R]) {
  const int16_t *values = (const int16_t *)c.values + 2 * channel;
  for (int64_t run = begin; run < end; run += kShortRun) {
    const int64_t run_end = run + kShortRun < end ? run + kShortRun : end;
    I32 sums[R][V];
    UNROLL for (int r = 0; r < R; r++)
      UNROLL for (int v = 0; v < V; v++) sums[r][v] = set_i32(0);
    for (int64_t j = run; j < run_end; j += 2) {
      if constexpr (waits(R)) prefetch((const uint8_t *)(values + (j + kPositionsAhead) * c.value_width), V * 64);
      I32 value[V];
      UNROLL for (int v = 0; v < V; v++) value[v] = load_pairs(values + j * c.value_width + v * 2 * kPanel);
      UNROLL for (int r = 0; r < R; r++) {
        I32 w = repeat_pair(weights + r * ld + j - begin);
        UNROLL for (int v = 0; v < V; v++) sums[r][v] = dot_pairs(sums[r][v], value[v], w);
      }
    }
    UNROLL for (int r = 0; r < R; r++)
      UNROLL for (int v = 0; v < V; v++) {
        float *to = out[r] + channel + v * kPanel;
        F32 sum = to_f32(sums[r][v]);
        if (run > begin) sum = add(load_floats(to), sum);
        store_some(to, run_end == end ? mul(sum, set_f32(unit[r])) : sum, kPanel);
      }
  }
}

/* --------------------------------------------------------------------------------------- runs */

/* Where positions begin that R queries, the r-th at position[r], see of a run, in whole short runs, and where
 * they end. */
struct Sight {
  int64_t origin, end;

  template <int R>
  Sight(const HeadCache &c, const int64_t (&position)[R], int64_t run) {
    origin = run * kAttentionRun, end = 0;
    int64_t first = position[0];
    for (int r = 0; r < R; r++) {
      first = position[r] < first ? position[r] : first;
      end = position[r] >= end ? position[r] + 1 : end;
    }
    if (end > origin + kAttentionRun) end = origin + kAttentionRun;
    first = first_seen(c.window, first) / kShortRun * kShortRun;
    if (first > origin) origin = first;
  }
  int64_t panels() const { return ceil_div(end - origin, kPanel); }
};

/* Scores of R queries with a run become sums over its values (see Kernels::attend_run). */
template <int Type, int R>
void attend_tile(const HeadCache &c, const float *const (&q)[R], const int64_t (&position)[R], int64_t run,
                 float *const (&sums)[R], float *scores) {
  constexpr bool in_pairs = Type == PT_CACHE_I16;
  const Sight sight(c, position, run);
  const int64_t origin = sight.origin, panels = sight.panels(), ld = kAttentionRun;
  int16_t *weights = (int16_t *)(scores + R * ld), *codes = weights + R * ld;
  if (panels <= 0) { /* it lies beyond all of them */
    for (int r = 0; r < R; r++) {
      for (int64_t i = 0; i < c.value_width; i++) sums[r][i] = 0.0f;
      sums[r][c.value_width] = -__builtin_inff(), sums[r][c.value_width + 1] = 0.0f;
    }
    return;
  }
  const int64_t ldq = ceil_div(c.head_size, kPanel) * kPanel;
  float unit[R];
  if constexpr (in_pairs)
    for (int r = 0; r < R; r++) unit[r] = encode_query(q[r], c.head_size, codes + r * ldq);
  for (int64_t p = 0; p < panels;) {
    with_count<kAttentionTile.panels>(panels - p, [&](auto count) {
      constexpr int n = decltype(count)::value;
      if constexpr (in_pairs) score_pairs<R, n>(c, codes, ldq, unit, origin / kPanel + p, scores + p * kPanel, ld);
      else score_panels<Type, R, n>(c, q, origin / kPanel + p, scores + p * kPanel, ld);
      p += n;
    });
  }
  /* Each step for all queries, as what comes of a row takes long to be known. */
  auto scores_of = [&](int r) { return Scores(c, scores + r * ld, position[r], origin, panels * kPanel); };
  if (c.soft_cap > 0)
    for (int r = 0; r < R; r++) soft_cap(scores + r * ld, c.soft_cap, panels * kPanel);
  for (int r = 0; r < R; r++) sums[r][c.value_width] = scores_of(r).largest();
  Softened softened[R];
  for (int r = 0; r < R; r++) softened[r] = soften<Type>(c, scores_of(r), sums[r][c.value_width]);
  for (int r = 0; r < R; r++) {
    sums[r][c.value_width + 1] = softened[r].total;
    if constexpr (in_pairs) unit[r] = encode_weights(scores + r * ld, panels * kPanel, softened[r], weights + r * ld);
  }
  const int64_t vectors = c.value_width / kPanel;
  for (int64_t v = 0; v < vectors;) {
    with_count<kAttentionTile.panels>(vectors - v, [&](auto count) {
      constexpr int n = decltype(count)::value;
      if constexpr (in_pairs) mix_pairs<R, n>(c, weights, ld, origin, sight.end, v * kPanel, unit, sums);
      else mix_values<Type, R, n>(c, scores, ld, origin, sight.end, v * kPanel, sums);
      v += n;
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
    case PT_CACHE_I16: return f(Constant<PT_CACHE_I16>{});
  }
}

void remember(const HeadCache &c, int64_t position, const float *key, const float *value) {
  with_cache_type(c.type, [&](auto type) { remember_as<decltype(type)::value>(c, position, key, value); });
}

void attend_run(const HeadCache &c, const float *q, int64_t ld, int64_t heads, int64_t tokens, int64_t position,
                int64_t run, float *sums, int64_t ld_sums, float *scratch) {
  const int64_t rows = heads * tokens;
  with_cache_type(c.type, [&](auto type) {
    for (int64_t row = 0; row < rows;) {
      with_count<kAttentionTile.tokens>(rows - row, [&](auto count) {
        constexpr int n = decltype(count)::value;
        const float *from[n];
        float *to[n];
        int64_t positions[n];
        for (int r = 0; r < n; r++, row++) {
          const int64_t token = row / heads, head = row % heads;
          from[r] = q + token * ld + head * c.head_size, to[r] = sums + token * ld_sums + head * run_floats(c);
          positions[r] = position + token;
        }
        attend_tile<decltype(type)::value, n>(c, from, positions, run, to, scratch);
      });
    }
  });
}

void join_runs(const HeadCache &c, int64_t runs, float *sums, int64_t stride, float *out) {
  const int64_t width = c.value_width;
  float largest = sums[width], total = 0.0f;
  for (int64_t i = 1; i < runs; i++) largest = sums[i * stride + width] > largest ? sums[i * stride + width] : largest;
  for (int64_t i = 0; i < runs; i++) {
    float *of_run = sums + i * stride + width;
    const float factor = first_lane(decay(set_f32(of_run[0] - largest)));
    total += factor * of_run[1], of_run[0] = factor;
  }
  for_vectors(c.head_size, [&](int64_t at, auto count) INLINE_LAMBDA {
    F32 sum = set_f32(0.0f);
    for (int64_t i = 0; i < runs; i++)
      sum = fma(load_floats(sums + i * stride + at), set_f32(sums[i * stride + width]), sum);
    store_some(out + at, divide(sum, set_f32(total)), count);
  });
}

}  // namespace
