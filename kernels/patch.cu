// PatchEmbed: images to rows of patches, a convolution whose stride is its kernel, as a matrix product that gathers its
// rows from the pixels on their way to shared memory.
//
//   pixels     f32 [images, 3, S, S]     W  T [D, ldw], columns (channel, y, x) of a patch
//   class      f32 [D]                   positions  f32 [N + 1, D], N = (S / P)^2
//   y          T [images * (N + 1), D]: row 0 of an image is class + position 0, row 1 + i is patch i · Wᵀ plus
//              position 1 + i. Row 0 is multiplied too, as zeros: one row in 577, for one kind of row.
//   grid, block, reduction order: gemm.cuh
//
// Floor: 2 M D 3 P P FLOP: 0.9 us of an H200 at 790 TFLOP/s for ViT-L/14 at 336 pixels, 0.2 % of its encoder. So one
// tile shape does.
#include "gemm.cuh"

struct PatchArgs {
    GemmArgs gemm;
    const float* pixels;
    const float* class_row;
    const float* positions;
    void* y;
    uint32_t image, patch;  // S, P
    uint32_t across;        // patches side by side, S / P
    uint32_t unused;
};
static_assert(sizeof(PatchArgs) == 96, "as in backend/cuda/patch.rs");

template <class T> struct Patches {
    static constexpr bool ASYNC = false;
    const PatchArgs& args;

    // Columns k .. k+8 of a patch, which may run over several of its lines and channels.
    DEVICE Vec16 gather(uint32_t row, uint32_t k) const {
        const uint32_t side = args.image, patch = args.patch, per_image = args.across * args.across + 1;
        const uint32_t image = row / per_image, number = row % per_image;
        Vec16 v = {};
        if (!mask(row < args.gemm.rows) || number == 0) return v;
        const uint32_t top = (number - 1) / args.across * patch, left = (number - 1) % args.across * patch;
        uint32_t line = k / patch, x = k % patch;  // line counts over the channels
        const int64_t channel = image * 3 + line / patch;
        const float* from = args.pixels + (channel * side + top + line % patch) * side + left;
        float pixel[8];
#pragma unroll
        for (int e = 0; e < 8; e++) {
            pixel[e] = mask(k + e < args.gemm.depth) ? from[x] : 0.0f;
            if (++x == patch) {
                x = 0;
                from += ++line % patch == 0 ? (int64_t)(side - patch + 1) * side : side;
            }
        }
#pragma unroll
        for (int i = 0; i < 4; i++) v.word[i] = pack2<T>(pixel[2 * i], pixel[2 * i + 1]);
        return v;
    }
};

// sum + position + class row, in whole fours of columns or not.
template <class T, bool whole> struct PatchOutput {
    const PatchArgs& args;

    // The position's four columns, with the class row's in row 0.
    struct Beside {
        float add[4];
    };
    DEVICE Beside beside(uint32_t row, uint32_t col) const {
        Beside b = {};
        const int left = columns_left(args.gemm, row, col);
        if (!mask(left > 0)) return b;
        const uint32_t cols = args.gemm.cols, number = row % (args.across * args.across + 1);
        load4<whole>(b.add, args.positions + (int64_t)number * cols + col, left);
        if (number > 0) return b;
        float first[4];
        load4<whole>(first, args.class_row + col, left);
        for (int e = 0; e < 4; e++) b.add[e] += first[e];
        return b;
    }
    DEVICE void write(uint32_t row, uint32_t col, float (&y)[4], const Beside& b) const {
        const int left = columns_left(args.gemm, row, col);
        if (!mask(left > 0)) return;
        for (int e = 0; e < 4; e++) y[e] += b.add[e];
        store4<whole>((T*)args.y + (int64_t)row * args.gemm.cols + col, y, left);
    }
};

template <class T, class Tile> DEVICE void patch_embed(const PatchArgs& args) {
    gemm<T, Tile>(args.gemm, Patches<T>{args}, [&](Sums<Tile>& c, Place first) {
        if (args.gemm.cols % 4 == 0) write<Tile>(c, PatchOutput<T, true>{args}, first);
        else write<Tile>(c, PatchOutput<T, false>{args}, first);
    });
}

KERNEL(128, 2, patch_embed_64x96_bf16, PatchArgs) { patch_embed<bf16, Tile<64, 96, 64, 4, 2, 2>>(args); }
KERNEL(128, 2, patch_embed_64x96_f16, PatchArgs) { patch_embed<f16, Tile<64, 96, 64, 4, 2, 2>>(args); }
