/* Runs pt_linear, pt_round_columns and pt_descend_columns on every instruction set this processor (or
 * its emulator) has and compares the results with portable.cpp's, bit for bit. Prints what was
 * compared; exit status 1 on a difference.
 * For instruction sets that no Python at hand runs on. */
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

  Example(int bits, int group, bool zero_points) {
    const int groups = (kCols + group - 1) / group, levels = 1 << bits;
    std::vector<uint8_t> c(kRows * kCols), z(kRows * groups);
    std::vector<float> s(kRows * groups);
    for (auto &v : c) v = rand() % levels;
    for (auto &v : z) v = rand() % levels;
    for (auto &v : s) v = uniform() + 1;
    codes.resize(pt_code_bytes(kRows, kCols, bits));
    zeros.resize(pt_scale_count(kRows, kCols, group));
    scales.resize(zeros.size());
    pt_pack_codes(c.data(), kRows, kCols, bits, codes.data());
    pt_pack_scales(z.data(), kRows, groups, 1, zeros.data());
    pt_pack_scales(s.data(), kRows, groups, 4, scales.data());
    weight.rows = kRows, weight.cols = kCols, weight.bits = bits, weight.group = group;
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

int main() {
  long cases = 0, different = 0;
  std::istringstream isas(pt_isas());
  for (std::string isa; std::getline(isas, isa, ',');) {
    for (bool as_processor : {false, true})
      cases++, different += rounded(isa.c_str(), as_processor) != rounded("portable", as_processor);
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
