// Products of matrices and inputs on VNNI, whose instructions multiply bytes. Inputs are rounded to 8 bits, 32 columns at
// a time, as llama.cpp rounds them for Q4_0; codes of weights stay as they are. 32 rows of weights are unpacked once for
// all tokens of a batch.

#pragma once

#include "blocks.h"
#include "ggml.h"
#include "memory.h"
#include "panels.h"
#include "registers.h"

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

constexpr int BYTE_COLUMNS = 512;  // of a matrix that are unpacked together, to fit the L1 cache
constexpr int BYTE_INPUTS = 6;     // tokens whose sums stay in registers

// The unpacked columns of one row of a matrix: a value is factor * code - least.
struct ByteRow {
    uint8_t *codes;
    float *factors, *leasts;  // of blocks of 32 or 16 codes, of row after row
    void put_scale(float factor, float least) {
        *factors = factor;
        *leasts = least;
        factors += PANEL_ROWS;
        leasts += PANEL_ROWS;
    }
    void put_codes(__m256i values) {
        _mm256_store_si256((__m256i *)codes, values);
        codes += 32;
    }
    void put(__m256i values, float factor, float least) {
        put_codes(values);
        put_scale(factor, least);
    }
};

using Read = void (*)(const uint8_t *blocks, int64_t n_columns, ByteRow row);

void read_q8_0(const uint8_t *x, int64_t n, ByteRow row) {
    for (; n > 0; n -= 32, x += 34)
        row.put(_mm256_xor_si256(load(x + 2), _mm256_set1_epi8(-128)), half(x), 128 * half(x));
}

void read_q4_0(const uint8_t *x, int64_t n, ByteRow row) {
    for (; n > 0; n -= 32, x += 18) row.put(nibbles(x + 2), half(x), 8 * half(x));
}

void read_q5_0(const uint8_t *x, int64_t n, ByteRow row) {
    for (; n > 0; n -= 32, x += 22) row.put(q5_0_codes(x), half(x), 16 * half(x));
}

// The values of IQ4's codes, and 128
inline __m256i iq4_bytes(const uint8_t *x) {
    const __m128i values = _mm_setr_epi8(1, 24, 45, 63, 79, 93, 106, 118, -127, -115, -103, -90, -75, -59, -39, -15);
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(values), nibbles(x));
}

void read_iq4_nl(const uint8_t *x, int64_t n, ByteRow row) {
    for (; n > 0; n -= 32, x += 18) row.put(iq4_bytes(x + 2), half(x), 128 * half(x));
}

void read_iq4_xs(const uint8_t *x, int64_t n, ByteRow row) {
    for (; n > 0; n -= 256, x += 136)
        for (int i = 0; i < 8; i++) {
            const float factor = half(x) * iq4_xs_scale(x, i);
            row.put(iq4_bytes(x + 8 + 16 * i), factor, 128 * factor);
        }
}

void read_q4_k(const uint8_t *x, int64_t n, ByteRow row) {
    for (; n > 0; n -= 256, x += 144)
        for (int i = 0; i < 8; i++) row.put(q4_k_codes(x, i), k_scale(x, i).factor, k_scale(x, i).least);
}

void read_q5_k(const uint8_t *x, int64_t n, ByteRow row) {
    for (; n > 0; n -= 256, x += 176)
        for (int i = 0; i < 8; i++) row.put(q5_k_codes(x, i), k_scale(x, i).factor, k_scale(x, i).least);
}

void read_q6_k(const uint8_t *x, int64_t n, ByteRow row) {
    for (; n > 0; n -= 256, x += 210)
        for (int i = 0; i < 8; i++) {
            row.put_codes(q6_k_codes(x, i));
            for (int j = 0; j < 2; j++) {
                const float factor = half(x + 208) * q6_k_scales(x, i)[j];
                row.put_scale(factor, 32 * factor);
            }
        }
}

Read read_of(ggml_type type) {
    switch (type) {
        case GGML_TYPE_Q8_0: return read_q8_0;
        case GGML_TYPE_Q6_K: return read_q6_k;
        case GGML_TYPE_Q5_K: return read_q5_k;
        case GGML_TYPE_Q5_0: return read_q5_0;
        case GGML_TYPE_Q4_K: return read_q4_k;
        case GGML_TYPE_Q4_0: return read_q4_0;
        case GGML_TYPE_IQ4_NL: return read_iq4_nl;
        case GGML_TYPE_IQ4_XS: return read_iq4_xs;
        default: return nullptr;
    }
}

// 32 rows of a matrix: of each row four columns, then the next four
struct BytePanel {
    alignas(64) uint8_t codes[PANEL_ROWS * BYTE_COLUMNS];
    alignas(64) float factors[PANEL_ROWS * BYTE_COLUMNS / 16], leasts[PANEL_ROWS * BYTE_COLUMNS / 16];
    alignas(64) uint8_t rows[PANEL_ROWS][BYTE_COLUMNS];  // before they are put so

    void read(const ggml_tensor *matrix, int64_t first_row, int64_t column, int64_t n_columns) {
        const auto *blocks = (const uint8_t *)matrix->data + ggml_row_size(matrix->type, column);
        const Read read_row = read_of(matrix->type);
        for (int i = 0; i < PANEL_ROWS; i++)
            read_row(blocks + (first_row + i) * matrix->nb[1], n_columns, {rows[i], factors + i, leasts + i});
        for (int64_t k = 0; k < n_columns; k += 64)  // 16 words, of which the last 8 may be nothing
            for (int part = 0; part < 2; part++) {
                __m512i words[16];
                for (int i = 0; i < 16; i++) words[i] = _mm512_load_si512(rows[16 * part + i] + k);
                transpose(words);
                for (int i = 0; i < 16; i++) _mm512_store_si512(codes + (k / 4 + i) * 128 + 64 * part, words[i]);
            }
    }
};

// Inputs as bytes: number = factor * byte
struct Bytes {
    Memory memory;
    const ggml_tensor *packed = nullptr;  // what `memory` holds, for as long as the next products have the same
    int64_t n_columns = 0;
    int8_t *codes = nullptr;
    float *factors = nullptr, *sums = nullptr, *half_sums = nullptr;  // of 32 columns, of 32 and of 16: factor * bytes

    bool reserve(const ggml_tensor *inputs) {
        n_columns = inputs->ne[0];
        const int64_t n = n_columns * inputs->ne[1];
        codes = memory.reserve<int8_t>(n + n / 32 * 4 * sizeof(float));
        factors = (float *)(codes + n);
        sums = factors + n / 32;
        half_sums = sums + n / 32;
        return codes;
    }

    void pack(const ggml_tensor *inputs, int64_t i) {
        const float *x = (const float *)((const char *)inputs->data + i * inputs->nb[1]);
        for (int64_t k = 0; k < n_columns; k += 32) {
            const __m512 first = _mm512_loadu_ps(x + k), last = _mm512_loadu_ps(x + k + 16);
            const float highest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(first), _mm512_abs_ps(last)));
            const bool has_nan = _mm512_cmp_ps_mask(first, last, _CMP_UNORD_Q);  // which a maximum may lose
            const float factor = has_nan ? NAN : highest / 127, inverse = factor > 0 ? 1 / factor : 0;
            const int64_t at = i * n_columns + k;
            factors[at / 32] = factor;
            sums[at / 32] = 0;
            for (int j = 0; j < 2; j++) {
                const __m512i bytes = _mm512_cvtps_epi32(_mm512_mul_ps(j ? last : first, _mm512_set1_ps(inverse)));
                _mm_storeu_si128((__m128i *)(codes + at + 16 * j), _mm512_cvtsepi32_epi8(bytes));
                half_sums[at / 16 + j] = factor * _mm512_reduce_add_epi32(bytes);
                sums[at / 32] += half_sums[at / 16 + j];
            }
        }
    }
};

// Products of a panel's rows with `n` inputs from the i-th on, columns from `column` on. A factor is for 4 * `n_words`
// columns.
template <int n, int n_words>
void multiply_bytes(const BytePanel &panel, const Bytes &bytes, int64_t i, int64_t column, int64_t n_columns,
                    ggml_tensor *to, int64_t row) {
    const int64_t across = bytes.n_columns, at = i * across + column;
    const float *input_sums = n_words == 8 ? bytes.sums + at / 32 : bytes.half_sums + at / 16;
    __m512 sums[n][2];
    for (int t = 0; t < n; t++) sums[t][0] = sums[t][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < n_columns; k += 4 * n_words) {
        __m512i products[n][2];
        for (int t = 0; t < n; t++) products[t][0] = products[t][1] = _mm512_setzero_si512();
        const uint8_t *codes = panel.codes + k * PANEL_ROWS;
#pragma GCC unroll 8
        for (int word = 0; word < n_words; word++) {
            const __m512i low = _mm512_load_si512(codes + word * 128), high = _mm512_load_si512(codes + word * 128 + 64);
#pragma GCC unroll 8
            for (int t = 0; t < n; t++) {
                int32_t four;
                memcpy(&four, bytes.codes + at + t * across + k + 4 * word, 4);
                products[t][0] = _mm512_dpbusd_epi32(products[t][0], low, _mm512_set1_epi32(four));
                products[t][1] = _mm512_dpbusd_epi32(products[t][1], high, _mm512_set1_epi32(four));
            }
        }
        const int64_t block = k / (4 * n_words);
        for (int part = 0; part < 2; part++) {
            const __m512 factors = _mm512_load_ps(panel.factors + block * PANEL_ROWS + 16 * part);
            const __m512 leasts = _mm512_load_ps(panel.leasts + block * PANEL_ROWS + 16 * part);
#pragma GCC unroll 8
            for (int t = 0; t < n; t++) {
                const __m512 factor = _mm512_set1_ps(bytes.factors[(at + t * across + k) / 32]);
                const __m512 sum = _mm512_set1_ps(input_sums[t * across / (4 * n_words) + block]);
                const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(products[t][part]), factor);
                sums[t][part] = _mm512_fmadd_ps(scaled, factors, _mm512_fnmadd_ps(sum, leasts, sums[t][part]));
            }
        }
    }
    for (int t = 0; t < n; t++)
        for (int part = 0; part < 2; part++)
            put(result_of(to, i + t, row + 16 * part), sums[t][part], column > 0);
}

template <int n_words, int... n>
constexpr auto each_multiply_bytes(std::integer_sequence<int, n...>) {
    return std::array{multiply_bytes<n + 1, n_words>...};
}

// The product of a matrix and inputs; false without memory
bool multiply_all_bytes(Bytes &bytes, ggml_tensor *result, int n_threads) {
    const ggml_tensor *matrix = result->src[0], *inputs = result->src[1];
    const bool are_packed = bytes.packed == inputs;
    if (!are_packed && !bytes.reserve(inputs)) return false;
    bytes.packed = inputs;
    constexpr auto counts = std::make_integer_sequence<int, BYTE_INPUTS>();
    constexpr auto by_32 = each_multiply_bytes<8>(counts), by_16 = each_multiply_bytes<4>(counts);
    const auto &multiply = matrix->type == GGML_TYPE_Q6_K ? by_16 : by_32;
#pragma omp parallel num_threads(n_threads)
    {
        if (!are_packed) {
#pragma omp for
            for (int64_t i = 0; i < inputs->ne[1]; i++) bytes.pack(inputs, i);
        }
        BytePanel panel;
        for_panels(
            result, BYTE_COLUMNS, BYTE_INPUTS,
            [&](int64_t row, int64_t column, int64_t n) { panel.read(matrix, row, column, n); },
            [&](int64_t n, int64_t i, int64_t row, int64_t column, int64_t n_columns) {
                multiply[n - 1](panel, bytes, i, column, n_columns, result, row);
            });
    }
    return true;
}
