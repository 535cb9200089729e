// The emulated device's C interface. It runs the kernels of ../*.cu on the host, one fiber per thread,
// and checks every access and every collective on the way: a launch returns 0, or nonzero with emu_error()
// saying what went wrong and where.
//
// How it is compiled (GCC 12 or later, or clang; C++17), all into one archive linked whole, because kernels
// register themselves when the program starts:
//   the device   -O3 -std=c++17                       kernels/emu/*.cc
//   the kernels  -O2 -std=c++17 -x c++ -DEMU -fsanitize=thread -fsanitize-coverage=trace-pc
//                -fno-tree-loop-distribute-patterns -ffp-contract=off -Wno-unknown-pragmas
//                kernels/*.cu kernels/emu/*.cu
// -fsanitize=thread only puts a call before each access, and coverage one at each branch's target; those calls end in
// access.cc, so the sanitizer's own runtime is not linked: the flags are given to the compiler, not to the linker.
// Where it is known, --param=tsan-instrument-func-entry-exit=0 (GCC), or -mllvm -tsan-instrument-func-entry-exit=0
// (clang), saves two calls per function. Line tables (-g1) let `addr2line` name the line of a fault.
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct emu_device emu_device;

// A device is used by one thread at a time; several devices may be used by several threads at once.
// The seed draws the order of blocks, warps and lanes, and when copies land. NULL: no address space left.
emu_device* emu_open(uint64_t seed);
void emu_close(emu_device*);
void emu_seed(emu_device*, uint64_t seed);

// Device memory, at an address of the host: aligned to 256, far from every other allocation, poisoned (0xff:
// NaN in every float format) and unwritten. `what` names it in errors. NULL: out of memory.
void* emu_alloc(emu_device*, size_t bytes, const char* what);
void emu_free(emu_device*, void*);

// What follows returns 0, or nonzero with a text in emu_error(), which lives until the device's next call.
int emu_upload(emu_device*, void* to, const void* from, size_t n);    // marks bytes written
int emu_download(emu_device*, void* to, const void* from, size_t n);  // reading unwritten bytes is an error
int emu_copy(emu_device*, void* to, const void* from, size_t n);      // the bytes stay written or unwritten
int emu_fill(emu_device*, void* to, int byte, size_t n);              // marks bytes written
int emu_forget(emu_device*, void* at, size_t n);                      // poisoned and unwritten again
int emu_launch(emu_device*, const char* kernel, const uint32_t grid[3], uint32_t block, uint32_t shared,
               const void* args, size_t args_bytes);
const char* emu_error(const emu_device*);

// Sites: every barrier, wait, ticket and mask in the source that any launch of this process has reached,
// numbered in the order of discovery: "kernels/linear.cu:123 barrier". Each can be switched off on a device, to
// see whether a test notices: barriers and waits do not wait, tickets count but order nothing, masks say yes.
// -1: none is off.
size_t emu_sites(void);
const char* emu_site(size_t site);
void emu_switch_off(emu_device*, int site);

size_t emu_kernels(void);
const char* emu_kernel(size_t kernel);

// Since the device was opened. Any pointer may be NULL.
void emu_stats(const emu_device*, uint64_t* launches, uint64_t* barriers, uint64_t* accesses);

#ifdef __cplusplus
}
#endif
