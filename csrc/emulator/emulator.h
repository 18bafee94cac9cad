/* The device functions of csrc/kernels/device.cuh on a CPU, for tests.
 *
 * Every CUDA thread of a block is a fiber. A barrier or a warp's common instruction lets the others run, in an order
 * that changes from barrier to barrier. Shared memory begins as garbage. Asynchronous copies happen only at the wait
 * that must have them; until then their destination is garbage, too. Tensor cores cut sums off towards zero.
 *
 * What it cannot show: races within a warp's step, the memory order of several multiprocessors, bank conflicts, speed.
 */
#ifndef KE_EMULATOR_H
#define KE_EMULATOR_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <functional>

#define KE_INLINE inline
#define KE_BOTH inline
#define KE_KERNEL(threads, blocks) inline void

namespace kecore {
namespace emulator {

/* Run one block of threads to its end. A program that a GPU would not run to its end (a barrier that some threads
 * never reach, a misaligned address, a trap) ends the process with a message. */
void run_block(const std::function<void()>& kernel, int64_t block, int threads, size_t shared_bytes);

void wait_until_pending(int groups);

/* sum += a b with the values of 16-bit floats given by `value`. */
void multiply_add(float (*value)(uint16_t), float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

float bf16_value(uint16_t bits);
float f16_value(uint16_t bits);

}  // namespace emulator

int thread_index();
int64_t block_index();
void barrier();
[[noreturn]] void trap();
char* shared_memory();
void copy_async(void* shared, const void* global, int bytes);
void commit_copies();
void load_transposed(uint32_t (&matrices)[4], const void* shared);
uint32_t pack_bf16(float low, float high);

template <int Pending>
void wait_copies() {
    emulator::wait_until_pending(Pending);
}

inline void multiply_add(Bf16, float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulator::multiply_add(emulator::bf16_value, sum, a, b);
}

inline void multiply_add(F16, float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulator::multiply_add(emulator::f16_value, sum, a, b);
}

inline float bits_to_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace kecore

#endif /* KE_EMULATOR_H */
