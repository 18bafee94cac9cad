/* Register-blocked products and packing, for an instruction set that the including file has switched on.
 *
 * Everything has internal linkage: the same template compiled for two sets must not be merged by the linker.
 */
#ifndef KECORE_CPU_TILE_H
#define KECORE_CPU_TILE_H

#include <cstdint>
#include <cstring>

#include "cpu_isa.h"
#include "kecore.h"

namespace kecore {
namespace {

constexpr int64_t kLongest = 16; // lanes of the longest vector

/* Multiply-add of T in vectors of W, blocks of Mr rows by Nv vectors. */
template <class T, int W, int Mr, int Nv>
struct Plain {
    typedef T Scalar;
    typedef T Sum;
    typedef T Vector __attribute__((vector_size(W * sizeof(T)), aligned(alignof(T)), may_alias));
    static constexpr int kLanes = W;
    static constexpr int kRows = Mr;
    static constexpr int kVectors = Nv;
    static constexpr int64_t kSteps = 128;
    static Vector load(const T* at) { return *reinterpret_cast<const Vector*>(at); }
    static Vector spread(const T* at) { return *at - Vector{}; }
    static Vector step(Vector sum, Vector a, Vector b) { return sum + a * b; }
    static void add(T* at, Vector sum) { *reinterpret_cast<Vector*>(at) += sum; }
};

/* sums[r][v] += a row's elements times vectors of b, summed over the steps in registers. */
template <class K, int R, int V>
inline void tile(
    const typename K::Scalar* a, int64_t a_row, int64_t a_step, const typename K::Scalar* b, int64_t steps,
    typename K::Sum* sums) {
    typename K::Vector sum[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[r][v] = typename K::Vector{};
    for (int64_t s = 0; s < steps; ++s) {
        typename K::Vector bs[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) bs[v] = K::load(b + v * K::kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const typename K::Vector as = K::spread(a + r * a_row);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) sum[r][v] = K::step(sum[r][v], as, bs[v]);
        }
        a += a_step;
        b += kWidth;
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) K::add(sums + r * kWidth + v * K::kLanes, sum[r][v]);
}

/* R rows of a panel's product, in tiles as wide as the columns that are left ask for. */
template <class K, int R>
inline void tiles(
    const typename K::Scalar* a, int64_t a_row, int64_t a_step, const typename K::Scalar* b, int64_t steps,
    int64_t cols, typename K::Sum* sums) {
    for (int64_t c = 0; c < cols; c += K::kVectors * K::kLanes) {
        if (cols - c <= K::kLanes)
            tile<K, R, 1>(a, a_row, a_step, b + c, steps, sums + c);
        else if (K::kVectors > 2 && cols - c <= 2 * K::kLanes)
            tile<K, R, 2>(a, a_row, a_step, b + c, steps, sums + c);
        else
            tile<K, R, K::kVectors>(a, a_row, a_step, b + c, steps, sums + c);
    }
}

/* out += sums, on and below the diagonal. */
template <class Sum, class Out>
inline void flush(
    const Sum* sums, int64_t width, int64_t rows, int64_t cols, int64_t diagonal, Out* out, int64_t stride) {
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t end = cols <= diagonal + r ? cols : diagonal + r + 1;
        for (int64_t c = 0; c < end; ++c) out[r * stride + c] += static_cast<Out>(sums[r * width + c]);
    }
}

/* What is added to stands far away, and is wanted only when the products are done. */
template <class Out>
inline void fetch(const Out* out, int64_t rows, int64_t cols, int64_t stride) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < cols; c += static_cast<int64_t>(64 / sizeof(Out)))
            __builtin_prefetch(out + r * stride + c, 1, 2);
}

/* out[i][j] += a's rows times b's columns for at most kWidth of each. `whole`: elements of a past its rows may be
 * read, up to a whole block of rows.
 *
 * Sums are kept in registers for a few steps only, then added to a second set in the first-level cache: the rounding
 * errors of a sum grow with the square root of its length. */
template <class K, bool whole, class Out>
void product(
    const typename K::Scalar* a, int64_t a_row, int64_t a_step, const typename K::Scalar* b, int64_t steps,
    int64_t rows, int64_t cols, int64_t diagonal, Out* out, int64_t stride) {
    alignas(64) typename K::Sum sums[kWidth * kWidth];
    fetch(out, rows, cols, stride);
    const int64_t reach = whole ? (rows + K::kRows - 1) / K::kRows * K::kRows : rows;
    std::memset(sums, 0, static_cast<size_t>(reach * kWidth) * sizeof sums[0]);
    for (int64_t s = 0; s < steps; s += K::kSteps) {
        const int64_t n = steps - s < K::kSteps ? steps - s : K::kSteps;
        const typename K::Scalar *as = a + s * a_step, *bs = b + s * kWidth;
        int64_t r = 0;
        for (; r + K::kRows <= reach; r += K::kRows) {
            const int64_t last = diagonal + r + K::kRows; // columns at or before the diagonal of the last row
            tiles<K, K::kRows>(as + r * a_row, a_row, a_step, bs, n, cols < last ? cols : last, sums + r * kWidth);
        }
        for (; r < reach; ++r) {
            const int64_t last = diagonal + r + 1;
            tiles<K, 1>(as + r * a_row, a_row, a_step, bs, n, cols < last ? cols : last, sums + r * kWidth);
        }
    }
    flush(sums, kWidth, rows, cols, diagonal, out, stride);
}

inline float widen(uint16_t bits, bool bfloat) {
    uint32_t word = static_cast<uint32_t>(bits) << 16;
    if (!bfloat) {
        const uint32_t magnitude = (bits & 0x7fffu) << 13, sign = word & 0x80000000u;
        constexpr uint32_t kBias = 112u << 23, kSmallest = 113u << 23;
        float small, smallest;
        const uint32_t shifted = magnitude + kSmallest;
        std::memcpy(&small, &shifted, 4);
        std::memcpy(&smallest, &kSmallest, 4);
        small -= smallest; // a subnormal half is a normal float
        uint32_t tiny;
        std::memcpy(&tiny, &small, 4);
        const uint32_t normal = magnitude + kBias, special = magnitude | 0x7f800000u;
        word = sign | (magnitude < (1u << 23) ? tiny : magnitude >= (31u << 23) ? special : normal);
    }
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}

template <class T>
inline void convert(const void* row, int dtype, int64_t n, T* out) {
    if (dtype == KE_F32)
        for (int64_t c = 0; c < n; ++c) out[c] = static_cast<const float*>(row)[c];
    else if (dtype == KE_BF16)
        for (int64_t c = 0; c < n; ++c) out[c] = widen(static_cast<const uint16_t*>(row)[c], true);
    else
        for (int64_t c = 0; c < n; ++c) out[c] = widen(static_cast<const uint16_t*>(row)[c], false);
}

/* Zeros from column n up to where a vector that holds column n - 1 may end; all of the panel where n is 0. */
template <class T>
inline void zero(T* row, int64_t n, int64_t width) {
    const int64_t end = n ? (n + kLongest - 1) / kLongest * kLongest : width;
    std::memset(row + n, 0, static_cast<size_t>((end < width ? end : width) - n) * sizeof(T));
}

/* Columns [begin, end) of a chunk into panels, one element a token. */
template <class T>
void pack_plain(const Chunk& x, int64_t begin, int64_t end, int64_t padded, unsigned char* panels) {
    const int64_t size = x.dtype == KE_F32 ? 4 : 2;
    for (int64_t t = 0; t < padded; ++t) {
        const unsigned char* row = nullptr;
        if (t < x.tokens) row = static_cast<const unsigned char*>(x.keys) + (x.rows ? x.rows[t] : t) * x.stride * size;
        for (int64_t c = begin; c < end; c += kWidth) {
            T* out = reinterpret_cast<T*>(panels) + (c - begin) * padded + t * kWidth;
            const int64_t n = !row ? 0 : end - c < kWidth ? end - c : kWidth;
            if (n) convert(row + c * size, x.dtype, n, out);
            zero(out, n, kWidth);
        }
    }
}

/* Two bfloat16 tokens to a word, the first in the lower half: `out[c]` for c < width. */
inline void pair(const uint16_t* first, const uint16_t* second, int64_t n, int64_t width, uint32_t* out) {
    if (second)
        for (int64_t c = 0; c < n; ++c) out[c] = first[c] | static_cast<uint32_t>(second[c]) << 16;
    else
        for (int64_t c = 0; c < n; ++c) out[c] = first[c];
    zero(out, n, width);
}

inline const uint16_t* half_row(const Chunk& x, int64_t t) {
    if (t >= x.tokens) return nullptr;
    return static_cast<const uint16_t*>(x.keys) + (x.rows ? x.rows[t] : t) * x.stride;
}

template <class K, class Out>
void add_plain(
    const void* a, const void* b, int64_t padded, int64_t n_rows, int64_t cols, int64_t diagonal, Out* out,
    int64_t stride) {
    typedef typename K::Scalar T;
    product<K, true>(
        static_cast<const T*>(a), 1, kWidth, static_cast<const T*>(b), padded, n_rows, cols, diagonal, out, stride);
}

template <class K>
void multiply(
    const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t steps, int64_t n_rows, int64_t cols,
    double* out, int64_t stride) {
    product<K, false>(a, a_row, a_step, b, steps, n_rows, cols, kWhole, out, stride);
}

/* F F^T = system by columns, then rhs = system^-1 rhs; `system` [n, n] is overwritten by F^T, and only what is on or
 * above its diagonal is read. Rows are what the inner loops run over, so that they are vectors. */
inline void solve(double* system, int64_t n, double* rhs, int64_t u, double* pivots) {
    pivots[0] = pivots[1] = 0;
    for (int64_t k = 0; k < n; ++k) {
        double* row = system + k * n;
        const double pivot = __builtin_sqrt(row[k]);
        if (!(pivot > 0)) {
            pivots[1] = 0;
            return;
        }
        pivots[0] = pivot > pivots[0] ? pivot : pivots[0];
        pivots[1] = k == 0 || pivot < pivots[1] ? pivot : pivots[1];
        row[k] = pivot;
        for (int64_t j = k + 1; j < n; ++j) row[j] /= pivot;
        for (int64_t i = k + 1; i < n; ++i) {
            const double factor = row[i];
            for (int64_t j = i; j < n; ++j) system[i * n + j] -= factor * row[j];
        }
    }
    for (int64_t k = 0; k < n; ++k) {
        const double* row = system + k * n;
        for (int64_t c = 0; c < u; ++c) rhs[k * u + c] /= row[k];
        for (int64_t i = k + 1; i < n; ++i)
            for (int64_t c = 0; c < u; ++c) rhs[i * u + c] -= row[i] * rhs[k * u + c];
    }
    for (int64_t k = n - 1; k >= 0; --k) {
        const double* row = system + k * n;
        for (int64_t i = k + 1; i < n; ++i)
            for (int64_t c = 0; c < u; ++c) rhs[k * u + c] -= row[i] * rhs[i * u + c];
        for (int64_t c = 0; c < u; ++c) rhs[k * u + c] /= row[k];
    }
}

template <class Single, class Twice>
struct Plains {
    static constexpr Format kSingle = {
        kWidth, 1, kWidth * 4, pack_plain<float>, add_plain<Single, float>, add_plain<Single, double>};
    static constexpr Format kTwice = {kWidth, 1, kWidth * 8, pack_plain<double>, nullptr, add_plain<Twice, double>};
};

} // namespace
} // namespace kecore

#endif
