/* AMX INT8 (Intel from Sapphire Rapids): prefill on tiles, all else as in avx512.cpp.
 *
 * A tile product is 16 tokens x 64 columns (signed) times 64 columns x 16 rows (unsigned), where the
 * second lies as a panel does: 16 steps of 64 bytes. Sums of a segment leave the tiles through
 * memory and meet their scales there, in the same order as everywhere.
 */
#include "kernels.h"

#if defined(__AMX_INT8__) && defined(__AMX_TILE__)
#include "simd_avx512.h"
#include "product.h"

namespace {

static const int kTile = 16;                  /* tokens, and rows, of a tile */
static const int kBlockTokens = 2 * kTile; /* of a block: 2 x 2 tiles of sums */

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
    config.rows[i] = i < 6 ? kTile : (uint8_t)(step / kStep);
  }
  _tile_loadconfig(&config);
}

typedef int32_t Sums[kTile][kPanel];

/* Integer sums of two panels x 32 tokens over columns [begin, end). */
void multiply_tiles(const uint8_t *codes, int64_t panel_stride, const int8_t *x, int64_t ldx,
                    int64_t begin, int64_t end, int64_t step, Sums (&out)[2][2]) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = begin; k < end; k += step) {
    const uint8_t *w = codes + k * kPanel;
    _tile_loadd(6, w, kVector);
    _tile_loadd(4, x + k, ldx);
    _tile_dpbsud(0, 4, 6);
    _tile_loadd(5, x + kTile * ldx + k, ldx);
    _tile_dpbsud(1, 5, 6);
    _tile_loadd(7, w + panel_stride, kVector);
    _tile_dpbsud(2, 4, 7);
    _tile_dpbsud(3, 5, 7);
  }
  _tile_stored(0, out[0][0], sizeof out[0][0][0]);
  _tile_stored(1, out[0][1], sizeof out[0][0][0]);
  _tile_stored(2, out[1][0], sizeof out[0][0][0]);
  _tile_stored(3, out[1][1], sizeof out[0][0][0]);
}

/* floats[t] = fma(float(sums[t] - zero * x sums), scale, floats[t]) for `tokens` of one tile, as
 * start_segment and end_segment do for one. */
template <bool TokenScales>
void add_segment(const Product &product, int64_t panel, int64_t token, int64_t segment,
                        int64_t tokens, const Sums &sums, F32 *floats) {
  const pt_weight &w = *product.weight;
  const Activations &x = product.x;
  const int64_t group = x.segments_per_group == 1 ? segment : segment / x.segments_per_group;
  const int64_t at = (panel * x.weight_groups + group) * kPanel;
  const F32 scale = load_scales(w, at);
  const int32_t *x_sums = x.sums + token * x.segments + segment;
  const float *x_scales =
      TokenScales ? x.scales + token * x.scale_groups + segment / x.segments_per_scale : nullptr;
  for (int64_t t = 0; t < tokens; t++, x_sums += x.segments) {
    I32 sum = add({_mm512_load_si512(sums[t])}, set_i32(-w.zero * *x_sums));
    if (w.zeros) sum = subtract_product(sum, w.zeros + at, *x_sums);
    F32 factor = scale;
    if constexpr (TokenScales) {
      factor = mul(scale, set_f32(*x_scales));
      x_scales += x.scale_groups;
    }
    floats[t] = fma(to_f32(sum), factor, floats[t]);
  }
}

void block(const Product &product, const uint8_t *codes, int64_t panel, int64_t panels,
           int64_t token, int64_t tokens, int64_t step) {
  const Activations &x = product.x;
  const int64_t stride = panel_bytes(product.weight->cols, 8), cols = x.stride;
  alignas(64) Sums sums[2][2];
  F32 floats[2][kBlockTokens];
  for (auto &row : floats)
    for (auto &value : row) value = set_f32(0.0f);
  for (int64_t segment = 0; segment < x.segments; segment++) {
    int64_t begin = segment * x.segment, end = begin + x.segment < cols ? begin + x.segment : cols;
    multiply_tiles(codes, panels > 1 ? stride : 0, x.codes + token * x.stride, x.stride, begin, end,
                   step, sums);
    for (int64_t p = 0; p < panels; p++)
      for (int64_t first = 0; first < tokens; first += kTile) {
        int64_t count = tokens - first < kTile ? tokens - first : kTile;
        auto add = x.scale_groups > 1 ? add_segment<true> : add_segment<false>;
        add(product, panel + p, token + first, segment, count, sums[p][first / kTile],
            floats[p] + first);
      }
  }
  for (int64_t p = 0; p < panels; p++)
    for (int64_t t = 0; t < tokens; t++) {
      F32 value[1][1] = {{floats[p][t]}};
      write_tile(value, {product, codes, panel + p, token + t});
    }
}

TileShape amx_tile(const Product &product) {
  return in_integers(product) ? TileShape{4, kBlockTokens} : avx512_kernels()->gemm_tile(product);
}

void amx_gemm(const Product &product, const Share &share, uint8_t *scratch) {
  const Activations &x = product.x;
  const Kernels &vectors = *avx512_kernels();
  int64_t step = 64;
  while (x.segment % step || x.stride % step) step /= 2;
  if (!in_integers(product) || step < kUnit) return vectors.gemm(product, share, scratch);
  configure(step);
  const int64_t stride = panel_bytes(product.weight->cols, 8);
  const int64_t panels = amx_tile(product).panels;
  for (int64_t first = share.panel; first < share.panel_end; first += panels) {
    int64_t end = first + panels < share.panel_end ? first + panels : share.panel_end;
    const uint8_t *codes = vectors.unpack(product, first, end - first, scratch);
    for (int64_t token = share.token; token < share.token_end; token += kBlockTokens) {
      int64_t left = share.token_end - token;
      for (int64_t panel = first; panel < end; panel += 2)
        block(product, codes + (panel - first) * stride, panel, end - panel < 2 ? 1 : 2, token,
              left < kBlockTokens ? left : kBlockTokens, step);
    }
  }
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
