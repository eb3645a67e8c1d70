// Sparse sums: rows of a table gathered by bags of entries, dot products with them, and the reverse index.
#include "vectors.h"

using namespace saekit;

// Entries ahead that a row is asked for, and vectors that are summed in registers.
constexpr int64_t AHEAD = 16;
constexpr int64_t WIDE = 8;

struct Bags {
    const float* values;
    const int64_t* order;
    const int64_t* indices;
    const float* table;
    int64_t n, end;
};

// `sum` [COUNT vectors] at `column` += values * table rows over the entries first to last, in their order.
template <int64_t COUNT>
static inline void sum_columns(const Bags& bags, int64_t first, int64_t last, int64_t column, float* sum) {
    Floats acc[COUNT];
    for (int64_t at = 0; at < COUNT; ++at) acc[at] = load(sum + column + at * LANES);
    for (int64_t entry = first; entry < last; ++entry) {
        if (entry + AHEAD < bags.end)
            prefetch(bags.table + bags.indices[entry + AHEAD] * bags.n + column, COUNT * LANES);
        const float value = bags.values[bags.order ? bags.order[entry] : entry];
        const float* row = bags.table + bags.indices[entry] * bags.n + column;
        for (int64_t at = 0; at < COUNT; ++at) acc[at] += value * load(row + at * LANES);
    }
    for (int64_t at = 0; at < COUNT; ++at) store(sum + column + at * LANES, acc[at]);
}

static inline void sum_bag(const Bags& bags, int64_t first, int64_t last, float* sum) {
    int64_t column = 0;
    for (; column + WIDE * LANES <= bags.n; column += WIDE * LANES) sum_columns<WIDE>(bags, first, last, column, sum);
    for (; column + LANES <= bags.n; column += LANES) sum_columns<1>(bags, first, last, column, sum);
    for (; column < bags.n; ++column)
        for (int64_t entry = first; entry < last; ++entry)
            sum[column] += bags.values[bags.order ? bags.order[entry] : entry] * bags.table[bags.indices[entry] * bags.n + column];
}

// out[b] = sum over the entries e of offsets[b] to offsets[b + 1] of values[order[e]] * table[indices[e]], plus bias.
//
// values are read at e itself where `order` is null; no bias where `bias` is null; table rows and out have n columns.
EXPORT void saekit_bag_sums(const float* values, const int64_t* order, const int64_t* indices, const int64_t* offsets,
                            const float* table, const float* bias, float* out, int64_t bags, int64_t n, int64_t threads) {
    const Bags all{values, order, indices, table, n, offsets[bags]};
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads)
    for (int64_t bag = 0; bag < bags; ++bag) {
        float* sum = out + bag * n;
        if (bias)
            std::memcpy(sum, bias, sizeof(float) * n);
        else
            std::memset(sum, 0, sizeof(float) * n);
        sum_bag(all, offsets[bag], offsets[bag + 1], sum);
    }
}

// out[e] = <rows[r], table[indices[e]]> for the entries e of offsets[r] to offsets[r + 1].
EXPORT void saekit_bag_dots(const float* rows, const int64_t* indices, const int64_t* offsets, const float* table, float* out,
                            int64_t bags, int64_t n, int64_t threads) {
    const int64_t end = offsets[bags];
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads)
    for (int64_t bag = 0; bag < bags; ++bag)
        for (int64_t entry = offsets[bag]; entry < offsets[bag + 1]; ++entry) {
            if (entry + 4 < end) prefetch(table + indices[entry + 4] * n, n);
            out[entry] = dot(rows + bag * n, table + indices[entry] * n, n);
        }
}

// out[b] = sum of values[order[e]] over the entries of bag b.
EXPORT void saekit_value_sums(const float* values, const int64_t* order, const int64_t* offsets, float* out, int64_t bags,
                              int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t bag = 0; bag < bags; ++bag) {
        double sum = 0.0;
        for (int64_t entry = offsets[bag]; entry < offsets[bag + 1]; ++entry) sum += values[order[entry]];
        out[bag] = (float)sum;
    }
}
