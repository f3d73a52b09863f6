// Steps of a layer whose results' rows depend on the same row of their inputs: sums, factors, norms, activations.
//
// Consecutive ones are computed row by row, so that a row stays in the nearest cache from the first to the last.

#pragma once

#include "ggml.h"
#include "registers.h"

#include <algorithm>
#include <cmath>
#include <cstring>

inline float *row_of(const ggml_tensor *tensor, int64_t row) {
    return (float *)((char *)tensor->data + (ggml_nrows(tensor) == 1 ? 0 : row * tensor->nb[1]));
}

inline bool has_rows(const ggml_tensor *tensor, int64_t n_columns, int64_t n_rows) {
    return tensor->type == GGML_TYPE_F32 && tensor->ne[0] == n_columns && ggml_nrows(tensor) == n_rows &&
           ggml_is_contiguous(tensor);
}

// Weights of no layer: those of the last norm, whose result must come in one graph with the LM head behind it.
inline bool is_beside_layers(const ggml_tensor *tensor) {
    return tensor->op == GGML_OP_NONE && strncmp(tensor->name, "blk.", 4);
}

bool is_by_rows(const ggml_tensor *op) {
    const int64_t n_columns = op->ne[0], n_rows = ggml_nrows(op);
    const ggml_tensor *first = op->src[0], *other = op->src[1];
    if (n_columns % 16 || !has_rows(op, n_columns, n_rows)) return false;
    if (!first || !has_rows(first, n_columns, n_rows)) return false;
    switch (op->op) {
        case GGML_OP_ADD:
        case GGML_OP_MUL:
            return (has_rows(other, n_columns, n_rows) || has_rows(other, n_columns, 1)) && !is_beside_layers(other);
        case GGML_OP_NORM:
        case GGML_OP_RMS_NORM: return true;
        case GGML_OP_UNARY: return ggml_get_unary_op(op) == GGML_UNARY_OP_GELU;
        case GGML_OP_GLU:
            return ggml_get_glu_op(op) == GGML_GLU_OP_SWIGLU && other && has_rows(other, n_columns, n_rows) &&
                   !op->op_params[1];  // in this order
        default: return false;
    }
}

// x / (1 + e to the power of -y)
inline __m512 gated(__m512 x, __m512 y) {
    const __m512 power = exponential(_mm512_sub_ps(_mm512_setzero_ps(), y));
    return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1), power));
}

// GELU by the hyperbolic tangent, as ggml defines it: x (1 + tanh z) / 2 = x / (1 + e to the power of -2 z)
inline __m512 gelu(__m512 x) {
    const __m512 square = _mm512_mul_ps(x, x), twice = _mm512_mul_ps(x, _mm512_set1_ps(1.59576912f));
    return gated(x, _mm512_mul_ps(twice, _mm512_fmadd_ps(square, _mm512_set1_ps(0.044715f), _mm512_set1_ps(1))));
}

float sum_of_squares(const float *x, int64_t n, float mean) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t k = 0; k < n; k += 16) {
        const __m512 value = _mm512_sub_ps(_mm512_loadu_ps(x + k), _mm512_set1_ps(mean));
        sum = _mm512_fmadd_ps(value, value, sum);
    }
    return _mm512_reduce_add_ps(sum);
}

float mean_of(const float *x, int64_t n) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t k = 0; k < n; k += 16) sum = _mm512_add_ps(sum, _mm512_loadu_ps(x + k));
    return _mm512_reduce_add_ps(sum) / n;
}

template <typename Function>
inline void for_each(int64_t n, float *to, Function function) {
    for (int64_t k = 0; k < n; k += 16) _mm512_storeu_ps(to + k, function(k));
}

void compute_row(const ggml_tensor *op, int64_t row) {
    const int64_t n = op->ne[0];
    const float *x = row_of(op->src[0], row), *y = op->src[1] ? row_of(op->src[1], row) : nullptr;
    float *to = row_of(op, row);
    const auto first = [x](int64_t k) { return _mm512_loadu_ps(x + k); };
    const auto second = [y](int64_t k) { return _mm512_loadu_ps(y + k); };
    switch (op->op) {
        case GGML_OP_ADD: return for_each(n, to, [&](int64_t k) { return _mm512_add_ps(first(k), second(k)); });
        case GGML_OP_MUL: return for_each(n, to, [&](int64_t k) { return _mm512_mul_ps(first(k), second(k)); });
        case GGML_OP_UNARY: return for_each(n, to, [&](int64_t k) { return gelu(first(k)); });
        case GGML_OP_GLU:
            return for_each(n, to, [&](int64_t k) { return _mm512_mul_ps(gated(first(k), first(k)), second(k)); });
        default: break;
    }
    float epsilon;
    memcpy(&epsilon, op->op_params, sizeof epsilon);
    const float mean = op->op == GGML_OP_NORM ? mean_of(x, n) : 0;
    const float factor = 1 / std::sqrt(sum_of_squares(x, n, mean) / n + epsilon);
    for_each(n, to, [&](int64_t k) {
        return _mm512_mul_ps(_mm512_sub_ps(first(k), _mm512_set1_ps(mean)), _mm512_set1_ps(factor));
    });
}

// Whether a row of `later` may be written before other rows of `earlier` are read or written
inline bool is_apart(const ggml_tensor *later, const ggml_tensor *earlier) {
    const char *a = (const char *)later->data, *b = (const char *)earlier->data;
    const size_t n_a = ggml_nbytes(later), n_b = ggml_nbytes(earlier);
    return (a == b && n_a == n_b) || a + n_a <= b || b + n_b <= a;
}

// Whether `next` may be computed row by row together with these steps before it
bool can_follow(const ggml_tensor *const *steps, int n_steps, const ggml_tensor *next) {
    if (next->ne[0] != steps[0]->ne[0] || ggml_nrows(next) != ggml_nrows(steps[0])) return false;
    const auto is_free = [next](const ggml_tensor *tensor) { return !tensor || is_apart(next, tensor); };
    return std::all_of(steps, steps + n_steps, [&](const ggml_tensor *step) {
        return is_free(step) && is_free(step->src[0]) && is_free(step->src[1]);
    });
}

constexpr int MAX_STEPS = 16;
constexpr int64_t WORTH_THREADS = 1 << 14;  // numbers of a step

void compute_rows(const ggml_tensor *const *steps, int n_steps, int n_threads) {
    const int64_t n_rows = ggml_nrows(steps[0]);
    const bool is_large = n_rows * steps[0]->ne[0] >= WORTH_THREADS;
#pragma omp parallel for num_threads(n_threads) if (is_large)
    for (int64_t row = 0; row < n_rows; row++)
        for (int i = 0; i < n_steps; i++) compute_row(steps[i], row);
}

// Keys and values become F16 for attention
bool is_cast(const ggml_tensor *op) {
    return op->op == GGML_OP_CPY && op->type == GGML_TYPE_F16 && op->src[0]->type == GGML_TYPE_F32 &&
           op->src[0]->nb[0] == sizeof(float) && ggml_is_contiguous(op) && ggml_are_same_shape(op, op->src[0]) &&
           op->ne[0] % 16 == 0;
}

void cast(const ggml_tensor *op, int n_threads) {
    const ggml_tensor *from = op->src[0];
    const int64_t n_1 = op->ne[1], n_2 = op->ne[2];
#pragma omp parallel for num_threads(n_threads) if (ggml_nelements(op) >= WORTH_THREADS)
    for (int64_t row = 0; row < ggml_nrows(op); row++) {
        const auto *x = (const float *)((const char *)from->data + row % n_1 * from->nb[1] +
                                        row / n_1 % n_2 * from->nb[2] + row / n_1 / n_2 * from->nb[3]);
        auto *to = (char *)op->data + row * op->nb[1];
        for (int64_t k = 0; k < op->ne[0]; k += 16)
            _mm256_storeu_si256((__m256i *)(to + 2 * k), _mm512_cvtps_ph(_mm512_loadu_ps(x + k), 0));
    }
}
