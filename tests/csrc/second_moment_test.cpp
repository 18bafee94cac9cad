/* The second moment against a sum in double, for the CUDA source on the emulator or, with KE_TEST_CPU, the CPU's. */
#include "check.h"

using test::Random;

namespace {

#ifdef KE_TEST_CPU
int second_moment(const std::vector<ke_moment_layer>& layers, int key_dtype, int moment_dtype) {
    return ke_second_moment_cpu(layers.data(), static_cast<int>(layers.size()), key_dtype, moment_dtype, 2);
}
#else
int second_moment(const std::vector<ke_moment_layer>& layers, int key_dtype, int moment_dtype) {
    return ke_second_moment_cuda(layers.data(), static_cast<int>(layers.size()), key_dtype, moment_dtype, nullptr);
}
#endif

enum Choice { ALL, ROWS, MASK };

struct Shape {
    int64_t d, tokens;
    Choice choice;
    int64_t extra_stride, offset;      /* elements by which keys lie apart, and the first from an aligned address */
    int64_t n_rows;                    /* for ROWS */
    int masked_percent;                /* for MASK */
};

/* One layer in buffers that hold not one element more than they must. */
struct Layer {
    Shape shape;
    int key_dtype, moment_dtype;
    int64_t stride, moment_stride;
    std::vector<double> keys;          /* [tokens, d], as stored */
    std::vector<char> key_bytes, moment_bytes, before;
    std::vector<int64_t> rows;
    std::vector<uint8_t> mask;

    Layer(const Shape& s, int key_type, int moment_type, bool integers, Random& random)
        : shape(s), key_dtype(key_type), moment_dtype(moment_type), stride(s.d + s.extra_stride),
          moment_stride(s.d + random.integer(0, 3)) {
        const size_t size = key_dtype == KE_F32 ? 4 : 2;
        const int64_t elements = s.tokens > 0 ? s.offset + (s.tokens - 1) * stride + s.d : s.offset;
        key_bytes.assign(static_cast<size_t>(elements) * size, 0x5a);
        for (int64_t t = 0; t < s.tokens; ++t)
            for (int64_t i = 0; i < s.d; ++i)
                keys.push_back(put(s.offset + t * stride + i, integers ? random.integer(-8, 8) : random.normal()));
        const int64_t moments = (s.d - 1) * moment_stride + s.d;
        moment_bytes.resize(static_cast<size_t>(moments) * moment_size());
        for (int64_t i = 0; i < moments; ++i) set_moment(i, static_cast<double>(random.integer(-100, 100)));
        before = moment_bytes;
        for (int64_t i = 0; s.choice == ROWS && i < s.n_rows; ++i) rows.push_back(random.integer(0, s.tokens - 1));
        for (int64_t t = 0; s.choice == MASK && t < s.tokens; ++t)
            mask.push_back(random.integer(0, 99) < s.masked_percent ? 0 : static_cast<uint8_t>(random.integer(1, 255)));
    }

    size_t moment_size() const { return moment_dtype == KE_F64 ? 8 : 4; }

    /* Stores a key in its type, gives its value. */
    double put(int64_t place, double value) {
        const float rounded = static_cast<float>(value);
        if (key_dtype == KE_F32) {
            memcpy(&key_bytes[static_cast<size_t>(place) * 4], &rounded, 4);
            return rounded;
        }
        const uint16_t bits = key_dtype == KE_BF16 ? test::to_bf16(rounded) : test::to_f16(rounded);
        memcpy(&key_bytes[static_cast<size_t>(place) * 2], &bits, 2);
        return key_dtype == KE_BF16 ? test::from_bf16(bits) : test::from_f16(bits);
    }

    void set_moment(int64_t place, double value) {
        const float narrow = static_cast<float>(value);
        if (moment_dtype == KE_F64) memcpy(&moment_bytes[static_cast<size_t>(place) * 8], &value, 8);
        else memcpy(&moment_bytes[static_cast<size_t>(place) * 4], &narrow, 4);
    }

    double moment(const std::vector<char>& bytes, int64_t place) const {
        double wide;
        float narrow;
        memcpy(&wide, &bytes[static_cast<size_t>(place) * moment_size()], moment_size() == 8 ? 8 : 0);
        memcpy(&narrow, &bytes[static_cast<size_t>(place) * moment_size()], moment_size() == 4 ? 4 : 0);
        return moment_dtype == KE_F64 ? wide : narrow;
    }

    ke_moment_layer argument() {
        const size_t size = key_dtype == KE_F32 ? 4 : 2;
        ke_moment_layer a = {};
        a.keys = key_bytes.data() + static_cast<size_t>(shape.offset) * size;
        a.key_stride = stride, a.tokens = shape.tokens, a.d = shape.d;
        a.rows = shape.choice == ROWS ? rows.data() : nullptr;
        a.n_rows = static_cast<int64_t>(rows.size());
        a.mask = shape.choice == MASK ? mask.data() : nullptr;
        a.moment = moment_bytes.data(), a.moment_stride = moment_stride;
        return a;
    }

    std::vector<int64_t> chosen() const {
        if (shape.choice == ROWS) return rows;
        std::vector<int64_t> all;
        for (int64_t t = 0; t < shape.tokens; ++t)
            if (shape.choice == ALL || mask[static_cast<size_t>(t)] != 0) all.push_back(t);
        return all;
    }

    /* The sum that is added, [d, d], by definition. */
    std::vector<double> expected() const {
        const size_t d = static_cast<size_t>(shape.d);
        std::vector<double> sum(d * d);
        for (int64_t t : chosen()) {
            const double* key = &keys[static_cast<size_t>(t) * d];
            for (size_t i = 0; i < d; ++i)
                for (size_t j = 0; j <= i; ++j) sum[i * d + j] += key[i] * key[j];
        }
        return sum;
    }

    /* The largest error of an element relative to sqrt(C_ii C_jj); everything else must be as it was. */
    double error() const {
        const std::vector<double> sum = expected();
        const int64_t d = shape.d;
        double worst = 0.0;
        for (int64_t place = 0; place < (d - 1) * moment_stride + d; ++place) {
            const int64_t i = place / moment_stride, j = place % moment_stride;
            const double was = moment(before, place), is = moment(moment_bytes, place);
            if (j > i) {
                CHECK(was == is, "d %lld: [%lld, %lld] was %g and is %g", (long long)d, (long long)i, (long long)j,
                      was, is);
                continue;
            }
            const double off = fabs(is - was - sum[static_cast<size_t>(i * d + j)]);
            const double size = sqrt(sum[static_cast<size_t>(i * d + i)] * sum[static_cast<size_t>(j * d + j)]);
            if (!(off <= worst * size)) worst = size > 0.0 && off == off ? off / size : (off == 0.0 ? worst : INFINITY);
        }
        return worst;
    }
};

/* Runs several layers in one call and gives the largest error. */
double error_of(const std::vector<Shape>& shapes, int key_dtype, int moment_dtype, bool integers, uint64_t seed) {
    Random random(seed);
    std::vector<Layer> layers;
    for (const Shape& shape : shapes) layers.emplace_back(shape, key_dtype, moment_dtype, integers, random);
    std::vector<ke_moment_layer> arguments;
    for (Layer& layer : layers) arguments.push_back(layer.argument());
    const int status = second_moment(arguments, key_dtype, moment_dtype);
    CHECK(status == KE_OK, "status %d", status);
    double worst = 0.0;
    for (const Layer& layer : layers) worst = std::max(worst, layer.error());
    return worst;
}

/* Integers: every sum is exact in float, so the result must be, too. More than 2 x 4 x 32 tokens fill the pipeline of
 * copies more than twice. */
void exact() {
    const std::vector<std::vector<Shape>> cases = {
        {{1, 1, ALL, 0, 0, 0, 0}},
        {{8, 31, ALL, 0, 0, 0, 0}},
        {{136, 293, ALL, 8, 0, 0, 0}},                     /* aligned, two tiles a side, tails of both kinds */
        {{130, 265, ALL, 6, 0, 0, 0}},                     /* aligned, a chunk that ends inside 16 bytes */
        {{200, 97, ALL, 0, 3, 0, 0}},                      /* aligned stride, unaligned begin */
        {{131, 70, ALL, 0, 0, 0, 0}},                      /* unaligned stride */
        {{40, 300, ROWS, 0, 0, 411, 0}},
        {{37, 50, ROWS, 2, 1, 33, 0}},
        {{136, 290, MASK, 0, 0, 0, 40}},
        {{33, 45, MASK, 0, 0, 0, 60}},
        {{24, 64, MASK, 0, 0, 0, 100}},                    /* all masked */
        {{64, 0, ALL, 0, 0, 0, 0}},
        {{300, 32, ALL, 4, 0, 0, 0}},
        {{136, 20, ALL, 0, 0, 0, 0}, {5, 40, ALL, 0, 1, 0, 0}, {16, 0, ALL, 0, 0, 0, 0}, {8, 600, MASK, 0, 0, 0, 10},
         {48, 9, ROWS, 0, 0, 70, 0}},
    };
    uint64_t seed = 1;
    for (int key_dtype : {KE_BF16, KE_F16, KE_F32})
        for (const std::vector<Shape>& shapes : cases) {
            const int moment_dtype = ++seed % 2 ? KE_F64 : KE_F32;
            const double error = error_of(shapes, key_dtype, moment_dtype, true, seed);
            CHECK(error == 0.0, "keys of type %d, first d %lld, %lld tokens: error %g", key_dtype,
                  (long long)shapes[0].d, (long long)shapes[0].tokens, error);
        }
}

Shape random_shape(Random& random) {
    Shape s;
    s.d = random.one_of<int64_t>({1, 2, 7, 8, 63, 96, 127, 128, 129, 144, 257});
    s.tokens = random.one_of<int64_t>({0, 1, 2, 15, 16, 17, 32, 33, 95, 96, 97, 128, 260});
    s.choice = s.tokens == 0 ? ALL : random.one_of<Choice>({ALL, ROWS, MASK});
    s.extra_stride = random.integer(0, 1) ? 0 : random.one_of<int64_t>({1, 8, 8 - s.d % 8});
    s.offset = random.integer(0, 1) ? 0 : random.integer(0, 9);
    s.n_rows = random.integer(1, 300);
    s.masked_percent = random.one_of<int>({0, 20, 90, 100});
    return s;
}

void random_shapes() {
    Random random(7);
    for (int i = 0; i < 24; ++i) {
        std::vector<Shape> shapes(static_cast<size_t>(random.integer(1, 2)));
        for (Shape& shape : shapes) shape = random_shape(random);
        const int key_dtype = random.one_of<int>({KE_BF16, KE_F16, KE_F32});
        const int moment_dtype = random.one_of<int>({KE_F32, KE_F64});
        const double error = error_of(shapes, key_dtype, moment_dtype, true, random.bits());
        CHECK(error == 0.0, "case %d, keys of type %d, first d %lld, %lld tokens: error %g", i, key_dtype,
              (long long)shapes[0].d, (long long)shapes[0].tokens, error);
    }
}

/* Normal values: 16-bit keys lose only what float sums lose, float keys are not rounded to 16 bits. */
void rounding() {
    const Shape shape = {72, 600, ALL, 0, 0, 0, 0};
    const double limit = 1.5e-6;
    for (int key_dtype : {KE_BF16, KE_F16, KE_F32}) {
        const double error = error_of({shape}, key_dtype, KE_F64, false, 3);
        CHECK(error < limit, "keys of type %d: error %g", key_dtype, error);
    }
}

/* Long sums: one accumulator of a tensor core would lose 2e-5 of the diagonal here. */
void long_sum() {
    const double error = error_of({{8, 33000, ALL, 0, 0, 0, 0}}, KE_BF16, KE_F64, false, 5);
    CHECK(error < 2e-6, "error %g", error);
}

void refuses_wrong_arguments() {
    float keys[16] = {};
    double moment[16] = {};
    const int64_t rows[1] = {0};
    const uint8_t mask[4] = {};
    const ke_moment_layer good = {keys, 4, 4, 4, nullptr, 0, nullptr, moment, 4};
    auto status = [&](void (*spoil)(ke_moment_layer&)) {
        ke_moment_layer layer = good;
        spoil(layer);
        return second_moment({layer}, KE_F32, KE_F64);
    };
    CHECK(status([](ke_moment_layer&) {}) == KE_OK, "the good one");
    CHECK(status([](ke_moment_layer& l) { l.tokens = -1; }) == KE_BAD_ARGUMENT, "negative tokens");
    CHECK(status([](ke_moment_layer& l) { l.d = -1; }) == KE_BAD_ARGUMENT, "negative d");
    CHECK(status([](ke_moment_layer& l) { l.key_stride = 3; }) == KE_BAD_ARGUMENT, "short key stride");
    CHECK(status([](ke_moment_layer& l) { l.moment_stride = 3; }) == KE_BAD_ARGUMENT, "short moment stride");
    CHECK(status([](ke_moment_layer& l) { l.keys = nullptr; }) == KE_BAD_ARGUMENT, "no keys");
    CHECK(status([](ke_moment_layer& l) { l.moment = nullptr; }) == KE_BAD_ARGUMENT, "no moment");
    ke_moment_layer both = good;
    both.rows = rows, both.n_rows = 1, both.mask = mask;
    CHECK(second_moment({both}, KE_F32, KE_F64) == KE_BAD_ARGUMENT, "rows and mask");
    CHECK(second_moment({good}, KE_F64, KE_F64) == KE_BAD_DTYPE, "keys of type double");
    CHECK(second_moment({good}, KE_F32, KE_BF16) == KE_BAD_DTYPE, "moment of type bfloat16");
    CHECK(second_moment(std::vector<ke_moment_layer>(KE_MAX_LAYERS + 1, good), KE_F32, KE_F64) == KE_TOO_LARGE,
          "too many layers");
    CHECK(second_moment({}, KE_F32, KE_F64) == KE_OK, "no layers");
    for (double value : moment) CHECK(value == 0.0, "zero keys changed the moment");
}

/* On a device a row out of range must not read elsewhere: the kernel traps, which the emulator makes the test's end. */
void row_out_of_range() {
    float keys[16] = {};
    double moment[16] = {};
    const int64_t rows[2] = {1, 4};
    const ke_moment_layer layer = {keys, 4, 4, 4, rows, 2, nullptr, moment, 4};
    const int status = second_moment({layer}, KE_F32, KE_F64);
    CHECK(status == KE_BAD_ARGUMENT, "status %d", status);
}

}  // namespace

int main(int argc, char** argv) {
    return test::main_of(argc, argv,
                         {{"exact", exact},
                          {"random_shapes", random_shapes},
                          {"rounding", rounding},
                          {"long_sum", long_sum},
                          {"wrong_arguments", refuses_wrong_arguments},
                          {"row_out_of_range", row_out_of_range}});
}
