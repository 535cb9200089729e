// Every primitive that is not plain C++, each with its meaning on a GPU (PTX) and on the emulated device
// (a call into emu/, which checks it) side by side. Nothing else in kernels/ holds inline PTX or asks for
// an architecture. A kernel is written against this file alone, so the same source runs on both.
//
// Needs sm_80: mma.m16n8k16, ldmatrix, cp.async. Source of instruction meanings and fragment layouts: the PTX ISA.
#pragma once
#include <stdint.h>

#ifdef EMU
#include "emu/emu.h"
#else

#define DEVICE __device__ __forceinline__

// A kernel: its only parameter is one struct, filled by the host, read in constant memory.
#define KERNEL(threads, blocks_per_sm, name, Args) \
    extern "C" __global__ void __launch_bounds__(threads, blocks_per_sm) name(const __grid_constant__ Args args)

// The block's dynamic shared memory, aligned to 128 bytes.
#define SHARED(name) extern __shared__ __align__(128) unsigned char name[]

// Where in the source a barrier, wait, ticket or mask stands: the emulated device can switch each one off,
// to see whether a test notices. On a GPU it is nothing.
#define SITE
#define SITE_ONLY

#endif

// ---- 16-bit floats -------------------------------------------------------------------------------

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

// Sixteen bytes, moved as one.
struct alignas(16) Vec16 {
    uint32_t word[4];
};

DEVICE float bits_to_float(uint32_t bits) {
#ifdef EMU
    return emu::bits_to_float(bits);
#else
    return __uint_as_float(bits);
#endif
}

DEVICE uint32_t float_to_bits(float x) {
#ifdef EMU
    return emu::float_to_bits(x);
#else
    return __float_as_uint(x);
#endif
}

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(bf16 x) { return bits_to_float((uint32_t)x.bits << 16); }
DEVICE float to_float(f16 x) {
#ifdef EMU
    return emu::f16_to_float(x.bits);
#else
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
#endif
}

// Rounds to nearest, ties to even; the low half of the result is `lo`.
template <class T> DEVICE uint32_t pack2(float lo, float hi);
template <> DEVICE uint32_t pack2<bf16>(float lo, float hi) {
#ifdef EMU
    return (uint32_t)emu::float_to_bf16(hi) << 16 | emu::float_to_bf16(lo);
#else
    uint32_t y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
    return y;
#endif
}
template <> DEVICE uint32_t pack2<f16>(float lo, float hi) {
#ifdef EMU
    return (uint32_t)emu::float_to_f16(hi) << 16 | emu::float_to_f16(lo);
#else
    uint32_t y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
    return y;
#endif
}

template <class T> DEVICE T from_float(float x) { return T{(uint16_t)pack2<T>(x, 0.0f)}; }
template <> DEVICE float from_float<float>(float x) { return x; }

// The two halves of a packed pair.
template <class T> DEVICE float low(uint32_t pair) { return to_float(T{(uint16_t)pair}); }
template <class T> DEVICE float high(uint32_t pair) { return to_float(T{(uint16_t)(pair >> 16)}); }
template <> DEVICE float low<bf16>(uint32_t pair) { return bits_to_float(pair << 16); }
template <> DEVICE float high<bf16>(uint32_t pair) { return bits_to_float(pair & 0xffff0000u); }

// ---- arithmetic ----------------------------------------------------------------------------------

// 2^x and 1/x, within 2 units in the last place.
DEVICE float exp2_approx(float x) {
#ifdef EMU
    return emu::exp2_approx(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}
DEVICE float rcp_approx(float x) {
#ifdef EMU
    return emu::rcp_approx(x);
#else
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// ---- threads -------------------------------------------------------------------------------------

constexpr int WARP = 32;

// All threads of the block.
DEVICE void sync_block(SITE_ONLY) {
#ifdef EMU
    emu::sync_block(EMU_SITE);
#else
    __syncthreads();
#endif
}

// All lanes of the warp.
DEVICE void sync_warp(SITE_ONLY) {
#ifdef EMU
    emu::sync_warp(EMU_SITE);
#else
    __syncwarp();
#endif
}

// The value of another lane; all 32 lanes take part.
template <class T> DEVICE T shuffle_xor(T x, int lane_mask) {
#ifdef EMU
    return emu::shuffle_xor(x, lane_mask);
#else
    return __shfl_xor_sync(0xffffffffu, x, lane_mask);
#endif
}
template <class T> DEVICE T shuffle(T x, int lane) {
#ifdef EMU
    return emu::shuffle(x, lane);
#else
    return __shfl_sync(0xffffffffu, x, lane);
#endif
}
// The lanes, as bits, in which it holds; all 32 lanes take part.
DEVICE uint32_t lanes_where(bool x) {
#ifdef EMU
    return emu::lanes_where(x);
#else
    return __ballot_sync(0xffffffffu, x);
#endif
}

// The answer to a bounds question, through a numbered site: switched off, it is always yes.
DEVICE bool mask(bool inside SITE) {
#ifdef EMU
    return emu::mask(inside, EMU_SITE);
#else
    return inside;
#endif
}

// ---- global memory -------------------------------------------------------------------------------

// Sixteen bytes at a 16-byte address.
DEVICE Vec16 load16(const void* global) {
#ifdef EMU
    return emu::load16<Vec16>(global);
#else
    Vec16 v;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                 : "l"(global)
                 : "memory");
    return v;
#endif
}

// The same for bytes that no kernel writes and that are read once: weights in decode. They bypass L1; L2 fetches
// the aligned 256 bytes around them.
DEVICE Vec16 load16_stream(const void* global) {
#ifdef EMU
    return emu::load16_stream<Vec16>(global);
#else
    Vec16 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                 : "l"(global));
    return v;
#endif
}

DEVICE void store16(void* global, Vec16 v) {
#ifdef EMU
    emu::store16(global, v);
#else
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(v.word[0]), "r"(v.word[1]),
                 "r"(v.word[2]), "r"(v.word[3])
                 : "memory");
#endif
}

// Adds to a counter and returns what it was; releases this thread's writes and acquires those of earlier
// arrivals. With sync_block() on both sides it orders whole blocks.
DEVICE uint32_t ticket(uint32_t* counter, uint32_t add SITE) {
#ifdef EMU
    return emu::ticket(counter, add, EMU_SITE);
#else
    uint32_t before;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(add) : "memory");
    return before;
#endif
}

// Adds to a word of shared memory, indivisibly.
DEVICE void add_shared(uint32_t* shared, uint32_t x) {
#ifdef EMU
    emu::add_shared(shared, x);
#else
    uint32_t to = (uint32_t)__cvta_generic_to_shared(shared);
    asm volatile("red.relaxed.cta.shared.add.u32 [%0], %1;" ::"r"(to), "r"(x) : "memory");
#endif
}

// ---- asynchronous copies -------------------------------------------------------------------------

// Starts to copy 16 bytes to shared memory, or 16 zero bytes if not `valid` (the source is not read then).
DEVICE void copy16_async(void* shared, const void* global, bool valid) {
#ifdef EMU
    emu::copy16_async(shared, global, valid);
#else
    uint32_t to = (uint32_t)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(valid ? 16 : 0) : "memory");
#endif
}

// Ends a group of this thread's copies.
DEVICE void commit_copies() {
#ifdef EMU
    emu::commit_copies();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `pending` of this thread's latest groups are still under way. Others see the
// copied bytes after a sync_block().
template <int pending> DEVICE void wait_copies(SITE_ONLY) {
#ifdef EMU
    emu::wait_copies(pending, EMU_SITE);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

// ---- matrices ------------------------------------------------------------------------------------

// Four 8x8 matrices of 16-bit elements from shared memory: lane l gives the address of row l % 8 of matrix
// l / 8; then lane l holds elements (l / 4, 2 (l % 4)) and the next of matrix i in r[i].
DEVICE void load_matrices(uint32_t (&r)[4], const void* shared_row) {
#ifdef EMU
    emu::load_matrices(r, shared_row, false);
#else
    uint32_t from = (uint32_t)__cvta_generic_to_shared(shared_row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
#endif
}

// The same, each matrix transposed.
DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* shared_row) {
#ifdef EMU
    emu::load_matrices(r, shared_row, true);
#else
    uint32_t from = (uint32_t)__cvta_generic_to_shared(shared_row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
#endif
}

// c += a b: a is 16x16 row by row, b 16x8 column by column, c 16x8 in f32. With g = lane / 4, t = lane % 4:
// a[0..4] hold rows g, g+8, g, g+8 at columns 2t, 2t, 2t+8, 2t+8 (and the next); b[0..2] hold rows 2t, 2t+8 (and
// the next) of column g; c[0..4] hold (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1).
template <class T> DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
#ifdef EMU
template <> DEVICE void mma<bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emu::mma(c, a, b0, b1, true);
}
template <> DEVICE void mma<f16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emu::mma(c, a, b0, b1, false);
}
#else
template <> DEVICE void mma<bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <> DEVICE void mma<f16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif
