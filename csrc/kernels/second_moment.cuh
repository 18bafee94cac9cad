/* Lower triangle of sum_t x_t x_t^T on tensor cores. docs/design/ has the reasons and the arithmetic.
 *
 * One block owns one 128 x 128 tile of one layer's moment, so nothing is added in a varying order. Keys stay
 * [token, d] as they come: a tile of the product is A^T B with A and B columns of the keys, and ldmatrix.trans reads
 * either operand out of the same layout.
 *
 * Tensor cores cut each sum of 16 products off where they add it to a float, always towards zero. So `sum` goes to
 * `total`, whose additions round, after a few hundred tokens, and `total` to global memory before it grows long.
 */
#ifndef KE_SECOND_MOMENT_CUH
#define KE_SECOND_MOMENT_CUH

#include "device.cuh"
#include "kecore.h"
#include "triangle.cuh"

namespace kecore {

constexpr int kTile = 128;              /* rows and columns of a block's tile */
constexpr int kMomentThreads = 256;    /* 8 warps, 2 x 4, of 64 x 32 */
constexpr int kRowBytes = kTile * 2;    /* of one token's 16-bit values in shared memory */
constexpr int kStep = 16;               /* tokens of one tensor-core product */
constexpr int kFlushTokens = 32768;    /* sums in float before they are added to global memory */

constexpr int kStages = 4;              /* copies under way, in stages of kBlockTokens, for aligned 16-bit keys */
constexpr int kBlockTokens = 32;
constexpr int kStageBytes = 2 * kBlockTokens * kRowBytes;

struct MomentJob {
    const void* keys;
    int64_t key_stride;
    const int64_t* rows;
    const uint8_t* mask;
    void* moment;
    int64_t moment_stride;
    int tokens;                        /* in `keys` */
    int count;                         /* to go over: `rows`, or all */
    int d;
    int tiles;                         /* along one side */
    int end;                           /* first block that is not this layer's */
};

struct MomentLaunch {
    MomentJob job[KE_MAX_LAYERS];
    int wide_moment;                   /* double instead of float */
};

/* Bytes from a tile's first token to 16-byte chunk `chunk` of token `token`: rows of 8 tokens lie on different banks,
 * both when a thread writes a chunk and when ldmatrix reads 8 tokens of one chunk. */
KE_INLINE int chunk_offset(int token, int chunk) { return token * kRowBytes + ((chunk ^ (token & 7)) << 4); }

/* Which key the t-th token to go over has, in two parts: what is loaded a stage ahead, and what follows from it. */
KE_INLINE int64_t look_up(const MomentJob& job, int t) {
    if (t >= job.count) return 0;
    if (job.rows != nullptr) return job.rows[t];
    return job.mask == nullptr ? 1 : job.mask[t];
}

/* -1 for no key. */
KE_INLINE int chosen_row(const MomentJob& job, int t, int64_t looked_up) {
    if (t >= job.count) return -1;
    if (job.rows == nullptr) return looked_up != 0 ? t : -1;
    if (looked_up < 0 || looked_up >= job.tokens) trap();
    return static_cast<int>(looked_up);
}

/* A thread's part of the tile, and how it grows. */
template <class Key>
struct MomentTile {
    float sum[4][4][4];
    float total[4][4][4];
    int row_offset, column_offset;     /* of what this lane gives load_transposed; further chunks by exclusive or */

    KE_INLINE static int warp_row() { return thread_index() / 32 % 2 * 64; }
    KE_INLINE static int warp_column() { return thread_index() / 64 * 32; }

    KE_INLINE MomentTile() {
        const int lane = thread_index() % 32, matrix = lane / 8, line = lane % 8;
        row_offset = chunk_offset(matrix / 2 * 8 + line, warp_row() / 8 + matrix % 2);
        column_offset = chunk_offset(matrix % 2 * 8 + line, warp_column() / 8 + matrix / 2);
#pragma unroll
        for (int i = 0; i < 64; ++i) sum[i / 16][i / 4 % 4][i % 4] = total[i / 16][i / 4 % 4][i % 4] = 0.0f;
    }

    /* Add kStep tokens that lie at `a` (for the rows) and `b` (for the columns), each as `Planes` planes that add up
     * to the keys. Products of planes whose numbers add up to Planes or more are too small to count. */
    template <int Planes>
    KE_INLINE void add(const char* a, const char* b, int plane_bytes) {
#pragma unroll 1 /* unrolled, three planes take more registers than there are */
        for (int q = 0; q < Planes; ++q) {
            uint32_t columns[4][2];
#pragma unroll
            for (int n = 0; n < 4; n += 2) {
                uint32_t four[4];
                load_transposed(four, b + q * plane_bytes + (column_offset ^ n * 16));
                columns[n][0] = four[0], columns[n][1] = four[1];
                columns[n + 1][0] = four[2], columns[n + 1][1] = four[3];
            }
#pragma unroll 1
            for (int p = 0; p + q < Planes; ++p)
#pragma unroll
                for (int m = 0; m < 4; ++m) {
                    uint32_t rows[4];
                    load_transposed(rows, a + p * plane_bytes + (row_offset ^ m * 32));
#pragma unroll
                    for (int n = 0; n < 4; ++n) multiply_add(Key(), sum[m][n], rows, columns[n]);
                }
        }
    }

    KE_INLINE void promote() {
#pragma unroll
        for (int i = 0; i < 64; ++i) {
            total[i / 16][i / 4 % 4][i % 4] += sum[i / 16][i / 4 % 4][i % 4];
            sum[i / 16][i / 4 % 4][i % 4] = 0.0f;
        }
    }

    template <class Moment>
    KE_INLINE void flush_to(const MomentJob& job, int first_row, int first_column) {
        Moment* moment = static_cast<Moment*>(job.moment);
        const int lane = thread_index() % 32;
        const int column = first_column + warp_column() + lane % 4 * 2;
#pragma unroll
        for (int line = 0; line < 8; ++line) {
            const int row = first_row + warp_row() + lane / 4 + line * 8;
            if (row >= job.d) continue;
            Moment* place = moment + row * job.moment_stride + column;
#pragma unroll
            for (int n = 0; n < 4; n += 2) { /* four loads under way at once: registers allow no more */
                Moment old[4];
#pragma unroll
                for (int add = 0; add < 2; ++add)
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int right = (n + i / 2) * 8 + i % 2;
                        if (column + right > row) continue;
                        const float sum_of_this = total[line / 2][n + i / 2][line % 2 * 2 + i % 2];
                        if (add == 0)
                            old[i] = place[right];
                        else
                            place[right] = old[i] + static_cast<Moment>(sum_of_this);
                    }
            }
        }
#pragma unroll
        for (int i = 0; i < 64; ++i) total[i / 16][i / 4 % 4][i % 4] = 0.0f;
    }

    /* Add what has been summed to the moment, below and on the diagonal. */
    KE_INLINE void flush(const MomentJob& job, int first_row, int first_column, int wide) {
        if (wide)
            flush_to<double>(job, first_row, first_column);
        else
            flush_to<float>(job, first_row, first_column);
    }
};

/* Which layer and tile this block owns. */
struct MomentPlace {
    int layer, first_row, first_column;

    KE_INLINE explicit MomentPlace(const MomentLaunch& launch) {
        int block = static_cast<int>(block_index()), begin = 0;
        for (layer = 0; block >= launch.job[layer].end; ++layer) begin = launch.job[layer].end;
        const TilePair tile = tile_of(block - begin, launch.job[layer].tiles);
        first_row = tile.row * kTile;
        first_column = tile.column * kTile;
    }
};

/* 16-bit keys that begin on 16 bytes, with a stride of a multiple of 16 bytes. */
template <class Key>
KE_KERNEL(kMomentThreads, 1) second_moment_aligned(const MomentLaunch launch) {
    constexpr int kPromoteBlocks = 512 / kBlockTokens;
    const MomentPlace place(launch);
    const MomentJob& job = launch.job[place.layer];
    const int first_row = place.first_row, first_column = place.first_column;
    const bool diagonal = first_row == first_column;
    char* shared = shared_memory();
    MomentTile<Key> tile;

    /* This thread copies one chunk of two tokens a stage, for the rows and for the columns. */
    const int token = thread_index() / 16, chunk = thread_index() % 16;
    const int row_left = 2 * (job.d - (first_row + chunk * 8)), column_left = 2 * (job.d - (first_column + chunk * 8));
    const int row_bytes = row_left > 16 ? 16 : row_left > 0 ? row_left : 0;
    const int column_bytes = column_left > 16 ? 16 : column_left > 0 ? column_left : 0;
    const char* keys = static_cast<const char*>(job.keys);
    int64_t next[2] = {look_up(job, token), look_up(job, token + 16)};

    auto copy_block = [&](int block) {
        char* stage = shared + block % kStages * kStageBytes;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int t = block * kBlockTokens + token + 16 * i;
            const int64_t key = chosen_row(job, t, next[i]);
            const char* source = keys + (key < 0 ? 0 : key) * job.key_stride * 2 + chunk * 16;
            const int rows = key < 0 ? 0 : row_bytes, columns = key < 0 ? 0 : column_bytes;
            char* target = stage + chunk_offset(token + 16 * i, chunk);
            copy_async(target, rows > 0 ? source + first_row * 2 : keys, rows);
            if (!diagonal)
                copy_async(target + kStageBytes / 2, columns > 0 ? source + first_column * 2 : keys, columns);
            next[i] = look_up(job, t + kBlockTokens);
        }
    };

    const int blocks = (job.count + kBlockTokens - 1) / kBlockTokens;
    for (int block = 0; block < kStages - 1; ++block) {
        if (block < blocks) copy_block(block);
        commit_copies();
    }
    for (int block = 0; block < blocks; ++block) {
        wait_copies<kStages - 2>();
        barrier(); /* everyone's copies of this block have come, and everyone is done with the one before */
        if (block + kStages - 1 < blocks) copy_block(block + kStages - 1);
        commit_copies();
        const char* rows = shared + block % kStages * kStageBytes;
        const char* columns = diagonal ? rows : rows + kStageBytes / 2;
#pragma unroll
        for (int step = 0; step < kBlockTokens / kStep; ++step)
            tile.template add<1>(rows + step * kStep * kRowBytes, columns + step * kStep * kRowBytes, 0);
        const bool last = block + 1 == blocks;
        if (!last && (block + 1) % kPromoteBlocks != 0) continue;
        tile.promote();
        if (last || (block + 1) % (kFlushTokens / kBlockTokens) == 0)
            tile.flush(job, first_row, first_column, launch.wide_moment);
    }
}

/* Read and written by one instruction. */
struct alignas(16) FourFloats {
    float value[4];
};
struct alignas(16) FourWords {
    uint32_t value[4];
};

/* Eight neighbouring keys of one token on their way to shared memory. */
template <class Key>
struct KeyChunk {
    static constexpr int kPlanes = 1;
    using Product = Key;
    FourWords words;

    KE_INLINE void load(const void* keys, int64_t begin, int count) {
        const uint16_t* key = static_cast<const uint16_t*>(keys) + begin;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint32_t low = 2 * i < count ? key[2 * i] : 0, high = 2 * i + 1 < count ? key[2 * i + 1] : 0;
            words.value[i] = low | high << 16;
        }
    }

    KE_INLINE void store(char* shared, int) { *reinterpret_cast<FourWords*>(shared) = words; }
};

/* A float is the sum of three bfloat16, 8 bits of its significand each; six of their nine products make a product of
 * floats, what is left out is below 2^-24 of it. */
template <>
struct KeyChunk<F32> {
    static constexpr int kPlanes = 3;
    using Product = Bf16;
    float values[8];

    KE_INLINE void load(const void* keys, int64_t begin, int count) {
        const float* key = static_cast<const float*>(keys) + begin;
        const bool whole = count >= 8 && reinterpret_cast<uintptr_t>(key) % 16 == 0;
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
            FourFloats four;
            if (whole) {
                four = *reinterpret_cast<const FourFloats*>(key + i);
            } else {
#pragma unroll
                for (int j = 0; j < 4; ++j) four.value[j] = i + j < count ? key[i + j] : 0.0f;
            }
#pragma unroll
            for (int j = 0; j < 4; ++j) values[i + j] = four.value[j];
        }
    }

    /* Leaves behind what the planes do not hold. */
    KE_INLINE void store(char* shared, int plane_bytes) {
#pragma unroll
        for (int p = 0; p < kPlanes; ++p) {
            FourWords words;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                words.value[i] = pack_bf16(values[2 * i], values[2 * i + 1]);
                values[2 * i] -= bits_to_float(words.value[i] << 16);
                values[2 * i + 1] -= bits_to_float(words.value[i] & 0xffff0000u);
            }
            *reinterpret_cast<FourWords*>(shared + p * plane_bytes) = words;
        }
    }
};

template <class Key>
constexpr int any_shared_bytes() {
    return 4 * KeyChunk<Key>::kPlanes * kStep * kRowBytes; /* two buffers, rows and columns */
}

/* Keys of any type, alignment and stride: through registers, one step ahead. */
template <class Key>
KE_KERNEL(kMomentThreads, 1) second_moment_any(const MomentLaunch launch) {
    using Chunk = KeyChunk<Key>;
    constexpr int kPlaneBytes = kStep * kRowBytes, kOperandBytes = Chunk::kPlanes * kPlaneBytes;
    constexpr int kPromoteSteps = (Chunk::kPlanes == 1 ? 512 : 64) / kStep; /* six products are cut off six times */
    const MomentPlace place(launch);
    const MomentJob& job = launch.job[place.layer];
    const int first_row = place.first_row, first_column = place.first_column;
    const bool diagonal = first_row == first_column;
    char* shared = shared_memory();
    MomentTile<typename Chunk::Product> tile;

    const int token = thread_index() / 16, chunk = thread_index() % 16;
    const int row_feature = first_row + chunk * 8, column_feature = first_column + chunk * 8;
    int64_t next = look_up(job, token);
    Chunk row_chunk, column_chunk;

    auto load_step = [&](int step) {
        const int t = step * kStep + token;
        const int64_t key = chosen_row(job, t, next), begin = key * job.key_stride;
        row_chunk.load(job.keys, begin + row_feature, key < 0 ? 0 : job.d - row_feature);
        if (!diagonal) column_chunk.load(job.keys, begin + column_feature, key < 0 ? 0 : job.d - column_feature);
        next = look_up(job, t + kStep);
    };
    auto store_step = [&](int step) {
        char* buffer = shared + step % 2 * 2 * kOperandBytes + chunk_offset(token, chunk);
        row_chunk.store(buffer, kPlaneBytes);
        if (!diagonal) column_chunk.store(buffer + kOperandBytes, kPlaneBytes);
    };

    const int steps = (job.count + kStep - 1) / kStep;
    load_step(0);
    store_step(0);
    barrier();
    for (int step = 0; step < steps; ++step) {
        const bool last = step + 1 == steps;
        if (!last) load_step(step + 1);
        const char* rows = shared + step % 2 * 2 * kOperandBytes;
        tile.template add<Chunk::kPlanes>(rows, diagonal ? rows : rows + kOperandBytes, kPlaneBytes);
        if (!last) store_step(step + 1);
        barrier(); /* the next step is there, and everyone is done with this one */
        if (!last && (step + 1) % kPromoteSteps != 0) continue;
        tile.promote();
        if (last || (step + 1) % (kFlushTokens / kStep) == 0)
            tile.flush(job, first_row, first_column, launch.wide_moment);
    }
}

}  // namespace kecore

#endif /* KE_SECOND_MOMENT_CUH */
