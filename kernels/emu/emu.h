// What a kernel sees when it is compiled for the emulated device: ptx.cuh includes this instead of PTX.
// The compiler instruments the kernel's own loads and stores; what is declared here and defined in *.cc is
// not instrumented and checks its own accesses. Values cross in registers: a value that crossed in memory
// would cost an instrumented access for each of its words.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>

#ifdef EMU

#define DEVICE inline
#define SITE , const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define SITE_ONLY const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define EMU_SITE file, line

#define SHARED(name) unsigned char* const name = (unsigned char*)__builtin_assume_aligned(emu::shared_memory(), 128)

// The arguments are a copy on each thread's stack. Making that copy is not an access of the kernel's.
#define KERNEL(threads, blocks_per_sm, name, Args)                                                                  \
    static void name(const Args args);                                                                              \
    __attribute__((no_sanitize("thread"))) static void name##_enter(const void* args) { name(*(const Args*)args); } \
    static emu::Kernel name##_kernel(#name, threads, sizeof(Args), name##_enter);                                   \
    static void name(const Args args)

#define threadIdx (emu::thread_index())
#define blockIdx (emu::block_index())
#define blockDim (emu::block_size())
#define gridDim (emu::grid_size())

#endif

namespace emu {

struct Kernel {
    const char* name;
    uint32_t threads;  // at most, in a block
    size_t args_bytes;
    void (*enter)(const void* args);
    Kernel* next;
    Kernel(const char* name, uint32_t threads, size_t args_bytes, void (*enter)(const void*));
};

struct Index {
    uint32_t x, y, z;
};

// Constant within a thread, so the compiler may call them once.
__attribute__((const)) Index thread_index();
__attribute__((const)) Index block_index();
__attribute__((const)) Index block_size();
__attribute__((const)) Index grid_size();
__attribute__((const)) void* shared_memory();

// ---- threads ----

void sync_block(const char* file, int line);
void sync_warp(const char* file, int line);
bool mask(bool inside, const char* file, int line);
uint32_t ticket(uint32_t* counter, uint32_t add, const char* file, int line);
void add_shared(uint32_t* shared, uint32_t x);
uint32_t lanes_where(bool x);
uint64_t shuffle_bits(uint64_t x, int lane);
uint64_t shuffle_xor_bits(uint64_t x, int lane_mask);

template <class T> inline T shuffle_with(uint64_t (*bits)(uint64_t, int), T x, int lane) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 32 or 64 bits");
    uint64_t all = 0;
    __builtin_memcpy(&all, &x, sizeof x);
    all = bits(all, lane);
    __builtin_memcpy(&x, &all, sizeof x);
    return x;
}
template <class T> inline T shuffle(T x, int lane) { return shuffle_with(shuffle_bits, x, lane); }
template <class T> inline T shuffle_xor(T x, int lane_mask) { return shuffle_with(shuffle_xor_bits, x, lane_mask); }

// ---- memory ----

struct Bits128 {
    uint64_t low, high;
};

Bits128 load_128(const void* global);
Bits128 load_128_stream(const void* global);
void store_128(void* global, Bits128 x);
void copy16_async(void* shared, const void* global, bool valid);
void commit_copies();
void wait_copies(int pending, const char* file, int line);

template <class Vec> inline Vec vector(Bits128 bits) {
    static_assert(sizeof(Vec) == 16, "");
    Vec v;
    __builtin_memcpy(&v, &bits, 16);
    return v;
}
template <class Vec> inline Vec load16(const void* global) { return vector<Vec>(load_128(global)); }
template <class Vec> inline Vec load16_stream(const void* global) { return vector<Vec>(load_128_stream(global)); }
template <class Vec> inline void store16(void* global, Vec v) {
    static_assert(sizeof(Vec) == 16, "");
    Bits128 bits;
    __builtin_memcpy(&bits, &v, 16);
    store_128(global, bits);
}

// ---- matrices ----

struct Float4 {
    float x, y, z, w;
};

Bits128 load_matrices_bits(const void* shared_row, bool transposed);
Float4 mma_values(Float4 c, uint64_t a01, uint64_t a23, uint64_t b01, bool bf16);

inline void load_matrices(uint32_t (&r)[4], const void* shared_row, bool transposed) {
    Bits128 bits = load_matrices_bits(shared_row, transposed);
    r[0] = (uint32_t)bits.low, r[1] = (uint32_t)(bits.low >> 32);
    r[2] = (uint32_t)bits.high, r[3] = (uint32_t)(bits.high >> 32);
}
inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool bf16) {
    Float4 d = mma_values({c[0], c[1], c[2], c[3]}, (uint64_t)a[1] << 32 | a[0], (uint64_t)a[3] << 32 | a[2],
                          (uint64_t)b1 << 32 | b0, bf16);
    c[0] = d.x, c[1] = d.y, c[2] = d.z, c[3] = d.w;
}

}  // namespace emu

#include "numbers.h"

#ifdef EMU

// What nvcc declares by itself.
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
template <class T> inline T min(T a, T b) { return b < a ? b : a; }
template <class T> inline T max(T a, T b) { return a < b ? b : a; }

// The compiler does not instrument calls into the C library: a kernel that made one would go unchecked.
#pragma GCC poison memcpy memmove memset

#endif
