// What several kernels share: reductions in a written-down order, rows of 16-byte vectors, activations.
#pragma once
#include "ptx.cuh"
#include <math.h>

constexpr int PAGE = 16;  // positions in a page of the KV cache; op.rs has the same number

template <class T> constexpr int VEC = 16 / sizeof(T);  // elements in 16 bytes

DEVICE int lane_id() { return threadIdx.x % WARP; }
DEVICE int warp_id() { return threadIdx.x / WARP; }

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The sum over a warp, the same bits in every lane: a butterfly adds the same pairs in every lane.
template <class T> DEVICE T warp_sum(T x) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) x += shuffle_xor(x, step);
    return x;
}

DEVICE float warp_max(float x) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) x = fmaxf(x, shuffle_xor(x, step));
    return x;
}

// The sum over a block of `warps` warps in warp order, the same bits in every thread. `scratch` is `warps`
// floats of shared memory that nobody reads any more.
template <int warps> DEVICE float block_sum(float x, float* scratch) {
    x = warp_sum(x);
    if (lane_id() == 0) scratch[warp_id()] = x;
    sync_block();
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < warps; w++) sum += scratch[w];
    sync_block();
    return sum;
}

// `W` neighbouring elements as floats: eight 16-bit ones or four floats and more are moved 16 bytes at a time
// (their address must allow it), one alone.
template <int W, class T> DEVICE void load(const T* from, float (&v)[W]) {
    if constexpr (W == 1) {
        v[0] = to_float(*from);
    } else if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int i = 0; i < W; i += 4) {
            Vec16 raw = load16(from + i);
#pragma unroll
            for (int j = 0; j < 4; j++) v[i + j] = bits_to_float(raw.word[j]);
        }
    } else {
        static_assert(W == VEC<T>);
        Vec16 raw = load16(from);
#pragma unroll
        for (int i = 0; i < W; i += 2) {
            v[i] = low<T>(raw.word[i / 2]);
            v[i + 1] = high<T>(raw.word[i / 2]);
        }
    }
}

template <int W, class T> DEVICE void store(T* to, const float (&v)[W]) {
    if constexpr (W == 1) {
        *to = from_float<T>(v[0]);
    } else {
        static_assert(W == VEC<T>);
        Vec16 raw;
#pragma unroll
        for (int i = 0; i < W; i += 2) raw.word[i / 2] = pack2<T>(v[i], v[i + 1]);
        store16(to, raw);
    }
}

// op.rs: Activation.
enum Activation : uint32_t { NONE = 0, QUICK_GELU = 1, GELU_ERF = 2 };

DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
DEVICE float silu(float x) { return x * sigmoid(x); }
DEVICE float activate(float x, uint32_t activation) {
    if (activation == QUICK_GELU) return x * sigmoid(1.702f * x);
    if (activation == GELU_ERF) return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    return x;
}
