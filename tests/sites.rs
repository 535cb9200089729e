//! No barrier, wait, ticket or bounds check of the kernels is there for nothing: with any one of them switched off,
//! the emulated device finds a fault, or the result changes. Every operand lies in memory of its own here, so that
//! what is read or written outside is found.

#![cfg(feature = "emu")]

mod cases;

use cases::{Case, Data, Results, gated, linear, patch_embed};
use std::collections::BTreeSet;
use std::sync::Arc;
use tessera::Result;
use tessera::backend::cuda::CudaBackend;
use tessera::backend::cuda::emu::{Emulator, sites};
use tessera::backend::{Backend, Buffer, Call};
use tessera::op::{Activation, Op};
use tessera::tensor::{DType, TensorType, View};

/// Orders of execution that a fault may hide in.
const SEEDS: u64 = 6;

/// Runs a case on a fresh device, with a site switched off.
fn run(case: &Case, data: &Data, seed: u64, off: Option<usize>) -> Result<Results> {
    let emulator = Emulator::new(seed, Emulator::LIMITS)?;
    emulator.switch_off(off);
    let backend = CudaBackend::new(Arc::new(emulator), DType::BF16)?;
    let place = |rows, cols, dtype: DType| -> Result<(View, Buffer)> {
        let buffer = backend.alloc("operand", rows * cols * dtype.size())?;
        Ok((View { addr: buffer.addr, rows, cols, dtype }, buffer))
    };
    let mut buffers = Vec::new();
    let mut ins = Vec::new();
    for (i, (ty, words)) in case.ins.iter().zip(&data.ins).enumerate() {
        let dtype = case.dtype_on(i, backend.dtype());
        let (view, buffer) = place(ty.rows.bind(&case.bindings), ty.cols, dtype)?;
        let values: Vec<f32> = words.iter().map(|word| f32::from_bits(*word)).collect();
        let mut bytes = vec![0; view.bytes()];
        dtype.round_to(&values, &mut bytes);
        // SAFETY: the whole of a buffer that was just allocated.
        unsafe { backend.upload(view.addr, &bytes)? };
        ins.push(view);
        buffers.push(buffer);
    }
    let weights = backend.prepare(&case.op, &data.weights)?;
    let types: Vec<_> = weights.iter().map(|weight| weight.ty).collect();
    let typed =
        |(i, ty): (usize, &TensorType)| TensorType { dtype: case.dtype_on(i, backend.dtype()), ..*ty };
    let types_of_ins: Vec<_> = case.ins.iter().enumerate().map(typed).collect();
    let mut outs = Vec::new();
    for ty in case.op.infer("case", backend.dtype(), &types_of_ins, &types)? {
        let (view, buffer) = place(ty.rows.bind(&case.bindings), ty.cols, ty.dtype)?;
        outs.push(view);
        buffers.push(buffer);
    }
    let scratch = backend.alloc("workspace", backend.workspace(&case.op, &ins, &types, &outs))?;
    let weights: Vec<_> = weights.iter().collect();
    let (op, workspace) = (&case.op, scratch.addr);
    let call = Call { op, ins: &ins, weights: &weights, outs: &outs, decode: 0, workspace };
    // SAFETY: every view is the whole of a buffer of its own, and no case here has index operands.
    unsafe { backend.run(&call)? };
    let mut results = Vec::new();
    for view in &outs {
        let mut bytes = vec![0; view.bytes()];
        // SAFETY: as above.
        unsafe { backend.download(view.addr, &mut bytes)? };
        results.push(bytes.iter().map(|byte| u32::from(*byte)).collect());
    }
    Ok(results)
}

/// With every site of `files` that `cases` reach switched off in turn, one of the cases fails.
fn all_are_needed(files: &[&str], cases: &[Case]) {
    let data: Vec<_> = cases.iter().map(|case| case.data(1, DType::BF16)).collect();
    let right: Vec<_> = cases
        .iter()
        .zip(&data)
        .map(|(case, data)| run(case, data, 1, None).unwrap_or_else(|error| panic!("{case}: {error}")))
        .collect();
    let found: Vec<_> = sites()
        .into_iter()
        .enumerate()
        .filter(|(_, site)| files.iter().any(|file| site.contains(file)))
        .collect();
    assert!(found.len() > 4, "sites of {files:?}: {found:?}");
    let mut survivors = BTreeSet::new();
    for (number, site) in found {
        let caught = (0..SEEDS).any(|seed| {
            cases.iter().zip(&data).zip(&right).any(|((case, data), right)| {
                run(case, data, seed, Some(number)).map_or(true, |results| results != *right)
            })
        });
        if !caught {
            survivors.insert(site);
        }
    }
    assert!(survivors.is_empty(), "nothing notices when these are switched off: {survivors:#?}");
}

/// Several tiles, more blocks of K than a pipeline has slots, several slices, and tails of all kinds.
#[test]
fn gemm() {
    let (none, gelu) = (Activation::None, Activation::GeluErf);
    let wide =
        |case: Case| Case { op: Op::Linear { act: none, bias: false, residual: false, wide: true }, ..case };
    let cases = [
        linear(70, &[100], 520, DType::BF16, gelu, true, true),
        linear(18, &[35], 33, DType::BF16, none, true, true),
        linear(18, &[8], 2056, DType::BF16, none, false, false),
        wide(linear(3, &[36], 40, DType::BF16, none, false, false)),
        wide(linear(3, &[35], 40, DType::BF16, none, false, false)),
        gated(18, 24, 40, DType::BF16, true),
        gated(18, 21, 77, DType::BF16, false),
    ];
    all_are_needed(&["kernels/gemm.cuh", "kernels/linear.cu"], &cases);
}

#[test]
fn patches() {
    let cases = [patch_embed(3, 21, 7, 17, DType::BF16), patch_embed(2, 28, 14, 32, DType::BF16)];
    all_are_needed(&["kernels/patch.cu"], &cases);
}
