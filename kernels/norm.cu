// Norms of rows: LayerNorm, RmsNorm, AddRmsNorm, L2Normalize. Statistics in f32.
//
//   layer_norm     y = (x - mean) / sqrt(mean((x - mean)²) + eps) gamma + beta
//   rms_norm       y = x / sqrt(mean(x²) + eps) gamma
//   add_rms_norm   sum = x + add, and rms_norm of that sum before it is rounded to T
//   l2_normalize   y = x / sqrt(Σ x²)
//
// x, add, sum, y are T [rows, cols], gamma and beta f32 [cols]. One block a row, of ceil(cols / 8) threads rounded up
// to a warp, at most 1024; of cols threads, likewise, where cols is no multiple of 8 and rows are not aligned. Shared: 256
// bytes. Floor: x and add read once, y and sum written once; a single row is latency, two round trips to memory.
//
// A thread holds its first eight elements of x, gamma and beta in registers from one load each, all under way at
// once, which is the whole row up to 8192 columns: the scale is at hand when the statistics are. What is beyond is read
// again, from L1. LayerNorm's variance is that of x - mean.
//
// Reduction order, a function of cols alone: each thread its elements ascending, a butterfly over the warp, then
// the warps in order.
#include "common.cuh"

struct NormArgs {
    const void* x;
    const void* add;
    const float* gamma;
    const float* beta;
    void* sum;
    void* y;
    uint32_t cols;
    float eps;
};
static_assert(sizeof(NormArgs) == 56);

// One operand of a row, in pieces of `W` elements dealt out to the block's threads; the first is held.
template <class T, int W> struct Pieces {
    const T* row;
    float first[W];

    DEVICE static uint32_t begin() { return threadIdx.x * W; }
    DEVICE static uint32_t stride() { return blockDim.x * W; }

    DEVICE Pieces(const void* base, int64_t offset, uint32_t cols) : row((const T*)base + offset), first{} {
        if (mask(begin() < cols)) load<W>(row + begin(), first);
    }
    DEVICE void get(uint32_t at, float (&v)[W]) const {
        if (at != begin()) return load<W>(row + at, v);
#pragma unroll
        for (int i = 0; i < W; i++) v[i] = first[i];
    }
};

// f(at) for each of the thread's pieces of a row.
template <int W, class F> DEVICE void each(uint32_t cols, F f) {
    for (uint32_t at = threadIdx.x * W; at < cols; at += blockDim.x * W) f(at);
}

// The sum of x over the block, in `scratch`, a float for each warp.
DEVICE float sum_of_block(float x, float* scratch) {
    x = warp_sum(x);
    if (lane_id() == 0) scratch[warp_id()] = x;
    sync_block();
    float sum = 0.0f;
    for (uint32_t w = 0; w < blockDim.x / WARP; w++) sum += scratch[w];
    return sum;
}

// 1 / sqrt(Σ x² / n + eps), x(at, v) giving the pieces of the row.
template <int W, class X> DEVICE float inverse_rms(uint32_t cols, X x, float n, float eps) {
    SHARED(shared);
    float squares = 0.0f;
    each<W>(cols, [&](uint32_t at) {
        float v[W];
        x(at, v);
        for (int i = 0; i < W; i++) squares = fmaf(v[i], v[i], squares);
    });
    return 1.0f / sqrtf(sum_of_block(squares, (float*)shared) / n + eps);
}

template <class T, int W> struct Norm {
    const NormArgs& args;
    int64_t offset;  // of the row

    DEVICE Norm(const NormArgs& args) : args(args), offset((int64_t)blockIdx.x * args.cols) {}

    template <class U> DEVICE Pieces<U, W> pieces(const void* base, int64_t offset) const {
        return Pieces<U, W>(base, offset, args.cols);
    }

    DEVICE void layer() const {
        SHARED(shared);
        float* scratch = (float*)shared;
        auto x = pieces<T>(args.x, offset);
        auto gamma = pieces<float>(args.gamma, 0), beta = pieces<float>(args.beta, 0);
        float sum = 0.0f, squares = 0.0f;
        each<W>(args.cols, [&](uint32_t at) {
            float v[W];
            x.get(at, v);
            for (int i = 0; i < W; i++) sum += v[i];
        });
        float mean = sum_of_block(sum, scratch) / args.cols;
        each<W>(args.cols, [&](uint32_t at) {
            float v[W];
            x.get(at, v);
            for (int i = 0; i < W; i++) squares = fmaf(v[i] - mean, v[i] - mean, squares);
        });
        // Another place than the first sum's, which slow warps may still be reading.
        float variance = sum_of_block(squares, scratch + WARP) / args.cols;
        float scale = 1.0f / sqrtf(variance + args.eps);
        each<W>(args.cols, [&](uint32_t at) {
            float v[W], g[W], b[W];
            x.get(at, v), gamma.get(at, g), beta.get(at, b);
            for (int i = 0; i < W; i++) v[i] = fmaf((v[i] - mean) * scale, g[i], b[i]);
            store<W>((T*)args.y + offset + at, v);
        });
    }

    // Of the row whose pieces are x(at, v).
    template <class X> DEVICE void rms_of(X x) const {
        auto gamma = pieces<float>(args.gamma, 0);
        float scale = inverse_rms<W>(args.cols, x, args.cols, args.eps);
        each<W>(args.cols, [&](uint32_t at) {
            float v[W], g[W];
            x(at, v), gamma.get(at, g);
            for (int i = 0; i < W; i++) v[i] = v[i] * scale * g[i];
            store<W>((T*)args.y + offset + at, v);
        });
    }

    DEVICE void rms() const {
        auto x = pieces<T>(args.x, offset);
        rms_of([&](uint32_t at, float(&v)[W]) { x.get(at, v); });
    }

    DEVICE void add_rms() const {
        auto x = pieces<T>(args.x, offset), y = pieces<T>(args.add, offset);
        auto sum = [&](uint32_t at, float(&v)[W]) {
            float u[W];
            x.get(at, v), y.get(at, u);
            for (int i = 0; i < W; i++) v[i] += u[i];
        };
        each<W>(args.cols, [&](uint32_t at) {
            float v[W];
            sum(at, v);
            store<W>((T*)args.sum + offset + at, v);
        });
        rms_of(sum);
    }

    DEVICE void l2() const {
        auto row = pieces<T>(args.x, offset);
        auto x = [&](uint32_t at, float(&v)[W]) { row.get(at, v); };
        float scale = inverse_rms<W>(args.cols, x, 1.0f, 0.0f);
        each<W>(args.cols, [&](uint32_t at) {
            float v[W];
            x(at, v);
            for (int i = 0; i < W; i++) v[i] *= scale;
            store<W>((T*)args.y + offset + at, v);
        });
    }
};

// Runs `method` in pieces of eight elements where rows are aligned to them, else in single ones.
template <class T, class F> DEVICE void by_width(const NormArgs& args, F f) {
    if (args.cols % VEC<T> == 0) {
        f(Norm<T, VEC<T>>(args));
    } else {
        f(Norm<T, 1>(args));
    }
}

template <class T> DEVICE void layer_norm(const NormArgs& args) {
    by_width<T>(args, [](auto norm) { norm.layer(); });
}
template <class T> DEVICE void rms_norm(const NormArgs& args) {
    by_width<T>(args, [](auto norm) { norm.rms(); });
}
template <class T> DEVICE void add_rms_norm(const NormArgs& args) {
    by_width<T>(args, [](auto norm) { norm.add_rms(); });
}
template <class T> DEVICE void l2_normalize(const NormArgs& args) {
    by_width<T>(args, [](auto norm) { norm.l2(); });
}

KERNEL(1024, 1, layer_norm_bf16, NormArgs) { layer_norm<bf16>(args); }
KERNEL(1024, 1, layer_norm_f16, NormArgs) { layer_norm<f16>(args); }
KERNEL(1024, 1, rms_norm_bf16, NormArgs) { rms_norm<bf16>(args); }
KERNEL(1024, 1, rms_norm_f16, NormArgs) { rms_norm<f16>(args); }
KERNEL(1024, 1, add_rms_norm_bf16, NormArgs) { add_rms_norm<bf16>(args); }
KERNEL(1024, 1, add_rms_norm_f16, NormArgs) { add_rms_norm<f16>(args); }
KERNEL(1024, 1, l2_normalize_bf16, NormArgs) { l2_normalize<bf16>(args); }
KERNEL(1024, 1, l2_normalize_f16, NormArgs) { l2_normalize<f16>(args); }
