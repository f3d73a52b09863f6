// A ggml backend that computes a model's layers: products of matrices on AMX, the matrix units of Intel's processors, or
// on VNNI, and attention, norms and activations in F32 on AVX-512.
//
// llama.cpp's own kernels unpack weights anew for every few tokens, and compute attention between texts that do not see
// each other. Here each vector of a result depends on its own text alone: it is the same in every batch.
//
// Without AMX, products of F32, F16 and BF16 are computed in F32, and without VNNI the others are left to llama.cpp.
//
// own.py compiles this file against the headers of the installed llama-cpp-python, and tries it before it is used.

#include "ggml-backend.h"
#include "ggml.h"

#include "attention.h"
#include "bytes.h"
#include "floats.h"
#include "products.h"
#include "rows.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>

// What ggml calls in a backend. Its installed headers do not declare it: ggml/src/ggml-backend-impl.h, API version 2.
struct ggml_backend {
    ggml_guid_t guid;
    const char *(*get_name)(ggml_backend_t);
    void (*free)(ggml_backend_t);
    void *unused_1[10];
    ggml_status (*graph_compute)(ggml_backend_t, ggml_cgraph *);
    void *unused_2[3];
    ggml_backend_dev_t device;
    void *context;
};

struct ggml_backend_device {
    const char *(*get_name)(ggml_backend_dev_t);
    const char *(*get_description)(ggml_backend_dev_t);
    void (*get_memory)(ggml_backend_dev_t, size_t *, size_t *);
    enum ggml_backend_dev_type (*get_type)(ggml_backend_dev_t);
    void (*get_props)(ggml_backend_dev_t, ggml_backend_dev_props *);
    ggml_backend_t (*init_backend)(ggml_backend_dev_t, const char *);
    ggml_backend_buffer_type_t (*get_buffer_type)(ggml_backend_dev_t);
    void *unused_1[2];
    bool (*supports_op)(ggml_backend_dev_t, const ggml_tensor *);
    bool (*supports_buft)(ggml_backend_dev_t, ggml_backend_buffer_type_t);
    void *unused_2[4];
    ggml_backend_reg_t reg;
    void *context;
};

struct ggml_backend_reg {
    int api_version;
    const char *(*get_name)(ggml_backend_reg_t);
    size_t (*get_device_count)(ggml_backend_reg_t);
    ggml_backend_dev_t (*get_device)(ggml_backend_reg_t, size_t);
    void *(*get_proc_address)(ggml_backend_reg_t, const char *);
    void *context;
};

namespace {

bool is_on = false;
enum { FLOATS, TILES, BYTES } products = FLOATS;  // what they are computed on; with BYTES come FLOATS

// Of a llama.cpp context
struct Context {
    int n_threads = 1;
    Inputs inputs;
    Bytes bytes;
    AttentionMemory attention;
};

const char *name() { return "F2GGUF"; }

const char *backend_name(ggml_backend_t) { return name(); }

void backend_free(ggml_backend_t backend) {
    delete (Context *)backend->context;
    delete backend;
}

// Another shape of what is in memory
bool is_view(const ggml_tensor *op) {
    switch (op->op) {
        case GGML_OP_NONE:
        case GGML_OP_RESHAPE:
        case GGML_OP_VIEW:
        case GGML_OP_PERMUTE:
        case GGML_OP_TRANSPOSE: return true;
        default: return false;
    }
}

// Matrices of layers only: the LM head comes after the vectors, and is to stay where a callback can stop it.
bool is_product(const ggml_tensor *op) {
    const ggml_tensor *matrix = op->src[0], *inputs = op->src[1];
    return !strncmp(matrix->name, "blk.", 4) && ggml_is_matrix(matrix) && ggml_is_contiguous(matrix) &&
           matrix->ne[0] % DEPTH == 0 && matrix->ne[1] % ROWS == 0 && ggml_is_matrix(inputs) &&
           inputs->type == GGML_TYPE_F32 && inputs->nb[0] == sizeof(float) && !op->op_params[0] &&
           !op->op_params[1];  // neither precision nor a hint
}

bool can_multiply(ggml_type type) {
    if (products == TILES) return type != GGML_TYPE_F32 && unpack_of(type);
    return read_floats_of(type) || (products == BYTES && read_of(type));
}

// False without memory
bool multiply(Context &context, ggml_tensor *product) {
    if (products == TILES) return multiply_all_tiles(context.inputs, product, context.n_threads);
    if (!read_floats_of(product->src[0]->type)) return multiply_all_bytes(context.bytes, product, context.n_threads);
    multiply_all_floats(product, context.n_threads);
    return true;
}

bool is_no_work(const ggml_tensor *op) {
    return is_view(op) || ggml_is_empty(op) || !(op->flags & GGML_TENSOR_FLAG_COMPUTE);
}

ggml_status backend_compute(ggml_backend_t backend, ggml_cgraph *graph) {
    Context &context = *(Context *)backend->context;
    context.inputs.packed = context.bytes.packed = nullptr;  // of another graph, whose memory may be another's by now
    const int n_nodes = ggml_graph_n_nodes(graph);
    for (int i = 0; i < n_nodes; i++) {
        ggml_tensor *node = ggml_graph_node(graph, i);
        if (is_no_work(node)) continue;
        if (node->op == GGML_OP_MUL_MAT) {
            if (!multiply(context, node)) return GGML_STATUS_ALLOC_FAILED;
        } else if (node->op == GGML_OP_FLASH_ATTN_EXT) {
            if (!attend_all(context.attention, node, context.n_threads)) return GGML_STATUS_ALLOC_FAILED;
        } else if (node->op == GGML_OP_CPY) {
            cast(node, context.n_threads);
        } else {
            const ggml_tensor *steps[MAX_STEPS] = {node};
            int n_steps = 1;
            for (; i + 1 < n_nodes && n_steps < MAX_STEPS; i++) {
                const ggml_tensor *next = ggml_graph_node(graph, i + 1);
                if (is_no_work(next)) continue;
                if (!is_by_rows(next) || !can_follow(steps, n_steps, next)) break;
                steps[n_steps++] = next;
            }
            compute_rows(steps, n_steps, context.n_threads);
        }
    }
    return GGML_STATUS_SUCCESS;
}

void set_n_threads(ggml_backend_t backend, int n_threads) { ((Context *)backend->context)->n_threads = n_threads; }

const char *device_name(ggml_backend_dev_t) { return name(); }

void device_memory(ggml_backend_dev_t, size_t *free, size_t *total) { *free = *total = 0; }

enum ggml_backend_dev_type device_type(ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_ACCEL; }

void device_props(ggml_backend_dev_t, ggml_backend_dev_props *props) {
    memset(props, 0, sizeof *props);
    props->name = props->description = name();
    props->type = GGML_BACKEND_DEVICE_TYPE_ACCEL;
}

ggml_backend_t device_init(ggml_backend_dev_t device, const char *) {
    static ggml_guid guid = {'f', '2', 'g', 'g', 'u', 'f', ' ', 'o', 'n', ' ', 'A', 'M', 'X', ' ', '1', 0};
    return new ggml_backend{&guid, backend_name, backend_free, {}, backend_compute, {}, device, new Context};
}

ggml_backend_buffer_type_t device_buffer_type(ggml_backend_dev_t) { return ggml_backend_cpu_buffer_type(); }

bool device_supports_buffers(ggml_backend_dev_t, ggml_backend_buffer_type_t type) {
    return ggml_backend_buft_is_host(type);
}

bool device_supports(ggml_backend_dev_t, const ggml_tensor *op) {
    if (is_view(op)) return true;
    switch (op->op) {
        case GGML_OP_MUL_MAT: return is_on && can_multiply(op->src[0]->type) && is_product(op);
        case GGML_OP_FLASH_ATTN_EXT: return is_on && can_attend(op);
        case GGML_OP_CPY: return is_on && is_cast(op);
        default: return is_on && is_by_rows(op);
    }
}

const char *registry_name(ggml_backend_reg_t) { return name(); }

size_t registry_count(ggml_backend_reg_t) { return 1; }

ggml_backend_dev_t registry_device(ggml_backend_reg_t registry, size_t) {
    static ggml_backend_device device{device_name, device_name, device_memory,           device_type, device_props,
                                      device_init, device_buffer_type, {},               device_supports,
                                      device_supports_buffers,         {},               registry,    nullptr};
    return &device;
}

void *registry_address(ggml_backend_reg_t, const char *function) {
    return strcmp(function, "ggml_backend_set_n_threads") ? nullptr : (void *)set_n_threads;
}

ggml_backend_reg registry{2, registry_name, registry_count, registry_device, registry_address, nullptr};

}  // namespace

// Ask Linux for the right to use tiles (ARCH_REQ_XCOMP_PERM, XTILE_DATA); false where they are not to be had.
extern "C" bool f2gguf_may_use_tiles() { return !syscall(SYS_arch_prctl, 0x1023, 18); }

// Let llama.cpp's later contexts have this backend.
extern "C" void f2gguf_register() { ggml_backend_register(&registry); }

// Whether it computes anything, of all contexts, from now on, and products on what: own.py's Products.
extern "C" void f2gguf_switch(bool on, int kind) {
    is_on = on;
    products = decltype(products)(kind);
}

// `left`, rows of n_columns, times as long rows of `right`: n_right numbers for each row of `left`. Both counts are
// multiples of 32. False without memory.
extern "C" bool f2gguf_product(const float *left, const float *right, float *to, int64_t n_left, int64_t n_right,
                               int64_t n_columns, int n_threads) {
    const auto rows = [](const float *data, int64_t n, int64_t length) {
        const size_t row = length * sizeof(float);
        ggml_tensor tensor{};
        tensor.type = GGML_TYPE_F32;
        tensor.data = (void *)data;
        std::copy_n(std::array<int64_t, 4>{length, n, 1, 1}.begin(), 4, tensor.ne);
        std::copy_n(std::array<size_t, 4>{sizeof(float), row, n * row, n * row}.begin(), 4, tensor.nb);
        return tensor;
    };
    constexpr int64_t TOGETHER = 512;  // rows, which stay in the second cache as bf16
    Inputs kept;
    ggml_tensor matrix = rows(right, n_right, n_columns);
    for (int64_t i = 0; i < n_left; i += TOGETHER) {
        const int64_t n = std::min(TOGETHER, n_left - i);
        ggml_tensor inputs = rows(left + i * n_columns, n, n_columns), result = rows(to + i * n_right, n, n_right);
        result.src[0] = &matrix;
        result.src[1] = &inputs;
        kept.packed = nullptr;
        if (!multiply_all_tiles(kept, &result, n_threads)) return false;
    }
    return true;
}

// A backend for a trial of it.
extern "C" ggml_backend_t f2gguf_backend(int n_threads) {
    ggml_backend_t backend = device_init(registry_device(&registry, 0), nullptr);
    set_n_threads(backend, n_threads);
    return backend;
}
