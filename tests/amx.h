// The instructions for AMX and bf16 in plain code, for processors without them: what Intel's manual says that they do.
// It is included before anything else, and takes the place of the intrinsics of <immintrin.h>.

#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace plain {

struct Tile {
    uint8_t rows[16][64];
};

inline Tile &tile(int i) {
    static thread_local Tile tiles[8];
    return tiles[i];
}

inline float number(uint16_t bf16) {
    const uint32_t bits = uint32_t(bf16) << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

// To the nearest, the even one of two; a NaN stays one, and what is too small for a float of full precision is zero
inline uint16_t bf16(float number) {
    uint32_t bits;
    memcpy(&bits, &number, 4);
    if (std::isnan(number)) return bits >> 16 | 64;
    if (!(bits & 0x7F800000)) return bits >> 16 & 0x8000;
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

inline __m256i round_one(__m512 numbers) {
    alignas(64) float from[16];
    alignas(64) uint16_t to[16];
    _mm512_store_ps(from, numbers);
    for (int i = 0; i < 16; i++) to[i] = bf16(from[i]);
    return _mm256_load_si256((const __m256i *)to);
}

inline __m512i round_two(__m512 last, __m512 first) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(round_one(first)), round_one(last), 1);
}

inline void zero(int i) { memset(&tile(i), 0, sizeof(Tile)); }

inline void load(int i, const void *from, int64_t stride) {
    for (int row = 0; row < 16; row++) memcpy(tile(i).rows[row], (const char *)from + row * stride, 64);
}

inline void store(int i, void *to, int64_t stride) {
    for (int row = 0; row < 16; row++) memcpy((char *)to + row * stride, tile(i).rows[row], 64);
}

// Add products of pairs: a row of `left` has 16 of them, and a row of `right` one for each of 16 columns
inline void multiply(int to, int left, int right) {
    for (int row = 0; row < 16; row++)
        for (int k = 0; k < 16; k++)
            for (int column = 0; column < 16; column++) {
                float *sum = (float *)tile(to).rows[row] + column;
                const auto *x = (const uint16_t *)tile(left).rows[row] + 2 * k;
                const auto *y = (const uint16_t *)tile(right).rows[k] + 2 * column;
                *sum += number(x[0]) * number(y[0]);
                *sum += number(x[1]) * number(y[1]);
            }
}

}  // namespace plain

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _mm512_cvtneps_pbh plain::round_one
#define _mm512_cvtne2ps_pbh plain::round_two
#define _tile_zero plain::zero
#define _tile_loadd plain::load
#define _tile_stored plain::store
#define _tile_dpbf16ps plain::multiply
#define _tile_release() ((void)0)
