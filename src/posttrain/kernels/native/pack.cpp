/* Packing into the layout of layout.h, and memory on large pages. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <list>
#include <mutex>

#include "layout.h"
#include "posttrain.h"

namespace {

#include "scalar.h"

/* Adds the bits of step `s` (64 codes, one per byte) to the planes of a unit. */
void add_step(const uint8_t *codes, int s, int bits, uint8_t *unit) {
  if (bits == 8) {
    memcpy(unit + s * kVector, codes, kVector);
    return;
  }
  int shift = 0; /* of the next plane within a code: planes go from wide and low to narrow and high */
  for (int width = 4; width; width /= 2) {
    if (!(bits & width)) continue;
    int per = 8 / width; /* steps that share a vector of this plane */
    uint8_t *vector = unit + s / per * kVector;
    for (int64_t i = 0; i < kVector; i++)
      vector[i] |= (uint8_t)((codes[i] >> shift & ((1 << width) - 1)) << s % per * width);
    unit += kUnit / kStep / per * kVector;
    shift += width;
  }
}

/* The inverse of add_step. */
void take_step(const uint8_t *unit, int s, int bits, uint8_t *codes) {
  if (bits == 8) {
    memcpy(codes, unit + s * kVector, kVector);
    return;
  }
  memset(codes, 0, kVector);
  int shift = 0;
  for (int width = 4; width; width /= 2) {
    if (!(bits & width)) continue;
    int per = 8 / width;
    const uint8_t *vector = unit + s / per * kVector;
    for (int64_t i = 0; i < kVector; i++)
      codes[i] |= (uint8_t)((vector[i] >> s % per * width & ((1 << width) - 1)) << shift);
    unit += kUnit / kStep / per * kVector;
    shift += width;
  }
}

}  // namespace

int64_t pt_code_bytes(int32_t rows, int32_t cols, int32_t bits) {
  return panels_of(rows) * panel_bytes(cols, bits);
}

int64_t pt_scale_count(int32_t rows, int32_t cols, int32_t group) {
  return panels_of(rows) * kPanel * (group >= cols ? 1 : ceil_div(cols, group));
}

int32_t pt_pack_codes(const uint8_t *codes, int32_t rows, int32_t cols, int32_t bits,
                      uint8_t *packed) {
  if (rows < 1 || cols < 1 || bits < 2 || bits > 8) return PT_BAD_SHAPE;
  memset(packed, 0, pt_code_bytes(rows, cols, bits));
  for (int64_t p = 0; p < panels_of(rows); p++)
    for (int64_t u = 0; u < units_of(cols); u++, packed += unit_bytes(bits))
      for (int s = 0; s < kUnit / kStep; s++) {
        uint8_t step[kVector] = {};
        for (int64_t r = 0; r < kPanel && p * kPanel + r < rows; r++)
          for (int64_t j = 0; j < kStep; j++) {
            int64_t col = u * kUnit + s * kStep + j;
            if (col < cols) step[r * kStep + j] = codes[(p * kPanel + r) * cols + col];
          }
        add_step(step, s, bits, packed);
      }
  return PT_OK;
}

int32_t pt_unpack_codes(const uint8_t *packed, int32_t rows, int32_t cols, int32_t bits,
                        uint8_t *codes) {
  if (rows < 1 || cols < 1 || bits < 2 || bits > 8) return PT_BAD_SHAPE;
  for (int64_t p = 0; p < panels_of(rows); p++)
    for (int64_t u = 0; u < units_of(cols); u++, packed += unit_bytes(bits))
      for (int s = 0; s < kUnit / kStep; s++) {
        uint8_t step[kVector];
        take_step(packed, s, bits, step);
        for (int64_t r = 0; r < kPanel && p * kPanel + r < rows; r++)
          for (int64_t j = 0; j < kStep; j++) {
            int64_t col = u * kUnit + s * kStep + j;
            if (col < cols) codes[(p * kPanel + r) * cols + col] = step[r * kStep + j];
          }
      }
  return PT_OK;
}

int32_t pt_unpack_rows(const uint8_t *packed, int32_t rows, int32_t cols, int32_t bits,
                       const int64_t *index, int64_t count, uint8_t *codes) {
  if (rows < 1 || cols < 1 || bits < 2 || bits > 8) return PT_BAD_SHAPE;
  for (int64_t i = 0; i < count; i++) {
    if (index[i] < 0 || index[i] >= rows) return PT_BAD_SHAPE;
    const uint8_t *panel = packed + index[i] / kPanel * panel_bytes(cols, bits);
    for (int64_t k = 0; k < cols; k++)
      codes[i * cols + k] = (uint8_t)code_at(panel, bits, index[i] % kPanel, k);
  }
  return PT_OK;
}

int32_t pt_pack_floats(const void *values, int32_t rows, int32_t cols, int32_t bits, void *packed) {
  if (rows < 1 || cols < 1 || (bits != 16 && bits != 32)) return PT_BAD_SHAPE;
  const int64_t size = bits / 8;
  const char *in = (const char *)values;
  char *out = (char *)packed;
  memset(out, 0, pt_code_bytes(rows, cols, bits));
  for (int64_t row = 0; row < rows; row++)
    for (int64_t col = 0; col < cols; col++) {
      int64_t at = row / kPanel * panel_bytes(cols, bits) + (col * kPanel + row % kPanel) * size;
      memcpy(out + at, in + (row * cols + col) * size, size);
    }
  return PT_OK;
}

int32_t pt_pack_scales(const void *scales, int32_t rows, int32_t groups, int32_t size, void *packed) {
  if (rows < 1 || groups < 1 || (size != 1 && size != 2 && size != 4)) return PT_BAD_SHAPE;
  const char *in = (const char *)scales;
  char *out = (char *)packed;
  memset(out, 0, panels_of(rows) * kPanel * groups * size);
  for (int64_t row = 0; row < rows; row++)
    for (int64_t g = 0; g < groups; g++) {
      int64_t at = (row / kPanel * groups + g) * kPanel + row % kPanel;
      memcpy(out + at * size, in + (row * groups + g) * size, size);
    }
  return PT_OK;
}

namespace {

const int64_t kSmallPage = 1 << 16, kLargePage = 2 << 20; /* pages of 4 to 64 KiB, and of 2 MiB */
const int64_t kRegion = 16 * kLargePage;

/* Memory for weights, one after the other in regions of large pages: alone, most would be too small
 * for one. A region is given back when nothing in it is in use. */
class Regions {
 public:
  void *allocate(int64_t bytes) {
    bytes = ceil_div(bytes, kVector) * kVector;
    std::lock_guard<std::mutex> guard(lock_);
    if (bytes > kRegion / 2) return start(bytes, bytes);
    if (!open_ || open_->size - open_->used < bytes) {
      if (!start(kRegion, 0)) return nullptr;
      open_ = &regions_.back();
    }
    open_->live++;
    open_->used += bytes;
    return open_->base + open_->used - bytes;
  }

  void lock() { lock_.lock(); }
  void unlock() { lock_.unlock(); }

  void release(const void *memory) {
    std::lock_guard<std::mutex> guard(lock_);
    for (auto region = regions_.begin(); region != regions_.end(); ++region) {
      if (memory < region->base || memory >= region->base + region->size) continue;
      if (--region->live) return;
      if (open_ == &*region) open_ = nullptr;
      munmap(region->base, region->size);
      regions_.erase(region);
      return;
    }
  }

 private:
  struct Region {
    char *base;
    int64_t size, used, live;
  };

  /* Not by malloc, which would keep what is given back. */
  void *start(int64_t size, int64_t used) {
    size = ceil_div(size, kSmallPage) * kSmallPage;
    const int64_t whole = size + kLargePage; /* some of it starts a large page */
    void *got = mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (got == MAP_FAILED) return nullptr;
    const int64_t skipped = (kLargePage - (intptr_t)got % kLargePage) % kLargePage;
    char *base = (char *)got + skipped;
    if (skipped) munmap(got, skipped);
    if (whole - skipped > size) munmap(base + size, whole - skipped - size);
#ifdef MADV_HUGEPAGE
    madvise(base, size / kLargePage * kLargePage, MADV_HUGEPAGE);
#endif
    regions_.push_back({base, size, used, used > 0});
    return base;
  }

  std::mutex lock_;
  std::list<Region> regions_;
  Region *open_ = nullptr; /* the one that is being filled */
};

Regions &regions() {
  static Regions *all = [] { /* in the child of a fork nobody would give back what another thread holds */
    pthread_atfork([] { regions().lock(); }, [] { regions().unlock(); }, [] { regions().unlock(); });
    return new Regions; /* never destroyed: weights may outlive main */
  }();
  return *all;
}

}  // namespace

#if defined(PT_SANITIZED) /* every weight apart, so that reading beyond one is seen */
void *pt_allocate(int64_t bytes) {
  void *memory = nullptr;
  return bytes <= 0 || posix_memalign(&memory, kVector, bytes) ? nullptr : memory;
}
void pt_free(void *memory) { free(memory); }
#else
void *pt_allocate(int64_t bytes) { return bytes <= 0 ? nullptr : regions().allocate(bytes); }
void pt_free(void *memory) { regions().release(memory); }
#endif
