/* A pool of threads that stay awake between the products of a step.
 *
 * A decode step is some hundred products of a few microseconds each; waking a sleeping thread costs
 * more than one of them. Workers therefore spin for a while after each task before they sleep: a
 * tenth of a millisecond, or a whole one where another token is to come.
 */
#ifndef POSTTRAIN_THREADS_H
#define POSTTRAIN_THREADS_H

#include <stdint.h>

#include <mutex>
#include <type_traits>

/* Held by every public function that computes: the pool and the workspace serve one at a time. */
std::mutex &engine_lock();

int thread_count();
/* Where the run of a thread begins, the items of a parallel_for being divided among all. */
static inline int64_t first_item(int64_t items, int thread, int threads) { return items * thread / threads; }
void expect_another_token(bool yes);
void set_thread_count(int count); /* at least 1; 0 is one per processor this process may run on */

/* Memory that a thread will read first in the parallel_for after the next. It asks for it while it waits
 * for the others and for more to do, so that memory is not idle then. */
struct Stretch {
  const void *from;
  int64_t bytes;
};
struct Expected {
  Stretch weight, scales, codes;
};
void expect(int thread, const Expected &expected);

/* Calls task(closure, item, thread) for every item in [0, items), thread in [0, thread_count()).
 * Closures up to kClosureBytes are copied to where threads look for work: fetching them from the
 * memory of the thread that wrote them takes as long as a small product. Throws std::system_error where the
 * threads cannot be started. */
const int64_t kClosureBytes = 40;
typedef void (*Task)(const void *closure, int64_t item, int thread);
void run_parallel(int64_t items, Task task, const void *closure, int64_t closure_bytes);

template <class F>
void parallel_for(int64_t items, const F &f) {
  const Task task = [](const void *closure, int64_t item, int thread) { (*(const F *)closure)(item, thread); };
  run_parallel(items, task, &f, std::is_trivially_copyable_v<F> ? sizeof f : 0);
}

#endif
