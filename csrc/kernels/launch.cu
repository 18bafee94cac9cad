/* What is kept of a CUDA error. */
#include "launch.cuh"

namespace kecore {

static thread_local const char* last_message = "";

int cuda_status(cudaError_t error) {
    last_message = cudaGetErrorString(error);
    cudaGetLastError(); /* or the next caller that asks the runtime would take this error for its own */
    switch (error) {
        case cudaErrorInsufficientDriver: return KE_OLD_DRIVER;
        case cudaErrorNoKernelImageForDevice:
        case cudaErrorInvalidDeviceFunction:
        case cudaErrorUnsupportedPtxVersion: return KE_NO_KERNEL;
        default: return KE_CUDA_ERROR;
    }
}

}  // namespace kecore

extern "C" const char* ke_cuda_message(void) { return kecore::last_message; }
