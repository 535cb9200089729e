//! Attention over the pages of several sequences at once, on CUDA devices: right, and the same bits for a row in
//! any company, chunk and pages, in any order of execution, and on any number of multiprocessors.

#[allow(dead_code, reason = "each test program uses a part")]
mod cases;
mod devices;
mod oracle;

use cases::bounds::headroom;
use cases::sequences::{CALLS, Heads, Sequence, call, sequence};
use devices::{Tested, devices};
use oracle::Oracle;
use std::sync::Arc;
use tessera::backend::Backend;

/// The bits of the rows of each sequence, of which the first `decode` are of decode rows.
fn run(
    backend: &Arc<dyn Backend>,
    heads: Heads,
    sequences: &[Sequence],
    decode: usize,
    placement: u64,
) -> Vec<Vec<u32>> {
    let (case, data) = call(heads, sequences, decode, placement);
    let results = case.run(backend.clone(), &data);
    let mut rest = &results[0][..];
    let mut take = |s: &Sequence| rest.split_off(..s.new * heads.0 * heads.2).unwrap().to_vec();
    sequences.iter().map(&mut take).collect()
}

#[test]
fn sequences_in_one_call_agree_with_the_oracle() {
    for Tested { backend, reseed } in devices() {
        let mut worst: f64 = 0.0;
        for &(heads, sequences, decode) in CALLS {
            let (case, data) = call(heads, sequences, decode, 1);
            let exact = case.run(Arc::new(Oracle), &data);
            for seed in 1..4 {
                reseed(seed);
                let ours = case.run(backend.clone(), &data);
                worst =
                    worst.max(headroom(&case, backend.dtype(), &ours[..1].to_vec(), &exact[..1].to_vec()));
            }
        }
        println!("{:.0} % of the bound at worst on {}", 100.0 * worst, backend.describe());
    }
}

#[test]
fn company_pages_and_order_change_no_bit() {
    for Tested { backend, reseed } in devices() {
        for (i, &(heads, sequences, decode)) in CALLS.iter().enumerate() {
            reseed(i as u64);
            let together = run(&backend, heads, sequences, decode, 1);
            reseed(i as u64 + 100);
            assert_eq!(run(&backend, heads, sequences, decode, 2), together, "{heads:?} {sequences:?}");
            for (i, s) in sequences.iter().enumerate() {
                let alone = run(&backend, heads, &[*s], (i < decode) as usize, 3);
                assert_eq!(alone, together[i..=i], "{heads:?} {s:?}");
            }
        }
    }
}

#[test]
fn chunks_change_no_bit() {
    for Tested { backend, .. } in devices() {
        for (heads, decode, len, chunks) in [
            ((2, 1, 64), 0, 150, [1, 7, 64]),
            ((1, 1, 128), 0, 70, [5, 33, 69]),
            ((2, 1, 80), 1, 140, [1, 3, 60]),
        ] {
            let whole = run(&backend, heads, &[sequence(1, 0, len)], decode, 1).concat();
            for chunk in chunks {
                let parts = (0..len).step_by(chunk).flat_map(|past| {
                    let part = sequence(1, past, chunk.min(len - past));
                    run(&backend, heads, &[part], decode, past as u64)
                });
                let parts: Vec<_> = parts.collect();
                assert_eq!(parts.concat(), whole, "{heads:?} in chunks of {chunk}, decode {decode}");
            }
        }
    }
}

/// How many blocks share the keys of a decode row depends on the device, and changes nothing.
#[cfg(feature = "emu")]
#[test]
fn the_number_of_multiprocessors_changes_no_bit() {
    use tessera::backend::cuda::CudaBackend;
    use tessera::backend::cuda::driver::Limits;
    use tessera::backend::cuda::emu::Emulator;
    use tessera::tensor::DType;

    for dtype in [DType::BF16, DType::F16] {
        for &(heads, sequences, decode) in CALLS.iter().filter(|(.., decode)| *decode > 0) {
            let on = |multiprocessors| {
                let emulator = Emulator::new(1, Limits { multiprocessors, ..Emulator::LIMITS }).unwrap();
                let backend: Arc<dyn Backend> =
                    Arc::new(CudaBackend::new(Arc::new(emulator), dtype).unwrap());
                run(&backend, heads, sequences, decode, 1)
            };
            let one = on(1);
            for multiprocessors in [2, 3, 132] {
                assert_eq!(on(multiprocessors), one, "{heads:?} {sequences:?} on {multiprocessors}");
            }
        }
    }
}
