// Selection among pre-activations: the k largest of each row, or all above a bound.
#include <algorithm>
#include <functional>
#include <limits>
#include <vector>

#include "vectors.h"

namespace saekit {

// Place in the order of values: NaN above every number, the two zeros equal.
static inline uint32_t rank_of(float value) {
    if (value != value) return std::numeric_limits<uint32_t>::max();
    if (value == 0.0f) return 0x80000000u;
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

static inline float value_of(uint32_t rank) {
    if (rank == std::numeric_limits<uint32_t>::max()) return std::numeric_limits<float>::quiet_NaN();
    const uint32_t bits = rank >> 31 ? rank ^ 0x80000000u : ~rank;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Sorts falling as the selection is ordered: by value, lowest column first among equals.
static inline uint64_t key_of(float value, int64_t column) {
    return (uint64_t)rank_of(value) << 32 | (uint32_t) ~(uint32_t)column;
}

// The k largest of one row so far, and whatever came since; one pass over the row. A later column wins only by being
// larger than the k-th largest so far, so few columns become candidates: about k * log(F / 8k) in random order.
class Candidates {
   public:
    explicit Candidates(int64_t k) : k_(k), room_(std::max<int64_t>(8 * k, 256)), keys_(room_ + 64) {}

    // Fills keys() with the k largest of z + bias [columns], in order.
    void select(const float* z, const float* bias, int64_t columns) {
        count_ = 0;
        int64_t column = 0;
        for (; column < std::min(columns, room_); ++column) add(z, bias, column);
        prune();
        for (; column + 64 <= columns && bound_ == bound_; column += 64) {
            for (uint64_t word = word_above(z + column, bias + column, &bound_, 0); word; word &= word - 1)
                add(z, bias, column + __builtin_ctzll(word));
            if (count_ > room_) prune();
        }
        // A k-th largest that is NaN cannot be passed.
        for (; column < columns && bound_ == bound_; ++column)
            if (!(z[column] + bias[column] <= bound_)) add(z, bias, column);
        prune();
        std::sort(keys_.begin(), keys_.begin() + count_, std::greater<uint64_t>());
    }

    const uint64_t* keys() const { return keys_.data(); }

   private:
    void add(const float* z, const float* bias, int64_t column) { keys_[count_++] = key_of(z[column] + bias[column], column); }

    void prune() {
        if (count_ > k_) {
            std::nth_element(keys_.begin(), keys_.begin() + (k_ - 1), keys_.begin() + count_, std::greater<uint64_t>());
            count_ = k_;
        }
        if (count_ == k_) bound_ = value_of(*std::min_element(keys_.begin(), keys_.begin() + count_) >> 32);
    }

    int64_t k_, room_, count_ = 0;
    float bound_ = -std::numeric_limits<float>::infinity();
    std::vector<uint64_t> keys_;
};

}  // namespace saekit

using namespace saekit;

// values [rows, k] = relu of the k largest of z [rows, columns] + bias [columns] per row, indices [rows, k] their columns.
EXPORT void saekit_topk(const float* z, const float* bias, float* values, int64_t* indices, int64_t rows, int64_t columns,
                        int64_t k, int64_t threads) {
#pragma omp parallel num_threads(threads)
    {
        Candidates candidates(k);
#pragma omp for schedule(dynamic, 8)
        for (int64_t row = 0; row < rows; ++row) {
            candidates.select(z + row * columns, bias, columns);
            for (int64_t place = 0; place < k; ++place) {
                const uint64_t key = candidates.keys()[place];
                const float value = value_of(key >> 32);
                values[row * k + place] = value <= 0.0f ? 0.0f : value;
                indices[row * k + place] = (int64_t)(uint32_t) ~(uint32_t)key;
            }
        }
    }
}

// Bit c % 64 of bits [rows, words] is set where z + bias is not <= bound [columns]; counts [rows] of them.
EXPORT void saekit_mark_above(const float* z, const float* bias, const float* bound, uint64_t* bits, int64_t* counts,
                              int64_t rows, int64_t columns, int64_t words, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; ++row) {
        const float* here = z + row * columns;
        int64_t column = 0, count = 0;
        uint64_t* out = bits + row * words;
        for (; column + 64 <= columns; column += 64) {
            const uint64_t word = word_above(here + column, bias + column, bound + column, 1);
            count += __builtin_popcountll(word);
            *out++ = word;
        }
        if (column < columns) {
            uint64_t word = 0;
            for (int64_t at = column; at < columns; ++at)
                word |= (uint64_t) !(here[at] + bias[at] <= bound[at]) << (at - column);
            count += __builtin_popcountll(word);
            *out = word;
        }
        counts[row] = count;
    }
}

// Writes the marked entries of each row to values and indices, from starts [rows] on.
EXPORT void saekit_take_marked(const float* z, const float* bias, const uint64_t* bits, const int64_t* starts, float* values,
                               int64_t* indices, int64_t rows, int64_t columns, int64_t words, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; ++row) {
        int64_t place = starts[row];
        for (int64_t at = 0; at < words; ++at)
            for (uint64_t word = bits[row * words + at]; word; word &= word - 1) {
                const int64_t column = at * 64 + __builtin_ctzll(word);
                values[place] = z[row * columns + column] + bias[column];
                indices[place++] = column;
            }
    }
}
