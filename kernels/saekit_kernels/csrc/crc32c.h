// crc32c of a buffer (Castagnoli's polynomial, reflected; RFC 3720, appendix B.4), by the processor's instruction where it has one.
//
// The instruction takes a new value each cycle and gives the result some cycles later, so three parts of the buffer are summed
// beside each other; a part's sum is moved over the next one by a table (the sum of what zeros follow is linear in its bits).
#pragma once

#include <array>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#define WITH_CRC __attribute__((target("sse4.2")))
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#define WITH_CRC
#endif

namespace saekit {

constexpr uint32_t POLYNOMIAL = 0x82f63b78;
constexpr int64_t CRC_PART = 512;

struct CrcTables {
    // Of a byte that so many zero bytes follow.
    std::array<std::array<uint32_t, 256>, 8> bytes{};
    // Of each byte of a sum that CRC_PART zero bytes follow.
    std::array<std::array<uint32_t, 256>, 4> part{};

    CrcTables() {
        for (uint32_t byte = 0; byte < 256; ++byte) {
            uint32_t crc = byte;
            for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? POLYNOMIAL : 0);
            bytes[0][byte] = crc;
        }
        for (int zeros = 1; zeros < 8; ++zeros)
            for (uint32_t byte = 0; byte < 256; ++byte) bytes[zeros][byte] = after_zeros(bytes[zeros - 1][byte], 1);
        for (int place = 0; place < 4; ++place)
            for (uint32_t byte = 1; byte < 256; ++byte) {
                const uint32_t lowest = byte & -byte;
                part[place][byte] = byte == lowest ? after_zeros(byte << 8 * place, CRC_PART)
                                                   : part[place][lowest] ^ part[place][byte ^ lowest];
            }
    }

    uint32_t after_zeros(uint32_t crc, int64_t count) const {
        for (int64_t at = 0; at < count; ++at) crc = bytes[0][crc & 255] ^ (crc >> 8);
        return crc;
    }

    uint32_t after_part(uint32_t crc) const {
        return part[0][crc & 255] ^ part[1][crc >> 8 & 255] ^ part[2][crc >> 16 & 255] ^ part[3][crc >> 24];
    }
};

static inline const CrcTables& crc_tables() {
    static const CrcTables tables;
    return tables;
}

// These take and give the sum without the complement at its beginning and end.
static inline uint32_t crc_by_tables(uint32_t crc, const uint8_t* data, int64_t size) {
    const auto& bytes = crc_tables().bytes;
    for (; size >= 8; data += 8, size -= 8) {
        crc ^= (uint32_t)data[0] | (uint32_t)data[1] << 8 | (uint32_t)data[2] << 16 | (uint32_t)data[3] << 24;
        crc = bytes[7][crc & 255] ^ bytes[6][crc >> 8 & 255] ^ bytes[5][crc >> 16 & 255] ^ bytes[4][crc >> 24] ^
              bytes[3][data[4]] ^ bytes[2][data[5]] ^ bytes[1][data[6]] ^ bytes[0][data[7]];
    }
    for (; size > 0; ++data, --size) crc = bytes[0][(crc ^ *data) & 255] ^ (crc >> 8);
    return crc;
}

#if defined(WITH_CRC)

static inline WITH_CRC uint32_t crc_step(uint32_t crc, const uint8_t* data) {
    uint64_t value;
    std::memcpy(&value, data, sizeof value);
#if defined(__x86_64__)
    return (uint32_t)_mm_crc32_u64(crc, value);
#else
    // As text, because compilers do not agree on how a function asks for this extension.
    asm(".arch_extension crc\n\tcrc32cx %w0, %w0, %x1" : "+r"(crc) : "r"(value));
    return crc;
#endif
}

static WITH_CRC uint32_t crc_by_instruction(uint32_t crc, const uint8_t* data, int64_t size) {
    const CrcTables& tables = crc_tables();
    for (; size >= 3 * CRC_PART; data += 3 * CRC_PART, size -= 3 * CRC_PART) {
        uint32_t second = 0, third = 0;
        for (int64_t at = 0; at < CRC_PART; at += 8) {
            crc = crc_step(crc, data + at);
            second = crc_step(second, data + at + CRC_PART);
            third = crc_step(third, data + at + 2 * CRC_PART);
        }
        crc = tables.after_part(tables.after_part(crc) ^ second) ^ third;
    }
    for (; size >= 8; data += 8, size -= 8) crc = crc_step(crc, data);
    return crc_by_tables(crc, data, size);
}

static inline bool has_crc_instruction() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("sse4.2");
#else
    return getauxval(AT_HWCAP) & (1 << 7);  // HWCAP_CRC32
#endif
}

#endif

static inline uint32_t crc32c(uint32_t crc, const uint8_t* data, int64_t size, bool by_tables) {
#if defined(WITH_CRC)
    static const bool has_instruction = has_crc_instruction();
    if (has_instruction && !by_tables) return ~crc_by_instruction(~crc, data, size);
#endif
    return ~crc_by_tables(~crc, data, size);
}

}  // namespace saekit
