/* What one instruction set provides; linear.cpp divides the work and calls these. */
#ifndef POSTTRAIN_KERNELS_H
#define POSTTRAIN_KERNELS_H

#include "layout.h"
#include "posttrain.h"

/* Everything inside a tile has to be inlined: its sums live in registers. Not so where there are no
 * vectors, nor for sanitizers: such large functions take minutes to compile then. */
#if defined(PT_SANITIZED) || defined(PT_NO_VECTORS)
#define INLINE_MEMBER inline
#define INLINE_LAMBDA
#define UNROLL
#else
#define INLINE_MEMBER inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")
#endif
#define INLINE static INLINE_MEMBER

/* Tiles of tokens may read, and ignore, some beyond the last. */
static const int64_t kTokenSlack = 32;

/* Digits to base 256 of PT_DIGITS, the lowest first. */
static const int64_t kDigits = 3;

/* Activations ready to multiply, padded with zeros to whole units of columns. */
struct Activations {
  int64_t tokens, stride;
  /* Of codes that stand for a single token, one below the other: 1, or kDigits, which are added up in y.
   * A share holds all of a token. */
  int64_t digits = 1;
  const float *values; /* [tokens, stride], for products in float32; else NULL */
  /* [blocks of `block` columns][tokens + kTokenSlack, stride]: what `gemm` multiplies together lies
   * together; `gemv` wants a single block. */
  const int8_t *codes;
  int64_t block;
  const float *scales;  /* [tokens, scale_groups] */
  const int32_t *sums;  /* [tokens, segments]: sum of the codes of a segment */
  int64_t scale_groups, scale_group; /* groups per token, columns per group */
  int64_t segments, segment;         /* runs of columns on which every scale is constant */
  int64_t weight_groups;             /* per row of the weights that these meet */
  int64_t segments_per_group, segments_per_scale; /* of the weights, of the activations */

  const int8_t *codes_at(int64_t token, int64_t column) const {
    const int64_t in_block = column % block;
    return codes + ((column / block) * (tokens + kTokenSlack) + token) * stride + in_block;
  }
  /* The row of y that a token is part of, and whether another comes before it there. */
  int64_t row_of(int64_t token) const { return digits == 1 ? token : token / kDigits; }
  bool joins(int64_t token) const { return digits > 1 && token % kDigits; }
};

/* One weight, its activations and where the result goes. */
struct Product {
  const pt_weight *weight;
  Activations x;
  const int32_t *starts; /* [segments, tokens]: -weight->zero * x.sums, what integer sums start at */
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

/* Part of a weight: panels [panel, panel_end), columns [begin, end), which are whole units. */
struct Block {
  int64_t panel, panel_end, begin, end;
};

/* Unpacked codes: those of the first panel, and bytes from one panel to the next. */
struct Codes {
  const uint8_t *first;
  int64_t stride;
};

static inline int64_t scale_bytes(const pt_weight &w) {
  return w.scale_type == PT_F32 ? 4 : w.scale_type == PT_F16 || w.scale_type == PT_BF16 ? 2 : 1;
}

/* Bytes from one panel of a weight to the next. */
static inline int64_t panel_bytes(const pt_weight &w) {
  return w.stage == PT_ROWS ? kPanel * w.cols * w.bits / 8 : panel_bytes(w.cols, w.bits);
}

/* Columns multiplied at a time, about so many, so that the weights of a tile stay in the first cache. */
static const int64_t kBlockColumns = 512;

/* Rows of `cols` columns in parts as equal as whole segments allow; a single one is cut, its integer
 * sums carried on. */
static inline int64_t block_columns(int64_t cols, int64_t segment) {
  const int64_t parts = cols < 2 * kBlockColumns ? 1 + (cols > kBlockColumns * 3 / 2)
                                                 : ceil_div(cols, kBlockColumns);
  const int64_t unit = segment >= cols ? kUnit : segment < kUnit ? kUnit : segment;
  return ceil_div(ceil_div(cols, parts), unit) * unit;
}

/* Keys and values of one head of one sequence, and how they are looked at (attention.h). */
struct HeadCache {
  void *keys, *values; /* of one head: see pt_sequence */
  void *key_scales, *value_scales; /* [capacity], for codes; else NULL */
  int32_t type;
  int64_t head_size, value_width; /* channels; the same padded to 16, for PT_CACHE_I4 to 32 */
  float scale, soft_cap;          /* of scores; 0 is no cap */
  int64_t window;                 /* positions seen, or 0 for all */
};

static const int kQueries = 6; /* queries that pass over a cache together, at most */

/* Positions that a query takes a sum over before it joins the sums of all: what is the same whoever computes
 * which of them, and what scores of kQueries lie in the first cache for. */
static const int64_t kAttentionRun = 512;

/* Channels of a head whose cache is PT_CACHE_I16. */
static const int64_t kMostChannels = 1024;

/* The first position that a query at `position` sees. */
static inline int64_t first_seen(int64_t window, int64_t position) {
  return window && position >= window ? position - window + 1 : 0;
}

/* Floats of what a query takes from a run: a sum for each channel, the largest score, the sum of e^(score -
 * largest). */
static inline int64_t run_floats(const HeadCache &c) { return c.value_width + kPanel; }

/* Floats of scratch for attend_run: scores and, in 16 bits, weights and queries. */
static inline int64_t run_scratch(int64_t channels) {
  return kQueries * (kAttentionRun + (kAttentionRun + padded(channels)) / 2);
}

/* Where rounding goes over from one level to the next, padded with infinities so that a search halves
 * it `half`, `half` / 2, ..., 1. consecutive: whether the levels are neighbouring integers and ties go
 * to the even one, as the processor rounds. */
struct Thresholds {
  float at[PT_MOST_LEVELS];
  int half;
  bool consecutive;
};

/* log sum e^x of numbers that come in several calls: the largest yet, and sums of e^(x - largest). */
struct PartitionSum {
  float largest = -__builtin_inff();
  float sums[4][kPanel] = {};
};
static const int64_t kPartitionRun = 1024; /* numbers between two looks at the largest */

struct Kernels {
  const char *name;
  bool digits_are_fast; /* see pt_digits_are_fast */
  /* The tile `gemm` works in: what shares should be multiples of. */
  TileShape (*gemm_tile)(const Product &);
  /* Few tokens: packed codes are unpacked on the way into the product. */
  void (*gemv)(const Product &, const Share &);
  /* Many tokens: each block of panels is unpacked once into `scratch` (gemm_scratch bytes). */
  void (*gemm)(const Product &, const Share &, uint8_t *scratch);
  /* Codes of a block as bytes: in scratch, panel by panel, or where they lie. */
  Codes (*unpack)(const pt_weight &, const Block &, uint8_t *scratch);
  /* One token times the block-Hadamard matrix of models/rotation.py; `to` may be `from`. */
  void (*rotate)(const float *from, float *to, int64_t cols);
  /* x [count, cols], tokens from `token` on, to codes, scales and segment sums. Of PT_DIGITS each becomes
   * kDigits tokens. */
  void (*quantize)(const float *x, int64_t ldx, int64_t count, int64_t cols, const pt_input &, int64_t token,
                   Activations &);
  /* Between the products of a decoder block (block.h). */
  void (*rms_norm)(const float *x, const float *gain, float eps, int64_t n, float *y);
  void (*gated)(int32_t kind, float *gate, const float *up, int64_t n);
  void (*accumulate)(float *x, const float *y, float scale, int64_t n);
  void (*rotate_positions)(float *head, const float *angles, int64_t rotary);
  void (*soft_cap)(float *x, float cap, int64_t n);
  void (*add_partition)(const float *x, int64_t n, PartitionSum &);
  float (*log_partition)(const PartitionSum &);
  void (*remember)(const HeadCache &, int64_t position, const float *key, const float *value);
  /* What `heads` query heads of `tokens` tokens from `position` on, all of which see this cache head, take from
   * one run: q [tokens, ld], heads side by side; sums [tokens, ld_sums], run_floats(...) for each head. */
  void (*attend_run)(const HeadCache &, const float *q, int64_t ld, int64_t heads, int64_t tokens,
                     int64_t position, int64_t run, float *sums, int64_t ld_sums,
                     float *scratch); /* run_scratch(...) floats */
  /* One head of one token, out [head_size], from the sums of `runs` runs, `stride` floats from one to the next.
   * Runs of which it sees nothing change nothing. */
  void (*join_runs)(const HeadCache &, int64_t runs, float *sums, int64_t stride, float *out);
  /* 16 rows of pt_round_columns and pt_descend_columns (columns.h). */
  void (*round_columns)(const pt_columns &, const Thresholds &, int64_t row, float *values,
                        float *errors, uint8_t *ranks);
  bool (*descend_columns)(const pt_columns &, const Thresholds &, int64_t row, float *values,
                          float *errors, const float *slopes);
  /* For the probes of probe.cpp. */
  int32_t (*read_bytes)(const uint8_t *from, int64_t bytes, int streams); /* 1 or 2 */
  int32_t (*multiply_registers)(int64_t rounds);
};

/* How one token's product reads packed codes: panels side by side, how many bytes ahead it asks for
 * memory, and whether for every line or only the first of a unit. None changes a result. */
struct Reading {
  int streams; /* 1 or 2 */
  int64_t ahead;
  bool every_line;
};
const Reading &reading(); /* what suits this processor (dispatch.cpp) */

/* Null where the library was built for another architecture, or by a compiler that does not know theirs. */
const Kernels *portable_kernels();
const Kernels *avx2_kernels();
const Kernels *avxvnni_kernels();
const Kernels *avx512_kernels();
const Kernels *amx_kernels();
const Kernels *neon_kernels();

/* Whether codes are multiplied with codes, rather than floats with floats. */
static inline bool in_integers(const Product &product) {
  return product.x.codes && product.weight->stage <= PT_LOOKUP;
}

/* Tiles side by side that a share has at most: they read the same activations again and again. */
static const int64_t kTilesOfShare = 8;

/* Bytes of sums that `panels` x `tokens` carry from one block of columns to the next. */
static inline int64_t carried_bytes(int64_t panels, int64_t tokens) {
  return panels * tokens * kPanel * (int64_t)sizeof(float);
}

/* Scales of a block of `panels` panels: one for each row and segment. */
static inline int64_t scales_of_block(const Activations &x, int64_t panels) {
  return ceil_div(x.block, x.segment) * panels * kPanel;
}

/* Bytes of scratch that `gemm` needs for a share of up to `tokens` tokens. */
static inline int64_t gemm_scratch(const Kernels &k, const Product &product, int64_t tokens) {
  const int64_t panels = k.gemm_tile(product).panels;
  if (!in_integers(product)) return panels * panel_bytes(product.weight->cols, 32);
  return carried_bytes(kTilesOfShare * panels, tokens) + panels * panel_bytes(product.x.block, 8) +
         scales_of_block(product.x, panels) * (int64_t)sizeof(float);
}

#endif
