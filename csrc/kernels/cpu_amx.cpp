/* AMX: tiles of 16 x 16 sums, 32 tokens of bfloat16 an instruction.
 *
 * A panel of 32 columns is kept twice: as pairs of tokens, row by row, which is how the right operand is read, and
 * cut into 16 x 16 words that are transposed, which is how the left operand is.
 */
#include "cpu_isa.h"
#ifdef KECORE_X86
#include "cpu_amx_tiles.h"
#ifdef KECORE_EMULATE_AMX
KECORE_TARGET_BEGIN("avx2")
#else
KECORE_TARGET_BEGIN("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq")
#endif
#include "cpu_tile.h"

namespace kecore {
namespace {

constexpr int64_t kTile = 16;
constexpr int64_t kPanel = 2 * kTile;
constexpr int64_t kPairs = 256; // that are summed in the tiles

void pack_tiles(const Chunk& x, int64_t begin, int64_t end, int64_t padded, unsigned char* panels) {
    const int64_t pairs = padded / 2, half = pairs * kPanel;
    for (int64_t c = begin; c < end; c += kPanel) {
        uint32_t* right = reinterpret_cast<uint32_t*>(panels) + (c - begin) / kPanel * 2 * half;
        uint32_t* left = right + half;
        const int64_t n = end - c < kPanel ? end - c : kPanel;
        for (int64_t p = 0; p < pairs; ++p) {
            const uint16_t *first = half_row(x, 2 * p), *second = half_row(x, 2 * p + 1);
            pair(first ? first + c : nullptr, second ? second + c : nullptr, first ? n : 0, kPanel, right + p * kPanel);
        }
        for (int64_t column = 0; column < 2; ++column)
            for (int64_t p = 0; p < pairs; p += kTile)
                for (int64_t i = 0; i < kTile; ++i)
                    for (int64_t k = 0; k < kTile; ++k)
                        left[(column * pairs + p + i) * kTile + k] = right[(p + k) * kPanel + column * kTile + i];
    }
}

/* Products over the pairs of tokens from `p` to `end`. */
inline void tile_sums(const uint32_t* left, const uint32_t* right, int64_t pairs, int64_t p, int64_t end, float* sums) {
    KECORE_TILE_ZERO(0);
    KECORE_TILE_ZERO(1);
    KECORE_TILE_ZERO(2);
    KECORE_TILE_ZERO(3);
    for (; p < end; p += kTile) {
        KECORE_TILE_LOAD(4, left + p * kTile, 64);
        KECORE_TILE_LOAD(6, right + p * kPanel, kPanel * 4);
        KECORE_TILE_LOAD(7, right + p * kPanel + kTile, kPanel * 4);
        KECORE_TILE_PRODUCT(0, 4, 6);
        KECORE_TILE_PRODUCT(1, 4, 7);
        KECORE_TILE_LOAD(5, left + (pairs + p) * kTile, 64);
        KECORE_TILE_PRODUCT(2, 5, 6);
        KECORE_TILE_PRODUCT(3, 5, 7);
    }
    KECORE_TILE_STORE(0, sums, kPanel * 4);
    KECORE_TILE_STORE(1, sums + kTile, kPanel * 4);
    KECORE_TILE_STORE(2, sums + kTile * kPanel, kPanel * 4);
    KECORE_TILE_STORE(3, sums + kTile * kPanel + kTile, kPanel * 4);
}

template <class Out>
void add_tiles(
    const void* a, const void* b, int64_t padded, int64_t rows, int64_t cols, int64_t diagonal, Out* out,
    int64_t stride) {
    fetch(out, rows, cols, stride);
    const int64_t pairs = padded / 2;
    const uint32_t* left = static_cast<const uint32_t*>(a) + pairs * kPanel;
    const uint32_t* right = static_cast<const uint32_t*>(b);
    const TileShapes shapes;
    alignas(64) float sums[kPanel * kPanel];
    KECORE_TILE_SHAPES(&shapes);
    for (int64_t p = 0; p < pairs; p += kPairs) {
        tile_sums(left, right, pairs, p, p + kPairs < pairs ? p + kPairs : pairs, sums);
        flush(sums, kPanel, rows, cols, diagonal, out, stride);
    }
    KECORE_TILE_RELEASE();
}

} // namespace

const Format kAmxTiles = {kPanel, kPanel, 2 * kPanel * 2, pack_tiles, add_tiles<float>, add_tiles<double>};

} // namespace kecore
KECORE_TARGET_END
#endif
