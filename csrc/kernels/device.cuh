/* All that the CUDA kernels ask of the hardware: every PTX instruction and every builtin, once.
 *
 * nvcc compiles what stands here; with KE_EMULATED a host compiler takes the functions of the same names from
 * csrc/emulator, so that the very same kernels run, and are tested, on a CPU.
 */
#ifndef KE_DEVICE_CUH
#define KE_DEVICE_CUH

#include <stdint.h>

namespace kecore {
/* Types of keys, for choosing an instruction. */
struct Bf16 {};
struct F16 {};
struct F32 {};
}  // namespace kecore

#ifdef KE_EMULATED

#include "../emulator/emulator.h"

#else

#define KE_INLINE __device__ __forceinline__
#define KE_BOTH __host__ __device__ __forceinline__
/* A kernel of so many threads a block, of which so many blocks fit one multiprocessor's registers. */
#define KE_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)

namespace kecore {

KE_INLINE int thread_index() { return static_cast<int>(threadIdx.x); }
KE_INLINE int64_t block_index() { return blockIdx.x; }
KE_INLINE void barrier() { __syncthreads(); }
KE_INLINE void trap() { __trap(); }

/* The block's dynamic shared memory. */
KE_INLINE char* shared_memory() {
    extern __shared__ __align__(128) char ke_shared[];
    return ke_shared;
}

KE_INLINE uint32_t shared_address(const void* shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

/* Begin to copy `bytes` (0 to 16) from global to shared memory and to fill up to 16 with zeros. Both addresses are
 * multiples of 16; with 0 bytes nothing is read. */
KE_INLINE void copy_async(void* shared, const void* global, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
                 : "memory");
}

/* End a group of this thread's copies. */
KE_INLINE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/* Wait until at most `Pending` of this thread's latest groups are under way. */
template <int Pending>
KE_INLINE void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

/* Four transposed 8x8 matrices of 16-bit values: lane l gives the address of row l % 8 of matrix l / 8, and gets from
 * each the values of column l / 4 in rows 2 (l % 4) and the next. */
KE_INLINE void load_transposed(uint32_t (&matrices)[4], const void* shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(shared_address(shared))
                 : "memory");
}

#define KE_MMA(type)                                                                                    \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                 \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                 \
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

/* sum [16, 8] += a [16, 16] b [16, 8], in the instruction's layout of fragments. */
KE_INLINE void multiply_add(Bf16, float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { KE_MMA("bf16"); }
KE_INLINE void multiply_add(F16, float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { KE_MMA("f16"); }

#undef KE_MMA

/* Two values rounded to bfloat16, `low` in the lower half. */
KE_INLINE uint32_t pack_bf16(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

KE_INLINE float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }

}  // namespace kecore

#endif /* KE_EMULATED */

#endif /* KE_DEVICE_CUH */
