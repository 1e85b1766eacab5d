/* AMX INT8 (Intel from Sapphire Rapids): prefill on tiles, all else as in avx512.cpp.
 *
 * A tile product is 16 tokens x 64 columns times 64 columns x 16 rows, where the second lies as a
 * panel does: 16 steps of 64 bytes. Sums of a segment leave the tiles through
 * memory and meet their scales there, in the same order as everywhere.
 */
#include <string.h>

#include "kernels.h"

#if defined(__AMX_INT8__) && defined(__AMX_TILE__)
#include "simd_avx512.h"
#include "product.h"

namespace {

static const int kSide = 16; /* tokens, and rows, of a tile */
/* Of a block: 2 x 2 tiles of sums, panel by panel. */
static const int kPanels = 2, kTokens = 2 * kSide;
static const int64_t kAheadColumns = 128; /* how early activations are asked for */

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};
};

/* Tiles 0-3 hold sums, 4-5 activations, 6-7 weights, `step` columns at a time. */
void configure(int64_t step) {
  TileConfig config;
  for (int i = 0; i < 8; i++) {
    config.bytes_per_row[i] = i < 4 || i > 5 ? 64 : (uint16_t)step;
    config.rows[i] = i < 6 ? kSide : (uint8_t)(step / kStep);
  }
  _tile_loadconfig(&config);
}

typedef int32_t Sums[kSide][kPanel];

/* What is subtracted from codes to make them signed bytes: their zero point, but for 8 bits. Rows
 * with one scale keep theirs unsigned: subtracting from so few sums costs less. */
int32_t middle_of(const Product &product) {
  const pt_weight &w = *product.weight;
  if (product.x.segments == 1) return 0;
  return w.bits == 8 || w.zero > 128 ? 128 : w.zero;
}

/* A block of codes less `middle`, panel by panel. */
void make_signed(const Codes &from, int64_t panels, int64_t bytes, int32_t middle, uint8_t *to) {
  const __m512i less = _mm512_set1_epi8((char)middle);
  for (int64_t p = 0; p < panels; p++)
    for (int64_t i = 0; i < bytes; i += kVector) {
      Bytes codes = load_bytes(from.first + p * from.stride + i);
      store_bytes(to + p * bytes + i, {_mm512_sub_epi8(codes.v, less)});
    }
}

/* A block of columns x 2 panels x 32 tokens. */
struct Pass {
  const uint8_t *weights[2]; /* of `panel` and the next one; of `panel` twice where it is the last */
  const int8_t *activations; /* of `token` */
  int64_t columns, segment;  /* so many; the first segment */
  int64_t panel, panels, token, tokens; /* the first; how many there are: fewer at an end */
  bool first, last; /* of a row's blocks */
  Sums *carried;    /* integer sums of a single segment */
  float *floats;    /* of several: what those before came to; both tile by tile */
  const float *scales; /* of several, [segment][panels][16] */
};

/* The memory that a result is written to, asked for a part at every step: all at once, its many lines
 * are waited for. */
struct Output {
  const uint8_t *at;
  int64_t row_bytes, rows, part; /* from token to token; tokens left; at a time */

  INLINE_MEMBER void ask() {
    for (int64_t i = 0; i < part && rows > 0; i++, rows--, at += row_bytes) prefetch_far(at, 2 * kVector);
  }
};

/* What scales the sums of a segment, 16 tokens x 16 rows, in the same order as everywhere:
 * added(t, floats) = fma(float(sums - zero * x sums), scale, floats), as end_segment has it. `Zeros`: there
 * are zero points that were not in the codes of the tiles, besides that of all of a single segment. */
template <bool Rows, bool TokenScales, bool Zeros>
struct Scaling {
  const Sums &sums;
  F32 scale;
  const int32_t *starts; /* of tokens, as everything below */
  const float *x_scales;
  const int32_t *x_sums;
  int64_t x_scales_stride, x_sums_stride;
  uint32_t middle; /* less the zero point */
  const uint8_t *zeros;

  INLINE_MEMBER Scaling(const Product &product, int64_t panel, int64_t token, int64_t segment, const Sums &sums,
                        F32 scale)
      : sums(sums), scale(scale) {
    const pt_weight &w = *product.weight;
    const Activations &x = product.x;
    if constexpr (Rows) starts = product.starts + token;
    if constexpr (TokenScales) {
      x_scales_stride = x.scale_groups;
      x_scales = x.scales + token * x_scales_stride + quotient(segment, x.segments_per_scale);
    }
    if constexpr (Zeros) {
      x_sums_stride = x.segments;
      x_sums = x.sums + token * x_sums_stride + segment;
      middle = Rows ? 0 : (uint32_t)(middle_of(product) - w.zero);
      zeros = nullptr;
      if (w.zeros) zeros = w.zeros + (panel * x.weight_groups + quotient(segment, x.segments_per_group)) * kPanel;
    }
  }

  INLINE_MEMBER F32 added(int64_t t, F32 floats) const {
    I32 sum = {_mm512_load_si512(sums[t])};
    if constexpr (Rows) sum = add(sum, set_i32(starts[t]));
    if constexpr (Zeros) {
      /* Unsigned, which may overflow: those beyond the last token are whatever lay there. */
      if (!Rows) sum = add(sum, set_i32((int32_t)(middle * (uint32_t)x_sums[t * x_sums_stride])));
      if (zeros) sum = subtract_product(sum, zeros, x_sums[t * x_sums_stride]);
    }
    F32 factor = scale;
    if constexpr (TokenScales) factor = mul(scale, set_f32(x_scales[t * x_scales_stride]));
    return fma(to_f32(sum), factor, floats);
  }
};

/* The sums of the first or the last segment, of tile `i`: none came before, or the result is due,
 * y = fma(floats, token scale, bias or the digits before), as write_tile has it. */
template <bool Rows, bool TokenScales, bool Zeros>
void end_tile(const Product &product, const Pass &pass, int64_t segment, int64_t i, const Sums &sums) {
  const pt_weight &w = *product.weight;
  const Activations &x = product.x;
  const bool first = segment == 0, last = segment == x.segments - 1;
  const int64_t panel = pass.panel + i / 2, token = pass.token + i % 2 * kSide, left = pass.tokens - i % 2 * kSide;
  if (i / 2 >= pass.panels || left <= 0) return;
  const int64_t at = (panel * x.weight_groups + quotient(segment, x.segments_per_group)) * kPanel;
  const Scaling<Rows, TokenScales, Zeros> scaling(product, panel, token, segment, sums, load_scales(w, at));
  float *floats = pass.floats + i * kSide * kPanel;
  if (!last) {
    UNROLL for (int t = 0; t < kSide; t++) _mm512_store_ps(floats + t * kPanel, scaling.added(t, set_f32(0.0f)).v);
    return;
  }
  const int64_t row = panel * kPanel, count = w.rows - row < kPanel ? w.rows - row : kPanel;
  const F32 bias = w.bias ? load_some(w.bias + row, count) : set_f32(0.0f);
  F32 factors = set_f32(w.multiplier);
  if (x.scale_groups == 1) factors = mul(load_floats(x.scales + token), factors); /* of 16 tokens */
  alignas(64) float factor[kSide];
  _mm512_store_ps(factor, factors.v);
  for (int64_t t = 0; t < left && t < kSide; t++) {
    const F32 before = first ? set_f32(0.0f) : F32{_mm512_load_ps(floats + t * kPanel)};
    float *y = product.y + x.row_of(token + t) * product.ldy + row;
    const F32 start = x.joins(token + t) ? load_some(y, count) : bias;
    store_some(y, fma(scaling.added(t, before), set_f32(factor[t]), start), count);
  }
}

/* A macro, as these instructions want the numbers of their tiles spelt out. */
#define MULTIPLY(sums, activations, weights)                      \
  do {                                                            \
    if constexpr (Rows) _tile_dpbsud(sums, activations, weights); \
    else _tile_dpbssd(sums, activations, weights);                \
  } while (0)

/* The passes of a share, one after the other. Each tile of sums is emptied just before the next segment
 * needs it, and scaled while that one is multiplied: twice as fast as in turn. `Rows`: a row is a
 * single segment, its codes unsigned. */
template <bool Rows, bool TokenScales, bool Zeros>
class Passes {
 public:
  Passes(const Product &product, int64_t step) : product_(product), step_(step) {}

  float *floats() { return floats_; }

  void multiply(const Pass &pass, Output &output) {
    const int64_t length = Rows ? pass.columns : product_.x.segment, ldx = product_.x.stride;
    const Pass *before = &done_;
    int64_t segment = pass.segment;
    const uint8_t *first = pass.weights[0], *second = pass.weights[1];
    const int8_t *x = pass.activations;
    const float *scales = pass.scales;
    for (int64_t begin = 0; begin < pass.columns; begin += length, segment++) {
      advance<true>(*before, &pass, first, second, x, output);
      if (before == &done_) done_ = pass, before = &pass;
      segment_ = segment, scales_ = scales, any_ = true;
      scales += pass.panels * kPanel;
      first += step_ * kPanel, second += step_ * kPanel, x += step_;
      const int64_t end = begin + length < pass.columns ? begin + length : pass.columns;
      for (int64_t k = begin + step_; k < end; k += step_) {
        output.ask();
        _tile_loadd(6, first, kVector);
        _tile_loadd(4, x, ldx);
        MULTIPLY(0, 4, 6);
        if (Rows) fetch(pass, 0, k + kAheadColumns), fetch(pass, 8, k + kAheadColumns);
        _tile_loadd(5, x + kSide * ldx, ldx);
        MULTIPLY(1, 5, 6);
        if (Rows) fetch(pass, 16, k + kAheadColumns), fetch(pass, 24, k + kAheadColumns);
        _tile_loadd(7, second, kVector);
        MULTIPLY(2, 4, 7);
        MULTIPLY(3, 5, 7);
        first += step_ * kPanel, second += step_ * kPanel, x += step_;
      }
    }
  }

  void finish() {
    Output none{};
    advance<false>(done_, nullptr, nullptr, nullptr, nullptr, none);
    any_ = false;
  }

 private:
  /* Tiles 0-3 begin with the products of the first columns of a segment; what they held goes where it
   * belongs. */
  template <bool More>
  INLINE_MEMBER void advance(const Pass &before, const Pass *next, const uint8_t *first, const uint8_t *second,
                             const int8_t *x, Output &output) {
    const int64_t ldx = product_.x.stride;
    const bool done = any_, ends = Rows ? before.last : segment_ == 0 || segment_ == product_.x.segments - 1;
    const Sums *carried = More && Rows && !next->first ? next->carried : nullptr;
    Sums *sums = Rows && !before.last ? before.carried : sums_;
    float *floats = before.floats;
    F32 scales[kPanels] = {};
    if (!Rows && done)
      for (int i = 0; i < kPanels; i++) scales[i] = load_floats(scales_ + (i < before.panels ? i : 0) * kPanel);
    auto finish = [&](int64_t i) INLINE_LAMBDA {
      if (ends) return end_tile<Rows, TokenScales, Zeros>(product_, before, segment_, i, sums[i]);
      if (Rows) return;
      const int64_t panel = before.panel + (i / 2 < before.panels ? i / 2 : 0), token = before.token + i % 2 * kSide;
      const Scaling<Rows, TokenScales, Zeros> scaling(product_, panel, token, segment_, sums[i], scales[i / 2]);
      float *at = floats + i * kSide * kPanel;
      UNROLL for (int t = 0; t < kSide; t++, at += kPanel)
        _mm512_store_ps(at, scaling.added(t, {_mm512_load_ps(at)}).v);
    };
    output.ask();
    if (done) _tile_stored(0, sums[0], kVector);
    if constexpr (More) {
      if (carried) _tile_loadd(0, carried[0], kVector);
      else _tile_zero(0);
      _tile_loadd(6, first, kVector);
      _tile_loadd(4, x, ldx);
      MULTIPLY(0, 4, 6);
    }
    if (done) {
      finish(0);
      _tile_stored(1, sums[1], kVector);
    }
    if constexpr (More) {
      if (carried) _tile_loadd(1, carried[1], kVector);
      else _tile_zero(1);
      _tile_loadd(5, x + kSide * ldx, ldx);
      MULTIPLY(1, 5, 6);
    }
    if (done) {
      finish(1);
      _tile_stored(2, sums[2], kVector);
    }
    if constexpr (More) {
      if (carried) _tile_loadd(2, carried[2], kVector);
      else _tile_zero(2);
      _tile_loadd(7, second, kVector);
      MULTIPLY(2, 4, 7);
    }
    if (done) {
      finish(2);
      _tile_stored(3, sums[3], kVector);
    }
    if constexpr (More) {
      if (carried) _tile_loadd(3, carried[3], kVector);
      else _tile_zero(3);
      MULTIPLY(3, 5, 7);
    }
    if (done) finish(3);
  }

  /* Asks for 8 rows of activations of a later column, or of the 32 tokens that follow: the 16 lines
   * that a tile needs are too far apart for the processor to see them coming. */
  INLINE_MEMBER void fetch(const Pass &pass, int64_t row, int64_t column) const {
    if (column >= pass.columns) row += kTokens, column -= pass.columns;
    const int8_t *from = pass.activations + row * product_.x.stride + column;
    UNROLL for (int i = 0; i < 8; i++) _mm_prefetch((const char *)from + i * product_.x.stride, _MM_HINT_T0);
  }

  const Product &product_;
  const int64_t step_; /* columns of a tile */
  bool any_ = false;
  /* What the tiles hold: */
  Pass done_{};
  int64_t segment_ = 0;
  const float *scales_ = nullptr;
  alignas(64) Sums sums_[4];
  alignas(64) float floats_[4 * kSide * kPanel];
};
#undef MULTIPLY

template <bool Rows, bool TokenScales, bool Zeros>
void multiply(const Product &product, const Share &share, int64_t step, uint8_t *scratch) {
  const pt_weight &w = *product.weight;
  const Activations &x = product.x;
  const Kernels &vectors = *avx512_kernels();
  const int64_t cols = padded(w.cols), blocks = ceil_div(share.token_end - share.token, kTokens);
  const Share whole{share.panel, share.panel_end, 0, blocks * kTokens}; /* for the sums of all tiles */
  float *scales = (float *)(scratch + panel_bytes(x.block, 8) * kPanels);
  float *sums = scales + scales_of_block(x, kPanels);
  Passes<Rows, TokenScales, Zeros> passes(product, step);
  for_blocks(product, whole, kPanels, blocks * (kPanels / 2), sums,
             [&](const Block &block, Ahead &ahead, float *carried) {
    const int64_t panels = block.panel_end - block.panel, columns = block.end - block.begin;
    const bool first = block.begin == 0, last = block.end == cols;
    Codes codes = vectors.unpack(w, block, scratch);
    if (!Rows) {
      passes.finish(); /* with the scales of the block before */
      make_signed(codes, panels, panel_bytes(columns, 8), middle_of(product), scratch);
      codes = {scratch, panel_bytes(columns, 8)};
      expand_scales(product, block, scales);
    }
    const uint8_t *second = codes.first + (panels > 1 ? codes.stride : 0);
    for (int64_t token = share.token; token < share.token_end; token += kTokens) {
      ahead.step();
      const int64_t tokens = share.token_end - token < kTokens ? share.token_end - token : kTokens;
      const int64_t row = x.row_of(token), rows = x.row_of(token + tokens - 1) + 1 - row;
      const float *y = product.y + row * product.ldy + block.panel * kPanel;
      Output output{(const uint8_t *)y, product.ldy * (int64_t)sizeof(float), last ? rows : 0,
                    ceil_div(kTokens, ceil_div(columns, step))};
      passes.multiply({{codes.first, second}, x.codes_at(token, block.begin), columns,
                       Rows ? 0 : block.begin / x.segment, block.panel, panels, token, tokens, first, last,
                       (Sums *)carried, first && last ? passes.floats() : carried, scales},
                      output);
      carried += kPanels * kTokens * kPanel;
    }
  });
  passes.finish();
}

/* Half units are too short for a tile, floats no codes: vectors multiply them, in shares of their own. */
bool on_tiles(const Product &product) { return in_integers(product) && product.x.segment % kUnit == 0; }

TileShape amx_tile(const Product &product) {
  return on_tiles(product) ? TileShape{kPanels, kTokens} : avx512_kernels()->gemm_tile(product);
}

void amx_gemm(const Product &product, const Share &share, uint8_t *scratch) {
  const pt_weight &w = *product.weight;
  const Activations &x = product.x;
  if (!on_tiles(product)) return avx512_kernels()->gemm(product, share, scratch);
  const int64_t step = x.segment % 64 || padded(w.cols) % 64 ? kUnit : 64;
  const bool rows = x.segments == 1, scales = x.scale_groups > 1;
  const bool zeros = w.zeros || (!rows && w.zero != middle_of(product));
  configure(step);
  auto run = rows     ? zeros ? multiply<true, false, true> : multiply<true, false, false>
             : scales ? zeros ? multiply<false, true, true> : multiply<false, true, false>
             : zeros  ? multiply<false, false, true>
                      : multiply<false, false, false>;
  run(product, share, step, scratch);
  _tile_release();
}

}  // namespace

const Kernels *amx_kernels() {
  static const Kernels kernels = [] {
    Kernels made = *avx512_kernels();
    made.name = "amx-int8";
    made.gemm_tile = amx_tile;
    made.gemm = amx_gemm;
    return made;
  }();
  return &kernels;
}
#else
const Kernels *amx_kernels() { return nullptr; }
#endif
