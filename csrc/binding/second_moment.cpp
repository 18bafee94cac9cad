/* kecore::second_moment_ over the C kernels. The schema is declared in kecore/ops/schema.py. */
#include "binding.h"

namespace kecore::binding {
namespace {

const char* const kName = "second_moment_";

std::vector<ke_moment_layer> layers_of(
    const std::vector<Tensor>& moments, const std::vector<Tensor>& keys, const std::optional<Tensor>& rows,
    const std::optional<Tensor>& mask) {
    STD_TORCH_CHECK(moments.size() == keys.size(), kName, ": expected as many moments as keys");
    STD_TORCH_CHECK(!rows || !mask, kName, ": rows and mask cannot be given together");
    std::vector<ke_moment_layer> layers;
    for (size_t i = 0; i < keys.size(); ++i) {
        const Tensor &m = moments[i], &k = keys[i];
        STD_TORCH_CHECK(k.dim() == 2 && m.dim() == 2, kName, ": expected keys [tokens, d] and moments [d, d]");
        const int64_t tokens = k.size(0), d = k.size(1);
        STD_TORCH_CHECK(m.size(0) == d && m.size(1) == d, kName, ": expected moments [d, d] for keys [tokens, d]");
        STD_TORCH_CHECK(d < 2 || (k.stride(1) == 1 && m.stride(1) == 1), kName, ": expected a stride of 1 in a row");
        STD_TORCH_CHECK(
            dtype_of(k) == dtype_of(keys[0]) && dtype_of(m) == dtype_of(moments[0]), kName,
            ": expected layers of the same types");
        STD_TORCH_CHECK(k.device() == m.device() && k.device() == keys[0].device(), kName, ": expected one device");
        STD_TORCH_CHECK(!mask || mask->size(0) == tokens, kName, ": expected a mask of as many tokens as keys");
        // The stride of a dimension of one element means nothing.
        ke_moment_layer layer = {};
        layer.keys = k.const_data_ptr();
        layer.key_stride = tokens < 2 ? d : k.stride(0);
        layer.tokens = tokens;
        layer.d = d;
        layer.rows = rows ? static_cast<const int64_t*>(rows->const_data_ptr()) : nullptr;
        layer.n_rows = rows ? rows->size(0) : 0;
        layer.mask = mask ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr;
        layer.moment = m.mutable_data_ptr();
        layer.moment_stride = d < 2 ? d : m.stride(0);
        layers.push_back(layer);
    }
    for (const auto* choice : {&rows, &mask})
        if (*choice)
            STD_TORCH_CHECK(
                (*choice)->dim() == 1 && (*choice)->is_contiguous() &&
                    (keys.empty() || (*choice)->device() == keys[0].device()),
                kName, ": expected rows or a mask as a contiguous vector beside the keys");
    STD_TORCH_CHECK(!rows || rows->scalar_type() == ScalarType::Long, kName, ": expected rows of int64");
    STD_TORCH_CHECK(!mask || mask->scalar_type() == ScalarType::Bool, kName, ": expected a mask of bool");
    return layers;
}

/* Calls `accumulate(layers, count, key type, moment type)` for at most KE_MAX_LAYERS layers at a time. */
template <class Accumulate>
void in_groups(
    const std::vector<Tensor>& moments, const std::vector<Tensor>& keys, const std::optional<Tensor>& rows,
    const std::optional<Tensor>& mask, const Accumulate& accumulate) {
    const std::vector<ke_moment_layer> layers = layers_of(moments, keys, rows, mask);
    if (rows && rows->numel() == 0) return; // its data pointer is null, which would mean every token
    for (size_t begin = 0; begin < layers.size(); begin += KE_MAX_LAYERS) {
        const size_t count = std::min<size_t>(KE_MAX_LAYERS, layers.size() - begin);
        check(
            accumulate(layers.data() + begin, static_cast<int>(count), dtype_of(keys[0]), dtype_of(moments[0])), kName);
    }
}

void on_cpu(
    std::vector<Tensor> moments, std::vector<Tensor> keys, std::optional<Tensor> rows, std::optional<Tensor> mask) {
    in_groups(moments, keys, rows, mask, [](const ke_moment_layer* layers, int n, int key, int moment) {
        return ke_second_moment_cpu(layers, n, key, moment, threads());
    });
}

#ifdef KECORE_CUDA
void on_cuda(
    std::vector<Tensor> moments, std::vector<Tensor> keys, std::optional<Tensor> rows, std::optional<Tensor> mask) {
    if (keys.empty()) return;
    const OnDevice here(keys[0]);
    in_groups(moments, keys, rows, mask, [&](const ke_moment_layer* layers, int n, int key, int moment) {
        return ke_second_moment_cuda(layers, n, key, moment, here.stream);
    });
}
#endif

} // namespace
} // namespace kecore::binding

STABLE_TORCH_LIBRARY_IMPL(kecore, CPU, library) { library.impl("second_moment_", TORCH_BOX(&kecore::binding::on_cpu)); }

#ifdef KECORE_CUDA
STABLE_TORCH_LIBRARY_IMPL(kecore, CUDA, library) {
    library.impl("second_moment_", TORCH_BOX(&kecore::binding::on_cuda));
}
#endif
