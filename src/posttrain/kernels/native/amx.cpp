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

/* One block of columns on its way through the tiles. */
struct Work {
  const Product &product;
  Codes codes; /* signed, but for those of a single segment */
  const int8_t *activations_of_block;
  int64_t begin, end, step;
  bool first, last;

  const uint8_t *weights(int64_t p, int64_t column) const {
    return codes.first + p * codes.stride + (column - begin) * kPanel;
  }
  const int8_t *activations(int64_t token, int64_t column) const {
    return activations_of_block + token * product.x.stride + column - begin;
  }
};

/* floats = fma(float(sums - zero * x sums), scale, floats) for 16 tokens of a panel, as
 * end_segment does. `Zeros`: the codes in the tiles were not those less their zero points. */
template <bool TokenScales, bool Zeros>
INLINE void add_segment(const Product &product, int64_t panel, int64_t token, int64_t segment,
                        const Sums &sums, float *floats) {
  const pt_weight &w = *product.weight;
  const Activations &x = product.x;
  const int64_t group = x.segments_per_group == 1 ? segment : segment / x.segments_per_group;
  const int64_t at = (panel * x.weight_groups + group) * kPanel;
  const F32 scale = load_scales(w, at);
  const int32_t *x_sums = x.sums + token * x.segments + segment;
  const int64_t x_group = x.segments_per_scale == 1 ? segment : segment / x.segments_per_scale;
  const float *x_scales = x.scales + token * x.scale_groups + (TokenScales ? x_group : 0);
  UNROLL for (int t = 0; t < kSide; t++, floats += kPanel) {
    I32 sum = {_mm512_load_si512(sums[t])};
    if constexpr (Zeros) {
      /* Unsigned, which may overflow: those beyond the last token are whatever lay there. */
      const uint32_t off = (uint32_t)(middle_of(product) - w.zero) * (uint32_t)x_sums[t * x.segments];
      sum = add(sum, set_i32((int32_t)off));
      if (w.zeros) sum = subtract_product(sum, w.zeros + at, x_sums[t * x.segments]);
    }
    F32 factor = scale;
    if constexpr (TokenScales) factor = mul(scale, set_f32(x_scales[t * x.scale_groups]));
    const F32 before = {_mm512_load_ps(floats)};
    _mm512_store_ps(floats, fma(to_f32(sum), factor, before).v);
  }
}

/* The memory that a block is written to, asked for a part at every step: all at once, its many lines
 * are waited for. */
struct Output {
  const uint8_t *at;
  int64_t row_bytes, rows, part; /* from token to token; tokens left; at a time */

  INLINE_MEMBER void ask() {
    for (int64_t i = 0; i < part && rows > 0; i++, rows--, at += row_bytes) prefetch_far(at, 2 * kVector);
  }
};

/* Panels p and p + 1 (or p alone, twice) x 32 tokens x a block of columns. */
struct Tiles {
  const Work &work;
  int64_t p, second, token;
  const int64_t ldx = work.product.x.stride;

  /* Asks for 8 rows of activations of a later column, or of the 32 tokens that follow: the 16 lines
   * that a tile needs are too far apart for the processor to see them coming. */
  INLINE_MEMBER void fetch(int64_t row, int64_t column) const {
    const bool here = column < work.end;
    const int8_t *from = work.activations(token + row + (here ? 0 : kTokens),
                                          here ? column : column - (work.end - work.begin));
    UNROLL for (int i = 0; i < 8; i++) _mm_prefetch((const char *)from + i * ldx, _MM_HINT_T0);
  }

  /* Tiles 0-3 += the products of columns [begin, end), whose codes are signed or not. */
  INLINE_MEMBER void add_signed(int64_t begin, int64_t end) const {
    for (int64_t k = begin; k < end; k += work.step) {
      _tile_loadd(6, work.weights(p, k), kVector);
      _tile_loadd(4, work.activations(token, k), ldx);
      _tile_dpbssd(0, 4, 6);
      _tile_loadd(5, work.activations(token + kSide, k), ldx);
      _tile_dpbssd(1, 5, 6);
      _tile_loadd(7, work.weights(second, k), kVector);
      _tile_dpbssd(2, 4, 7);
      _tile_dpbssd(3, 5, 7);
    }
  }
  INLINE_MEMBER void add_unsigned(int64_t begin, int64_t end, Output &output) const {
    for (int64_t k = begin; k < end; k += work.step) {
      output.ask();
      _tile_loadd(6, work.weights(p, k), kVector);
      _tile_loadd(4, work.activations(token, k), ldx);
      _tile_dpbsud(0, 4, 6);
      fetch(0, k + kAheadColumns), fetch(8, k + kAheadColumns);
      _tile_loadd(5, work.activations(token + kSide, k), ldx);
      _tile_dpbsud(1, 5, 6);
      fetch(16, k + kAheadColumns), fetch(24, k + kAheadColumns);
      _tile_loadd(7, work.weights(second, k), kVector);
      _tile_dpbsud(2, 4, 7);
      _tile_dpbsud(3, 5, 7);
    }
  }

  /* One segment, its sums carried from block to block. */
  void add_row(Sums *carried, Output &output) const {
    if (work.first) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    } else {
      _tile_loadd(0, carried[0], kVector);
      _tile_loadd(1, carried[1], kVector);
      _tile_loadd(2, carried[2], kVector);
      _tile_loadd(3, carried[3], kVector);
    }
    add_unsigned(work.begin, work.end, output);
    _tile_stored(0, carried[0], kVector);
    _tile_stored(1, carried[1], kVector);
    _tile_stored(2, carried[2], kVector);
    _tile_stored(3, carried[3], kVector);
  }

  /* Several segments. Each tile is emptied just before the next segment needs it, and its sums are
   * scaled, by scale(tile, segment, sums), while that one is multiplied: twice as fast as in turn. */
  template <class F>
  INLINE_MEMBER void add_segments(int64_t segment, Output &output, F scale) const {
    alignas(64) Sums sums[4];
    for (int64_t before = -1, k = work.begin;; before = segment++, k += work.product.x.segment) {
      const bool more = k < work.end, done = before >= 0;
      output.ask();
      if (done) _tile_stored(0, sums[0], kVector);
      if (more) {
        _tile_zero(0);
        _tile_loadd(6, work.weights(p, k), kVector);
        _tile_loadd(4, work.activations(token, k), ldx);
        _tile_dpbssd(0, 4, 6);
      }
      if (done) scale(0, before, sums[0]);
      if (done) _tile_stored(1, sums[1], kVector);
      if (more) {
        _tile_zero(1);
        _tile_loadd(5, work.activations(token + kSide, k), ldx);
        _tile_dpbssd(1, 5, 6);
      }
      if (done) scale(1, before, sums[1]);
      if (done) _tile_stored(2, sums[2], kVector);
      if (more) {
        _tile_zero(2);
        _tile_loadd(7, work.weights(second, k), kVector);
        _tile_dpbssd(2, 4, 7);
      }
      if (done) scale(2, before, sums[2]);
      if (done) _tile_stored(3, sums[3], kVector);
      if (more) {
        _tile_zero(3);
        _tile_dpbssd(3, 5, 7);
      }
      if (done) scale(3, before, sums[3]);
      if (!more) return;
      const int64_t end = k + work.product.x.segment;
      add_signed(k + work.step, end < work.end ? end : work.end);
    }
  }
};

/* As write_tile, for tokens one after the other. */
void write_rows(const Product &product, int64_t panel, int64_t token, int64_t tokens, const float *floats) {
  const pt_weight &w = *product.weight;
  const Activations &x = product.x;
  const int64_t row = panel * kPanel, count = w.rows - row < kPanel ? w.rows - row : kPanel;
  const F32 bias = w.bias ? load_some(w.bias + row, count) : set_f32(0.0f);
  const float *scales = x.scale_groups == 1 ? x.scales + token : nullptr;
  const float multiplier = w.multiplier;
  float *y = product.y + token * product.ldy + row;
  for (int64_t t = 0; t < tokens; t++, y += product.ldy, floats += kPanel) {
    const float scale = scales ? scales[t] * multiplier : multiplier;
    store_some(y, fma(load_floats(floats), set_f32(scale), bias), count);
  }
}

/* `carried`: integer sums of a single segment, floats of several; [panel][32 tokens][16]. */
template <bool TokenScales, bool Zeros>
void multiply_block(const Work &work, int64_t p, int64_t panels, int64_t panel, int64_t token,
                    int64_t tokens, float *carried) {
  const Product &product = work.product;
  const Activations &x = product.x;
  const Tiles tiles{work, p, panels > 1 ? p + 1 : p, token};
  const int64_t count = panels > 1 ? 4 : 2;
  alignas(64) float row[4 * kSide * kPanel];
  float *floats = x.segments == 1 || (work.first && work.last) ? row : carried;
  if (x.segments == 1 ? work.last : work.first) memset(floats, 0, sizeof row);
  auto scale = [&](int64_t i, int64_t segment, const Sums &sums) INLINE_LAMBDA {
    add_segment<TokenScales, Zeros>(product, panel + (i < count ? i / 2 : 0), token + i % 2 * kSide, segment,
                                    sums, floats + i * kSide * kPanel);
  };
  const int64_t steps = ceil_div(work.end - work.begin, x.segments == 1 ? work.step : x.segment);
  const float *y = product.y + token * product.ldy + panel * kPanel;
  Output output{(const uint8_t *)y, product.ldy * (int64_t)sizeof(float),
                !work.last ? 0 : tokens < kTokens ? tokens : kTokens, ceil_div(kTokens, steps)};
  if (x.segments == 1) {
    tiles.add_row((Sums *)carried, output);
    if (!work.last) return;
    for (int64_t i = 0; i < count; i++) scale(i, 0, ((Sums *)carried)[i]);
  } else {
    tiles.add_segments(work.begin / x.segment, output, scale);
    if (!work.last) return;
  }
  for (int64_t i = 0; i < count; i++) {
    const int64_t from = i % 2 * kSide, left = tokens - from;
    write_rows(product, panel + i / 2, token + from, left < kSide ? left : kSide, floats + i * kSide * kPanel);
  }
}

/* Half units are too short for a tile, floats no codes: vectors multiply them, in shares of their own. */
bool on_tiles(const Product &product) { return in_integers(product) && product.x.segment % kUnit == 0; }

TileShape amx_tile(const Product &product) {
  return on_tiles(product) ? TileShape{kPanels, kTokens} : avx512_kernels()->gemm_tile(product);
}

void amx_gemm(const Product &product, const Share &share, uint8_t *scratch) {
  const pt_weight &w = *product.weight;
  const Activations &x = product.x;
  const Kernels &vectors = *avx512_kernels();
  if (!on_tiles(product)) return vectors.gemm(product, share, scratch);
  const int64_t cols = padded(w.cols), step = x.segment % 64 || cols % 64 ? kUnit : 64;
  const bool zeros = w.zeros || w.zero != middle_of(product), scales = x.scale_groups > 1;
  auto multiply = scales ? zeros ? multiply_block<true, true> : multiply_block<true, false>
                         : zeros ? multiply_block<false, true> : multiply_block<false, false>;
  configure(step);
  const int64_t blocks = ceil_div(share.token_end - share.token, kTokens);
  const Share whole{share.panel, share.panel_end, 0, blocks * kTokens}; /* for the sums of all tiles */
  float *sums = (float *)(scratch + panel_bytes(x.block, 8) * kPanels);
  for_blocks(product, whole, kPanels, blocks * (kPanels / 2), sums,
             [&](const Block &block, Ahead &ahead, float *carried) {
    const int64_t panels = block.panel_end - block.panel, bytes = panel_bytes(block.end - block.begin, 8);
    Codes codes = vectors.unpack(w, block, scratch);
    if (x.segments > 1) {
      make_signed(codes, panels, bytes, middle_of(product), scratch);
      codes = {scratch, bytes};
    }
    Work work{product, codes, x.codes_at(0, block.begin), block.begin, block.end, step,
              block.begin == 0, block.end == cols};
    for (int64_t token = share.token; token < share.token_end; token += kTokens)
      for (int64_t p = 0; p < panels; p += 2, carried += 2 * kTokens * kPanel) {
        ahead.step();
        multiply(work, p, panels - p, block.panel + p, token, share.token_end - token, carried);
      }
  });
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
