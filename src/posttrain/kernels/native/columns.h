/* Rounding a weight column by column, written once over the vectors of an instruction set: included
 * after product.h. A vector is 16 rows, which do not depend on each other; what a column does to the
 * later ones stays in the first cache. A result is the same to the bit on every instruction set.
 */

namespace {

/* How many of the thresholds lie below each lane of y: the rank of the level nearest to it. */
INLINE void rank_lanes(const Thresholds &thresholds, const float *y, int32_t *rank) {
  for (int i = 0; i < kPanel; i++) rank[i] = 0;
  for (int half = thresholds.half; half; half /= 2)
    for (int i = 0; i < kPanel; i++) /* no branch: it would be guessed wrong half the time */
      rank[i] += half * (int32_t)(thresholds.at[rank[i] + half - 1] < y[i]);
}

/* The levels nearest to y, and their ranks where they are wanted. */
INLINE F32 nearest_levels(const pt_columns &c, const Thresholds &thresholds, F32 y, int32_t *rank) {
  if (thresholds.consecutive) {
    const F32 lowest = set_f32(c.levels[0]), highest = set_f32(c.levels[c.count - 1]);
    const F32 level = to_f32(rounded(minimum(maximum(y, lowest), highest)));
    if (rank) {
      float ranks[kPanel];
      store_some(ranks, subtract(level, lowest), kPanel);
      for (int i = 0; i < kPanel; i++) rank[i] = (int32_t)ranks[i];
    }
    return level;
  }
  float lanes[kPanel], level[kPanel];
  int32_t found[kPanel];
  store_some(lanes, y, kPanel);
  rank_lanes(thresholds, lanes, found);
  for (int i = 0; i < kPanel; i++) level[i] = c.levels[found[i]];
  if (rank) __builtin_memcpy(rank, found, sizeof found);
  return load_floats(level);
}

/* `target` rounded: (nearest level - zero) * step. A step of zero makes 0, of the level nearest to the
 * zero point, as numbers.nonzero has it. */
INLINE F32 nearest_values(const pt_columns &c, const Thresholds &thresholds, int64_t at,
                          int64_t count, F32 target, int32_t *rank) {
  const F32 step = load_some(c.steps + at, count), none = set_f32(0.0f);
  const F32 zero = c.zeros ? load_some(c.zeros + at, count) : none;
  float steps[kPanel], quotients[kPanel];
  store_some(steps, step, kPanel);
  store_some(quotients, divide(target, step), kPanel);
  for (int i = 0; i < kPanel; i++) quotients[i] = steps[i] == 0 ? 0.0f : quotients[i];
  const F32 level = nearest_levels(c, thresholds, add(load_floats(quotients), zero), rank);
  return mul(subtract(level, zero), step);
}

/* later[k] += factors[k] * moved, for the columns after this one */
INLINE void pass_on(F32 *later, const float *factors, int64_t count, F32 moved) {
  for (int64_t k = 0; k < count; k++) later[k] = fma(set_f32(factors[k]), moved, later[k]);
}

/* pt_round_columns for rows [row, row + kPanel) */
void round_columns(const pt_columns &c, const Thresholds &thresholds, int64_t row, float *values,
                   float *errors, uint8_t *ranks) {
  const int64_t count = c.rows - row < kPanel ? c.rows - row : kPanel;
  F32 left[PT_MOST_COLUMNS];
  int32_t rank[kPanel];
  for (int64_t j = 0; j < c.columns; j++) left[j] = load_some(values + j * c.rows + row, count);
  for (int64_t j = 0; j < c.columns; j++) {
    const int64_t at = j * c.rows + row;
    const float *factors = c.matrix + j * c.columns;
    const F32 value = nearest_values(c, thresholds, at, count, left[j], rank);
    const F32 error = divide(subtract(left[j], value), set_f32(factors[j]));
    pass_on(left + j + 1, factors + j + 1, c.columns - j - 1, subtract(set_f32(0.0f), error));
    store_some(values + at, value, count);
    store_some(errors + at, error, count);
    for (int64_t i = 0; i < count; i++) ranks[at + i] = (uint8_t)rank[i];
  }
}

/* pt_descend_columns for rows [row, row + kPanel); whether anything moved. */
bool descend_columns(const pt_columns &c, const Thresholds &thresholds, int64_t row, float *values,
                     float *errors, const float *slopes) {
  const int64_t count = c.rows - row < kPanel ? c.rows - row : kPanel;
  F32 slope[PT_MOST_COLUMNS];
  bool any = false;
  for (int64_t j = 0; j < c.columns; j++) slope[j] = load_some(slopes + j * c.rows + row, count);
  for (int64_t j = 0; j < c.columns; j++) {
    const int64_t at = j * c.rows + row;
    const float *factors = c.matrix + j * c.columns;
    if (!(factors[j] > 0)) continue;
    const F32 before = load_some(values + at, count);
    const F32 target = subtract(before, divide(slope[j], set_f32(factors[j])));
    const F32 after = nearest_values(c, thresholds, at, count, target, nullptr);
    const F32 move = subtract(after, before);
    float moves[kPanel];
    store_some(moves, move, kPanel);
    bool moved = false;
    for (int64_t i = 0; i < count; i++) moved |= moves[i] != 0;
    if (!moved) continue;
    any = true;
    store_some(values + at, after, count);
    store_some(errors + at, add(load_some(errors + at, count), move), count);
    pass_on(slope + j + 1, factors + j + 1, c.columns - j - 1, move);
  }
  return any;
}

}  // namespace
