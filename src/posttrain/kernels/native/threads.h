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

/* Held by every public function that computes: the pool and the workspace serve one at a time. */
std::mutex &engine_lock();

int thread_count();
void expect_another_token(bool yes);
void set_thread_count(int count); /* at least 1; 0 is one per processor this process may use */

/* Calls task(context, item, thread) for every item in [0, items), thread in [0, thread_count()). */
typedef void (*Task)(void *context, int64_t item, int thread);
void run_parallel(int64_t items, Task task, void *context);

template <class F>
void parallel_for(int64_t items, F f) {
  run_parallel(
      items, [](void *context, int64_t item, int thread) { (*(F *)context)(item, thread); }, &f);
}

#endif
