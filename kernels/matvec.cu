// Linear and GatedLinear of decode rows: matrix times few vectors, at the speed of memory.
//
//   linear  y = act(x Wᵀ + bias) + residual             y T, or f32 if `wide`: [rows, n]
//   gated   y = silu(x Wgᵀ + bias_g) (x Wuᵀ + bias_u)   y T [rows, n / 2]; W and bias interleaved g0, u0, g1, u1, ...
//
// x is T [rows, k], W T [n, ldw] with ldw = k rounded up to 8 and zeros behind k, 16-byte aligned; bias f32 [n] or
// null, residual T [rows, n] or null (it may be y). Floor: the n ldw weights, read once for every eight rows.
//
// A block makes a tile of eight outputs for up to eight rows, its sixteen warps sharing K. Sums are taken by mma with
// x as the 16x16 operand, rows 8 to 15 of it zero, and W as the 16x8 one: beside memory a tensor core costs nothing
// (512 bytes of weights take an SM of an H200 27 clocks, their two mma 4 to 8), it converts nothing, and does one
// row's arithmetic the same way whatever stands in the other seven. A sum over K may be taken in any order on which
// both operands agree, so a lane's 16 bytes of a row are used as they lie: k = 8t ... 8t+7 of a stretch of 32 are
// columns 2t, 2t+1, 2t+8, 2t+9 of two mma.
//
// Reduction order, the same for every number of rows: a stretch is two mma, four stretches are a piece; warp w
// sums pieces w, w + 16, w + 32 ... of K, ascending; the sixteen sums are added in order; then bias, activation, residual.
//
// Bytes in flight: 16 warps of a block with 4 loads of 512 bytes each are 32 KB, of the 23 KB that 4.3 TB/s times
// 0.7 us ask of each of 132 SMs; two blocks an SM hide each other's beginnings and ends, and where only one is left
// in the last wave (4096 outputs are 512 tiles on 264 places, 22016 are 10.4 waves) it keeps the pace alone.
//
// Grid: [ceil(rows / 8), ceil(n / 8)], blocks of 512; the groups of rows of one tile are neighbours, so that all but the
// first find its weights in L2. Shared: 4 KiB.
#include "common.cuh"

struct MatvecArgs {
    const void* x;
    const void* weights;
    const float* bias;
    const void* residual;
    void* y;
    uint32_t rows, n, k, ldw;
    uint32_t activation;
    uint32_t wide;
};
static_assert(sizeof(MatvecArgs) == 64);

constexpr int WARPS = 16;
constexpr int TILE = 8;      // rows, and outputs, of a block
constexpr int STRETCH = 32;  // of K, in one load of a warp
constexpr int LOADS = 4;     // of a lane, independent of each other
constexpr int PIECE = LOADS * STRETCH;

// Eight elements of a row of x that is not aligned, because its width is no multiple of 8; zeros behind its end.
template <class T> DEVICE Vec16 gather(const T* x, int left) {
    Vec16 v{};
#pragma unroll
    for (int i = 0; i < VEC<T>; i++) {
        uint32_t bits = mask(i < left) ? x[i].bits : 0;
        v.word[i / 2] |= bits << (i % 2 * 16);
    }
    return v;
}

// What a lane takes of its warp's share of K: 16 bytes of every stretch, of row lane / 4 of x and of W.
template <class T> struct Walk {
    const T *x, *weights;
    bool has_row, has_out;
    int left;  // elements from there to the end of the row
    float sum[4] = {};

    DEVICE Walk(const MatvecArgs& args, uint32_t first_row, uint32_t first_out) {
        uint32_t row = first_row + lane_id() / 4, out = first_out + lane_id() / 4;
        uint32_t k = warp_id() * PIECE + lane_id() % 4 * VEC<T>;
        x = (const T*)args.x + (int64_t)row * args.k + k;
        weights = (const T*)args.weights + (int64_t)out * args.ldw + k;
        has_row = mask(row < args.rows);
        has_out = mask(out < args.n);
        left = (int)args.k - (int)k;
    }

    DEVICE void go(int elements) {
        x += elements;
        weights += elements;
        left -= elements;
    }

    // Adds the products of the next `loads` stretches.
    template <int loads, bool aligned> DEVICE void add() {
        Vec16 w[loads], v[loads];
#pragma unroll
        for (int i = 0; i < loads; i++) {
            int at = i * STRETCH;
            bool inside = mask(at < left);
            w[i] = inside && has_out ? load16_stream(weights + at) : Vec16{};
            v[i] = !(inside && has_row) ? Vec16{} : aligned ? load16(x + at) : gather(x + at, left - at);
        }
#pragma unroll
        for (int i = 0; i < loads; i++) {
            mma<T>(sum, {v[i].word[0], 0, v[i].word[1], 0}, w[i].word[0], w[i].word[1]);
            mma<T>(sum, {v[i].word[2], 0, v[i].word[3], 0}, w[i].word[2], w[i].word[3]);
        }
    }
};

// The sums of a block's tile, in shared memory as [warp][row][output].
template <class T>
DEVICE void add_up(const MatvecArgs& args, uint32_t first_row, uint32_t first_out, float* partials) {
    Walk<T> walk(args, first_row, first_out);
    if (args.k % VEC<T> == 0) {
#pragma unroll 1
        for (uint32_t k = warp_id() * PIECE; k < args.k; k += WARPS * PIECE, walk.go(WARPS * PIECE))
            walk.template add<LOADS, true>();
    } else {
        for (uint32_t k = warp_id() * PIECE; k < args.k; k += WARPS * PIECE, walk.go((WARPS - 1) * PIECE)) {
#pragma unroll 1
            for (int i = 0; i < LOADS; i++, walk.go(STRETCH)) walk.template add<1, false>();
        }
    }
    float* mine = partials + warp_id() * TILE * TILE + lane_id() * 2;
    mine[0] = walk.sum[0];
    mine[1] = walk.sum[1];
    sync_block();
}

DEVICE float total(const float* partials, int row, int out) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += partials[(w * TILE + row) * TILE + out];
    return sum;
}

template <class T> DEVICE void matvec(const MatvecArgs& args) {
    SHARED(shared);
    float* partials = (float*)shared;
    uint32_t first_row = blockIdx.x * TILE, first_out = blockIdx.y * TILE;
    add_up<T>(args, first_row, first_out, partials);

    if (threadIdx.x >= TILE * TILE) return;
    uint32_t row = first_row + threadIdx.x / TILE, out = first_out + threadIdx.x % TILE;
    if (!mask(row < args.rows && out < args.n)) return;
    float y = total(partials, threadIdx.x / TILE, threadIdx.x % TILE);
    int64_t at = (int64_t)row * args.n + out;
    if (args.bias) y += args.bias[out];
    y = activate(y, args.activation);
    if (args.residual) y += to_float(((const T*)args.residual)[at]);
    if (args.wide) {
        ((float*)args.y)[at] = y;
    } else {
        ((T*)args.y)[at] = from_float<T>(y);
    }
}

template <class T> DEVICE void matvec_gated(const MatvecArgs& args) {
    SHARED(shared);
    float* partials = (float*)shared;
    uint32_t first_row = blockIdx.x * TILE, first_out = blockIdx.y * TILE;
    add_up<T>(args, first_row, first_out, partials);

    constexpr int PAIRS = TILE / 2;
    if (threadIdx.x >= TILE * PAIRS) return;
    int pair = threadIdx.x % PAIRS;
    uint32_t row = first_row + threadIdx.x / PAIRS, gate = first_out + 2 * pair;
    if (!mask(row < args.rows && gate < args.n)) return;
    float g = total(partials, threadIdx.x / PAIRS, 2 * pair);
    float u = total(partials, threadIdx.x / PAIRS, 2 * pair + 1);
    if (args.bias) {
        g += args.bias[gate];
        u += args.bias[gate + 1];
    }
    ((T*)args.y)[(int64_t)row * (args.n / 2) + gate / 2] = from_float<T>(silu(g) * u);
}

KERNEL(512, 2, matvec_bf16, MatvecArgs) { matvec<bf16>(args); }
KERNEL(512, 2, matvec_f16, MatvecArgs) { matvec<f16>(args); }
KERNEL(512, 2, matvec_gated_bf16, MatvecArgs) { matvec_gated<bf16>(args); }
KERNEL(512, 2, matvec_gated_f16, MatvecArgs) { matvec_gated<f16>(args); }
