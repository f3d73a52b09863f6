// Memory that grows: what it held is lost then.

#pragma once

#include <cstdlib>

struct Memory {
    void *data = nullptr;
    size_t size = 0;

    // At least n elements of undefined value; null without memory
    template <typename T>
    T *reserve(size_t n) {
        const size_t n_bytes = (n * sizeof(T) + 63) / 64 * 64;
        if (n_bytes > size) {
            free(data);
            data = aligned_alloc(64, n_bytes);
            size = data ? n_bytes : 0;
        }
        return (T *)data;
    }
    Memory() = default;
    Memory(const Memory &) = delete;
    ~Memory() { free(data); }
};
