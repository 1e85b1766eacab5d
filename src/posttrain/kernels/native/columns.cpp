/* pt_round_columns and pt_descend_columns: vectors of rows divided among the threads. */
#include <math.h>

#include <atomic>

#include "dispatch.h"
#include "linear.h"
#include "threads.h"

namespace {

bool valid(const pt_columns &c) {
  return c.columns > 0 && c.columns <= PT_MOST_COLUMNS && c.rows > 0 && c.count > 0 &&
         c.count <= PT_MOST_LEVELS && c.matrix && c.steps && c.levels && (c.edges || c.count == 1);
}

Thresholds thresholds_of(const pt_columns &c) {
  Thresholds found;
  found.half = 1;
  while (2 * found.half < c.count) found.half *= 2;
  for (int i = 0; i < PT_MOST_LEVELS; i++) found.at[i] = i < c.count - 1 ? c.edges[i] : INFINITY;
  found.consecutive = c.levels[0] == rintf(c.levels[0]);
  for (int i = 0; i + 1 < c.count; i++) {
    const float level = c.levels[i], middle = level + 0.5f;
    const bool even = fmodf(level, 2.0f) == 0; /* a tie goes to the even one */
    found.consecutive &= c.levels[i + 1] == level + 1;
    found.consecutive &= c.edges[i] == (even ? middle : nextafterf(middle, -INFINITY));
  }
  return found;
}

/* f(first row of a vector, kernels, thresholds) for every vector of rows */
template <class F>
int32_t for_rows(const pt_columns &c, F f) {
  if (!valid(c)) return PT_BAD_SHAPE;
  return guarded([&] {
    const Kernels &kernels = active_kernels();
    const Thresholds thresholds = thresholds_of(c);
    parallel_for(ceil_div(c.rows, kPanel),
                 [&](int64_t i, int) { f(i * kPanel, kernels, thresholds); });
  });
}

}  // namespace

int32_t pt_round_columns(const pt_columns *c, float *values, float *errors, uint8_t *ranks) {
  return for_rows(*c, [&](int64_t row, const Kernels &kernels, const Thresholds &thresholds) {
    kernels.round_columns(*c, thresholds, row, values, errors, ranks);
  });
}

int32_t pt_descend_columns(const pt_columns *c, float *values, float *errors, const float *slopes,
                           int32_t *moved) {
  std::atomic<bool> any{false};
  const int32_t status =
      for_rows(*c, [&](int64_t row, const Kernels &kernels, const Thresholds &thresholds) {
        if (kernels.descend_columns(*c, thresholds, row, values, errors, slopes)) any = true;
      });
  *moved = any;
  return status;
}
