// The matrix product that Linear, GatedLinear and PatchEmbed share: y = rows · Wᵀ on tensor cores.
//
//   rows  M x K: a matrix in memory, or what the caller gathers (patches of an image)
//   W     T [N, ldw], ldw = K rounded up to 8, the rest zeros
//   y     whatever the caller's `Output` makes of four neighbouring f32 sums at a time
//   grid  (tiles, slices): tile t of M/ROWS x N/COLS in raster order, slice s of K
//
// Cost: 2 M N K FLOP; M K + N K elements read from DRAM once if L2 holds a wave's share of both.
//
// Reduction order of one sum: K is cut into `slices` slices at multiples of K_UNIT, which depend on N and K alone. In a
// slice one accumulator takes k16 steps in order (the order within a step is the tensor core's). The slices' sums are
// added in index order, beginning with the first. Nothing of this names a tile shape or a row count, so a row's
// result has the same bits in every tile and beside any other rows.
//
// A block's pipeline: STAGES slots in shared memory of DEPTH columns of both operands. While block b is multiplied,
// b + 1 .. b + STAGES - 1 are on their way, and the fragments of the next k16 step are read from shared memory while
// those of this one are multiplied, across the barrier too. One barrier a block of columns.
//
// Later, for sm_90: a producer warp with TMA and wgmma consumers take the place of `Pipeline` alone.
#pragma once
#include "common.cuh"

// Eight bytes, moved as one.
struct alignas(8) Vec8 {
    uint32_t word[2];
};

constexpr uint32_t K_UNIT = 64;  // slices of K begin at multiples of it; every DEPTH divides it

// A block's share of the product: ROWS x COLS of y, DEPTH columns of the operands at a time in STAGES slots.
// WARPS_M x WARPS_N warps have a rectangle each. backend/cuda/tile.rs has the same table.
template <int ROWS_, int COLS_, int DEPTH_, int STAGES_, int WARPS_M_, int WARPS_N_> struct Tile {
    static constexpr int ROWS = ROWS_, COLS = COLS_, DEPTH = DEPTH_, STAGES = STAGES_, WARPS_N = WARPS_N_;
    static constexpr int WARPS = WARPS_M_ * WARPS_N_, THREADS = WARPS * WARP;
    static constexpr int WARP_ROWS = ROWS / WARPS_M_, WARP_COLS = COLS / WARPS_N_;
    static constexpr int M16 = WARP_ROWS / 16, N16 = WARP_COLS / 16, STEPS = DEPTH / 16;

    static constexpr int CHUNKS = DEPTH / 8;         // 16-byte pieces of a row in a slot
    static constexpr int PASS = THREADS / CHUNKS;    // rows that all threads together copy at a time
    static constexpr int ROW = DEPTH * 2, SLOT = (ROWS + COLS) * ROW;  // bytes

    static constexpr int SHARED_BYTES = STAGES * SLOT;

    static_assert(WARP_ROWS * WARPS_M_ == ROWS && WARP_COLS * WARPS_N_ == COLS, "whole warps");
    static_assert(WARP_ROWS % 16 == 0 && WARP_COLS % 16 == 0, "whole fragments");
    static_assert((DEPTH == 32 || DEPTH == 64) && K_UNIT % DEPTH == 0, "whole blocks in a unit of K");
    static_assert(PASS % 16 == 0, "a thread's rows of all passes are dealt and swizzled alike");
    static_assert(SHARED_BYTES <= 163 * 1024, "what a block of sm_80 may have");
};

// Where in a slot the 16 bytes `chunk` of row `row` lie, in bytes. Rows are 64 or 128 bytes; the chunks of neighbouring
// rows are permuted so that ldmatrix, which reads one chunk of eight rows, meets every bank once.
template <int CHUNKS> DEVICE constexpr uint32_t swizzle(uint32_t row, uint32_t chunk) {
    return (row * CHUNKS + (chunk ^ row % 8 / (8 / CHUNKS))) * 16;
}

// The row of W that row `s` of a slot holds, both from the tile's first: of sixteen, 0 1 4 5 8 9 12 13 and then
// 2 3 6 7 10 11 14 15. So a thread's columns 2t, 2t+1 in two neighbouring 8-column products are columns 4t .. 4t+3 of
// y: 16 bytes in f32, and gate and up of two features.
DEVICE constexpr uint32_t dealt(uint32_t s) {
    return s / 16 * 16 + s % 8 / 2 * 4 + s / 8 % 2 * 2 + s % 2;
}

// Whether eight neighbouring rows at one chunk lie in eight different 16-byte groups of banks, whichever they are.
template <int CHUNKS> constexpr bool conflict_free() {
    for (uint32_t row = 0; row < 64; row += 8)
        for (uint32_t chunk = 0; chunk < CHUNKS; chunk++) {
            uint32_t groups = 0;
            for (uint32_t r = row; r < row + 8; r++) groups |= 1u << swizzle<CHUNKS>(r, chunk) / 16 % 8;
            if (groups != 0xff) return false;
        }
    return true;
}
static_assert(conflict_free<4>() && conflict_free<8>(), "ldmatrix without bank conflicts");

// ---- four neighbouring columns, for outputs --------------------------------------------------------------

// Of which `left` exist. If rows are `whole` fours they all do, at an aligned address.
template <bool whole> DEVICE void load4(float (&v)[4], const float* from, int left) {
    if constexpr (whole) {
        Vec16 raw = load16(from);
        for (int e = 0; e < 4; e++) v[e] = bits_to_float(raw.word[e]);
    } else {
        for (int e = 0; e < 4; e++) v[e] = mask(e < left) ? from[e] : 0.0f;
    }
}
template <bool whole, class T> DEVICE void load4(float (&v)[4], const T* from, int left) {
    if constexpr (whole) {
        Vec8 raw = *(const Vec8*)from;
        for (int i = 0; i < 2; i++) v[2 * i] = low<T>(raw.word[i]), v[2 * i + 1] = high<T>(raw.word[i]);
    } else {
        for (int e = 0; e < 4; e++) v[e] = mask(e < left) ? to_float(from[e]) : 0.0f;
    }
}

template <bool whole> DEVICE void store4(float* to, const float (&v)[4], int left) {
    if constexpr (whole) {
        store16(to, {float_to_bits(v[0]), float_to_bits(v[1]), float_to_bits(v[2]), float_to_bits(v[3])});
    } else {
        for (int e = 0; e < 4; e++)
            if (mask(e < left)) to[e] = v[e];
    }
}
template <bool whole, class T> DEVICE void store4(T* to, const float (&v)[4], int left) {
    if constexpr (whole) {
        *(Vec8*)to = {pack2<T>(v[0], v[1]), pack2<T>(v[2], v[3])};
    } else {
        for (int e = 0; e < 4; e++)
            if (mask(e < left)) to[e] = from_float<T>(v[e]);
    }
}

// ---- the product -----------------------------------------------------------------------------------------

struct GemmArgs {
    const void* w;       // T [cols, ldw]
    float* partials;     // slices * tiles * ROWS * COLS floats, if there is more than one slice
    uint32_t* counters;  // one for each tile, zero before and after
    uint32_t rows, cols, depth, ldw;
    uint32_t slices;     // of K
    uint32_t group;      // rows of tiles that are walked together
};
static_assert(sizeof(GemmArgs) == 48, "as in backend/cuda/tile.rs");

// Columns of y that there are in row `row` from column `col` on: none behind the last row.
DEVICE int columns_left(const GemmArgs& args, uint32_t row, uint32_t col) {
    return mask(row < args.rows) ? (int)args.cols - (int)col : 0;
}

struct Place {
    uint32_t row, col;
};

// The tile that block `at` computes. `group` rows of tiles are walked column by column, so that the blocks of one wave
// share few rows of both operands and find them in L2. backend/cuda/tile.rs has the same function.
DEVICE constexpr Place place(uint32_t at, uint32_t tile_rows, uint32_t tile_cols, uint32_t group) {
    uint32_t first = at / (group * tile_cols) * group;
    uint32_t height = tile_rows - first < group ? tile_rows - first : group;
    uint32_t within = at % (group * tile_cols);
    return {first + within % height, within / height};
}

// What one k16 step of a warp multiplies.
template <class Tile> struct Fragments {
    uint32_t x[Tile::M16][4];
    uint32_t w[Tile::N16][4];  // two 8-column fragments each
};

// The sums of one warp: 16 x 8 blocks as mma lays them over the lanes.
template <class Tile> using Sums = float[Tile::M16][2 * Tile::N16][4];

// Sums of four neighbouring columns: group g is row 8 (g % 2) of the lane's in 16 x 16 block g / 2.
template <class Tile> DEVICE Vec16 four(const Sums<Tile>& c, int g) {
    const float(&lo)[4] = c[g / 2 / Tile::N16][g / 2 % Tile::N16 * 2];
    const float(&hi)[4] = c[g / 2 / Tile::N16][g / 2 % Tile::N16 * 2 + 1];
    const int h = g % 2 * 2;
    return {float_to_bits(lo[h]), float_to_bits(lo[h + 1]), float_to_bits(hi[h]), float_to_bits(hi[h + 1])};
}

template <class Tile> DEVICE void put(Sums<Tile>& c, int g, const Vec16& v) {
    for (int e = 0; e < 4; e++) c[g / 2 / Tile::N16][g / 2 % Tile::N16 * 2 + e / 2][g % 2 * 2 + e % 2] = bits_to_float(v.word[e]);
}

// An operand in memory whose rows begin at 16-byte addresses: rows x depth, zeros outside.
template <class T> struct Matrix {
    static constexpr bool ASYNC = true;
    const T* data;
    uint32_t rows, depth;
    uint32_t stride;  // elements from row to row
};

// One slice of one tile. X is the Matrix of rows, or whatever has gather(row, k): columns k .. k+8 of a row, zeros
// outside.
template <class T, class Tile, class X> struct Pipeline {
    const X& x;
    const Matrix<T>& w;
    unsigned char* shared;
    Place first;     // of the tile, in y
    uint32_t begin;  // of the slice, in K

    DEVICE unsigned char* slot(uint32_t i) const { return shared + i * Tile::SLOT; }

    // Starts to copy the columns of block `block` to slot `to`.
    DEVICE void fill(uint32_t to, uint32_t block) const {
        const uint32_t chunk = threadIdx.x % Tile::CHUNKS, row = threadIdx.x / Tile::CHUNKS;
        const uint32_t k = begin + block * Tile::DEPTH + chunk * 8;
        unsigned char* at = slot(to) + swizzle<Tile::CHUNKS>(row, chunk);
        if constexpr (X::ASYNC) copy<Tile::ROWS>(at, x, row, first.row + row, k);
        copy<Tile::COLS>(at + Tile::ROWS * Tile::ROW, w, row, first.col + dealt(row), k);
        if constexpr (!X::ASYNC) gather(at, first.row + row, k);
    }

    // This thread's pieces of an operand's share of a slot, which is COUNT rows: row `row` of it, row `first` of the
    // operand, and every PASS further.
    template <int COUNT>
    DEVICE static void copy(unsigned char* to, const Matrix<T>& from, uint32_t row, uint32_t first, uint32_t k) {
        const T* data = from.data + (int64_t)first * from.stride + k;
        const int left = mask(k < from.depth) ? (int)from.rows - (int)first : 0;  // rows that exist from `first` on
#pragma unroll
        for (int i = 0; i < COUNT; i += Tile::PASS, data += (int64_t)Tile::PASS * from.stride)
            if (i + Tile::PASS <= COUNT || row + i < COUNT) copy16_async(to + i * Tile::ROW, data, mask(i < left));
    }

    // The same for rows that are gathered. All are under way before the first is waited for.
    DEVICE void gather(unsigned char* to, uint32_t first, uint32_t k) const {
        constexpr int PASSES = Tile::ROWS / Tile::PASS;
        Vec16 v[PASSES];
#pragma unroll
        for (int i = 0; i < PASSES; i++) v[i] = x.gather(first + i * Tile::PASS, k);
#pragma unroll
        for (int i = 0; i < PASSES; i++) *(Vec16*)(to + i * Tile::PASS * Tile::ROW) = v[i];
    }

    // The fragments of a k16 step from a slot. Two chunks further is bit 5 of an address, before and after the swizzle.
    DEVICE void load(Fragments<Tile>& f, uint32_t from, int step) const {
        const uint32_t lane = lane_id(), warp = warp_id();
        const uint32_t x_row = warp / Tile::WARPS_N * Tile::WARP_ROWS + lane % 16;
        const uint32_t w_row = warp % Tile::WARPS_N * Tile::WARP_COLS + lane / 16 * 8 + lane % 8;
        const unsigned char* x_at = slot(from) + (swizzle<Tile::CHUNKS>(x_row, lane / 16) ^ step * 32);
        const unsigned char* w_at = slot(from) + (swizzle<Tile::CHUNKS>(w_row, lane / 8 % 2) ^ step * 32);
#pragma unroll
        for (int i = 0; i < Tile::M16; i++) load_matrices(f.x[i], x_at + 16 * i * Tile::ROW);
#pragma unroll
        for (int j = 0; j < Tile::N16; j++) load_matrices(f.w[j], w_at + (Tile::ROWS + 16 * j) * Tile::ROW);
    }

    DEVICE static void multiply(Sums<Tile>& c, const Fragments<Tile>& f) {
#pragma unroll
        for (int i = 0; i < Tile::M16; i++)
#pragma unroll
            for (int j = 0; j < Tile::N16; j++) {
                mma<T>(c[i][2 * j], f.x[i], f.w[j][0], f.w[j][1]);
                mma<T>(c[i][2 * j + 1], f.x[i], f.w[j][2], f.w[j][3]);
            }
    }

    // Adds the product of `blocks` blocks of columns, at least one, to c. Other warps may still read shared memory.
    DEVICE void run(Sums<Tile>& c, uint32_t blocks) const {
        for (uint32_t i = 0; i < Tile::STAGES - 1; i++) {
            if (i < blocks) fill(i, i);
            commit_copies();
        }
        wait_copies<Tile::STAGES - 2>();
        sync_block();
        Fragments<Tile> f[2];
        load(f[0], 0, 0);
        uint32_t now = 0;  // the slot of this block; the next in the ring is the next block's
#pragma unroll 1
        for (uint32_t block = 0; block < blocks; block++) {
            // Nobody reads the slot of the block before any more: its last fragments were loaded before the barrier.
            const uint32_t later = block + Tile::STAGES - 1;
            if (later < blocks) fill(now == 0 ? Tile::STAGES - 1 : now - 1, later);
            commit_copies();
#pragma unroll
            for (int step = 0; step < Tile::STEPS; step++) {
                if (step + 1 == Tile::STEPS) {
                    // After the last block its slot is read once more, for nothing: a branch would cost registers.
                    if (block + 1 < blocks) now = now + 1 == Tile::STAGES ? 0 : now + 1;
                    wait_copies<Tile::STAGES - 2>();
                    sync_block();
                }
                load(f[(step + 1) % 2], now, (step + 1) % Tile::STEPS);
                multiply(c, f[step % 2]);
            }
        }
    }
};

// Replaces c by the sum of all slices of tile `tile`, in the block of the slice that arrives last, and says whether
// this is it. Partial sums lie as the threads hold them: 16 bytes of each, side by side.
template <class Tile>
DEVICE bool combine(Sums<Tile>& c, const GemmArgs& args, uint32_t tile, unsigned char* shared) {
    constexpr int GROUPS = Tile::M16 * Tile::N16 * 2;  // of four floats of a thread
    const int64_t slice = (int64_t)gridDim.x * Tile::ROWS * Tile::COLS;
    float* mine = args.partials + ((int64_t)tile * GROUPS * Tile::THREADS + threadIdx.x) * 4;
#pragma unroll
    for (int g = 0; g < GROUPS; g++) store16(mine + blockIdx.y * slice + g * Tile::THREADS * 4, four<Tile>(c, g));
    sync_block();
    uint32_t* arrived = (uint32_t*)shared;
    if (threadIdx.x == 0) *arrived = ticket(&args.counters[tile], 1);
    sync_block();
    if (*arrived + 1 != args.slices) return false;
    if (threadIdx.x == 0) args.counters[tile] = 0;
    // A batch of the next slice is on its way while that of one is added; larger ones would take registers that c has.
    constexpr int BATCH = GROUPS % 8 == 0 ? 8 : GROUPS % 4 == 0 ? 4 : 2;
#pragma unroll
    for (int first = 0; first < GROUPS; first += BATCH) {
        Vec16 sum[BATCH], now[BATCH], next[BATCH];
        auto load = [&](Vec16 (&to)[BATCH], uint32_t s) {
#pragma unroll
            for (int g = 0; g < BATCH; g++)
                to[g] = s == blockIdx.y ? four<Tile>(c, first + g)  // what this block found itself it still holds
                                        : load16(mine + s * slice + (first + g) * Tile::THREADS * 4);
        };
        load(sum, 0);
        load(next, 1);
#pragma unroll 1
        for (uint32_t s = 1; s < args.slices; s++) {
#pragma unroll
            for (int g = 0; g < BATCH; g++) now[g] = next[g];
            if (s + 1 < args.slices) load(next, s + 1);
#pragma unroll
            for (int g = 0; g < BATCH; g++)
                for (int e = 0; e < 4; e++)
                    sum[g].word[e] = float_to_bits(bits_to_float(sum[g].word[e]) + bits_to_float(now[g].word[e]));
        }
#pragma unroll
        for (int g = 0; g < BATCH; g++) put<Tile>(c, first + g, sum[g]);
    }
    return true;
}

// Hands the sums to `out` as the lanes hold them: four neighbouring columns of a row, so that four lanes store 32 (f32:
// 64) neighbouring bytes, which are whole sectors without a detour through shared memory. What `out` needs beside the sums
// of sixteen rows is asked for before the first of them is stored.
//
// The loop over what becomes of the sums stays rolled, because it may be long (an erf for each of a thread's 128). Since
// registers have no index at run time, the sums of later rows move up instead.
template <class Tile, class Output> DEVICE void write(Sums<Tile>& c, const Output& out, Place first) {
    const uint32_t lane = lane_id(), warp = warp_id();
    first.row += warp / Tile::WARPS_N * Tile::WARP_ROWS + lane / 4;
    first.col += warp % Tile::WARPS_N * Tile::WARP_COLS + lane % 4 * 4;
#pragma unroll 1
    for (int i = 0; i < Tile::M16; i++, first.row += 16) {
        typename Output::Beside beside[2 * Tile::N16];
#pragma unroll
        for (int g = 0; g < 2 * Tile::N16; g++) beside[g] = out.beside(first.row + g % 2 * 8, first.col + g / 2 * 16);
#pragma unroll
        for (int g = 0; g < 2 * Tile::N16; g++) {
            const Vec16 sums = four<Tile>(c, g);
            float y[4];
            for (int e = 0; e < 4; e++) y[e] = bits_to_float(sums.word[e]);
            out.write(first.row + g % 2 * 8, first.col + g / 2 * 16, y, beside[g]);
        }
#pragma unroll
        for (int m = 0; m + 1 < Tile::M16; m++)
#pragma unroll
            for (int j = 0; j < 2 * Tile::N16; j++)
                for (int e = 0; e < 4; e++) c[m][j][e] = c[m + 1][j][e];
    }
}

// The whole of a block: X as for Pipeline; finish(c, first) is given the sums of the tile that begins at `first`.
template <class T, class Tile, class X, class Finish>
DEVICE void gemm(const GemmArgs& args, const X& x, const Finish& finish) {
    SHARED(shared);
    const uint32_t tile_rows = (args.rows + Tile::ROWS - 1) / Tile::ROWS;
    const uint32_t tile_cols = (args.cols + Tile::COLS - 1) / Tile::COLS;
    const Place tile = place(blockIdx.x, tile_rows, tile_cols, args.group);
    const Place first = {tile.row * Tile::ROWS, tile.col * Tile::COLS};
    const uint32_t units = (args.depth + K_UNIT - 1) / K_UNIT;
    const uint32_t begin = units * blockIdx.y / args.slices * K_UNIT;
    const uint32_t next = units * (blockIdx.y + 1) / args.slices * K_UNIT;
    const uint32_t end = next < args.depth ? next : args.depth;

    const Matrix<T> w = {(const T*)args.w, args.cols, args.ldw, args.ldw};
    Sums<Tile> c = {};
    const Pipeline<T, Tile, X> pipeline = {x, w, shared, first, begin};
    pipeline.run(c, (end - begin + Tile::DEPTH - 1) / Tile::DEPTH);
    if (args.slices > 1 && !combine<Tile>(c, args, blockIdx.x, shared)) return;
    finish(c, first);
}
