/* AVX2 with the VNNI instruction on 256 bits (Intel's client processors from Alder Lake, AMD from Zen 5). */
#include "kernels.h"

#if defined(__AVXVNNI__) && defined(__FMA__) && defined(__F16C__) && !defined(__AVX512F__)
#include "simd_avx2.h"
#include "product.h"

const Kernels *avxvnni_kernels() {
  static const Kernels kernels = kernels_named("avxvnni");
  return &kernels;
}
#else
const Kernels *avxvnni_kernels() { return nullptr; }
#endif
