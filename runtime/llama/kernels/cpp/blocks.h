// What blocks of ggml's quantised types hold, as ggml/src/ggml-quants.c reads them.

#pragma once

#include "registers.h"

#include <cstdint>
#include <cstring>

inline float half(const uint8_t *x) {
    uint16_t bits;
    memcpy(&bits, x, 2);
    return _cvtsh_ss(bits);
}

inline __m256i bits(__m256i x, int shift, int mask) {
    return _mm256_and_si256(_mm256_srli_epi16(x, shift), _mm256_set1_epi8(mask));
}

// 16 bytes: the lower four bits of each, then the upper ones
inline __m256i nibbles(const uint8_t *x) {
    const __m128i bytes = _mm_loadu_si128((const __m128i *)x);
    return bits(_mm256_set_m128i(_mm_srli_epi16(bytes, 4), bytes), 0, 15);
}

// Factor and least of the codes in the i-th eighth of a block of Q4_K or Q5_K: a value is factor * code - least
struct KScale {
    float factor, least;
};

inline KScale k_scale(const uint8_t *x, int i) {
    const uint8_t *s = x + 4;
    const int scale = i < 4 ? s[i] & 63 : (s[i + 4] & 15) | s[i - 4] >> 6 << 4;
    const int least = i < 4 ? s[i + 4] & 63 : s[i + 4] >> 4 | s[i] >> 6 << 4;
    return {half(x) * scale, half(x + 2) * least};
}

// Codes of the i-th eighth of a block, 32 each
inline __m256i q4_k_codes(const uint8_t *x, int i) { return bits(load(x + 16 + i / 2 * 32), i % 2 * 4, 15); }

inline __m256i q5_k_codes(const uint8_t *x, int i) {
    const __m256i low = bits(load(x + 48 + i / 2 * 32), i % 2 * 4, 15), fifth = bits(load(x + 16), i, 1);
    return _mm256_or_si256(low, _mm256_slli_epi16(fifth, 4));
}

inline __m256i q6_k_codes(const uint8_t *x, int i) {
    const int part = i / 4, j = i % 4;
    const __m256i low = bits(load(x + 64 * part + j % 2 * 32), j / 2 * 4, 15);
    const __m256i high = _mm256_slli_epi16(bits(load(x + 128 + 32 * part), 2 * j, 3), 4);
    return _mm256_or_si256(low, high);
}

inline const int8_t *q6_k_scales(const uint8_t *x, int i) { return (const int8_t *)x + 192 + 2 * i; }  // two

inline __m256i q5_0_codes(const uint8_t *x) {
    uint32_t fifth;
    memcpy(&fifth, x + 2, 4);
    const __m256i low = nibbles(x + 6);
    return _mm256_mask_add_epi8(low, fifth, low, _mm256_set1_epi8(16));
}

inline int iq4_xs_scale(const uint8_t *x, int i) {
    uint16_t upper;
    memcpy(&upper, x + 2, 2);
    return ((x[4 + i / 2] >> 4 * (i % 2) & 15) | (upper >> 2 * i & 3) << 4) - 32;
}
