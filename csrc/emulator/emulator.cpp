#include "../kernels/device.cuh"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

#include <memory>
#include <vector>

namespace kecore {
namespace {

/* Where a fiber goes on. The compiler's own jumps, not the C library's: a sanitizer would take those apart each time,
 * which makes the tests ten times slower. */
using Place = void* [5];

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 256 * 1024;
constexpr unsigned char kGarbage = 0xcd;
constexpr int kMostCopies = 64; /* of one thread, under way at one time */

struct Copy {
    char* shared;
    const char* global;
    int bytes;
    int group;
};

enum class State { Ready, AtBarrier, AtWarp, Done };

struct Fiber {
    State state;
    ucontext_t start;
    Place place;
    bool started;
    std::unique_ptr<char[]> stack;
    Copy copies[kMostCopies];
    int n_copies;
    int group; /* number of the group that is being filled */
};

/* What the lanes of a warp give to a common instruction; a second set, since a lane may be at the next instruction
 * while others still read. */
struct Exchange {
    const char* address[kWarp];
    double a[16][16];
    double b_transposed[8][16];
};

struct Warp {
    Exchange exchange[2];
    int turn;
    int arrived;
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::unique_ptr<char[]> shared;
    int threads = 0;
    int64_t index = 0;
    int current = 0;
    const std::function<void()>* kernel = nullptr;
    Place scheduler;
    uint64_t random = 1;
};

Block block; /* blocks run one after the other */

[[noreturn]] void fail(const char* reason) {
    fprintf(stderr, "emulator: %s (block %lld, thread %d)\n", reason, static_cast<long long>(block.index),
            block.current);
    fflush(stderr);
    _Exit(3);
}

Fiber& self() { return block.fibers[static_cast<size_t>(block.current)]; }
Warp& warp() { return block.warps[static_cast<size_t>(block.current / kWarp)]; }
int lane() { return block.current % kWarp; }

/* noipa: a caller must not take it from this code which registers are kept; whoever runs meanwhile uses them all. */
#ifdef __clang__
#define KE_SWITCH __attribute__((noinline, no_sanitize("address")))
#else
#define KE_SWITCH __attribute__((noipa, no_sanitize("address")))
#endif

[[noreturn]] KE_SWITCH void jump(Place& place) { __builtin_longjmp(place, 1); }

/* Back to the scheduler, until it finds this fiber ready. */
KE_SWITCH void pause(State state) {
    Fiber& fiber = self();
    fiber.state = state;
    if (__builtin_setjmp(fiber.place) == 0) jump(block.scheduler);
}

KE_SWITCH void fiber_main() {
    (*block.kernel)();
    self().state = State::Done;
    jump(block.scheduler);
}

/* Where the current fiber stopped, or at its beginning. */
[[noreturn]] KE_SWITCH void enter() {
    Fiber& fiber = self();
    if (fiber.started) jump(fiber.place);
    fiber.started = true;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStackBytes;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, fiber_main, 0);
    setcontext(&fiber.start);
    abort(); /* setcontext does not return */
}

KE_SWITCH void resume(int thread) {
    block.current = thread;
    if (__builtin_setjmp(block.scheduler) == 0) enter();
}

#undef KE_SWITCH

/* Every lane of a warp as far as it comes without the other warps. */
void run_warp(int number) {
    const int begin = number * kWarp, end = begin + kWarp < block.threads ? begin + kWarp : block.threads;
    for (bool moved = true; moved;) {
        moved = false;
        for (int thread = begin; thread < end; ++thread)
            if (block.fibers[static_cast<size_t>(thread)].state == State::Ready) {
                resume(thread);
                moved = true;
            }
    }
}

/* Waits for the lanes of the warp, and gives what they all gave. */
const Exchange& meet() {
    Warp& mine = warp();
    const Exchange& given = mine.exchange[mine.turn];
    if (++mine.arrived < kWarp) {
        pause(State::AtWarp);
        return given;
    }
    mine.arrived = 0;
    mine.turn ^= 1;
    const int begin = block.current / kWarp * kWarp;
    for (int thread = begin; thread < begin + kWarp; ++thread) {
        Fiber& fiber = block.fibers[static_cast<size_t>(thread)];
        if (fiber.state == State::AtWarp) fiber.state = State::Ready;
    }
    return given;
}

Exchange& offer() { return warp().exchange[warp().turn]; }

/* Reads one 16-bit value of a pair. */
uint16_t half_of(uint32_t pair, int which) { return static_cast<uint16_t>(which == 0 ? pair : pair >> 16); }

/* To float, cut off towards zero. */
float cut(double value) {
    float rounded = static_cast<float>(value);
    if (isfinite(value) && fabs(static_cast<double>(rounded)) > fabs(value)) rounded = nextafterf(rounded, 0.0f);
    return rounded;
}

uint16_t round_to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (isnan(value)) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

bool misaligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 != 0; }

}  // namespace

namespace emulator {

void run_block(const std::function<void()>& kernel, int64_t index, int threads, size_t shared_bytes) {
    block.kernel = &kernel;
    block.index = index;
    block.threads = threads;
    if (block.fibers.size() < static_cast<size_t>(threads))
        block.fibers = std::vector<Fiber>(static_cast<size_t>(threads));
    block.warps.assign(static_cast<size_t>((threads + kWarp - 1) / kWarp), Warp());
    block.shared.reset(static_cast<char*>(::operator new[](shared_bytes))); /* of this size: a sanitizer sees its end */
    memset(block.shared.get(), kGarbage, shared_bytes);
    for (int i = 0; i < threads; ++i) {
        Fiber& fiber = block.fibers[static_cast<size_t>(i)];
        if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
        fiber.state = State::Ready;
        fiber.started = false;
        fiber.n_copies = fiber.group = 0;
    }
    const int n_warps = static_cast<int>(block.warps.size());
    for (;;) {
        block.random = block.random * 6364136223846793005u + 1442695040888963407u;
        const int first = static_cast<int>(block.random >> 33) % n_warps, way = block.random >> 63 ? 1 : n_warps - 1;
        for (int i = 0; i < n_warps; ++i) run_warp((first + i * way) % n_warps);
        int done = 0, waiting = 0;
        for (int i = 0; i < threads; ++i) {
            const State state = block.fibers[static_cast<size_t>(i)].state;
            done += state == State::Done;
            waiting += state == State::AtBarrier;
        }
        if (done == threads) break;
        if (waiting != threads) fail("threads wait for others that never come");
        for (int i = 0; i < threads; ++i) block.fibers[static_cast<size_t>(i)].state = State::Ready;
    }
}

void wait_until_pending(int groups) {
    Fiber& fiber = self();
    int left = 0;
    for (int i = 0; i < fiber.n_copies; ++i) {
        const Copy& copy = fiber.copies[i];
        if (copy.group >= fiber.group - groups) {
            fiber.copies[left++] = copy;
            continue;
        }
        memset(copy.shared, 0, 16);
        memcpy(copy.shared, copy.global, static_cast<size_t>(copy.bytes));
    }
    fiber.n_copies = left;
}

void multiply_add(float (*value)(uint16_t), float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    Exchange& mine = offer();
    const int row = lane() / 4, pair = lane() % 4 * 2;
    for (int i = 0; i < 8; ++i) { /* register i / 2 of a, the lower or the upper half */
        const double element = static_cast<double>(value(half_of(a[i / 2], i % 2)));
        mine.a[row + i / 2 % 2 * 8][pair + i % 2 + i / 4 * 8] = element;
    }
    for (int i = 0; i < 4; ++i)
        mine.b_transposed[row][pair + i % 2 + i / 2 * 8] = static_cast<double>(value(half_of(b[i / 2], i % 2)));
    const Exchange& all = meet();
    for (int i = 0; i < 4; ++i) {
        const double* left = all.a[row + i / 2 * 8];
        const double* right = all.b_transposed[pair + i % 2];
        double exact = static_cast<double>(sum[i]);
        for (int k = 0; k < 16; ++k) exact += left[k] * right[k];
        sum[i] = cut(exact);
    }
}

float bf16_value(uint16_t bits) { return bits_to_float(static_cast<uint32_t>(bits) << 16); }

float f16_value(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                       : exponent == 0 ? ldexpf(static_cast<float>(fraction), -24)
                                       : ldexpf(static_cast<float>(fraction + 1024), exponent - 25);
    return bits >> 15 ? -size : size;
}

}  // namespace emulator

int thread_index() { return block.current; }
int64_t block_index() { return block.index; }
void barrier() { pause(State::AtBarrier); }
void trap() { fail("trap"); }
char* shared_memory() { return block.shared.get(); }

void copy_async(void* shared, const void* global, int bytes) {
    Fiber& fiber = self();
    if (misaligned(shared) || misaligned(global)) fail("an asynchronous copy's address is not a multiple of 16");
    if (bytes < 0 || bytes > 16) fail("an asynchronous copy of more than 16 bytes, or of less than none");
    if (fiber.n_copies == kMostCopies) fail("too many asynchronous copies under way");
    memset(shared, kGarbage, 16);
    fiber.copies[fiber.n_copies++] = {static_cast<char*>(shared), static_cast<const char*>(global), bytes, fiber.group};
}

void commit_copies() { ++self().group; }

void load_transposed(uint32_t (&matrices)[4], const void* shared) {
    if (misaligned(shared)) fail("ldmatrix: an address is not a multiple of 16");
    offer().address[lane()] = static_cast<const char*>(shared);
    const Exchange& all = meet();
    for (int matrix = 0; matrix < 4; ++matrix) {
        uint16_t pair[2];
        for (int i = 0; i < 2; ++i)
            memcpy(&pair[i], all.address[matrix * 8 + lane() % 4 * 2 + i] + lane() / 4 * 2, sizeof pair[i]);
        matrices[matrix] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
    }
}

uint32_t pack_bf16(float low, float high) {
    return round_to_bf16(low) | static_cast<uint32_t>(round_to_bf16(high)) << 16;
}

}  // namespace kecore
