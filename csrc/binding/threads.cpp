/* The CPU kernels run on torch's threads. */
#include "binding.h"

namespace kecore::binding {
namespace {

void on_torchs_threads(int n, void (*work)(const void* context), const void* context) {
    torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
        for (; begin < end; ++begin) work(context);
    });
}

[[maybe_unused]] const bool kGiven = (ke_set_parallel(on_torchs_threads), true);

} // namespace
} // namespace kecore::binding
