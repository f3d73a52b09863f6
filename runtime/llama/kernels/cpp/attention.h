// Attention in F32: softmax(queries . keys * scale + mask) . values.
//
// A batch holds many texts, and the mask keeps them apart. llama.cpp computes tiles of 64 queries and keys of whatever
// texts, with inputs in F16. Here the keys that a text's queries see are gathered first, so that no product is wasted
// on another text, and vectors do not depend on it.

#pragma once

#include "ggml.h"
#include "memory.h"
#include "registers.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

constexpr int QUERIES = 128;  // of one text, times heads with the same keys: about as many share gathered keys
constexpr int KEYS = 256;     // that are gathered at a time
constexpr int DOWN = 8;       // queries that are multiplied together
constexpr int ACROSS = 32;    // keys, or columns of values, that are multiplied together
constexpr uint16_t UNSEEN = 0xFC00;  // -inf

// Queries of one text, and the keys that one of them sees
struct Chunk {
    int64_t first, n_queries, n_keys;
};

// What queries see of the keys of a batch. Lists and masks have `n_across` places for each chunk or query.
struct Sight {
    std::vector<Chunk> chunks;
    std::vector<int64_t> last;  // key that a query sees, -1 without any
    int64_t n_across;
    int64_t n_queries;  // of a chunk, at most
    int32_t *keys;
    uint16_t *masks;  // of the keys in the list of the query's chunk
};

// Put the product of some rows of `left` and `right`, n rows of 32, to as many rows of `to`, or add it to them
template <int n_rows>
void add_product(const float *left, int64_t step, const float *right, int64_t n, float *to, int64_t to_step,
                 bool is_added) {
    __m512 sums[n_rows][2];
#pragma GCC unroll 8
    for (int i = 0; i < n_rows; i++) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < n; k++, right += ACROSS) {
        const __m512 low = _mm512_load_ps(right), high = _mm512_load_ps(right + 16);
#pragma GCC unroll 8
        for (int i = 0; i < n_rows; i++) {
            const __m512 factor = _mm512_set1_ps(left[i * step + k]);
            sums[i][0] = _mm512_fmadd_ps(factor, low, sums[i][0]);
            sums[i][1] = _mm512_fmadd_ps(factor, high, sums[i][1]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < n_rows; i++) {
        put(to + i * to_step, sums[i][0], is_added);
        put(to + i * to_step + 16, sums[i][1], is_added);
    }
}

using AddProduct = void (*)(const float *, int64_t, const float *, int64_t, float *, int64_t, bool);
constexpr AddProduct ADD_PRODUCT[] = {add_product<1>, add_product<2>, add_product<3>, add_product<4>,
                                      add_product<5>, add_product<6>, add_product<7>, add_product<8>};

inline __mmask32 seen(const uint16_t *mask, __mmask32 which = 0xFFFFFFFF) {
    const __m512i values = _mm512_maskz_loadu_epi16(which, mask);
    return _mm512_mask_cmpneq_epi16_mask(which, values, _mm512_set1_epi16(int16_t(UNSEEN)));
}

// The last key that a row of the mask shows, -1 without any
inline int64_t last_seen(const uint16_t *mask, int64_t n_keys) {
    int64_t k = n_keys;
    for (; k % 32; k--)
        if (mask[k - 1] != UNSEEN) return k - 1;
    for (; k > 0; k -= 32)
        if (const __mmask32 bits = seen(mask + k - 32)) return k - 1 - __builtin_clz(bits);
    return -1;
}

inline const uint16_t *mask_row(const ggml_tensor *mask, int64_t query) {
    return (const uint16_t *)((const char *)mask->data + query * mask->nb[1]);
}

// Split the queries of a batch: two neighbours are of one text if the second sees the last key of the first
void find_chunks(Sight &sight, const ggml_tensor *mask, int64_t n_queries) {
    sight.chunks.clear();
    for (int64_t i = 0; i < n_queries; i++) {
        const bool follows = i > 0 && sight.last[i - 1] >= 0 && mask_row(mask, i)[sight.last[i - 1]] != UNSEEN;
        if (follows && sight.chunks.back().n_queries < sight.n_queries)
            sight.chunks.back().n_queries++;
        else
            sight.chunks.push_back({i, 1, 0});
    }
}

// List the keys that one of a chunk's queries sees, and their masks
void list_keys(Sight &sight, int64_t number, const ggml_tensor *mask) {
    Chunk &chunk = sight.chunks[number];
    int32_t *keys = sight.keys + number * sight.n_across;
    const int64_t end = chunk.first + chunk.n_queries;
    const int64_t last = *std::max_element(&sight.last[chunk.first], &sight.last[end - 1] + 1);
    for (int64_t k = 0; k <= last; k += 32) {
        const __mmask32 here = 0xFFFFFFFF >> std::max<int64_t>(0, k + 31 - last);  // the row may end at the last
        __mmask32 bits = 0;
        for (int64_t i = chunk.first; i < end; i++) bits |= seen(mask_row(mask, i) + k, here);
        for (; bits; bits &= bits - 1) keys[chunk.n_keys++] = int32_t(k + __builtin_ctz(bits));
    }
    const bool are_together = chunk.n_keys && keys[chunk.n_keys - 1] - keys[0] == chunk.n_keys - 1;
    for (int64_t i = chunk.first; i < end; i++) {
        const uint16_t *from = mask_row(mask, i);
        uint16_t *to = sight.masks + i * sight.n_across;
        int64_t k = chunk.n_keys;
        if (are_together)
            memcpy(to, from + keys[0], k * sizeof *to);
        else
            for (int64_t j = 0; j < k; j++) to[j] = from[keys[j]];
        for (; k % 16; k++) to[k] = UNSEEN;
        sight.last[i] = chunk.n_keys - 1;
        while (sight.last[i] >= 0 && to[sight.last[i]] == UNSEEN) sight.last[i]--;
    }
}

// 16 numbers of a key or a value
inline __m512 row_part(const ggml_tensor *rows, int64_t key, int64_t head, int64_t column) {
    const char *row = (const char *)rows->data + key * rows->nb[1] + head * rows->nb[2];
    return _mm512_cvtph_ps(load((const uint8_t *)(row + 2 * column)));
}

// n keys, a number of each after the other: 32 keys at a time
void gather_keys(const ggml_tensor *keys, const int32_t *list, int64_t n, int64_t head, float *to) {
    const int64_t n_columns = keys->ne[0];
    for (int64_t j = 0; j < n; j += 16)
        for (int64_t c = 0; c < n_columns; c += 16) {
            __m512i r[16] = {};
            for (int64_t i = 0; i < 16 && j + i < n; i++)
                r[i] = _mm512_castps_si512(row_part(keys, list[j + i], head, c));
            transpose(r);
            float *panel = to + j / ACROSS * ACROSS * n_columns + c * ACROSS + j % ACROSS;
            for (int i = 0; i < 16; i++) _mm512_store_si512(panel + i * ACROSS, r[i]);
        }
}

// n values, 32 columns at a time
void gather_values(const ggml_tensor *values, const int32_t *list, int64_t n, int64_t head, float *to) {
    for (int64_t c = 0; c < values->ne[0]; c += ACROSS)
        for (int64_t j = 0; j < n; j++)
            for (int64_t half = 0; half < ACROSS; half += 16)
                _mm512_store_ps(to + c * KEYS + j * ACROSS + half, row_part(values, list[j], head, c + half));
}

// Scores of n keys become their weights, e to the power of what they have more than `most`; their sum is returned
float weigh(float *scores, int64_t n, float most) {
    __m512 sum = _mm512_setzero_ps();
    const __m512 base = _mm512_set1_ps(std::isinf(most) && most < 0 ? 0 : most);  // -inf where no key is seen
    for (int64_t k = 0; k < n; k += 16) {
        const __m512 weights = exponential(_mm512_sub_ps(_mm512_load_ps(scores + k), base));
        _mm512_store_ps(scores + k, weights);
        sum = _mm512_add_ps(sum, weights);
    }
    return _mm512_reduce_add_ps(sum);
}

// Scale and mask the scores of n keys; their largest is returned
float mask_scores(float *scores, const uint16_t *mask, int64_t n, float scale) {
    __m512 most = _mm512_set1_ps(-INFINITY);
    for (int64_t k = 0; k < n; k += 16) {
        const __m512 values = _mm512_fmadd_ps(_mm512_load_ps(scores + k), _mm512_set1_ps(scale),
                                              _mm512_cvtph_ps(load((const uint8_t *)(mask + k))));
        _mm512_store_ps(scores + k, values);
        most = _mm512_max_ps(most, values);
    }
    return _mm512_reduce_max_ps(most);
}

// Heads of queries for each head of keys
inline int64_t n_sharing(const ggml_tensor *queries, const ggml_tensor *keys) { return queries->ne[2] / keys->ne[2]; }

// How many numbers `attend` needs for itself, of `n_rows` queries times heads
int64_t n_scratch(const ggml_tensor *keys, const ggml_tensor *values, int64_t n_rows) {
    return (KEYS + n_rows) * (keys->ne[0] + values->ne[0]) + n_rows * (KEYS + 2);
}

// The results of a chunk's queries for the heads that share a head of keys
void attend(ggml_tensor *result, const Sight &sight, int64_t number, int64_t kv_head, float *scratch) {
    const ggml_tensor *queries = result->src[0], *keys = result->src[1], *values = result->src[2];
    const int64_t n_columns = keys->ne[0], n_results = values->ne[0], n_heads = n_sharing(queries, keys);
    const Chunk &chunk = sight.chunks[number];
    const int64_t n_rows = n_heads * chunk.n_queries;  // of scores: all queries of the first head, and so on
    float scale;
    memcpy(&scale, result->op_params, sizeof scale);
    float *k_panels = scratch, *v_panels = k_panels + KEYS * n_columns, *query = v_panels + KEYS * n_results;
    float *scores = query + n_rows * n_columns, *sums = scores + n_rows * KEYS;
    float *most = sums + n_rows * n_results, *total = most + n_rows;
    const auto place = [&](const ggml_tensor *tensor, int64_t row, int query_dim, int head_dim) {
        const int64_t head = kv_head * n_heads + row / chunk.n_queries;
        return (char *)tensor->data + (chunk.first + row % chunk.n_queries) * tensor->nb[query_dim] +
               head * tensor->nb[head_dim];
    };
    for (int64_t row = 0; row < n_rows; row++) {
        const auto *from = (const float *)place(queries, row, 1, 2);
        for (int64_t c = 0; c < n_columns; c += 16)
            _mm512_store_ps(query + row * n_columns + c, _mm512_loadu_ps(from + c));
    }
    std::fill_n(most, n_rows, -INFINITY);
    std::fill_n(total, n_rows, 0.0f);
    for (int64_t begin = 0; begin < chunk.n_keys; begin += KEYS) {
        const int64_t n_here = std::min<int64_t>(KEYS, chunk.n_keys - begin);
        const int32_t *list = sight.keys + number * sight.n_across + begin;
        gather_keys(keys, list, n_here, kv_head, k_panels);
        gather_values(values, list, n_here, kv_head, v_panels);
        // calls with rows of one head that are multiplied together, and how many of these keys they see
        const auto for_each = [&](const auto &call) {
            for (int64_t i = 0; i < chunk.n_queries; i += DOWN) {
                const int64_t n_down = std::min<int64_t>(DOWN, chunk.n_queries - i);
                const auto last = sight.last.begin() + chunk.first + i;
                const int64_t n_seen = std::min(n_here, *std::max_element(last, last + n_down) + 1 - begin);
                if (n_seen <= 0) continue;
                for (int64_t head = 0; head < n_heads; head++) call(head * chunk.n_queries + i, n_down, n_seen);
            }
        };
        for (int64_t k = 0; k < n_here; k += ACROSS)  // 32 keys stay in the first cache for all queries
            for_each([&](int64_t row, int64_t n_down, int64_t n_seen) {
                if (k < n_seen)
                    ADD_PRODUCT[n_down - 1](query + row * n_columns, n_columns, k_panels + k * n_columns, n_columns,
                                            scores + row * KEYS + k, KEYS, false);
            });
        for_each([&](int64_t first, int64_t n_down, int64_t n_seen) {
            for (int64_t row = first; row < first + n_down; row++) {
                float *of_row = scores + row * KEYS, *sum = sums + row * n_results;
                const int64_t query_at = chunk.first + row % chunk.n_queries;
                const uint16_t *mask = sight.masks + query_at * sight.n_across + begin;
                const float before = most[row];
                most[row] = std::max(before, mask_scores(of_row, mask, n_seen, scale));
                const float kept = before == most[row] ? 1 : std::exp(before - most[row]);
                total[row] = total[row] * kept + weigh(of_row, n_seen, most[row]);
                if (begin > 0 && kept != 1)
                    for (int64_t c = 0; c < n_results; c += 16)
                        _mm512_store_ps(sum + c, _mm512_mul_ps(_mm512_load_ps(sum + c), _mm512_set1_ps(kept)));
            }
        });
        for (int64_t c = 0; c < n_results; c += ACROSS)
            for_each([&](int64_t row, int64_t n_down, int64_t n_seen) {
                ADD_PRODUCT[n_down - 1](scores + row * KEYS, KEYS, v_panels + c * KEYS, n_seen,
                                        sums + row * n_results + c, n_results, begin > 0);
            });
    }
    for (int64_t row = 0; row < n_rows; row++) {
        float *to = (float *)place(result, row, 2, 1);
        const __mmask16 sees = total[row] == 0 ? 0 : 0xFFFF;  // else nothing was put to its sums
        const __m512 factor = _mm512_set1_ps(1 / total[row]);
        for (int64_t c = 0; c < n_results; c += 16)
            _mm512_storeu_ps(to + c, _mm512_maskz_mul_ps(sees, _mm512_load_ps(sums + row * n_results + c), factor));
    }
}

// What attention keeps from one call to the next
struct AttentionMemory {
    Memory keys, masks, scratch;
    Sight sight;
};

// All results; false without memory
bool attend_all(AttentionMemory &memory, ggml_tensor *result, int n_threads) {
    const ggml_tensor *queries = result->src[0], *keys = result->src[1], *values = result->src[2];
    const ggml_tensor *mask = result->src[3];
    const int64_t n_queries = queries->ne[1], n_kv_heads = keys->ne[2], n_keys = keys->ne[1];
    const int64_t n_heads = n_sharing(queries, keys);
    Sight &sight = memory.sight;
    sight.n_queries = std::max<int64_t>(DOWN, QUERIES / n_heads / DOWN * DOWN);
    const int64_t size = (n_scratch(keys, values, sight.n_queries * n_heads) + 15) / 16 * 16;
    auto *scratch = memory.scratch.reserve<float>(n_threads * size);
    sight.n_across = (n_keys + 15) / 16 * 16;
    sight.masks = memory.masks.reserve<uint16_t>(n_queries * sight.n_across);
    if (!scratch || !sight.masks) return false;
    sight.last.resize(n_queries);
    bool has_memory = true;
#pragma omp parallel num_threads(n_threads)
    {
#pragma omp for
        for (int64_t i = 0; i < n_queries; i++) sight.last[i] = last_seen(mask_row(mask, i), n_keys);
#pragma omp single
        {
            find_chunks(sight, mask, n_queries);
            sight.keys = memory.keys.reserve<int32_t>(sight.chunks.size() * sight.n_across);
            has_memory = sight.keys;
        }
        if (has_memory) {
#pragma omp for schedule(dynamic)
            for (size_t number = 0; number < sight.chunks.size(); number++) list_keys(sight, number, mask);
#pragma omp for schedule(dynamic)
            for (int64_t item = 0; item < int64_t(sight.chunks.size()) * n_kv_heads; item++)
                attend(result, sight, item / n_kv_heads, item % n_kv_heads, scratch + omp_get_thread_num() * size);
        }
    }
    return has_memory;
}

bool can_attend(const ggml_tensor *op) {
    const ggml_tensor *queries = op->src[0], *keys = op->src[1], *values = op->src[2], *mask = op->src[3];
    float more[2];  // ALiBi's bias, soft cap
    memcpy(more, op->op_params + 1, sizeof more);
    return mask && !op->src[4] && more[0] == 0 && more[1] == 0 && queries->type == GGML_TYPE_F32 &&
           keys->type == GGML_TYPE_F16 && values->type == GGML_TYPE_F16 && queries->nb[0] == sizeof(float) &&
           keys->nb[0] == 2 && values->nb[0] == 2 && keys->ne[0] % 16 == 0 && values->ne[0] % ACROSS == 0 &&
           queries->ne[3] == 1 && mask->ne[2] == 1 && mask->ne[3] == 1;
}
