//! The table itself: ops and shapes.

use super::Case;
use tessera::op::{Activation, Op, PAGE, SAMPLE_PARAMS, Select};
use tessera::tensor::{Bindings, DType, Rows, TensorType};

fn f32s(rows: Rows, cols: usize) -> TensorType {
    TensorType::f32(rows, cols)
}

fn tokens(tokens: usize) -> Bindings {
    Bindings { tokens, outputs: tokens, images: 1, ..Bindings::default() }
}

fn case(op: Op, ins: Vec<TensorType>, weights: Vec<[usize; 2]>, bindings: Bindings) -> Case {
    Case { op, ins, weights, dtype: DType::F32, bindings, past: 0 }
}

/// `x · Wᵀ` with `n` output features for each weight.
pub fn linear(
    m: usize,
    ns: &[usize],
    k: usize,
    dtype: DType,
    act: Activation,
    bias: bool,
    residual: bool,
) -> Case {
    let mut weights: Vec<_> = ns.iter().map(|&n| [n, k]).collect();
    weights.extend(ns.iter().filter(|_| bias).map(|&n| [1, n]));
    let mut ins = vec![f32s(Rows::Tokens, k)];
    ins.extend(residual.then(|| f32s(Rows::Tokens, ns.iter().sum())));
    Case { dtype, ..case(Op::linear(act, bias, residual), ins, weights, tokens(m)) }
}

/// `silu(x · Wgᵀ) ⊙ (x · Wuᵀ)`.
pub fn gated(m: usize, n: usize, k: usize, dtype: DType, bias: bool) -> Case {
    let mut weights = vec![[n, k]; 2];
    weights.extend(vec![[1, n]; if bias { 2 } else { 0 }]);
    let op = Op::GatedLinear { bias, pairs: vec![] };
    Case { dtype, ..case(op, vec![f32s(Rows::Tokens, k)], weights, tokens(m)) }
}

/// Token rows and positions of `texts` texts of `rows` tokens.
pub fn embed_tokens(texts: usize, rows: usize, vocab: usize, cols: usize, dtype: DType) -> Case {
    let bindings = Bindings { images: texts, ..Bindings::default() };
    let ids = TensorType::i32(Rows::PerImage(rows), 1);
    Case { dtype, ..case(Op::EmbedTokens, vec![ids], vec![[vocab, cols], [rows, cols]], bindings) }
}

/// Images of side `image` in patches of side `patch`, to `width` features.
pub fn patch_embed(images: usize, image: usize, patch: usize, width: usize, dtype: DType) -> Case {
    let n = (image / patch) * (image / patch);
    let weights = vec![[width, 3 * patch * patch], [1, width], [n + 1, width]];
    let ins = vec![f32s(Rows::PerImage(1), 3 * image * image)];
    let bindings = Bindings { images, ..Bindings::default() };
    Case { dtype, ..case(Op::PatchEmbed { image, patch }, ins, weights, bindings) }
}

/// Attention within `images` images of `rows` rows.
pub fn attention(images: usize, rows: usize, heads: usize, head_dim: usize, causal: bool) -> Case {
    let ins = vec![f32s(Rows::PerImage(rows), 3 * heads * head_dim)];
    let bindings = Bindings { images, ..Bindings::default() };
    case(Op::Attention { heads, head_dim, rows, causal }, ins, vec![], bindings)
}

fn paged(past: usize, new: usize) -> Bindings {
    let entries = (past + new).div_ceil(PAGE);
    Bindings { pages: entries + 3, table_entries: entries, context: past + new, ..tokens(new) }
}

/// Causal attention of `new` rows after `past` cached ones.
pub fn paged_attention(past: usize, new: usize, heads: usize, kv_heads: usize, head_dim: usize) -> Case {
    let pages = f32s(Rows::Pages, kv_heads * head_dim * PAGE);
    let index = TensorType::i32(Rows::Tokens, 1);
    let ins = vec![
        f32s(Rows::Tokens, heads * head_dim),
        index,
        index,
        TensorType::i32(Rows::TableEntries, 1),
        pages,
        pages,
    ];
    let op = Op::PagedAttention { heads, kv_heads, head_dim };
    Case { past, ..case(op, ins, vec![], paged(past, new)) }
}

/// Rotation and append of `new` rows after `past` cached ones.
pub fn rope(past: usize, new: usize, heads: usize, kv_heads: usize, head_dim: usize) -> Case {
    let pages = f32s(Rows::Pages, kv_heads * head_dim * PAGE);
    let index = TensorType::i32(Rows::Tokens, 1);
    let qkv = f32s(Rows::Tokens, (heads + 2 * kv_heads) * head_dim);
    let ins = vec![qkv, index, index, f32s(Rows::Context, head_dim), pages, pages];
    let op = Op::RopeAppend { heads, kv_heads, head_dim };
    Case { past, ..case(op, ins, vec![], paged(past, new)) }
}

/// Cases for devices of tiles and pages: rows just below, on and above a tile, all head sizes, pages full, one
/// short and one over. N and K are small where they do not matter.
#[allow(dead_code, reason = "each test program uses a part")]
pub fn edges() -> Vec<Case> {
    let mut cases = Vec::new();
    let (f16, bf16) = (DType::F16, DType::BF16);
    for m in [1, 15, 16, 17, 63, 65, 130, 577, 641] {
        cases.push(linear(m, &[8], 24, f16, Activation::None, false, false));
        if m < 200 {
            cases.push(linear(m, &[72], 40, bf16, Activation::QuickGelu, true, true));
            cases.push(linear(m, &[40, 24, 24], 72, f16, Activation::GeluErf, true, false));
            cases.push(gated(m, 24, 136, bf16, false));
        }
    }
    for (n, k) in [(137, 264), (264, 80), (515, 72), (8, 4096), (1003, 16)] {
        cases.push(linear(18, &[n], k, bf16, Activation::None, true, true));
        cases.push(Case { op: WIDE, ..linear(3, &[n], k, f16, Activation::None, false, false) });
    }
    cases.push(gated(18, 136, 2048, f16, true));
    // Every size of a decode batch, with more of K than sixteen warps take at once.
    for m in [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17] {
        cases.push(linear(m, &[9, 8], 2056, bf16, Activation::None, m % 2 == 0, m % 3 == 0));
        cases.push(gated(m, 9, 2056, f16, m % 2 == 0));
    }
    cases.push(linear(3, &[9], 11008, bf16, Activation::None, false, false));
    // Rows wider than the threads of a block can hold come in vectors (8200) and in single elements (1030).
    for (rows, cols) in [(577, 8), (3, 1030), (2, 4096), (3, 5120), (2, 8200), (2, 11008)] {
        let norm = |op, ins: usize, weights: usize| {
            case(op, vec![f32s(Rows::Tokens, cols); ins], vec![[1, cols]; weights], tokens(rows))
        };
        cases.push(norm(Op::LayerNorm { eps: 1e-5 }, 1, 2));
        cases.push(norm(Op::RmsNorm { eps: 1e-6 }, 1, 1));
        cases.push(norm(Op::AddRmsNorm { eps: 1e-5 }, 2, 1));
        cases.push(norm(Op::L2Normalize, 1, 0));
    }
    // More columns than a block copies at once; operands side by side that leave each other unaligned.
    for cols in [[2056, 2056], [263, 300], [5, 8]] {
        let index = TensorType::i32(Rows::Tokens, 1);
        let ins = vec![index, index, f32s(Rows::Tokens, cols[0])];
        cases.push(case(Op::EmbedRows, ins, vec![[11, cols[0]]], tokens(6)));
        let ins = cols.map(|cols| f32s(Rows::PerImage(4), cols)).to_vec();
        for select in [Select::All, Select::Patches { rows: 4 }] {
            cases.push(case(
                Op::SelectRows { select },
                ins.clone(),
                vec![],
                Bindings { images: 2, ..tokens(0) },
            ));
        }
    }
    for head_dim in (8..=128).step_by(8) {
        cases.push(attention(1, 17, 2, head_dim, false));
        cases.push(attention(1, 19, 1, head_dim, true));
        cases.push(paged_attention(15, 2, 2, 1, head_dim));
        cases.push(rope(15, 2, 2, 1, head_dim));
    }
    for rows in [15, 16, 63, 64, 65, 129, 577, 641] {
        cases.push(attention(if rows > 100 { 1 } else { 2 }, rows, 1, 64, rows % 2 == 0));
    }
    for end in [31, 32, 33, 64, 65, 127, 128, 129, 300] {
        for new in [1, 17, 31] {
            cases.push(paged_attention(end - new, new, 4, 2, 32));
        }
    }
    cases.push(paged_attention(0, 577, 1, 1, 16));
    cases.push(paged_attention(1030, 2, 2, 2, 64));
    // More query heads than one block of decode serves.
    cases.push(paged_attention(140, 3, 20, 1, 40));
    cases.push(rope(250, 65, 3, 1, 64));
    // 576 patches, one more than a tile's multiple with the class row.
    cases.push(patch_embed(2, 48, 2, 24, DType::F32));
    for (rows, cols) in [(2, 1003usize), (1, 32064), (1, 50257)] {
        let params = TensorType::i32(Rows::Outputs, SAMPLE_PARAMS);
        let seen = TensorType::i32(Rows::Outputs, cols.div_ceil(32));
        cases.push(case(Op::Sample, vec![f32s(Rows::Outputs, cols), params, seen], vec![], tokens(rows)));
    }
    cases
}

/// Logits: f32 on every device.
const WIDE: Op =
    Op::Linear { act: Activation::None, bias: false, residual: false, wide: true, pairs: Vec::new() };

/// Every case of the tests: rows 1 to a few, odd and prime, tails of every kind.
pub fn all() -> Vec<Case> {
    let mut cases = Vec::new();
    let dtypes = [DType::F32, DType::F16, DType::BF16];
    for dtype in dtypes {
        for m in [1, 2, 3, 4, 5, 13, 25, 34] {
            for (n, k) in [(1, 1), (7, 5), (16, 16), (17, 33), (31, 64), (33, 255), (64, 257), (48, 600)] {
                cases.push(linear(m, &[n], k, dtype, Activation::None, false, false));
            }
            cases.push(linear(m, &[48, 16, 19], 40, dtype, Activation::None, true, false));
            cases.push(linear(m, &[37], 70, dtype, Activation::QuickGelu, true, false));
            cases.push(linear(m, &[37], 70, dtype, Activation::GeluErf, true, true));
            cases.push(linear(m, &[20], 300, dtype, Activation::None, false, true));
            cases.push(gated(m, 21, 77, dtype, false));
            cases.push(gated(m, 40, 64, dtype, true));
        }
    }
    for dtype in dtypes {
        cases.push(embed_tokens(1, 5, 9, 17, dtype));
        cases.push(embed_tokens(3, 7, 50, 64, dtype));
    }
    // One case with the reduction length of a real model's widest layer.
    cases.push(linear(6, &[20], 11008, DType::F16, Activation::None, false, false));

    for (rows, cols) in [(1, 1), (3, 15), (2, 16), (5, 17), (4, 100), (7, 1024)] {
        let x = f32s(Rows::Tokens, cols);
        for dtype in dtypes {
            let norm = |op, ins: usize, weights: usize| Case {
                dtype,
                ..case(op, vec![x; ins], vec![[1, cols]; weights], tokens(rows))
            };
            cases.push(norm(Op::LayerNorm { eps: 1e-5 }, 1, 2));
            cases.push(norm(Op::RmsNorm { eps: 1e-6 }, 1, 1));
            cases.push(norm(Op::AddRmsNorm { eps: 1e-5 }, 2, 1));
        }
        cases.push(case(Op::L2Normalize, vec![x], vec![], tokens(rows)));
    }
    for (images, rows, heads, head_dim, causal) in [
        (1, 1, 1, 8, false),
        (2, 17, 3, 24, false),
        (1, 65, 2, 64, false),
        (2, 50, 2, 80, true),
        (1, 130, 1, 128, true),
        (3, 16, 2, 40, true),
    ] {
        cases.push(attention(images, rows, heads, head_dim, causal));
    }
    for (past, new, heads, kv_heads, head_dim) in [
        (0, 1, 1, 1, 8),
        (15, 1, 4, 4, 64),
        (16, 1, 4, 2, 64),
        (17, 1, 6, 2, 40),
        (0, 33, 4, 1, 24),
        (70, 29, 4, 2, 128),
        (200, 1, 8, 2, 80),
        (63, 65, 3, 3, 32),
    ] {
        cases.push(paged_attention(past, new, heads, kv_heads, head_dim));
        cases.push(rope(past, new, heads, kv_heads, head_dim));
    }
    for (image, patch, width, images) in [(28, 14, 32, 1), (21, 7, 17, 3), (32, 16, 48, 2), (30, 10, 5, 1)] {
        cases.extend(dtypes.map(|dtype| patch_embed(images, image, patch, width, dtype)));
    }
    for (rows, cols) in [(1, 8), (5, 19), (12, 64)] {
        let index = TensorType::i32(Rows::Tokens, 1);
        for dtype in dtypes {
            // A language model's table and as many image rows as tokens; a newline and the rows of tiles.
            for (table, image_rows) in [(23, Rows::Tokens), (1, Rows::Fixed(31))] {
                let ins = vec![index, index, f32s(image_rows, cols)];
                cases.push(Case { dtype, ..case(Op::EmbedRows, ins, vec![[table, cols]], tokens(rows)) });
            }
        }
        let select = |select| Op::SelectRows { select };
        let ins = vec![f32s(Rows::Tokens, cols), TensorType::i32(Rows::Outputs, 1)];
        cases.push(case(select(Select::Index), ins, vec![], Bindings { outputs: 3, ..tokens(rows) }));
        let images = |images| Bindings { images, ..Bindings::default() };
        let ins = vec![f32s(Rows::PerImage(10), cols), f32s(Rows::PerImage(10), cols)];
        cases.push(case(select(Select::All), ins.clone(), vec![], images(2)));
        cases.push(case(select(Select::Patches { rows: 10 }), ins, vec![], images(3)));
        let (params, seen) = (
            TensorType::i32(Rows::Outputs, SAMPLE_PARAMS),
            TensorType::i32(Rows::Outputs, cols.div_ceil(32)),
        );
        let logits = f32s(Rows::Outputs, cols);
        cases.push(case(Op::Sample, vec![logits, params, seen], vec![], tokens(rows)));
    }
    cases
}
