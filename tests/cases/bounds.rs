//! How far a result may be from the exact one: bounds that follow from dtype and length.

use super::{Case, Results};
use tessera::op::Op;
use tessera::tensor::DType;

const EPS: f64 = f32::EPSILON as f64 / 2.0;

/// How far a result may be from the exact one, for an element whose exact value is `y` and whose sum of
/// absolute products is `mass` (see [`masses`]): so many roundings, each relative to the mass.
fn bound(case: &Case, device: DType, y: f64, mass: f64) -> f64 {
    let cols = case.ins[0].cols as f64;
    let roundings = match case.op {
        // A dot product of K terms, bias, activation (a few ulp), residual.
        // With pairs the sum is longer by their ranks; each product in it is of a sum of K terms, scaled.
        Op::Linear { .. } | Op::GatedLinear { .. } => {
            let ranks: usize = pairs(case).map(|(rank, _)| rank + 1).sum();
            case.weights[0][1] as f64 + ranks as f64 + 8.0
        }
        Op::PatchEmbed { .. } => case.weights[0][1] as f64 + 4.0,
        // Mean and variance of n terms, a square root, a division, two products.
        Op::LayerNorm { .. } | Op::RmsNorm { .. } | Op::AddRmsNorm { .. } | Op::L2Normalize => cols + 8.0,
        // Scores of E terms move p by a relative error of twice theirs; then n terms of p v.
        Op::Attention { head_dim, rows, .. } => 2.0 * head_dim as f64 + rows as f64 + 16.0,
        Op::PagedAttention { head_dim, .. } => {
            2.0 * head_dim as f64 + (case.past + case.bindings.tokens) as f64 + 16.0
        }
        Op::RopeAppend { .. } => 3.0,
        Op::EmbedTokens => 1.0,
        Op::EmbedRows | Op::SelectRows { .. } | Op::Sample => 0.0,
    };
    // Tensor cores cut the sums they keep in f32, where others round them: a whole unit, not half of one.
    let sums = if device == DType::F32 { 1.0 } else { 2.0 };
    sums * roundings * EPS * mass.max(y.abs()) + rounding_to(device, case, y, mass)
}

/// What it adds that a device keeps activations in 16 bits: the result is rounded once, and some ops round
/// what they multiply.
fn rounding_to(device: DType, case: &Case, y: f64, mass: f64) -> f64 {
    // Half a unit in the last place of a number near 1, and half the distance of the smallest numbers.
    let (unit, smallest) = match device {
        DType::F32 | DType::I32 => return 0.0,
        DType::F16 => (2f64.powi(-11), 2f64.powi(-25)),
        DType::BF16 => (2f64.powi(-8), 0.0),
    };
    let inner = match case.op {
        // Copies.
        Op::EmbedRows | Op::SelectRows { .. } | Op::Sample => return 0.0,
        // Pixels come in f32 and are multiplied in 16 bits.
        Op::PatchEmbed { .. } => mass,
        // The weights of a sum of values within 1.
        Op::Attention { .. } | Op::PagedAttention { .. } => 1.0,
        // The sum is rounded before it is normalised.
        Op::AddRmsNorm { .. } => 2.0 * y.abs(),
        // x Aᵀ of a pair is rounded, and so is scale · B.
        Op::Linear { wide, .. } => {
            let inner: f64 = pairs(case).map(|(_, mass)| 2.0 * mass).sum();
            return unit * (if wide { 0.0 } else { y.abs() } + inner) + smallest;
        }
        // The same of both factors, each of which meets the other; silu is nowhere steeper than 1.1.
        Op::GatedLinear { .. } => pairs(case).map(|(_, pair)| 2.2 * pair * mass.sqrt()).sum(),
        Op::LayerNorm { .. }
        | Op::RmsNorm { .. }
        | Op::L2Normalize
        | Op::RopeAppend { .. }
        | Op::EmbedTokens => 0.0,
    };
    unit * (y.abs() + inner) + smallest
}

/// For every element of the first result, the size of what was summed to make it. Inputs lie within 1.
fn masses(case: &Case, exact: &[f64]) -> Vec<f64> {
    match case.op {
        // A product of two sums: the error of one is multiplied by the other.
        Op::GatedLinear { .. } => {
            let pairs: f64 = pairs(case).map(|(_, mass)| mass).sum();
            vec![((case.weights[0][1] as f64 + 1.0) / 3.0 + pairs).powi(2); exact.len()]
        }
        Op::Linear { .. } | Op::PatchEmbed { .. } => {
            // |x| and |w| are 1/2 on average; 0.6 leaves room for chance in short sums.
            let pairs: f64 = pairs(case).map(|(_, mass)| mass).sum();
            vec![case.weights[0][1] as f64 * 0.6 * 0.6 + pairs + 3.0; exact.len()]
        }
        // Values lie within 1, and scores within sqrt(E).
        Op::Attention { head_dim, .. } | Op::PagedAttention { head_dim, .. } => {
            vec![(head_dim as f64).sqrt().max(1.0); exact.len()]
        }
        Op::LayerNorm { .. } => vec![4.0; exact.len()],
        Op::RmsNorm { .. } | Op::AddRmsNorm { .. } | Op::L2Normalize => vec![1.0; exact.len()],
        Op::RopeAppend { .. } => vec![2.0; exact.len()],
        Op::EmbedTokens => vec![2.0; exact.len()],
        Op::EmbedRows | Op::SelectRows { .. } | Op::Sample => vec![0.0; exact.len()],
    }
}

/// Of each low-rank pair its rank, and the size of what is summed to make its part of a result: r products of
/// a sum of K, all factors within 1 and 0.6 on average as above.
fn pairs(case: &Case) -> impl Iterator<Item = (usize, f64)> {
    let pairs = case.op.pairs();
    let own = case.weights.len() - 2 * pairs.len();
    pairs.iter().enumerate().map(move |(p, pair)| {
        let [rank, k] = case.weights[own + 2 * p];
        (rank, pair.scale.abs() as f64 * 0.6f64.powi(3) * (rank * k) as f64)
    })
}

/// The worst share of its bound that any element uses.
pub fn headroom(case: &Case, device: DType, ours: &Results, exact: &Results) -> f64 {
    assert_eq!(ours.len(), exact.len());
    let mut worst: f64 = 0.0;
    for (i, (ours, exact)) in ours.iter().zip(exact).enumerate() {
        assert_eq!(ours.len(), exact.len(), "{case}: result {i}");
        if case.op == Op::Sample {
            assert_eq!(ours, exact, "{case}");
            continue;
        }
        let float = |bits: &u32| f32::from_bits(*bits) as f64;
        let exact: Vec<f64> = exact.iter().map(float).collect();
        let masses = masses(case, &exact);
        for (at, ((ours, exact), mass)) in ours.iter().map(float).zip(exact).zip(masses).enumerate() {
            let error = (ours - exact).abs();
            // The oracle's own rounding to f32 comes on top.
            let bound = bound(case, device, exact, mass) + exact.abs() * EPS;
            assert!(
                error <= bound,
                "{case}: result {i} element {at} is {ours}, not {exact}: {error:e} > {bound:e}"
            );
            if bound > 0.0 {
                worst = worst.max(error / bound);
            }
        }
    }
    worst
}
