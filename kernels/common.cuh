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

constexpr float LOG2_E = 1.442695040888963f;

// Within a few units in the last place of f32, and |x| of them more: results are rounded to 16 bits. With expf, erff and
// a division they were half the time of a product with an activation (fc1 of CLIP ViT-L on an H200: 10 of 20 us).
DEVICE float sigmoid(float x) { return rcp_approx(1.0f + exp2_approx(-LOG2_E * x)); }
DEVICE float silu(float x) { return x * sigmoid(x); }

// x Φ(x), by the fit of erfc of Numerical Recipes (6.2, erfcc), which is within 1.2e-7 of it relatively, however far out.
DEVICE float gelu_erf(float x) {
    const float z = fabsf(x) * 0.70710678118654752f, t = rcp_approx(fmaf(0.5f, z, 1.0f));
    constexpr float FIT[] = {-0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f, -0.18628806f,
                             0.09678418f,  0.37409196f, 1.00002368f,  -1.26551223f};
    float power = 0.17087277f;
    for (float c : FIT) power = fmaf(power, t, c);
    const float tail = 0.5f * t * exp2_approx(LOG2_E * fmaf(-z, z, power));
    return x * (x > 0.0f ? 1.0f - tail : tail);
}
DEVICE float activate(float x, uint32_t activation) {
    if (activation == QUICK_GELU) return x * sigmoid(1.702f * x);
    if (activation == GELU_ERF) return gelu_erf(x);
    return x;
}
