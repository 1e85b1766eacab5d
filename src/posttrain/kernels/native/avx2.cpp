/* AVX2 with FMA and F16C (Intel from Haswell, AMD from Zen). */
#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && !defined(__AVX512F__)
#include "simd_avx2.h"
#include "product.h"

const Kernels *avx2_kernels() {
  static const Kernels kernels = kernels_named("avx2");
  return &kernels;
}
#else
const Kernels *avx2_kernels() { return nullptr; }
#endif
