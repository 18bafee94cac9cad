/* L^-1 X and L^-T X for many columns X, reading half of the square that a general product reads.
 *
 * Columns of all systems are packed into panels. A thread takes a strip of the result and walks along the factor's
 * rows (or columns, transposed) from where they begin to the diagonal.
 */
#include <algorithm>
#include <atomic>
#include <cstring>

#include "cpu_isa.h"
#include "cpu_team.h"
#include "kecore.h"

namespace kecore {
namespace {

constexpr int64_t kGroup = 3;  // panels of X that one pass over the factor serves
constexpr int64_t kSteps = 256; // of the factor's rows or columns between two additions in double
constexpr int64_t kSquare = kWidth * kWidth;

struct FactorProduct {
    const ke_factor_product_args& args;
    const Isa& isa;
    int64_t first; // column of this pass; columns count through all systems
    int64_t count;
    int64_t side;  // rows of a strip, a multiple of kWidth
    float* panels; // [panel][d][kWidth]

    int64_t n_panels() const { return (count + kWidth - 1) / kWidth; }
    int64_t strips() const { return (args.d + side - 1) / side; }
    int64_t width(int64_t panel) const { return std::min(kWidth, count - panel * kWidth); }

    /* Where row 0 of a column stands in X or in the result. */
    int64_t place(int64_t column) const {
        return (first + column) / args.n * args.d * args.n + (first + column) % args.n;
    }

    void pack(int64_t item) const {
        const int64_t end = std::min((item + 1) * side, args.d);
        for (int64_t panel = 0; panel < n_panels(); ++panel)
            for (int64_t c = 0; c < kWidth; ++c) {
                float* out = panels + panel * args.d * kWidth + c;
                const float* in = c < width(panel) ? args.x + place(panel * kWidth + c) : nullptr;
                for (int64_t k = item * side; k < end; ++k) out[k * kWidth] = in ? in[k * args.n] : 0;
            }
    }

    /* Rows [begin, begin + rows) of the result: + factor's steps [from, to) times X. */
    void add(int64_t begin, int64_t rows, int64_t from, int64_t to, double* sums) const {
        const int64_t stride = args.factor_stride;
        const float* at = args.transposed ? args.factor + from * stride + begin : args.factor + begin * stride + from;
        for (int64_t panel = 0; panel < n_panels(); ++panel)
            isa.multiply(
                at, args.transposed ? 1 : stride, args.transposed ? stride : 1,
                panels + (panel * args.d + from) * kWidth, to - from, rows, width(panel), sums + panel * kSquare,
                kWidth);
    }

    /* The square on the diagonal, of which half is no part of the factor. */
    void add_diagonal(int64_t begin, int64_t rows, double* sums) const {
        float square[kSquare] = {};
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j <= i; ++j) {
                const float value = args.factor[(begin + i) * args.factor_stride + begin + j];
                square[args.transposed ? j * kWidth + i : i * kWidth + j] = value;
            }
        for (int64_t panel = 0; panel < n_panels(); ++panel)
            isa.multiply(
                square, kWidth, 1, panels + (panel * args.d + begin) * kWidth, rows, rows, width(panel),
                sums + panel * kSquare, kWidth);
    }

    /* One strip; those with the longest way to the diagonal come first, so that threads finish together. */
    void strip(int64_t item, double* sums) const {
        const int64_t d = args.d, begin = (args.transposed ? item : strips() - 1 - item) * side;
        const int64_t end = std::min(begin + side, d), square = n_panels() * kSquare;
        std::memset(sums, 0, static_cast<size_t>((side / kWidth) * square) * sizeof(double));
        const int64_t from = args.transposed ? end : 0, to = args.transposed ? d : begin;
        for (int64_t s = from; s < to; s += kSteps)
            for (int64_t r = begin; r < end; r += kWidth)
                add(r, std::min(kWidth, end - r), s, std::min(s + kSteps, to), sums + (r - begin) / kWidth * square);
        for (int64_t r = begin; r < end; r += kWidth) {
            const int64_t rows = std::min(kWidth, end - r);
            double* own = sums + (r - begin) / kWidth * square;
            if (args.transposed)
                add(r, rows, r + rows, end, own);
            else
                add(r, rows, begin, r, own);
            add_diagonal(r, rows, own);
            write(r, rows, own);
        }
    }

    void write(int64_t begin, int64_t rows, const double* sums) const {
        for (int64_t c = 0; c < count; ++c) {
            float* out = args.out + place(c) + begin * args.n;
            const double* in = sums + c / kWidth * kSquare + c % kWidth;
            for (int64_t r = 0; r < rows; ++r) out[r * args.n] = static_cast<float>(in[r * kWidth]);
        }
    }
};

int check(const ke_factor_product_args* args) {
    if (!args || args->batch < 0 || args->d < 0 || args->n < 0 || args->factor_stride < args->d) return KE_BAD_ARGUMENT;
    const bool empty = !args->batch || !args->d || !args->n;
    if (!empty && (!args->factor || !args->x || !args->out || args->out == args->x)) return KE_BAD_ARGUMENT;
    return KE_OK;
}

} // namespace
} // namespace kecore

extern "C" int ke_factor_product_cpu(const ke_factor_product_args* args, int threads) {
    using namespace kecore;
    if (const int status = check(args)) return status;
    const int64_t d = args->d, columns = args->batch * args->n;
    if (!d || !columns) return KE_OK;
    const Memory panels(std::min(kGroup, (columns + kWidth - 1) / kWidth) * d * kWidth * 4);
    if (!panels.bytes) return KE_NO_MEMORY;
    if (d * d * columns < (1 << 20)) threads = 1;  // about what starting a thread costs
    std::atomic<bool> no_memory{false};
    const int64_t side = d / 192 < 4 * std::max(threads, 2) ? kWidth : 4 * kWidth;
    for (int64_t first = 0; first < columns; first += kGroup * kWidth) {
        const int64_t count = std::min(kGroup * kWidth, columns - first);
        const FactorProduct pass{*args, cpu_isa(), first, count, side, reinterpret_cast<float*>(panels.bytes)};
        share(threads, pass.strips(), [&](Items& items) {
            for (int64_t item; items.take(&item);) pass.pack(item);
        });
        share(threads, pass.strips(), [&](Items& items) {
            const Memory sums(side / kWidth * pass.n_panels() * kSquare * static_cast<int64_t>(sizeof(double)));
            if (!sums.bytes) no_memory = true;
            for (int64_t item; !no_memory && items.take(&item);)
                pass.strip(item, reinterpret_cast<double*>(sums.bytes));
        });
        if (no_memory) return KE_NO_MEMORY;
    }
    return KE_OK;
}
