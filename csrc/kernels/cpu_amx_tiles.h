/* The AMX instructions that the kernel needs, or their meaning in plain C++ (KECORE_EMULATE_AMX), with which the
 * kernel is tested on processors without AMX. */
#ifndef KECORE_CPU_AMX_TILES_H
#define KECORE_CPU_AMX_TILES_H

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace kecore {
namespace {

/* Eight tiles of 16 rows by 64 bytes, as ldtilecfg reads them. */
struct TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileShapes) == 64, "ldtilecfg reads 64 bytes");

#ifdef KECORE_EMULATE_AMX

thread_local uint32_t emulated[8][16][16];

inline float half_of(uint32_t word, int which) {
    const uint32_t bits = which ? word & 0xffff0000u : word << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline void emulated_product(int c, int a, int b) {
    for (int m = 0; m < 16; ++m)
        for (int k = 0; k < 16; ++k)
            for (int n = 0; n < 16; ++n) {
                float sum;
                std::memcpy(&sum, &emulated[c][m][n], 4);
                for (int half = 0; half < 2; ++half)
                    sum = std::fma(half_of(emulated[a][m][k], half), half_of(emulated[b][k][n], half), sum);
                std::memcpy(&emulated[c][m][n], &sum, 4);
            }
}

inline void emulated_load(int tile, const void* base, int64_t stride) {
    for (int r = 0; r < 16; ++r) std::memcpy(emulated[tile][r], static_cast<const char*>(base) + r * stride, 64);
}

inline void emulated_store(int tile, void* base, int64_t stride) {
    for (int r = 0; r < 16; ++r) std::memcpy(static_cast<char*>(base) + r * stride, emulated[tile][r], 64);
}

#define KECORE_TILE_SHAPES(shapes) ((void)(shapes))
#define KECORE_TILE_ZERO(tile) std::memset(emulated[tile], 0, sizeof emulated[tile])
#define KECORE_TILE_LOAD(tile, base, stride) emulated_load(tile, base, stride)
#define KECORE_TILE_STORE(tile, base, stride) emulated_store(tile, base, stride)
#define KECORE_TILE_PRODUCT(c, a, b) emulated_product(c, a, b)
#define KECORE_TILE_RELEASE() ((void)0)

#else

#define KECORE_TILE_SHAPES(shapes) _tile_loadconfig(shapes)
#define KECORE_TILE_ZERO(tile) _tile_zero(tile)
#define KECORE_TILE_LOAD(tile, base, stride) _tile_loadd(tile, base, stride)
#define KECORE_TILE_STORE(tile, base, stride) _tile_stored(tile, base, stride)
#define KECORE_TILE_PRODUCT(c, a, b) _tile_dpbf16ps(c, a, b)
#define KECORE_TILE_RELEASE() _tile_release()

#endif

} // namespace
} // namespace kecore

#endif
