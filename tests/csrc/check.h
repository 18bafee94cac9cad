/* What the C++ tests share: random numbers, 16-bit floats, and a count of what went wrong. */
#ifndef KE_TEST_CHECK_H
#define KE_TEST_CHECK_H

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <vector>

#include "kecore.h"

namespace test {

inline int failures = 0;

/* Counts what does not hold; with KECORE_TEST_STOP in the environment, the first one ends the process. */
#define CHECK(condition, ...)                                               \
    do {                                                                    \
        if (!(condition) && ++test::failures <= 10) {                       \
            fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
            fprintf(stderr, __VA_ARGS__);                                   \
            fprintf(stderr, "\n");                                          \
            if (getenv("KECORE_TEST_STOP") != nullptr) _Exit(1);            \
        }                                                                   \
    } while (0)

/* The same numbers on every machine. */
struct Random {
    uint64_t state;
    explicit Random(uint64_t seed) : state(seed * 2 + 1) {}

    uint32_t bits() {
        state = state * 6364136223846793005u + 1442695040888963407u;
        return static_cast<uint32_t>(state >> 32) ^ static_cast<uint32_t>(state >> 59);
    }
    int64_t integer(int64_t low, int64_t high) { return low + bits() % (high - low + 1); } /* both included */
    double uniform() { return (bits() + 0.5) / 4294967296.0; }
    double normal() { return sqrt(-2.0 * log(uniform())) * cos(6.283185307179586 * uniform()); }

    template <class T>
    T one_of(std::initializer_list<T> values) {
        return values.begin()[integer(0, static_cast<int64_t>(values.size()) - 1)];
    }
};

inline uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float from_bf16(uint16_t half) {
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* For values of a size up to 65504; subnormal ones become zero. */
inline uint16_t to_f16(float value) {
    if (fabsf(value) < 6.103515625e-5f) return 0;
    int exponent;
    const float fraction = frexpf(fabsf(value), &exponent); /* 0.5 to 1 */
    const int scaled = static_cast<int>(nearbyintf(ldexpf(fraction, 11))); /* 1024 to 2048: may carry over */
    return static_cast<uint16_t>((value < 0 ? 0x8000 : 0) + ((exponent + 13) << 10) + scaled);
}

inline float from_f16(uint16_t bits) {
    const int exponent = bits >> 10 & 31;
    const float size = exponent == 0 ? ldexpf(static_cast<float>(bits & 1023), -24)
                                     : ldexpf(static_cast<float>((bits & 1023) + 1024), exponent - 25);
    return bits >> 15 ? -size : size;
}

/* Run the test that the command line names, or all; the process's status. */
struct Test {
    const char* name;
    void (*run)();
};

inline int main_of(int argc, char** argv, std::initializer_list<Test> tests) {
    int run = 0;
    for (const Test& test : tests)
        if (argc < 2 || strcmp(argv[1], test.name) == 0) test.run(), ++run;
    if (run == 0) fprintf(stderr, "no test of that name\n");
    if (failures > 0) fprintf(stderr, "%d checks failed\n", failures);
    return run == 0 ? 2 : failures > 0;
}

}  // namespace test

#endif
