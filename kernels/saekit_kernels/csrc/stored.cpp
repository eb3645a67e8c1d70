// Stored rows: chunks of files read into their places and checked, and rows gathered as float32.
#include <sys/uio.h>

#include <algorithm>
#include <vector>

#include "crc32c.h"
#include "vectors.h"

using namespace saekit;

constexpr int64_t CRC_BYTES = 4;
// Read at a time, so that it is still near the processor when it is checked.
constexpr int64_t RUN_BYTES = 1 << 17;
// Of one call of the system: up to three a chunk.
constexpr int64_t RUN_CHUNKS = 1024 / 3;
// What lies between chunks that are read in one go.
constexpr int64_t GAP_BYTES = 64;

struct Chunks {
    const int64_t *files, *offsets, *lengths, *sizes;
    int64_t count;

    // Bytes between the end of a chunk with its crc32c and the next chunk; negative where that is another file's or before it.
    int64_t gap(int64_t chunk) const {
        if (files[chunk] != files[chunk + 1]) return -1;
        return offsets[chunk + 1] - offsets[chunk] - lengths[chunk] - CRC_BYTES;
    }
};

// The first sizes[c] bytes of each chunk go to `out`, one chunk after another. A chunk has lengths[c] bytes from offsets[c] of the
// open file files[c] on, and its crc32c behind them. Returns in `whole` how many of the chunks are read and right, in their order.
EXPORT void saekit_read_chunks(const int64_t* files, const int64_t* offsets, const int64_t* lengths, const int64_t* sizes,
                               uint8_t* out, int64_t* whole, int64_t count, int64_t by_tables) {
    const Chunks chunks{files, offsets, lengths, sizes, count};
    std::vector<uint8_t> aside;
    std::vector<iovec> parts;
    *whole = 0;
    for (int64_t first = 0, last; first < count; first = last) {
        int64_t needed = lengths[first] + CRC_BYTES, scratch = lengths[first] - sizes[first] + CRC_BYTES;
        for (last = first + 1; last < count && last - first < RUN_CHUNKS; ++last) {
            const int64_t gap = chunks.gap(last - 1), more = gap + lengths[last] + CRC_BYTES;
            if (gap < 0 || gap >= GAP_BYTES || needed + more > RUN_BYTES) break;
            needed += more;
            scratch += gap + lengths[last] - sizes[last] + CRC_BYTES;
        }
        // Aside: what is not wanted of a chunk, its crc32c, and what lies before the next one.
        if ((int64_t)aside.size() < scratch) aside.resize(scratch);
        parts.clear();
        uint8_t *place = out, *rest = aside.data();
        for (int64_t chunk = first; chunk < last; ++chunk) {
            if (sizes[chunk]) parts.push_back({place, (size_t)sizes[chunk]});
            const int64_t gap = chunk + 1 < last ? chunks.gap(chunk) : 0;
            const int64_t left = lengths[chunk] - sizes[chunk] + CRC_BYTES + gap;
            parts.push_back({rest, (size_t)left});
            place += sizes[chunk];
            rest += left;
        }
        if (preadv((int)files[first], parts.data(), (int)parts.size(), offsets[first]) != needed) return;
        rest = aside.data();
        for (int64_t chunk = first; chunk < last; ++chunk) {
            const int64_t left = lengths[chunk] - sizes[chunk];
            const uint32_t crc = crc32c(crc32c(0, out, sizes[chunk], by_tables), rest, left, by_tables);
            rest += left;
            const uint32_t stored =
                (uint32_t)rest[0] | (uint32_t)rest[1] << 8 | (uint32_t)rest[2] << 16 | (uint32_t)rest[3] << 24;
            if (crc != stored) return;
            out += sizes[chunk];
            rest += CRC_BYTES + (chunk + 1 < last ? chunks.gap(chunk) : 0);
            ++*whole;
        }
    }
}

static inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

static inline void widen(const float* from, float* to, int64_t n) { std::memcpy(to, from, sizeof(float) * n); }

struct BFloat16 {
    uint16_t bits;
};

static inline void widen(const BFloat16* from, float* to, int64_t n) {
    for (int64_t place = 0; place < n; ++place) to[place] = float_of((uint32_t)from[place].bits << 16);
}

struct Float16 {
    uint16_t bits;
};

static inline void widen(const Float16* from, float* to, int64_t n) {
    int64_t place = 0;
#if defined(__F16C__)
    for (; place + 8 <= n; place += 8)
        _mm256_storeu_ps(to + place, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + place))));
#endif
    for (; place < n; ++place) {
        const uint32_t bits = from[place].bits, sign = (bits & 0x8000) << 16, rest = (bits & 0x7fff) << 13;
        // Exponents are 112 less than a float32's; infinities keep the largest one, and so does NaN, which becomes a quiet one.
        float value = float_of(rest) * 0x1p112f;
        if (rest >= 0x7c00u << 13) value = float_of(rest | 0x7f800000 | (rest > 0x7c00u << 13 ? 0x400000 : 0));
        uint32_t found;
        std::memcpy(&found, &value, sizeof found);
        to[place] = float_of(found | sign);
    }
}

// Rows ahead that are asked for: each is of many lines of the cache.
constexpr int64_t ROWS_AHEAD = 8;

template <typename Number>
static void gather(const Number* rows, const int64_t* indices, float* out, int64_t count, int64_t n, int64_t step,
                   int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < count; ++row) {
        if (row + ROWS_AHEAD < count) {
            const char* next = (const char*)(rows + indices[row + ROWS_AHEAD] * n);
            for (int64_t byte = 0; byte < n * (int64_t)sizeof(Number); byte += 64) __builtin_prefetch(next + byte, 0, 3);
        }
        widen(rows + indices[row] * n, out + row * step, n);
    }
}

// out[r * step + c] = rows[indices[r] * n + c] as float32; number: 0 float32, 1 bfloat16, 2 float16.
EXPORT void saekit_gather_rows(const void* rows, const int64_t* indices, float* out, int64_t count, int64_t n, int64_t step,
                               int64_t number, int64_t threads) {
    if (number == 0)
        gather((const float*)rows, indices, out, count, n, step, threads);
    else if (number == 1)
        gather((const BFloat16*)rows, indices, out, count, n, step, threads);
    else
        gather((const Float16*)rows, indices, out, count, n, step, threads);
}
