/* What linear.cpp offers to other files of this library. */
#ifndef POSTTRAIN_LINEAR_H
#define POSTTRAIN_LINEAR_H

#include <stdint.h>
#include <stdlib.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <functional>
#include <mutex>
#include <new>
#include <system_error>

#include "layout.h"
#include "posttrain.h"
#include "threads.h"

/* Memory that only ever grows, for one call at a time (engine_lock); in large pages where it fills some, as rows
 * of a product are further apart than a small one. */
class Buffer {
 public:
  template <class T>
  T *get(int64_t count) {
    const int64_t wanted = count * (int64_t)sizeof(T);
    if (wanted > size_) {
      const int64_t unit = wanted < kLargePage ? 64 : kLargePage, bytes = (wanted + unit - 1) / unit * unit;
      free(data_);
      data_ = aligned_alloc(unit, bytes);
      size_ = data_ ? bytes : 0;
      if (!data_) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
      if (unit == kLargePage) madvise(data_, bytes, MADV_HUGEPAGE);
#endif
    }
    return (T *)data_;
  }

 private:
  static const int64_t kLargePage = 2 << 20;
  void *data_ = nullptr;
  int64_t size_ = 0;
};

/* Calls f(first, last, thread) for blocks of tokens; few tokens are one block. */
template <class F>
void for_token_blocks(int64_t tokens, F f) {
  int64_t block = ceil_div(tokens, 4 * thread_count());
  if (tokens < 8) block = tokens;
  parallel_for(ceil_div(tokens, block), [&](int64_t item, int thread) {
    int64_t first = item * block, last = first + block;
    f(first, last < tokens ? last : tokens, thread);
  });
}

/* Runs a computation that needs workspace and threads; says so where there is no memory for it, or where
 * no more threads can be started. */
template <class F>
int32_t guarded(F compute) {
  std::lock_guard<std::mutex> guard(engine_lock());
  expect_another_token(false);
  try {
    compute();
  } catch (const std::bad_alloc &) {
    return PT_NO_MEMORY;
  } catch (const std::system_error &) {
    return PT_NO_THREADS;
  }
  return PT_OK;
}

/* PT_OK if these weights can share activations that enter like `input`. */
int32_t check_products(const pt_weight *const *weights, int count, const pt_input &input);

/* Weights that share activations. */
struct Weights {
  const pt_weight *const *all;
  int count;
};

/* One product of pt_linear without its checks, for callers that are `guarded`; tokens > 0. `next`: the
 * weights that will be multiplied after these, if that is known. */
void multiply_all(const pt_product &product, Weights next = {});

/* x [tokens, cols] times a weight, `rows` rows of it at a time, a multiple of 16: then(first, count) is
 * called with those from `first` on in y [tokens, rows], which the next ones overwrite. */
void multiply_in_parts(const pt_weight &weight, const float *x, int64_t tokens, const pt_input &input, int64_t rows,
                       float *y, const std::function<void(int64_t, int64_t)> &then);

#endif
