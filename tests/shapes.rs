//! Shape rules and costs of ops: what is refused says what was expected, and costs are those that one
//! computes by hand.

use tessera::op::{Activation, Cost, KvExtent, Op, PAGE, Pair, Select, WeightType};
use tessera::tensor::{DType, Rows, TensorType, View};

fn f32s(rows: Rows, cols: usize) -> TensorType {
    TensorType::f32(rows, cols)
}

fn weight(rows: usize, cols: usize) -> WeightType {
    WeightType { rows, cols, dtype: DType::F16 }
}

fn view(rows: usize, cols: usize) -> View {
    View { addr: 0, rows, cols, dtype: DType::F32 }
}

const LINEAR: Op =
    Op::Linear { act: Activation::None, bias: false, residual: false, wide: false, pairs: Vec::new() };

/// A linear op with a pair beside each of these matrices.
fn adapted(matrices: &[usize]) -> Op {
    let pairs = matrices.iter().map(|&matrix| Pair { matrix, scale: 1.0 }).collect();
    Op::Linear { act: Activation::None, bias: false, residual: false, wide: false, pairs }
}

/// The same for a gated one.
fn gated(matrices: &[usize]) -> Op {
    let pairs = matrices.iter().map(|&matrix| Pair { matrix, scale: 1.0 }).collect();
    Op::GatedLinear { bias: false, pairs }
}

/// A and B of rank 4 beside `[n, 64]`.
fn pair(n: usize) -> Vec<WeightType> {
    vec![weight(4, 64), weight(n, 4)]
}

#[test]
fn operands_that_do_not_fit_are_refused_in_words() {
    let x = f32s(Rows::Tokens, 64);
    let index = TensorType::i32(Rows::Tokens, 1);
    let heads = |head_dim| Op::Attention { heads: 2, head_dim, rows: 10, causal: false };
    let qkv = |rows, head_dim: usize| f32s(rows, 6 * head_dim);
    let paged = Op::PagedAttention { heads: 3, kv_heads: 2, head_dim: 32 };
    let pages = f32s(Rows::Pages, 2 * 32 * PAGE);
    let table = TensorType::i32(Rows::TableEntries, 1);
    let cases: Vec<(Op, Vec<TensorType>, Vec<WeightType>, &str)> = vec![
        (LINEAR, vec![x], vec![weight(8, 32)], "weight 0 [8, 64]"),
        (LINEAR, vec![x], vec![], "at least one matrix"),
        (LINEAR, vec![x, x], vec![weight(8, 64)], "1 operands"),
        (gated(&[]), vec![x], vec![weight(8, 64), weight(9, 64)], "weight 1 [8, 64]"),
        // Pairs: A and B of each follow the matrices, in the order of the matrices.
        (adapted(&[0]), vec![x], vec![weight(8, 64), weight(4, 60), weight(8, 4)], "weight 1 [4, 64]"),
        (adapted(&[0]), vec![x], vec![weight(8, 64), weight(4, 64), weight(9, 4)], "weight 2 [8, 4]"),
        (adapted(&[0]), vec![x], vec![weight(8, 64), weight(4, 64), weight(8, 5)], "weight 2 [8, 4]"),
        (adapted(&[0]), vec![x], vec![weight(8, 64), weight(0, 64), weight(8, 0)], "rank of at least 1"),
        (adapted(&[0]), vec![x], vec![weight(4, 64), weight(8, 4)], "at least one matrix"),
        (adapted(&[1]), vec![x], vec![weight(8, 64), weight(4, 64), weight(8, 4)], "order of 1 matrices"),
        (gated(&[1, 0]), vec![x], [vec![weight(8, 64); 2], pair(8), pair(8)].concat(), "order of 2 matrices"),
        (
            adapted(&[0; 25]),
            vec![x],
            [vec![weight(8, 64)], vec![pair(8); 25].concat()].concat(),
            "at most 24",
        ),
        (Op::EmbedTokens, vec![x], vec![weight(9, 64), weight(5, 64)], "operand 0 [5/image, 1]"),
        (
            Op::EmbedTokens,
            vec![TensorType::i32(Rows::PerImage(5), 1)],
            vec![weight(9, 64), weight(5, 63)],
            "weight 1 [5, 64]",
        ),
        (Op::RmsNorm { eps: 1e-5 }, vec![x], vec![weight(1, 63)], "weight 0 [1, 64]"),
        (
            Op::AddRmsNorm { eps: 1e-5 },
            vec![x, f32s(Rows::Outputs, 64)],
            vec![weight(1, 64)],
            "operand 1 [T, 64]",
        ),
        (heads(12), vec![qkv(Rows::PerImage(10), 12)], vec![], "multiple of 8"),
        (heads(136), vec![qkv(Rows::PerImage(10), 136)], vec![], "up to 128"),
        (heads(16), vec![qkv(Rows::PerImage(11), 16)], vec![], "10 rows an image"),
        (
            paged,
            vec![f32s(Rows::Tokens, 96), index, index, table, pages, pages],
            vec![],
            "multiple of the key heads",
        ),
        (Op::EmbedRows, vec![x, index, x], vec![weight(9, 64)], "operand 0"),
        (Op::SelectRows { select: Select::Patches { rows: 5 } }, vec![x], vec![], "5/image"),
        (
            Op::PatchEmbed { image: 28, patch: 0 },
            vec![x],
            vec![weight(1, 1); 3],
            "at least as large as a patch",
        ),
    ];
    for (op, ins, weights, expected) in cases {
        let error = op.infer("a.node", DType::F32, &ins, &weights).unwrap_err().to_string();
        for word in [expected, "a.node", op.name(), "found"] {
            assert!(error.contains(word), "{op:?} does not mention {word}: {error}");
        }
    }
}

/// The figures of LLaVA-1.5-7B: one block of the tower over 577 rows is 2 * 577 * 12 * 1024^2 for its
/// products and 4 * 577^2 * 1024 for its attention; a decode step reads every weight once.
#[test]
fn costs_are_those_computed_by_hand() {
    let none = KvExtent::default();
    let linear = |m, n, k| LINEAR.cost(&[view(m, k)], &[weight(n, k)], &[view(m, n)], none);
    let qkv = linear(577, 3 * 1024, 1024).flops;
    let products = qkv + linear(577, 1024, 1024).flops + 2 * linear(577, 4096, 1024).flops;
    assert_eq!(products, 2 * 577 * 12 * 1024 * 1024);
    let attention = Op::Attention { heads: 16, head_dim: 64, rows: 577, causal: false };
    let cost = attention.cost(&[view(577, 3072)], &[], &[view(577, 1024)], none);
    assert_eq!(cost.flops, 4 * 577 * 577 * 1024);

    let decode = linear(1, 4096, 4096);
    assert_eq!(decode, Cost { flops: 33_554_432, bytes: 33_554_432 + 2 * 4096 * 4, stored: 33_554_432 });
    // The head of a chunk whose logits nobody wants.
    assert_eq!(linear(0, 32064, 4096), Cost::default());

    // A pair of rank 128 on 4096 x 4096 is a sixteenth more.
    let weights = [weight(4096, 4096), weight(128, 4096), weight(4096, 128)];
    let with_pair = adapted(&[0]).cost(&[view(1, 4096)], &weights, &[view(1, 4096)], none);
    let more = 2 * 2 * 128 * 4096;
    let expected =
        Cost { flops: decode.flops + more, bytes: decode.bytes + more, stored: decode.stored + more };
    assert_eq!(with_pair, expected);

    // 640 rows see 640 * 641 / 2 keys in all; one row at context 1024 reads 1025 positions of K and V.
    let paged = Op::PagedAttention { heads: 32, kv_heads: 32, head_dim: 128 };
    let ins = [view(640, 4096), view(0, 0), view(0, 0), view(0, 0), view(0, 0), view(0, 0)];
    let cost = paged.cost(&ins, &[], &[view(640, 4096)], KvExtent::of(0, 640));
    assert_eq!(cost.flops, 4 * 4096 * 640 * 641 / 2);
    let ins = [view(1, 4096), view(0, 0), view(0, 0), view(0, 0), view(0, 0), view(0, 0)];
    let cost = paged.cost(&ins, &[], &[view(1, 4096)], KvExtent::of(1024, 1));
    assert_eq!((cost.stored, cost.bytes - cost.stored), (2 * 1025 * 4096 * 4, 2 * 4096 * 4));

    // The class row of an image is copied, not multiplied: 576 patches of 588 pixels.
    let patches = Op::PatchEmbed { image: 336, patch: 14 };
    let weights = [weight(1024, 588), weight(1, 1024), weight(577, 1024)];
    let cost = patches.cost(&[view(1, 3 * 336 * 336)], &weights, &[view(577, 1024)], none);
    assert_eq!(cost.flops, 2 * 576 * 588 * 1024);
}
