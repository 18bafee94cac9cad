/* Launching a kernel and telling what went wrong, for the host side of the CUDA functions. */
#ifndef KE_LAUNCH_CUH
#define KE_LAUNCH_CUH

#include "device.cuh"
#include "kecore.h"

#ifndef KE_EMULATED
#include <cuda_runtime.h>
#endif

namespace kecore {

#ifdef KE_EMULATED

/* Run every thread of the launch before returning. */
template <class Parameters>
int launch(void (*kernel)(Parameters), int64_t blocks, int threads, size_t shared_bytes, void*,
           const Parameters& parameters) {
    for (int64_t block = 0; block < blocks; ++block)
        emulator::run_block([&] { kernel(parameters); }, block, threads, shared_bytes);
    return KE_OK;
}

#else

/* Keeps the error's text for ke_cuda_message() and gives the status that names it. */
int cuda_status(cudaError_t error);

/* Queue a kernel on `stream` of the current device. `blocks` is below 2^31. */
template <class Parameters>
int launch(void (*kernel)(Parameters), int64_t blocks, int threads, size_t shared_bytes, void* stream,
           const Parameters& parameters) {
    const void* function = reinterpret_cast<const void*>(kernel);
    cudaError_t error = cudaFuncSetAttribute(
        function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error == cudaSuccess) {
        void* arguments[] = {const_cast<Parameters*>(&parameters)};
        error = cudaLaunchKernel(function, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)),
                                 arguments, shared_bytes, static_cast<cudaStream_t>(stream));
    }
    return error == cudaSuccess ? KE_OK : cuda_status(error);
}

#endif /* KE_EMULATED */

}  // namespace kecore

#endif /* KE_LAUNCH_CUH */
