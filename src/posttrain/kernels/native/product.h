/* The products, written once over the vectors of an instruction set.
 *
 * A file that includes this defines, in an anonymous namespace, the types Bytes (64 bytes), Quad (4
 * activations, repeated), I32 and F32 (16 lanes each) and the functions used below. Nothing here
 * may be shared between instruction sets: an inline function compiled twice is linked once.
 *
 * Whatever the instruction set, the number of tokens or threads, a result is the same to the bit:
 * integer sums are exact, and floats are combined in one order,
 *
 *     y = fma(sum over segments of fma(float(integer sum), scale, .), token scale * multiplier, bias)
 *
 * and, for products in float32, one column after the other within a group.
 */
#include <type_traits>

#include "kernels.h"

namespace {

static const int64_t kRowAhead = 512; /* the same for each of 16 rows read side by side */
static const int64_t kAhead = 4096; /* bytes ahead of the reading that memory is asked for: about +4 % */

/* ------------------------------------------------------------------------------- unpacking */

/* Step S of a unit of codes of `Bits` bits, as 64 bytes. */
template <int Bits, int S>
INLINE Bytes unpack_step(const uint8_t *unit) {
  if constexpr (Bits == 8) {
    return load_bytes(unit + S * kVector);
  } else if constexpr (Bits >= 4) {
    Bytes low = field<S % 2 * 4, 4>(load_bytes(unit + S / 2 * kVector));
    if constexpr (Bits == 4) return low;
    const uint8_t *rest = unit + 4 * kVector;
    if constexpr (Bits == 5) return insert<S, 1, 4>(low, load_bytes(rest));
    Bytes middle = insert<S % 4 * 2, 2, 4>(low, load_bytes(rest + S / 4 * kVector));
    if constexpr (Bits == 6) return middle;
    return insert<S, 1, 6>(middle, load_bytes(rest + 2 * kVector));
  } else {
    Bytes low = field<S % 4 * 2, 2>(load_bytes(unit + S / 4 * kVector));
    if constexpr (Bits == 2) return low;
    return insert<S, 1, 2>(low, load_bytes(unit + 2 * kVector));
  }
}

template <int Bits, bool Lookup, int S>
INLINE Bytes integer_step(const uint8_t *unit, [[maybe_unused]] Bytes table) {
  Bytes codes = unpack_step<Bits, S>(unit);
  if constexpr (Lookup) return look_up(table, codes);
  return codes;
}

/* One unit as 8 steps of bytes. */
template <int Bits, bool Lookup>
INLINE void unpack_unit(const uint8_t *unit, uint8_t *out, Bytes table) {
  store_bytes(out, integer_step<Bits, Lookup, 0>(unit, table));
  store_bytes(out + 64, integer_step<Bits, Lookup, 1>(unit, table));
  store_bytes(out + 128, integer_step<Bits, Lookup, 2>(unit, table));
  store_bytes(out + 192, integer_step<Bits, Lookup, 3>(unit, table));
  store_bytes(out + 256, integer_step<Bits, Lookup, 4>(unit, table));
  store_bytes(out + 320, integer_step<Bits, Lookup, 5>(unit, table));
  store_bytes(out + 384, integer_step<Bits, Lookup, 6>(unit, table));
  store_bytes(out + 448, integer_step<Bits, Lookup, 7>(unit, table));
}

/* Panels [panel, panel + count) as bytes. */
template <int Bits, bool Lookup>
void unpack_panels(const pt_weight &w, int64_t panel, int64_t count, uint8_t *out) {
  const int64_t units = units_of(w.cols);
  Bytes table = Lookup ? repeat16(w.lookup) : Bytes{};
  const uint8_t *unit = w.codes + panel * units * unit_bytes(Bits);
  for (int64_t u = 0; u < count * units; u++, unit += unit_bytes(Bits), out += kUnit * kPanel) {
    prefetch(unit + kAhead, unit_bytes(Bits));
    unpack_unit<Bits, Lookup>(unit, out, table);
  }
}

/* ------------------------------------------------------------------------ integer products */

/* What a tile of P panels x T tokens reads and writes. */
struct Tile {
  const Product &product;
  const uint8_t *codes; /* of the first panel */
  int64_t panel, token;
};

/* sums[c][p][t] += the products of steps First..Last of one unit. Chains c are independent: a lone
 * accumulator would wait for its own latency. */
template <int Bits, bool Lookup, bool Wide, int C, int P, int T, int First, int Last>
INLINE void add_steps(I32 (&sums)[C][P][T], const uint8_t *unit, int64_t stride, const int8_t *x,
                      int64_t ldx, Bytes table) {
  if constexpr (First < Last) {
    Bytes w[P];
    UNROLL for (int p = 0; p < P; p++) w[p] = integer_step<Bits, Lookup, First>(unit + p * stride, table);
    UNROLL for (int t = 0; t < T; t++) {
      Quad q = broadcast4(x + t * ldx + First * kStep);
      UNROLL for (int p = 0; p < P; p++)
        sums[First % C][p][t] = dot<Wide>(sums[First % C][p][t], w[p], q);
    }
    add_steps<Bits, Lookup, Wide, C, P, T, First + 1, Last>(sums, unit, stride, x, ldx, table);
  }
}

/* Integer sums of a segment start at -zero * sum(x): then `code - zero` needs no arithmetic. */
template <int C, int P, int T>
INLINE void start_segment(I32 (&sums)[C][P][T], const Tile &tile, int64_t segment) {
  const Activations &x = tile.product.x;
  UNROLL for (int t = 0; t < T; t++) {
    int32_t sum = x.sums[(tile.token + t) * x.segments + segment];
    I32 start = set_i32(-tile.product.weight->zero * sum);
    UNROLL for (int p = 0; p < P; p++) {
      sums[0][p][t] = start;
      UNROLL for (int c = 1; c < C; c++) sums[c][p][t] = set_i32(0);
    }
  }
}

/* floats = fma(float(sums), scale, floats) */
template <int C, int P, int T>
INLINE void end_segment(I32 (&sums)[C][P][T], F32 (&floats)[P][T], const Tile &tile, int64_t segment) {
  const pt_weight &w = *tile.product.weight;
  const Activations &x = tile.product.x;
  /* Divisions are slow, and one segment per group is the rule. */
  const int64_t groups = x.weight_groups;
  const int64_t group = x.segments_per_group == 1 ? segment : segment / x.segments_per_group;
  UNROLL for (int p = 0; p < P; p++) {
    int64_t at = ((tile.panel + p) * groups + group) * kPanel;
    F32 scale = load_scales(w, at);
    UNROLL for (int t = 0; t < T; t++) {
      I32 sum = sums[0][p][t];
      UNROLL for (int c = 1; c < C; c++) sum = add(sum, sums[c][p][t]);
      const int64_t token = tile.token + t;
      if (w.zeros) sum = subtract_product(sum, w.zeros + at, x.sums[token * x.segments + segment]);
      F32 factor = scale;
      if (x.scale_groups > 1) {
        int64_t xg = segment / x.segments_per_scale;
        factor = mul(scale, set_f32(x.scales[token * x.scale_groups + xg]));
      }
      floats[p][t] = fma(to_f32(sum), factor, floats[p][t]);
    }
  }
}

template <int P, int T>
INLINE void write_tile(F32 (&floats)[P][T], const Tile &tile) {
  const pt_weight &w = *tile.product.weight;
  const Activations &x = tile.product.x;
  UNROLL for (int t = 0; t < T; t++) {
    const int64_t token = tile.token + t;
    float scale = x.scales && x.scale_groups == 1 ? x.scales[token] * w.multiplier : w.multiplier;
    UNROLL for (int p = 0; p < P; p++) {
      int64_t row = (tile.panel + p) * kPanel;
      int64_t count = w.rows - row < kPanel ? w.rows - row : kPanel;
      if (count <= 0) return;
      F32 bias = w.bias ? load_some(w.bias + row, count) : set_f32(0.0f);
      store_some(tile.product.y + token * tile.product.ldy + row,
                 fma(floats[p][t], set_f32(scale), bias), count);
    }
  }
}

template <int Bits, bool Lookup, bool Wide, int P, int T>
void integer_tile(const Tile &tile) {
  const pt_weight &w = *tile.product.weight;
  const Activations &x = tile.product.x;
  const int64_t units = units_of(w.cols), stride = units * unit_bytes(Bits);
  const int8_t *codes = x.codes + tile.token * x.stride;
  const uint8_t *unit = tile.codes;
  Bytes table = Lookup ? repeat16(w.lookup) : Bytes{};
  constexpr int C = P * T == 1 ? 4 : P * T == 2 ? 2 : 1;
  I32 sums[C][P][T];
  F32 floats[P][T];
  UNROLL for (int p = 0; p < P; p++)
    UNROLL for (int t = 0; t < T; t++) floats[p][t] = set_f32(0.0f);
  if (x.segment == kUnit / 2) { /* two segments a unit */
    for (int64_t u = 0; u < units; u++, unit += unit_bytes(Bits), codes += kUnit) {
      start_segment(sums, tile, 2 * u);
      add_steps<Bits, Lookup, Wide, C, P, T, 0, 4>(sums, unit, stride, codes, x.stride, table);
      end_segment(sums, floats, tile, 2 * u);
      if (2 * u + 1 == x.segments) break;
      start_segment(sums, tile, 2 * u + 1);
      add_steps<Bits, Lookup, Wide, C, P, T, 4, 8>(sums, unit, stride, codes, x.stride, table);
      end_segment(sums, floats, tile, 2 * u + 1);
    }
  } else {
    int64_t u = 0;
    for (int64_t segment = 0; segment < x.segments; segment++) {
      int64_t end = (segment + 1) * (x.segment / kUnit);
      if (end > units) end = units;
      start_segment(sums, tile, segment);
      for (; u < end; u++, unit += unit_bytes(Bits), codes += kUnit) {
        if constexpr (P == 1) prefetch(unit + kAhead, unit_bytes(Bits));
        add_steps<Bits, Lookup, Wide, C, P, T, 0, 8>(sums, unit, stride, codes, x.stride, table);
      }
      end_segment(sums, floats, tile, segment);
    }
  }
  write_tile(floats, tile);
}

/* ------------------------------------------------------------------- products in float32 */

/* Weights stored as floats, column by column. */
template <int Bits, bool Half>
struct FloatWeights {
  static constexpr int bits = Bits;
  explicit FloatWeights(const pt_weight &) {}
  static INLINE_MEMBER F32 column(const uint8_t *unit, int64_t i) {
    if constexpr (Bits == 32) return load_floats((const float *)unit + i * kPanel);
    else return load_halves<Half>((const uint16_t *)unit + i * kPanel);
  }

  /* sums[p][t] += the products of steps first..last of unit u */
  template <int P, int T>
  INLINE_MEMBER void add(F32 (&sums)[P][T], const uint8_t *panel, int64_t u, int64_t stride,
                         const float *x, int64_t ldx, int64_t first, int64_t last,
                         const F32 (&)[P]) const {
    const uint8_t *unit = panel + u * unit_bytes(Bits);
    prefetch(unit + kAhead, unit_bytes(Bits));
    for (int64_t i = first * kStep; i < last * kStep; i++)
      UNROLL for (int p = 0; p < P; p++) {
        F32 w = column(unit + p * stride, i);
        UNROLL for (int t = 0; t < T; t++) sums[p][t] = fma(w, set_f32(x[t * ldx + i]), sums[p][t]);
      }
  }

  INLINE_MEMBER void unpack(const uint8_t *panel, int64_t u, F32, F32, float *out) const {
    const uint8_t *unit = panel + u * unit_bytes(Bits);
    for (int64_t i = 0; i < kUnit; i++) store_some(out + i * kPanel, column(unit, i), kPanel);
  }
};

/* 16-bit or 32-bit floats as a checkpoint stores them, row by row. */
template <int Bits, bool Half>
struct FloatRows {
  static constexpr int bits = Bits;
  const pt_weight &w;
  explicit FloatRows(const pt_weight &weight) : w(weight) {}

  /* Unit `u` of a panel as 32 columns of 16; rows and columns beyond the last are 0. */
  INLINE_MEMBER void transposed(const uint8_t *panel, int64_t u, float *out) const {
    constexpr int64_t size = Bits / 8, lanes = 4 / size; /* columns that one lane holds */
    const int64_t row_bytes = w.cols * size;
    const int64_t rows = (w.rows * row_bytes - (panel - w.codes)) / row_bytes;
    const int64_t cols = w.cols - u * kUnit;
    for (int64_t first = 0; first < kUnit; first += kPanel * lanes) {
      F32 v[kPanel];
      for (int r = 0; r < kPanel; r++) {
        const uint8_t *from = panel + r * row_bytes + (u * kUnit + first) * size;
        if (r < rows && cols - first >= kPanel * lanes) {
          v[r] = load_floats((const float *)from);
          prefetch(from + kRowAhead, 64);
        } else {
          alignas(64) uint8_t some[64] = {};
          int64_t count = cols - first < kPanel * lanes ? cols - first : kPanel * lanes;
          if (r < rows && count > 0) __builtin_memcpy(some, from, count * size);
          v[r] = load_floats((const float *)some);
        }
      }
      transpose(v);
      for (int i = 0; i < kPanel; i++, out += lanes * kPanel) {
        if constexpr (Bits == 32) {
          store_some(out, v[i], kPanel);
        } else {
          store_some(out, half_lanes<Half, 0>(v[i]), kPanel);
          store_some(out + kPanel, half_lanes<Half, 1>(v[i]), kPanel);
        }
      }
    }
  }

  template <int P, int T>
  INLINE_MEMBER void add(F32 (&sums)[P][T], const uint8_t *panel, int64_t u, int64_t stride,
                         const float *x, int64_t ldx, int64_t first, int64_t last,
                         const F32 (&)[P]) const {
    alignas(64) float columns[kUnit * kPanel];
    UNROLL for (int p = 0; p < P; p++) {
      transposed(panel + p * stride, u, columns);
      for (int64_t i = first * kStep; i < last * kStep; i++) {
        F32 column = load_floats(columns + i * kPanel);
        UNROLL for (int t = 0; t < T; t++)
          sums[p][t] = fma(column, set_f32(x[t * ldx + i]), sums[p][t]);
      }
    }
  }

  INLINE_MEMBER void unpack(const uint8_t *panel, int64_t u, F32, F32, float *out) const {
    transposed(panel, u, out);
  }
};

/* Weights stored as codes: code - zero, or (Table) a value for every code. */
template <int Bits, bool Table>
struct CodeWeights {
  static constexpr int bits = Bits;
  FloatTable<Table ? Bits : 1> table;
  explicit CodeWeights(const pt_weight &w) {
    if constexpr (Table) table = load_table<Bits>(w.table);
  }
  template <int J>
  INLINE_MEMBER F32 column(Bytes step, F32 zero) const {
    I32 code = byte_of<J>(step);
    if constexpr (Table) return look_up(table, code);
    else return subtract(to_f32(code), zero);
  }
  template <int J, int P, int T>
  INLINE_MEMBER void add_column(F32 (&sums)[P][T], const Bytes (&steps)[P], const float *x,
                                int64_t ldx, const F32 (&zero)[P]) const {
    UNROLL for (int p = 0; p < P; p++) {
      F32 w = column<J>(steps[p], zero[p]);
      UNROLL for (int t = 0; t < T; t++) sums[p][t] = fma(w, set_f32(x[t * ldx + J]), sums[p][t]);
    }
  }

  template <int P, int T>
  INLINE_MEMBER void add(F32 (&sums)[P][T], const uint8_t *panel, int64_t u, int64_t stride,
                         const float *x, int64_t ldx, int64_t first, int64_t last,
                         const F32 (&zero)[P]) const {
    const uint8_t *unit = panel + u * unit_bytes(Bits);
    prefetch(unit + kAhead, unit_bytes(Bits));
    alignas(64) uint8_t bytes[P][kUnit * kPanel];
    UNROLL for (int p = 0; p < P; p++) unpack_unit<Bits, false>(unit + p * stride, bytes[p], Bytes{});
    for (int64_t s = first; s < last; s++) {
      Bytes steps[P];
      UNROLL for (int p = 0; p < P; p++) steps[p] = load_bytes(bytes[p] + s * kVector);
      add_column<0>(sums, steps, x + s * kStep, ldx, zero);
      add_column<1>(sums, steps, x + s * kStep, ldx, zero);
      add_column<2>(sums, steps, x + s * kStep, ldx, zero);
      add_column<3>(sums, steps, x + s * kStep, ldx, zero);
    }
  }

  /* One unit as float32 columns; the zero points of its two halves may differ. */
  INLINE_MEMBER void unpack(const uint8_t *panel, int64_t u, F32 low, F32 high, float *out) const {
    const uint8_t *unit = panel + u * unit_bytes(Bits);
    prefetch(unit + kAhead, unit_bytes(Bits));
    alignas(64) uint8_t bytes[kUnit * kPanel];
    unpack_unit<Bits, false>(unit, bytes, Bytes{});
    for (int64_t s = 0; s < kUnit / kStep; s++, out += kStep * kPanel) {
      Bytes step = load_bytes(bytes + s * kVector);
      F32 zero = s < kUnit / kStep / 2 ? low : high;
      store_some(out, column<0>(step, zero), kPanel);
      store_some(out + kPanel, column<1>(step, zero), kPanel);
      store_some(out + 2 * kPanel, column<2>(step, zero), kPanel);
      store_some(out + 3 * kPanel, column<3>(step, zero), kPanel);
    }
  }
};

/* The zero points of one panel and group, as floats. */
INLINE F32 load_zero(const pt_weight &w, int64_t at) {
  return w.zeros ? to_f32(load_u8(w.zeros + at)) : set_f32((float)w.zero);
}

/* A tile over `Weights`, each panel `stride` bytes after the one before. */
template <class Weights, int P, int T>
void float_tile(const Tile &tile, int64_t stride) {
  const pt_weight &w = *tile.product.weight;
  const Activations &x = tile.product.x;
  const int64_t steps = padded(w.cols) / kStep, groups = ceil_div(w.cols, w.group);
  const int64_t unit_steps = kUnit / kStep;
  const float *values = x.values + tile.token * x.stride;
  const Weights weights(w);
  F32 floats[P][T], sums[P][T], zero[P];
  UNROLL for (int p = 0; p < P; p++)
    UNROLL for (int t = 0; t < T; t++) floats[p][t] = set_f32(0.0f);
  int64_t step = 0;
  for (int64_t group = 0; group < groups; group++) {
    int64_t end = group + 1 == groups ? steps : (group + 1) * (w.group / kStep);
    UNROLL for (int p = 0; p < P; p++) {
      zero[p] = load_zero(w, ((tile.panel + p) * groups + group) * kPanel);
      UNROLL for (int t = 0; t < T; t++) sums[p][t] = set_f32(0.0f);
    }
    while (step < end) {
      int64_t first = step % unit_steps, left = end - (step - first);
      int64_t last = left < unit_steps ? left : unit_steps;
      weights.add(sums, tile.codes, step / unit_steps, stride, values + (step - first) * kStep,
                  x.stride, first, last, zero);
      step += last - first;
    }
    UNROLL for (int p = 0; p < P; p++) {
      F32 scale = load_scales(w, ((tile.panel + p) * groups + group) * kPanel);
      UNROLL for (int t = 0; t < T; t++) floats[p][t] = fma(sums[p][t], scale, floats[p][t]);
    }
  }
  write_tile(floats, tile);
}

/* Bytes from one panel of a weight to the next. */
INLINE int64_t float_panel_bytes(const pt_weight &w) {
  return w.stage == PT_ROWS ? kPanel * w.cols * w.bits / 8 : panel_bytes(w.cols, w.bits);
}

/* Panels [panel, panel + count) as float32 columns, zero points subtracted. */
template <class Weights>
void unpack_floats(const pt_weight &w, int64_t panel, int64_t count, float *out) {
  const int64_t units = units_of(w.cols), groups = ceil_div(w.cols, w.group);
  const Weights weights(w);
  for (int64_t p = panel; p < panel + count; p++) {
    const uint8_t *codes = w.codes + p * float_panel_bytes(w);
    for (int64_t u = 0; u < units; u++, out += kUnit * kPanel) {
      int64_t low = u * kUnit / w.group, high = (u * kUnit + kUnit / 2) / w.group;
      if (high >= groups) high = groups - 1; /* only padding lies there */
      weights.unpack(codes, u, load_zero(w, (p * groups + low) * kPanel),
                     load_zero(w, (p * groups + high) * kPanel), out);
    }
  }
}

/* -------------------------------------------------------------------- choosing a product */

/* Calls f(Constant<n>) for the largest of Most, Most / 2, ..., 1 that fits in n. */
template <int Most, class F>
INLINE void with_count(int64_t n, F f) {
  if constexpr (Most == 1) {
    f(Constant<1>{});
  } else {
    if (n >= Most) f(Constant<Most>{});
    else with_count<Most / 2>(n, f);
  }
}

/* Walks a share in tiles of up to P panels and T tokens: tile(P', T', panel, token). */
template <int P, int T, class F>
INLINE void for_tiles(const Share &s, F tile) {
  for (int64_t panel = s.panel; panel < s.panel_end;) {
    with_count<P>(s.panel_end - panel, [&](auto panels) {
      for (int64_t token = s.token; token < s.token_end;) {
        with_count<T>(s.token_end - token, [&](auto tokens) {
          tile(panels, tokens, panel, token);
          token += tokens.value;
        });
      }
      panel += panels.value;
    });
  }
}

/* Calls f(Constant<bits>) for the code width of a weight. */
template <class F>
INLINE void with_bits(int bits, F f) {
  switch (bits) {
    case 2: return f(Constant<2>{});
    case 3: return f(Constant<3>{});
    case 4: return f(Constant<4>{});
    case 5: return f(Constant<5>{});
    case 6: return f(Constant<6>{});
    case 7: return f(Constant<7>{});
    case 8: return f(Constant<8>{});
  }
}

/* Calls f with a value of the type that reads a weight as floats. */
template <class F>
INLINE void with_float_weights(const pt_weight &w, F f) {
  if (w.stage == PT_ROWS) {
    if (w.bits == 32) f(FloatRows<32, false>(w));
    else if (w.half == PT_F16) f(FloatRows<16, true>(w));
    else f(FloatRows<16, false>(w));
  } else if (w.stage == PT_FLOAT) {
    if (w.bits == 32) f(FloatWeights<32, false>(w));
    else if (w.half == PT_F16) f(FloatWeights<16, true>(w));
    else f(FloatWeights<16, false>(w));
  } else if (w.stage == PT_INTEGER) {
    with_bits(w.bits, [&](auto bits) { f(CodeWeights<decltype(bits)::value, false>(w)); });
  } else {
    with_bits(w.bits, [&](auto bits) { f(CodeWeights<decltype(bits)::value, true>(w)); });
  }
}

template <int Bits, bool Lookup>
void integer_gemv(const Product &product, const Share &share) {
  int64_t bytes = panel_bytes(product.weight->cols, Bits);
  for_tiles<1, kGemvTokens>(share, [&](auto, auto tokens, int64_t panel, int64_t token) {
    Tile tile{product, product.weight->codes + panel * bytes, panel, token};
    integer_tile<Bits, Lookup, Bits == 8, 1, decltype(tokens)::value>(tile);
  });
}

template <class Weights>
void float_gemv(const Product &product, const Share &share) {
  int64_t bytes = float_panel_bytes(*product.weight);
  auto run = [&](auto panels, auto tokens, int64_t panel, int64_t token) {
    Tile tile{product, product.weight->codes + panel * bytes, panel, token};
    float_tile<Weights, decltype(panels)::value, decltype(tokens)::value>(tile, bytes);
  };
  /* One token takes several panels at a time, so that several sums are under way; rows of floats
   * are 16 streams of memory as it is. */
  const bool one = share.token_end - share.token == 1 && product.weight->stage != PT_ROWS;
  if (one) for_tiles<kGemvTokens, 1>(share, run);
  else for_tiles<1, kGemvTokens>(share, run);
}

void gemv(const Product &product, const Share &share) {
  const pt_weight &w = *product.weight;
  if (!in_integers(product)) {
    with_float_weights(w, [&](auto weights) { float_gemv<decltype(weights)>(product, share); });
  } else if (w.stage == PT_LOOKUP) {
    integer_gemv<4, true>(product, share);
  } else {
    with_bits(w.bits, [&](auto bits) {
      integer_gemv<decltype(bits)::value, false>(product, share);
    });
  }
}

/* Unpacks panels [panel, panel + count) for `gemm`; what needs no unpacking stays in place. */
const uint8_t *unpack(const Product &product, int64_t panel, int64_t count, uint8_t *scratch) {
  const pt_weight &w = *product.weight;
  bool integers = in_integers(product);
  if (w.stage != PT_ROWS && w.bits == (integers ? 8 : 32)) return w.codes + panel * panel_bytes(w.cols, w.bits);
  if (!integers) {
    with_float_weights(w, [&](auto weights) {
      unpack_floats<decltype(weights)>(w, panel, count, (float *)scratch);
    });
  } else if (w.stage == PT_LOOKUP) {
    unpack_panels<4, true>(w, panel, count, scratch);
  } else {
    with_bits(w.bits, [&](auto bits) {
      unpack_panels<decltype(bits)::value, false>(w, panel, count, scratch);
    });
  }
  return scratch;
}

/* A whole block of panels, unpacked at `codes`, times a range of tokens. */
template <int P, int T>
void integer_block(const Product &product, const Share &block, const uint8_t *codes) {
  const int64_t bytes = panel_bytes(product.weight->cols, 8);
  for_tiles<P, T>(block, [&](auto panels, auto tokens, int64_t panel, int64_t token) {
    constexpr int p = decltype(panels)::value, t = decltype(tokens)::value;
    Tile tile{product, codes + (panel - block.panel) * bytes, panel, token};
    if (product.weight->bits == 8) integer_tile<8, false, true, p, t>(tile);
    else integer_tile<8, false, false, p, t>(tile);
  });
}

void float_block(const Product &product, const Share &block, const uint8_t *codes) {
  const int64_t bytes = panel_bytes(product.weight->cols, 32);
  pt_weight zeroed = *product.weight; /* unpacked codes have their zero points subtracted */
  zeroed.stage = PT_FLOAT, zeroed.zero = 0, zeroed.zeros = nullptr;
  Product floats = product;
  floats.weight = &zeroed;
  for_tiles<kFloatTile.panels, kFloatTile.tokens>(
      block, [&](auto panels, auto tokens, int64_t panel, int64_t token) {
        Tile tile{floats, codes + (panel - block.panel) * bytes, panel, token};
        float_tile<FloatWeights<32, false>, decltype(panels)::value, decltype(tokens)::value>(tile, bytes);
      });
}

/* One sum per row fills the registers with integers; with several they share them with floats. */
TileShape gemm_tile(const Product &product) {
  if (!in_integers(product)) return kFloatTile;
  return product.x.segments == 1 ? kRowTile : kGroupTile;
}

void gemm(const Product &product, const Share &share, uint8_t *scratch) {
  const int64_t panels = gemm_tile(product).panels;
  for (int64_t first = share.panel; first < share.panel_end; first += panels) {
    int64_t end = first + panels < share.panel_end ? first + panels : share.panel_end;
    const uint8_t *codes = unpack(product, first, end - first, scratch);
    Share block{first, end, share.token, share.token_end};
    if (!in_integers(product)) float_block(product, block, codes);
    else if (product.x.segments == 1) integer_block<kRowTile.panels, kRowTile.tokens>(product, block, codes);
    else integer_block<kGroupTile.panels, kGroupTile.tokens>(product, block, codes);
  }
}

/* ------------------------------------------------------------ quantization of activations */

/* What numbers.fit_scales stores for a block of this absmax (given as bits, so that NaN, the
 * largest pattern of all, is never lost in a comparison). */
INLINE float scale_of(uint32_t absmax_bits, const pt_input &in) {
  if (absmax_bits > 0x7f800000u) return __builtin_nanf("");
  if (absmax_bits == 0) return 1.0f;
  if (absmax_bits == 0x7f800000u) absmax_bits = 0x7f7fffffu;
  float absmax;
  __builtin_memcpy(&absmax, &absmax_bits, 4);
  float scale = absmax / in.top;
  if (in.scale_type == PT_F16) return round_to_half(scale);
  return scale > 0 ? scale : 0x1p-149f;
}

/* x [cols] times the orthonormal block-Hadamard matrix of models/rotation.py, in place. */
void rotate(float *x, int64_t cols) {
  int64_t block = cols & -cols;
  if (block > kLargestRotation) block = kLargestRotation;
  const float norm = 1.0f / __builtin_sqrtf((float)block);
  for (int64_t start = 0; start < cols; start += block) {
    float *run = x + start;
    int64_t h = 1;
    if (block >= kPanel) {
      for (int64_t i = 0; i < block; i += kPanel) {
        F32 v = load_floats(run + i);
        v = butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(v))));
        store_some(run + i, v, kPanel);
      }
      h = kPanel;
    }
    for (; h < block; h *= 2)
      for (int64_t i = 0; i < block; i += 2 * h)
        for (int64_t j = i; j < i + h; j++) {
          float a = run[j], b = run[j + h];
          run[j] = a + b, run[j + h] = a - b;
        }
    for (int64_t i = 0; i < block; i++) run[i] *= norm;
  }
}

void quantize(const float *x, int64_t ldx, int64_t cols, const pt_input &in, int64_t first,
              int64_t last, Activations &out) {
  for (int64_t token = first; token < last; token++) {
    const float *row = x + token * ldx;
    int8_t *codes = const_cast<int8_t *>(out.codes) + token * out.stride;
    float *scales = const_cast<float *>(out.scales) + token * out.scale_groups;
    int32_t *sums = const_cast<int32_t *>(out.sums) + token * out.segments;
    for (int64_t g = 0; g < out.scale_groups; g++) {
      int64_t begin = g * out.scale_group, end = begin + out.scale_group;
      if (end > cols) end = cols;
      uint32_t absmax = largest_magnitude(row + begin, end - begin);
      scales[g] = scale_of(absmax, in);
      if (absmax < 0x7f800000u)
        encode(row + begin, end - begin, scales[g], in, codes + begin);
      else
        for (int64_t k = begin; k < end; k++) codes[k] = (int8_t)code_of(row[k], scales[g], in);
    }
    for (int64_t k = cols; k < out.stride; k++) codes[k] = 0;
    for (int64_t s = 0; s < out.segments; s++) {
      int64_t begin = s * out.segment, end = begin + out.segment;
      sums[s] = sum_of(codes + begin, (end < out.stride ? end : out.stride) - begin);
    }
  }
}

/* ------------------------------------------------------------------------------- probes */

/* Reads every byte once, with the prefetching of a product; the result keeps the reads alive. */
int32_t read_bytes(const uint8_t *from, int64_t bytes) {
  const Quad ones = broadcast4((const int8_t *)"\1\1\1\1");
  I32 sums[4] = {set_i32(0), set_i32(0), set_i32(0), set_i32(0)};
  for (int64_t i = 0; i + 4 * kVector <= bytes; i += 4 * kVector) {
    prefetch(from + i + kAhead, 4 * kVector);
    UNROLL for (int j = 0; j < 4; j++) sums[j] = dot<false>(sums[j], load_bytes(from + i + j * kVector), ones);
  }
  return first_lane(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

/* Independent integer products of one step each, `rounds` times 16: only arithmetic. */
int32_t multiply_registers(int64_t rounds) {
  const uint8_t codes[kVector] = {1, 2, 3};
  Bytes w = load_bytes(codes);
  Quad x = broadcast4((const int8_t *)codes);
  constexpr int n = kRowTile.panels * kRowTile.tokens < 4 ? 4 : kRowTile.panels * kRowTile.tokens;
  I32 sums[n];
  UNROLL for (int i = 0; i < n; i++) sums[i] = set_i32(i);
  for (int64_t r = 0; r < rounds * 16 / n; r++) {
    opaque(w); /* so that no product can be taken out of the loop */
    UNROLL for (int i = 0; i < n; i++) sums[i] = dot<false>(sums[i], w, x);
  }
  UNROLL for (int i = 1; i < n; i++) sums[0] = add(sums[0], sums[i]);
  return first_lane(sums[0]);
}

}  // namespace

#include "block.h"

namespace {

/* All of the above under the name of an instruction set. */
[[maybe_unused]] Kernels kernels_named(const char *name) {
  return {name,     gemm_tile,  gemv,       gemm,             unpack,   rotate,   quantize,
          rms_norm, gated,      accumulate, rotate_positions, soft_cap, log_partition, remember, attend,
          read_bytes, multiply_registers};
}

}  // namespace
