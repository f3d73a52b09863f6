// Rounding with feedback and coordinate descent: the loops of feedback.py, for rows that do not depend on each other.
// Also the rounding of activations, for tensors.py.
//
// Matrices are transposed, (n_cols, n_rows), as they are there. A few rows at a time go through all columns, so that
// their errors stay in the cache; a panel of columns shares one product with the errors of the others.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t ROWS = 64;     // that are computed together
constexpr int64_t PANEL = 64;    // columns that share one product with all errors
constexpr int64_t STEP = 256;    // columns whose errors are read for a panel at a time
constexpr int WIDTH = 16;        // numbers in a vector, which the compiler cuts as the processor needs it
constexpr int N_VECTORS = ROWS / WIDTH;

typedef float Vector __attribute__((vector_size(WIDTH * sizeof(float))));

union Row {  // a number for each of the rows that are computed together
    float of[ROWS];
    Vector part[N_VECTORS];
};

// n numbers, and zeros behind them
Row read(const float *numbers, int64_t n) {
    Row row = {};
    std::memcpy(row.of, numbers, n * sizeof(float));
    return row;
}

// sums[j] += sum over k in [first, last) of factors[j * j_step + k * k_step] * values[k], for n columns j
void add_products(Row *sums, const float *factors, int64_t j_step, int64_t k_step, const Row *values, int64_t n,
                  int64_t first, int64_t last) {
    constexpr int AT_ONCE = 4;
    for (int64_t j = 0; j < n; j += AT_ONCE) {
        const int64_t n_here = n - j < AT_ONCE ? n - j : AT_ONCE;
        const float *rows[AT_ONCE];
        Vector total[AT_ONCE][N_VECTORS];
        for (int i = 0; i < AT_ONCE; i++) {
            const int64_t column = j + (i < n_here ? i : 0);
            rows[i] = factors + column * j_step;
            for (int v = 0; v < N_VECTORS; v++) {
                total[i][v] = sums[column].part[v];
            }
        }
        for (int64_t k = first; k < last; k++) {
            for (int i = 0; i < AT_ONCE; i++) {
                const float factor = rows[i][k * k_step];
                for (int v = 0; v < N_VECTORS; v++) {
                    total[i][v] += factor * values[k].part[v];
                }
            }
        }
        for (int i = 0; i < n_here; i++) {
            for (int v = 0; v < N_VECTORS; v++) {
                sums[j + i].part[v] = total[i][v];
            }
        }
    }
}

void add_products_in_steps(Row *sums, const float *factors, int64_t j_step, int64_t k_step, const Row *values,
                           int64_t n, int64_t last) {
    for (int64_t k = 0; k < last; k += STEP) {
        add_products(sums, factors, j_step, k_step, values, n, k, k + STEP < last ? k + STEP : last);
    }
}

}  // namespace

// The values that every weight of a matrix can take: step * level + offset.
struct Grid {
    int64_t n_rows, sub_block, n_levels;
    const float *levels;
    const float *steps, *inverse, *offsets;  // (n_cols / sub_block, n_rows) each; no offsets: null
    bool is_even;                            // whether levels lie one apart
};

namespace {

// Some rows of a matrix
class Rows {
  public:
    Rows(const Grid &grid, int64_t first) : grid(grid), first(first) {
        n = grid.n_rows - first < ROWS ? grid.n_rows - first : ROWS;
    }

    // codes of the numbers `wanted` in a column, and what they stand for
    void nearest(int64_t column, const Row &wanted, uint8_t *__restrict codes, Row &__restrict values) const {
        const int64_t at = column / grid.sub_block * grid.n_rows + first;
        const float lowest = grid.levels[0], highest = grid.levels[grid.n_levels - 1];
        const float *steps = grid.steps + at, *inverse = grid.inverse + at;
        const Row offsets = grid.offsets ? ::read(grid.offsets + at, n) : Row{};
        if (grid.is_even) {
            for (int64_t i = 0; i < n; i++) {
                const float level = std::nearbyint((wanted.of[i] - offsets.of[i]) * inverse[i]);
                const float kept = level < lowest ? lowest : level > highest ? highest : level;
                codes[i] = uint8_t(int(kept - lowest));
                values.of[i] = kept * steps[i] + offsets.of[i];
            }
            return;
        }
        for (int64_t i = 0; i < n; i++) {
            const float scaled = (wanted.of[i] - offsets.of[i]) * inverse[i];
            int code = 0;
            for (int64_t k = 1; k < grid.n_levels; k++) {
                code += (grid.levels[k] + grid.levels[k - 1]) / 2 < scaled;
            }
            codes[i] = uint8_t(code);
            values.of[i] = grid.levels[code] * steps[i] + offsets.of[i];
        }
    }

    float value(int64_t column, int64_t row, uint8_t code) const {
        const int64_t at = column / grid.sub_block * grid.n_rows + first + row;
        return grid.levels[code] * grid.steps[at] + (grid.offsets ? grid.offsets[at] : 0.0f);
    }

    Row read(const float *matrix, int64_t column) const { return ::read(matrix + column * grid.n_rows + first, n); }

    uint8_t *codes(uint8_t *matrix, int64_t column) const { return matrix + column * grid.n_rows + first; }

    int64_t n;

  private:
    const Grid &grid;
    int64_t first;
};

}  // namespace

extern "C" {

// GPTQ: columns in `order`, each rounded beside what the errors before it ask of it. upper is (n_cols, n_cols).
void f2gguf_with_feedback(const Grid *grid, int64_t n_cols, const float *target, const float *upper,
                          const int64_t *order, uint8_t *codes) {
    std::vector<Row> errors(n_cols), carried(PANEL);
    for (int64_t first = 0; first < grid->n_rows; first += ROWS) {
        const Rows rows(*grid, first);
        for (int64_t begin = 0; begin < n_cols; begin += PANEL) {
            const int64_t end = begin + PANEL < n_cols ? begin + PANEL : n_cols;
            std::memset(carried.data(), 0, (end - begin) * sizeof(Row));
            add_products_in_steps(carried.data(), upper + begin, 1, n_cols, errors.data(), end - begin, begin);
            for (int64_t j = begin; j < end; j++) {
                Row &sum = carried[j - begin], value = rows.read(target, order[j]), rounded = {};
                add_products(&sum, upper + j, 1, n_cols, errors.data(), 1, begin, j);
                for (int64_t i = 0; i < ROWS; i++) {
                    value.of[i] -= sum.of[i];
                }
                rows.nearest(order[j], value, rows.codes(codes, order[j]), rounded);
                for (int64_t i = 0; i < ROWS; i++) {
                    errors[j].of[i] = (value.of[i] - rounded.of[i]) / upper[j * n_cols + j];
                }
            }
        }
    }
}

// Coordinate descent on the error with second moments `matrix` (n_cols, n_cols): each code becomes the best one beside
// all others, `n_sweeps` times or until none changes.
void f2gguf_polish(const Grid *grid, int64_t n_cols, const float *target, const float *matrix, int64_t n_sweeps,
                   uint8_t *codes) {
    std::vector<Row> errors(n_cols), slopes(PANEL), moves(PANEL);
    for (int64_t first = 0; first < grid->n_rows; first += ROWS) {
        const Rows rows(*grid, first);
        for (int64_t j = 0; j < n_cols; j++) {
            const Row wanted = rows.read(target, j);
            errors[j] = {};
            for (int64_t i = 0; i < rows.n; i++) {
                errors[j].of[i] = rows.value(j, i, rows.codes(codes, j)[i]) - wanted.of[i];
            }
        }
        bool is_changed = true;
        for (int64_t sweep = 0; sweep < n_sweeps && is_changed; sweep++) {
            is_changed = false;
            for (int64_t begin = 0; begin < n_cols; begin += PANEL) {
                const int64_t n = begin + PANEL < n_cols ? PANEL : n_cols - begin;
                const float *panel = matrix + begin * n_cols;
                std::memset(slopes.data(), 0, n * sizeof(Row));
                add_products_in_steps(slopes.data(), panel, n_cols, 1, errors.data(), n, n_cols);
                for (int64_t j = 0; j < n; j++) {
                    const float *factors = panel + j * n_cols + begin;
                    add_products(&slopes[j], factors, n_cols, 1, moves.data(), 1, 0, j);
                    Row now = rows.read(target, begin + j), best = {}, value = {};
                    for (int64_t i = 0; i < ROWS; i++) {
                        now.of[i] += errors[begin + j].of[i];
                        best.of[i] = now.of[i] - slopes[j].of[i] / factors[j];
                    }
                    uint8_t found[ROWS] = {}, *old = rows.codes(codes, begin + j);
                    rows.nearest(begin + j, best, found, value);
                    moves[j] = {};
                    for (int64_t i = 0; i < rows.n; i++) {
                        const bool differs = found[i] != old[i];
                        moves[j].of[i] = differs ? value.of[i] - now.of[i] : 0.0f;
                        old[i] = found[i];
                        is_changed |= differs;
                    }
                }
                for (int64_t j = 0; j < n; j++) {
                    for (int64_t i = 0; i < ROWS; i++) {
                        errors[begin + j].of[i] += moves[j].of[i];
                    }
                }
            }
        }
    }
}

// Each block of `width` numbers as 8 bits and one scale.
void f2gguf_round_blocks(int64_t n_blocks, int64_t width, const float *numbers, float *rounded) {
    for (int64_t begin = 0; begin < n_blocks * width; begin += width) {
        Row highest = {};
        for (int64_t i = begin; i < begin + width; i++) {
            float &most = highest.of[i % WIDTH], size = std::fabs(numbers[i]);
            most = size > most ? size : most;
        }
        const float scale = *std::max_element(highest.of, highest.of + WIDTH) / 127;
        for (int64_t i = begin; i < begin + width; i++) {
            rounded[i] = scale > 0 ? std::nearbyint(numbers[i] / scale) * scale : 0.0f;
        }
    }
}
}
