/* One block solves one system: G = Y^T Y, G + ridge I = F F^T, weights. All sums in double, always in one order. */
#ifndef KE_GRAM_SOLVE_CUH
#define KE_GRAM_SOLVE_CUH

#include <math.h>

#include "device.cuh"
#include "kecore.h"
#include "triangle.cuh"

namespace kecore {

constexpr int kSolveThreads = 256;
constexpr int kPatch = 4;                /* a thread sums kPatch x kPatch elements of G */
constexpr int kFetch = 8;                /* values of Y that a thread brings at a time */
constexpr int kSolveColumns = 64;        /* of the right-hand side at a time */
constexpr int kSolveLines = kSolveThreads / kSolveColumns;
constexpr int kWorkDoubles = kSolveThreads * kPatch * kPatch; /* also enough for 64 x kSolveColumns, and for Y */

/* Of a matrix in shared memory: odd, so that a column lies on all banks. */
KE_BOTH int solve_stride(int n) { return n | 1; }

inline int solve_shared_bytes(int n) { return static_cast<int>(sizeof(double)) * (kWorkDoubles + n * solve_stride(n)); }

/* G [n, n] into `gram`, of row stride `stride`; `work` holds a part of Y, then every thread's sums. */
KE_INLINE void sum_gram(const float* white, int64_t d, int n, double* work, double* gram, int stride) {
    const int thread = thread_index();
    const int patches = (n + kPatch - 1) / kPatch, pairs = patches * (patches + 1) / 2, padded = patches * kPatch;
    const int slices = kSolveThreads / pairs; /* threads that share a patch, each with its own part of the rows */
    const int slice = thread / pairs;
    const TilePair patch = triangle_of(thread % pairs);
    const int lines = kSolveThreads * kFetch / padded; /* rows of Y that `work` takes at a time, zeros behind n */
    double sum[kPatch][kPatch] = {};
    float next[kFetch];

    auto fetch = [&](int64_t begin) {
#pragma unroll
        for (int i = 0; i < kFetch; ++i) {
            const int place = i * kSolveThreads + thread, line = place / padded, column = place % padded;
            const bool there = line < lines && begin + line < d && column < n;
            next[i] = there ? white[(begin + line) * n + column] : 0.0f;
        }
    };

    fetch(0);
    for (int64_t begin = 0; begin < d; begin += lines) {
        barrier(); /* everyone is done with the rows before */
#pragma unroll
        for (int i = 0; i < kFetch; ++i) work[i * kSolveThreads + thread] = static_cast<double>(next[i]);
        barrier();
        if (begin + lines < d) fetch(begin + lines);
        for (int line = slice; line < lines && slice < slices; line += slices) {
            const double* row = work + line * padded;
#pragma unroll
            for (int i = 0; i < kPatch; ++i)
#pragma unroll
                for (int j = 0; j < kPatch; ++j)
                    sum[i][j] += row[patch.row * kPatch + i] * row[patch.column * kPatch + j];
        }
    }
    barrier();
    for (int i = 0; i < kPatch * kPatch; ++i) work[i * kSolveThreads + thread] = sum[i / kPatch][i % kPatch];
    barrier();
    for (int place = thread; place < pairs * kPatch * kPatch; place += kSolveThreads) {
        const int pair = place % pairs, element = place / pairs;
        const TilePair target = triangle_of(pair);
        const int row = target.row * kPatch + element / kPatch, column = target.column * kPatch + element % kPatch;
        if (row >= n || column > row) continue;
        double all = 0.0;
        for (int i = 0; i < slices; ++i) all += work[element * kSolveThreads + i * pairs + pair];
        gram[row * stride + column] = all;
    }
    barrier();
}

/* F over the lower triangle of a symmetric matrix; false if it is not positive definite. `pivots`: the largest and
 * the smallest diagonal element of F. */
KE_INLINE bool factorise(double* matrix, int n, int stride, double (&pivots)[2]) {
    const int column = thread_index() % kSolveColumns, line = thread_index() / kSolveColumns;
    pivots[0] = 0.0;
    pivots[1] = n > 0 ? INFINITY : 0.0;
    for (int k = 0; k < n; ++k) { /* columns of F stay unscaled until the end, which saves a barrier each */
        const double pivot = matrix[k * stride + k];
        if (!(pivot > 0.0 && pivot < INFINITY)) {
            pivots[1] = 0.0;
            return false;
        }
        pivots[0] = fmax(pivots[0], sqrt(pivot));
        pivots[1] = fmin(pivots[1], sqrt(pivot));
        const int j = k + 1 + column;
        const double factor = j < n ? matrix[j * stride + k] / pivot : 0.0;
        for (int i = k + 1 + line; i < n; i += kSolveLines)
            if (j <= i) matrix[i * stride + j] -= matrix[i * stride + k] * factor;
        barrier();
    }
    for (int i = line; i < n; i += kSolveLines)
        if (column < i) matrix[i * stride + column] /= sqrt(matrix[column * stride + column]);
    barrier();
    for (int i = thread_index(); i < n; i += kSolveThreads) matrix[i * stride + i] = sqrt(matrix[i * stride + i]);
    barrier();
    return true;
}

/* Solve F F^T x = b for up to kSolveColumns columns: `b` [n, kSolveColumns] in place, each of its columns by
 * kSolveLines threads. */
KE_INLINE void substitute(const double* factor, int n, int stride, double* b) {
    const int column = thread_index() % kSolveColumns, line = thread_index() / kSolveColumns;
    double* x = b + column;
    for (int k = 0; k < n; ++k) { /* what is done with stays undivided until all have read it */
        const double value = x[k * kSolveColumns] / factor[k * stride + k];
        for (int i = k + 1 + line; i < n; i += kSolveLines) x[i * kSolveColumns] -= factor[i * stride + k] * value;
        barrier();
    }
    for (int i = line; i < n; i += kSolveLines) x[i * kSolveColumns] /= factor[i * stride + i];
    barrier();
    for (int k = n - 1; k >= 0; --k) {
        const double value = x[k * kSolveColumns] / factor[k * stride + k];
        for (int i = line; i < k; i += kSolveLines) x[i * kSolveColumns] -= factor[k * stride + i] * value;
        barrier();
    }
    for (int i = line; i < n; i += kSolveLines) x[i * kSolveColumns] /= factor[i * stride + i];
    barrier();
}

/* P's element: `shares` in its last c rows. */
KE_INLINE double right_side(const ke_gram_solve_args& a, int64_t system, int row, int64_t column) {
    const int64_t share = row - (a.n - a.c);
    if (share < 0) return 0.0;
    return a.shares == nullptr ? (share == column ? 1.0 : 0.0) : a.shares[(system * a.c + share) * a.u + column];
}

KE_KERNEL(kSolveThreads, 2) gram_solve(const ke_gram_solve_args a) {
    const int64_t system = block_index();
    const int n = static_cast<int>(a.n), stride = solve_stride(n), thread = thread_index();
    const int column = thread % kSolveColumns, line = thread / kSolveColumns;
    double* work = reinterpret_cast<double*>(shared_memory());
    double* matrix = work + kWorkDoubles;

    sum_gram(a.white + system * a.d * n, a.d, n, work, matrix, stride);
    double* gram = a.gram + system * n * n;
    for (int i = line; i < n; i += kSolveLines)
        if (column < n) gram[i * n + column] = i < column ? matrix[column * stride + i] : matrix[i * stride + column];
    barrier(); /* G has been read */
    for (int i = thread; i < n; i += kSolveThreads) matrix[i * stride + i] += a.ridge[system];
    barrier();

    double pivots[2];
    const bool definite = factorise(matrix, n, stride, pivots);
    if (thread < 2) a.pivots[system * 2 + thread] = thread == 0 ? pivots[0] : pivots[1];
    double* weights = a.weights + system * n * a.u;
    for (int64_t begin = 0; begin < a.u; begin += kSolveColumns) {
        const bool inside = begin + column < a.u;
        for (int i = line; i < n; i += kSolveLines)
            work[i * kSolveColumns + column] = inside ? right_side(a, system, i, begin + column) : 0.0;
        barrier();
        if (definite) substitute(matrix, n, stride, work);
        for (int i = line; i < n; i += kSolveLines)
            if (inside) weights[i * a.u + begin + column] = definite ? work[i * kSolveColumns + column] : NAN;
    }
}

}  // namespace kecore

#endif /* KE_GRAM_SOLVE_CUH */
