// Attention of decode rows over the pages of a KV cache: one query row of a sequence against all of its keys.
//
// Heads of up to 64, 80, 96 and 128 elements: E, to which others are padded with zeros in shared memory.
//
// Grid [K ceil(G / 16), rows, any number from 1], block 128; G query heads share a key head, and a block serves
// up to 16 of them, so that their keys are read once. A block walks over chunks of CHUNK positions, which begin
// at multiples of CHUNK of the absolute position: chunk z, z + gridDim.z and so on. A warp has KEYS positions of
// a chunk to itself, a page, which it copies and works on without waiting for the others. All of a chunk is on its way
// at once: 32 KiB for heads of 128, and four to six such blocks share a multiprocessor. Memory speed takes 23 KiB
// of each (4.3 TB/s for 0.7 us over 132 of them). Chunks of two pages a warp were slower: at context 1k their
// 288 blocks are two on some multiprocessors and three on others.
//
// Nothing depends on the size of the grid but speed. Blocks that find no chunk exit at once; so one captured
// launch serves every length, and later chunks are later blocks, which leave the way free for those with work.
//
// Reduction order. Keys of a warp: attention.cuh. Then the warps of a chunk in order, then the chunks in order,
// by Partial::add. With more than one block for a row, chunks pass through the workspace, and the block that
// arrives last (a ticket) puts them together; one block alone adds them as it goes. The bits are the same.
//
// Cost: 4 K E bytes for each position of each row; a layer of LLaMA-7B at context 1k: 16.8 MB, 3.9 us at
// 4.3 TB/s. A chunk that passes through the workspace adds 8 (E + 2) bytes to 4 E CHUNK: 3 %, which L2 keeps.
#include "attention.cuh"

constexpr int WARPS = 4;
constexpr int KEYS = PAGE;           // positions of a warp in a chunk
constexpr int CHUNK = WARPS * KEYS;  // attention.rs has the same number

struct PagedDecodeArgs {
    const void* q;             // T [rows, H, head_dim]
    const void* k;             // T [pages, K, PAGE, head_dim]
    const void* v;             // T, likewise
    void* out;                 // T [rows, H, head_dim]
    const int32_t* positions;  // [rows]: where each row stands; it sees what is before it, and itself
    const int32_t* starts;     // [rows]: where its page table begins
    const int32_t* tables;     // page tables end to end
    float* sums;               // [slots, H, head_dim]: chunks on their way
    float* stats;              // [slots, H, 2]: their maxima and sums of weights
    uint32_t* counters;        // [rows, gridDim.x], if gridDim.z > 1: zero before and after
    uint32_t slots;            // room for chunks; rows that find none are left to one block
    uint32_t heads;            // H
    uint32_t group;            // G = H / K
    uint32_t head_dim;         // a multiple of 8 up to E
    float scale;               // log2(e) / sqrt(head_dim)
    uint32_t zero;
};
static_assert(sizeof(PagedDecodeArgs) == 104, "as in attention.rs");

// What some keys say about one query head, in two of its columns: weights 2^(scale (score - max)), their sum,
// and the sum of weighted values.
struct Partial {
    float max, sum, o[2];

    DEVICE void add(const Partial& next, float scale) {
        float top = fmaxf(max, next.max);
        float old = exp2_approx((max - top) * scale), add = exp2_approx((next.max - top) * scale);
        max = top;
        sum = fmaf(sum, old, next.sum * add);
        o[0] = fmaf(o[0], old, next.o[0] * add);
        o[1] = fmaf(o[1], old, next.o[1] * add);
    }
};

constexpr Partial NOTHING = {-INFINITY, 0.0f, {0.0f, 0.0f}};

// The chunks of the first `row` rows, the same in all lanes.
DEVICE int chunks_before(const int32_t* positions, int row) {
    int sum = 0;
    for (int i = lane_id(); i < row; i += WARP) sum += positions[i] / CHUNK + 1;
    return warp_sum(sum);
}

// What the four warps found in a chunk, in shared memory where its keys were.
template <int E> struct Found {
    float o[WARPS][ROWS][ROW<E>];
    float stats[WARPS][ROWS][2];

    template <class T> DEVICE void put(const Queries<T, E>& queries, int heads) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int head = lane_id() / 4 + r * 8;
            if (head >= heads) continue;
            if (lane_id() % 4 == 0) {
                stats[warp_id()][head][0] = queries.max[r];
                stats[warp_id()][head][1] = queries.sum[r];
            }
#pragma unroll
            for (int d = 0; d < E / 8; d++) {
                float* to = &o[warp_id()][head][d * 8 + lane_id() % 4 * 2];
                to[0] = queries.o[d][2 * r];
                to[1] = queries.o[d][2 * r + 1];
            }
        }
    }

    DEVICE Partial total(int head, int col, float scale) const {
        Partial total = NOTHING;
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float* from = &o[w][head][col];
            total.add({stats[w][head][0], stats[w][head][1], {from[0], from[1]}}, scale);
        }
        return total;
    }
};

// This warp's KEYS positions of a chunk, of which it sees `seen`; without any, it finds nothing.
template <class T, int E>
DEVICE void attend(Queries<T, E>& queries, const T* keys, const T* values, int seen, float scale) {
    float s[KEYS / 8][4];
    wait_copies<1>();
    sync_warp();
    if (seen > 0) {
        queries.template scores<KEYS>(s, keys);
        if (seen < KEYS) queries.template hide<KEYS>(s, {seen, seen});
        queries.template weigh<KEYS>(s, scale);
    }
    wait_copies<0>();
    sync_warp();
    if (seen > 0) queries.template add_values<KEYS>(s, values);
    queries.finish();
}

template <class T, int E> DEVICE void paged_decode(const PagedDecodeArgs& args) {
    SHARED(shared);
    T* const keys = (T*)shared + warp_id() * KEYS * ROW<E>;
    T* const values = keys + CHUNK * ROW<E>;
    Found<E>& found = *(Found<E>*)shared;
    // Where the keys and values were; it is somewhat larger than they.
    constexpr size_t COPIED = 2 * CHUNK * ROW<E> * sizeof(T);
    constexpr size_t STAGE = COPIED > sizeof(Found<E>) ? COPIED : sizeof(Found<E>);

    const int row = blockIdx.y, cols = args.head_dim, group = args.group;
    const int tiles = (group + ROWS - 1) / ROWS, tile = blockIdx.x % tiles * ROWS;
    const int kv_head = blockIdx.x / tiles, first_head = kv_head * group + tile, heads = min(group - tile, ROWS);

    // Both are on their way before the first is waited for.
    const int start = args.starts[row], seen = args.positions[row] + 1, chunks = (seen + CHUNK - 1) / CHUNK;
    if ((int)blockIdx.z >= chunks) return;
    const int slot = chunks_before(args.positions, row);
    const bool alone = gridDim.z == 1 || chunks == 1 || slot + chunks > (int)args.slots;
    if (alone && blockIdx.z > 0) return;
    const int step = alone ? 1 : gridDim.z;

    // Half of the threads put together even heads, half odd ones, two columns each.
    constexpr int PAIRS = 64;
    static_assert(2 * PAIRS == WARPS * WARP && 2 * PAIRS >= E, "every pair of columns has a thread");
    const int my_head = threadIdx.x / PAIRS, pair = threadIdx.x % PAIRS, col = 2 * pair;
    const int my_heads = mask(col < cols) ? heads : 0;
    Partial* const sums = (Partial*)(shared + STAGE) + pair;  // [heads][PAIRS]
    for (int head = my_head; head < my_heads; head += 2) sums[head * PAIRS] = NOTHING;

    // Where this warp's page of a chunk is. Behind the last one there is nothing to copy, wherever it would be.
    const int32_t* table = args.tables + start;
    auto find = [&](int chunk) {
        int position = min(chunk * CHUNK + warp_id() * KEYS, seen - 1);
        return ((int64_t)table[position / PAGE] * (args.heads / group) + kv_head) * PAGE * cols;
    };
    auto at = [&](int chunk, int head) { return (int64_t)(slot + chunk) * args.heads + first_head + head; };
    auto write = [&](const Partial& sum, int head) {
        float inverse = 1.0f / sum.sum;
        T* to = (T*)args.out + ((int64_t)row * args.heads + first_head + head) * cols + col;
        *(uint32_t*)to = pack2<T>(sum.o[0] * inverse, sum.o[1] * inverse);
    };

    int64_t page = find(blockIdx.z);
    for (int chunk = blockIdx.z; chunk < chunks; chunk += step) {
        const int rows = seen - chunk * CHUNK - warp_id() * KEYS;
        copy_rows<T, E>(keys, (const T*)args.k + page, cols, rows, cols);
        commit_copies();
        copy_rows<T, E>(values, (const T*)args.v + page, cols, rows, cols);
        commit_copies();
        page = find(chunk + step);

        // Loaded again for each chunk, while its keys are on their way, rather than held over all of them.
        Queries<T, E> queries;
        queries.load((const T*)args.q + ((int64_t)row * args.heads + first_head) * cols, cols, heads, cols);
        queries.clear();
        attend(queries, keys, values, rows, args.scale);

        sync_block();  // all keys and values are read
        found.put(queries, heads);
        sync_block();
        for (int head = my_head; head < my_heads; head += 2) {
            Partial total = found.total(head, col, args.scale);
            if (alone) {
                sums[head * PAIRS].add(total, args.scale);
                continue;
            }
            float *to = args.sums + at(chunk, head) * cols + col, *stats = args.stats + at(chunk, head) * 2;
            to[0] = total.o[0];
            to[1] = total.o[1];
            if (col > 0) continue;
            stats[0] = total.max;
            stats[1] = total.sum;
        }
        sync_block();  // what was found is read, and written
    }
    if (alone) {
        for (int head = my_head; head < my_heads; head += 2) write(sums[head * PAIRS], head);
        return;
    }

    uint32_t* last = (uint32_t*)shared;
    if (threadIdx.x == 0) {
        uint32_t* counter = args.counters + row * gridDim.x + blockIdx.x;
        *last = ticket(counter, 1) + 1 == min((uint32_t)chunks, gridDim.z);
        if (*last) *counter = 0;
    }
    sync_block();
    if (!*last) return;
    for (int head = my_head; head < my_heads; head += 2) {
        Partial sum = NOTHING;
#pragma unroll 8  // loads on their way together
        for (int chunk = 0; chunk < chunks; chunk++) {
            const float *from = args.sums + at(chunk, head) * cols + col, *stats = args.stats + at(chunk, head) * 2;
            sum.add({stats[0], stats[1], {from[0], from[1]}}, args.scale);
        }
        write(sum, head);
    }
}

KERNEL(128, 6, paged_decode_64_bf16, PagedDecodeArgs) { paged_decode<bf16, 64>(args); }
KERNEL(128, 6, paged_decode_64_f16, PagedDecodeArgs) { paged_decode<f16, 64>(args); }
KERNEL(128, 5, paged_decode_80_bf16, PagedDecodeArgs) { paged_decode<bf16, 80>(args); }
KERNEL(128, 5, paged_decode_80_f16, PagedDecodeArgs) { paged_decode<f16, 80>(args); }
KERNEL(128, 5, paged_decode_96_bf16, PagedDecodeArgs) { paged_decode<bf16, 96>(args); }
KERNEL(128, 5, paged_decode_96_f16, PagedDecodeArgs) { paged_decode<f16, 96>(args); }
KERNEL(128, 4, paged_decode_128_bf16, PagedDecodeArgs) { paged_decode<bf16, 128>(args); }
KERNEL(128, 4, paged_decode_128_f16, PagedDecodeArgs) { paged_decode<f16, 128>(args); }
