/* The n x n heart of the key-value solve: Gram matrix, Cholesky factor and weights of each system, in double. */
#include <algorithm>
#include <atomic>
#include <cstring>

#include "arguments.h"
#include "cpu_isa.h"
#include "cpu_team.h"

namespace kecore {
namespace {

constexpr int64_t kChunk = 512; // rows of Y that are packed at a time

/* Lower triangle of Y^T Y. */
void add_gram(const Isa& isa, const float* white, int64_t d, int64_t n, unsigned char* panels, double* gram) {
    const Format& format = *isa.twice;
    for (int64_t begin = 0; begin < d; begin += kChunk) {
        const int64_t rows = std::min(kChunk, d - begin), panel = format.bytes_a_token * rows;
        const Chunk chunk{white + begin * n, KE_F32, n, nullptr, rows, n};
        format.pack(chunk, 0, n, rows, panels);
        for (int64_t i = 0; i < n; i += format.width)
            for (int64_t j = 0; j <= i; j += format.width)
                format.add_f64(
                    panels + i / format.width * panel, panels + j / format.width * panel, rows,
                    std::min(format.width, n - i), std::min(format.width, n - j), i == j ? 0 : kWhole, gram + i * n + j,
                    n);
    }
}

void solve_one(const Isa& isa, const ke_gram_solve_args& x, int64_t item, unsigned char* panels, double* system) {
    double* gram = x.gram + item * x.n * x.n;
    double* weights = x.weights + item * x.n * x.u;
    std::memset(gram, 0, static_cast<size_t>(x.n * x.n) * sizeof(double));
    add_gram(isa, x.white + item * x.d * x.n, x.d, x.n, panels, gram);
    for (int64_t i = 0; i < x.n; ++i)
        for (int64_t j = 0; j < i; ++j) gram[j * x.n + i] = gram[i * x.n + j];
    std::memcpy(system, gram, static_cast<size_t>(x.n * x.n) * sizeof(double));
    for (int64_t i = 0; i < x.n; ++i) system[i * x.n + i] += x.ridge[item];

    std::memset(weights, 0, static_cast<size_t>(x.n * x.u) * sizeof(double));
    double* last = weights + (x.n - x.c) * x.u;
    if (x.shares)
        std::memcpy(last, x.shares + item * x.c * x.u, static_cast<size_t>(x.c * x.u) * sizeof(double));
    else
        for (int64_t i = 0; i < x.c; ++i) last[i * x.u + i] = 1;
    isa.solve(system, x.n, weights, x.u, x.pivots + 2 * item);
}

} // namespace
} // namespace kecore

extern "C" int ke_gram_solve_cpu(const ke_gram_solve_args* args, int threads) {
    if (const int status = kecore::check_gram_solve(args)) return status;
    const ke_gram_solve_args& x = *args;
    const kecore::Isa& isa = kecore::cpu_isa();
    const int64_t rows = std::min(kecore::kChunk, x.d);
    const int64_t panels = kecore::round_up(x.n, isa.twice->width) / isa.twice->width * isa.twice->bytes_a_token * rows;
    std::atomic<bool> no_memory{false};
    if (x.batch * x.n * x.n * (x.d + x.n) < (1 << 20)) threads = 1;  // about what starting a thread costs
    kecore::share(threads, x.batch, [&](kecore::Items& items) {
        const kecore::Memory packed(panels), system(x.n * x.n * static_cast<int64_t>(sizeof(double)));
        if (!packed.bytes || !system.bytes) no_memory = true;
        for (int64_t item; !no_memory && items.take(&item);)
            kecore::solve_one(isa, x, item, packed.bytes, reinterpret_cast<double*>(system.bytes));
    });
    return no_memory ? KE_NO_MEMORY : KE_OK;
}
