/* Host side of the CUDA second moment: arguments, one launch for each way of loading. */
#include "second_moment.cuh"

#include "arguments.h"
#include "launch.cuh"

namespace kecore {
namespace {

constexpr int64_t kMostColumns = 1 << 20;
constexpr int64_t kMostTokens = (1 << 30);

/* cp.async copies 16 bytes from addresses that are multiples of 16. */
bool aligned(const ke_moment_layer& layer, int key_dtype) {
    return key_dtype != KE_F32 && reinterpret_cast<uintptr_t>(layer.keys) % 16 == 0 && layer.key_stride % 8 == 0;
}

/* Appends a layer to a launch and gives the launch's number of blocks. */
int64_t append(MomentLaunch& launch, int& jobs, int64_t blocks, const ke_moment_layer& layer) {
    MomentJob& job = launch.job[jobs++];
    job.keys = layer.keys;
    job.key_stride = layer.key_stride;
    job.rows = layer.rows;
    job.mask = layer.mask;
    job.moment = layer.moment;
    job.moment_stride = layer.moment_stride;
    job.tokens = static_cast<int>(layer.tokens);
    job.count = static_cast<int>(layer.rows == nullptr ? layer.tokens : layer.n_rows);
    job.d = static_cast<int>(layer.d);
    job.tiles = (job.d + kTile - 1) / kTile;
    blocks += static_cast<int64_t>(job.tiles) * (job.tiles + 1) / 2;
    job.end = static_cast<int>(blocks);
    return blocks;
}

int run_aligned(const MomentLaunch& launch_of, int64_t blocks, int key_dtype, void* stream) {
    auto kernel = key_dtype == KE_BF16 ? second_moment_aligned<Bf16> : second_moment_aligned<F16>;
    return launch(kernel, blocks, kMomentThreads, kStages * kStageBytes, stream, launch_of);
}

int run_any(const MomentLaunch& launch_of, int64_t blocks, int key_dtype, void* stream) {
    if (key_dtype == KE_F32)
        return launch(second_moment_any<F32>, blocks, kMomentThreads, any_shared_bytes<F32>(), stream, launch_of);
    auto kernel = key_dtype == KE_BF16 ? second_moment_any<Bf16> : second_moment_any<F16>;
    return launch(kernel, blocks, kMomentThreads, any_shared_bytes<Bf16>(), stream, launch_of);
}

}  // namespace
}  // namespace kecore

extern "C" int ke_second_moment_cuda(
    const ke_moment_layer* layers, int n_layers, int key_dtype, int moment_dtype, void* stream) {
    using namespace kecore;
    const int status = check_moment(layers, n_layers, key_dtype, moment_dtype);
    if (status != KE_OK) return status;
    MomentLaunch quick, any;
    int quick_jobs = 0, any_jobs = 0;
    int64_t quick_blocks = 0, any_blocks = 0;
    quick.wide_moment = any.wide_moment = moment_dtype == KE_F64;
    for (int i = 0; i < n_layers; ++i) {
        const ke_moment_layer& layer = layers[i];
        const int64_t count = layer.rows == nullptr ? layer.tokens : layer.n_rows;
        if (layer.d > kMostColumns || layer.tokens > kMostTokens || count > kMostTokens) return KE_TOO_LARGE;
        if (layer.d == 0 || count == 0) continue;
        if (aligned(layer, key_dtype))
            quick_blocks = append(quick, quick_jobs, quick_blocks, layer);
        else
            any_blocks = append(any, any_jobs, any_blocks, layer);
    }
    if (quick_blocks > 0) {
        const int failed = run_aligned(quick, quick_blocks, key_dtype, stream);
        if (failed != KE_OK) return failed;
    }
    return any_blocks > 0 ? run_any(any, any_blocks, key_dtype, stream) : KE_OK;
}
