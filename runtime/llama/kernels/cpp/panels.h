// Matrices panel by panel: 32 rows are unpacked for all inputs, some columns at a time.

#pragma once

#include "ggml.h"
#include "registers.h"

#include <algorithm>
#include <cstdint>

constexpr int PANEL_ROWS = 32;

// Where the result of an input and a row of the matrix is put
inline float *result_of(ggml_tensor *to, int64_t input, int64_t row) {
    return (float *)((char *)to->data + input * to->nb[1]) + row;
}

// For all threads of a team: `read(row, column, n_columns)` the panels of a product's matrix, and with each of them
// `multiply(n_inputs, first_input, row, column, n_columns)` all inputs, in shares of about equal size.
template <typename Read, typename Multiply>
void for_panels(const ggml_tensor *product, int64_t most_columns, int64_t most_inputs, const Read &read,
                const Multiply &multiply) {
    const int64_t n_across = product->src[0]->ne[0], n_inputs = product->ne[1];
#pragma omp for schedule(dynamic)
    for (int64_t row = 0; row < product->ne[0]; row += PANEL_ROWS)
        for (int64_t column = 0; column < n_across; column += most_columns) {
            const int64_t n_columns = std::min(most_columns, n_across - column);
            read(row, column, n_columns);
            for (int64_t i = 0, n; i < n_inputs; i += n) {
                const int64_t n_left = n_inputs - i, n_shares = (n_left + most_inputs - 1) / most_inputs;
                n = (n_left + n_shares - 1) / n_shares;
                multiply(n, i, row, column, n_columns);
            }
        }
}
