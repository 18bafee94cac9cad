/* The C interface of kecore's kernels: no torch, no C++ types, so that CMake builds and tests them alone,
 * an emulator runs the CUDA source on a CPU, and the binding of any torch version is a thin layer over it.
 *
 * Every function returns KE_OK or an error code; none throws, allocates on a device, or waits for a stream.
 * Matrices are row-major with a stride in elements between rows; the stride within a row is one.
 */
#ifndef KECORE_H
#define KECORE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum ke_dtype { KE_F32 = 0, KE_F16 = 1, KE_BF16 = 2, KE_F64 = 3 };

enum ke_status {
    KE_OK = 0,
    KE_BAD_ARGUMENT = 1,    /* a null pointer, a negative size, a stride shorter than a row */
    KE_BAD_DTYPE = 2,       /* a type this function does not take */
    KE_TOO_LARGE = 3,       /* more layers or columns than one call takes */
    KE_NO_MEMORY = 4,       /* host memory for packing ran out */
    KE_NO_KERNEL = 5,       /* no code for this device in the binary */
    KE_OLD_DRIVER = 6,      /* the driver is older than the CUDA runtime built in */
    KE_CUDA_ERROR = 7       /* any other CUDA error: ke_cuda_message() */
};

/* What a status means, in words; never null. */
const char* ke_status_message(int status);

/* One layer's share of a second-moment accumulation: moment += sum over chosen tokens t of x_t x_t^T.
 * Only the lower triangle (row >= column) of `moment` is read or written. */
typedef struct {
    const void* keys;       /* [tokens, d], of the call's key type */
    int64_t key_stride;     /* elements between tokens, >= d */
    int64_t tokens;
    int64_t d;
    const int64_t* rows;    /* chosen tokens, each in [0, tokens); null for all. Device memory for CUDA */
    int64_t n_rows;         /* length of rows */
    const uint8_t* mask;    /* [tokens], zero leaves a token out; null for all. Not together with rows */
    void* moment;           /* [d, d], float or double */
    int64_t moment_stride;  /* elements between rows, >= d */
} ke_moment_layer;

#define KE_MAX_LAYERS 16    /* layers in one call */

/* Accumulate several layers. keys: KE_F32, KE_F16 or KE_BF16; moment: KE_F32 or KE_F64.
 * threads <= 0: all there are. */
int ke_second_moment_cpu(const ke_moment_layer* layers, int n_layers, int key_dtype, int moment_dtype, int threads);

/* The same on the current CUDA device, on `stream` (a cudaStream_t). */
int ke_second_moment_cuda(const ke_moment_layer* layers, int n_layers, int key_dtype, int moment_dtype, void* stream);

/* A batch of small symmetric systems, the n x n heart of the dual key-value solve. With Y = L^-1 K,
 * G = Y^T Y and S = G + ridge I = F F^T, per system:
 *     weights = S^-1 P,  where P [n, u] puts `shares` [c, u] in its last c rows and zero above.
 * All arithmetic in double. */
typedef struct {
    int64_t batch, d, n, c, u;
    const float* white;         /* Y: [batch, d, n], contiguous */
    const double* shares;       /* [batch, c, u], contiguous; null for the identity (c == u) */
    const double* ridge;        /* [batch] */
    double* gram;               /* out: G, [batch, n, n] */
    double* weights;            /* out: [batch, n, u] */
    double* pivots;             /* out: [batch, 2], largest and smallest diagonal of F; smallest is 0 if S is
                                   not positive definite, and weights are then undefined */
} ke_gram_solve_args;

#define KE_MAX_COLUMNS 64       /* n of one system that the CUDA kernel takes */

int ke_gram_solve_cpu(const ke_gram_solve_args* args, int threads);
int ke_gram_solve_cuda(const ke_gram_solve_args* args, void* stream);

/* The products with a cached triangular factor that stand before and after those systems, for a batch that shares it:
 *     out = L^-1 X, or L^-T X where `transposed`.
 * Products are summed in single precision over a few hundred rows, these sums in double. */
typedef struct {
    const float* factor;        /* L^-1: [d, d]; only its lower triangle is read */
    int64_t factor_stride;      /* elements between rows, >= d */
    const float* x;             /* [batch, d, n], contiguous */
    float* out;                 /* [batch, d, n], contiguous; not x */
    int64_t batch, d, n;
    int transposed;
} ke_factor_product_args;

int ke_factor_product_cpu(const ke_factor_product_args* args, int threads);

/* How the CPU functions get their threads: `run` calls work(context) n times, at the same time or one after the other,
 * and returns when all calls have. Null, as at the start: they start threads of their own. A program that has a pool
 * gives it here, lest the pool's idle threads, which may spin, compete with the new ones. */
typedef void (*ke_parallel)(int n, void (*work)(const void* context), const void* context);

void ke_set_parallel(ke_parallel run);

/* Which instruction set the CPU kernels run with here: "amx-bf16", "avx512-bf16", "avx512", "avx2", "generic". */
const char* ke_cpu_isa(void);

/* Text of the last CUDA error seen by this thread, "" if none. */
const char* ke_cuda_message(void);

#ifdef __cplusplus
}
#endif
#endif
