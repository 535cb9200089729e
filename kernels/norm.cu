// RmsNorm of rows, the first kernel and the shape of all others.
#include "common.cuh"

struct RmsNormArgs {
    const void* x;       // T [rows, cols]
    const float* gamma;  // [cols]
    void* y;             // T [rows, cols]
    uint32_t rows, cols;
    float eps;
};

template <class T> DEVICE void rms_norm(const RmsNormArgs& args) {
    SHARED(shared);
    const T* x = (const T*)args.x + (int64_t)blockIdx.x * args.cols;
    T* y = (T*)args.y + (int64_t)blockIdx.x * args.cols;
    float sum = 0.0f;
    for (uint32_t i = threadIdx.x; i < args.cols; i += blockDim.x) sum += to_float(x[i]) * to_float(x[i]);
    sum = block_sum<8>(sum, (float*)shared);
    float scale = rsqrtf(sum / args.cols + args.eps);
    for (uint32_t i = threadIdx.x; i < args.cols; i += blockDim.x) y[i] = from_float<T>(to_float(x[i]) * scale * args.gamma[i]);
}

KERNEL(256, 4, rms_norm_bf16, RmsNormArgs) { rms_norm<bf16>(args); }
KERNEL(256, 4, rms_norm_f16, RmsNormArgs) { rms_norm<f16>(args); }
