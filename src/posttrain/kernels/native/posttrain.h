/* The C interface of posttrain's native kernels.
 *
 * A linear layer is y = x W^T + bias for x [tokens, cols], W [rows, cols]. Weights are packed once
 * (`pt_pack_codes`, layout in layout.h) and multiplied with activations that are either float32 or
 * quantized here to at most 8 bits with one scale per token or per group of columns.
 *
 * Plain C types only: the library is loaded by ctypes and belongs to no version of Python. All
 * pointers stay the caller's. Functions that compute return 0, or the reason for a refusal.
 */
#ifndef POSTTRAIN_H
#define POSTTRAIN_H

#include <stdint.h>

#if defined(__GNUC__)
#define PT_API __attribute__((visibility("default")))
#else
#define PT_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Raised with every change of a struct or a signature; Python refuses any other. */
#define PT_ABI 12
PT_API int32_t pt_abi(void);
/* Hash of the sources this library was built from (build.py), or "". */
PT_API const char *pt_sources(void);

/* What a stored code stands for. */
enum pt_stage {
  PT_INTEGER = 0, /* code - zero; product in integers when activations are quantized */
  PT_LOOKUP = 1,  /* lookup[code] - zero, codes of 4 bits; product in integers likewise */
  PT_TABLE = 2,   /* table[code], any float32; product in float32 */
  PT_FLOAT = 3,   /* the weight itself: bits 32 float32, 16 bfloat16 or float16 (see `half`) */
  PT_ROWS = 4     /* the same, not packed: [rows, cols] as a checkpoint stores it */
};

enum pt_scale_type {
  PT_F32 = 0,
  PT_F16 = 1,
  PT_BF16 = 2,
  PT_E4M3 = 3, /* OCP 8-bit floating point, no NaN codes expected */
  PT_E8M0 = 4  /* 2^(code - 127) */
};

enum pt_status {
  PT_OK = 0,
  PT_BAD_SHAPE = 1,
  PT_BAD_FORMAT = 2,
  PT_NO_MEMORY = 3,
  PT_NO_THREADS = 4 /* as many as pt_threads() cannot be started */
};

typedef struct {
  int32_t rows, cols;
  int32_t stage;      /* pt_stage */
  int32_t bits;       /* of a stored code: 2..8, or 16, 32 for PT_FLOAT */
  int32_t half;       /* PT_F16 or PT_BF16: what 16 bits mean */
  int32_t group;      /* columns per scale: a multiple of 16, or at least cols for one per row */
  int32_t scale_type; /* pt_scale_type */
  int32_t zero;       /* zero point of all codes, unless `zeros` */
  float multiplier;   /* of every scale; NVFP4's per-tensor factor */
  const uint8_t *codes;  /* pt_code_bytes() of them, from pt_pack_codes */
  const void *scales;    /* [panels][groups][16] of scale_type; NULL: all 1 */
  const uint8_t *zeros;  /* [panels][groups][16] or NULL */
  const uint8_t *lookup; /* 16 bytes, at most 127, for PT_LOOKUP */
  const float *table;    /* 2^bits values, for PT_TABLE and PT_LOOKUP */
  const float *bias;     /* [rows] or NULL */
} pt_weight;

/* How activations enter: left as float32 (bits 0); integers lo..hi under scale absmax / top (bits 2..8);
 * or changed by less than 2^-22 of the largest of their token (bits PT_DIGITS), when weights of PT_INTEGER
 * and PT_LOOKUP meet them as three INT8 digits to base 256, and others as float32. */
enum { PT_DIGITS = 24 };
typedef struct {
  int32_t bits;
  int32_t group; /* columns per scale: a multiple of 16, or at least cols for one per token */
  int32_t lo, hi;
  int32_t scale_type; /* PT_F32 or PT_F16: how the scale itself is rounded */
  int32_t rotate;     /* whether a block-Hadamard rotation comes first */
  float top;
} pt_input;

/* Sizes of the packed form, in bytes; `pt_scale_count` in entries. */
PT_API int64_t pt_code_bytes(int32_t rows, int32_t cols, int32_t bits);
PT_API int64_t pt_scale_count(int32_t rows, int32_t cols, int32_t group);

/* Pack codes [rows, cols], one per byte, of `bits` bits. */
PT_API int32_t pt_pack_codes(const uint8_t *codes, int32_t rows, int32_t cols, int32_t bits,
                             uint8_t *packed);
PT_API int32_t pt_unpack_codes(const uint8_t *packed, int32_t rows, int32_t cols, int32_t bits,
                               uint8_t *codes);
/* Rows `index` [count] of the codes: [count, cols]. */
PT_API int32_t pt_unpack_rows(const uint8_t *packed, int32_t rows, int32_t cols, int32_t bits,
                              const int64_t *index, int64_t count, uint8_t *codes);
/* Pack float weights [rows, cols] of 16 or 32 bits each. */
PT_API int32_t pt_pack_floats(const void *values, int32_t rows, int32_t cols, int32_t bits,
                              void *packed);
/* Interleave scales or zero points [rows, groups] of `size` bytes each into [panels][groups][16]. */
PT_API int32_t pt_pack_scales(const void *scales, int32_t rows, int32_t groups, int32_t size,
                              void *packed);

/* y[i] [tokens, weights[i]->rows] = x [tokens, cols] times weights[i]^T, for `count` weights that
 * share x and its quantization. Rows of y[i] lie ldy[i] floats apart, those of x ldx. */
typedef struct {
  const pt_weight *const *weights;
  int32_t count;
  const float *x;
  int64_t ldx, tokens;
  const pt_input *input;
  float *const *y;
  const int64_t *ldy;
} pt_product;

/* Products one after another. While one ends, the memory that the next reads first is asked for. */
PT_API int32_t pt_linear(const pt_product *products, int32_t count);

/* The quantization step of pt_linear on its own: codes [tokens, cols], scales [tokens, groups]. */
PT_API int32_t pt_quantize(const float *x, int64_t ldx, int64_t tokens, int32_t cols,
                           const pt_input *input, int8_t *codes, float *scales);

/* Each token of x [tokens, cols] times the block-Hadamard matrix of models/rotation.py, in place. */
PT_API int32_t pt_rotate(float *x, int64_t tokens, int32_t cols);

/* ------------------------------------------------------------------------------- decoders
 *
 * A decoder of the Llama family: per block
 *
 *     x += out_norm(o(attention(rope(q_norm(q(h))), rope(k_norm(k(h))), v(h)))),  h = norm(x)
 *     x += out_norm(down(act(gate(h)) * up(h))),                                   h = norm(x)
 *
 * with RMS norms, grouped queries and causal attention, optionally over a window.
 */
enum pt_activation { PT_SILU = 0, PT_GELU_TANH = 1, PT_GELU = 2, PT_RELU = 3 };

/* How keys and values are kept. From PT_CACHE_I8 on they are codes under a float16 scale, of PT_CACHE_I16
 * a float32 one, for each token and head, absmax / top rounded to nearest (ties to even; 1 for zeros): code = x / scale in
 * float32, rounded to nearest (ties to even) and clamped, as numbers.quantize does. */
enum pt_cache_type {
  PT_CACHE_F32 = 0,
  PT_CACHE_F16 = 1,
  PT_CACHE_BF16 = 2,
  PT_CACHE_I8 = 3,   /* -127..127, top 127 */
  PT_CACHE_E4M3 = 4, /* OCP 8-bit floating point, top 448 */
  PT_CACHE_I4 = 5,   /* -7..7, top 7; two's complement, two to a byte */
  PT_CACHE_I16 = 6   /* -32767..32767, top 32767; attention rounds queries and weights to 16 bits too */
};

typedef struct {
  /* Gains of the norms; NULL where a block has none. q_norm and k_norm are [head_size]. */
  const float *attention_norm, *attention_out_norm, *mlp_norm, *mlp_out_norm, *q_norm, *k_norm;
  const pt_weight *q, *k, *v, *o, *gate, *up, *down;
  pt_input qkv_input, o_input, mlp_input, down_input;
  int32_t window; /* positions that attention sees, or 0 for all */
  int32_t rope;   /* which angles of a sequence apply: 0, 1, or -1 for none */
} pt_block;

typedef struct {
  int32_t blocks, width, heads, kv_heads, head_size, rotary, vocabulary;
  int32_t activation; /* pt_activation */
  float eps;          /* of all norms */
  float embedding_scale, residual_scale, attention_scale, logit_scale;
  float attention_cap, logit_cap; /* cap * tanh(score / cap); 0 for none */
  const pt_block *block;
  const float *norm;          /* [width], before the head */
  const pt_weight *embedding; /* [vocabulary, width] */
  const pt_weight *head;      /* [vocabulary, width]; may be the embedding, whose rows are turned back if it rotates */
  pt_input head_input;
} pt_model;

/* A sequence's memory, and how many tokens it gets in a call. */
typedef struct {
  /* keys [blocks][kv_heads][capacity / 16][head_size][16], values [blocks][kv_heads][capacity][head_size
   * padded to 16]. Of PT_CACHE_I4: keys [...][capacity / 16][pairs of channels][16], the even channel
   * in the low nibbles; values [...][capacity][runs of 32 channels][16], the first 16 channels of a
   * run in the low nibbles. Of PT_CACHE_I16: keys [...][capacity / 16][pairs of channels][16][2], values
   * [...][capacity / 2][head_size padded to 16][2]. */
  void *keys, *values;
  void *key_scales, *value_scales; /* [blocks][kv_heads][capacity] for codes, else NULL */
  const float *angles[2]; /* [positions][rotary]: cosines of rotary / 2 angles, then sines */
  int64_t capacity;       /* a multiple of 16 */
  int64_t length;         /* tokens remembered before the call */
  int32_t tokens;         /* tokens in this call */
  int32_t type;           /* pt_cache_type */
  /* Whether nothing is to be remembered: every block takes the place of the one before in memory for
   * a single block, and `length` is 0. */
  int32_t passing;
} pt_sequence;

/* One pass over the next tokens of several sequences: `ids` holds those of the first, then of the
 * second, and so on. They are remembered; `length` is left to the caller. Of the tokens at places
 * `want` of `ids`, at most as many as there are, it writes the logits [wanted, vocabulary] or, where
 * `hidden` is not NULL, only what enters the head [wanted, width]. */
PT_API int32_t pt_forward(const pt_model *model, const pt_sequence *sequences, int32_t count,
                          const int32_t *ids, const int32_t *want, int32_t wanted, float *hidden,
                          float *logits);

/* The head alone: logits [rows, vocabulary] of `hidden` [rows, width]. */
PT_API int32_t pt_head(const pt_model *model, const float *hidden, int64_t rows, float *logits);

/* -log of the probability of targets [rows] after `hidden` [rows, width]: pt_log_partition of what
 * pt_head gives, less the target's logit, without all logits ever in memory. */
PT_API int32_t pt_losses(const pt_model *model, const float *hidden, const int32_t *targets, int64_t rows,
                         float *losses);

/* log sum exp of every row of logits [rows, vocabulary]. */
PT_API int32_t pt_log_partition(const float *logits, int64_t rows, int32_t vocabulary, float *out);

/* A run of columns of a weight, rounded one after the other under scales that stay. Weights lie
 * transposed, [columns][rows], so that a column lies together. */
typedef struct {
  int64_t columns, rows; /* columns: at most PT_MOST_COLUMNS */
  const float *matrix;   /* [columns][columns], of which the upper half is read */
  const float *steps;    /* [columns][rows]: a value is (level - zero) * step */
  const float *zeros;    /* [columns][rows], or NULL */
  const float *levels;   /* [count], ascending */
  const float *edges;    /* [count - 1]: the largest number that still rounds to the level before */
  int32_t count;         /* at most PT_MOST_LEVELS */
} pt_columns;

enum { PT_MOST_COLUMNS = 256, PT_MOST_LEVELS = 256 };

/* GPTQ: the columns of `values` become those of the levels nearest to them, whose ranks are written
 * to `ranks`. What rounding column j cost, divided by matrix[j][j], is written to `errors` and
 * subtracted, times matrix[j][k], from every later column k before that is rounded. */
PT_API int32_t pt_round_columns(const pt_columns *columns, float *values, float *errors,
                                uint8_t *ranks);

/* Coordinate descent on e H e^T for each row e of `errors`, the matrix being H: in turn each column of
 * `values` becomes what is least with the others as they are, given `slopes` = e H. Moves are added to
 * `errors`; `moved` says whether there was any. Columns without curvature stay. */
PT_API int32_t pt_descend_columns(const pt_columns *columns, float *values, float *errors,
                                  const float *slopes, int32_t *moved);

/* How the token at `position` of a text is drawn. In order: logits of tokens in `history` are divided
 * (if negative, multiplied) by repetition_penalty; all are divided by the temperature; the top_k
 * likeliest stay; of these the fewest likeliest whose probabilities reach top_p; of these the ones at
 * least min_p times as likely as the likeliest. Among those the largest of logit + noise wins, noise
 * being standard Gumbel by a hash of (seed, position, token): a draw from their softmax that depends
 * on nothing else. Ties go to the lower token. */
typedef struct {
  float temperature; /* 0: the likeliest token */
  float top_p, min_p, repetition_penalty;
  int32_t top_k; /* 0: all */
  uint64_t seed;
  int64_t position;
  const int32_t *history; /* [length]; read only where there is a penalty */
  int64_t length;
} pt_draw;

/* Draws a token by `logits` [vocabulary], which a penalty changes. -1 where one is NaN; -1 - status where
 * nothing could be drawn. */
PT_API int32_t pt_sample(float *logits, int32_t vocabulary, const pt_draw *draw);

/* pt_forward, and pt_sample after the last token of each sequence: `tokens` [count]. */
PT_API int32_t pt_step(const pt_model *model, const pt_sequence *sequences, int32_t count,
                       const int32_t *ids, const pt_draw *draws, int32_t *tokens);

/* Name of the instruction set in use; `pt_use` chooses one ("" for the best), 0 when it cannot. */
PT_API const char *pt_isa(void);
PT_API int32_t pt_use(const char *isa);
/* Whether weights of codes meet three INT8 digits sooner than one float32, in the instruction set in use. */
PT_API int32_t pt_digits_are_fast(void);
/* The instruction sets built into this library that this processor has, comma-separated. */
PT_API const char *pt_isas(void);

PT_API void pt_set_threads(int32_t threads);
/* How one token's products read codes from memory: 1 for two panels side by side; 2 for one, every line
 * of which is asked for; 3 for one, of which some lines are (with few registers: as 2); or 0 for what suits
 * the processor. A result never depends on it. */
PT_API void pt_set_reading(int32_t reading);
PT_API int32_t pt_threads(void);

/* What this machine can do with the threads and the instruction set in use: bytes per second read
 * from `memory`, in one stream or two, whichever is faster, and integer operations (2 per product)
 * per second without any memory. 0 where the threads could not be started. */
PT_API double pt_probe_bandwidth(const void *memory, int64_t bytes);
PT_API double pt_probe_peak(double seconds);

/* Memory for weights, which share 2 MiB pages where the system gives them: worth a sixth of the
 * bandwidth. */
PT_API void *pt_allocate(int64_t bytes);
PT_API void pt_free(void *memory);

#ifdef __cplusplus
}
#endif
#endif
