#include "threads.h"

#include <pthread.h>
#include <sched.h>
#include <string.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
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

/* Of what it expects to read a waiting thread asks for a little at a time, and for more at first:
 * beyond some 8 KiB on their way, Zen 5 forgets what it is asked for. */
const int64_t kAskedAtFirst = 4096, kAskedAtOnce = 512;

class Asking {
 public:
  explicit Asking(const Expected &expected) : left_{expected.weight, expected.scales, expected.codes} {}

  void ask(int64_t bytes) {
    for (; at_ < 3; at_++) {
      Stretch &left = left_[at_];
      for (; left.bytes > 0 && bytes > 0; left.bytes -= 64, bytes -= 64) {
        __builtin_prefetch(left.from, 0, 2);
        left.from = (const uint8_t *)left.from + 64;
      }
      if (left.bytes > 0) return;
    }
  }

 private:
  Stretch left_[3];
  int at_ = 0;
};

/* A thread's items, and what it expects to read after them. */
class alignas(64) Run {
 public:
  Expected expected{};

  void set(int64_t first, int64_t end) { left_.store(first | end << 32, std::memory_order_relaxed); }
  int64_t count() const {
    const int64_t left = left_.load(std::memory_order_relaxed);
    return (left >> 32) - (int32_t)left;
  }
  /* -1 where nothing is left. */
  int64_t take_first() {
    int64_t left = left_.load(std::memory_order_relaxed);
    while ((int32_t)left < left >> 32)
      if (left_.compare_exchange_weak(left, left + 1, std::memory_order_relaxed)) return (int32_t)left;
    return -1;
  }
  int64_t take_last() {
    int64_t left = left_.load(std::memory_order_relaxed);
    while ((int32_t)left < left >> 32)
      if (left_.compare_exchange_weak(left, left - ((int64_t)1 << 32), std::memory_order_relaxed))
        return (left >> 32) - 1;
    return -1;
  }

 private:
  std::atomic<int64_t> left_{0}; /* the first in the lower half, the end in the upper */
};

class Pool {
 public:
  /* Throws std::system_error where the system gives no more threads. */
  explicit Pool(int count) : runs_(count) {
    try {
      for (int i = 1; i < count; i++) threads_.emplace_back([this, i] { work(i); });
    } catch (...) { /* there will be no ~Pool, and threads that run may not be dropped */
      stop();
      throw;
    }
  }

  ~Pool() { stop(); }

  int count() const { return (int)threads_.size() + 1; }
  void expect(int thread, const Expected &expected) { runs_[thread].expected = expected; }

  void run(int64_t items, Task task, const void *closure, int64_t closure_bytes) {
    if (threads_.empty() || items <= 1) {
      for (int64_t i = 0; i < items; i++) task(closure, i, 0);
      return;
    }
    job_.task = task, job_.closure = closure;
    if (closure_bytes && closure_bytes <= kClosureBytes) {
      memcpy(job_.copy, closure, closure_bytes);
      job_.closure = nullptr;
    }
    Asking asking(runs_[0].expected);
    for (int t = 0; t < count(); t++) runs_[t].set(first_item(items, t, count()), first_item(items, t + 1, count()));
    busy_.store((int)threads_.size(), std::memory_order_relaxed);
    announce();
    take_items(0);
    asking.ask(kAskedAtFirst);
    while (busy_.load(std::memory_order_acquire)) asking.ask(kAskedAtOnce), pause_cpu();
    for (auto &run : runs_) run.expected = {};
  }

 private:
  /* All that a thread has to know, in one line of a cache. */
  struct alignas(64) Job {
    std::atomic<uint64_t> round{0};
    Task task;
    const void *closure; /* NULL: `copy` */
    uint8_t copy[kClosureBytes];
  };

  void stop() {
    stop_ = true;
    announce();
    for (auto &thread : threads_) thread.join();
  }

  void announce() {
    job_.round.fetch_add(1, std::memory_order_seq_cst);
    if (asleep_.load(std::memory_order_seq_cst)) {
      std::lock_guard<std::mutex> guard(lock_);
      wake_.notify_all();
    }
  }

  /* First those of the thread's own run, in order: it reads on where it stopped in memory. Then the
   * last of whichever run is longest. */
  void take_items(int thread) {
    const void *closure = job_.closure ? job_.closure : job_.copy;
    for (int64_t item; (item = runs_[thread].take_first()) >= 0;) job_.task(closure, item, thread);
    for (;;) {
      Run *longest = &runs_[0];
      for (auto &run : runs_)
        if (run.count() > longest->count()) longest = &run;
      if (!longest->count()) return;
      if (int64_t item = longest->take_last(); item >= 0) job_.task(closure, item, thread);
    }
  }

  bool comes_soon(uint64_t seen, Asking &asking) const {
    const bool patient = another_token_comes.load(std::memory_order_relaxed);
    const auto end = std::chrono::steady_clock::now() + (patient ? kPatienceBetweenTokens : kPatience);
    do {
      for (int i = 0; i < kSpins; i++) {
        if (job_.round.load(std::memory_order_acquire) != seen) return true;
        asking.ask(kAskedAtOnce);
        pause_cpu();
      }
    } while (std::chrono::steady_clock::now() < end);
    return false;
  }

  void work(int thread) {
    Asking asking({});
    for (uint64_t seen = 0;;) {
      if (!comes_soon(seen, asking)) {
        std::unique_lock<std::mutex> guard(lock_);
        asleep_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(guard, [&] { return job_.round.load(std::memory_order_seq_cst) != seen; });
        asleep_.fetch_sub(1, std::memory_order_relaxed);
      }
      seen++;
      if (stop_) return;
      asking = Asking(runs_[thread].expected);
      take_items(thread);
      busy_.fetch_sub(1, std::memory_order_release);
      asking.ask(kAskedAtFirst);
    }
  }

  std::vector<std::thread> threads_;
  std::vector<Run> runs_;
  Job job_;
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
  if (!pool) pool = new Pool(wanted ? wanted : processors());
  return *pool;
}

}  // namespace

std::mutex &engine_lock() {
  /* A fork waits for what is being computed: in the child nobody would give the lock back. Threads do not
   * survive it either: the child leaks its parent's pool and starts anew. To ask for the process each time
   * instead would cost as much as small activations. */
  static std::mutex *lock = [] {
    pthread_atfork([] { engine_lock().lock(); }, [] { engine_lock().unlock(); },
                   [] { pool = nullptr, engine_lock().unlock(); });
    return new std::mutex; /* never destroyed: threads may outlive main */
  }();
  return *lock;
}

int thread_count() { return pool ? pool->count() : wanted ? wanted : processors(); }

void set_thread_count(int count) {
  wanted = count > 0 ? count : 0;
  delete pool;
  pool = nullptr;
}

void expect_another_token(bool yes) { another_token_comes.store(yes, std::memory_order_relaxed); }

void expect(int thread, const Expected &expected) { current_pool().expect(thread, expected); }

void run_parallel(int64_t items, Task task, const void *closure, int64_t closure_bytes) {
  current_pool().run(items, task, closure, closure_bytes);
}
