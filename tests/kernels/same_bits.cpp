/* Runs pt_linear, pt_forward, pt_round_columns and pt_descend_columns on every instruction set this processor (or
 * its emulator) has and compares the results with portable.cpp's, bit for bit. Prints what was
 * compared; exit status 1 on a difference. With any argument it only names the instruction sets.
 * For those that no Python at hand runs on. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <sstream>
#include <string>
#include <vector>

#include "posttrain.h"

static const int kRows = 37, kCols = 200;

static float uniform() { return rand() / (float)RAND_MAX - 0.5f; }

struct Example {
  std::vector<uint8_t> codes, zeros;
  std::vector<float> scales;
  pt_weight weight{};

  Example(int bits, int group, bool zero_points, int rows = kRows, int cols = kCols) {
    const int groups = (cols + group - 1) / group, levels = 1 << bits;
    std::vector<uint8_t> c(rows * cols), z(rows * groups);
    std::vector<float> s(rows * groups);
    for (auto &v : c) v = rand() % levels;
    for (auto &v : z) v = rand() % levels;
    for (auto &v : s) v = uniform() + 1;
    codes.resize(pt_code_bytes(rows, cols, bits));
    zeros.resize(pt_scale_count(rows, cols, group));
    scales.resize(zeros.size());
    pt_pack_codes(c.data(), rows, cols, bits, codes.data());
    pt_pack_scales(z.data(), rows, groups, 1, zeros.data());
    pt_pack_scales(s.data(), rows, groups, 4, scales.data());
    weight.rows = rows, weight.cols = cols, weight.bits = bits, weight.group = group;
    weight.zero = levels / 2, weight.multiplier = 1;
    weight.codes = codes.data(), weight.scales = scales.data();
    weight.zeros = zero_points ? zeros.data() : nullptr;
  }
};

static std::vector<float> product(const char *isa, const Example &example, const pt_input &input,
                                  const std::vector<float> &x, int tokens) {
  std::vector<float> y(tokens * kRows);
  const pt_weight *weights[] = {&example.weight};
  float *out[] = {y.data()};
  const int64_t ldy[] = {kRows};
  const pt_product product{weights, 1, x.data(), kCols, tokens, &input, out, ldy};
  if (!pt_use(isa) || pt_linear(&product, 1)) {
    fprintf(stderr, "%s refused\n", isa);
    exit(1);
  }
  return y;
}

/* What becomes of random columns on an instruction set: values, then errors, of both calls. The levels
 * are integers, and ties go to the even one, as the processor rounds, or to the lower one. */
static std::vector<float> rounded(const char *isa, bool as_processor) {
  const int columns = 20, rows = kRows, levels = 16;
  srand(1);
  std::vector<float> matrix(columns * columns), steps(columns * rows), level(levels), edges(levels - 1);
  for (auto &v : matrix) v = uniform() * 0.2f;
  for (int i = 0; i < columns; i++) matrix[i * columns + i] = 1 + uniform();
  for (auto &v : steps) v = 0.2f + uniform() * 0.2f;
  for (int i = 0; i < levels; i++) level[i] = i - 8.0f;
  for (int i = 0; i + 1 < levels; i++)
    edges[i] = as_processor && i % 2 ? nextafterf(i - 7.5f, -8.0f) : i - 7.5f;
  pt_columns c{};
  c.columns = columns, c.rows = rows, c.count = levels;
  c.matrix = matrix.data(), c.steps = steps.data(), c.levels = level.data(), c.edges = edges.data();
  const int count = columns * rows;
  std::vector<float> all(5 * count);
  for (auto &v : all) v = uniform();
  std::vector<uint8_t> ranks(count);
  int32_t moved = 0;
  float *at = all.data();
  if (!pt_use(isa) || pt_round_columns(&c, at, at + count, ranks.data()) ||
      pt_descend_columns(&c, at + 2 * count, at + 3 * count, at + 4 * count, &moved)) {
    fprintf(stderr, "%s refused to round columns\n", isa);
    exit(1);
  }
  return all;
}

/* Hidden states of a decoder of one block, after a text and after a few tokens more, beyond the first run of
 * positions, with keys and values in `type`. */
static std::vector<float> decoded(const char *isa, int32_t type, int32_t window) {
  const int width = 48, heads = 3, size = 20, words = 30, tokens = 524, more = 3, capacity = 544;
  srand(2);
  Example q(8, width, false, heads * size, width), k(8, width, false, size, width), v(8, width, false, size, width);
  Example o(8, heads * size, false, width, heads * size), gate(8, width, false, 64, width);
  Example up(8, width, false, 64, width), down(8, 64, false, width, 64), embedding(8, width, false, words, width);
  for (auto *e : {&q, &k, &v, &o, &gate, &up, &down, &embedding}) e->weight.multiplier = 0.003f;
  std::vector<float> gains(width, 1.0f);
  pt_block block{};
  block.attention_norm = block.mlp_norm = gains.data();
  block.q = &q.weight, block.k = &k.weight, block.v = &v.weight, block.o = &o.weight;
  block.gate = &gate.weight, block.up = &up.weight, block.down = &down.weight;
  block.window = window, block.rope = -1;
  for (auto *input : {&block.qkv_input, &block.o_input, &block.mlp_input, &block.down_input})
    input->group = 1 << 30, input->top = 1;
  pt_model model{};
  model.blocks = 1, model.width = width, model.heads = heads, model.kv_heads = 1, model.head_size = size;
  model.vocabulary = words, model.eps = 1e-5f, model.embedding_scale = model.residual_scale = 1;
  model.logit_scale = 1, model.attention_scale = 0.5f, model.block = &block, model.norm = gains.data();
  model.embedding = model.head = &embedding.weight, model.head_input = block.qkv_input;
  std::vector<uint8_t> keys(capacity * 32 * 4), values(keys.size()), key_scales(capacity * 4), value_scales(capacity * 4);
  pt_sequence sequence{};
  sequence.keys = keys.data(), sequence.values = values.data();
  sequence.key_scales = key_scales.data(), sequence.value_scales = value_scales.data();
  sequence.capacity = capacity, sequence.type = type;
  std::vector<float> hidden(2 * more * width);
  std::vector<int32_t> ids(tokens + more), want(more);
  for (auto &id : ids) id = rand() % words;
  bool refused = !pt_use(isa);
  for (int call = 0; call < 2; call++) {
    sequence.length = call * tokens, sequence.tokens = call ? more : tokens;
    for (int i = 0; i < more; i++) want[i] = sequence.tokens - more + i;
    refused = refused || pt_forward(&model, &sequence, 1, ids.data() + call * tokens, want.data(), more,
                                    hidden.data() + call * more * width, nullptr);
  }
  if (refused) {
    fprintf(stderr, "%s refused to decode\n", isa);
    exit(1);
  }
  return hidden;
}

int main(int count, char **) {
  if (count > 1) {
    printf("%s\n", pt_isas());
    return 0;
  }
  long cases = 0, different = 0;
  std::istringstream isas(pt_isas());
  for (std::string isa; std::getline(isas, isa, ',');) {
    for (bool as_processor : {false, true})
      cases++, different += rounded(isa.c_str(), as_processor) != rounded("portable", as_processor);
    for (int32_t type = PT_CACHE_F32; type <= PT_CACHE_I16; type++)
      for (int32_t window : {0, 40})
        cases++, different += decoded(isa.c_str(), type, window) != decoded("portable", type, window);
    for (int bits = 2; bits <= 8; bits++)
      for (int group : {16, 32, 64, kCols})
        for (bool zero_points : {false, true})
          for (int activation_bits : {0, 8, (int)PT_DIGITS})
            for (int tokens : {1, 3, 9, 20}) {
              Example example(bits, group, zero_points);
              pt_input input{};
              input.bits = activation_bits, input.group = kCols, input.rotate = tokens == 3;
              input.lo = -128, input.hi = 127, input.top = 127.5f;
              std::vector<float> x(tokens * kCols);
              for (auto &v : x) v = uniform();
              auto found = product(isa.c_str(), example, input, x, tokens);
              auto wanted = product("portable", example, input, x, tokens);
              cases++, different += memcmp(found.data(), wanted.data(), found.size() * 4) != 0;
            }
  }
  printf("%s: %ld cases, %ld differ\n", pt_isas(), cases, different);
  return different != 0;
}
