/* What one instruction set provides; linear.cpp divides the work and calls these. */
#ifndef POSTTRAIN_KERNELS_H
#define POSTTRAIN_KERNELS_H

#include "layout.h"
#include "posttrain.h"

/* Everything inside a tile has to be inlined: its sums live in registers. Not so for sanitizers,
 * which make such large functions take minutes to compile. */
#if defined(PT_SANITIZED)
#define INLINE_MEMBER inline
#define UNROLL
#else
#define INLINE_MEMBER inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")
#endif
#define INLINE static INLINE_MEMBER

/* Activations ready to multiply. Rows are `stride` = padded columns long and zero beyond cols. */
struct Activations {
  int64_t tokens, stride;
  const float *values;  /* [tokens, stride], for products in float32; else NULL */
  const int8_t *codes;  /* [tokens, stride] */
  const float *scales;  /* [tokens, scale_groups] */
  const int32_t *sums;  /* [tokens, segments]: sum of the codes of a segment */
  int64_t scale_groups, scale_group; /* groups per token, columns per group */
  int64_t segments, segment;         /* runs of columns on which every scale is constant */
  int64_t weight_groups;             /* per row of the weights that these meet */
  int64_t segments_per_group, segments_per_scale; /* of the weights, of the activations */
};

/* One weight, its activations and where the result goes. */
struct Product {
  const pt_weight *weight;
  Activations x;
  float *y;
  int64_t ldy;
};

/* A share of the work: panels [panel, panel_end) times tokens [token, token_end). */
struct Share {
  int64_t panel, panel_end, token, token_end;
};

struct TileShape {
  int panels, tokens;
};

/* Keys and values of one head of one sequence, and how they are looked at (block.h). */
struct HeadCache {
  void *keys;          /* [capacity / 16][head_size][16] */
  void *values;        /* [capacity][value_width] */
  float *key_scales, *value_scales; /* [capacity], for PT_CACHE_I8; else NULL */
  int32_t type;
  int64_t head_size, value_width; /* channels; the same padded to 16 */
  float scale, soft_cap;          /* of scores; 0 is no cap */
  int64_t window;                 /* positions seen, or 0 for all */
};

static const int kQueries = 6; /* queries that pass over a cache together, at most */

/* Floats of scratch for queries that see up to `positions` positions. */
static inline int64_t attention_scratch(int64_t positions) {
  return kQueries * (ceil_div(positions, kPanel) + 1) * kPanel;
}

struct Kernels {
  const char *name;
  /* The tile `gemm` works in: what shares should be multiples of. */
  TileShape (*gemm_tile)(const Product &);
  /* Few tokens: packed codes are unpacked on the way into the product. */
  void (*gemv)(const Product &, const Share &);
  /* Many tokens: each block of panels is unpacked once into `scratch` (gemm_scratch bytes). */
  void (*gemm)(const Product &, const Share &, uint8_t *scratch);
  /* Panels [panel, panel + count) as `gemm` multiplies them: in scratch, or where they lie. */
  const uint8_t *(*unpack)(const Product &, int64_t panel, int64_t count, uint8_t *scratch);
  /* One token times the block-Hadamard matrix of models/rotation.py, in place. */
  void (*rotate)(float *x, int64_t cols);
  /* Tokens [first, last): x [.., ldx] to codes, scales and segment sums. */
  void (*quantize)(const float *x, int64_t ldx, int64_t cols, const pt_input &, int64_t first,
                   int64_t last, Activations &);
  /* Between the products of a decoder block (block.h). */
  void (*rms_norm)(const float *x, const float *gain, float eps, int64_t n, float *y);
  void (*gated)(int32_t kind, float *gate, const float *up, int64_t n);
  void (*accumulate)(float *x, const float *y, float scale, int64_t n);
  void (*rotate_positions)(float *head, const float *angles, int64_t rotary);
  void (*soft_cap)(float *x, float cap, int64_t n);
  float (*log_partition)(const float *x, int64_t n);
  void (*remember)(const HeadCache &, int64_t position, const float *key, const float *value);
  void (*attend)(const HeadCache &, const float *q, int64_t ld, int64_t heads, int64_t tokens,
                 int64_t position, float *out, float *scores);
  /* For the probes of probe.cpp. */
  int32_t (*read_bytes)(const uint8_t *from, int64_t bytes);
  int32_t (*multiply_registers)(int64_t rounds);
};

/* Null where the library was built for another architecture. */
const Kernels *portable_kernels();
const Kernels *avx2_kernels();
const Kernels *avx512_kernels();
const Kernels *amx_kernels();
const Kernels *neon_kernels();

/* Whether codes are multiplied with codes, rather than floats with floats. */
static inline bool in_integers(const Product &product) {
  return product.x.codes && product.weight->stage <= PT_LOOKUP;
}

/* Bytes of scratch that `gemm` needs for this product. */
static inline int64_t gemm_scratch(const Kernels &k, const Product &product) {
  return k.gemm_tile(product).panels * panel_bytes(product.weight->cols, in_integers(product) ? 8 : 32);
}

#endif
