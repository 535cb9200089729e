// Each primitive of ptx.cuh on given bits, so that its host meaning can be compared with other sources: the tests'
// tables, and what a GPU returns.
#include "../common.cuh"

struct ProbeArgs {
    const uint32_t* in;
    uint32_t* out;
    uint32_t n, zero;
};

// in: [lane][a0 a1 a2 a3 b0 b1 c0 c1 c2 c3]; out: [lane][c0 c1 c2 c3].
template <class T> DEVICE void probe_mma(const ProbeArgs& args) {
    const uint32_t* in = args.in + threadIdx.x * 10;
    uint32_t a[4] = {in[0], in[1], in[2], in[3]};
    float c[4] = {bits_to_float(in[6]), bits_to_float(in[7]), bits_to_float(in[8]), bits_to_float(in[9])};
    mma<T>(c, a, in[4], in[5]);
    for (int i = 0; i < 4; i++) args.out[threadIdx.x * 4 + i] = float_to_bits(c[i]);
}
KERNEL(32, 1, probe_mma_bf16, ProbeArgs) { probe_mma<bf16>(args); }
KERNEL(32, 1, probe_mma_f16, ProbeArgs) { probe_mma<f16>(args); }

// in: four 8x8 matrices of 16-bit elements; out: [plain, transposed][lane][matrix].
KERNEL(32, 1, probe_load_matrices, ProbeArgs) {
    SHARED(shared);
    uint32_t* s = (uint32_t*)shared;
    for (int i = 0; i < 4; i++) s[threadIdx.x * 4 + i] = args.in[threadIdx.x * 4 + i];
    sync_warp();
    uint32_t plain[4], transposed[4];
    load_matrices(plain, shared + threadIdx.x * 16);
    load_matrices_transposed(transposed, shared + threadIdx.x * 16);
    for (int i = 0; i < 4; i++) {
        args.out[threadIdx.x * 4 + i] = plain[i];
        args.out[128 + threadIdx.x * 4 + i] = transposed[i];
    }
}

// in: [lane]; out: [lane][shuffle from lane (7 lane + 3) % 32, shuffle_xor 5, shuffle_xor 16 of 64 bits (the high word),
// lanes_where odd].
KERNEL(32, 1, probe_shuffle, ProbeArgs) {
    uint32_t lane = threadIdx.x, x = args.in[lane];
    uint32_t* out = args.out + lane * 4;
    out[0] = shuffle(x, (int)(7 * lane + 3) % WARP);
    out[1] = float_to_bits(shuffle_xor(bits_to_float(x), 5));
    out[2] = (uint32_t)(shuffle_xor((uint64_t)x << 32, 16) >> 32);
    out[3] = lanes_where(x % 2 == 1);
}

// in: [n] bits; out: [n][pack2<bf16>(x, 1), pack2<f16>(x, 1), low half from f16, low half from bf16].
KERNEL(256, 1, probe_convert, ProbeArgs) {
    uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= args.n) return;
    uint32_t x = args.in[i];
    args.out[4 * i] = pack2<bf16>(bits_to_float(x), 1.0f);
    args.out[4 * i + 1] = pack2<f16>(bits_to_float(x), 1.0f);
    args.out[4 * i + 2] = float_to_bits(low<f16>(x));
    args.out[4 * i + 3] = float_to_bits(low<bf16>(x));
}

// in: [lane][4], and one lane's worth more; out: [lane][4]: what an asynchronous copy brought (zeroes in lanes
// from n on), plus twice the neighbour's, plus three times one's own, plus the count of lanes.
KERNEL(32, 1, probe_memory, ProbeArgs) {
    SHARED(shared);
    uint32_t lane = threadIdx.x, own = 4 * lane;
    uint32_t* s = (uint32_t*)shared;
    uint32_t* count = s + 128;
    copy16_async(s + own, args.in + own, lane < args.n);
    commit_copies();
    if (lane == 0) *count = 0;
    wait_copies<0>();
    sync_warp();
    add_shared(count, 1);
    sync_warp();
    Vec16 next = load16(args.in + own + 4), mine = load16_stream(args.in + own), sum;
    for (int i = 0; i < 4; i++) sum.word[i] = s[own + i] + 2 * next.word[i] + 3 * mine.word[i] + *count;
    store16(args.out + own, sum);
}

// in: [n] bits; out: [n][exp2_approx, rcp_approx].
KERNEL(256, 1, probe_approximate, ProbeArgs) {
    uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= args.n) return;
    args.out[2 * i] = float_to_bits(exp2_approx(bits_to_float(args.in[i])));
    args.out[2 * i + 1] = float_to_bits(rcp_approx(bits_to_float(args.in[i])));
}

// out: [0] a counter, zero before; [1 + 2 thread] when the thread began, [2 + 2 thread] when it ended. Between them it
// meets its warp.
KERNEL(64, 1, probe_order, ProbeArgs) {
    uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    args.out[1 + 2 * i] = ticket(args.out, 1);
#pragma unroll 1
    for (int step = 0; step < 8; step++) warp_sum(1.0f);
    args.out[2 + 2 * i] = ticket(args.out, 1);
}
