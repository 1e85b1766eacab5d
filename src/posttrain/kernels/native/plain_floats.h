/* How codes become floats where neither tables of floats nor many vectors fit into registers: for all
 * instruction sets but AVX-512, whose vectors have their own (simd_avx512.h). */
namespace {

static const bool kManyRegisters = false; /* for weights of several panels decoded side by side */
static const int kFastTables = 0; /* up to how many bits looking up is faster than arithmetic */

template <int Bits, int J>
INLINE I32 index_of(Bytes b) { return byte_of<J>(b); }
template <int Shift>
INLINE Bytes index_nibbles(Bytes b) { return field<Shift, 4>(b); }
static const float kByteBias = 0.0f;
template <int J>
INLINE F32 biased_byte(Bytes b) { return to_f32(byte_of<J>(b)); }

}  // namespace
