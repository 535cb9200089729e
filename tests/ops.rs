//! Every op of the case table on the CPU backend: against the oracle, within bounds that follow from
//! dtype and length; and bit for bit between instruction sets, thread counts and row splits.

mod cases;
mod oracle;

use cases::Results;
use cases::bounds::headroom;
use oracle::Oracle;
use std::collections::BTreeMap;
use std::sync::Arc;
use tessera::backend::Backend;
use tessera::backend::cpu::CpuBackend;
use tessera::backend::cpu::lanes::Isa;
use tessera::op::Op;
use tessera::tensor::{DType, Rows};

fn cpu(isa: Isa, threads: usize) -> Arc<dyn Backend> {
    Arc::new(CpuBackend::with_isa(isa, threads).unwrap())
}

#[test]
fn every_op_agrees_with_the_oracle_on_every_instruction_set() {
    let mut worst: BTreeMap<&str, f64> = BTreeMap::new();
    for case in cases::all().into_iter().chain(cases::pairs()) {
        for seed in 0..3 {
            let data = case.data(seed, DType::F32);
            let exact = case.run(Arc::new(Oracle), &data);
            let mut first: Option<Results> = None;
            for isa in Isa::available() {
                let ours = case.run(cpu(isa, 2), &data);
                let used = headroom(&case, DType::F32, &ours, &exact);
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
    for case in cases::all().into_iter().chain(cases::pairs()) {
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
    assert!(std::panic::catch_unwind(|| headroom(&case, DType::F32, &wrong, &exact)).is_err());
}
