/* AVX512-BF16: vdpbf16ps adds two products of bfloat16 to a float, with a rounding of each addition to nearest.
 *
 * The instruction takes subnormal values for zero, in keys (below 1.2e-38) and in sums.
 */
#include "cpu_isa.h"
#ifdef KECORE_X86
#include <immintrin.h>

#include <cstdint>
#include <cstring>
KECORE_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")
#include "cpu_tile.h"

namespace kecore {
namespace {

struct Pairs {
    typedef uint32_t Scalar;
    typedef float Sum;
    typedef __m512 Vector;
    static constexpr int kLanes = 16;
    static constexpr int kRows = 8;
    static constexpr int kVectors = 3;
    static constexpr int64_t kSteps = 64;
    static Vector load(const uint32_t* at) { return _mm512_loadu_ps(at); }
    static Vector spread(const uint32_t* at) { return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(*at))); }
    static Vector step(Vector sum, Vector a, Vector b) {
        return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
    }
    static void add(float* at, Vector sum) { _mm512_store_ps(at, _mm512_add_ps(_mm512_load_ps(at), sum)); }
};

void pack_pairs(const Chunk& x, int64_t begin, int64_t end, int64_t padded, unsigned char* panels) {
    for (int64_t t = 0; t < padded; t += 2) {
        const uint16_t *first = half_row(x, t), *second = half_row(x, t + 1);
        for (int64_t c = begin; c < end; c += kWidth) {
            uint32_t* out = reinterpret_cast<uint32_t*>(panels) + (c - begin) * padded / 2 + t / 2 * kWidth;
            const int64_t n = end - c < kWidth ? end - c : kWidth;
            pair(first + c, second ? second + c : nullptr, n, kWidth, out);
        }
    }
}

template <class Out>
void add_pairs(
    const void* a, const void* b, int64_t padded, int64_t n_rows, int64_t cols, int64_t diagonal, Out* out,
    int64_t stride) {
    product<Pairs, true>(
        static_cast<const uint32_t*>(a), 1, kWidth, static_cast<const uint32_t*>(b), padded / 2, n_rows, cols, diagonal,
        out, stride);
}

} // namespace

const Format kAvx512Pairs = {kWidth, 2, kWidth * 2, pack_pairs, add_pairs<float>, add_pairs<double>};

} // namespace kecore
KECORE_TARGET_END
#endif
