/* pt_linear: quantize the activations once, divide the products among the threads. */
#include <string.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "dispatch.h"
#include "kernels.h"
#include "linear.h"
#include "threads.h"

namespace {

/* Up to this many tokens, unpacking inside the product beats unpacking first. */
const int64_t kFewTokens = 8;
const int64_t kSharesOfFew = 32; /* of a thread, then: they read their panels in pairs */
const int64_t kExpectedBytes = 1 << 16; /* of codes that a thread asks for before it is to read them */

const int64_t kRowBytes = 1 << 15; /* of activations quantized together */

/* More tokens: */
const int64_t kFewestShares = 6; /* of a thread */
const int64_t kFewestTokensPerShare = 32;
const int64_t kMostTokensPerShare = 512; /* so that what a share carries stays in the second cache */
const int64_t kSharedBytes = 1 << 19;    /* of activations, from where they are worth sharing */
const int64_t kManyPanels = 128; /* from where it costs little to fetch activations from another thread */

struct Workspace {
  Buffer rotated, values, codes, scales, sums, starts, scratch;
};

Workspace &workspace() {
  static Workspace *space = new Workspace;
  return *space;
}

bool are_few(const Activations &x) { return x.tokens <= kFewTokens; }

int64_t group_of(int64_t group, int64_t cols) {
  if (group <= 0 || group > cols) group = cols;
  return group;
}

bool valid(const pt_weight &w) {
  if (w.rows < 1 || w.cols < 1 || !w.codes) return false;
  if (w.stage == PT_FLOAT || w.stage == PT_ROWS) return w.bits == 16 || w.bits == 32;
  if (w.bits < 2 || w.bits > 8 || w.group < 1 || (w.group < w.cols && w.group % 16)) return false;
  if (w.stage == PT_LOOKUP) {
    if (w.bits != 4 || !w.lookup || !w.table) return false;
    for (int i = 0; i < 16; i++)
      if (w.lookup[i] > 127) return false; /* as `dot` wants of all but 8-bit codes */
    return true;
  }
  return w.stage == PT_INTEGER || (w.stage == PT_TABLE && w.table);
}

bool valid(const pt_input &in, int64_t cols) {
  if (in.bits == 0) return true;
  if (in.bits == PT_DIGITS) return in.group >= cols;
  if (in.bits < 2 || in.bits > 8 || in.lo < -128 || in.hi > 127 || !(in.top > 0)) return false;
  if (in.scale_type != PT_F32 && in.scale_type != PT_F16) return false;
  return in.group >= cols || (in.group > 0 && in.group % 16 == 0);
}

/* Columns on which every scale is constant; long rows are cut so that int32 sums cannot overflow. */
int64_t segment_of(const pt_weight &w, int64_t x_group) {
  int64_t cols = padded(w.cols), segment = w.group >= w.cols ? cols : w.group;
  if (x_group < w.cols) segment = std::gcd(segment, x_group);
  if (segment >= cols) segment = cols;
  if (segment % kUnit) segment = kUnit / 2; /* half units or whole ones: all a tile can tell apart */
  return segment > kLongestSegment ? std::gcd(segment, kLongestSegment) : segment;
}

/* What activations have to be for a weight: codes, to meet groups of so many columns, or 0: floats. */
int64_t form_of(const pt_weight &w, const pt_input &in) {
  return in.bits && w.stage <= PT_LOOKUP ? group_of(w.group, w.cols) : 0;
}

/* `count` rows of a weight from row `first` on, a multiple of 16. */
pt_weight rows_of(const pt_weight &w, int64_t first, int64_t count) {
  pt_weight part = w;
  const int64_t panel = first / kPanel, scale = panel * ceil_div(w.cols, group_of(w.group, w.cols)) * kPanel;
  part.rows = (int32_t)count;
  part.codes += panel * panel_bytes(w);
  if (w.scales) part.scales = (const uint8_t *)w.scales + scale * scale_bytes(w);
  if (w.zeros) part.zeros += scale;
  if (w.bias) part.bias += first;
  return part;
}

/* The activations of one call, prepared for weights. */
class Prepared {
 public:
  Prepared(const Kernels &kernels, const float *x, int64_t ldx, int64_t tokens, int64_t cols,
           const pt_input &in)
      : kernels_(kernels), in_(in), x_(x), ldx_(ldx), tokens_(tokens), cols_(cols) {}

  /* As codes, for weights of `groups` groups of `group` columns; what the sums of `products` of them start
   * at is set as well. */
  Activations quantized(int64_t segment, int64_t groups, int64_t group, Product *products = nullptr, int count = 0) {
    Activations a{};
    a.digits = in_.bits == PT_DIGITS ? kDigits : 1;
    a.tokens = tokens_ * a.digits;
    a.scale_group = group_of(in_.group, cols_);
    a.scale_groups = ceil_div(cols_, a.scale_group);
    a.segment = segment, a.segments = ceil_div(cols_, segment);
    a.weight_groups = groups;
    a.segments_per_group = ceil_div(group, segment);
    a.segments_per_scale = ceil_div(a.scale_group, segment);
    a.block = are_few(a) ? padded(cols_) : std::min(padded(cols_), block_columns(padded(cols_), segment));
    /* An odd number of cache lines: rows a power of two apart would share few lines of a cache. */
    a.stride = (ceil_div(a.block, kVector) | 1) * kVector;
    const int64_t blocks = ceil_div(cols_, a.block);
    a.codes = workspace().codes.get<int8_t>(blocks * (a.tokens + kTokenSlack) * a.stride);
    a.scales = workspace().scales.get<float>((a.tokens + kTokenSlack) * a.scale_groups);
    a.sums = workspace().sums.get<int32_t>((a.tokens + kTokenSlack) * a.segments);
    const int64_t sums = a.tokens * a.segments;
    int32_t *starts = workspace().starts.get<int32_t>(count * sums);
    auto zero = [&](int i) { return products[i].weight->zero; };
    for (int i = 0; i < count; i++) /* weights with the same zero point share theirs */
      products[i].starts = i && zero(i) == zero(i - 1) ? products[i - 1].starts : starts + i * sums;
    for_rows([&](int64_t first, int64_t n, const float *rows, int64_t ld) {
      kernels_.quantize(rows, ld, n, cols_, in_, first, a);
      for (int i = 0; i < count; i++) {
        int32_t *row = starts + i * sums;
        if (products[i].starts != row) continue;
        for (int64_t s = 0; s < a.segments; s++, row += a.tokens)
          for (int64_t t = first * a.digits; t < (first + n) * a.digits; t++)
            row[t] = -zero(i) * a.sums[t * a.segments + s];
      }
    });
    return a;
  }

  /* Gives products of weights of the same form their activations. */
  void give(std::vector<Product> &products) {
    const pt_weight &w = *products[0].weight;
    const int64_t group = form_of(w, in_);
    const Activations a = group ? quantized(segment_of(w, in_.group), ceil_div(cols_, group), group,
                                            products.data(), (int)products.size())
                                : floats();
    for (auto &p : products) p.x = a;
  }

  /* As floats: the activations themselves, or what their codes stand for. */
  Activations floats() {
    const bool rounds = in_.bits && in_.bits != PT_DIGITS;
    Activations codes{};
    if (rounds) codes = quantized(padded(cols_), 1, cols_);
    Activations a{};
    a.tokens = tokens_, a.stride = padded(cols_);
    a.scale_group = cols_, a.scale_groups = 1;
    if (!rounds && !in_.rotate && a.stride == cols_ && ldx_ == cols_) {
      a.values = x_;
      return a;
    }
    float *values = workspace().values.get<float>(tokens_ * a.stride);
    a.values = values;
    auto pad = [&](float *row) { memset(row + cols_, 0, (a.stride - cols_) * sizeof(float)); };
    if (!rounds) {
      for_rows([&](int64_t first, int64_t n, const float *rows, int64_t ld) {
        for (int64_t t = first; t < first + n; t++, rows += ld) {
          memcpy(values + t * a.stride, rows, cols_ * sizeof(float));
          pad(values + t * a.stride);
        }
      });
      return a;
    }
    for_token_blocks(tokens_, [&](int64_t first, int64_t last, int) {
      for (int64_t t = first; t < last; t++) {
        float *row = values + t * a.stride;
        for (int64_t k = 0; k < cols_; k++)
          row[k] = *codes.codes_at(t, k) * codes.scales[t * codes.scale_groups + k / codes.scale_group];
        pad(row);
      }
    });
    return a;
  }

 private:
  /* Calls f(first token, how many, rows, floats from row to row) with tokens as products see them, as
   * many as stay in the first cache: rotated, where they want it so, in memory of the thread's own that
   * the next ones take over. */
  template <class F>
  void for_rows(F f) {
    const int64_t at_once = std::max<int64_t>(1, kRowBytes / (cols_ * (int64_t)sizeof(float)));
    float *rotated = in_.rotate ? workspace().rotated.get<float>(thread_count() * at_once * cols_) : nullptr;
    for_token_blocks(tokens_, [&](int64_t first, int64_t last, int thread) {
      for (int64_t n; first < last; first += n) {
        n = std::min(at_once, last - first);
        const float *rows = x_ + first * ldx_;
        if (!rotated) {
          f(first, n, rows, ldx_);
          continue;
        }
        float *own = rotated + thread * at_once * cols_;
        for (int64_t t = 0; t < n; t++) kernels_.rotate(rows + t * ldx_, own + t * cols_, cols_);
        f(first, n, own, cols_);
      }
    });
  }

  const Kernels &kernels_;
  const pt_input &in_;
  const float *x_;
  int64_t ldx_, tokens_, cols_;
};

/* How products of few tokens are divided: `shares` times so many panels of one of the weights. */
struct Division {
  int64_t panels, shares;
};

/* weight(i) is the i-th of `count`. */
template <class F>
Division divided(int64_t count, F weight) {
  int64_t total = 0, shares = 0;
  for (int64_t i = 0; i < count; i++) total += panels_of(weight(i).rows);
  const int64_t panels = 2 * ceil_div(total, 2 * kSharesOfFew * thread_count());
  for (int64_t i = 0; i < count; i++) shares += ceil_div(panels_of(weight(i).rows), panels);
  return {panels, shares};
}

/* Lets each thread ask for what it reads first when few tokens are multiplied with these weights. */
void expect_all(const Weights &next) {
  const Division few = divided(next.count, [&](int64_t i) -> const pt_weight & { return *next.all[i]; });
  for (int thread = 0, threads = thread_count(); thread < threads; thread++) {
    int64_t share = first_item(few.shares, thread, threads);
    for (int i = 0; i < next.count; i++) {
      const pt_weight &w = *next.all[i];
      const int64_t mine = ceil_div(panels_of(w.rows), few.panels);
      if (share >= mine) {
        share -= mine;
        continue;
      }
      const int64_t first = share * few.panels, left = panels_of(w.rows) - first;
      auto stretch = [&](const void *from, int64_t bytes_of_panel, int64_t most) -> Stretch {
        if (!from) return {nullptr, 0};
        return {(const uint8_t *)from + first * bytes_of_panel, std::min(left * bytes_of_panel, most)};
      };
      const int64_t codes = panel_bytes(w);
      const int64_t scales = ceil_div(w.cols, group_of(w.group, w.cols)) * kPanel * scale_bytes(w);
      expect(thread, {{&w, sizeof w},
                      stretch(w.scales, scales, kExpectedBytes * scales / codes),
                      stretch(w.codes, codes, kExpectedBytes)});
      break;
    }
  }
}

/* Products of few tokens that share activations, as one list of items for the pool. */
void multiply_few(const Kernels &kernels, const std::vector<Product> &products) {
  const int64_t tokens = products[0].x.tokens;
  const Division few = divided(products.size(), [&](int64_t i) -> const pt_weight & { return *products[i].weight; });
  /* All that the threads have to read to know their work: see parallel_for. */
  parallel_for(few.shares, [gemv = kernels.gemv, first = products.data(), panels = few.panels, tokens](int64_t share, int) {
    for (const Product *p = first;; p++) {
      const int64_t all = panels_of(p->weight->rows), mine = ceil_div(all, panels);
      if (share < mine) return gemv(*p, {share * panels, std::min((share + 1) * panels, all), 0, tokens});
      share -= mine;
    }
  });
}

/* The same of many tokens: shares are so many panels times so many tokens. */
void multiply_many(const Kernels &kernels, const std::vector<Product> &products) {
  const int64_t threads = thread_count(), tokens = products[0].x.tokens;
  int64_t total = 0, blocks = 0, scratch = 0;
  for (auto &p : products) total += panels_of(p.weight->rows);
  const TileShape tile = kernels.gemm_tile(products[0]); /* the same for all: they share segments */
  int64_t panels = tile.panels;
  if (tokens * products[0].weight->cols > kSharedBytes)
    for (int i = 1; i < kTilesOfShare && ceil_div(total, 2 * panels) >= 8 * threads; i *= 2) panels *= 2;
  for (auto &p : products) blocks += ceil_div(panels_of(p.weight->rows), panels);
  /* The tokens are divided too where there are too few rows to go round, or too many tokens. */
  auto divisible = [&](int64_t parts) { return tokens / parts >= kFewestTokensPerShare; };
  int64_t parts = ceil_div(tokens, kMostTokensPerShare);
  while (blocks * parts < kFewestShares * threads && divisible(parts + 1)) parts++;
  /* With few rows each thread multiplies the tokens that it quantized, all weights: those of another
   * thread may be far away. It unpacks more weights then, so there have to be more tokens. */
  const bool by_tokens = total < kManyPanels && 2 * total < tokens && divisible(std::max(parts, threads));
  if (by_tokens) parts = ceil_div(std::max(parts, threads), threads) * threads;
  const int64_t whole = std::lcm(tile.tokens, products[0].x.digits); /* tiles, and tokens in digits */
  const int64_t per_part = ceil_div(ceil_div(tokens, parts), whole) * whole;
  parts = ceil_div(tokens, per_part);
  for (auto &p : products) scratch = std::max(scratch, gemm_scratch(kernels, p, per_part));
  uint8_t *memory = workspace().scratch.get<uint8_t>(scratch * threads);
  parallel_for(blocks * parts, [&](int64_t item, int thread) {
    int64_t block = by_tokens ? item % blocks : item / parts;
    const int64_t first = (by_tokens ? item / blocks : item % parts) * per_part;
    for (auto &p : products) {
      const int64_t all = panels_of(p.weight->rows), mine = ceil_div(all, panels);
      if (block < mine) {
        kernels.gemm(p, {block * panels, std::min((block + 1) * panels, all), first, std::min(first + per_part, tokens)},
                     memory + thread * scratch);
        return;
      }
      block -= mine;
    }
  });
}

}  // namespace

int32_t check_products(const pt_weight *const *weights, int count, const pt_input &input) {
  if (count < 1) return PT_BAD_SHAPE;
  if (!valid(input, weights[0]->cols)) return PT_BAD_FORMAT;
  for (int i = 0; i < count; i++) {
    if (!valid(*weights[i])) return PT_BAD_FORMAT;
    if (weights[i]->cols != weights[0]->cols) return PT_BAD_SHAPE;
  }
  return PT_OK;
}

void multiply_all(const pt_product &product, Weights next) {
  const Kernels &kernels = active_kernels();
  const pt_weight *const *weights = product.weights;
  const pt_input &input = *product.input;
  const int64_t cols = weights[0]->cols, tokens = product.tokens;
  for (int i = 0; i < next.count; i++) /* `expect_all` reads them */
    for (const char *at = (const char *)next.all[i]; at < (const char *)(next.all[i] + 1); at += kVector)
      __builtin_prefetch(at);
  Prepared prepared(kernels, product.x, product.ldx, tokens, cols, input);
  /* Weights in a row with the same groups share the same form of activations. */
  for (int first = 0; first < product.count;) {
    const int64_t group = form_of(*weights[first], input);
    std::vector<Product> products;
    for (; first < product.count && form_of(*weights[first], input) == group; first++)
      products.push_back({weights[first], {}, nullptr, product.y[first], product.ldy[first]});
    prepared.give(products);
    if (!are_few(products[0].x)) {
      multiply_many(kernels, products);
    } else {
      if (first == product.count) expect_all(next);
      multiply_few(kernels, products);
    }
  }
}

void multiply_in_parts(const pt_weight &weight, const float *x, int64_t tokens, const pt_input &input, int64_t rows,
                       float *y, const std::function<void(int64_t, int64_t)> &then) {
  const Kernels &kernels = active_kernels();
  Prepared prepared(kernels, x, weight.cols, tokens, weight.cols, input);
  pt_weight part = weight;
  std::vector<Product> products{{&part, {}, nullptr, y, rows}};
  prepared.give(products);
  for (int64_t first = 0; first < weight.rows; first += rows) {
    part = rows_of(weight, first, std::min<int64_t>(rows, weight.rows - first));
    if (are_few(products[0].x)) multiply_few(kernels, products);
    else multiply_many(kernels, products);
    then(first, part.rows);
  }
}

int32_t pt_linear(const pt_product *products, int32_t count) {
  for (int i = 0; i < count; i++) {
    const pt_product &p = products[i];
    if (p.tokens < 0) return PT_BAD_SHAPE;
    if (int32_t wrong = check_products(p.weights, p.count, *p.input)) return wrong;
    if (p.ldx < p.weights[0]->cols) return PT_BAD_SHAPE;
    for (int j = 0; j < p.count; j++)
      if (p.ldy[j] < p.weights[j]->rows) return PT_BAD_SHAPE;
  }
  return guarded([&] {
    for (int i = 0; i < count; i++) {
      Weights next{};
      if (i + 1 < count) next = {products[i + 1].weights, products[i + 1].count};
      if (products[i].tokens) multiply_all(products[i], next);
    }
  });
}

int32_t pt_quantize(const float *x, int64_t ldx, int64_t tokens, int32_t cols,
                    const pt_input *input, int8_t *codes, float *scales) {
  if (cols < 1 || tokens < 0 || ldx < cols) return PT_BAD_SHAPE;
  if (input->bits == 0 || input->bits == PT_DIGITS || !valid(*input, cols)) return PT_BAD_FORMAT;
  if (tokens == 0) return PT_OK;
  return guarded([&] {
    Prepared prepared(active_kernels(), x, ldx, tokens, cols, *input);
    Activations a = prepared.quantized(padded(cols), 1, cols);
    for (int64_t t = 0; t < tokens; t++)
      for (int64_t k = 0; k < cols; k += a.block)
        memcpy(codes + t * cols + k, a.codes_at(t, k), std::min(a.block, cols - k));
    memcpy(scales, a.scales, tokens * a.scale_groups * sizeof(float));
  });
}

int32_t pt_rotate(float *x, int64_t tokens, int32_t cols) {
  if (cols < 1 || tokens < 0) return PT_BAD_SHAPE;
  if (tokens == 0) return PT_OK;
  return guarded([&] {
    for_token_blocks(tokens, [&](int64_t first, int64_t last, int) {
      for (int64_t t = first; t < last; t++) active_kernels().rotate(x + t * cols, x + t * cols, cols);
    });
  });
}
