// RopeAppend: rotates q and k of every row by its position, half-split, writes k and v to their slot of the KV cache,
// and returns q.
//
//   rotated[d] = x[d] cos[d] - x[d + E/2] sin[d], rotated[d + E/2] = x[d + E/2] cos[d] + x[d] sin[d], d < E/2
//
// qkv is T [rows, (H + 2K) E], table f32 [context, E] (cosines, then sines), positions and slots i32 [rows], pages T
// [page][K][PAGE][E] with slot = page PAGE + offset, q T [rows, H E]. E is a multiple of 8, so every head is aligned to 16
// bytes; its halves are if E is a multiple of 16, and are taken by single elements if not.
//
// Grid: [rows, ceil(items / 128)], blocks of 128; an item is a piece of the first half of a head and its partner in the
// second, rotated in q and k, copied in v. Shared: none.
// Floor: qkv read, q, k and v written, E f32 of the table a row; in decode it is one launch's latency.
#include "common.cuh"

struct RopeArgs {
    const void* qkv;
    const int* positions;
    const int* slots;
    const float* table;
    void* k;
    void* v;
    void* q;
    uint32_t heads, kv_heads, head_dim;
    uint32_t unused;
};
static_assert(sizeof(RopeArgs) == 72);

constexpr int ROPE_THREADS = 128;

// Item i of row `row`, in pieces of `W` elements.
template <class T, int W> DEVICE void rope_item(const RopeArgs& args, uint32_t row, uint32_t item) {
    uint32_t half = args.head_dim / 2, pieces = half / W;
    uint32_t head = item / pieces, d = item % pieces * W;
    uint32_t rotated_heads = args.heads + args.kv_heads;
    if (!mask(head < rotated_heads + args.kv_heads)) return;

    float x[W], y[W];
    const T* from = (const T*)args.qkv + ((int64_t)row * (rotated_heads + args.kv_heads) + head) * args.head_dim + d;
    load<W>(from, x);
    load<W>(from + half, y);
    if (head < rotated_heads) {
        float cos[W], sin[W];
        const float* angles = args.table + (int64_t)args.positions[row] * args.head_dim + d;
        load<W>(angles, cos);
        load<W>(angles + half, sin);
#pragma unroll
        for (int i = 0; i < W; i++) {
            float turned = fmaf(x[i], cos[i], -(y[i] * sin[i]));
            y[i] = fmaf(y[i], cos[i], x[i] * sin[i]);
            x[i] = turned;
        }
    }

    T* to = (T*)args.q + ((int64_t)row * args.heads + head) * args.head_dim;
    if (head >= args.heads) {
        uint32_t kv_head = (head - args.heads) % args.kv_heads, slot = args.slots[row];
        T* pages = (T*)(head < rotated_heads ? args.k : args.v);
        to = pages + (((int64_t)(slot / PAGE) * args.kv_heads + kv_head) * PAGE + slot % PAGE) * args.head_dim;
    }
    store<W>(to + d, x);
    store<W>(to + d + half, y);
}

template <class T> DEVICE void rope_append(const RopeArgs& args) {
    uint32_t row = blockIdx.x, item = blockIdx.y * ROPE_THREADS + threadIdx.x;
    if (args.head_dim % (2 * VEC<T>) == 0) {
        rope_item<T, VEC<T>>(args, row, item);
    } else {
        rope_item<T, 1>(args, row, item);
    }
}

KERNEL(128, 8, rope_append_bf16, RopeArgs) { rope_append<bf16>(args); }
KERNEL(128, 8, rope_append_f16, RopeArgs) { rope_append<f16>(args); }
