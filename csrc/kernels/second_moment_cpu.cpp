/* moment += sum of x x^T over chosen tokens, lower triangle.
 *
 * A chunk of tokens is packed once into panels of columns, in the order in which the products read it; then the
 * triangle is cut into square blocks whose panels fit the second-level cache, and threads take blocks. Products of
 * one chunk are summed in registers, in single precision; chunks are summed in the moment's type.
 */
#include <algorithm>
#include <new>
#include <vector>

#include "arguments.h"
#include "cpu_isa.h"
#include "cpu_team.h"
#include "kecore.h"

namespace kecore {
namespace {

constexpr int64_t kChunk = 1024; // tokens that are summed in single precision
constexpr int64_t kBlock = 192;  // columns of a block; a multiple of every format's width

struct Accumulation {
    const ke_moment_layer& layer;
    const Format& format;
    int key_dtype;
    int moment_dtype;
    int64_t side; // columns of a block
    unsigned char* panels;

    int64_t sides() const { return (layer.d + side - 1) / side; }

    void pack(const Chunk& chunk, int64_t padded, int64_t item) const {
        const int64_t begin = item * side, end = std::min(begin + side, layer.d);
        format.pack(chunk, begin, end, padded, panels + begin / format.width * format.bytes_a_token * padded);
    }

    /* Blocks count from the last row up: the long rows come first, so that threads finish together. */
    void add(int64_t padded, int64_t item) const {
        int64_t row = sides() - 1;
        while (item > row) item -= row-- + 1;
        const int64_t i_end = std::min((row + 1) * side, layer.d), j_end = std::min((item + 1) * side, layer.d);
        const int64_t panel = format.bytes_a_token * padded;
        for (int64_t j = item * side; j < j_end; j += format.width)
            for (int64_t i = std::max(row * side, j / format.width * format.width); i < i_end; i += format.width) {
                const unsigned char* a = panels + i / format.width * panel;
                const unsigned char* b = panels + j / format.width * panel;
                const int64_t n = std::min(format.width, i_end - i), m = std::min(format.width, j_end - j);
                const int64_t diagonal = i == j ? 0 : kWhole, at = i * layer.moment_stride + j;
                if (moment_dtype == KE_F64)
                    format.add_f64(
                        a, b, padded, n, m, diagonal, static_cast<double*>(layer.moment) + at, layer.moment_stride);
                else
                    format.add_f32(
                        a, b, padded, n, m, diagonal, static_cast<float*>(layer.moment) + at, layer.moment_stride);
            }
    }
};

int check_rows(const ke_moment_layer& x) {
    for (int64_t i = 0; x.rows && i < x.n_rows; ++i)
        if (x.rows[i] < 0 || x.rows[i] >= x.tokens) return KE_BAD_ARGUMENT;
    return KE_OK;
}

void add_layer(const ke_moment_layer& x, int key_dtype, int moment_dtype, int threads) {
    std::vector<int64_t> chosen;
    if (x.mask)
        for (int64_t t = 0; t < x.tokens; ++t)
            if (x.mask[t]) chosen.push_back(t);
    const int64_t* rows = x.mask ? chosen.data() : x.rows;
    const int64_t tokens = x.mask ? static_cast<int64_t>(chosen.size()) : x.rows ? x.n_rows : x.tokens;
    if (!tokens || !x.d) return;

    const Isa& isa = cpu_isa();
    const Format& format = key_dtype == KE_BF16 && isa.half ? *isa.half : *isa.single;
    const int64_t most = round_up(std::min(tokens, kChunk), format.tokens_a_step);
    const Memory memory(round_up(x.d, format.width) / format.width * format.bytes_a_token * most);
    if (!memory.bytes) throw std::bad_alloc();
    // Blocks are halved where there are too few of them to occupy every thread.
    int64_t side = kBlock;
    while (side > 96 && x.d / side < 2 * threads) side /= 2;
    const Accumulation all{x, format, key_dtype, moment_dtype, side, memory.bytes};
    const int64_t blocks = all.sides() * (all.sides() + 1) / 2;
    const int64_t size = key_dtype == KE_F32 ? 4 : 2;
    if (x.d * x.d * tokens < (1 << 21)) threads = 1; // about what starting a thread costs
    for (int64_t begin = 0; begin < tokens; begin += kChunk) {
        const int64_t n = std::min(kChunk, tokens - begin), padded = round_up(n, format.tokens_a_step);
        const void* keys = rows ? x.keys : static_cast<const char*>(x.keys) + begin * x.key_stride * size;
        const Chunk chunk{keys, key_dtype, x.key_stride, rows ? rows + begin : nullptr, n, x.d};
        share(threads, all.sides(), [&](Items& items) {
            for (int64_t item; items.take(&item);) all.pack(chunk, padded, item);
        });
        share(threads, blocks, [&](Items& items) {
            for (int64_t item; items.take(&item);) all.add(padded, item);
        });
    }
}

} // namespace
} // namespace kecore

extern "C" int ke_second_moment_cpu(
    const ke_moment_layer* layers, int n_layers, int key_dtype, int moment_dtype, int threads) {
    if (const int status = kecore::check_moment(layers, n_layers, key_dtype, moment_dtype)) return status;
    for (int i = 0; i < n_layers; ++i)
        if (const int status = kecore::check_rows(layers[i])) return status;
    try {
        for (int i = 0; i < n_layers; ++i) kecore::add_layer(layers[i], key_dtype, moment_dtype, threads);
    } catch (const std::bad_alloc&) {
        return KE_NO_MEMORY;
    }
    return KE_OK;
}
