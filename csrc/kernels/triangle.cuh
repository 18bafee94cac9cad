/* Numbering of the tiles of a lower triangle. */
#ifndef KE_TRIANGLE_CUH
#define KE_TRIANGLE_CUH

#include <math.h>

#include "device.cuh"

namespace kecore {

/* Blocks that run at one time should read few columns of the keys, so that these stay in the L2 cache: tiles are
 * numbered through squares of kSquare x kSquare, not along whole rows. */
constexpr int kSquare = 8;

struct TilePair {
    int row, column; /* row >= column */
};

/* Row by row: (0, 0), (1, 0), (1, 1), (2, 0) ... The root in float may be off by one either way. */
KE_INLINE TilePair triangle_of(int index) {
    int row = static_cast<int>((sqrtf(8.0f * static_cast<float>(index) + 1.0f) - 1.0f) * 0.5f);
    while (static_cast<int64_t>(row) * (row + 1) / 2 > index) --row;
    while (static_cast<int64_t>(row + 1) * (row + 2) / 2 <= index) ++row;
    return {row, static_cast<int>(index - static_cast<int64_t>(row) * (row + 1) / 2)};
}

/* Tile number `index` of a triangle with `tiles` tiles along a side. */
KE_INLINE TilePair tile_of(int index, int tiles) {
    const int top = triangle_of(index).row / kSquare * kSquare; /* both numberings end a row of squares at one index */
    const int height = tiles - top < kSquare ? tiles - top : kSquare;
    const int local = index - static_cast<int>(static_cast<int64_t>(top) * (top + 1) / 2);
    const int square = local / (height * kSquare);
    if (square < top / kSquare) {
        const int within = local - square * height * kSquare;
        return {top + within / kSquare, square * kSquare + within % kSquare};
    }
    const TilePair corner = triangle_of(local - top * height);
    return {top + corner.row, top + corner.column};
}

}  // namespace kecore

#endif /* KE_TRIANGLE_CUH */
