// Linear and GatedLinear of decode rows: matrix times few vectors, at the speed of memory.
//
//   linear  y = act(x Wᵀ + bias) + residual             y T, or f32 if `wide`: [rows, n]
//   gated   y = silu(x Wgᵀ + bias_g) (x Wuᵀ + bias_u)   y T [rows, n / 2]; W and bias interleaved g0, u0, g1, u1, ...
//
// x is T [rows, k], W T [n, ldw] with ldw = k rounded up to 8 and zeros behind k, 16-byte aligned; bias f32 [n] or
// null, residual T [rows, n] or null (it may be y). Floor: the n ldw weights, read once for every sixteen rows.
//
// A block makes eight outputs for up to 8 or 16 rows, its sixteen warps sharing K. Sums are taken by mma with x as the
// 16x16 operand (rows that are not there are zero) and W as the 16x8 one: beside memory a tensor core costs
// nothing (512 bytes of weights take an SM of an H200 27 clocks, their two mma 4 to 8), it converts nothing, and does
// one row's arithmetic the same way whatever stands in the others. A sum over K may be taken in any order on which
// both operands agree, so a lane's 16 bytes of a row are used as they lie: k = 8t ... 8t+7 of a stretch of 32 are
// columns 2t, 2t+1, 2t+8, 2t+9 of two mma.
//
// Reduction order, the same for every number of rows: a stretch is two mma, four stretches are a piece; warp w
// sums pieces w, w + 16, w + 32 ... of K, ascending; the sixteen sums are added in order; then bias, activation, residual.
//
// Bytes in flight: 16 warps of a block with 4 loads of 512 bytes each are 32 KB (16 KB with 16 rows, whose x takes
// the registers), two blocks an SM twice that, of the 23 KB that 4.3 TB/s times 0.7 us ask of each of 132 SMs. Two
// blocks hide each other's beginnings and ends; where one is left in the last wave (4096 outputs are 512 tiles
// on 264 places, 22016 are 10.4 waves) it keeps the pace alone. x is read by every block, from L1, which weights pass by.
//
// RmsNorm before it is a launch of its own (norm.cu), 1.8 us of a graph. Folded in, qkv of LLaMA-7B takes longer than both
// launches, 27.8 us on an H200: rows normalised in shared memory by every block 32.1, by blocks that stay for several tiles
// 28.6 to 29.7; gamma, and squares by mma, on x's way to the product 31.9 to 33.5, since whatever stands between the
// loads and their use leaves fewer bytes in flight. Of gate and up, 45.7 us, the best is 49.6.
//
// Grid: [ceil(rows / 8 or 16), ceil(n / 8)], blocks of 512; the groups of rows of one tile are neighbours, so that all
// but the first find its weights in L2. Shared: 512 bytes a row.
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
constexpr int OUTS = 8;      // outputs of a block; its rows are 8 or 16
constexpr int STRETCH = 32;  // of K, in one load of a warp
constexpr int PIECE = 4 * STRETCH;

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

// What a lane takes of its warp's share of K: 16 bytes of every stretch, of row lane / 4 of W and of x, and of every
// eighth row after it.
template <class T, int ROWS> struct Walk {
    static constexpr int HALVES = ROWS / 8;
    // Stretches under way at once: what 64 registers a thread hold.
    static constexpr int LOADS = 4 / HALVES;

    const T *x, *weights;
    uint32_t width;  // of x
    bool has_row[HALVES], has_out;
    int left;  // elements from there to the end of the row
    float sum[4] = {};

    DEVICE Walk(const MatvecArgs& args, uint32_t first_row, uint32_t first_out) : width(args.k) {
        uint32_t row = first_row + lane_id() / 4, out = first_out + lane_id() / 4;
        uint32_t k = warp_id() * PIECE + lane_id() % 4 * VEC<T>;
        x = (const T*)args.x + (int64_t)row * width + k;
        weights = (const T*)args.weights + (int64_t)out * args.ldw + k;
#pragma unroll
        for (int h = 0; h < HALVES; h++) has_row[h] = mask(row + 8 * h < args.rows);
        has_out = mask(out < args.n);
        left = (int)width - (int)k;
    }

    DEVICE void go(int elements) {
        x += elements;
        weights += elements;
        left -= elements;
    }

    // Adds the products of the next `loads` stretches.
    template <int loads, bool aligned> DEVICE void add() {
        Vec16 w[loads], v[loads][2];
#pragma unroll
        for (int i = 0; i < loads; i++) {
            int at = i * STRETCH;
            bool inside = mask(at < left);
            w[i] = inside && has_out ? load16_stream(weights + at) : Vec16{};
            v[i][1] = {};
#pragma unroll
            for (int h = 0; h < HALVES; h++) {
                const T* from = x + (int64_t)(8 * h) * width + at;
                v[i][h] = !(inside && has_row[h]) ? Vec16{} : aligned ? load16(from) : gather(from, left - at);
            }
        }
#pragma unroll
        for (int i = 0; i < loads; i++) {
            const uint32_t(&a)[4] = v[i][0].word, (&b)[4] = v[i][1].word;
            mma<T>(sum, {a[0], b[0], a[1], b[1]}, w[i].word[0], w[i].word[1]);
            mma<T>(sum, {a[2], b[2], a[3], b[3]}, w[i].word[2], w[i].word[3]);
        }
    }

    // The next piece.
    template <bool aligned> DEVICE void add_piece() {
        constexpr int loads = aligned ? LOADS : 1;
#pragma unroll 1
        for (int i = 0; i < PIECE; i += loads * STRETCH, go(loads * STRETCH)) add<loads, aligned>();
    }
};

// The sums of a block's tile, in shared memory as [warp][row][output].
template <class T, int ROWS>
DEVICE void add_up(const MatvecArgs& args, uint32_t first_row, uint32_t first_out, float* partials) {
    Walk<T, ROWS> walk(args, first_row, first_out);
    for (uint32_t k = warp_id() * PIECE; k < args.k; k += WARPS * PIECE, walk.go((WARPS - 1) * PIECE)) {
        if (args.k % VEC<T> == 0) {
            walk.template add_piece<true>();
        } else {
            walk.template add_piece<false>();
        }
    }
    // The lower half of the accumulators is rows 0 to 7, the upper 8 to 15.
    float* mine = partials + warp_id() * ROWS * OUTS + lane_id() * 2;
#pragma unroll
    for (int i = 0; i < 2 * (ROWS / 8); i++) mine[i / 2 * 8 * OUTS + i % 2] = walk.sum[i];
    sync_block();
}

template <int ROWS> DEVICE float total(const float* partials, int row, int out) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += partials[(w * ROWS + row) * OUTS + out];
    return sum;
}

template <class T, int ROWS> DEVICE void matvec(const MatvecArgs& args) {
    SHARED(shared);
    float* partials = (float*)shared;
    uint32_t first_row = blockIdx.x * ROWS, first_out = blockIdx.y * OUTS;
    add_up<T, ROWS>(args, first_row, first_out, partials);

    if (threadIdx.x >= ROWS * OUTS) return;
    uint32_t row = first_row + threadIdx.x / OUTS, out = first_out + threadIdx.x % OUTS;
    if (!mask(row < args.rows && out < args.n)) return;
    float y = total<ROWS>(partials, threadIdx.x / OUTS, threadIdx.x % OUTS);
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

template <class T, int ROWS> DEVICE void matvec_gated(const MatvecArgs& args) {
    SHARED(shared);
    float* partials = (float*)shared;
    uint32_t first_row = blockIdx.x * ROWS, first_out = blockIdx.y * OUTS;
    add_up<T, ROWS>(args, first_row, first_out, partials);

    constexpr int PAIRS = OUTS / 2;
    if (threadIdx.x >= ROWS * PAIRS) return;
    int pair = threadIdx.x % PAIRS;
    uint32_t row = first_row + threadIdx.x / PAIRS, gate = first_out + 2 * pair;
    if (!mask(row < args.rows && gate < args.n)) return;
    float g = total<ROWS>(partials, threadIdx.x / PAIRS, 2 * pair);
    float u = total<ROWS>(partials, threadIdx.x / PAIRS, 2 * pair + 1);
    if (args.bias) {
        g += args.bias[gate];
        u += args.bias[gate + 1];
    }
    ((T*)args.y)[(int64_t)row * (args.n / 2) + gate / 2] = from_float<T>(silu(g) * u);
}

KERNEL(512, 2, matvec_8_bf16, MatvecArgs) { matvec<bf16, 8>(args); }
KERNEL(512, 2, matvec_8_f16, MatvecArgs) { matvec<f16, 8>(args); }
KERNEL(512, 2, matvec_16_bf16, MatvecArgs) { matvec<bf16, 16>(args); }
KERNEL(512, 2, matvec_16_f16, MatvecArgs) { matvec<f16, 16>(args); }
KERNEL(512, 2, matvec_gated_8_bf16, MatvecArgs) { matvec_gated<bf16, 8>(args); }
KERNEL(512, 2, matvec_gated_8_f16, MatvecArgs) { matvec_gated<f16, 8>(args); }
KERNEL(512, 2, matvec_gated_16_bf16, MatvecArgs) { matvec_gated<bf16, 16>(args); }
KERNEL(512, 2, matvec_gated_16_f16, MatvecArgs) { matvec_gated<f16, 16>(args); }
