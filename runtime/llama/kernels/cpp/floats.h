// Products of matrices of floating-point numbers and inputs on AVX-512: in F32, nothing is rounded but sums. 32 rows of
// weights are unpacked once for all tokens of a batch.

#pragma once

#include "ggml.h"
#include "panels.h"
#include "registers.h"

#include <array>
#include <cstdint>
#include <utility>

constexpr int FLOAT_COLUMNS = 512;  // of a matrix that are unpacked together, to fit the L2 cache
constexpr int FLOAT_INPUTS = 12;    // tokens whose sums stay in registers

inline __m512 from_f32(const uint8_t *x) { return _mm512_loadu_ps(x); }

inline __m512 from_f16(const uint8_t *x) { return _mm512_cvtph_ps(load(x)); }

inline __m512 from_bf16(const uint8_t *x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load(x)), 16));
}

// 32 rows of a matrix, column after column
struct FloatPanel {
    alignas(64) float numbers[FLOAT_COLUMNS][PANEL_ROWS];

    template <__m512 (*load_16)(const uint8_t *)>
    void read(const ggml_tensor *matrix, int64_t first_row, int64_t column, int64_t n_columns) {
        const int64_t size = ggml_type_size(matrix->type);
        for (int part = 0; part < 2; part++) {
            const auto *x = (const uint8_t *)matrix->data + (first_row + 16 * part) * matrix->nb[1] + column * size;
            for (int64_t k = 0; k < n_columns; k += 16) {
                __m512i values[16];
                for (int i = 0; i < 16; i++) values[i] = (__m512i)load_16(x + i * matrix->nb[1] + k * size);
                transpose(values);
                for (int i = 0; i < 16; i++) _mm512_store_si512(&numbers[k + i][16 * part], values[i]);
            }
        }
    }
};

using ReadFloats = void (FloatPanel::*)(const ggml_tensor *, int64_t, int64_t, int64_t);

ReadFloats read_floats_of(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F32: return &FloatPanel::read<from_f32>;
        case GGML_TYPE_F16: return &FloatPanel::read<from_f16>;
        case GGML_TYPE_BF16: return &FloatPanel::read<from_bf16>;
        default: return nullptr;
    }
}

// Products of a panel's rows with `n` inputs from the i-th on, columns from `column` on
template <int n>
void multiply_floats(const FloatPanel &panel, int64_t i, int64_t column, int64_t n_columns, ggml_tensor *to,
                     int64_t row) {
    const ggml_tensor *inputs = to->src[1];
    const float *x[n];
    for (int t = 0; t < n; t++) x[t] = (const float *)((const char *)inputs->data + (i + t) * inputs->nb[1]) + column;
    __m512 sums[n][2];
    for (int t = 0; t < n; t++) sums[t][0] = sums[t][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < n_columns; k++) {
        const __m512 low = _mm512_load_ps(panel.numbers[k]), high = _mm512_load_ps(panel.numbers[k] + 16);
#pragma GCC unroll 12
        for (int t = 0; t < n; t++) {
            const __m512 input = _mm512_set1_ps(x[t][k]);
            sums[t][0] = _mm512_fmadd_ps(low, input, sums[t][0]);
            sums[t][1] = _mm512_fmadd_ps(high, input, sums[t][1]);
        }
    }
    for (int t = 0; t < n; t++)
        for (int part = 0; part < 2; part++)
            put(result_of(to, i + t, row + 16 * part), sums[t][part], column > 0);
}

template <int... n>
constexpr auto each_multiply_floats(std::integer_sequence<int, n...>) {
    return std::array{multiply_floats<n + 1>...};
}

// The product of a matrix and inputs
void multiply_all_floats(ggml_tensor *result, int n_threads) {
    constexpr auto multiply = each_multiply_floats(std::make_integer_sequence<int, FLOAT_INPUTS>());
    const ggml_tensor *matrix = result->src[0];
    const ReadFloats read = read_floats_of(matrix->type);
#pragma omp parallel num_threads(n_threads)
    {
        FloatPanel panel;
        for_panels(
            result, FLOAT_COLUMNS, FLOAT_INPUTS,
            [&](int64_t row, int64_t column, int64_t n_columns) { (panel.*read)(matrix, row, column, n_columns); },
            [&](int64_t n, int64_t i, int64_t row, int64_t column, int64_t n_columns) {
                multiply[n - 1](panel, i, column, n_columns, result, row);
            });
    }
}
