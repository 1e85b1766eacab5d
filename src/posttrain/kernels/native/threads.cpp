#include "threads.h"

#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <thread>
#include <vector>

namespace {

static inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

const int kSpins = 64; /* between two looks at the clock */
/* How long a thread without work looks for more before it sleeps. Waking costs a tenth of a small
 * model's token, so between tokens it waits for longer than their caller may take; elsewhere other
 * threads, PyTorch's say, may want the processor. */
const std::chrono::microseconds kPatience(100), kPatienceBetweenTokens(1000);
std::atomic<bool> another_token_comes{false};

/* What is left of a run of items: its first in the lower half, its end in the upper. */
class alignas(64) Left {
 public:
  void set(int64_t first, int64_t end) { run_.store(first | end << 32, std::memory_order_relaxed); }
  int64_t count() const {
    const int64_t run = run_.load(std::memory_order_relaxed);
    return (run >> 32) - (int32_t)run;
  }
  /* -1 where nothing is left. */
  int64_t take_first() {
    int64_t run = run_.load(std::memory_order_relaxed);
    while ((int32_t)run < run >> 32)
      if (run_.compare_exchange_weak(run, run + 1, std::memory_order_relaxed)) return (int32_t)run;
    return -1;
  }
  int64_t take_last() {
    int64_t run = run_.load(std::memory_order_relaxed);
    while ((int32_t)run < run >> 32)
      if (run_.compare_exchange_weak(run, run - ((int64_t)1 << 32), std::memory_order_relaxed))
        return (run >> 32) - 1;
    return -1;
  }

 private:
  std::atomic<int64_t> run_{0};
};

class Pool {
 public:
  explicit Pool(int count) : owner_(getpid()), left_(count) {
    for (int i = 1; i < count; i++) threads_.emplace_back([this, i] { work(i); });
  }

  ~Pool() {
    if (owner_ != getpid()) { /* threads do not survive a fork; there is nothing to join */
      for (auto &thread : threads_) thread.detach();
      return;
    }
    stop_ = true;
    announce();
    for (auto &thread : threads_) thread.join();
  }

  bool belongs_here() const { return owner_ == getpid(); }
  int count() const { return (int)threads_.size() + 1; }

  void run(int64_t items, Task task, void *context) {
    if (threads_.empty() || items <= 1) {
      for (int64_t i = 0; i < items; i++) task(context, i, 0);
      return;
    }
    task_ = task, context_ = context;
    for (int t = 0; t < count(); t++) left_[t].set(items * t / count(), items * (t + 1) / count());
    busy_.store((int)threads_.size(), std::memory_order_relaxed);
    announce();
    take_items(0);
    while (busy_.load(std::memory_order_acquire)) pause_cpu();
  }

 private:
  void announce() {
    round_.fetch_add(1, std::memory_order_seq_cst);
    if (asleep_.load(std::memory_order_seq_cst)) {
      std::lock_guard<std::mutex> guard(lock_);
      wake_.notify_all();
    }
  }

  /* First those of the thread's own run, in order: it reads on where it stopped in memory. Then the
   * last of whichever run is longest. */
  void take_items(int thread) {
    for (int64_t item; (item = left_[thread].take_first()) >= 0;) task_(context_, item, thread);
    for (;;) {
      Left *longest = &left_[0];
      for (auto &left : left_)
        if (left.count() > longest->count()) longest = &left;
      if (!longest->count()) return;
      if (int64_t item = longest->take_last(); item >= 0) task_(context_, item, thread);
    }
  }

  bool comes_soon(uint64_t seen) const {
    const bool patient = another_token_comes.load(std::memory_order_relaxed);
    const auto end = std::chrono::steady_clock::now() + (patient ? kPatienceBetweenTokens : kPatience);
    do {
      for (int i = 0; i < kSpins; i++) {
        if (round_.load(std::memory_order_acquire) != seen) return true;
        pause_cpu();
      }
    } while (std::chrono::steady_clock::now() < end);
    return false;
  }

  void work(int thread) {
    uint64_t seen = 0;
    for (;;) {
      if (!comes_soon(seen)) {
        std::unique_lock<std::mutex> guard(lock_);
        asleep_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(guard, [&] { return round_.load(std::memory_order_seq_cst) != seen; });
        asleep_.fetch_sub(1, std::memory_order_relaxed);
      }
      seen++;
      if (stop_) return;
      take_items(thread);
      busy_.fetch_sub(1, std::memory_order_release);
    }
  }

  const pid_t owner_;
  std::vector<std::thread> threads_;
  Task task_ = nullptr;
  void *context_ = nullptr;
  std::vector<Left> left_; /* of every thread's run */
  alignas(64) std::atomic<uint64_t> round_{0};
  alignas(64) std::atomic<int> busy_{0};
  std::atomic<int> asleep_{0};
  std::atomic<bool> stop_{false};
  std::mutex lock_;
  std::condition_variable wake_;
};

int processors() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
  unsigned count = std::thread::hardware_concurrency();
  return count ? (int)count : 1;
}

int wanted = 0; /* 0: one per processor */
Pool *pool = nullptr;

Pool &current_pool() {
  if (pool && !pool->belongs_here()) pool = nullptr; /* forked: leak the parent's, start anew */
  if (!pool) pool = new Pool(wanted ? wanted : processors());
  return *pool;
}

}  // namespace

std::mutex &engine_lock() {
  static std::mutex *lock = new std::mutex; /* never destroyed: threads may outlive main */
  return *lock;
}

int thread_count() { return pool ? pool->count() : wanted ? wanted : processors(); }

void set_thread_count(int count) {
  wanted = count > 0 ? count : 0;
  if (pool && pool->belongs_here()) delete pool;
  pool = nullptr;
}

void expect_another_token(bool yes) { another_token_comes.store(yes, std::memory_order_relaxed); }

void run_parallel(int64_t items, Task task, void *context) {
  current_pool().run(items, task, context);
}
