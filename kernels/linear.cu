// Linear and GatedLinear for rows of a prompt or an image: y = act(x · Wᵀ + b) + residual, or silu(gate) · up.
//
//   x         T [M, K]                 W  T [N, ldw]; gated: rows g0, u0, g1, u1, ...
//   bias      f32 [N] or null          residual  T [M, N] or null; may be y
//   y         T [M, N], f32 [M, N] if wide, T [M, N/2] if gated
//   grid      (tiles, slices of K), the tile's warps; reduction order: gemm.cuh
//
// Floor: 2 M N K FLOP at the tensor cores' rate; at few rows the N K elements of W at DRAM's. Of an H200 at 790 TFLOP/s,
// in us: CLIP ViT-L with 577 rows: qkv 4.6, out 1.5, fc1 6.1, fc2 6.1; LLaMA-7B with 640: qkv 82, out 27, gate and up
// 146, down 73. mma.sync issues at about two thirds of that rate on sm_90. What the choice of tiles loses to waves that
// are not full is in backend/cuda/tile.rs.
#include "gemm.cuh"

struct LinearArgs {
    GemmArgs gemm;
    const void* x;
    const float* bias;
    const void* residual;
    void* y;
    uint32_t activation;  // Activation
    uint32_t form;        // Form
};
static_assert(sizeof(LinearArgs) == 88, "as in backend/cuda/linear.rs");

enum Form : uint32_t { PLAIN = 0, WIDE = 1, GATED = 2 };

// Rows of x of any length and at any address.
template <class T> struct AnyRows {
    static constexpr bool ASYNC = false;
    const T* x;
    uint32_t rows, depth;

    DEVICE Vec16 gather(uint32_t row, uint32_t k) const {
        Vec16 v = {};
        if (!mask(row < rows)) return v;
        const T* from = x + (int64_t)row * depth;
#pragma unroll
        for (int e = 0; e < 8; e++)
            if (mask(k + e < depth)) v.word[e / 2] |= (uint32_t)from[k + e].bits << e % 2 * 16;
        return v;
    }
};

// act(sum + bias) + residual.
template <class T, Activation act, bool whole> struct LinearOutput {
    const LinearArgs& args;

    // Bias and residual of four columns.
    struct Beside {
        float bias[4], residual[4];
    };
    DEVICE Beside beside(uint32_t row, uint32_t col) const {
        Beside b = {};
        const int left = columns_left(args.gemm, row, col);
        if (!mask(left > 0)) return b;
        if (args.bias) load4<whole>(b.bias, args.bias + col, left);
        if (args.residual)
            load4<whole>(b.residual, (const T*)args.residual + (int64_t)row * args.gemm.cols + col, left);
        return b;
    }
    DEVICE void write(uint32_t row, uint32_t col, float (&y)[4], const Beside& b) const {
        const int left = columns_left(args.gemm, row, col);
        if (!mask(left > 0)) return;
        const int64_t at = (int64_t)row * args.gemm.cols + col;
        for (int e = 0; e < 4; e++) y[e] = activate(y[e] + b.bias[e], act) + b.residual[e];
        if (args.form == WIDE) store4<whole>((float*)args.y + at, y, left);
        else store4<whole>((T*)args.y + at, y, left);
    }
};

// silu(gate + bias) · (up + bias) of two features.
template <class T, bool whole> struct GatedOutput : LinearOutput<T, NONE, whole> {
    using Beside = typename LinearOutput<T, NONE, whole>::Beside;

    DEVICE void write(uint32_t row, uint32_t col, float (&y)[4], const Beside& b) const {
        const int left = columns_left(this->args.gemm, row, col);
        if (!mask(left > 0)) return;
        T* to = (T*)this->args.y + ((int64_t)row * this->args.gemm.cols + col) / 2;
        for (int e = 0; e < 4; e++) y[e] += b.bias[e];
        const float first = silu(y[0]) * y[1], second = silu(y[2]) * y[3];
        if constexpr (whole) {
            *(uint32_t*)to = pack2<T>(first, second);
        } else {
            to[0] = from_float<T>(first);
            if (mask(left > 2)) to[1] = from_float<T>(second);
        }
    }
};

// `whole`: rows of y are whole fours of columns.
template <class T, class Tile, bool whole, class X> DEVICE void linear(const LinearArgs& args, const X& x) {
    gemm<T, Tile>(args.gemm, x, [&](Sums<Tile>& c, Place first) {
        if (args.form == GATED) write<Tile>(c, GatedOutput<T, whole>{{args}}, first);
        else if (args.activation == QUICK_GELU) write<Tile>(c, LinearOutput<T, QUICK_GELU, whole>{args}, first);
        else if (args.activation == GELU_ERF) write<Tile>(c, LinearOutput<T, GELU_ERF, whole>{args}, first);
        else write<Tile>(c, LinearOutput<T, NONE, whole>{args}, first);
    });
}

template <class T, class Tile> DEVICE void linear(const LinearArgs& args) {
    const Matrix<T> x = {(const T*)args.x, args.gemm.rows, args.gemm.depth, args.gemm.depth};
    linear<T, Tile, true>(args, x);
}

template <class T, class Tile> DEVICE void linear_any(const LinearArgs& args) {
    linear<T, Tile, false>(args, AnyRows<T>{(const T*)args.x, args.gemm.rows, args.gemm.depth});
}

KERNEL(128, 4, linear_16x64_bf16, LinearArgs) { linear<bf16, Tile<16, 64, 64, 5, 1, 4>>(args); }
KERNEL(128, 4, linear_16x64_f16, LinearArgs) { linear<f16, Tile<16, 64, 64, 5, 1, 4>>(args); }
KERNEL(128, 3, linear_64x64_bf16, LinearArgs) { linear<bf16, Tile<64, 64, 64, 4, 2, 2>>(args); }
KERNEL(128, 3, linear_64x64_f16, LinearArgs) { linear<f16, Tile<64, 64, 64, 4, 2, 2>>(args); }
KERNEL(128, 3, linear_any_64x64_bf16, LinearArgs) { linear_any<bf16, Tile<64, 64, 64, 4, 2, 2>>(args); }
KERNEL(128, 3, linear_any_64x64_f16, LinearArgs) { linear_any<f16, Tile<64, 64, 64, 4, 2, 2>>(args); }
KERNEL(128, 2, linear_64x96_bf16, LinearArgs) { linear<bf16, Tile<64, 96, 64, 4, 2, 2>>(args); }
KERNEL(128, 2, linear_64x96_f16, LinearArgs) { linear<f16, Tile<64, 96, 64, 4, 2, 2>>(args); }
KERNEL(128, 2, linear_64x128_bf16, LinearArgs) { linear<bf16, Tile<64, 128, 64, 4, 2, 2>>(args); }
KERNEL(128, 2, linear_64x128_f16, LinearArgs) { linear<f16, Tile<64, 128, 64, 4, 2, 2>>(args); }
KERNEL(256, 1, linear_128x128_bf16, LinearArgs) { linear<bf16, Tile<128, 128, 64, 4, 2, 4>>(args); }
KERNEL(256, 1, linear_128x128_f16, LinearArgs) { linear<f16, Tile<128, 128, 64, 4, 2, 4>>(args); }
KERNEL(128, 2, linear_160x96_bf16, LinearArgs) { linear<bf16, Tile<160, 96, 64, 3, 2, 2>>(args); }
KERNEL(128, 2, linear_160x96_f16, LinearArgs) { linear<f16, Tile<160, 96, 64, 3, 2, 2>>(args); }
KERNEL(256, 1, linear_128x160_bf16, LinearArgs) { linear<bf16, Tile<128, 160, 32, 4, 4, 2>>(args); }
KERNEL(256, 1, linear_128x160_f16, LinearArgs) { linear<f16, Tile<128, 160, 32, 4, 4, 2>>(args); }
KERNEL(256, 1, linear_128x256_bf16, LinearArgs) { linear<bf16, Tile<128, 256, 64, 3, 2, 4>>(args); }
KERNEL(256, 1, linear_128x256_f16, LinearArgs) { linear<f16, Tile<128, 256, 64, 3, 2, 4>>(args); }
