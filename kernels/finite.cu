// Whether all of many numbers are finite; the host has the verdicts of all blocks.
//
//   bad[block] = 1 if one of the block's elements of x is infinite or no number, else 0
//
// x T [count], 16-byte aligned; bad u32, one for each block. Grid: any number of blocks of 256, which take turns at
// vectors of 16 bytes; the last elements, where they are no whole vector, are thread 0's of block 0. Shared: a float
// for each of 8 warps. Floor: x read once.
#include "common.cuh"

struct FiniteArgs {
    const void* x;
    uint32_t* bad;
    uint64_t count;
};
static_assert(sizeof(FiniteArgs) == 24);

template <class T> constexpr uint32_t EXPONENT = 0;  // its bits, all set where a number is not finite
template <> constexpr uint32_t EXPONENT<bf16> = 0x7f80;
template <> constexpr uint32_t EXPONENT<f16> = 0x7c00;

template <class T> DEVICE bool is_bad(uint32_t bits) { return (bits & EXPONENT<T>) == EXPONENT<T>; }

template <class T> DEVICE void finite(const FiniteArgs& args) {
    SHARED(shared);
    const T* x = (const T*)args.x;
    const uint64_t vectors = args.count / VEC<T>;
    bool bad = false;
    for (uint64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < vectors; i += gridDim.x * blockDim.x) {
        const Vec16 v = load16(x + i * VEC<T>);
#pragma unroll
        for (int w = 0; w < 4; w++) bad |= is_bad<T>(v.word[w]) | is_bad<T>(v.word[w] >> 16);
    }
    if (blockIdx.x == 0 && threadIdx.x == 0)
        for (uint64_t i = vectors * VEC<T>; i < args.count; i++) bad |= is_bad<T>(x[i].bits);
    const float found = block_sum<8>(bad ? 1.0f : 0.0f, (float*)shared);
    if (threadIdx.x == 0) args.bad[blockIdx.x] = found > 0.0f;
}

KERNEL(256, 4, finite_bf16, FiniteArgs) { finite<bf16>(args); }
KERNEL(256, 4, finite_f16, FiniteArgs) { finite<f16>(args); }
