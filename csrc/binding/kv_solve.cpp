/* kecore::gram_solve and kecore::factor_product, which kecore::kv_solve is made of, over the C kernels. */
#include "binding.h"

namespace kecore::binding {
namespace {

typedef std::tuple<Tensor, Tensor, Tensor> Solved;

bool is(const Tensor& tensor, ScalarType dtype, const Tensor& beside) {
    return tensor.scalar_type() == dtype && tensor.is_contiguous() && tensor.device() == beside.device();
}

/* Calls `run(args)` on new tensors: gram [batch, n, n], weights [batch, n, u], pivots [batch, 2]. */
template <class Run>
Solved solved(const Tensor& white, const Tensor& ridge, const std::optional<Tensor>& shares, const Run& run) {
    STD_TORCH_CHECK(
        white.dim() == 3 && is(white, ScalarType::Float, white),
        "gram_solve: expected white [batch, d, n] of float32, contiguous");
    const int64_t batch = white.size(0), d = white.size(1), n = white.size(2);
    STD_TORCH_CHECK(
        ridge.dim() == 1 && ridge.size(0) == batch && is(ridge, ScalarType::Double, white),
        "gram_solve: expected ridge [batch] of float64 beside the keys");
    STD_TORCH_CHECK(
        !shares ||
            (shares->dim() == 3 && shares->size(0) == batch && shares->size(1) <= n &&
             is(*shares, ScalarType::Double, white)),
        "gram_solve: expected shares [batch, c <= n, u] of float64, contiguous, beside the keys");
    const int64_t c = shares ? shares->size(1) : n, u = shares ? shares->size(2) : n;
    const Tensor gram = empty({batch, n, n}, ScalarType::Double, white);
    const Tensor weights = empty({batch, n, u}, ScalarType::Double, white);
    const Tensor pivots = empty({batch, 2}, ScalarType::Double, white);
    ke_gram_solve_args args = {};
    args.batch = batch;
    args.d = d;
    args.n = n;
    args.c = c;
    args.u = u;
    args.white = static_cast<const float*>(white.const_data_ptr());
    args.shares = shares ? static_cast<const double*>(shares->const_data_ptr()) : nullptr;
    args.ridge = static_cast<const double*>(ridge.const_data_ptr());
    args.gram = static_cast<double*>(gram.mutable_data_ptr());
    args.weights = static_cast<double*>(weights.mutable_data_ptr());
    args.pivots = static_cast<double*>(pivots.mutable_data_ptr());
    check(run(args), "gram_solve");
    return {gram, weights, pivots};
}

Solved gram_solve_cpu(Tensor white, Tensor ridge, std::optional<Tensor> shares) {
    return solved(
        white, ridge, shares, [](const ke_gram_solve_args& args) { return ke_gram_solve_cpu(&args, threads()); });
}

#ifdef KECORE_CUDA
Solved gram_solve_cuda(Tensor white, Tensor ridge, std::optional<Tensor> shares) {
    const OnDevice here(white);
    return solved(
        white, ridge, shares, [&](const ke_gram_solve_args& args) { return ke_gram_solve_cuda(&args, here.stream); });
}
#endif

Tensor factor_product_cpu(Tensor factor, Tensor x, bool transposed) {
    STD_TORCH_CHECK(
        x.dim() == 3 && is(x, ScalarType::Float, x), "factor_product: expected x [batch, d, n] of float32, contiguous");
    const int64_t d = x.size(1);
    STD_TORCH_CHECK(
        factor.dim() == 2 && factor.size(0) == d && factor.size(1) == d && (d < 2 || factor.stride(1) == 1) &&
            factor.scalar_type() == ScalarType::Float && factor.device() == x.device(),
        "factor_product: expected factor [d, d] of float32 with a stride of 1 in a row");
    const Tensor out = empty({x.size(0), d, x.size(2)}, ScalarType::Float, x);
    ke_factor_product_args args = {};
    args.factor = static_cast<const float*>(factor.const_data_ptr());
    args.factor_stride = d < 2 ? d : factor.stride(0);
    args.x = static_cast<const float*>(x.const_data_ptr());
    args.out = static_cast<float*>(out.mutable_data_ptr());
    args.batch = x.size(0);
    args.d = d;
    args.n = x.size(2);
    args.transposed = transposed;
    check(ke_factor_product_cpu(&args, threads()), "factor_product");
    return out;
}

} // namespace
} // namespace kecore::binding

STABLE_TORCH_LIBRARY_IMPL(kecore, CPU, library) {
    library.impl("gram_solve", TORCH_BOX(&kecore::binding::gram_solve_cpu));
    library.impl("factor_product", TORCH_BOX(&kecore::binding::factor_product_cpu));
}

#ifdef KECORE_CUDA
STABLE_TORCH_LIBRARY_IMPL(kecore, CUDA, library) {
    library.impl("gram_solve", TORCH_BOX(&kecore::binding::gram_solve_cuda));
}
#endif
