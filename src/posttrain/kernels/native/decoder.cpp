/* A whole decoder in one call. */
#include <string.h>

#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "kernels.h"
#include "linear.h"
#include "sampling.h"
#include "threads.h"

namespace {

#include "scalar.h"

/* Queries of a work item: enough to pass over keys and values seldom, few enough to share out. */
const int64_t kQueriesPerItem = 24;

/* Tokens of a call whose attention is divided by runs of positions. */
const int64_t kFewTokens = 16;

/* Rows of logits that losses are taken from at a time. */
const int64_t kLossRows = 512;

/* Bytes of `channels` keys or values. */
int64_t cache_bytes(int32_t cache_type, int64_t channels) {
  switch (cache_type) {
    case PT_CACHE_F32: return 4 * channels;
    case PT_CACHE_I4: return ceil_div(channels, 2);
    case PT_CACHE_I16: return 4 * ceil_div(channels, 2);
    default: return (cache_type < PT_CACHE_I8 ? 2 : 1) * channels;
  }
}

/* Row `row` of an embedding as floats. */
void embed(const pt_weight &w, int64_t row, float scale, float *out) {
  if (w.stage == PT_ROWS) {
    const uint8_t *from = w.codes + row * w.cols * w.bits / 8;
    for (int64_t k = 0; k < w.cols; k++) {
      uint16_t half;
      float value;
      if (w.bits == 32) {
        memcpy(&value, from + 4 * k, 4);
      } else {
        memcpy(&half, from + 2 * k, 2);
        value = w.half == PT_F16 ? half_to_float(half) : bfloat16_to_float(half);
      }
      out[k] = value * scale;
    }
    return;
  }
  const int64_t panel = row / kPanel, lane = row % kPanel;
  const int64_t groups = w.group >= w.cols ? 1 : ceil_div(w.cols, w.group);
  const uint8_t *codes = w.codes + panel * panel_bytes(w.cols, w.bits);
  for (int64_t k = 0; k < w.cols; k++) {
    if (w.stage == PT_FLOAT) {
      int64_t at = k * kPanel + lane;
      if (w.bits == 32) out[k] = ((const float *)codes)[at];
      else if (w.half == PT_F16) out[k] = half_to_float(((const uint16_t *)codes)[at]);
      else out[k] = bfloat16_to_float(((const uint16_t *)codes)[at]);
    } else {
      int64_t at = (panel * groups + (groups == 1 ? 0 : k / w.group)) * kPanel + lane;
      int32_t code = code_at(codes, w.bits, lane, k);
      float value = w.stage == PT_INTEGER ? (float)(code - (w.zeros ? w.zeros[at] : w.zero))
                                          : w.table[code];
      float factor = w.scales ? scale_at(w.scales, w.scale_type, at) : 1.0f;
      out[k] = value * factor * w.multiplier;
    }
    out[k] *= scale;
  }
}

/* Sequences as one list of tokens. */
struct Place {
  const pt_sequence *sequence;
  int64_t position;
};

class Pass {
 public:
  Pass(const pt_model &model, const pt_sequence *sequences, int count)
      : m_(model), sequences_(sequences), count_(count), kernels_(active_kernels()) {
    for (int i = 0; i < count; i++)
      for (int64_t t = 0; t < sequences[i].tokens; t++)
        places_.push_back({sequences + i, sequences[i].length + t});
    tokens_ = (int64_t)places_.size();
    queries_ = (int64_t)m_.heads * m_.head_size, keys_ = (int64_t)m_.kv_heads * m_.head_size;
    int64_t hidden = 0;
    for (int i = 0; i < m_.blocks; i++)
      hidden = m_.block[i].gate->rows > hidden ? m_.block[i].gate->rows : hidden;
    for (auto &p : places_) longest_ = p.position >= longest_ ? p.position + 1 : longest_;
    const int64_t queries = tokens_per_item() * (m_.heads / m_.kv_heads);
    scratch_floats_ = run_scratch(m_.head_size) + (runs() + 1) * queries * floats_of_run();
    const int64_t sums = tokens_ <= kFewTokens ? tokens_ * m_.heads * runs() * floats_of_run() : 0;
    const int64_t wide = m_.width > queries_ ? m_.width : queries_;
    float *memory = buffer().get<float>(tokens_ * (2 * wide + queries_ + 2 * keys_ + 2 * hidden) +
                                        thread_count() * scratch_floats_ + sums);
    auto take = [&](int64_t floats) {
      float *mine = memory;
      memory += floats;
      return mine;
    };
    x = take(tokens_ * m_.width), h = take(tokens_ * wide);
    q_ = take(tokens_ * queries_), k_ = take(tokens_ * keys_), v_ = take(tokens_ * keys_);
    gate_ = take(tokens_ * hidden), up_ = take(tokens_ * hidden);
    scratch_ = take(thread_count() * scratch_floats_), sums_ = take(sums);
  }

  void embed_all(const int32_t *ids) {
    /* A head that rotates its input is stored rotated, and an embedding tied with it. */
    const bool rotated = m_.embedding == m_.head && m_.head_input.rotate;
    for_token_blocks(tokens_, [&](int64_t first, int64_t last, int) {
      for (int64_t t = first; t < last; t++) {
        float *row = x + t * m_.width;
        embed(*m_.embedding, ids[t], m_.embedding_scale, row);
        if (rotated) kernels_.rotate(row, row, m_.width);
      }
    });
  }

  void attention(int index) {
    const pt_block &b = m_.block[index];
    normalize(b.attention_norm);
    const pt_weight *qkv[] = {b.q, b.k, b.v};
    float *out[] = {q_, k_, v_};
    const int64_t ld[] = {queries_, keys_, keys_};
    multiply_all({qkv, 3, h, m_.width, tokens_, &b.qkv_input, out, ld}, {&b.o, 1});
    for_token_blocks(tokens_, [&](int64_t first, int64_t last, int) {
      for (int64_t t = first; t < last; t++) place(b, index, t);
    });
    attend(b, index);
    const pt_weight *next[] = {b.gate, b.up};
    project(b.o, q_, queries_, b.o_input, b.attention_out_norm, {next, 2});
  }

  void mlp(int index) {
    const pt_block &b = m_.block[index];
    const int64_t hidden = b.gate->rows;
    normalize(b.mlp_norm);
    const pt_weight *both[] = {b.gate, b.up};
    float *out[] = {gate_, up_};
    const int64_t ld[] = {hidden, hidden};
    multiply_all({both, 2, h, m_.width, tokens_, &b.mlp_input, out, ld}, {&b.down, 1});
    for_token_blocks(tokens_, [&](int64_t first, int64_t last, int) {
      for (int64_t t = first; t < last; t++)
        kernels_.gated(m_.activation, gate_ + t * hidden, up_ + t * hidden, hidden);
    });
    if (index + 1 == m_.blocks) {
      project(b.down, gate_, hidden, b.down_input, b.mlp_out_norm, {&m_.head, 1});
    } else {
      const pt_block &after = m_.block[index + 1];
      const pt_weight *next[] = {after.q, after.k, after.v};
      project(b.down, gate_, hidden, b.down_input, b.mlp_out_norm, {next, 3});
    }
  }

  /* What enters the head. */
  void finish(const int32_t *want, int64_t wanted, float *out) {
    for_token_blocks(wanted, [&](int64_t first, int64_t last, int) {
      for (int64_t i = first; i < last; i++)
        kernels_.rms_norm(x + want[i] * m_.width, m_.norm, m_.eps, m_.width, out + i * m_.width);
    });
  }

  float *x, *h; /* [tokens, width]: the residual stream; what enters the next product */

 private:
  static Buffer &buffer() {
    static Buffer *one = new Buffer;
    return *one;
  }

  void normalize(const float *gain) {
    for_token_blocks(tokens_, [&](int64_t first, int64_t last, int) {
      for (int64_t t = first; t < last; t++)
        kernels_.rms_norm(x + t * m_.width, gain, m_.eps, m_.width, h + t * m_.width);
    });
  }

  /* x += norm(weight(from)) */
  void project(const pt_weight *weight, const float *from, int64_t ld, const pt_input &input,
               const float *out_norm, Weights next) {
    const int64_t width = m_.width;
    multiply_all({&weight, 1, from, ld, tokens_, &input, &h, &width}, next);
    for_token_blocks(tokens_, [&](int64_t first, int64_t last, int) {
      for (int64_t t = first; t < last; t++) {
        float *y = h + t * width;
        if (out_norm) kernels_.rms_norm(y, out_norm, m_.eps, width, y);
        kernels_.accumulate(x + t * width, y, m_.residual_scale, width);
      }
    });
  }

  HeadCache cache(const pt_block &b, const pt_sequence &s, int64_t index, int64_t head) const {
    const int64_t run = s.type == PT_CACHE_I4 ? 2 * kPanel : kPanel;
    const int64_t size = m_.head_size, width = ceil_div(size, run) * run;
    const int64_t at = ((s.passing ? 0 : index) * m_.kv_heads + head) * s.capacity;
    HeadCache c{};
    c.keys = (uint8_t *)s.keys + at * cache_bytes(s.type, size);
    c.values = (uint8_t *)s.values + at * cache_bytes(s.type, width);
    if (s.type >= PT_CACHE_I8) {
      const int64_t bytes = s.type == PT_CACHE_I16 ? sizeof(float) : sizeof(uint16_t);
      c.key_scales = (uint8_t *)s.key_scales + at * bytes;
      c.value_scales = (uint8_t *)s.value_scales + at * bytes;
    }
    c.type = s.type, c.head_size = size, c.value_width = width;
    c.scale = m_.attention_scale, c.soft_cap = m_.attention_cap, c.window = b.window;
    return c;
  }

  /* Norms and angles of one token's heads, and its place in the cache. */
  void place(const pt_block &b, int index, int64_t t) {
    const int64_t size = m_.head_size;
    const Place &p = places_[t];
    const float *angles = b.rope < 0 ? nullptr : p.sequence->angles[b.rope] + p.position * m_.rotary;
    auto prepare = [&](float *head, const float *gain) {
      if (gain) kernels_.rms_norm(head, gain, m_.eps, size, head);
      if (angles) kernels_.rotate_positions(head, angles, m_.rotary);
    };
    for (int i = 0; i < m_.heads; i++) prepare(q_ + t * queries_ + i * size, b.q_norm);
    for (int i = 0; i < m_.kv_heads; i++) {
      float *key = k_ + t * keys_ + i * size;
      prepare(key, b.k_norm);
      kernels_.remember(cache(b, *p.sequence, index, i), p.position, key, v_ + t * keys_ + i * size);
    }
  }

  /* q_ becomes what each query takes from the values. */
  void attend(const pt_block &b, int index) {
    const int64_t group = m_.heads / m_.kv_heads;
    const int64_t per_item = tokens_per_item();
    items_.clear();
    int64_t start = 0, units = 0;
    for (int i = 0; i < count_; i++) units += ceil_div(sequences_[i].tokens, per_item) * m_.kv_heads;
    const bool few = units < 4 * thread_count(); /* too few items to go round */
    if (few && tokens_ <= kFewTokens && runs() > 1) return attend_in_runs(b, index);
    const int64_t heads = few ? 1 : group;
    for (int i = 0; i < count_; start += sequences_[i].tokens, i++)
      for (int64_t last = sequences_[i].tokens; last > 0; last -= per_item) /* long ones first */
        for (int64_t head = 0; head < m_.heads; head += heads)
          items_.push_back({start, last > per_item ? last - per_item : 0, last, head, i});
    parallel_for((int64_t)items_.size(), [&](int64_t i, int thread) {
      const AttentionItem &item = items_[i];
      const pt_sequence &s = sequences_[item.sequence];
      const HeadCache seen = cache(b, s, index, item.head / group);
      const int64_t tokens = item.last - item.first, position = s.length + item.first;
      const int64_t first = first_seen(b.window, position) / kAttentionRun, floats = run_floats(seen);
      const int64_t runs = (position + tokens - 1) / kAttentionRun + 1 - first, stride = tokens * heads * floats;
      float *q = q_ + (item.start + item.first) * queries_ + item.head * m_.head_size;
      float *scratch = scratch_ + thread * scratch_floats_, *sums = scratch + run_scratch(m_.head_size);
      for (int64_t r = 0; r < runs; r++)
        kernels_.attend_run(seen, q, queries_, heads, tokens, position, first + r, sums + r * stride, heads * floats,
                            scratch);
      for (int64_t t = 0; t < tokens; t++)
        for (int64_t h = 0; h < heads; h++)
          kernels_.join_runs(seen, runs, sums + (t * heads + h) * floats, stride, q + t * queries_ + h * m_.head_size);
    });
  }

  /* The same, divided by what is seen rather than by who looks: keys and values are read once. */
  void attend_in_runs(const pt_block &b, int index) {
    const int64_t group = m_.heads / m_.kv_heads;
    items_.clear();
    for (int64_t i = 0, start = 0; i < count_; start += sequences_[i].tokens, i++)
      for (int64_t run = first_run(b, i); run * kAttentionRun < sequences_[i].length + sequences_[i].tokens; run++)
        for (int64_t head = 0; head < m_.heads; head += group)
          items_.push_back({start, 0, sequences_[i].tokens, head, (int)i, run});
    parallel_for((int64_t)items_.size(), [&](int64_t i, int thread) {
      const AttentionItem &item = items_[i];
      const pt_sequence &s = sequences_[item.sequence];
      const HeadCache seen = cache(b, s, index, item.head / group);
      kernels_.attend_run(seen, q_ + item.start * queries_ + item.head * m_.head_size, queries_, group, item.last,
                          s.length, item.run, sums_of(seen, item.run, item.start, item.head),
                          m_.heads * floats_of_run(), scratch_ + thread * scratch_floats_);
    });
    parallel_for(tokens_ * m_.heads, [&](int64_t i, int) {
      const int64_t t = i / m_.heads, head = i % m_.heads, sequence = places_[t].sequence - sequences_;
      const HeadCache seen = cache(b, *places_[t].sequence, index, head / group);
      const int64_t first = first_run(b, sequence), runs = places_[t].position / kAttentionRun + 1 - first;
      kernels_.join_runs(seen, runs, sums_of(seen, first, t, head), tokens_ * m_.heads * floats_of_run(),
                         q_ + t * queries_ + head * m_.head_size);
    });
  }

  /* The run that the first of its tokens sees first. */
  int64_t first_run(const pt_block &b, int64_t sequence) const {
    return first_seen(b.window, sequences_[sequence].length) / kAttentionRun;
  }
  /* What a head of a token takes from a run, in [runs, tokens, heads]. */
  float *sums_of(const HeadCache &seen, int64_t run, int64_t token, int64_t head) const {
    return sums_ + (run * tokens_ + token) * m_.heads * floats_of_run() + head * run_floats(seen);
  }
  int64_t tokens_per_item() const {
    const int64_t group = m_.heads / m_.kv_heads;
    return kQueriesPerItem / group > 1 ? kQueriesPerItem / group : 1;
  }
  int64_t runs() const { return ceil_div(longest_, kAttentionRun); }
  /* At least run_floats(...) of any cache. */
  int64_t floats_of_run() const { return padded(m_.head_size) + kPanel; }

  struct AttentionItem {
    int64_t start, first, last; /* where its sequence begins; tokens of that */
    int64_t head;
    int sequence;
    int64_t run = 0;
  };

  const pt_model &m_;
  const pt_sequence *sequences_;
  const int count_;
  const Kernels &kernels_;
  std::vector<Place> places_;
  std::vector<AttentionItem> items_;
  int64_t tokens_, queries_, keys_, scratch_floats_;
  int64_t longest_ = 0; /* positions that any token sees */
  float *q_, *k_, *v_, *gate_, *up_, *scratch_, *sums_;
};

/* What n products with the head become before they are logits. */
void finish_logits(const pt_model &m, float *logits, int64_t n) {
  if (m.logit_scale != 1)
    for (int64_t i = 0; i < n; i++) logits[i] *= m.logit_scale;
  if (m.logit_cap > 0) active_kernels().soft_cap(logits, m.logit_cap, n);
}

void head(const pt_model &m, const float *hidden, int64_t rows, float *logits) {
  const int64_t vocabulary = m.vocabulary;
  multiply_all({&m.head, 1, hidden, m.width, rows, &m.head_input, &logits, &vocabulary});
  if (m.logit_cap == 0 && m.logit_scale == 1) return;
  for_token_blocks(rows, [&](int64_t first, int64_t last, int) {
    finish_logits(m, logits + first * vocabulary, (last - first) * vocabulary);
  });
}

/* Logits are looked at a part of the vocabulary at a time, while they are in the second cache. */
void losses(const pt_model &m, const float *hidden, const int32_t *targets, int64_t rows, float *out) {
  static Buffer *buffer = new Buffer;
  const Kernels &kernels = active_kernels();
  float *logits = buffer->get<float>(std::min(rows, kLossRows) * kPartitionRun);
  for (int64_t row = 0; row < rows; row += kLossRows, hidden += kLossRows * m.width) {
    const int64_t some = std::min(kLossRows, rows - row);
    std::vector<PartitionSum> partitions(some);
    multiply_in_parts(*m.head, hidden, some, m.head_input, kPartitionRun, logits, [&](int64_t begin, int64_t count) {
      for_token_blocks(some, [&](int64_t first, int64_t last, int) {
        for (int64_t i = first; i < last; i++) {
          float *part = logits + i * kPartitionRun;
          const int64_t wanted = targets[row + i] - begin;
          finish_logits(m, part, count);
          kernels.add_partition(part, count, partitions[i]);
          if (0 <= wanted && wanted < count) out[row + i] = part[wanted];
        }
      });
    });
    for (int64_t i = 0; i < some; i++) out[row + i] = kernels.log_partition(partitions[i]) - out[row + i];
  }
}

int32_t check(const pt_model &m) {
  if (m.blocks < 1 || m.width < 1 || m.head_size < 1 || m.vocabulary < 1) return PT_BAD_SHAPE;
  if (m.heads < 1 || m.kv_heads < 1 || m.heads % m.kv_heads) return PT_BAD_SHAPE;
  if (m.rotary < 0 || m.rotary % 2 || m.rotary > m.head_size) return PT_BAD_SHAPE;
  const int64_t queries = (int64_t)m.heads * m.head_size, keys = (int64_t)m.kv_heads * m.head_size;
  auto fits = [](const pt_weight *w, int64_t rows, int64_t cols) {
    return w->rows == rows && w->cols == cols;
  };
  pt_input floats{};
  if (int32_t wrong = check_products(&m.embedding, 1, floats)) return wrong;
  if (int32_t wrong = check_products(&m.head, 1, m.head_input)) return wrong;
  if (!fits(m.embedding, m.vocabulary, m.width) || !fits(m.head, m.vocabulary, m.width))
    return PT_BAD_SHAPE;
  for (int i = 0; i < m.blocks; i++) {
    const pt_block &b = m.block[i];
    if (b.rope < -1 || b.rope > 1 || b.window < 0) return PT_BAD_SHAPE;
    const pt_weight *qkv[] = {b.q, b.k, b.v}, *mlp[] = {b.gate, b.up};
    if (int32_t wrong = check_products(qkv, 3, b.qkv_input)) return wrong;
    if (int32_t wrong = check_products(mlp, 2, b.mlp_input)) return wrong;
    if (int32_t wrong = check_products(&b.o, 1, b.o_input)) return wrong;
    if (int32_t wrong = check_products(&b.down, 1, b.down_input)) return wrong;
    const int64_t hidden = b.gate->rows;
    if (!fits(b.q, queries, m.width) || !fits(b.k, keys, m.width) || !fits(b.v, keys, m.width) ||
        !fits(b.o, m.width, queries) || !fits(b.gate, hidden, m.width) ||
        !fits(b.up, hidden, m.width) || !fits(b.down, m.width, hidden))
      return PT_BAD_SHAPE;
  }
  return PT_OK;
}

/* Whether everything is there that the next tokens of a sequence need. */
bool has_memory(const pt_model &m, const pt_sequence &s) {
  if (!s.keys || !s.values) return false;
  if (s.type >= PT_CACHE_I8 && (!s.key_scales || !s.value_scales)) return false;
  for (int i = 0; m.rotary && i < m.blocks; i++)
    if (m.block[i].rope >= 0 && !s.angles[m.block[i].rope]) return false;
  return true;
}

/* Whether a pass can be made over these tokens; how many there are. */
int32_t check(const pt_model &m, const pt_sequence *sequences, int count, const int32_t *ids,
              int64_t *tokens) {
  if (int32_t wrong = check(m)) return wrong;
  if (count < 0) return PT_BAD_SHAPE;
  *tokens = 0;
  for (int i = 0; i < count; i++) {
    const pt_sequence &s = sequences[i];
    if (s.tokens < 0 || s.length < 0 || s.capacity % kPanel || s.length > s.capacity - s.tokens)
      return PT_BAD_SHAPE;
    if (s.passing && s.length) return PT_BAD_SHAPE;
    if (s.type < PT_CACHE_F32 || s.type > PT_CACHE_I16) return PT_BAD_FORMAT;
    if (s.type == PT_CACHE_I16 && m.head_size > kMostChannels) return PT_BAD_FORMAT;
    if (s.tokens && !has_memory(m, s)) return PT_BAD_SHAPE;
    *tokens += s.tokens;
  }
  if (*tokens && !ids) return PT_BAD_SHAPE;
  for (int64_t t = 0; t < *tokens; t++)
    if (ids[t] < 0 || ids[t] >= m.vocabulary) return PT_BAD_SHAPE;
  return PT_OK;
}

void forward(const pt_model &m, const pt_sequence *sequences, int count, const int32_t *ids,
             const int32_t *want, int64_t wanted, float *hidden, float *logits) {
  Pass pass(m, sequences, count);
  pass.embed_all(ids);
  for (int i = 0; i < m.blocks; i++) {
    pass.attention(i);
    pass.mlp(i);
  }
  if (!wanted) return;
  pass.finish(want, wanted, hidden ? hidden : pass.h);
  if (!hidden) head(m, pass.h, wanted, logits);
}

}  // namespace

int32_t pt_forward(const pt_model *model, const pt_sequence *sequences, int32_t count,
                   const int32_t *ids, const int32_t *want, int32_t wanted, float *hidden,
                   float *logits) {
  int64_t tokens;
  if (int32_t wrong = check(*model, sequences, count, ids, &tokens)) return wrong;
  if (wanted < 0 || (wanted && (!want || !(hidden || logits)))) return PT_BAD_SHAPE;
  if (!hidden && wanted > tokens) return PT_BAD_SHAPE; /* what enters the head lies where tokens do */
  for (int i = 0; i < wanted; i++)
    if (want[i] < 0 || want[i] >= tokens) return PT_BAD_SHAPE;
  if (tokens == 0) return PT_OK;
  return guarded([&] { forward(*model, sequences, count, ids, want, wanted, hidden, logits); });
}

int32_t pt_step(const pt_model *model, const pt_sequence *sequences, int32_t count,
                const int32_t *ids, const pt_draw *draws, int32_t *tokens) {
  int64_t all;
  if (int32_t wrong = check(*model, sequences, count, ids, &all)) return wrong;
  for (int i = 0; i < count; i++)
    if (!sequences[i].tokens) return PT_BAD_SHAPE;
  if (count == 0) return PT_OK;
  return guarded([&] {
    expect_another_token(true);
    static Buffer *buffer = new Buffer;
    float *logits = buffer->get<float>((int64_t)count * model->vocabulary);
    std::vector<int32_t> last(count);
    for (int i = 0, end = 0; i < count; i++) last[i] = (end += sequences[i].tokens) - 1;
    forward(*model, sequences, count, ids, last.data(), count, nullptr, logits);
    for (int64_t i = 0; i < count; i++)
      tokens[i] = sample(logits + i * model->vocabulary, model->vocabulary, draws[i]);
  });
}

int32_t pt_head(const pt_model *model, const float *hidden, int64_t rows, float *logits) {
  if (int32_t wrong = check(*model)) return wrong;
  if (rows < 0) return PT_BAD_SHAPE;
  if (rows == 0) return PT_OK;
  return guarded([&] { head(*model, hidden, rows, logits); });
}

int32_t pt_losses(const pt_model *model, const float *hidden, const int32_t *targets, int64_t rows, float *out) {
  if (int32_t wrong = check(*model)) return wrong;
  if (rows < 0) return PT_BAD_SHAPE;
  for (int64_t i = 0; i < rows; i++)
    if (targets[i] < 0 || targets[i] >= model->vocabulary) return PT_BAD_SHAPE;
  if (rows == 0) return PT_OK;
  return guarded([&] { losses(*model, hidden, targets, rows, out); });
}

int32_t pt_log_partition(const float *logits, int64_t rows, int32_t vocabulary, float *out) {
  if (rows < 0 || vocabulary < 1) return PT_BAD_SHAPE;
  if (rows == 0) return PT_OK;
  return guarded([&] {
    const Kernels &kernels = active_kernels();
    parallel_for(rows, [&](int64_t row, int) {
      PartitionSum partition;
      kernels.add_partition(logits + row * vocabulary, vocabulary, partition);
      out[row] = kernels.log_partition(partition);
    });
  });
}
