/* What an instruction set offers to the CPU kernels, and the choice between them at run time.
 *
 * One binary runs on every processor: each set is compiled in its own file under a target pragma, and reached
 * only through the table that cpu_isa() gives for this machine.
 */
#ifndef KECORE_CPU_ISA_H
#define KECORE_CPU_ISA_H

#include <cstdint>
#include <cstdlib>

namespace kecore {

/* Where chosen tokens of one layer stand: token t of a chunk is row `rows ? rows[t] : t` of `keys`. */
struct Chunk {
    const void* keys;
    int dtype;
    int64_t stride;
    const int64_t* rows;
    int64_t tokens;
    int64_t d;
};

/* How an instruction set wants a chunk of keys: panels of `width` columns, each holding all tokens of the chunk,
 * padded with zeros to whole columns and to whole steps. */
struct Format {
    int64_t width;
    int64_t tokens_a_step; /* tokens are padded to a multiple of this */
    int64_t bytes_a_token; /* of one panel */
    void (*pack)(const Chunk& chunk, int64_t begin, int64_t end, int64_t padded, unsigned char* panels);
    /* out[i][j] += sum over tokens of a[t][i] b[t][j] for i < rows, j < cols and j <= i + diagonal. Sums of one call
     * are single precision for float keys, double for double ones. */
    void (*add_f32)(
        const void* a, const void* b, int64_t padded, int64_t rows, int64_t cols, int64_t diagonal, float* out,
        int64_t stride);
    void (*add_f64)(
        const void* a, const void* b, int64_t padded, int64_t rows, int64_t cols, int64_t diagonal, double* out,
        int64_t stride);
};

/* Columns of a panel for everything but tiles: a multiple of every set's register block. */
constexpr int64_t kWidth = 48;
/* No entry is above the diagonal. */
constexpr int64_t kWhole = INT64_MAX / 2;

struct Isa {
    const char* name;
    const Format* single; /* any keys, as float */
    const Format* half;   /* bfloat16 keys as they are; null where they are best widened */
    const Format* twice;  /* float keys as double, summed in double */
    /* out[i][j] += sum over s of a[i * a_row + s * a_step] * b[s * kWidth + j], i < rows, j < cols <= kWidth. */
    void (*multiply)(
        const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t steps, int64_t rows, int64_t cols,
        double* out, int64_t stride);
    /* rhs [n, u] = system^-1 rhs by Cholesky; of `system` [n, n], which is overwritten, what is on or above the
     * diagonal is read. pivots: largest and smallest of the factor; the smallest is 0 if it breaks down. */
    void (*solve)(double* system, int64_t n, double* rhs, int64_t u, double* pivots);
};

/* Memory for packing, aligned to the longest vector; `bytes` is null if there is none. */
struct Memory {
    unsigned char* bytes;
    explicit Memory(int64_t size)
        : bytes(static_cast<unsigned char*>(std::aligned_alloc(64, static_cast<size_t>((size + 64) / 64 * 64)))) {}
    ~Memory() { std::free(bytes); }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
};

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

/* The best set of this machine; the environment variable KECORE_CPU_ISA caps it, for tests and comparisons. */
const Isa& cpu_isa();

extern const Isa kGeneric;
#if defined(__x86_64__) && defined(__GNUC__)
#define KECORE_X86 1
extern const Isa kAvx2;
extern const Isa kAvx512;
extern const Format kAvx512Pairs;
extern const Format kAmxTiles;
#endif

} // namespace kecore

#define KECORE_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define KECORE_TARGET_BEGIN(set) KECORE_PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define KECORE_TARGET_END KECORE_PRAGMA(clang attribute pop)
#else
#define KECORE_TARGET_BEGIN(set) KECORE_PRAGMA(GCC push_options) KECORE_PRAGMA(GCC target(set))
#define KECORE_TARGET_END KECORE_PRAGMA(GCC pop_options)
#endif

#endif
