//! The op case table on CUDA devices: the emulated one (feature `emu`), which also finds races, reads of what
//! was never written and accesses outside a buffer, and a GPU where there is one. Results are held to the oracle
//! in f64, to the same bits in any company of rows, and to the same bits under any order of execution.
//!
//! One family of ops: `cargo test --features emu --test cuda -- linear`.

mod cases;
mod devices;
mod oracle;

use cases::bounds::headroom;
use cases::{Case, Results};
use devices::{Tested, devices};
use oracle::Oracle;
use std::sync::Arc;
use tessera::backend::Backend;
use tessera::op::Op;
use tessera::tensor::{DType, Rows, View};

/// The cases of an op, with its rows in both phases where kernels differ.
fn cases_of(name: &str) -> Vec<Case> {
    let table = cases::all().into_iter().chain(cases::edges()).chain(cases::pairs());
    table.filter(|case| case.op.name() == name).flat_map(in_phases).collect()
}

fn in_phases(case: Case) -> Vec<Case> {
    let phases = matches!(case.op, Op::Linear { .. } | Op::GatedLinear { .. } | Op::PagedAttention { .. });
    let rows = case.bindings.tokens;
    let mut decodes = vec![0];
    if phases && rows <= 65 {
        decodes.extend([rows, rows / 2].into_iter().filter(|&decode| decode > 0));
        decodes.dedup();
    }
    let with = |decode| {
        let mut case = case.clone();
        (case.bindings.decode, case.bindings.decode_outputs) = (decode, decode);
        case
    };
    decodes.into_iter().map(with).collect()
}

/// All that is asked of an op.
fn check(name: &str) {
    let cases = cases_of(name);
    assert!(!cases.is_empty(), "no case of {name}");
    for Tested { backend, reseed } in devices() {
        let mut worst: f64 = 0.0;
        for case in &cases {
            for seed in 0..3 {
                reseed(seed);
                let data = case.data(seed, backend.dtype());
                let exact = case.run(Arc::new(Oracle), &data);
                let ours = case.run(backend.clone(), &data);
                worst = worst.max(headroom(case, backend.dtype(), &ours, &exact));
                if seed == 0 {
                    reseed(77);
                    assert_eq!(case.run(backend.clone(), &data), ours, "{case}: another order of execution");
                    rows_alone(case, &backend, &ours);
                }
            }
        }
        let device = backend.describe();
        println!("{name}: {} cases on {device}, {:.0} % of the bound at worst", cases.len(), 100.0 * worst);
    }
}

/// A row alone has the bits it has among others of its phase.
fn rows_alone(case: &Case, backend: &Arc<dyn Backend>, whole: &Results) {
    let per_row = case.ins.iter().all(|ty| matches!(ty.rows, Rows::Tokens));
    if !per_row || case.op == Op::EmbedRows || case.bindings.tokens < 2 {
        return;
    }
    let tokens = case.bindings.tokens;
    for row in [0, tokens / 2, tokens - 1] {
        let mut one = case.clone();
        one.bindings.tokens = 1;
        one.bindings.decode = (row < case.bindings.decode) as usize;
        let mut data = case.data(0, backend.dtype());
        for (words, ty) in data.ins.iter_mut().zip(&case.ins) {
            *words = words[row * ty.cols..(row + 1) * ty.cols].to_vec();
        }
        for (alone, all) in one.run(backend.clone(), &data).iter().zip(whole) {
            assert_eq!(alone[..], all[row * alone.len()..(row + 1) * alone.len()], "{case}: row {row} alone");
        }
    }
}

/// A number that is not finite is found wherever it stands, and no other is taken for one.
#[test]
fn what_is_not_finite_is_found() {
    for Tested { backend, .. } in devices() {
        let dtype = backend.dtype();
        for len in [1, 7, 8, 1001, 70_000] {
            let buffer = backend.alloc("numbers", len * 2).unwrap();
            let view = View { addr: buffer.addr, rows: 1, cols: len, dtype };
            let largest = if dtype == DType::F16 { 65504.0 } else { 3.3e38 };
            let numbers: Vec<f32> = (0..len).map(|i| [0.0, largest, -largest, 1e-30][i % 4]).collect();
            let finite = |numbers: &[f32]| {
                let mut bytes = vec![0; len * 2];
                dtype.round_to(numbers, &mut bytes);
                // SAFETY: the whole of a buffer of ours.
                unsafe {
                    backend.upload(view.addr, &bytes).unwrap();
                    backend.finite(&view).unwrap()
                }
            };
            assert!(finite(&numbers), "{len} numbers");
            for at in [0, len / 3, len - 1] {
                for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    let mut numbers = numbers.clone();
                    numbers[at] = bad;
                    assert!(!finite(&numbers), "{bad} at {at} of {len}");
                }
            }
        }
    }
}

macro_rules! ops {
    ($($test:ident $op:literal;)*) => {
        const OPS: &[&str] = &[$($op),*];
        $(
            #[test]
            fn $test() {
                check($op);
            }
        )*
    };
}

ops! {
    patch_embed "PatchEmbed";
    layer_norm "LayerNorm";
    rms_norm "RmsNorm";
    add_rms_norm "AddRmsNorm";
    linear "Linear";
    gated_linear "GatedLinear";
    attention "Attention";
    rope_append "RopeAppend";
    paged_attention "PagedAttention";
    embed_rows "EmbedRows";
    embed_tokens "EmbedTokens";
    select_rows "SelectRows";
    sample "Sample";
    l2_normalize "L2Normalize";
}

/// Every case of moderate size once and unjudged, for tools that watch a GPU and make it a hundred times slower:
/// `compute-sanitizer cuda --ignored`.
#[test]
#[ignore = "for compute-sanitizer"]
fn every_kernel_once_needs_gpu() {
    const ELEMENTS: usize = 1 << 16;
    for Tested { backend, .. } in devices() {
        let mut count = 0;
        for case in OPS.iter().flat_map(|op| cases_of(op)) {
            let data = case.data(0, backend.dtype());
            let weights = data.weights.iter().map(|weight| weight.rows * weight.cols);
            if data.ins.iter().map(Vec::len).chain(weights).sum::<usize>() <= ELEMENTS {
                case.run(backend.clone(), &data);
                count += 1;
            }
        }
        println!("{count} cases on {}", backend.describe());
    }
}
