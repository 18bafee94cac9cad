/* The numbering of tiles and the layout of shared memory, exhaustively. */
#include "../../csrc/kernels/second_moment.cuh"
#include "check.h"

namespace {

/* Every tile of the triangle has one number, for every size up to d = 25,600 and for the largest that a call takes. */
void tiles() {
    for (int tiles = 1; tiles <= 200; ++tiles) {
        const int all = tiles * (tiles + 1) / 2;
        std::vector<char> seen(static_cast<size_t>(tiles * tiles));
        for (int index = 0; index < all; ++index) {
            const kecore::TilePair pair = kecore::tile_of(index, tiles);
            const bool inside = pair.column >= 0 && pair.column <= pair.row && pair.row < tiles;
            CHECK(inside, "tile %d of %d: (%d, %d)", index, tiles, pair.row, pair.column);
            if (inside) CHECK(++seen[static_cast<size_t>(pair.row * tiles + pair.column)] == 1, "tile %d twice", index);
        }
    }
}

/* Where a root in single precision is off, whole numbers put it right. */
void triangle() {
    int index = 0;
    for (int row = 0; row < 8192; ++row) {
        for (int column : {0, row / 2, row}) {
            const kecore::TilePair pair = kecore::triangle_of(index + column);
            CHECK(pair.row == row && pair.column == column, "(%d, %d) is (%d, %d)", row, column, pair.row, pair.column);
        }
        index += row + 1;
    }
}

/* Blocks that run together share columns of the keys: 64 of them touch 24 strips on average, where row by row they
 * would touch up to 65. */
void locality() {
    for (int tiles : {32, 112, 113}) {
        const int all = tiles * (tiles + 1) / 2, windows = all / 64;
        int64_t strips = 0;
        for (int window = 0; window < windows; ++window) {
            std::vector<char> touched(static_cast<size_t>(tiles));
            for (int index = window * 64; index < window * 64 + 64; ++index) {
                const kecore::TilePair pair = kecore::tile_of(index, tiles);
                touched[static_cast<size_t>(pair.row)] = touched[static_cast<size_t>(pair.column)] = 1;
            }
            strips += std::count(touched.begin(), touched.end(), 1);
        }
        CHECK(strips <= 24 * windows, "%d tiles: %lld strips in %d windows", tiles, (long long)strips, windows);
    }
}

/* Each chunk of 16 bytes has a place of its own. */
void places() {
    std::vector<char> seen(kecore::kBlockTokens * 16);
    for (int token = 0; token < kecore::kBlockTokens; ++token)
        for (int chunk = 0; chunk < 16; ++chunk) {
            const int offset = kecore::chunk_offset(token, chunk);
            const bool inside = offset % 16 == 0 && offset >= 0 && offset < kecore::kBlockTokens * kecore::kRowBytes;
            CHECK(inside, "token %d, chunk %d: %d", token, chunk, offset);
            if (inside) CHECK(++seen[static_cast<size_t>(offset / 16)] == 1, "offset %d twice", offset);
        }
}

/* Shared memory serves eight lanes of 16 bytes at once if they cover its 32 banks. */
bool covers_all_banks(const int (&offsets)[8]) {
    unsigned banks = 0;
    for (int offset : offsets) banks |= 15u << offset % 128 / 4;
    return banks == 0xffffffffu;
}

void banks() {
    int offsets[8];
    for (int chunk = 0; chunk < 16; ++chunk)
        for (int token = 0; token < kecore::kBlockTokens; token += 8) { /* as ldmatrix reads one 8 x 8 matrix */
            for (int i = 0; i < 8; ++i) offsets[i] = kecore::chunk_offset(token + i, chunk);
            CHECK(covers_all_banks(offsets), "reading chunk %d from token %d", chunk, token);
        }
    for (int token = 0; token < kecore::kBlockTokens; ++token)
        for (int chunk = 0; chunk < 16; chunk += 8) { /* as eight neighbouring threads write */
            for (int i = 0; i < 8; ++i) offsets[i] = kecore::chunk_offset(token, chunk + i);
            CHECK(covers_all_banks(offsets), "writing token %d from chunk %d", token, chunk);
        }
}

}  // namespace

int main(int argc, char** argv) {
    return test::main_of(argc, argv,
                         {{"tiles", tiles}, {"triangle", triangle}, {"locality", locality}, {"places", places},
                          {"banks", banks}});
}
