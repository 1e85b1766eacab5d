/* The machine's own limits, measured with the instructions the products use. */
#include <atomic>
#include <chrono>

#include "dispatch.h"
#include "linear.h"
#include "posttrain.h"
#include "threads.h"

namespace {

double now() {
  using clock = std::chrono::steady_clock;
  return std::chrono::duration<double>(clock::now().time_since_epoch()).count();
}

std::atomic<int32_t> sink{0};

}  // namespace

double pt_probe_bandwidth(const void *memory, int64_t bytes) {
  const int64_t block = 1 << 20, blocks = bytes / block;
  double most = 0;
  guarded([&] {
    const Kernels &kernels = active_kernels();
    /* Which is faster depends on the processor: half the bytes each. */
    for (int streams = 1; streams <= 2; streams++) {
      const int64_t first = streams == 1 ? 0 : blocks / 2, last = streams == 1 ? blocks / 2 : blocks;
      const double start = now();
      parallel_for(last - first, [&](int64_t i, int) {
        sink += kernels.read_bytes((const uint8_t *)memory + (first + i) * block, block, streams);
      });
      const double rate = (last - first) * block / (now() - start);
      most = rate > most ? rate : most;
    }
  });
  return most;
}

double pt_probe_peak(double seconds) {
  const int64_t rounds = 20000, operations = rounds * 16 * kVector * 2;
  double rate = 0;
  guarded([&] {
    const Kernels &kernels = active_kernels();
    std::atomic<int64_t> done{0};
    const double start = now();
    parallel_for(thread_count(), [&](int64_t, int) {
      do {
        sink += kernels.multiply_registers(rounds);
        done += operations;
      } while (now() - start < seconds);
    });
    rate = done / (now() - start);
  });
  return rate;
}
