/* Runs tasks of uneven length on pools of 1 to 5 threads; exit status 1 where an item was not done
 * exactly once, or by a thread that the pool does not have. */
#include <atomic>
#include <cstdio>
#include <vector>

#include "threads.h"

int main() {
  for (int threads = 1; threads <= 5; threads++) {
    set_thread_count(threads);
    for (int64_t items : {0, 1, 2, 3, 5, 16, 63, 1000})
      for (int round = 0; round < 200; round++) {
        std::vector<std::atomic<int>> done(items);
        std::atomic<int> strangers{0};
        parallel_for(items, [&](int64_t item, int thread) {
          /* One end of the items is slow, so that the other's threads come for the rest. */
          volatile int64_t work = round % 2 ? item : items - item;
          while (work > 0) work = work - 1;
          done[item]++;
          if (thread < 0 || thread >= threads) strangers++;
        });
        for (auto &count : done)
          if (count != 1 || strangers) {
            printf("%d threads, %lld items: an item was done %d times\n", threads, (long long)items, (int)count);
            return 1;
          }
      }
  }
  return 0;
}
