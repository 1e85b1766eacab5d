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

/* One token reads two panels side by side, each asking for memory so many bytes ahead: two streams
 * come a fifth faster than one, however far ahead that one asks. */
static const int kStreams = 2;
static const int64_t kAhead = 1152; /* 768 is good for some formats and a fifth slower for others */
static const int64_t kRowAhead = 512; /* for each of 16 rows read side by side */

/* ------------------------------------------------------------------------------- unpacking */

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

/* Where the codes of a panel lie, from column `begin` on, the first of a unit. */
INLINE const uint8_t *codes_at(const pt_weight &w, int64_t panel, int64_t begin) {
  return w.codes + panel * panel_bytes(w.cols, w.bits) + panel_bytes(begin, w.bits);
}

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

/* The codes of a block as bytes, panel by panel. */
template <int Bits, bool Lookup>
void unpack_block(const pt_weight &w, const Block &block, uint8_t *out) {
  const int64_t units = units_of(block.end - block.begin);
  Bytes table = Lookup ? repeat16(w.lookup) : Bytes{};
  for (int64_t panel = block.panel; panel < block.panel_end; panel++) {
    const uint8_t *unit = codes_at(w, panel, block.begin);
    for (int64_t u = 0; u < units; u++, unit += unit_bytes(Bits), out += kUnit * kPanel) {
      prefetch(unit + kAhead, unit_bytes(Bits));
      unpack_unit<Bits, Lookup>(unit, out, table);
    }
  }
}

Codes unpack(const pt_weight &w, const Block &block, uint8_t *scratch) {
  if (w.bits == 8) return {codes_at(w, block.panel, block.begin), panel_bytes(w.cols, 8)};
  if (w.stage == PT_LOOKUP) unpack_block<4, true>(w, block, scratch);
  else with_bits(w.bits, [&](auto bits) { unpack_block<decltype(bits)::value, false>(w, block, scratch); });
  return {scratch, (block.end - block.begin) * kPanel};
}

/* ------------------------------------------------------------------------ integer products */

/* What a tile of P panels x T tokens reads and writes. */
struct Tile {
  const Product &product;
  Codes codes; /* of the tile's panels, from column `begin` on */
  int64_t panel, token;
  int64_t begin, end;       /* columns */
  float *carried = nullptr; /* sums of the columns before, then of these too */
};

/* What stands before is done before what follows, as far as the compiler is concerned. */
INLINE void in_this_order() { __asm__ volatile("" ::: "memory"); }

/* sums[c][p][t] += the products of steps First..Last of one unit of panel p. Chains c are
 * independent: a lone accumulator would wait for its own latency. */
template <int Bits, bool Lookup, bool Wide, int First, int Last, int C, int P, int T>
INLINE void add_steps(I32 (&sums)[C][P][T], int p, const uint8_t *unit, int64_t ahead, const int8_t *x,
                      int64_t ldx, Bytes table) {
  if constexpr (First < Last) {
    constexpr int64_t line = First * Bits / 8, lines = (First + 1) * Bits / 8 - line;
    prefetch(unit + ahead + line * kVector, lines * kVector);
    in_this_order(); /* asked for all at once, in whatever order, lines come up to a fifth slower */
    const Bytes w = integer_step<Bits, Lookup, First>(unit, table);
    UNROLL for (int t = 0; t < T; t++)
      sums[First % C][p][t] = dot<Wide>(sums[First % C][p][t], w, broadcast4(x + t * ldx + First * kStep));
    add_steps<Bits, Lookup, Wide, First + 1, Last>(sums, p, unit, ahead, x, ldx, table);
  }
}

/* Integer sums of a segment start at -zero * sum(x): then `code - zero` needs no arithmetic. */
template <int C, int P, int T>
INLINE void start_segment(I32 (&sums)[C][P][T], const Tile &tile, int64_t segment) {
  const int32_t *starts = tile.product.starts + tile.token * tile.product.x.segments + segment;
  UNROLL for (int t = 0; t < T; t++) {
    I32 start = set_i32(starts[t * tile.product.x.segments]);
    UNROLL for (int p = 0; p < P; p++) {
      sums[0][p][t] = start;
      UNROLL for (int c = 1; c < C; c++) sums[c][p][t] = set_i32(0);
    }
  }
}

/* What the sums of a segment are multiplied with, known when compiling for the usual cases. */
enum Scales { kRows, kRowsAndTokens, kAny };

INLINE Scales scales_of(const Product &product) {
  if (product.weight->zeros) return kAny;
  return product.x.scale_groups > 1 ? kRowsAndTokens : kRows;
}

/* Calls add(p, t, float(sum), scale) for the sums of a finished segment. */
template <Scales Kind, int C, int P, int T, class F>
INLINE void end_segment(I32 (&sums)[C][P][T], const Tile &tile, int64_t segment, F add_product) {
  const pt_weight &w = *tile.product.weight;
  const Activations &x = tile.product.x;
  /* Divisions are slow, and one segment per group is the rule. */
  const int64_t group = x.segments_per_group == 1 ? segment : segment / x.segments_per_group;
  const int64_t x_group = x.segments_per_scale == 1 ? segment : segment / x.segments_per_scale;
  const int64_t segments = x.segments, scale_groups = x.scale_groups;
  const int32_t *x_sums = x.sums + tile.token * segments + segment;
  const float *x_scales = x.scales + tile.token * scale_groups + x_group;
  const uint8_t *zeros = Kind == kAny ? w.zeros : nullptr;
  const bool token_scales = Kind == kRowsAndTokens || (Kind == kAny && scale_groups > 1);
  UNROLL for (int p = 0; p < P; p++) {
    const int64_t at = ((tile.panel + p) * x.weight_groups + group) * kPanel;
    const F32 scale = load_scales(w, at);
    UNROLL for (int t = 0; t < T; t++) {
      I32 sum = sums[0][p][t];
      UNROLL for (int c = 1; c < C; c++) sum = add(sum, sums[c][p][t]);
      if (zeros) sum = subtract_product(sum, zeros + at, x_sums[t * segments]);
      F32 factor = scale;
      if (token_scales) factor = mul(scale, set_f32(x_scales[t * scale_groups]));
      add_product(p, t, to_f32(sum), factor);
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

/* P panels x T tokens, unpacked on the way. */
template <int Bits, bool Lookup, bool Wide, int P, int T>
void packed_tile(const Tile &tile) {
  const pt_weight &w = *tile.product.weight;
  const Activations &x = tile.product.x;
  const int64_t units = units_of(w.cols), stride = tile.codes.stride;
  /* Towards its end a panel asks for the one that its stream continues with. */
  const int64_t turn = units - ceil_div(kAhead, unit_bytes(Bits)), jump = (P - 1) * stride;
  const int8_t *codes = x.codes_at(tile.token, 0);
  const uint8_t *unit = tile.codes.first;
  Bytes table = Lookup ? repeat16(w.lookup) : Bytes{};
  constexpr int C = P * T >= 4 ? 1 : 4 / (P * T);
  I32 sums[C][P][T];
  F32 floats[P][T];
  UNROLL for (int p = 0; p < P; p++)
    UNROLL for (int t = 0; t < T; t++) floats[p][t] = set_f32(0.0f);
  auto add_product = [&](int p, int t, F32 sum, F32 factor) INLINE_LAMBDA {
    floats[p][t] = fma(sum, factor, floats[p][t]);
  };
  /* Adds a unit, or half of one, of every panel. */
  auto add_unit = [&](int64_t u, auto first, auto last) INLINE_LAMBDA {
    const int64_t ahead = kAhead + (u >= turn ? jump : 0);
    UNROLL for (int p = 0; p < P; p++)
      add_steps<Bits, Lookup, Wide, decltype(first)::value, decltype(last)::value>(
          sums, p, unit + p * stride, ahead, codes, x.stride, table);
  };
  if (x.segment == kUnit / 2) { /* two segments a unit */
    for (int64_t u = 0; u < units; u++, unit += unit_bytes(Bits), codes += kUnit) {
      start_segment(sums, tile, 2 * u);
      add_unit(u, Constant<0>{}, Constant<4>{});
      end_segment<kAny>(sums, tile, 2 * u, add_product);
      if (2 * u + 1 == x.segments) break;
      start_segment(sums, tile, 2 * u + 1);
      add_unit(u, Constant<4>{}, Constant<8>{});
      end_segment<kAny>(sums, tile, 2 * u + 1, add_product);
    }
  } else {
    int64_t u = 0;
    for (int64_t segment = 0; segment < x.segments; segment++) {
      int64_t end = (segment + 1) * (x.segment / kUnit);
      if (end > units) end = units;
      start_segment(sums, tile, segment);
      for (; u < end; u++, unit += unit_bytes(Bits), codes += kUnit)
        add_unit(u, Constant<0>{}, Constant<8>{});
      end_segment<kAny>(sums, tile, segment, add_product);
    }
  }
  write_tile(floats, tile);
}

/* P panels x T tokens x a block of columns, unpacked before. Only integer sums have room in the
 * registers: floats stay in `carried`, as do the sums of a single segment between two blocks. */
template <bool Wide, Scales Kind, int P, int T>
void byte_tile(const Tile &tile) {
  const pt_weight &w = *tile.product.weight;
  const Activations &x = tile.product.x;
  const int64_t stride = tile.codes.stride, ldx = x.stride;
  const int8_t *block = x.codes_at(tile.token, tile.begin);
  const bool first = tile.begin == 0, last = tile.end == padded(w.cols), one = x.segments == 1;
  I32 sums[1][P][T];
  float *const sums_aside = tile.carried;
  auto carried = [=](int p, int t) INLINE_LAMBDA { return sums_aside + (p * T + t) * kPanel; };
  if (first)
    UNROLL for (int i = 0; i < P * T; i++) store_some(sums_aside + i * kPanel, set_f32(0.0f), kPanel);
  if (last) {
    const float *y = tile.product.y + tile.token * tile.product.ldy + tile.panel * kPanel;
    UNROLL for (int t = 0; t < T; t++)
      prefetch_far((const uint8_t *)(y + t * tile.product.ldy), P * kVector);
  }
  int64_t segment = one ? 0 : tile.begin / x.segment;
  /* Half a unit of padding is no segment. */
  for (int64_t begin = tile.begin; begin < tile.end && segment < x.segments; segment++) {
    const int64_t end = !one && begin + x.segment < tile.end ? begin + x.segment : tile.end;
    if (first || !one) {
      start_segment(sums, tile, segment);
    } else {
      UNROLL for (int p = 0; p < P; p++)
        UNROLL for (int t = 0; t < T; t++) sums[0][p][t] = load_bits(carried(p, t));
    }
    const uint8_t *codes = tile.codes.first + (begin - tile.begin) * kPanel;
    const int8_t *values = block + begin - tile.begin;
    for (; begin < end; begin += kStep, codes += kVector, values += kStep) {
      Bytes step[P];
      UNROLL for (int p = 0; p < P; p++) step[p] = load_bytes(codes + p * stride);
      UNROLL for (int t = 0; t < T; t++) {
        Quad four = broadcast4(values + t * ldx);
        UNROLL for (int p = 0; p < P; p++) sums[0][p][t] = dot<Wide>(sums[0][p][t], step[p], four);
      }
    }
    if (one && !last) {
      UNROLL for (int p = 0; p < P; p++)
        UNROLL for (int t = 0; t < T; t++) store_bits(carried(p, t), sums[0][p][t]);
      return;
    }
    /* A single segment has left integers here. */
    end_segment<Kind>(sums, tile, segment, [=](int p, int t, F32 sum, F32 factor) INLINE_LAMBDA {
      F32 before = one ? set_f32(0.0f) : load_floats(carried(p, t));
      store_some(carried(p, t), fma(sum, factor, before), kPanel);
    });
  }
  if (!last) return;
  F32 floats[P][T];
  UNROLL for (int p = 0; p < P; p++)
    UNROLL for (int t = 0; t < T; t++) floats[p][t] = load_floats(carried(p, t));
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
    UNROLL for (int p = 0; p < P; p++) prefetch(unit + p * stride + kAhead, unit_bytes(Bits));
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
    UNROLL for (int p = 0; p < P; p++) prefetch(unit + p * stride + kAhead, unit_bytes(Bits));
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

/* A tile over `Weights`, all columns. */
template <class Weights, int P, int T>
void float_tile(const Tile &tile) {
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
      weights.add(sums, tile.codes.first, step / unit_steps, tile.codes.stride, values + (step - first) * kStep,
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
  const pt_weight &w = *product.weight;
  const int64_t bytes = panel_bytes(w.cols, Bits);
  for_tiles<kStreams, kGemvTokens>(share, [&](auto panels, auto tokens, int64_t panel, int64_t token) {
    Tile tile{product, {codes_at(w, panel, 0), bytes}, panel, token, 0, padded(w.cols)};
    packed_tile<Bits, Lookup, Bits == 8, decltype(panels)::value, decltype(tokens)::value>(tile);
  });
}

template <class Weights>
void float_gemv(const Product &product, const Share &share) {
  const pt_weight &w = *product.weight;
  const int64_t bytes = float_panel_bytes(w);
  auto run = [&](auto panels, auto tokens, int64_t panel, int64_t token) {
    Tile tile{product, {w.codes + panel * bytes, bytes}, panel, token, 0, padded(w.cols)};
    float_tile<Weights, decltype(panels)::value, decltype(tokens)::value>(tile);
  };
  /* One token takes several panels at a time, so that several sums are under way; rows of floats
   * are 16 streams of memory as it is. */
  const bool one = share.token_end - share.token == 1 && w.stage != PT_ROWS;
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

/* Asks for the packed codes of a block, a part at every step, while another is multiplied. */
class Ahead {
 public:
  Ahead(const pt_weight &w, const Block &block, int64_t steps)
      : w_(w), block_(block), bytes_(panel_bytes(block.end - block.begin, w.bits)),
        left_(block.panel_end > block.panel ? bytes_ : 0),
        part_(ceil_div(bytes_ * (block.panel_end - block.panel), steps * kVector) * kVector) {
    if (left_) at_ = codes_at(w, block.panel, block.begin);
  }

  void step() {
    for (int64_t part = part_; part > 0 && left_ > 0;) {
      const int64_t bytes = part < left_ ? part : left_;
      prefetch_far(at_, bytes);
      part -= bytes, left_ -= bytes, at_ += bytes;
      if (!left_ && ++block_.panel < block_.panel_end)
        at_ = codes_at(w_, block_.panel, block_.begin), left_ = bytes_;
    }
  }

 private:
  const pt_weight &w_;
  Block block_;
  const uint8_t *at_ = nullptr;
  const int64_t bytes_;
  int64_t left_, part_;
};

/* Walks a share block by block, up to `panels` panels at a time: multiply(block, ahead, carried),
 * where `ahead` is of the block that follows. */
template <class F>
void for_blocks(const Product &product, const Share &share, int64_t panels, int64_t steps,
                float *carried, F multiply) {
  const pt_weight &w = *product.weight;
  const int64_t cols = padded(w.cols), tokens = share.token_end - share.token;
  auto block_at = [&](int64_t panel, int64_t begin) {
    int64_t end = panel + panels, last = begin + product.x.block;
    return Block{panel, end < share.panel_end ? end : share.panel_end, begin, last < cols ? last : cols};
  };
  for (int64_t begin = 0; begin < cols; begin += product.x.block)
    for (int64_t panel = share.panel; panel < share.panel_end; panel += panels) {
      const Block block = block_at(panel, begin);
      Block next{0, 0, 0, 0};
      if (block.panel_end < share.panel_end) next = block_at(block.panel_end, begin);
      else if (block.end < cols) next = block_at(share.panel, block.end);
      Ahead ahead(w, next, steps);
      multiply(block, ahead, carried + (panel - share.panel) * tokens * kPanel);
    }
}

template <int P, int T>
void multiply_bytes(const Tile &tile) {
  const bool wide = tile.product.weight->bits == 8;
  switch (scales_of(tile.product)) {
    case kRows: return wide ? byte_tile<true, kRows, P, T>(tile) : byte_tile<false, kRows, P, T>(tile);
    case kRowsAndTokens:
      return wide ? byte_tile<true, kRowsAndTokens, P, T>(tile)
                  : byte_tile<false, kRowsAndTokens, P, T>(tile);
    case kAny: return wide ? byte_tile<true, kAny, P, T>(tile) : byte_tile<false, kAny, P, T>(tile);
  }
}

void integer_gemm(const Product &product, const Share &share, uint8_t *scratch) {
  const int64_t tokens = share.token_end - share.token;
  float *sums = (float *)(scratch + panel_bytes(product.x.block, 8) * kTile.panels);
  for_blocks(product, share, kTile.panels, ceil_div(tokens, kTile.tokens), sums,
             [&](const Block &block, Ahead &ahead, float *carried) {
    const Codes codes = unpack(*product.weight, block, scratch);
    Share part{block.panel, block.panel_end, share.token, share.token_end};
    for_tiles<kTile.panels, kTile.tokens>(part, [&](auto panels, auto tokens, int64_t panel, int64_t token) {
      constexpr int p = decltype(panels)::value, t = decltype(tokens)::value;
      /* Nothing is carried where there is one block: every tile may use the same memory. */
      const int64_t before = block.end - block.begin == padded(product.weight->cols)
          ? 0 : (token - part.token) * (part.panel_end - part.panel) + (panel - part.panel) * t;
      Tile tile{product, {codes.first + (panel - part.panel) * codes.stride, codes.stride},
                panel, token, block.begin, block.end, carried + before * kPanel};
      ahead.step();
      multiply_bytes<p, t>(tile);
    });
  });
}

void float_gemm(const Product &product, const Share &share, uint8_t *scratch) {
  const pt_weight &w = *product.weight;
  const int64_t bytes = panel_bytes(w.cols, 32);
  pt_weight zeroed = w; /* unpacked codes have their zero points subtracted */
  zeroed.stage = PT_FLOAT, zeroed.zero = 0, zeroed.zeros = nullptr;
  Product floats = product;
  floats.weight = &zeroed;
  for (int64_t first = share.panel; first < share.panel_end; first += kFloatTile.panels) {
    const int64_t end = first + kFloatTile.panels < share.panel_end ? first + kFloatTile.panels : share.panel_end;
    const uint8_t *codes = scratch;
    if (w.stage == PT_FLOAT && w.bits == 32) codes = w.codes + first * bytes;
    else with_float_weights(w, [&](auto weights) {
      unpack_floats<decltype(weights)>(w, first, end - first, (float *)scratch);
    });
    for_tiles<kFloatTile.panels, kFloatTile.tokens>(
        {first, end, share.token, share.token_end}, [&](auto panels, auto tokens, int64_t panel, int64_t token) {
          Tile tile{floats, {codes + (panel - first) * bytes, bytes}, panel, token, 0, padded(w.cols)};
          float_tile<FloatWeights<32, false>, decltype(panels)::value, decltype(tokens)::value>(tile);
        });
  }
}

TileShape gemm_tile(const Product &product) {
  return in_integers(product) ? kTile : kFloatTile;
}

void gemm(const Product &product, const Share &share, uint8_t *scratch) {
  if (in_integers(product)) integer_gemm(product, share, scratch);
  else float_gemm(product, share, scratch);
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
    const bool whole = block >= kPanel;
    for (; h < block; h *= 2)
      for (int64_t i = 0; i < block; i += 2 * h)
        for (int64_t j = i; j < i + h; j += whole ? kPanel : 1) {
          const int64_t count = whole ? kPanel : 1;
          F32 a = load_some(run + j, count), b = load_some(run + j + h, count);
          store_some(run + j, add(a, b), count), store_some(run + j + h, subtract(a, b), count);
        }
    for (int64_t i = 0; i < block; i += kPanel) {
      const int64_t count = block - i < kPanel ? block - i : kPanel;
      store_some(run + i, mul(load_some(run + i, count), set_f32(norm)), count);
    }
  }
}

/* Codes of columns [begin, end) of a row, which lie in one block; vectors take finite values only. */
void encode_columns(const float *x, int64_t begin, int64_t end, float scale, const pt_input &in,
                    bool finite, int8_t *codes) {
  if (finite) return encode(x + begin, end - begin, scale, in, codes);
  for (int64_t k = begin; k < end; k++) codes[k - begin] = (int8_t)code_of(x[k], scale, in);
}

void quantize(const float *x, int64_t ldx, int64_t cols, const pt_input &in, int64_t first,
              int64_t last, Activations &out) {
  const int64_t whole = padded(cols);
  for (int64_t token = first; token < last; token++) {
    const float *row = x + token * ldx;
    float *scales = const_cast<float *>(out.scales) + token * out.scale_groups;
    int32_t *sums = const_cast<int32_t *>(out.sums) + token * out.segments;
    for (int64_t g = 0; g < out.scale_groups; g++) {
      int64_t begin = g * out.scale_group, end = begin + out.scale_group;
      if (end > cols) end = cols;
      uint32_t absmax = largest_magnitude(row + begin, end - begin);
      scales[g] = scale_of(absmax, in);
      while (begin < end) {
        int64_t run = out.block - begin % out.block, to = begin + run < end ? begin + run : end;
        encode_columns(row, begin, to, scales[g], in, absmax < 0x7f800000u,
                       const_cast<int8_t *>(out.codes_at(token, begin)));
        begin = to;
      }
    }
    for (int64_t k = cols; k < whole; k++) *const_cast<int8_t *>(out.codes_at(token, k)) = 0;
    for (int64_t s = 0; s < out.segments; s++) {
      int64_t begin = s * out.segment, end = begin + out.segment;
      if (end > whole) end = whole;
      sums[s] = 0;
      for (; begin < end; begin += out.block - begin % out.block) {
        int64_t left = out.block - begin % out.block;
        sums[s] += sum_of(out.codes_at(token, begin), left < end - begin ? left : end - begin);
      }
    }
  }
}

/* ------------------------------------------------------------------------------- probes */

/* Reads every byte once, with the prefetching of a product; the result keeps the reads alive. */
int32_t read_bytes(const uint8_t *from, int64_t bytes) {
  const Quad ones = broadcast4((const int8_t *)"\1\1\1\1");
  const int64_t part = bytes / kStreams;
  I32 sums[4] = {set_i32(0), set_i32(0), set_i32(0), set_i32(0)};
  for (int64_t i = 0; i + 4 * kVector <= part; i += 4 * kVector)
    UNROLL for (int s = 0; s < kStreams; s++) {
      const uint8_t *at = from + s * part + i;
      prefetch(at + kAhead, 4 * kVector);
      UNROLL for (int j = 0; j < 4; j++) sums[j] = dot<false>(sums[j], load_bytes(at + j * kVector), ones);
    }
  return first_lane(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

/* Independent integer products of one step each, `rounds` times 16: only arithmetic. */
int32_t multiply_registers(int64_t rounds) {
  const uint8_t codes[kVector] = {1, 2, 3};
  Bytes w = load_bytes(codes);
  Quad x = broadcast4((const int8_t *)codes);
  constexpr int n = kTile.panels * kTile.tokens < 4 ? 4 : kTile.panels * kTile.tokens;
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
