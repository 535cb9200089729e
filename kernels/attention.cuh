// Sixteen query rows of a warp and what they have seen of the keys so far: the online softmax that every
// attention kernel is made of, on tensor cores.
//
// Policy of roundings, that of Hugging Face's eager attention: scores, their maximum and the sum of the weights
// are f32; the weights are rounded to T where they are multiplied with V, and only there.
//
// Reduction order. A score is a chain of mma over the head, 16 columns at a time. The keys of one update raise
// the running maximum and rescale what there was by one factor; each of the four lanes of a row adds its own
// weights in order of position, and the four sums meet at the end, neighbours first; weighted values are a chain
// of mma over the keys, 16 at a time. So rows of a tile know nothing of each other, and an update of which a row
// sees nothing changes no bit of it: it multiplies by 2^0 and adds zeros. (V must be finite even there: 0 NaN is
// NaN. Keys that nobody sees are therefore zeros, not what memory happens to hold.)
#pragma once
#include "common.cuh"

constexpr int ROWS = 16;  // of a warp: the height of an mma

// Elements from one row of E to the next in shared memory. E is a multiple of 16, so a row is an odd number of
// 16-byte vectors, and any eight rows in succession lie in different banks: for every E, and without a swizzle.
template <int E> constexpr int ROW = E + 8;

// A warp starts to copy PAGE rows of `cols` elements. Rows from `rows` on and columns from `cols` to E become
// zeros, and are not read.
template <class T, int E> DEVICE void copy_rows(T* shared, const T* from, int stride, int rows, int cols) {
    constexpr int VECS = E / VEC<T>;
#pragma unroll
    for (int i = 0; i < PAGE * VECS / WARP; i++) {
        int row = (i * WARP + lane_id()) / VECS, col = (i * WARP + lane_id()) % VECS * VEC<T>;
        bool row_inside = mask(row < rows);
        bool col_inside = mask(col < cols);
        copy16_async(shared + row * ROW<E> + col, from + row * stride + col, row_inside && col_inside);
    }
}

// Lane l has rows l / 4 and l / 4 + 8, and of eight columns numbers 2 (l % 4) and the next: the layout of an mma.
template <class T, int E> struct Queries {
    uint32_t q[E / 16][4];
    float o[E / 8][4];  // weighted values: two columns of the first row, then of the second
    float max[2];       // of the scores, not scaled
    float sum[2];       // of the weights: this lane's share, until finish()

    // Takes `rows` rows of `cols` elements from global memory: they are read once, so they go straight to
    // registers.
    DEVICE void load(const T* from, int stride, int rows, int cols) {
#pragma unroll
        for (int k = 0; k < E / 16; k++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int row = lane_id() / 4 + i % 2 * 8, col = k * 16 + i / 2 * 8 + lane_id() % 4 * 2;
                bool row_inside = mask(row < rows);
                bool col_inside = mask(col < cols);
                q[k][i] = row_inside && col_inside ? *(const uint32_t*)(from + row * stride + col) : 0;
            }
        }
    }

    DEVICE void clear() {
#pragma unroll
        for (int d = 0; d < E / 8; d++) {
#pragma unroll
            for (int i = 0; i < 4; i++) o[d][i] = 0.0f;
        }
        max[0] = max[1] = -INFINITY;
        sum[0] = sum[1] = 0.0f;
    }

    // s = q kᵀ for KEYS rows of shared memory.
    template <int KEYS> DEVICE void scores(float (&s)[KEYS / 8][4], const T* k) const {
        const T* at = k + (lane_id() / 16 * 8 + lane_id() % 8) * ROW<E> + lane_id() / 8 % 2 * 8;
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++) s[j][0] = s[j][1] = s[j][2] = s[j][3] = 0.0f;
#pragma unroll
        for (int c = 0; c < E / 16; c++) {
#pragma unroll
            for (int j = 0; j < KEYS / 8; j += 2) {
                uint32_t b[4];
                load_matrices(b, at + j * 8 * ROW<E> + c * 16);
                mma<T>(s[j], q[c], b[0], b[1]);
                mma<T>(s[j + 1], q[c], b[2], b[3]);
            }
        }
    }

    // Hides the keys that a row does not see: the first row sees `seen[0]` of them, the second `seen[1]`.
    template <int KEYS> DEVICE static void hide(float (&s)[KEYS / 8][4], const int (&seen)[2]) {
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int key = j * 8 + lane_id() % 4 * 2 + i % 2;
                if (!mask(key < seen[i / 2])) s[j][i] = -INFINITY;
            }
        }
    }

    // Scores become weights 2^(scale (score - maximum)), with the scale positive; what there was is rescaled to
    // the new maximum. Of all keys so far a row must have seen one, or its maximum is that of nothing.
    template <int KEYS> DEVICE void weigh(float (&s)[KEYS / 8][4], float scale) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float top = max[r];
#pragma unroll
            for (int j = 0; j < KEYS / 8; j++) top = fmaxf(top, fmaxf(s[j][2 * r], s[j][2 * r + 1]));
            top = fmaxf(top, shuffle_xor(top, 1));
            top = fmaxf(top, shuffle_xor(top, 2));
            // Exactly 1 when the maximum stays, which a fused (max scale) - (top scale) would not be.
            float rescale = exp2_approx((max[r] - top) * scale), shift = -top * scale;
            max[r] = top;
            sum[r] *= rescale;
#pragma unroll
            for (int j = 0; j < KEYS / 8; j++) {
#pragma unroll
                for (int i = 2 * r; i < 2 * r + 2; i++) {
                    s[j][i] = exp2_approx(fmaf(s[j][i], scale, shift));
                    sum[r] += s[j][i];
                }
            }
#pragma unroll
            for (int d = 0; d < E / 8; d++) {
                o[d][2 * r] *= rescale;
                o[d][2 * r + 1] *= rescale;
            }
        }
    }

    // o += weights v for KEYS rows of shared memory. Two neighbouring blocks of eight scores are, packed, the
    // left operand of an mma as they lie in the lanes.
    template <int KEYS> DEVICE void add_values(const float (&s)[KEYS / 8][4], const T* v) {
        const T* at = v + lane_id() % 16 * ROW<E> + lane_id() / 16 * 8;
#pragma unroll
        for (int j = 0; j < KEYS / 16; j++) {
            const float(&left)[4] = s[2 * j], (&right)[4] = s[2 * j + 1];
            uint32_t p[4] = {pack2<T>(left[0], left[1]), pack2<T>(left[2], left[3]), pack2<T>(right[0], right[1]),
                             pack2<T>(right[2], right[3])};
#pragma unroll
            for (int d = 0; d < E / 8; d += 2) {
                uint32_t b[4];
                load_matrices_transposed(b, at + j * 16 * ROW<E> + d * 8);
                mma<T>(o[d], p, b[0], b[1]);
                mma<T>(o[d + 1], p, b[2], b[3]);
            }
        }
    }

    // The sums of whole rows, in all of their lanes.
    DEVICE void finish() {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            sum[r] += shuffle_xor(sum[r], 1);
            sum[r] += shuffle_xor(sum[r], 2);
        }
    }
};
