/* Products with a triangular factor against their definition in double. */
#include "check.h"

using test::Random;

namespace {

/* The factor's upper triangle holds NaN: it must not be read. Padding between its rows, too. */
void check_product(int64_t batch, int64_t d, int64_t n, int64_t padding, int transposed, Random& random) {
    const int64_t stride = d + padding;
    std::vector<float> factor(static_cast<size_t>(d > 0 ? (d - 1) * stride + d : 0), NAN);
    for (int64_t i = 0; i < d; ++i)
        for (int64_t j = 0; j <= i; ++j)
            factor[static_cast<size_t>(i * stride + j)] = static_cast<float>(random.normal());
    std::vector<float> x(static_cast<size_t>(batch * d * n)), out(x.size(), NAN);
    for (float& value : x) value = static_cast<float>(random.normal());
    const ke_factor_product_args args = {factor.data(), stride, x.data(), out.data(), batch, d, n, transposed};
    const int status = ke_factor_product_cpu(&args, 2);
    CHECK(status == KE_OK, "status %d", status);
    for (int64_t system = 0; system < batch; ++system)
        for (int64_t i = 0; i < d; ++i)
            for (int64_t column = 0; column < n; ++column) {
                double sum = 0.0, size = 0.0;
                for (int64_t j = transposed ? i : 0; j < (transposed ? d : i + 1); ++j) {
                    const double element = factor[static_cast<size_t>(transposed ? j * stride + i : i * stride + j)];
                    const double term = element * x[static_cast<size_t>((system * d + j) * n + column)];
                    sum += term, size += fabs(term);
                }
                const double found = out[static_cast<size_t>((system * d + i) * n + column)];
                CHECK(fabs(found - sum) <= 1e-6 * size, "d %lld, n %lld: [%lld, %lld] is %g, not %g", (long long)d,
                      (long long)n, (long long)i, (long long)column, found, sum);
            }
}

void products() {
    Random random(17);
    for (int transposed : {0, 1}) {
        check_product(1, 1, 1, 0, transposed, random);
        check_product(2, 7, 3, 2, transposed, random);
        check_product(1, 48, 48, 0, transposed, random);
        check_product(3, 97, 49, 1, transposed, random);
        check_product(1, 300, 5, 0, transposed, random);
        check_product(2, 129, 1, 7, transposed, random);
        check_product(1, 530, 200, 0, transposed, random);
        check_product(0, 5, 5, 0, transposed, random);
        check_product(2, 0, 5, 0, transposed, random);
        check_product(2, 5, 0, 0, transposed, random);
    }
}

void refuses_wrong_arguments() {
    float factor[4] = {1, 0, 0, 1}, x[2] = {1, 2}, out[2];
    const ke_factor_product_args good = {factor, 2, x, out, 1, 2, 1, 0};
    auto status = [&](void (*spoil)(ke_factor_product_args&)) {
        ke_factor_product_args args = good;
        spoil(args);
        return ke_factor_product_cpu(&args, 1);
    };
    CHECK(status([](ke_factor_product_args&) {}) == KE_OK, "the good one");
    CHECK(status([](ke_factor_product_args& a) { a.factor_stride = 1; }) == KE_BAD_ARGUMENT, "short stride");
    CHECK(status([](ke_factor_product_args& a) { a.batch = -1; }) == KE_BAD_ARGUMENT, "negative batch");
    CHECK(status([](ke_factor_product_args& a) { a.d = -1; }) == KE_BAD_ARGUMENT, "negative d");
    CHECK(status([](ke_factor_product_args& a) { a.n = -1; }) == KE_BAD_ARGUMENT, "negative n");
    CHECK(status([](ke_factor_product_args& a) { a.factor = nullptr; }) == KE_BAD_ARGUMENT, "no factor");
    CHECK(status([](ke_factor_product_args& a) { a.x = nullptr; }) == KE_BAD_ARGUMENT, "no X");
    CHECK(status([](ke_factor_product_args& a) { a.out = nullptr; }) == KE_BAD_ARGUMENT, "no place for the result");
}

}  // namespace

int main(int argc, char** argv) {
    return test::main_of(argc, argv, {{"products", products}, {"wrong_arguments", refuses_wrong_arguments}});
}
