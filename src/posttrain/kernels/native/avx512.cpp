/* AVX-512 with VNNI: F, BW, DQ, VL and VNNI (Intel from Cascade Lake, AMD from Zen 4). */
#include "kernels.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "simd_avx512.h"
#include "product.h"

const Kernels *avx512_kernels() {
  static const Kernels kernels = kernels_named("avx512vnni");
  return &kernels;
}
#else
const Kernels *avx512_kernels() { return nullptr; }
#endif
