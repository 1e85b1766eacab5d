/* From logits to a token. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <vector>

#include "linear.h"
#include "posttrain.h"
#include "sampling.h"
#include "threads.h"

namespace {

/* The finaliser of splitmix64: every bit of the result depends on every bit of x. */
uint64_t mixed(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

/* Standard Gumbel noise of a token; between -3.6 and 36.8. */
double gumbel(uint64_t key, int32_t token) {
  double u = ((mixed(key ^ (uint64_t)token) >> 12) + 0.5) * 0x1p-52;
  return -log(-log(u));
}

const double kMostNoise = 37, kLeastNoise = -4;

struct Candidate {
  float logit;
  int32_t token;
  bool operator<(const Candidate &other) const { /* in a heap: the likeliest is the largest */
    return logit != other.logit ? logit < other.logit : token > other.token;
  }
};

void penalize(float *logits, int32_t vocabulary, const pt_draw &draw) {
  const float penalty = draw.repetition_penalty;
  std::vector<bool> seen(vocabulary);
  for (int64_t i = 0; i < draw.length; i++) {
    int32_t token = draw.history[i];
    if (token < 0 || token >= vocabulary || seen[token]) continue;
    seen[token] = true;
    logits[token] = logits[token] > 0 ? logits[token] / penalty : logits[token] * penalty;
  }
}

/* The largest of some logits; NaN if any is. */
float largest(const float *logits, int64_t count) {
  typedef float Floats __attribute__((vector_size(64)));
  typedef int32_t Flags __attribute__((vector_size(64)));
  const int64_t lanes = sizeof(Floats) / sizeof(float);
  Floats most, x;
  Flags nan = {};
  for (int j = 0; j < lanes; j++) most[j] = -INFINITY;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    memcpy(&x, logits + i, sizeof x);
    most = x > most ? x : most;
    nan |= x != x;
  }
  float found = -INFINITY;
  bool broken = false;
  for (int j = 0; j < lanes; j++) found = std::max(found, most[j]), broken |= nan[j] != 0;
  for (; i < count; i++) found = std::max(found, logits[i]), broken |= logits[i] != logits[i];
  return broken ? NAN : found;
}

/* The likeliest token, the lowest of equals; -1 if any logit is NaN. Each thread looks at what it
 * wrote, about: the other half is in another core's cache. */
int32_t likeliest(const float *logits, int32_t vocabulary) {
  const int64_t block = 2048, blocks = ceil_div(vocabulary, block);
  std::vector<float> most(blocks);
  parallel_for(blocks, [&](int64_t i, int) {
    most[i] = largest(logits + i * block, std::min(block, vocabulary - i * block));
  });
  int64_t best = 0;
  for (int64_t i = 0; i < blocks; i++) {
    if (most[i] != most[i]) return -1;
    if (most[i] > most[best]) best = i;
  }
  int64_t token = best * block;
  while (logits[token] != most[best]) token++;
  return (int32_t)token;
}

}  // namespace

int32_t sample(float *logits, int32_t vocabulary, const pt_draw &s) {
  if (s.repetition_penalty != 1) penalize(logits, vocabulary, s);
  const int32_t best = likeliest(logits, vocabulary);
  if (best < 0 || s.temperature == 0 || isinf(logits[best])) return best;
  /* In double, so that the reference in Python can do the same. */
  const double temperature = s.temperature, top = logits[best];
  auto weight = [&](float logit) { return exp((logit - top) / temperature); };
  const bool whole = s.top_k <= 0 && s.top_p >= 1;
  /* What no noise can lift to the top is left out, unless its probability counts. */
  const float least = whole ? (float)(top - temperature * (kMostNoise - kLeastNoise)) : -INFINITY;
  std::vector<Candidate> kept;
  for (int32_t i = 0; i < vocabulary; i++)
    if (logits[i] >= least && logits[i] > -INFINITY) kept.push_back({logits[i], i});
  if (!whole) {
    int64_t count = (int64_t)kept.size();
    if (s.top_k > 0 && s.top_k < count) {
      auto likelier = [](const Candidate &a, const Candidate &b) { return b < a; };
      std::nth_element(kept.begin(), kept.begin() + s.top_k, kept.end(), likelier);
      kept.resize(count = s.top_k);
    }
    if (s.top_p < 1) {
      double total = 0, mass = 0;
      for (auto &c : kept) total += weight(c.logit);
      std::make_heap(kept.begin(), kept.end());
      int64_t taken = 0; /* popped candidates gather at the end */
      do {
        mass += weight(kept.front().logit);
        std::pop_heap(kept.begin(), kept.end() - taken);
        taken++;
      } while (taken < count && mass < s.top_p * total);
      kept.erase(kept.begin(), kept.end() - taken);
    }
  }
  const uint64_t key = mixed(mixed(s.seed) ^ (uint64_t)s.position);
  double largest = -INFINITY;
  int32_t chosen = best;
  for (auto &c : kept) {
    if (s.min_p > 0 && weight(c.logit) < s.min_p) continue;
    double value = (c.logit - top) / temperature + gumbel(key, c.token);
    if (value > largest || (value == largest && c.token < chosen)) largest = value, chosen = c.token;
  }
  return chosen;
}

int32_t pt_sample(float *logits, int32_t vocabulary, const pt_draw *draw) {
  if (vocabulary < 1) return -1 - PT_BAD_SHAPE;
  int32_t token = -1;
  const int32_t status = guarded([&] { token = sample(logits, vocabulary, *draw); });
  return status ? -1 - status : token;
}
