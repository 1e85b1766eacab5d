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
 * where of a token in digits the second adds to what the first came to, in place of the bias, and so on;
 * and, for products in float32, one column after the other within a group.
 */
#include <type_traits>

#include "kernels.h"

namespace {

/* How far ahead memory is asked for, in bytes, where several panels are read side by side; a single
 * token's products read as reading() says. */
static const int64_t kAhead = 1152;
static const int64_t kScalesAhead = 512, kHalvesAhead = 256;
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

/* The first step of a unit of codes of `Bits` bits to take of its vector i. */
constexpr int first_step(int Bits, int i) {
  if (Bits == 8) return i;
  if (Bits % 2 && i == Bits - 1) return 0;
  if (Bits < 4) return 4 * i;
  return i < 4 ? 2 * i : 4 * (i - 4);
}

/* Step S of a unit of codes of `Bits` bits, whose vectors are v, as 64 bytes. */
template <int Bits, int S>
INLINE Bytes unpack_step(const Bytes (&v)[Bits]) {
  if constexpr (Bits == 8) {
    return v[S];
  } else if constexpr (Bits >= 4) {
    Bytes low = field<S % 2 * 4, 4>(v[S / 2]);
    if constexpr (Bits == 4) return low;
    else if constexpr (Bits == 5) return insert<S, 1, 4>(low, v[4]);
    else {
      Bytes middle = insert<S % 4 * 2, 2, 4>(low, v[4 + S / 4]);
      if constexpr (Bits == 6) return middle;
      else return insert<S, 1, 6>(middle, v[6]);
    }
  } else {
    Bytes low = field<S % 4 * 2, 2>(v[S / 4]);
    if constexpr (Bits == 2) return low;
    else return insert<S, 1, 2>(low, v[2]);
  }
}

template <int Bits, bool Lookup, int S>
INLINE Bytes integer_step(const Bytes (&v)[Bits], [[maybe_unused]] Bytes table) {
  Bytes codes = unpack_step<Bits, S>(v);
  if constexpr (Lookup) return look_up(table, codes);
  return codes;
}

/* One unit as 8 steps of bytes. */
template <int Bits, bool Lookup>
INLINE void unpack_unit(const uint8_t *unit, uint8_t *out, Bytes table) {
  Bytes v[Bits];
  UNROLL for (int i = 0; i < Bits; i++) v[i] = load_bytes(unit + i * kVector);
  store_bytes(out, integer_step<Bits, Lookup, 0>(v, table));
  store_bytes(out + 64, integer_step<Bits, Lookup, 1>(v, table));
  store_bytes(out + 128, integer_step<Bits, Lookup, 2>(v, table));
  store_bytes(out + 192, integer_step<Bits, Lookup, 3>(v, table));
  store_bytes(out + 256, integer_step<Bits, Lookup, 4>(v, table));
  store_bytes(out + 320, integer_step<Bits, Lookup, 5>(v, table));
  store_bytes(out + 384, integer_step<Bits, Lookup, 6>(v, table));
  store_bytes(out + 448, integer_step<Bits, Lookup, 7>(v, table));
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
  const float *scales = nullptr; /* of the tile's segments, where there are several: floats */
  int64_t scales_stride = 0;
  const int8_t *values = nullptr; /* of the tile's first token, from column `begin` on */
  int64_t segment = 0;    /* columns of all segments of the block, where they are equally long */
  int64_t ahead = kAhead; /* how far ahead packed codes are asked for */
};

/* What stands before is done before what follows, as far as the compiler is concerned. */
INLINE void in_this_order() { __asm__ volatile("" ::: "memory"); }

/* sums[c][p][t] += the products of steps First..Last of a unit of panel p, whose vectors so far are v.
 * Chains c are independent: a lone accumulator would wait for its own latency. `next` is the unit to ask
 * for, or its first line unless EveryLine: in the second cache, which can wait for more lines than the
 * first, unless so many tokens or panels are multiplied with each line that memory can wait. Lines are
 * asked for one after the other, as all of a unit's at once come up to a fifth slower, and read where a
 * step first takes them, which is worth up to 0.05 of memory's speed. */
template <bool EveryLine, int Bits, bool Lookup, bool Wide, int First, int Last, int C, int P, int T>
INLINE void add_steps(I32 (&sums)[C][P][T], int p, Bytes (&v)[Bits], const uint8_t *unit,
                      const uint8_t *next, const int8_t *x, int64_t ldx, Bytes table) {
  if constexpr (First < Last) {
    constexpr int64_t line = First * Bits / 8, begun = (First + 1) * Bits / 8 - line;
    constexpr int64_t lines = EveryLine || line == 0 ? begun : 0;
    if constexpr (P == 1 && T < 4) prefetch_far(next + line * kVector, lines * kVector);
    else prefetch(next + line * kVector, lines * kVector);
    in_this_order();
    UNROLL for (int i = 0; i < Bits; i++)
      if (first_step(Bits, i) == First) v[i] = load_bytes(unit + i * kVector);
    const Bytes w = integer_step<Bits, Lookup, First>(v, table);
    UNROLL for (int t = 0; t < T; t++)
      sums[First % C][p][t] = dot_at<Wide>(sums[First % C][p][t], w, x + t * ldx + First * kStep);
    add_steps<EveryLine, Bits, Lookup, Wide, First + 1, Last>(sums, p, v, unit, next, x, ldx, table);
  }
}

/* The same of a unit in memory; steps before First may have been the first to take a vector. */
template <bool EveryLine, int Bits, bool Lookup, bool Wide, int First, int Last, int C, int P, int T>
INLINE void add_unit(I32 (&sums)[C][P][T], int p, const uint8_t *unit, const uint8_t *next, const int8_t *x,
                     int64_t ldx, Bytes table) {
  Bytes v[Bits];
  UNROLL for (int i = 0; i < Bits; i++)
    if (first_step(Bits, i) < First) v[i] = load_bytes(unit + i * kVector);
  add_steps<EveryLine, Bits, Lookup, Wide, First, Last>(sums, p, v, unit, next, x, ldx, table);
}

/* What the sums of a segment start at, from the tile's first token on. */
INLINE const int32_t *starts_of(const Tile &tile, int64_t segment) {
  return tile.product.starts + segment * tile.product.x.tokens + tile.token;
}

/* Integer sums of a segment start at -zero * sum(x): then `code - zero` needs no arithmetic. */
template <int C, int P, int T>
INLINE void start_segment(I32 (&sums)[C][P][T], const int32_t *starts) {
  UNROLL for (int t = 0; t < T; t++) {
    I32 start = set_i32(starts[t]);
    UNROLL for (int p = 0; p < P; p++) {
      sums[0][p][t] = start;
      UNROLL for (int c = 1; c < C; c++) sums[c][p][t] = set_i32(0);
    }
  }
}

/* Divisions are slow, and here a divisor is 1 as a rule. */
INLINE int64_t quotient(int64_t a, int64_t b) { return b == 1 ? a : a / b; }

/* What the sums of a segment are multiplied with, known when compiling for the usual cases. */
enum Scales { kRows, kRowsAndTokens, kAny };

INLINE Scales scales_of(const Product &product) {
  if (product.weight->zeros) return kAny;
  return product.x.scale_groups > 1 ? kRowsAndTokens : kRows;
}

/* Whether a segment is multiplied with a float16 for each row and nothing else: the recipes' weights in
 * groups. */
INLINE bool in_halves(const Product &product) {
  const pt_weight &w = *product.weight;
  const Activations &x = product.x;
  return scales_of(product) == kRows && w.scales && w.scale_type == PT_F16 && x.segments_per_group == 1 &&
         x.segment % kUnit == 0;
}

/* Calls add(p, t, float(sum), scale) for the sums of a finished segment, which belongs to a group of
 * weights; scale_at(p, at) is what those of panel p have, the `at`-th of all. */
template <Scales Kind, int C, int P, int T, class L, class F>
INLINE void end_segment(I32 (&sums)[C][P][T], const Tile &tile, int64_t segment, int64_t group, L scale_at,
                        F add_product) {
  const pt_weight &w = *tile.product.weight;
  const Activations &x = tile.product.x;
  const int64_t segments = x.segments, scale_groups = x.scale_groups;
  const int32_t *x_sums = x.sums + tile.token * segments + segment;
  const float *x_scales = nullptr;
  if (Kind == kRowsAndTokens || (Kind == kAny && scale_groups > 1))
    x_scales = x.scales + tile.token * scale_groups + quotient(segment, x.segments_per_scale);
  const uint8_t *zeros = Kind == kAny ? w.zeros : nullptr;
  UNROLL for (int p = 0; p < P; p++) {
    const int64_t at = ((tile.panel + p) * x.weight_groups + group) * kPanel;
    const F32 scale = scale_at(p, at);
    UNROLL for (int t = 0; t < T; t++) {
      I32 sum = sums[0][p][t];
      UNROLL for (int c = 1; c < C; c++) sum = add(sum, sums[c][p][t]);
      if (zeros) sum = subtract_product(sum, zeros + at, x_sums[t * segments]);
      F32 factor = scale;
      if (x_scales) factor = mul(scale, set_f32(x_scales[t * scale_groups]));
      add_product(p, t, to_f32(sum), factor);
    }
  }
}

/* y of a tile. Of tokens in digits each adds to what those before came to, in place of the bias. */
template <int P, int T>
INLINE void write_tile(F32 (&floats)[P][T], const Tile &tile) {
  const pt_weight &w = *tile.product.weight;
  const Activations &x = tile.product.x;
  /* `count` tokens from t on are one row of y. */
  auto write = [&](int t, auto count) INLINE_LAMBDA {
    const int64_t token = tile.token + t;
    float *y = tile.product.y + token / count.value * tile.product.ldy;
    F32 scales[count.value];
    UNROLL for (int i = 0; i < count.value; i++)
      scales[i] = set_f32(x.scales && x.scale_groups == 1 ? x.scales[token + i] * w.multiplier : w.multiplier);
    UNROLL for (int p = 0; p < P; p++) {
      int64_t row = (tile.panel + p) * kPanel;
      int64_t left = w.rows - row < kPanel ? w.rows - row : kPanel;
      if (left <= 0) return;
      F32 sum = w.bias ? load_some(w.bias + row, left) : set_f32(0.0f);
      UNROLL for (int i = 0; i < count.value; i++) sum = fma(floats[p][t + i], scales[i], sum);
      store_some(y + row, sum, left);
    }
  };
  if (T % kDigits == 0 && x.digits > 1) {
    if constexpr (T % kDigits == 0)
      UNROLL for (int t = 0; t < T; t += kDigits) write(t, Constant<kDigits>{});
  } else {
    UNROLL for (int t = 0; t < T; t++) write(t, Constant<1>{});
  }
}

/* P panels x T tokens, unpacked on the way. */
template <bool EveryLine, int Bits, bool Lookup, bool Wide, Scales Kind, int P, int T>
void packed_tile(const Tile &tile) {
  const pt_weight &w = *tile.product.weight;
  const Activations &x = tile.product.x;
  const int64_t units = units_of(w.cols), stride = tile.codes.stride, ldx = x.stride;
  /* Towards its end a panel asks for the one that its stream continues with. */
  const int64_t ahead = tile.ahead, turn = units - ceil_div(ahead, unit_bytes(Bits)), jump = (P - 1) * stride;
  const int8_t *codes = x.codes_at(tile.token, 0);
  const uint8_t *unit = tile.codes.first;
  Bytes table = Lookup ? repeat16(w.lookup) : Bytes{};
  constexpr int C = P * T >= 4 ? 1 : 4 / (P * T);
  I32 sums[C][P][T];
  F32 floats[P][T];
  UNROLL for (int p = 0; p < P; p++)
    UNROLL for (int t = 0; t < T; t++) floats[p][t] = set_f32(0.0f);
  const int64_t group_bytes = kPanel * scale_bytes(w), panel_scales = x.weight_groups * group_bytes;
  const int64_t segments_per_group = x.segments_per_group;
  auto scale_sums = [&](int64_t segment) INLINE_LAMBDA {
    const int64_t group = quotient(segment, segments_per_group);
    int64_t at = group * group_bytes + kScalesAhead;
    if (at >= panel_scales) at += (P - 1) * panel_scales;
    UNROLL for (int p = 0; p < P; p++)
      prefetch((const uint8_t *)w.scales + (tile.panel + p) * panel_scales + at, group_bytes);
    auto stored = [&](int, int64_t at) INLINE_LAMBDA { return load_scales(w, at); };
    end_segment<Kind>(sums, tile, segment, group, stored, [&](int p, int t, F32 sum, F32 factor) INLINE_LAMBDA {
      floats[p][t] = fma(sum, factor, floats[p][t]);
    });
  };
  /* Adds a unit, or half of one, of every panel. */
  auto add_panels = [&](int64_t u, auto first, auto last) INLINE_LAMBDA {
    constexpr int from = decltype(first)::value, to = decltype(last)::value;
    const int64_t further = ahead + (u >= turn ? jump : 0);
    UNROLL for (int p = 0; p < P; p++)
      add_unit<EveryLine, Bits, Lookup, Wide, from, to>(sums, p, unit + p * stride, unit + p * stride + further,
                                                        codes, ldx, table);
  };
  const int64_t segments = x.segments, per_segment = x.segment / kUnit, tokens = x.tokens;
  const int32_t *starts = starts_of(tile, 0);
  if (x.segment == kUnit / 2) { /* two segments a unit */
    for (int64_t u = 0; u < units; u++, unit += unit_bytes(Bits), codes += kUnit) {
      start_segment(sums, starts), starts += tokens;
      add_panels(u, Constant<0>{}, Constant<4>{});
      scale_sums(2 * u);
      if (2 * u + 1 == segments) break;
      start_segment(sums, starts), starts += tokens;
      add_panels(u, Constant<4>{}, Constant<8>{});
      scale_sums(2 * u + 1);
    }
  } else {
    for (int64_t segment = 0, u = 0; segment < segments; segment++, starts += tokens) {
      const int64_t end = u + per_segment < units ? u + per_segment : units;
      start_segment(sums, starts);
      for (; u < end; u++, unit += unit_bytes(Bits), codes += kUnit)
        add_panels(u, Constant<0>{}, Constant<8>{});
      scale_sums(segment);
    }
  }
  write_tile(floats, tile);
}

/* A panel x T tokens where in_halves() holds. A processor looks some hundred instructions ahead: the
 * fewer of them each line of codes takes, the more lines are on their way at once, which is what fast
 * memory wants (on Zen 5; Zen 4 minds more which lines are asked for). So a segment has as few as it can:
 * its units written out, no chains but what it needs. With few registers that would be slower by 5 to 20%. */
template <bool EveryLine, int Bits, bool Lookup, bool Wide, int T>
void halves_tile(const Tile &tile) {
  const pt_weight &w = *tile.product.weight;
  const Activations &x = tile.product.x;
  const int64_t tokens = x.tokens, ldx = x.stride;
  const uint8_t *unit = tile.codes.first, *next = unit + tile.ahead;
  __asm__("" : "+r"(next)); /* or gcc holds the way to every line of it in a register that it lacks */
  const int8_t *codes = x.codes_at(tile.token, 0);
  const uint16_t *scales = (const uint16_t *)w.scales + tile.panel * x.weight_groups * kPanel;
  const int32_t *starts = starts_of(tile, 0);
  Bytes table = Lookup ? repeat16(w.lookup) : Bytes{};
  F32 floats[1][T];
  UNROLL for (int t = 0; t < T; t++) floats[0][t] = set_f32(0.0f);
  /* A segment is so many runs of so many units, the latter known when compiling. */
  auto add_segment = [&](auto runs, auto units) INLINE_LAMBDA {
    /* While the sum of one segment waits for itself those of the next are under way, unless codes take
     * so long to unpack that they are too far away. Long segments are no slower for it, from memory. */
    constexpr int C = T == 1 && Bits > 4 && Bits < 8 ? 2 : 1;
    I32 sums[C][1][T];
    start_segment(sums, starts), starts += tokens;
    for (int64_t run = 0; run < runs; run++)
      UNROLL for (int u = 0; u < units.value; u++) {
        add_unit<EveryLine, Bits, Lookup, Wide, 0, 8>(sums, 0, unit, next, codes, ldx, table);
        unit += unit_bytes(Bits), next += unit_bytes(Bits), codes += kUnit;
      }
    if constexpr (units.value > 1 || !kManyRegisters)
      if ((uintptr_t)scales % kVector == 0) prefetch((const uint8_t *)scales + kHalvesAhead, kVector);
    in_this_order(); /* as in add_steps */
    auto stored = [&](int, int64_t) INLINE_LAMBDA { return load_halves<true>(scales); };
    end_segment<kRows>(sums, tile, 0, 0, stored, [&](int, int t, F32 sum, F32 factor) INLINE_LAMBDA {
      floats[0][t] = fma(sum, factor, floats[0][t]);
    });
    scales += kPanel;
  };
  int64_t left = units_of(w.cols);
  const int64_t per_segment = x.segment / kUnit;
  const Constant<1> one{};
  auto add_segments = [&](auto runs, auto units) INLINE_LAMBDA {
    for (; left >= per_segment; left -= per_segment) add_segment(runs, units);
  };
  if constexpr (kManyRegisters) {
    if (per_segment == 1) add_segments(one, one);
    else if (per_segment == 2) add_segments(one, Constant<2>{});
    else if (per_segment == 4) add_segments(one, Constant<4>{});
  }
  add_segments(per_segment, one);
  if (left) add_segment(left, one);
  write_tile(floats, tile);
}

/* sums[p][t] += the products of `count` columns from `begin` on of a block, unpacked before. */
template <bool Wide, int Run, int P, int T>
INLINE void add_columns(I32 (&sums)[P][T], const Tile &tile, const int8_t *values, int64_t begin, int64_t count) {
  const int64_t stride = tile.codes.stride, ldx = tile.product.x.stride;
  const uint8_t *codes = tile.codes.first + (begin - tile.begin) * kPanel;
  values += begin - tile.begin;
  for (int64_t done = 0; done < count; done += Run, codes += Run * kPanel, values += Run)
    UNROLL for (int k = 0; k < Run; k += kStep) {
      Bytes step[P];
      UNROLL for (int p = 0; p < P; p++) step[p] = load_bytes(codes + k * kPanel + p * stride), hold(step[p]);
      UNROLL for (int t = 0; t < T; t++) {
        Quad four = broadcast4(values + k + t * ldx);
        UNROLL for (int p = 0; p < P; p++) sums[p][t] = dot<Wide>(sums[p][t], step[p], four);
      }
    }
}

/* Asks for the memory that the last block of a tile is written to. */
template <int P, int T>
INLINE void ask_for_output(const Tile &tile) {
  const float *y = tile.product.y + tile.panel * kPanel;
  UNROLL for (int t = 0; t < T; t++)
    prefetch_far((const uint8_t *)(y + tile.product.x.row_of(tile.token + t) * tile.product.ldy), P * kVector);
}

/* P panels x T tokens x a block of columns under a single scale; integer sums are carried. */
template <bool Wide, Scales Kind, int P, int T>
void row_tile(const Tile &tile) {
  const bool last = tile.end == padded(tile.product.weight->cols);
  I32 sums[1][P][T];
  float *const aside = tile.carried;
  if (last) ask_for_output<P, T>(tile);
  if (tile.begin == 0) {
    start_segment(sums, starts_of(tile, 0));
  } else {
    UNROLL for (int p = 0; p < P; p++)
      UNROLL for (int t = 0; t < T; t++) sums[0][p][t] = load_bits(aside + (p * T + t) * kPanel);
  }
  add_columns<Wide, kRun>(sums[0], tile, tile.values, tile.begin, tile.end - tile.begin);
  if (!last) {
    UNROLL for (int p = 0; p < P; p++)
      UNROLL for (int t = 0; t < T; t++) store_bits(aside + (p * T + t) * kPanel, sums[0][p][t]);
    return;
  }
  F32 floats[P][T];
  auto stored = [&](int, int64_t at) INLINE_LAMBDA { return load_scales(*tile.product.weight, at); };
  end_segment<Kind>(sums, tile, 0, 0, stored, [&](int p, int t, F32 sum, F32 factor) INLINE_LAMBDA {
    floats[p][t] = fma(sum, factor, set_f32(0.0f));
  });
  write_tile(floats, tile);
}

/* P panels x T tokens x a block of columns of several segments; floats are carried. `Segment`: their
 * length where it is known when compiling, or 0. */
template <bool Wide, Scales Kind, int Segment, int P, int T>
void grouped_tile(const Tile &tile) {
  const Activations &x = tile.product.x;
  const int64_t segments = x.segments, length = Segment ? Segment : x.segment;
  const int8_t *values = tile.values;
  const bool last = tile.end == padded(tile.product.weight->cols);
  I32 sums[1][P][T];
  F32 floats[P][T];
  if (last) ask_for_output<P, T>(tile);
  UNROLL for (int p = 0; p < P; p++)
    UNROLL for (int t = 0; t < T; t++)
      floats[p][t] = tile.begin == 0 ? set_f32(0.0f) : load_floats(tile.carried + (p * T + t) * kPanel);
  int64_t segment = tile.begin / length;
  const float *scales = tile.scales;
  /* Half a unit of padding is no segment. */
  for (int64_t begin = tile.begin; begin < tile.end && segment < segments; segment++, scales += tile.scales_stride) {
    const int64_t count = Segment || begin + length < tile.end ? length : tile.end - begin;
    start_segment(sums, starts_of(tile, segment));
    add_columns<Wide, Segment == 32 ? Segment : kRun>(sums[0], tile, values, begin, count);
    auto expanded = [&](int p, int64_t) INLINE_LAMBDA { return load_floats(scales + p * kPanel); };
    const int64_t group = Kind == kAny ? quotient(segment, x.segments_per_group) : 0; /* of zero points */
    end_segment<Kind>(sums, tile, segment, group, expanded, [&](int p, int t, F32 sum, F32 factor) INLINE_LAMBDA {
      floats[p][t] = fma(sum, factor, floats[p][t]);
    });
    begin += count;
  }
  if (last) return write_tile(floats, tile);
  UNROLL for (int p = 0; p < P; p++)
    UNROLL for (int t = 0; t < T; t++) store_some(tile.carried + (p * T + t) * kPanel, floats[p][t], kPanel);
}

/* The scales of a block as floats: [segment][panel][16]. */
void expand_scales(const Product &product, const Block &block, float *out) {
  const pt_weight &w = *product.weight;
  const Activations &x = product.x;
  for (int64_t segment = block.begin / x.segment; segment < x.segments && segment * x.segment < block.end; segment++)
    for (int64_t panel = block.panel; panel < block.panel_end; panel++, out += kPanel) {
      const int64_t group = segment / x.segments_per_group;
      store_some(out, load_scales(w, (panel * x.weight_groups + group) * kPanel), kPanel);
    }
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
  INLINE_MEMBER void add(F32 (&sums)[P][T], const uint8_t *panel, int64_t u, int64_t stride, int64_t ahead,
                         const float *x, int64_t ldx, int64_t first, int64_t last,
                         const F32 (&)[P]) const {
    const uint8_t *unit = panel + u * unit_bytes(Bits);
    /* What many tokens are multiplied with is near: asking for it would cost a fifth of their time. */
    if constexpr (P == 1 || T == 1)
      UNROLL for (int p = 0; p < P; p++) prefetch(unit + p * stride + ahead, unit_bytes(Bits));
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

  static constexpr int64_t size = Bits / 8, lanes = 4 / size; /* columns that one lane holds */

  /* f(0) to f(15), written out where as many vectors stay in registers. */
  template <class F>
  static INLINE_MEMBER void sixteen_times(F f) {
    if constexpr (kManyRegisters) UNROLL for (int i = 0; i < kPanel; i++) f(i);
    else for (int i = 0; i < kPanel; i++) f(i);
  }

  /* Columns from `column` on of a panel's rows, v[i] the i-th of them, or with 16 bits the i-th pair;
   * rows and columns beyond the last are 0. */
  INLINE_MEMBER void load(const uint8_t *panel, int64_t column, F32 (&v)[kPanel]) const {
    const int64_t row_bytes = w.cols * size, at = column * size;
    const uint8_t *end = w.codes + w.rows * row_bytes, *from = panel + at;
    if (panel + kPanel * row_bytes <= end && w.cols - column >= kPanel * lanes) {
      /* Towards its end a row asks for the one of the next panel. */
      const int64_t ahead = kRowAhead + (at + kRowAhead < row_bytes ? 0 : (kPanel - 1) * row_bytes);
      sixteen_times([&](int r) INLINE_LAMBDA {
        v[r] = load_floats((const float *)from);
        prefetch_far(from + ahead, kVector);
        from += row_bytes;
      });
    } else {
      const int64_t left = w.cols - column, count = left < 0 ? 0 : left < kPanel * lanes ? left : kPanel * lanes;
      for (int r = 0; r < kPanel; r++, from += row_bytes) {
        alignas(64) uint8_t some[64] = {};
        if (from < end) __builtin_memcpy(some, from, count * size);
        v[r] = load_floats((const float *)some);
      }
    }
    transpose(v);
  }

  /* Calls f(i, column i) for all columns that `load` gave. */
  template <class F>
  INLINE_MEMBER void for_columns(const F32 (&v)[kPanel], F f) const {
    sixteen_times([&](int i) INLINE_LAMBDA {
      if constexpr (Bits == 32) {
        f(i, v[i]);
      } else {
        f(2 * i, half_lanes<Half, 0>(v[i]));
        f(2 * i + 1, half_lanes<Half, 1>(v[i]));
      }
    });
  }

  template <int P, int T>
  INLINE_MEMBER void add(F32 (&sums)[P][T], const uint8_t *panel, int64_t u, int64_t stride, int64_t,
                         const float *x, int64_t ldx, int64_t, int64_t, const F32 (&)[P]) const {
    for (int64_t first = 0; first < kUnit; first += kPanel * lanes)
      UNROLL for (int p = 0; p < P; p++) {
        F32 v[kPanel];
        load(panel + p * stride, u * kUnit + first, v);
        for_columns(v, [&](int i, F32 column) INLINE_LAMBDA {
          UNROLL for (int t = 0; t < T; t++)
            sums[p][t] = fma(column, set_f32(x[t * ldx + first + i]), sums[p][t]);
        });
      }
  }

  INLINE_MEMBER void unpack(const uint8_t *panel, int64_t u, F32, F32, float *out) const {
    for (int64_t first = 0; first < kUnit; first += kPanel * lanes, out += lanes * kPanel * kPanel) {
      F32 v[kPanel];
      load(panel, u * kUnit + first, v);
      for_columns(v, [&](int i, F32 column) INLINE_LAMBDA { store_some(out + i * kPanel, column, kPanel); });
    }
  }
};

/* Weights stored as codes: code - zero, or (Table) a value for every code. */
template <int Bits, bool Table>
struct CodeWeights {
  static constexpr int bits = Bits;
  FloatTable<Table ? Bits : 1> table;
  explicit CodeWeights(const pt_weight &w) {
    if constexpr (Table) {
      float whole[16];
      for (int i = 0; i < 16; i++) whole[i] = (float)(i - w.zero);
      table = load_table<Bits>(w.stage == PT_INTEGER ? whole : w.table);
    }
  }
  template <int J>
  INLINE_MEMBER F32 column(Bytes step, F32 zero) const {
    if constexpr (Table) return look_up(table, index_of<Bits, J>(step));
    else return subtract(biased_byte<J>(step), zero);
  }

  /* sums[p][t] += the products of column J of a step of every panel. */
  template <int J, int P, int T>
  INLINE_MEMBER void add_column(F32 (&sums)[P][T], const Bytes (&steps)[P], const float *x,
                                int64_t ldx, const F32 (&zero)[P]) const {
    UNROLL for (int p = 0; p < P; p++) {
      F32 w = column<J>(steps[p], zero[p]);
      UNROLL for (int t = 0; t < T; t++) sums[p][t] = fma(w, set_f32(x[t * ldx + J]), sums[p][t]);
    }
  }

  /* The same of all columns of a step. */
  template <int P, int T>
  INLINE_MEMBER void add_columns(F32 (&sums)[P][T], const Bytes (&steps)[P], const float *x, int64_t ldx,
                                 const F32 (&zero)[P]) const {
    add_column<0>(sums, steps, x, ldx, zero);
    add_column<1>(sums, steps, x, ldx, zero);
    add_column<2>(sums, steps, x, ldx, zero);
    add_column<3>(sums, steps, x, ldx, zero);
  }

  /* Step S of a unit whose vectors are v, for `column`. */
  template <int S>
  static INLINE_MEMBER Bytes step_of(const Bytes (&v)[Bits]) {
    if constexpr (Table && Bits == 4) return index_nibbles<S % 2 * 4>(v[S / 2]);
    else return unpack_step<Bits, S>(v);
  }

  /* sums[p][t] += the products of steps First..Last of a unit of every panel, whose vectors so far are v. */
  template <int First, int Last, int P, int T>
  INLINE_MEMBER void add_steps(F32 (&sums)[P][T], Bytes (&v)[P][Bits], const uint8_t *const (&units)[P],
                               int64_t ahead, const float *x, int64_t ldx, const F32 (&zero)[P]) const {
    if constexpr (First < Last) {
      constexpr int64_t line = First * Bits / 8, lines = (First + 1) * Bits / 8 - line;
      Bytes steps[P];
      UNROLL for (int p = 0; p < P; p++) {
        prefetch(units[p] + ahead + line * kVector, lines * kVector);
        UNROLL for (int i = 0; i < Bits; i++)
          if (first_step(Bits, i) == First) v[p][i] = load_bytes(units[p] + i * kVector);
        steps[p] = step_of<First>(v[p]);
      }
      add_columns(sums, steps, x + First * kStep, ldx, zero);
      add_steps<First + 1, Last>(sums, v, units, ahead, x, ldx, zero);
    }
  }

  /* Groups are whole units or half ones. */
  template <int P, int T>
  INLINE_MEMBER void add(F32 (&sums)[P][T], const uint8_t *panel, int64_t u, int64_t stride, int64_t ahead,
                         const float *x, int64_t ldx, int64_t first, int64_t last,
                         const F32 (&zero)[P]) const {
    const uint8_t *units[P];
    UNROLL for (int p = 0; p < P; p++) {
      units[p] = panel + u * unit_bytes(Bits) + p * stride;
      __asm__("" : "+r"(units[p])); /* or gcc holds the way from one to the next for every line of them */
    }
    if constexpr (kManyRegisters) {
      Bytes v[P][Bits];
      if (first == 0) add_steps<0, 4>(sums, v, units, ahead, x, ldx, zero);
      if (last == 4) return;
      UNROLL for (int p = 0; p < P; p++)
        UNROLL for (int i = 0; i < Bits; i++)
          if (first_step(Bits, i) < 4) v[p][i] = load_bytes(units[p] + i * kVector);
      add_steps<4, 8>(sums, v, units, ahead, x, ldx, zero);
    } else {
      alignas(64) uint8_t bytes[P][kUnit * kPanel];
      for (int p = 0; p < P; p++) {
        prefetch(units[p] + ahead, unit_bytes(Bits));
        unpack_unit<Bits, false>(units[p], bytes[p], Bytes{});
      }
      for (int64_t s = first; s < last; s++) {
        Bytes steps[P];
        UNROLL for (int p = 0; p < P; p++) steps[p] = load_bytes(bytes[p] + s * kVector);
        add_columns(sums, steps, x + s * kStep, ldx, zero);
      }
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

/* The zero points of one panel and group, as floats and biased like the codes. */
INLINE F32 load_zero(const pt_weight &w, int64_t at) {
  if (!w.zeros) return set_f32((float)w.zero + kByteBias);
  return add(to_f32(load_u8(w.zeros + at)), set_f32(kByteBias));
}

/* A tile over `Weights`, all columns. */
template <class Weights, int P, int T>
void float_tile(const Tile &tile) {
  const pt_weight &w = *tile.product.weight;
  const Activations &x = tile.product.x;
  const int64_t steps = padded(w.cols) / kStep, groups = ceil_div(w.cols, w.group);
  const int64_t unit_steps = kUnit / kStep;
  const float *values = x.values + tile.token * x.stride;
  /* Towards its end a panel asks for the one that its stream continues with. */
  const int64_t turn = units_of(w.cols) - ceil_div(kAhead, unit_bytes(Weights::bits)), jump = (P - 1) * tile.codes.stride;
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
      const int64_t unit = step / unit_steps;
      weights.add(sums, tile.codes.first, unit, tile.codes.stride, kAhead + (unit >= turn ? jump : 0),
                  values + (step - first) * kStep, x.stride, first, last, zero);
      step += last - first;
    }
    UNROLL for (int p = 0; p < P; p++) {
      F32 scale = load_scales(w, ((tile.panel + p) * groups + group) * kPanel);
      UNROLL for (int t = 0; t < T; t++) floats[p][t] = fma(sums[p][t], scale, floats[p][t]);
    }
  }
  write_tile(floats, tile);
}

/* Panels [panel, panel + count) as float32 columns, zero points subtracted. */
template <class Weights>
void unpack_floats(const pt_weight &w, int64_t panel, int64_t count, float *out) {
  const int64_t units = units_of(w.cols), groups = ceil_div(w.cols, w.group);
  const Weights weights(w);
  for (int64_t p = panel; p < panel + count; p++) {
    const uint8_t *codes = w.codes + p * panel_bytes(w);
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
    with_count<P>(s.panel_end - panel, [&](auto panels) INLINE_LAMBDA {
      for (int64_t token = s.token; token < s.token_end;) {
        with_count<T>(s.token_end - token, [&](auto tokens) INLINE_LAMBDA {
          tile(panels, tokens, panel, token);
          token += tokens.value;
        });
      }
      panel += panels.value;
    });
  }
}

/* The same, with all digits of a token in a tile. */
template <int P, int T, class F>
INLINE void for_tiles(const Activations &x, const Share &s, F tile) {
  constexpr int fewer = kManyRegisters ? P : 1; /* panels, as there are more tokens */
  if constexpr (T % kDigits) {
    if (x.digits > 1) return for_tiles<fewer, kDigits>(s, tile);
  }
  for_tiles<P, T>(s, tile);
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
  } else if (w.stage == PT_INTEGER && (w.zeros || w.bits > kFastTables)) {
    with_bits(w.bits, [&](auto bits) { f(CodeWeights<decltype(bits)::value, false>(w)); });
  } else {
    with_bits(w.bits, [&](auto bits) { f(CodeWeights<decltype(bits)::value, true>(w)); });
  }
}

template <int Bits, bool Lookup>
void integer_gemv(const Product &product, const Share &share) {
  const pt_weight &w = *product.weight;
  const int64_t bytes = panel_bytes(w.cols, Bits);
  auto run = [&](auto panels, auto tokens, int64_t panel, int64_t token) {
    Tile tile{product, {codes_at(w, panel, 0), bytes}, panel, token, 0, padded(w.cols)};
    tile.ahead = reading().ahead;
    constexpr int p = decltype(panels)::value, t = decltype(tokens)::value;
    auto read = [&](auto every) {
      constexpr bool every_line = decltype(every)::value;
      auto multiply = [&](auto kind) {
        packed_tile<every_line, Bits, Lookup, Bits == 8, (Scales)decltype(kind)::value, p, t>(tile);
      };
      if constexpr (p == 1)
        if (in_halves(product)) return halves_tile<every_line, Bits, Lookup, Bits == 8, t>(tile);
      if (scales_of(product) == kRows) multiply(Constant<kRows>{});
      else multiply(Constant<kAny>{});
    };
    if constexpr (p == 1 && t == 1 && kManyRegisters)
      if (!reading().every_line) return read(Constant<false>{});
    read(Constant<true>{});
  };
  /* With few registers several tokens wait for their products, not for memory. */
  const bool one_token = share.token_end - share.token == 1;
  if (reading().streams == 1 || !(kManyRegisters || one_token)) for_tiles<1, kGemvTokens>(product.x, share, run);
  else for_tiles<2, kManyRegisters ? kGemvTokens : 1>(product.x, share, run);
}

template <class Weights>
void float_gemv(const Product &product, const Share &share) {
  const pt_weight &w = *product.weight;
  const int64_t bytes = panel_bytes(w);
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

/* Whether a product has one scale for all columns, so that its tiles hold integer sums alone. */
INLINE bool by_rows(const Product &product) { return product.x.segments == 1; }

INLINE TileShape integer_tile(const Product &product) { return by_rows(product) ? kTile : kGroupedTile; }

template <bool Rows, bool Wide, int P, int T>
void byte_tile(const Tile &tile) {
  auto run = [&](auto kind) {
    constexpr Scales scales = (Scales)decltype(kind)::value;
    if constexpr (Rows) {
      row_tile<Wide, scales, P, T>(tile);
    } else {
      if constexpr (scales != kAny && P == kGroupedTile.panels && T == kGroupedTile.tokens) {
        if (tile.segment == 64) return grouped_tile<Wide, scales, 64, P, T>(tile);
        if (tile.segment == 32) return grouped_tile<Wide, scales, 32, P, T>(tile);
      }
      grouped_tile<Wide, scales, 0, P, T>(tile);
    }
  };
  switch (scales_of(tile.product)) {
    case kRows: return run(Constant<kRows>{});
    case kRowsAndTokens: return run(Constant<kRowsAndTokens>{});
    case kAny: return run(Constant<kAny>{});
  }
}

template <bool Rows, bool Wide>
void integer_gemm(const Product &product, const Share &share, uint8_t *scratch) {
  constexpr TileShape shape = Rows ? kTile : kGroupedTile;
  const int64_t tokens = share.token_end - share.token;
  float *scales = (float *)(scratch + panel_bytes(product.x.block, 8) * shape.panels);
  float *sums = scales + scales_of_block(product.x, shape.panels);
  for_blocks(product, share, shape.panels, ceil_div(tokens, shape.tokens), sums,
             [&](const Block &block, Ahead &ahead, float *carried) {
    const Codes codes = unpack(*product.weight, block, scratch);
    if (!Rows) expand_scales(product, block, scales);
    const int64_t segment = (block.end - block.begin) % product.x.segment ? 0 : product.x.segment;
    const int8_t *values = product.x.codes_at(0, block.begin);
    /* Nothing is carried where there is one block: every tile may use the same memory. */
    const bool carries = block.end - block.begin < padded(product.weight->cols);
    Share part{block.panel, block.panel_end, share.token, share.token_end};
    for_tiles<shape.panels, shape.tokens>(product.x, part, [&](auto panels, auto tokens, int64_t panel, int64_t token) {
      constexpr int p = decltype(panels)::value, t = decltype(tokens)::value;
      const int64_t before = (token - part.token) * (part.panel_end - part.panel) + (panel - part.panel) * t;
      Tile tile{product, {codes.first + (panel - part.panel) * codes.stride, codes.stride},
                panel, token, block.begin, block.end, carried + (carries ? before * kPanel : 0),
                scales + (panel - part.panel) * kPanel, (part.panel_end - part.panel) * kPanel,
                values + token * product.x.stride, segment};
      ahead.step();
      byte_tile<Rows, Wide, p, t>(tile);
    });
  });
}

void integer_gemm(const Product &product, const Share &share, uint8_t *scratch) {
  const bool wide = product.weight->bits == 8;
  auto gemm = by_rows(product) ? wide ? integer_gemm<true, true> : integer_gemm<true, false>
                               : wide ? integer_gemm<false, true> : integer_gemm<false, false>;
  gemm(product, share, scratch);
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
  return in_integers(product) ? integer_tile(product) : kFloatTile;
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

/* v[i] and v[i + h] become their sum and difference, for i with bit h clear; h = First, 2 First, ... */
template <int First, int N>
INLINE void butterflies(F32 (&v)[N]) {
  if constexpr (First < N) {
    UNROLL for (int i = 0; i < N; i++)
      if (!(i & First)) {
        const F32 a = v[i], b = v[i + First];
        v[i] = add(a, b), v[i + First] = subtract(a, b);
      }
    butterflies<2 * First>(v);
  }
}

/* The stages of a Hadamard product across N vectors `stride` floats apart; within them first, if
 * `Inside`; and at the end times `norm`. `to` may be `from`. */
template <int N, bool Inside>
INLINE void rotate_vectors(const float *from, float *to, int64_t stride, F32 norm, bool last) {
  F32 v[N];
  UNROLL for (int i = 0; i < N; i++) {
    v[i] = load_floats(from + i * stride);
    if (Inside) v[i] = butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(v[i]))));
  }
  butterflies<1>(v);
  UNROLL for (int i = 0; i < N; i++) store_some(to + i * stride, last ? mul(v[i], norm) : v[i], kPanel);
}

/* Runs of N vectors, each times the orthonormal Hadamard matrix. */
template <int N>
void rotate_runs(const float *from, float *to, int64_t cols, F32 norm) {
  for (int64_t i = 0; i < cols; i += N * kPanel) rotate_vectors<N, true>(from + i, to + i, kPanel, norm, true);
}

/* Longer runs in two passes: eight vectors that lie side by side, then the four (two) that are as far
 * apart as those reach. */
void rotate_long_runs(const float *from, float *to, int64_t cols, int64_t run, F32 norm) {
  const int64_t part = 8 * kPanel;
  for (int64_t begin = 0; begin < cols; begin += run, from += run, to += run) {
    for (int64_t i = 0; i < run; i += part) rotate_vectors<8, true>(from + i, to + i, kPanel, norm, false);
    for (int64_t i = 0; i < part; i += kPanel) {
      if (run == 2 * part) rotate_vectors<2, false>(to + i, to + i, part, norm, true);
      else rotate_vectors<4, false>(to + i, to + i, part, norm, true);
    }
  }
}

/* from [cols] times the orthonormal block-Hadamard matrix of models/rotation.py; `to` may be `from`. */
void rotate(const float *from, float *to, int64_t cols) {
  static_assert(kLargestRotation == 32 * kPanel, "the longest run is four times eight vectors");
  int64_t block = cols & -cols;
  if (block > kLargestRotation) block = kLargestRotation;
  const float norm = 1.0f / __builtin_sqrtf((float)block);
  switch (block / kPanel) {
    case 0: break;
    case 1: return rotate_runs<1>(from, to, cols, set_f32(norm));
    case 2: return rotate_runs<2>(from, to, cols, set_f32(norm));
    case 4: return rotate_runs<4>(from, to, cols, set_f32(norm));
    case 8: return rotate_runs<8>(from, to, cols, set_f32(norm));
    default: return rotate_long_runs(from, to, cols, block, set_f32(norm));
  }
  if (to != from) __builtin_memcpy(to, from, cols * sizeof(float));
  for (float *run = to; run < to + cols; run += block) {
    for (int64_t h = 1; h < block; h *= 2)
      for (int64_t i = 0; i < block; i++)
        if (!(i & h)) {
          const float a = run[i], b = run[i + h];
          run[i] = a + b, run[i + h] = a - b;
        }
    for (int64_t i = 0; i < block; i++) run[i] *= norm;
  }
}

/* Codes of columns [begin, end) of a row, which lie in one block; vectors take finite values only. */
void encode_columns(const float *x, int64_t begin, int64_t end, float scale, const pt_input &in,
                    bool finite, int8_t *codes) {
  if (finite) return encode(x + begin, end - begin, scale, in, codes);
  for (int64_t k = begin; k < end; k++) codes[k - begin] = (int8_t)code_of(x[k], scale, in);
}

/* Ends the codes of a token of `cols` columns: the zeros that follow, and the sums. */
void end_codes(int64_t token, int64_t cols, Activations &out) {
  auto codes_at = [&](int64_t column) { return const_cast<int8_t *>(out.codes_at(token, column)); };
  const int64_t whole = padded(cols), block = out.block;
  for (int64_t k = cols; k < whole; k++) *codes_at(k) = 0;
  int32_t *sums = const_cast<int32_t *>(out.sums) + token * out.segments;
  for (int64_t s = 0; s < out.segments; s++) sums[s] = 0;
  /* Half a unit of padding is no segment, and blocks are whole ones or parts of the only one. */
  const int64_t summed = out.segments * out.segment < whole ? out.segments * out.segment : whole;
  for (int64_t begin = 0; begin < summed; begin += block) {
    const int64_t columns = begin + block < summed ? block : summed - begin;
    sums_of(codes_at(begin), out.segment, columns, sums + begin / out.segment);
  }
}

/* The power of two that numbers of this absmax (as in scale_of) are counted in, so that none has more than
 * three digits: 127 * (1 + 256 + 65536) is the largest that has. */
INLINE float unit_of(uint32_t absmax_bits) {
  const int32_t exponent = (int32_t)(absmax_bits >> 23) - 22;
  const uint32_t unit = (uint32_t)(exponent < 1 ? 1 : exponent) << 23; /* smaller ones have no reciprocal */
  const float largest = float_of_bits(absmax_bits) / float_of_bits(unit);
  return float_of_bits(largest > 127.0f * 65793.0f ? unit + (1u << 23) : unit);
}

/* Each token as kDigits of them: integers under a power of two, lowest digit first. */
void split(const float *x, int64_t ldx, int64_t count, int64_t cols, int64_t token, Activations &out) {
  const uint32_t infinity = 0x7f800000u;
  for (int64_t t = 0; t < count; t++, x += ldx, token += kDigits) {
    const uint32_t absmax = largest_magnitude(x, cols);
    const bool finite = absmax < infinity; /* else none of the result is */
    const float unit = finite ? unit_of(absmax) : __builtin_nanf("");
    const F32 per_unit = set_f32(1.0f / unit);
    for (int64_t begin = 0; begin < cols; begin += kPanel) {
      const int64_t left = cols - begin < kPanel ? cols - begin : kPanel;
      alignas(64) int32_t numbers[kPanel] = {};
      if (finite) store_bits((float *)numbers, rounded(mul(load_some(x + begin, left), per_unit)));
      int8_t *to = const_cast<int8_t *>(out.codes_at(token, begin));
      for (int d = 0; d < kDigits; d++, to += out.stride)
        for (int i = 0; i < kPanel; i++) {
          to[i] = (int8_t)numbers[i];
          numbers[i] = (numbers[i] - to[i]) >> 8;
        }
    }
    float *scales = const_cast<float *>(out.scales) + token;
    for (int64_t d = 0; d < kDigits; d++) {
      scales[d] = d ? scales[d - 1] * 256.0f : unit;
      end_codes(token + d, cols, out);
    }
  }
}

/* Scales of all tokens first: the largest of the next is found while that of one is awaited. */
void quantize(const float *x, int64_t ldx, int64_t count, int64_t cols, const pt_input &in, int64_t token,
              Activations &out) {
  if (in.bits == PT_DIGITS) return split(x, ldx, count, cols, token * kDigits, out);
  const int64_t block = out.block;
  float *const all_scales = const_cast<float *>(out.scales) + token * out.scale_groups;
  for (int64_t t = 0; t < count; t++)
    for (int64_t g = 0, begin = 0; g < out.scale_groups; g++, begin += out.scale_group) {
      const int64_t left = cols - begin, columns = out.scale_group < left ? out.scale_group : left;
      all_scales[t * out.scale_groups + g] = scale_of(largest_magnitude(x + t * ldx + begin, columns), in);
    }
  /* Below what it is for infinity, all that it is the scale of are finite. */
  const float endless = scale_of(0x7f800000u, in);
  for (int64_t t = 0; t < count; t++, x += ldx, token++) {
    const float *scales = all_scales + t * out.scale_groups;
    auto codes_at = [&](int64_t column) { return const_cast<int8_t *>(out.codes_at(token, column)); };
    int8_t *codes = codes_at(0); /* of the block that ends at `block_end` */
    int64_t block_end = block;
    for (int64_t g = 0, begin = 0; g < out.scale_groups; g++) {
      const int64_t end = begin + out.scale_group < cols ? begin + out.scale_group : cols;
      while (begin < end) {
        if (begin == block_end) codes = codes_at(begin), block_end += block;
        const int64_t to = block_end < end ? block_end : end;
        encode_columns(x, begin, to, scales[g], in, scales[g] < endless, codes + begin - (block_end - block));
        begin = to;
      }
    }
    end_codes(token, cols, out);
  }
}

/* ------------------------------------------------------------------------------- probes */

/* What a probe computed; a lane that nothing reads would not be computed. */
INLINE int32_t kept(I32 sum) {
  float whole[kPanel];
  store_bits(whole, sum);
  __asm__ volatile("" : : "r"(whole) : "memory");
  return first_lane(sum);
}

/* Reads every byte once, in so many streams and asked for ahead. */
template <int Streams>
INLINE int32_t read_in_streams(const uint8_t *from, int64_t bytes) {
  const Quad ones = broadcast4((const int8_t *)"\1\1\1\1");
  const int64_t part = bytes / Streams;
  I32 sums[4] = {set_i32(0), set_i32(0), set_i32(0), set_i32(0)};
  for (int64_t i = 0; i + 4 * kVector <= part; i += 4 * kVector)
    UNROLL for (int s = 0; s < Streams; s++) {
      const uint8_t *at = from + s * part + i;
      if constexpr (Streams == 1) prefetch_far(at + kAhead, 4 * kVector); /* as add_steps does */
      else prefetch(at + kAhead, 4 * kVector);
      UNROLL for (int j = 0; j < 4; j++) sums[j] = dot<false>(sums[j], load_bytes(at + j * kVector), ones);
    }
  return kept(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

int32_t read_bytes(const uint8_t *from, int64_t bytes, int streams) {
  return streams == 1 ? read_in_streams<1>(from, bytes) : read_in_streams<2>(from, bytes);
}

/* Independent integer products of one step each, `rounds` times 16: only arithmetic. */
int32_t multiply_registers(int64_t rounds) {
  const uint8_t codes[kVector] = {1, 2, 3};
  Bytes w = load_bytes(codes);
  Quad x = broadcast4((const int8_t *)codes);
  constexpr int n = kTile.panels * kTile.tokens < 4 ? 4 : kTile.panels * kTile.tokens;
  I32 sums[n];
  UNROLL for (int i = 0; i < n; i++) sums[i] = set_i32(i);
  for (int64_t r = 0; r < rounds * 16 / n; r++)
    UNROLL for (int i = 0; i < n; i++) {
      opaque(w); /* or a part of the product would be done once for all sums */
      sums[i] = dot<false>(sums[i], w, x);
    }
  UNROLL for (int i = 1; i < n; i++) sums[0] = add(sums[0], sums[i]);
  return kept(sums[0]);
}

}  // namespace

#include "block.h"
#include "attention.h"
#include "columns.h"

namespace {

/* All of the above under the name of an instruction set. */
[[maybe_unused]] Kernels kernels_named(const char *name) {
  return {name,     kDigitsAreFast, gemm_tile,  gemv,       gemm,             unpack,   rotate,        quantize,
          rms_norm, gated,      accumulate, rotate_positions, soft_cap, add_partition, log_partition, remember,
          attend_run, join_runs,  round_columns, descend_columns, read_bytes, multiply_registers};
}

}  // namespace
