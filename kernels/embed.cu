// Rows gathered: EmbedRows, EmbedTokens and SelectRows. Bits are copied; only EmbedTokens adds something.
//
//   embed_rows    y[r] = sources[r] < 0 ? table[ids[r]] : image_rows[sources[r]]
//   embed_tokens  y[r] = table[ids[r]] + positions[r % period], positions and sum in f32
//   select_rows   y[r][offset ... offset + cols] = x[row(r)], one launch for each operand put side by side;
//                 row(r) is index[r], or r with the first of every `period` rows left out, or r
//
// All rows are T and contiguous; ids, sources and index i32 [rows]. One block of 256 a row: 16 bytes a thread where every
// row begins at a multiple of 16 bytes, single elements where not. Shared: none. Floor: each row read and written once.
#include "common.cuh"

struct EmbedArgs {
    const int* ids;
    const int* sources;
    const void* image_rows;
    const void* table;
    void* y;
    uint32_t cols;
    uint32_t table_stride;  // elements from one row of the table to the next
};
static_assert(sizeof(EmbedArgs) == 48);

struct TokensArgs {
    const int* ids;
    const void* table;
    const float* positions;  // [period, cols]
    void* y;
    uint32_t cols;
    uint32_t table_stride;
    uint32_t period;
    uint32_t unused;
};
static_assert(sizeof(TokensArgs) == 48);

struct SelectArgs {
    const void* x;
    const int* index;  // null: no index
    void* y;
    uint32_t cols, y_cols, offset;
    uint32_t period;  // of every so many rows of x the first is left out; 0: none is
};
static_assert(sizeof(SelectArgs) == 40);

// One row; `aligned`: both begin at a multiple of 16 bytes and cols is a multiple of 8.
template <class T> DEVICE void copy_row(const T* from, T* to, uint32_t cols, bool aligned) {
    if (aligned) {
        for (uint32_t i = threadIdx.x * VEC<T>; i < cols; i += blockDim.x * VEC<T>) store16(to + i, load16(from + i));
    } else {
        for (uint32_t i = threadIdx.x; i < cols; i += blockDim.x) to[i] = from[i];
    }
}

template <class T> DEVICE void embed_rows(const EmbedArgs& args) {
    int64_t row = blockIdx.x, source = args.sources[row];
    const T* from = source < 0 ? (const T*)args.table + (int64_t)args.ids[row] * args.table_stride
                               : (const T*)args.image_rows + source * args.cols;
    copy_row(from, (T*)args.y + row * args.cols, args.cols, args.cols % VEC<T> == 0 && args.table_stride % VEC<T> == 0);
}

// Element by element: the text tower of CLIP has 77 rows, once a text.
template <class T> DEVICE void embed_tokens(const TokensArgs& args) {
    int64_t row = blockIdx.x;
    const T* from = (const T*)args.table + (int64_t)args.ids[row] * args.table_stride;
    const float* position = args.positions + row % args.period * args.cols;
    T* to = (T*)args.y + row * args.cols;
    for (uint32_t i = threadIdx.x; i < args.cols; i += blockDim.x) to[i] = from_float<T>(to_float(from[i]) + position[i]);
}

template <class T> DEVICE void select_rows(const SelectArgs& args) {
    int64_t row = blockIdx.x, source = row;
    if (args.index) source = args.index[row];
    if (args.period) source += row / (args.period - 1) + 1;
    bool aligned = args.cols % VEC<T> == 0 && args.y_cols % VEC<T> == 0 && args.offset % VEC<T> == 0;
    copy_row((const T*)args.x + source * args.cols, (T*)args.y + row * args.y_cols + args.offset, args.cols, aligned);
}

KERNEL(256, 4, embed_rows_bf16, EmbedArgs) { embed_rows<bf16>(args); }
KERNEL(256, 4, embed_rows_f16, EmbedArgs) { embed_rows<f16>(args); }
KERNEL(256, 4, embed_tokens_bf16, TokensArgs) { embed_tokens<bf16>(args); }
KERNEL(256, 4, embed_tokens_f16, TokensArgs) { embed_tokens<f16>(args); }
KERNEL(256, 4, select_rows_bf16, SelectArgs) { select_rows<bf16>(args); }
KERNEL(256, 4, select_rows_f16, SelectArgs) { select_rows<f16>(args); }
