#include "cpu_team.h"
#include "kecore.h"

namespace kecore {
std::atomic<ke_parallel> parallel{nullptr};
}

extern "C" void ke_set_parallel(ke_parallel run) { kecore::parallel = run; }

extern "C" const char* ke_status_message(int status) {
    switch (status) {
        case KE_OK: return "no error";
        case KE_BAD_ARGUMENT: return "a null pointer, a size or row out of range, or a stride shorter than a row";
        case KE_BAD_DTYPE: return "a type that this function does not take";
        case KE_TOO_LARGE: return "more layers or columns than one call takes";
        case KE_NO_MEMORY: return "out of host memory";
        case KE_NO_KERNEL: return "the binary holds no code for this device";
        case KE_OLD_DRIVER: return "the NVIDIA driver is older than the CUDA runtime that was built in";
        case KE_CUDA_ERROR: return "a CUDA error";
        default: return "an unknown status";
    }
}
