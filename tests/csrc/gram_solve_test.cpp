/* The batched small solve against its definition, for the CUDA source on the emulator or, with KE_TEST_CPU, for the
 * CPU's. */
#include "check.h"

using test::Random;

namespace {

int gram_solve(const ke_gram_solve_args& args) {
#ifdef KE_TEST_CPU
    return ke_gram_solve_cpu(&args, 2);
#else
    return ke_gram_solve_cuda(&args, nullptr);
#endif
}

/* A batch of systems in buffers of exactly their size. */
struct Systems {
    int64_t batch, d, n, c, u;
    std::vector<float> white;
    std::vector<double> shares, ridge, gram, weights, pivots;
    bool identity;

    Systems(int64_t batch_, int64_t d_, int64_t n_, int64_t c_, int64_t u_, bool no_shares, Random& random)
        : batch(batch_), d(d_), n(n_), c(c_), u(no_shares ? c_ : u_), identity(no_shares) {
        for (int64_t i = 0; i < batch * d * n; ++i) white.push_back(static_cast<float>(random.normal()));
        for (int64_t i = 0; !identity && i < batch * c * u; ++i) shares.push_back(random.normal());
        for (int64_t i = 0; i < batch; ++i) ridge.push_back(0.5 + random.uniform() * static_cast<double>(i + 1));
        gram.assign(static_cast<size_t>(batch * n * n), NAN);
        weights.assign(static_cast<size_t>(batch * n * u), NAN);
        pivots.assign(static_cast<size_t>(batch * 2), NAN);
    }

    int solve() {
        return gram_solve({batch, d, n, c, u, white.data(), identity ? nullptr : shares.data(), ridge.data(),
                           gram.data(), weights.data(), pivots.data()});
    }

    double y(int64_t system, int64_t row, int64_t column) const {
        return white[static_cast<size_t>((system * d + row) * n + column)];
    }

    /* G by definition. */
    std::vector<double> expected_gram(int64_t system) const {
        std::vector<double> g(static_cast<size_t>(n * n));
        for (int64_t row = 0; row < d; ++row)
            for (int64_t i = 0; i < n; ++i)
                for (int64_t j = 0; j < n; ++j)
                    g[static_cast<size_t>(i * n + j)] += y(system, row, i) * y(system, row, j);
        return g;
    }

    double right_side(int64_t system, int64_t row, int64_t column) const {
        const int64_t share = row - (n - c);
        if (share < 0) return 0.0;
        return identity ? share == column : shares[static_cast<size_t>((system * c + share) * u + column)];
    }

    /* Diagonal of the Cholesky factor of S, [n]. */
    std::vector<double> factor_diagonal(std::vector<double> s) const {
        std::vector<double> diagonal;
        const size_t size = static_cast<size_t>(n);
        for (size_t k = 0; k < size; ++k) {
            for (size_t i = k; i < size; ++i) {
                for (size_t j = 0; j < k; ++j) s[i * size + k] -= s[i * size + j] * s[k * size + j];
                s[i * size + k] /= i == k ? 1.0 : s[k * size + k];
                if (i == k) s[k * size + k] = sqrt(s[k * size + k]);
            }
            diagonal.push_back(s[k * size + k]);
        }
        return diagonal;
    }

    void check(int64_t system) const {
        const double tolerance = 1e-12;
        std::vector<double> s = expected_gram(system);
        double size = 0.0;
        for (double value : s) size = std::max(size, fabs(value));
        const size_t width = static_cast<size_t>(n);
        for (size_t i = 0; i < width * width; ++i)
            CHECK(fabs(gram[static_cast<size_t>(system) * width * width + i] - s[i]) <= tolerance * size,
                  "n %lld, system %lld: G[%zu] is %g, not %g", (long long)n, (long long)system, i,
                  gram[static_cast<size_t>(system) * width * width + i], s[i]);
        for (size_t i = 0; i < width; ++i) s[i * width + i] += ridge[static_cast<size_t>(system)];
        for (int64_t column = 0; column < u; ++column)
            for (int64_t i = 0; i < n; ++i) {
                double left = -right_side(system, i, column), scale = 1.0;
                for (int64_t j = 0; j < n; ++j) {
                    const double term = s[static_cast<size_t>(i * n + j)] *
                                        weights[static_cast<size_t>((system * n + j) * u + column)];
                    left += term, scale += fabs(term);
                }
                CHECK(fabs(left) <= tolerance * scale, "n %lld, system %lld: row %lld of column %lld is off by %g",
                      (long long)n, (long long)system, (long long)i, (long long)column, left);
            }
        const std::vector<double> diagonal = factor_diagonal(s);
        const double largest = *std::max_element(diagonal.begin(), diagonal.end());
        const double smallest = *std::min_element(diagonal.begin(), diagonal.end());
        const double* found = &pivots[static_cast<size_t>(system) * 2];
        CHECK(fabs(found[0] - largest) <= 1e-9 * largest, "largest pivot %g, not %g", found[0], largest);
        CHECK(fabs(found[1] - smallest) <= 1e-9 * largest, "smallest pivot %g, not %g", found[1], smallest);
    }
};

void definite() {
    struct Shape {
        int64_t batch, d, n, c, u;
        bool identity;
    };
    const Shape shapes[] = {
        {1, 1, 1, 1, 1, true},    {3, 40, 1, 1, 1, false},    {2, 70, 2, 1, 1, true},     {2, 33, 4, 4, 2, false},
        {2, 600, 5, 3, 7, false}, {1, 90, 8, 8, 8, true},     {1, 130, 17, 12, 70, false}, {1, 33, 31, 31, 31, true},
        {1, 9, 33, 20, 5, false}, {2, 100, 63, 60, 3, false}, {1, 65, 64, 64, 64, true},   {1, 0, 6, 2, 2, true},
        {1, 40, 6, 0, 0, true},
    };
    Random random(11);
    for (const Shape& s : shapes) {
        Systems systems(s.batch, s.d, s.n, s.c, s.u, s.identity, random);
        const int status = systems.solve();
        CHECK(status == KE_OK, "status %d", status);
        for (int64_t system = 0; system < s.batch; ++system) systems.check(system);
    }
}

/* A system that is not positive definite says so, and does not spoil its neighbours. */
void indefinite() {
    Random random(13);
    Systems systems(4, 6, 9, 9, 9, true, random); /* rank 6 of 9 */
    systems.ridge[1] = -100.0;
    systems.ridge[3] = NAN;
    CHECK(systems.solve() == KE_OK, "status");
    systems.check(0);
    systems.check(2);
    for (size_t system : {1, 3})
        CHECK(systems.pivots[system * 2 + 1] == 0.0, "system %zu: smallest pivot %g", system,
              systems.pivots[system * 2 + 1]);
}

void refuses_wrong_arguments() {
    float white[4] = {1, 2, 3, 4};
    double ridge[1] = {1}, gram[4], weights[4], pivots[2];
    const ke_gram_solve_args good = {1, 2, 2, 2, 2, white, nullptr, ridge, gram, weights, pivots};
    auto status = [&](void (*spoil)(ke_gram_solve_args&)) {
        ke_gram_solve_args args = good;
        spoil(args);
        return gram_solve(args);
    };
    CHECK(status([](ke_gram_solve_args&) {}) == KE_OK, "the good one");
    CHECK(status([](ke_gram_solve_args& a) { a.batch = 0; }) == KE_OK, "no systems");
    CHECK(status([](ke_gram_solve_args& a) { a.batch = -1; }) == KE_BAD_ARGUMENT, "negative batch");
    CHECK(status([](ke_gram_solve_args& a) { a.d = -1; }) == KE_BAD_ARGUMENT, "negative d");
    CHECK(status([](ke_gram_solve_args& a) { a.c = 3; }) == KE_BAD_ARGUMENT, "more shares than columns");
    CHECK(status([](ke_gram_solve_args& a) { a.u = 1; }) == KE_BAD_ARGUMENT, "an identity that is not square");
    CHECK(status([](ke_gram_solve_args& a) { a.white = nullptr; }) == KE_BAD_ARGUMENT, "no Y");
    CHECK(status([](ke_gram_solve_args& a) { a.ridge = nullptr; }) == KE_BAD_ARGUMENT, "no ridge");
    CHECK(status([](ke_gram_solve_args& a) { a.gram = nullptr; }) == KE_BAD_ARGUMENT, "no place for G");
    CHECK(status([](ke_gram_solve_args& a) { a.weights = nullptr; }) == KE_BAD_ARGUMENT, "no place for weights");
    CHECK(status([](ke_gram_solve_args& a) { a.pivots = nullptr; }) == KE_BAD_ARGUMENT, "no place for pivots");
}

}  // namespace

int main(int argc, char** argv) {
    return test::main_of(
        argc, argv,
        {{"definite", definite}, {"indefinite", indefinite}, {"wrong_arguments", refuses_wrong_arguments}});
}
