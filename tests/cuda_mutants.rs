//! Do the tests of kernels bite? Every barrier, wait, fence, ticket and bounds check in a kernel file is a numbered
//! site that the emulated device can switch off. Each such mutant must be caught by a case: the device
//! reports a fault, or a result is another. One that is not is superfluous, and goes, or stands below with its reason.
#![cfg(feature = "emu")]

#[allow(dead_code, reason = "each test program uses a part")]
mod cases;

use cases::{Case, Data, Random, Results};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use tessera::backend::Backend;
use tessera::backend::cuda::CudaBackend;
use tessera::backend::cuda::emu::{Emulator, sites};
use tessera::tensor::DType;

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

/// What the device makes of a case; `None` if it reports a fault, or a guard was overwritten.
fn outcome(backend: &Arc<dyn Backend>, (case, data): &(Case, Data)) -> Option<Results> {
    catch_unwind(AssertUnwindSafe(|| case.run(backend.clone(), data))).ok()
}

/// The sites of a kernel file whose mutants no case catches.
fn uncaught(file: &str, cases: &[(Case, Data)]) -> Vec<String> {
    let emulator = Emulator::new(1, Emulator::LIMITS).unwrap();
    let backend: Arc<dyn Backend> =
        Arc::new(CudaBackend::new(Arc::new(emulator.clone()), DType::BF16).unwrap());
    let right: Vec<_> =
        cases.iter().map(|case| outcome(&backend, case).expect("a case that works")).collect();
    let sites: Vec<_> = sites().into_iter().enumerate().filter(|(_, name)| name.contains(file)).collect();
    assert!(!sites.is_empty(), "{file} has sites");

    // A caught mutant is a panic that is expected.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let mut uncaught = Vec::new();
    for (site, name) in &sites {
        emulator.switch_off(Some(*site));
        let caught =
            cases.iter().zip(&right).any(|(case, right)| outcome(&backend, case).as_ref() != Some(right));
        if !caught {
            uncaught.push(name.clone());
        }
    }
    std::panic::set_hook(hook);
    println!("{file}: {} sites, not caught: {uncaught:?}", sites.len());
    uncaught
}

#[test]
fn mutants_of_rows_are_caught() {
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
    ];
    for (file, cases) in families {
        assert_eq!(uncaught(file, &cases), Vec::<String>::new());
    }
}
