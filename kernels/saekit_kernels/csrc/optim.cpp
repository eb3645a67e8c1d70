// The optimizer pass: projection, scaling, Adam, renormalisation and a bfloat16 copy in one read and write of each row.
#include <algorithm>
#include <limits>

#include "vectors.h"

using namespace saekit;

struct Adam {
    float scale, step_size, beta1, beta2, eps, root_correction;
};

// One element; `gradient` is projected and not yet scaled.
template <class T>
static inline T adam(T weight, T gradient, T& mean, T& square, const Adam& a, T (*root)(T)) {
    gradient *= a.scale;
    mean += (1.0f - a.beta1) * (gradient - mean);
    square = a.beta2 * square + (1.0f - a.beta2) * gradient * gradient;
    return weight - a.step_size * mean / (root(square) / a.root_correction + a.eps);
}

static inline Floats root_of(Floats value) {
#if defined(__AVX512F__)
    return (Floats)_mm512_sqrt_ps((__m512)value);
#elif defined(__AVX2__)
    return (Floats)_mm256_sqrt_ps((__m256)value);
#else
    for (int64_t lane = 0; lane < LANES; ++lane) value[lane] = std::sqrt(value[lane]);
    return value;
#endif
}

static inline float root_of_one(float value) { return std::sqrt(value); }

static inline void adam_row(float* weight, const float* gradient, float* mean, float* square, int64_t n, float along,
                            const Adam& a) {
    int64_t place = 0;
    for (; place + LANES <= n; place += LANES) {
        const Floats w = load(weight + place);
        Floats m = load(mean + place), v = load(square + place);
        const Floats next = adam<Floats>(w, load(gradient + place) - along * w, m, v, a, root_of);
        store(weight + place, next);
        store(mean + place, m);
        store(square + place, v);
    }
    for (; place < n; ++place) {
        const float w = weight[place];
        weight[place] = adam<float>(w, gradient[place] - along * w, mean[place], square[place], a, root_of_one);
    }
}

// Round to nearest, ties to even; NaN stays NaN.
static inline uint16_t bfloat16_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (value != value) return (uint16_t)(bits >> 16 | 0x40u);
    return (uint16_t)((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

// Adam on weight, mean and square of `size` elements, in rows of n (the last may be shorter).
//
// unit_rows: the gradient's part along each row is removed first, and the row is scaled to norm 1 afterwards.
// shadow: bfloat16 bits of the new weight, or null.
EXPORT void saekit_adam(float* weight, const float* gradient, float* mean, float* square, uint16_t* shadow, int64_t size,
                        int64_t n, double scale, double step_size, double beta1, double beta2, double eps,
                        double root_correction, int64_t unit_rows, int64_t threads) {
    const Adam a{(float)scale, (float)step_size, (float)beta1, (float)beta2, (float)eps, (float)root_correction};
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t start = 0; start < size; start += n) {
        const int64_t length = std::min(n, size - start);
        float* row = weight + start;
        const float along = unit_rows ? dot(gradient + start, row, length) : 0.0f;
        adam_row(row, gradient + start, mean + start, square + start, length, along, a);
        if (unit_rows) {
            const float norm = std::max(std::sqrt(dot(row, row, length)), std::numeric_limits<float>::min());
            for (int64_t place = 0; place < length; ++place) row[place] /= norm;
        }
        if (shadow)
            for (int64_t place = 0; place < length; ++place) shadow[start + place] = bfloat16_of(row[place]);
    }
}

// out[r] = sum of squares of row r of the gradient, less its part along the row of the weight where `weight` is given.
EXPORT void saekit_gradient_square(const float* weight, const float* gradient, double* out, int64_t size, int64_t n,
                                   int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t start = 0; start < size; start += n) {
        const int64_t length = std::min(n, size - start);
        const float* g = gradient + start;
        const float* w = weight ? weight + start : g;
        const float along = weight ? dot(g, w, length) : 0.0f;
        Floats parts{};
        int64_t place = 0;
        for (; place + LANES <= length; place += LANES) {
            const Floats rest = load(g + place) - along * load(w + place);
            parts += rest * rest;
        }
        double sum = 0.0;
        for (int64_t lane = 0; lane < LANES; ++lane) sum += parts[lane];
        for (; place < length; ++place) {
            const double rest = g[place] - along * w[place];
            sum += rest * rest;
        }
        out[start / n] = sum;
    }
}
