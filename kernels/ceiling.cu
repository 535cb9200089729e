// What a device can do at most, for the ceilings that figures are held against.
//
// ceiling: the rate at which tensor cores multiply when nothing else is in the way: mma on registers. Grid: as many
// blocks as the device holds at once; 256 threads. Each warp runs `steps` rounds of eight independent m16n8k16
// products, 8 * 4096 FLOPs a round, so a launch does grid * 8 warps * steps * 32,768. It reads nothing and writes
// one word a warp, so that the compiler keeps the sums.
//
// sweep: the rate at which memory is read when nothing else is in the way: 16 bytes a lane, eight loads under way, as
// the decode products read weights. It also empties the caches before something is timed: unlike a fill, it leaves
// nothing in L2 that must be written back while the clock runs.
#include "common.cuh"

struct CeilingArgs {
    float* sums;  // [blocks, 8]
    uint32_t steps;
    uint32_t zero;  // 0, unknown to the compiler
};
static_assert(sizeof(CeilingArgs) == 16, "as in backend/cuda/ceiling.rs");

template <class T> DEVICE void ceiling(const CeilingArgs& args) {
    constexpr int CHAINS = 8;  // enough to cover the latency of a product on one warp of four
    float c[CHAINS][4];
    uint32_t a[4], b[2];
    // Random bits of moderate size: products of zeros draw less power and run faster than real ones.
    for (int i = 0; i < 4; i++) a[i] = pack2<T>(0.37f + 0.11f * ((threadIdx.x * 7 + i * 13) % 17), -0.21f - 0.07f * ((threadIdx.x * 5 + i) % 11));
    for (int i = 0; i < 2; i++) b[i] = pack2<T>(0.53f - 0.05f * ((threadIdx.x * 3 + i * 29) % 23), 0.19f + 0.03f * ((threadIdx.x + i * 31) % 19));
    for (int chain = 0; chain < CHAINS; chain++)
        for (int i = 0; i < 4; i++) c[chain][i] = (float)args.zero;
    for (uint32_t step = 0; step < args.steps; step++) {
#pragma unroll
        for (int chain = 0; chain < CHAINS; chain++) mma<T>(c[chain], a, b[0], b[1]);
    }
    float sum = 0.0f;
    for (int chain = 0; chain < CHAINS; chain++)
        for (int i = 0; i < 4; i++) sum += c[chain][i];
    sum = warp_sum(sum);
    if (lane_id() == 0) args.sums[(int64_t)blockIdx.x * 8 + warp_id()] = sum;
}

KERNEL(256, 2, ceiling_bf16, CeilingArgs) { ceiling<bf16>(args); }
KERNEL(256, 2, ceiling_f16, CeilingArgs) { ceiling<f16>(args); }

struct SweepArgs {
    const void* from;  // aligned to 16
    uint32_t* to;      // one word, which is not written but for one sum in 2^32
    uint64_t words;    // of 16 bytes
};
static_assert(sizeof(SweepArgs) == 24, "as in backend/cuda/ceiling.rs");

KERNEL(512, 2, sweep, SweepArgs) {
    constexpr int LOADS = 8;
    const unsigned char* from = (const unsigned char*)args.from;
    const uint64_t stride = (uint64_t)gridDim.x * blockDim.x;
    uint32_t sum = 0;
    for (uint64_t at = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x; at < args.words; at += LOADS * stride) {
        Vec16 v[LOADS];
#pragma unroll
        for (int i = 0; i < LOADS; i++)
            v[i] = at + i * stride < args.words ? load16_stream(from + (at + i * stride) * 16) : Vec16{};
#pragma unroll
        for (int i = 0; i < LOADS; i++) sum += v[i].word[0] ^ v[i].word[1] ^ v[i].word[2] ^ v[i].word[3];
    }
    if (sum == 0x9e3779b9) *args.to = sum;
}
