// Products of matrices and inputs on AMX. Weights and inputs become bf16, products are summed up in F32, and 32 rows of
// weights are unpacked once for all tokens of a batch. F16 weights, and the inputs of F16 and BF16 ones, become the sum
// of two bf16, which keeps 16 bits where llama.cpp rounds inputs to the weights' type.

#pragma once

#include "blocks.h"
#include "ggml.h"
#include "memory.h"
#include "panels.h"
#include "registers.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

constexpr int SIDE = 16, DEPTH = 32, TILE = SIDE * DEPTH;  // a tile: 16 rows of 32 bf16
constexpr int ROWS = 2 * SIDE, COLUMNS = 1024;             // of a matrix that are unpacked together
constexpr int STEP = 2 * TILE + DEPTH;                     // from 32 of them to the next, apart in the L1 cache
constexpr int PART = COLUMNS / DEPTH * STEP;  // unpacked weights; those that were rounded off follow them

// The unpacked columns of one row of a matrix: 32 at a time, the same place in tile after tile.
struct Row {
    uint16_t *to;
    __m512i *rests;  // the bits of all that were rounded off
    void put(__m512i values) {
        _mm512_store_si512(to, values);
        to += STEP;
    }
    void put(__m512i values, __m512i rest) {
        _mm512_store_si512(to + PART, rest);
        *rests = _mm512_or_si512(*rests, rest);
        put(values);
    }
};

using Unpack = void (*)(const uint8_t *blocks, int64_t n_columns, Row row);

// first, first + 1, ... first + 15
inline __m512 count(float first) {
    return _mm512_add_ps(_mm512_set1_ps(first), _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
}

inline __m512 times(float factor, __m512 values) { return _mm512_mul_ps(_mm512_set1_ps(factor), values); }

// 32 numbers as bf16
inline __m512i round(__m512 first, __m512 last) { return (__m512i)_mm512_cvtne2ps_pbh(last, first); }

// What `round` took away from them
inline __m512i rest(__m512 first, __m512 last, __m512i rounded) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(rounded));
    const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(rounded, 1));
    return round(_mm512_sub_ps(first, (__m512)_mm512_slli_epi32(low, 16)),
                 _mm512_sub_ps(last, (__m512)_mm512_slli_epi32(high, 16)));
}

// The bf16 of 32 codes of 4 bits, whose values are given
inline __m512i look_up(__m512 values, __m256i codes) {
    const __m512i table = _mm512_castsi256_si512((__m256i)_mm512_cvtneps_pbh(values));
    return _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(codes), table);
}

// The same of codes of 5 bits
inline __m512i look_up(__m512 low, __m512 high, __m256i codes) {
    return _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(codes), round(low, high));
}

// The bf16 of 32 signed codes of 8 bits, with a factor for each half
inline __m512i scaled(__m256i codes, float low, float high) {
    const __m512 first = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(codes)));
    const __m512 last = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(codes, 1)));
    return round(times(low, first), times(high, last));
}

void unpack_f32(const uint8_t *x, int64_t n, Row row) {
    for (; n > 0; n -= 32, x += 128) {
        const __m512 first = _mm512_loadu_ps(x), last = _mm512_loadu_ps(x + 64);
        const __m512i values = round(first, last);
        row.put(values, rest(first, last, values));
    }
}

void unpack_f16(const uint8_t *x, int64_t n, Row row) {
    for (; n > 0; n -= 32, x += 64) {
        const __m512 first = _mm512_cvtph_ps(load(x)), last = _mm512_cvtph_ps(load(x + 32));
        const __m512i values = round(first, last);
        row.put(values, rest(first, last, values));
    }
}

void unpack_bf16(const uint8_t *x, int64_t n, Row row) {
    for (; n > 0; n -= 32, x += 64) row.put(_mm512_loadu_si512(x));
}

void unpack_q8_0(const uint8_t *x, int64_t n, Row row) {
    for (; n > 0; n -= 32, x += 34) row.put(scaled(load(x + 2), half(x), half(x)));
}

void unpack_q4_0(const uint8_t *x, int64_t n, Row row) {
    for (; n > 0; n -= 32, x += 18) row.put(look_up(times(half(x), count(-8)), nibbles(x + 2)));
}

void unpack_q5_0(const uint8_t *x, int64_t n, Row row) {
    for (; n > 0; n -= 32, x += 22)
        row.put(look_up(times(half(x), count(-16)), times(half(x), count(0)), q5_0_codes(x)));
}

inline __m512 iq4_values() {
    return _mm512_setr_ps(-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113);
}

void unpack_iq4_nl(const uint8_t *x, int64_t n, Row row) {
    for (; n > 0; n -= 32, x += 18) row.put(look_up(times(half(x), iq4_values()), nibbles(x + 2)));
}

void unpack_iq4_xs(const uint8_t *x, int64_t n, Row row) {
    for (; n > 0; n -= 256, x += 136)
        for (int i = 0; i < 8; i++)
            row.put(look_up(times(half(x) * iq4_xs_scale(x, i), iq4_values()), nibbles(x + 8 + 16 * i)));
}

// The values of codes from `first` on in the i-th eighth of a block of Q4_K or Q5_K
inline __m512 k_values(const uint8_t *x, int i, float first) {
    const KScale scale = k_scale(x, i);
    return _mm512_fmsub_ps(_mm512_set1_ps(scale.factor), count(first), _mm512_set1_ps(scale.least));
}

void unpack_q4_k(const uint8_t *x, int64_t n, Row row) {
    for (; n > 0; n -= 256, x += 144)
        for (int i = 0; i < 8; i++)
            row.put(look_up(k_values(x, i, 0), q4_k_codes(x, i)));
}

void unpack_q5_k(const uint8_t *x, int64_t n, Row row) {
    for (; n > 0; n -= 256, x += 176)
        for (int i = 0; i < 8; i++)
            row.put(look_up(k_values(x, i, 0), k_values(x, i, 16), q5_k_codes(x, i)));
}

void unpack_q6_k(const uint8_t *x, int64_t n, Row row) {
    for (; n > 0; n -= 256, x += 210)
        for (int i = 0; i < 8; i++) {
            const __m256i codes = _mm256_sub_epi8(q6_k_codes(x, i), _mm256_set1_epi8(32));
            const int8_t *scales = q6_k_scales(x, i);
            row.put(scaled(codes, half(x + 208) * scales[0], half(x + 208) * scales[1]));
        }
}

Unpack unpack_of(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F32: return unpack_f32;
        case GGML_TYPE_F16: return unpack_f16;
        case GGML_TYPE_BF16: return unpack_bf16;
        case GGML_TYPE_Q8_0: return unpack_q8_0;
        case GGML_TYPE_Q6_K: return unpack_q6_k;
        case GGML_TYPE_Q5_K: return unpack_q5_k;
        case GGML_TYPE_Q5_0: return unpack_q5_0;
        case GGML_TYPE_Q4_K: return unpack_q4_k;
        case GGML_TYPE_Q4_0: return unpack_q4_0;
        case GGML_TYPE_IQ4_NL: return unpack_iq4_nl;
        case GGML_TYPE_IQ4_XS: return unpack_iq4_xs;
        default: return nullptr;
    }
}

void configure_tiles() {
    alignas(64) uint8_t configuration[64] = {1};
    for (int i = 0; i < 8; i++) {
        configuration[16 + 2 * i] = 2 * DEPTH;  // bytes of a row
        configuration[48 + i] = SIDE;
    }
    // Not _tile_loadconfig: GCC 12 believes that it reads 16 bytes, and drops what is written to the others.
    asm volatile("ldtilecfg %0" ::"m"(configuration));
}

// Tiles of 16 inputs: each row holds two columns of all of them, as the unit wants its right side. What is rounded off
// goes to the tiles of `rests`, if there are any.
void pack_inputs(const ggml_tensor *inputs, int64_t first_input, uint16_t *to, uint16_t *rests) {
    const int64_t n_columns = inputs->ne[0], n_inputs = inputs->ne[1];
    for (int64_t k = 0; k < n_columns; k += DEPTH, to += TILE) {
        __m512i values[SIDE] = {}, others[SIDE] = {};
        for (int i = 0; i < SIDE && first_input + i < n_inputs; i++) {
            const float *x = (const float *)((const char *)inputs->data + (first_input + i) * inputs->nb[1]) + k;
            const __m512 first = _mm512_loadu_ps(x), last = _mm512_loadu_ps(x + 16);
            values[i] = round(first, last);
            if (rests) others[i] = rest(first, last, values[i]);
        }
        transpose(values);
        for (int i = 0; i < SIDE; i++) _mm512_store_si512(to + i * DEPTH, values[i]);
        if (rests) {
            transpose(others);
            for (int i = 0; i < SIDE; i++) _mm512_store_si512(rests + i * DEPTH, others[i]);
            rests += TILE;
        }
    }
}

void zero_results() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// Add 32 rows of a matrix times one or two tiles of inputs: results in tiles 0 to 3, weights in 4 and 5, inputs in 6, 7
template <bool two>
inline void multiply(const uint16_t *weights, const uint16_t *first, const uint16_t *second, int64_t n_tiles) {
    for (int64_t t = 0; t < n_tiles; t++) {
        _tile_loadd(4, weights + t * STEP, 64);
        _tile_loadd(6, first + t * TILE, 64);
        _tile_loadd(5, weights + t * STEP + TILE, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        if (two) {
            _tile_loadd(7, second + t * TILE, 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
}

// A tile of results, a column for each input, becomes 16 columns of the rows of `to` from `first` on
void put_results(const float *tile, ggml_tensor *to, int64_t first, int64_t column, bool is_added) {
    __m512i r[SIDE];
    for (int i = 0; i < SIDE; i++) r[i] = _mm512_load_si512(tile + i * SIDE);
    transpose(r);
    const int64_t n = std::min<int64_t>(SIDE, to->ne[1] - first);
    for (int64_t i = 0; i < n; i++) put(result_of(to, first + i, column), _mm512_castsi512_ps(r[i]), is_added);
}

// The inputs of a product as bf16, for as long as the next products have the same
struct Inputs {
    Memory memory;
    const ggml_tensor *packed = nullptr;  // what `memory` holds
    bool has_rests = false;
};

// The product of a matrix and inputs; false without memory
bool multiply_all_tiles(Inputs &kept, ggml_tensor *result, int n_threads) {
    const ggml_tensor *matrix = result->src[0], *inputs = result->src[1];
    const int64_t n_columns = matrix->ne[0], n_groups = matrix->ne[1] / ROWS;
    const int64_t n_across = n_columns / DEPTH, n_down = (inputs->ne[1] + SIDE - 1) / SIDE;  // tiles of inputs
    const int64_t part = n_down * n_across * TILE;
    const Unpack unpack = unpack_of(matrix->type);
    const bool is_exact = !ggml_is_quantized(matrix->type);
    const bool are_packed = kept.packed == inputs && kept.has_rests == is_exact;
    auto *packed = kept.memory.reserve<uint16_t>(is_exact ? 2 * part : part);
    if (!packed) return false;
    kept.packed = inputs;
    kept.has_rests = is_exact;
#pragma omp parallel num_threads(n_threads)
    {
        configure_tiles();
        if (!are_packed) {
#pragma omp for
            for (int64_t m = 0; m < n_down; m++) {
                uint16_t *to = packed + m * n_across * TILE;
                pack_inputs(inputs, m * SIDE, to, is_exact ? to + part : nullptr);
            }
        }
        alignas(64) uint16_t weights[2 * PART];
        alignas(64) float results[4 * SIDE * SIDE];
#pragma omp for schedule(dynamic)
        for (int64_t group = 0; group < n_groups; group++) {
            for (int64_t k = 0; k < n_columns; k += COLUMNS) {
                const int64_t n = std::min<int64_t>(COLUMNS, n_columns - k);
                const auto *blocks = (const uint8_t *)matrix->data + group * ROWS * matrix->nb[1] +
                                     ggml_row_size(matrix->type, k);
                __m512i rests = _mm512_setzero_si512();
                for (int i = 0; i < ROWS; i++)
                    unpack(blocks + i * matrix->nb[1], n, {weights + i / SIDE * TILE + i % SIDE * DEPTH, &rests});
                const bool has_rests = _mm512_test_epi32_mask(rests, rests);  // not where a checkpoint has bf16
                for (int64_t m = 0; m < n_down; m += 2) {
                    const bool two = m + 1 < n_down;
                    const uint16_t *first = packed + (m * n_across + k / DEPTH) * TILE;
                    const uint16_t *second = first + n_across * TILE;
                    const auto add = two ? multiply<true> : multiply<false>;
                    zero_results();
                    if (is_exact) add(weights, first + part, second + part, n / DEPTH);
                    if (has_rests) add(weights + PART, first, second, n / DEPTH);
                    add(weights, first, second, n / DEPTH);
                    _tile_stored(0, results, 64);
                    _tile_stored(1, results + SIDE * SIDE, 64);
                    _tile_stored(2, results + 2 * SIDE * SIDE, 64);
                    _tile_stored(3, results + 3 * SIDE * SIDE, 64);
                    for (int i = 0; i < (two ? 4 : 2); i++)
                        put_results(results + i * SIDE * SIDE, result, (m + i / 2) * SIDE,
                                    group * ROWS + i % 2 * SIDE, k > 0);
                }
            }
        }
        _tile_release();
    }
    return true;
}
