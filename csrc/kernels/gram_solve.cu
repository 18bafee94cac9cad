/* Host side of the batched small solve. */
#include "gram_solve.cuh"

#include "arguments.h"
#include "launch.cuh"

extern "C" int ke_gram_solve_cuda(const ke_gram_solve_args* args, void* stream) {
    using namespace kecore;
    const int status = check_gram_solve(args);
    if (status != KE_OK) return status;
    if (args->n > KE_MAX_COLUMNS || args->batch > INT32_MAX) return KE_TOO_LARGE;
    if (args->batch == 0) return KE_OK;
    const int n = static_cast<int>(args->n);
    return launch(gram_solve, args->batch, kSolveThreads, solve_shared_bytes(n), stream, *args);
}
