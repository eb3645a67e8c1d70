// Vectors as wide as the machine's, and the few operations on them that the kernels need.
//
// Sums use the compiler's vector types, so that the same source serves AVX-512, AVX2 and any other machine; only the
// comparison that yields a bit mask needs intrinsics. Every sum has one fixed order, whatever the number of threads.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace saekit {

#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
#elif defined(__AVX2__)
constexpr int64_t LANES = 8;
#else
constexpr int64_t LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));

static inline Floats load(const float* from) {
    Floats value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

static inline void store(float* to, Floats value) { std::memcpy(to, &value, sizeof value); }

static inline Floats broadcast(float value) { return Floats{} + value; }

static inline float total(Floats value) {
    float sum = 0.0f;
    for (int64_t lane = 0; lane < LANES; ++lane) sum += value[lane];
    return sum;
}

// Bit l is set where lane l of `value` is not <= that of `bound`: NaN counts as above everything.
static inline uint64_t bits_above(Floats value, Floats bound) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)value, (__m512)bound, _CMP_NLE_UQ);
#elif defined(__AVX2__)
    return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps((__m256)value, (__m256)bound, _CMP_NLE_UQ));
#else
    uint64_t bits = 0;
    for (int64_t lane = 0; lane < LANES; ++lane) bits |= (uint64_t) !(value[lane] <= bound[lane]) << lane;
    return bits;
#endif
}

// Bits of the 64 sums z + bias that are not <= bound; a bound of `step` 0 is one for all columns.
static inline uint64_t word_above(const float* z, const float* bias, const float* bound, int64_t step) {
    uint64_t word = 0;
    for (int64_t lane = 0; lane < 64; lane += LANES) {
        const Floats edge = step ? load(bound + lane) : broadcast(*bound);
        word |= bits_above(load(z + lane) + load(bias + lane), edge) << lane;
    }
    return word;
}

// sum of a * b over n places, in four interleaved parts.
static inline float dot(const float* a, const float* b, int64_t n) {
    Floats parts[4] = {};
    int64_t place = 0;
    for (; place + 4 * LANES <= n; place += 4 * LANES)
        for (int64_t part = 0; part < 4; ++part)
            parts[part] += load(a + place + part * LANES) * load(b + place + part * LANES);
    for (; place + LANES <= n; place += LANES) parts[0] += load(a + place) * load(b + place);
    float sum = total((parts[0] + parts[1]) + (parts[2] + parts[3]));
    for (; place < n; ++place) sum += a[place] * b[place];
    return sum;
}

// Asks for a row that is read soon: rows of a gather lie anywhere, and no hardware foresees them.
static inline void prefetch(const float* row, int64_t n) {
    for (int64_t place = 0; place < n; place += 16) __builtin_prefetch(row + place, 0, 3);
}

}  // namespace saekit
