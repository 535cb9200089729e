//! Do the tests of kernels bite? Every barrier, wait, ticket and bounds check in a kernel file is a numbered
//! site that the emulated device can switch off. Each such mutant must be caught by a case: the device
//! reports a fault, or a result is another. One that is not is superfluous, and goes, or stands below with its reason.
#![cfg(feature = "emu")]

#[allow(dead_code, reason = "each test program uses a part")]
mod cases;

use cases::{Case, Data, Random, Results, gated, linear, patch_embed};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use tessera::Result;
use tessera::backend::cuda::CudaBackend;
use tessera::backend::cuda::emu::{Emulator, sites};
use tessera::backend::{Backend, Buffer, Call};
use tessera::op::{Activation, Op};
use tessera::tensor::{DType, TensorType, View};

/// Cases of the ops, their rows all of the decode phase if there is a choice.
fn decode_cases(ops: &[&str]) -> Vec<(Case, Data)> {
    let table = cases::all().into_iter().chain(cases::edges());
    let ours = table.filter(|case| ops.contains(&case.op.name()) && case.dtype != DType::F16);
    let with_data = |mut case: Case| {
        (case.bindings.decode, case.bindings.decode_outputs) = (case.bindings.tokens, case.bindings.outputs);
        let data = case.data(1, DType::BF16);
        (case, data)
    };
    ours.map(with_data).collect()
}

/// Several sequences a call in both phases, and images.
fn attention_cases() -> Vec<(Case, Data)> {
    let calls = cases::sequences::CALLS.iter();
    let calls = calls.map(|&(heads, sequences, decode)| cases::sequences::call(heads, sequences, decode, 1));
    let images = [cases::attention(2, 65, 2, 72, false), cases::attention(1, 17, 2, 24, true)];
    calls.chain(images.map(|case| (case.clone(), case.data(1, DType::BF16)))).collect()
}

/// What the device makes of a case; `None` if it reports a fault, or a guard was overwritten.
fn outcome(backend: &Arc<dyn Backend>, (case, data): &(Case, Data)) -> Option<Results> {
    catch_unwind(AssertUnwindSafe(|| case.run(backend.clone(), data))).ok()
}

/// The same on a device of its own, with every operand in memory of its own, so that what is read outside one is found
/// too, in several orders of execution. Only for cases without index operands and state.
fn outcome_apart(site: Option<usize>, (case, data): &(Case, Data)) -> Option<Results> {
    let in_order = |seed| {
        let emulator = Emulator::new(seed, Emulator::LIMITS)?;
        emulator.switch_off(site);
        run_apart(&CudaBackend::new(Arc::new(emulator), DType::BF16)?, case, data)
    };
    let first = in_order(0).ok()?;
    (1..6).all(|seed| in_order(seed).is_ok_and(|results| results == first)).then_some(first)
}

fn run_apart(backend: &CudaBackend, case: &Case, data: &Data) -> Result<Results> {
    let place = |ty: &TensorType| -> Result<(View, Buffer)> {
        let (rows, cols, dtype) = (ty.rows.bind(&case.bindings), ty.cols, ty.dtype);
        let buffer = backend.alloc("operand", rows * cols * dtype.size())?;
        Ok((View { addr: buffer.addr, rows, cols, dtype }, buffer))
    };
    let on_device =
        |(i, ty): (usize, &TensorType)| TensorType { dtype: case.dtype_on(i, backend.dtype()), ..*ty };
    let types: Vec<_> = case.ins.iter().enumerate().map(on_device).collect();
    let (ins, _of_ins): (Vec<_>, Vec<_>) =
        types.iter().map(place).collect::<Result<Vec<_>>>()?.into_iter().unzip();
    for (view, words) in ins.iter().zip(&data.ins) {
        let values: Vec<f32> = words.iter().map(|word| f32::from_bits(*word)).collect();
        let mut bytes = vec![0; view.bytes()];
        view.dtype.round_to(&values, &mut bytes);
        // SAFETY: the whole of a buffer that was just allocated.
        unsafe { backend.upload(view.addr, &bytes)? };
    }
    let weights = backend.prepare(&case.op, &data.weights)?;
    let weights: Vec<_> = weights.iter().collect();
    let of_weights: Vec<_> = weights.iter().map(|weight| weight.ty).collect();
    let results = case.op.infer("case", backend.dtype(), &types, &of_weights)?;
    let (outs, _of_outs): (Vec<_>, Vec<_>) =
        results.iter().map(place).collect::<Result<Vec<_>>>()?.into_iter().unzip();
    let scratch = backend.alloc("workspace", backend.workspace(&case.op, &ins, &of_weights, &outs))?;
    let (op, workspace) = (&case.op, scratch.addr);
    let call = Call { op, ins: &ins, weights: &weights, outs: &outs, decode: 0, workspace };
    // SAFETY: every view is the whole of a buffer of its own, and there are no index operands.
    unsafe { backend.run(&call)? };
    let read = |view: &View| {
        let mut bytes = vec![0; view.bytes()];
        // SAFETY: as above.
        unsafe { backend.download(view.addr, &mut bytes)? };
        Ok(bytes.into_iter().map(u32::from).collect())
    };
    outs.iter().map(read).collect()
}

/// What becomes of a case with a site switched off; `None` if that is found.
type Run<'a> = &'a dyn Fn(Option<usize>, &(Case, Data)) -> Option<Results>;

/// The sites of a kernel file whose mutants no case catches.
fn uncaught(file: &str, cases: &[(Case, Data)], run: Run<'_>) -> Vec<String> {
    let right: Vec<_> = cases.iter().map(|case| run(None, case).expect("a case that works")).collect();
    let sites: Vec<_> = sites().into_iter().enumerate().filter(|(_, name)| name.contains(file)).collect();
    assert!(!sites.is_empty(), "{file} has sites");

    // A caught mutant is a panic that is expected.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let mut uncaught = Vec::new();
    for (site, name) in &sites {
        let caught =
            cases.iter().zip(&right).any(|(case, right)| run(Some(*site), case).as_ref() != Some(right));
        if !caught {
            uncaught.push(name.clone());
        }
    }
    std::panic::set_hook(hook);
    println!("{file}: {} sites, not caught: {uncaught:?}", sites.len());
    uncaught
}

#[test]
fn mutants_are_caught() {
    let sampled = [7, 33, 1000].map(|vocab| {
        let mut random = Random(vocab);
        let rows: Vec<_> = (0..64).map(|_| cases::sampling::row(vocab as usize, &mut random)).collect();
        cases::sampling::case_of(&rows)
    });
    let families = [
        ("kernels/matvec.cu", decode_cases(&["Linear", "GatedLinear"])),
        ("kernels/norm.cu", decode_cases(&["LayerNorm", "RmsNorm", "AddRmsNorm", "L2Normalize"])),
        ("kernels/rope.cu", decode_cases(&["RopeAppend"])),
        ("kernels/sample.cu", sampled.into()),
        ("kernels/attention.cu", attention_cases()),
        ("kernels/paged_decode.cu", attention_cases()),
    ];
    let emulator = Emulator::new(1, Emulator::LIMITS).unwrap();
    let backend: Arc<dyn Backend> =
        Arc::new(CudaBackend::new(Arc::new(emulator.clone()), DType::BF16).unwrap());
    let run = |site: Option<usize>, case: &(Case, Data)| {
        emulator.switch_off(site);
        outcome(&backend, case)
    };
    for (file, cases) in families {
        assert_eq!(uncaught(file, &cases, &run), Vec::<String>::new());
    }
}

/// Lines of a kernel file with a site that no launch has reached.
fn unreached(file: &str) -> Vec<String> {
    let text = std::fs::read_to_string(format!("{}/{file}", env!("CARGO_MANIFEST_DIR"))).unwrap();
    let has_site = |line: &str| {
        let code = line.split("//").next().unwrap_or_default();
        ["mask(", "sync_block(", "sync_warp(", "ticket(", "fence_device("].iter().any(|s| code.contains(s))
            || code.contains("wait_copies<")
    };
    let reached = sites();
    let lines = text.lines().enumerate().filter(|(_, line)| has_site(line));
    let names = lines.map(|(at, _)| format!("{file}:{} ", at + 1));
    names.filter(|name| !reached.iter().any(|site| site.contains(name.as_str()))).collect()
}

/// Several tiles, more blocks of K than a pipeline has slots, several slices, and tails of all kinds.
#[test]
fn mutants_of_products_are_caught() {
    let (none, gelu, dtype) = (Activation::None, Activation::GeluErf, DType::BF16);
    let wide = |case: Case| Case {
        op: Op::Linear { act: none, bias: false, residual: false, wide: true, pairs: Vec::new() },
        ..case
    };
    let with_data = |case: Case| {
        let data = case.data(1, dtype);
        (case, data)
    };
    let products = [
        linear(70, &[100], 520, dtype, gelu, true, true),
        linear(18, &[35], 33, dtype, none, true, true),
        linear(18, &[8], 4104, dtype, none, false, false),
        wide(linear(3, &[36], 40, dtype, none, false, false)),
        wide(linear(3, &[35], 40, dtype, none, false, false)),
        gated(18, 24, 40, dtype, true),
        gated(18, 21, 77, dtype, false),
    ];
    let patches = [patch_embed(3, 21, 7, 17, dtype), patch_embed(2, 28, 14, 32, dtype)];
    let (products, patches) = (products.map(with_data), patches.map(with_data));
    for (file, cases) in [
        ("kernels/gemm.cuh", &products[..]),
        ("kernels/linear.cu", &products),
        ("kernels/patch.cu", &patches),
    ] {
        assert_eq!(uncaught(file, cases, &outcome_apart), Vec::<String>::new());
        assert_eq!(unreached(file), Vec::<String>::new(), "no case gets there");
    }
}
