// Attention of many query rows: dense within images (all of it, or causal), and causal over the pages of a KV
// cache (prefill). One kernel, because only addresses differ: keys and values come in blocks of PAGE rows, which
// a page table names or which follow each other.
//
// Heads of up to 64, 80, 96 and 128 elements: E, to which others are padded with zeros in shared memory. A head is
// a multiple of 8, so every row of it begins at 16 bytes.
//
// Grid [H, tiles of TILE rows, images], a warp for each 16 of them. A block is one head's tile; all its warps walk over
// tiles of KEYS positions, which begin at multiples of KEYS of the absolute position. While one is worked on the next is
// on its way (cp.async, two stages).
//
// Tiles have 80 rows for heads of 64: 577 rows of 16 heads are then 128 blocks for the 132 multiprocessors of an H200,
// 13.5 us; in tiles of 64 they are 160, and those that share a multiprocessor take 15.2. Not faster there, of the same
// bits: scores of the next tile beside the softmax of this one, in three orders (13.7 to 17); three or four stages; two
// warps that share fragments for 32 rows each (16.4). Slower too: warps in two groups with every other tile each (16.5).
//
// Rows of a paged call are of one or more sequences; where `starts` changes, a new one begins. A block takes the
// sequences in its tile one after another, each over all of its keys: so no plan is needed on the host, at the
// price that a tile of n sequences takes n walks. Rows of one sequence have consecutive positions.
//
// Reduction order: attention.cuh, tiles ascending. A tile that a row does not see may be skipped or masked, the
// bits are the same: they depend on the row, its position and its keys alone.
//
// Cost: 4 H E FLOPs for each pair of a query and a key that it sees; tiles add 640^2 / 577^2 to an image of 577
// rows, and up to 126 keys to a causal row. A ViT-L layer (577 rows, 16 heads of 64) is 1.36 GFLOP, 4.1 us at
// 333 TFLOP/s, which is what FlashAttention-3 is known to reach on an H100 at 512 keys (282 the second version);
// a LLaMA-7B layer of 640 rows 3.4 GFLOP, 10 us at that rate.
#include "attention.cuh"

template <int E> constexpr int WARPS = E <= 64 ? 5 : 4;
template <int E> constexpr int TILE = WARPS<E> * ROWS;  // query rows of a block; attention.rs has the same numbers
constexpr int COPIERS = 4;                              // warps that copy a page of a tile each
constexpr int KEYS = COPIERS * PAGE;                    // positions of a tile

struct AttentionArgs {
    const void* q;             // T: the first row of the first head
    const void* k;             // T: likewise; a block of PAGE rows begins at a multiple of block_stride
    const void* v;             // T
    void* out;                 // T [images, rows, H, head_dim]
    const int32_t* positions;  // [rows]: where each row stands; it sees what is before it, and itself; or null
    const int32_t* starts;     // [rows]: where its page table begins; or null
    const int32_t* tables;     // page tables end to end, or null: then block i is the i-th of an image
    int64_t block_stride;      // elements from block to block
    uint32_t q_stride;         // elements from row to row
    uint32_t kv_stride;        // elements from row to row of a block
    uint32_t head_stride;      // elements from key head to key head
    uint32_t rows;             // of an image, or of all sequences
    uint32_t group;            // query heads of a key head
    uint32_t head_dim;         // a multiple of 8 up to E
    uint32_t causal;           // without pages: whether a row sees only itself and the rows before it
    float scale;               // log2(e) / sqrt(head_dim)
};
static_assert(sizeof(AttentionArgs) == 96, "as in attention.rs");

// Rows begin .. begin + rows of a tile, all of one sequence or image.
template <class T> struct Run {
    const T* q;
    T* out;
    const T* k;
    const T* v;
    const int32_t* table;
    int rows;
    int past;   // positions before the first row
    int total;  // positions there are, and that all rows see, or negative: row i sees past + i + 1

    DEVICE int seen(int row) const { return total < 0 ? past + row + 1 : total; }
};

template <class T, int E> DEVICE void attend(const AttentionArgs& args, const Run<T>& run, T* shared) {
    const int first = warp_id() * ROWS;
    const int last = min(first + ROWS, run.rows);
    const int limit = run.seen(run.rows - 1), tiles = (limit + KEYS - 1) / KEYS;
    const int cols = args.head_dim;

    // This warp's block of a tile is looked up a tile ahead, so that no copy waits for its page's number: whatever is
    // computed of it is computed there (prompts of 640 rows: 27.0 us to 24.6). Behind the last block there are no rows
    // to copy, wherever they would be.
    auto find = [&](int tile) {
        int block = min(tile * COPIERS + warp_id(), (limit - 1) / PAGE);
        return run.table ? run.table[block] : block;
    };
    auto stage = [&](int tile) { return shared + tile % 2 * (2 * KEYS * ROW<E>); };
    auto copy = [&](int tile, int block) {
        if (warp_id() < COPIERS) {
            const int64_t from = block * args.block_stride;
            T* to = stage(tile) + warp_id() * PAGE * ROW<E>;
            int rows = limit - (tile * COPIERS + warp_id()) * PAGE;
            copy_rows<T, E>(to, run.k + from, args.kv_stride, rows, cols);
            copy_rows<T, E>(to + KEYS * ROW<E>, run.v + from, args.kv_stride, rows, cols);
        }
        commit_copies();
    };

    copy(0, find(0));
    int next = find(1);
    Queries<T, E> queries;
    queries.load(run.q + (int64_t)first * args.q_stride, args.q_stride, run.rows - first, cols);
    queries.clear();
    for (int tile = 0; tile < tiles; tile++) {
        wait_copies<0>();
        sync_block();
        if (tile + 1 < tiles) {
            copy(tile + 1, next);
            next = find(tile + 2);
        }
        const int begin = tile * KEYS;
        if (first >= run.rows || begin >= run.seen(last - 1)) continue;
        float s[KEYS / 8][4];
        queries.template scores<KEYS>(s, stage(tile));
        if (begin + KEYS > run.seen(first)) {
            int row = first + lane_id() / 4;
            queries.template hide<KEYS>(s, {run.seen(row) - begin, run.seen(row + 8) - begin});
        }
        queries.template weigh<KEYS>(s, args.scale);
        queries.template add_values<KEYS>(s, stage(tile) + KEYS * ROW<E>);
    }
    queries.finish();

    const int64_t stride = (int64_t)gridDim.x * cols;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int row = first + lane_id() / 4 + r * 8;
        float inverse = 1.0f / queries.sum[r];
#pragma unroll
        for (int d = 0; d < E / 8; d++) {
            int col = d * 8 + lane_id() % 4 * 2;
            bool row_inside = mask(row < run.rows);
            bool col_inside = mask(col < cols);
            if (!row_inside || !col_inside) continue;
            // A masked tile may turn -0 into 0, as adding zeros does: so all zeros become 0.
            float lo = queries.o[d][2 * r] * inverse + 0.0f, hi = queries.o[d][2 * r + 1] * inverse + 0.0f;
            *(uint32_t*)(run.out + row * stride + col) = pack2<T>(lo, hi);
        }
    }
}

// The first row after `begin` whose page table is not at `start`, or `end`; the same in all lanes. All of `starts` are
// asked for at once, and together with `start` and the position.
template <int E> DEVICE int end_of_sequence(const int32_t* starts, int start, int begin, int end) {
    int found = end;
#pragma unroll
    for (int i = 0; i < TILE<E>; i += WARP) {
        int row = min(begin + i + lane_id(), end - 1);
        if (starts[row] != start) found = min(found, row);
    }
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) found = min(found, shuffle_xor(found, step));
    return found;
}

template <class T, int E> DEVICE void attention(const AttentionArgs& args) {
    SHARED(shared);
    // Heads first, then tiles from the last: with a causal mask late rows are long, and long blocks go first.
    const int head = blockIdx.x, rows = args.rows;
    int begin = (gridDim.y - 1 - blockIdx.y) * TILE<E>;
    const int end = min(begin + TILE<E>, rows);
    const int64_t image = (int64_t)blockIdx.z * rows;
    const int64_t kv = (int64_t)(head / args.group) * args.head_stride + image * args.kv_stride;
    while (begin < end) {
        Run<T> run;
        run.q = (const T*)args.q + (image + begin) * args.q_stride + (int64_t)head * args.head_dim;
        run.out = (T*)args.out + ((image + begin) * gridDim.x + head) * args.head_dim;
        run.k = (const T*)args.k + kv;
        run.v = (const T*)args.v + kv;
        if (args.tables) {
            const int start = args.starts[begin];
            run.past = args.positions[begin];
            run.table = args.tables + start;
            run.rows = end_of_sequence<E>(args.starts, start, begin, end) - begin;
            run.total = -1;
        } else {
            run.table = nullptr;
            run.rows = end - begin;
            run.past = begin;
            run.total = args.causal ? -1 : rows;
        }
        attend<T, E>(args, run, (T*)shared);
        begin += run.rows;
        if (begin < end) sync_block();  // the next sequence's first tile lands where the last one's was read
    }
}

// 157 registers on sm_80 to 90, which two blocks of a multiprocessor have; sm_100 and 120 need 218 not to spill.
KERNEL(160, 1, attention_64_bf16, AttentionArgs) { attention<bf16, 64>(args); }
KERNEL(160, 1, attention_64_f16, AttentionArgs) { attention<f16, 64>(args); }
KERNEL(128, 2, attention_80_bf16, AttentionArgs) { attention<bf16, 80>(args); }
KERNEL(128, 2, attention_80_f16, AttentionArgs) { attention<f16, 80>(args); }
KERNEL(128, 2, attention_96_bf16, AttentionArgs) { attention<bf16, 96>(args); }
KERNEL(128, 2, attention_96_f16, AttentionArgs) { attention<f16, 96>(args); }
KERNEL(128, 2, attention_128_bf16, AttentionArgs) { attention<bf16, 128>(args); }
KERNEL(128, 2, attention_128_f16, AttentionArgs) { attention<f16, 128>(args); }
