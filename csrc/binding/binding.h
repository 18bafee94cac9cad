/* What the glue between torch's stable ABI and the C interface shares. */
#ifndef KECORE_BINDING_H
#define KECORE_BINDING_H

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../kernels/kecore.h"

namespace kecore::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline int dtype_of(const Tensor& tensor) {
    switch (tensor.scalar_type()) {
        case ScalarType::Float: return KE_F32;
        case ScalarType::Half: return KE_F16;
        case ScalarType::BFloat16: return KE_BF16;
        case ScalarType::Double: return KE_F64;
        default: return -1;
    }
}

inline int threads() { return static_cast<int>(torch::stable::get_num_threads()); }

/* A status as an exception; the message is the C interface's. */
inline void check(int status, const char* function) {
    if (status == KE_OK) return;
    std::string text = ke_status_message(status);
#ifdef KECORE_CUDA
    if (status == KE_CUDA_ERROR) text += std::string(": ") + ke_cuda_message();
#endif
    STD_TORCH_CHECK(false, function, ": ", text);
}

inline Tensor empty(std::initializer_list<int64_t> shape, ScalarType dtype, const Tensor& like) {
    return torch::stable::empty({shape.begin(), shape.size()}, dtype, std::nullopt, like.device());
}

#ifdef KECORE_CUDA
namespace {

/* The current device is the tensor's while this lives; `stream` is that device's current one. */
struct OnDevice {
    torch::stable::accelerator::DeviceGuard guard;
    void* stream = nullptr;
    explicit OnDevice(const Tensor& tensor) : guard(tensor.get_device_index()) {
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    }
};

}  // namespace
#endif

} // namespace kecore::binding

#endif
