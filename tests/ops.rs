//! Every op of the case table on the CPU backend: against the oracle, within bounds that follow from
//! dtype and length; and bit for bit between instruction sets, thread counts and row splits.

mod cases;
mod oracle;

use cases::{Case, Results};
use oracle::Oracle;
use std::collections::BTreeMap;
use std::sync::Arc;
use tessera::backend::Backend;
use tessera::backend::cpu::CpuBackend;
use tessera::backend::cpu::lanes::Isa;
use tessera::op::Op;
use tessera::tensor::{DType, Rows};

const EPS: f64 = f32::EPSILON as f64 / 2.0;

fn cpu(isa: Isa, threads: usize) -> Arc<dyn Backend> {
    Arc::new(CpuBackend::with_isa(isa, threads).unwrap())
}

/// How far a result may be from the exact one, for an element whose exact value is `y` and whose sum of
/// absolute products is `mass` (see [`masses`]): so many roundings, each relative to the mass.
fn bound(case: &Case, y: f64, mass: f64) -> f64 {
    let cols = case.ins[0].cols as f64;
    let roundings = match case.op {
        // A dot product of K terms, bias, activation (a few ulp), residual.
        Op::Linear { .. } | Op::GatedLinear { .. } => case.weights[0][1] as f64 + 8.0,
        Op::PatchEmbed { .. } => case.weights[0][1] as f64 + 4.0,
        // Mean and variance of n terms, a square root, a division, two products.
        Op::LayerNorm { .. } | Op::RmsNorm { .. } | Op::AddRmsNorm { .. } | Op::L2Normalize => cols + 8.0,
        // Scores of E terms move p by a relative error of twice theirs; then n terms of p v.
        Op::Attention { head_dim, rows, .. } => 2.0 * head_dim as f64 + rows as f64 + 16.0,
        Op::PagedAttention { head_dim, .. } => {
            2.0 * head_dim as f64 + (case.past + case.bindings.tokens) as f64 + 16.0
        }
        Op::RopeAppend { .. } => 3.0,
        Op::EmbedRows | Op::SelectRows { .. } | Op::Sample => 0.0,
    };
    roundings * EPS * mass.max(y.abs())
}

/// For every element of the first result, the size of what was summed to make it. Inputs lie within 1.
fn masses(case: &Case, exact: &[f64]) -> Vec<f64> {
    match case.op {
        // A product of two sums: the error of one is multiplied by the other.
        Op::GatedLinear { .. } => vec![(case.weights[0][1] as f64 + 1.0).powi(2) / 9.0; exact.len()],
        Op::Linear { .. } | Op::PatchEmbed { .. } => {
            // |x| and |w| are 1/2 on average; 0.6 leaves room for chance in short sums.
            vec![case.weights[0][1] as f64 * 0.6 * 0.6 + 3.0; exact.len()]
        }
        // Values lie within 1, and scores within sqrt(E).
        Op::Attention { head_dim, .. } | Op::PagedAttention { head_dim, .. } => {
            vec![(head_dim as f64).sqrt().max(1.0); exact.len()]
        }
        Op::LayerNorm { .. } => vec![4.0; exact.len()],
        Op::RmsNorm { .. } | Op::AddRmsNorm { .. } | Op::L2Normalize => vec![1.0; exact.len()],
        Op::RopeAppend { .. } => vec![2.0; exact.len()],
        Op::EmbedRows | Op::SelectRows { .. } | Op::Sample => vec![0.0; exact.len()],
    }
}

/// The worst share of its bound that any element uses.
fn headroom(case: &Case, ours: &Results, exact: &Results) -> f64 {
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
            let bound = bound(case, exact, mass) + exact.abs() * EPS;
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

#[test]
fn every_op_agrees_with_the_oracle_on_every_instruction_set() {
    let mut worst: BTreeMap<&str, f64> = BTreeMap::new();
    for case in cases::all() {
        for seed in 0..3 {
            let data = case.data(seed, DType::F32);
            let exact = case.run(Arc::new(Oracle), &data);
            let mut first: Option<Results> = None;
            for isa in Isa::available() {
                let ours = case.run(cpu(isa, 2), &data);
                let used = headroom(&case, &ours, &exact);
                let entry = worst.entry(case.op.name()).or_default();
                *entry = entry.max(used);
                match &first {
                    None => first = Some(ours),
                    Some(first) => assert_eq!(first, &ours, "{case}: bits differ on {}", isa.name()),
                }
            }
        }
    }
    for (op, used) in worst {
        println!("{op:<16} uses {:5.1} % of its bound at worst", 100.0 * used);
    }
}

/// All rows of a case at once, and each alone, give the same bits; on any number of threads.
#[test]
fn rows_do_not_know_one_another() {
    for case in cases::all() {
        let data = case.data(5, DType::F32);
        let isa = Isa::detect();
        let whole = case.run(cpu(isa, 1), &data);
        for threads in [2, 3] {
            assert_eq!(case.run(cpu(isa, threads), &data), whole, "{case}: {threads} threads");
        }
        let per_row = case.ins.iter().all(|ty| matches!(ty.rows, Rows::Tokens));
        if !per_row || case.op == Op::EmbedRows || case.bindings.tokens < 2 {
            continue;
        }
        for row in 0..case.bindings.tokens {
            let mut one = case.clone();
            one.bindings.tokens = 1;
            let mut data = case.data(5, DType::F32);
            for (words, ty) in data.ins.iter_mut().zip(&case.ins) {
                *words = words[row * ty.cols..(row + 1) * ty.cols].to_vec();
            }
            for (alone, all) in one.run(cpu(isa, 2), &data).iter().zip(&whole) {
                assert_eq!(alone[..], all[row * alone.len()..(row + 1) * alone.len()], "{case}: row {row}");
            }
        }
    }
}

/// The bounds bite: a result that is off by what one lost term of a sum would be is found.
#[test]
fn a_planted_error_is_found() {
    let case = cases::linear(3, &[17], 64, DType::F32, tessera::op::Activation::None, false, false);
    let data = case.data(1, DType::F32);
    let exact = case.run(Arc::new(Oracle), &data);
    let mut wrong = exact.clone();
    let y = f32::from_bits(wrong[0][20]);
    wrong[0][20] = (y + 1e-3).to_bits();
    assert!(std::panic::catch_unwind(|| headroom(&case, &wrong, &exact)).is_err());
}
