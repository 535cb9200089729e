// Planted faults: small kernels that are right with `fault` 0 and wrong with any other, each wrong in one way that
// the emulated device must find, whatever the seed. tests/emulator.rs has the table.
#include "../common.cuh"

struct FaultArgs {
    float* x;           // [n], written
    float* y;           // [n], unwritten
    uint32_t* counter;  // zero
    uint32_t n, fault;  // n: one per thread of the grid
};

#define FAULT(name) KERNEL(64, 1, fault_##name, FaultArgs)

DEVICE uint32_t global_thread() { return blockIdx.x * blockDim.x + threadIdx.x; }

// ---- bounds, alignment, written bits -------------------------------------------------------------

FAULT(past_the_end) {
    uint32_t i = global_thread();
    args.y[i] = args.x[i + args.fault];
}

FAULT(before_the_beginning) {
    uint32_t i = global_thread();
    args.y[i] = args.x[(int64_t)i - args.fault];
}

FAULT(stray) {
    uint32_t i = global_thread();
    args.y[i] = args.x[i + args.fault * (int64_t)0x1000000];
}

FAULT(past_shared) {
    SHARED(shared);
    ((float*)shared)[threadIdx.x + args.fault] = 0.0f;
}

// 1: four bytes; 2: sixteen; 3: eight; an asynchronous copy 4: from, 5: to; 6: rows of matrices.
FAULT(misaligned) {
    SHARED(shared);
    uint32_t i = global_thread(), fault = args.fault;
    float* s = (float*)shared + 4 * threadIdx.x;
    if (fault == 1) args.y[i] = *(const float*)((const char*)args.x + 2);
    else if (fault == 2) store16(args.y + i % 4, load16(args.x));
    else if (fault == 3) args.y[i] = (float)*(const uint64_t*)(args.x + 1);
    else args.y[i] = 0.0f;
    copy16_async(s + (fault == 5 ? 2 : 0), args.x + (fault == 4 ? 1 : 0), true);
    commit_copies();
    wait_copies<0>();
    sync_block();
    uint32_t rows[4];
    load_matrices(rows, s + (fault == 6 ? 2 : 0));
}

FAULT(unwritten) {
    uint32_t i = global_thread();
    args.y[i] = (args.fault ? args.y : args.x)[i];
}

FAULT(half_written) {
    uint32_t i = global_thread();
    uint16_t* half = (uint16_t*)(args.y + i);
    half[0] = 0;
    if (!args.fault) half[1] = 0;
    args.x[i] = args.y[i];
}

FAULT(unwritten_shared) {
    SHARED(shared);
    float* s = (float*)shared;
    if (threadIdx.x >= args.fault) s[threadIdx.x] = 1.0f;
    sync_block();
    args.y[global_thread()] = s[threadIdx.x ^ 1];
}

// What the block before it in the same place has written is not this block's.
FAULT(left_by_another_block) {
    SHARED(shared);
    float* s = (float*)shared;
    if (!args.fault || blockIdx.x % 2 == 0) s[threadIdx.x] = 1.0f;
    sync_block();
    args.y[global_thread()] = s[threadIdx.x];
}

// A constant may be read; the program's variables, and other threads' locals, are not the device's memory.
static const float TABLE[4] = {0.0f, 1.0f, 2.0f, 3.0f};
static float variable = 1.0f;

FAULT(host_memory) {
    uint32_t i = global_thread();
    const float* from = args.fault ? &variable : &TABLE[i % 4];
    args.y[i] = *from;
}

FAULT(others_local) {
    SHARED(shared);
    float local[2] = {args.x[0], args.x[1]};
    float** s = (float**)shared;
    if (threadIdx.x == 0) *s = local;
    sync_block();
    float* from = args.fault ? *s : local;
    args.y[global_thread()] = from[args.n & 1];
}

// ---- races ---------------------------------------------------------------------------------------

FAULT(read_after_write) {
    SHARED(shared);
    float* s = (float*)shared;
    s[threadIdx.x] = 1.0f;
    if (!args.fault) sync_block();
    args.y[global_thread()] = s[63 - threadIdx.x];
}

FAULT(write_after_read) {
    SHARED(shared);
    float* s = (float*)shared;
    s[threadIdx.x] = 1.0f;
    sync_block();
    float x = s[0];
    if (!args.fault) sync_block();
    s[threadIdx.x] = x + 1.0f;
}

FAULT(same_value) {
    SHARED(shared);
    if (args.fault || threadIdx.x == 0) *(float*)shared = 1.0f;
}

// A shuffle is no barrier for memory.
FAULT(within_a_warp) {
    SHARED(shared);
    float* s = (float*)shared;
    s[threadIdx.x] = 1.0f;
    if (args.fault) shuffle_xor(1.0f, 1);
    else sync_warp();
    args.y[global_thread()] = s[threadIdx.x ^ 1];
}

// Reads of several widths, one over another.
FAULT(widths) {
    SHARED(shared);
    float* s = (float*)shared + 4 * threadIdx.x;
    for (int i = 0; i < 4; i++) s[i] = 1.0f;
    sync_block();
    float x = *s;
    uint32_t all[4];
    load_matrices(all, s);
    if (args.fault) s -= threadIdx.x % 2 * 4;
    s[3] = x + bits_to_float(all[3]);
}

FAULT(blocks_write) { args.y[args.fault ? threadIdx.x : global_thread()] = 1.0f; }

FAULT(blocks_read_and_write) {
    uint32_t i = global_thread();
    float x = args.x[(i + 64) % args.n];
    (args.fault ? args.x : args.y)[i] = x;
}

FAULT(threads_of_a_block) {
    uint32_t i = global_thread();
    args.y[i] = 1.0f;
    if (!args.fault) sync_block();
    args.x[i] = args.y[i ^ 63];
}

// The last block adds what all have left. 1: no barrier before the ticket; 2: no ticket; 3: none after it;
// 4: a plain read of the counter.
FAULT(last_block) {
    SHARED(shared);
    uint32_t* rank = (uint32_t*)shared;
    if (threadIdx.x == 5) args.y[blockIdx.x] = 1.0f;
    if (args.fault != 1) sync_block();
    if (threadIdx.x == 0) {
        if (args.fault == 4 && *args.counter > gridDim.x) return;
        *rank = args.fault == 2 ? gridDim.x - 1 : ticket(args.counter, 1);
    }
    if (args.fault != 3) sync_block();
    if (*rank != gridDim.x - 1) return;
    float sum = 0.0f;
    for (uint32_t b = 0; b < gridDim.x; b++) sum += args.y[b];
    if (threadIdx.x == 0) args.x[0] = sum, *args.counter = 0;
}

// Additions do not race with each other, but with a read.
FAULT(additions) {
    SHARED(shared);
    uint32_t* count = (uint32_t*)shared;
    if (threadIdx.x == 0) *count = 0;
    sync_block();
    add_shared(count, 1);
    if (!args.fault) sync_block();
    args.y[global_thread()] = (float)*count;
}

// What the block that comes first does after its ticket is known by the other counter's ticket only.
FAULT(relay) {
    if (threadIdx.x) return;
    if (ticket(args.counter, 1) == 0) args.y[0] = 1.0f;
    uint32_t second = args.fault ? gridDim.x - 1 : ticket(args.counter + 1, 1);
    if (second == gridDim.x - 1) args.x[blockIdx.x] = args.y[0];
}

// What streams past the caches must not be written by the same launch, not even by the same thread.
FAULT(stream) {
    uint32_t i = global_thread();
    if (4 * i >= args.n) return;
    store16(args.y + 4 * i, load16_stream(args.x + 4 * i));
    if (args.fault) store16(args.x + 4 * i, load16_stream(args.y + 4 * i));
}

// ---- asynchronous copies -------------------------------------------------------------------------

// 1: no wait; 2: no barrier; 3: waits for the older group only; 4: the wait comes before the commit; 5: its source
// changes before the wait; 6: its destination is written before the wait; 7: its source was never written.
FAULT(copies) {
    SHARED(shared);
    float* s = (float*)shared;
    uint32_t t = threadIdx.x, fault = args.fault;
    const float* from = (fault == 7 ? args.y : args.x) + blockIdx.x * 64;
    copy16_async(s + 4 * t, from + t / 4 * 4, true);
    commit_copies();
    copy16_async(s + 256 + 4 * t, from, false);
    if (fault != 4) commit_copies();
    if (fault == 5) sync_block();
    if (fault == 5 && t == 0) args.x[blockIdx.x * 64] = 2.0f;
    if (fault == 6) s[4 * t] = 0.0f;
    if (fault == 3) wait_copies<1>();
    else if (fault != 1) wait_copies<0>();
    if (fault != 2) sync_block();
    args.y[global_thread()] = s[4 * (63 - t)] + s[256 + 4 * (63 - t)];
}

// ---- collectives ---------------------------------------------------------------------------------

// 1: half of a warp shuffles; 2: a lane at sync_warp, the others at a shuffle; 3: warps at barriers of different lines;
// 4: a warp ends before the barrier; 5: a lane ends before a shuffle; 6: a warp ends while the other waits; 7: a lane
// goes past the barrier.
FAULT(collectives) {
    uint32_t t = threadIdx.x, fault = args.fault;
    if (fault == 1 && t % 2) sync_block();
    if (fault == 2 && t == 7) sync_warp();
    if (fault == 3 && t < 32) sync_block();
    else sync_block();
    if (fault == 4 && t >= 32) return;
    if (fault == 5 && t == 40) return;
    float x = warp_sum(args.x[t]);
    if (fault == 6 && t < 32) return;
    if (fault != 7 || t != 9) sync_block();
    args.y[global_thread()] = x;
}

// 1: waits for a value that never comes; 2: the same, in step; 3: without looking at memory; 4: with registers alone.
FAULT(never_ends) {
    const volatile float* x = args.x;
    while (args.fault == 1 && x[0] < 1000.0f) {
    }
    while (args.fault == 2 && x[0] < 1000.0f) sync_warp();
    while (args.fault == 3 && lanes_where(true)) {
    }
    uint32_t steps = args.fault;
    while (steps == 4 || steps > 8) steps = steps == 4 ? 9 : 4;
    args.y[global_thread()] = (float)steps;
}

// Right as it is; with its mask switched off it reads past the end.
FAULT(masked) {
    uint32_t i = global_thread();
    if (mask(i + 8 < args.n)) args.y[i] = args.x[i + 8];
}

// With the fault it needs 50 kB of stack.
template <int n> __attribute__((noinline)) static float locals(float x) {
    volatile float local[n];
    for (int i = 0; i < n; i += 4) local[i] = x;
    return warp_sum(local[n - 4]);
}

FAULT(stack) { args.y[global_thread()] = args.fault ? locals<12500>(1.0f) : locals<16>(1.0f); }
