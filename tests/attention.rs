//! Attention over pages on the emulated device, of several sequences at once: the case table has one sequence a
//! call. A sequence's queries, keys and values follow from its name and the position alone, so that a row can be
//! computed in any company, and must have the same bits in every one.
#![cfg(feature = "emu")]

#[allow(dead_code, reason = "the table itself is not wanted here")]
mod cases;
mod oracle;

use cases::bounds::headroom;
use cases::{Case, Data, Random};
use oracle::Oracle;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use tessera::backend::Backend;
use tessera::backend::cuda::CudaBackend;
use tessera::backend::cuda::driver::Limits;
use tessera::backend::cuda::emu::{Emulator, sites};
use tessera::op::PAGE;
use tessera::tensor::{Bindings, DType};

/// H, K and E.
type Heads = (usize, usize, usize);

/// `new` rows after `past` cached ones.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Sequence {
    name: u64,
    past: usize,
    new: usize,
}

const fn sequence(name: u64, past: usize, new: usize) -> Sequence {
    Sequence { name, past, new }
}

/// One row that sees `seen` positions.
const fn decoding(name: u64, seen: usize) -> Sequence {
    sequence(name, seen - 1, 1)
}

/// The bits of the rows of each sequence.
type Rows = Vec<Vec<u32>>;

/// `len` numbers that bf16 and f16 hold, given by what they belong to.
fn numbers(name: u64, kind: u64, position: usize, len: usize) -> impl Iterator<Item = u32> {
    let mut random = Random((name * 3 + kind) << 32 | position as u64);
    (0..len).map(move |_| ((random.below(257) as f32 - 128.0) / 128.0).to_bits())
}

/// A call over the sequences, the first `decode` of which are of decode rows, with pages wherever `placement`
/// puts them. What no position has written is NaN.
fn call(heads: Heads, sequences: &[Sequence], decode: usize, placement: u64) -> (Case, Data) {
    let (h, k, e) = heads;
    let pages_of = |s: &Sequence| (s.past + s.new).div_ceil(PAGE);
    let tokens = sequences.iter().map(|s| s.new).sum();
    let entries: usize = sequences.iter().map(pages_of).sum();
    let pages = entries + 3;
    let mut free: Vec<usize> = (0..pages).collect();
    let mut random = Random(placement);
    (1..pages).rev().for_each(|i| free.swap(i, random.below(i + 1)));

    let past = sequences.iter().map(|s| s.past).max().unwrap();
    let mut case = cases::paged_attention(past, 1, h, k, e);
    case.bindings = Bindings {
        tokens,
        decode: sequences[..decode].iter().map(|s| s.new).sum(),
        table_entries: entries,
        pages,
        ..case.bindings
    };
    let (mut q, mut positions, mut starts, mut tables) = (vec![], vec![], vec![], vec![]);
    let mut keys = vec![f32::NAN.to_bits(); pages * k * e * PAGE];
    let mut values = keys.clone();
    for s in sequences {
        let start = tables.len();
        tables.extend(free.drain(..pages_of(s)).map(|page| page as u32));
        for position in 0..s.past + s.new {
            let page = tables[start + position / PAGE] as usize * k * e * PAGE;
            let slot = position % PAGE;
            for (i, bits) in numbers(s.name, 1, position, k * e).enumerate() {
                keys[page + i * PAGE + slot] = bits;
            }
            for (i, bits) in numbers(s.name, 2, position, k * e).enumerate() {
                values[page + (i / e * PAGE + slot) * e + i % e] = bits;
            }
        }
        for position in s.past..s.past + s.new {
            q.extend(numbers(s.name, 0, position, h * e));
            positions.push(position as u32);
            starts.push(start as u32);
        }
    }
    (case, Data { ins: vec![q, positions, starts, tables, keys, values], weights: vec![] })
}

/// An emulated device.
struct Tested {
    emulator: Emulator,
    backend: Arc<dyn Backend>,
}

impl Tested {
    fn new(dtype: DType, multiprocessors: u32) -> Self {
        let emulator = Emulator::new(1, Limits { multiprocessors, ..Emulator::LIMITS }).unwrap();
        let backend = CudaBackend::new(Arc::new(emulator.clone()), dtype).unwrap();
        Tested { emulator, backend: Arc::new(backend) }
    }

    fn all() -> impl Iterator<Item = Self> {
        [DType::BF16, DType::F16].into_iter().map(|dtype| Tested::new(dtype, 6))
    }

    /// The rows of sequences of which the first `decode` are of decode rows.
    fn run(&self, heads: Heads, sequences: &[Sequence], decode: usize, placement: u64) -> Rows {
        let (case, data) = call(heads, sequences, decode, placement);
        let results = case.run(self.backend.clone(), &data);
        let mut rest = &results[0][..];
        let mut take = |s: &Sequence| rest.split_off(..s.new * heads.0 * heads.2).unwrap().to_vec();
        sequences.iter().map(&mut take).collect()
    }
}

/// Every kernel in both dtypes: sizes of heads, groups, tiles that sequences share, ends of pages, chunks and
/// tiles, and decode batches of mixed lengths.
const CALLS: &[(Heads, &[Sequence], usize)] = &[
    ((2, 2, 64), &[sequence(1, 0, 40), sequence(2, 30, 40), sequence(3, 63, 2)], 0),
    ((4, 1, 24), &[sequence(1, 5, 3), sequence(2, 0, 1), sequence(3, 127, 70), sequence(4, 16, 17)], 0),
    ((2, 1, 72), &[sequence(1, 64, 64), sequence(2, 1, 1)], 0),
    ((3, 3, 88), &[sequence(1, 15, 17), sequence(2, 0, 16)], 0),
    ((2, 2, 128), &[sequence(1, 40, 33), sequence(2, 0, 20)], 0),
    ((4, 2, 64), &[decoding(1, 1), decoding(2, 500)], 2),
    (
        (3, 1, 80),
        &[decoding(1, 140), decoding(2, 1), decoding(3, 401), decoding(4, 128), decoding(5, 129)],
        5,
    ),
    ((20, 1, 40), &[decoding(1, 260)], 1),
    ((8, 2, 128), &[decoding(1, 300), decoding(2, 16), decoding(3, 257)], 3),
    ((1, 1, 96), &[decoding(1, 384), decoding(2, 385)], 2),
    // Decode rows of one sequence, for which the workspace has no room, beside prefill rows.
    ((4, 2, 32), &[sequence(1, 300, 5), decoding(2, 200), sequence(3, 70, 7), sequence(4, 0, 30)], 2),
];

#[test]
fn sequences_in_one_call_agree_with_the_oracle() {
    for Tested { backend, emulator } in Tested::all() {
        let mut worst: f64 = 0.0;
        for &(heads, sequences, decode) in CALLS {
            let (case, data) = call(heads, sequences, decode, 1);
            let exact = case.run(Arc::new(Oracle), &data);
            for seed in 1..4 {
                emulator.reseed(seed);
                let ours = case.run(backend.clone(), &data);
                worst =
                    worst.max(headroom(&case, backend.dtype(), &ours[..1].to_vec(), &exact[..1].to_vec()));
            }
        }
        println!("{:.0} % of the bound at worst in {}", 100.0 * worst, backend.dtype());
    }
}

#[test]
fn company_pages_and_order_change_no_bit() {
    for tested in Tested::all() {
        for (i, &(heads, sequences, decode)) in CALLS.iter().enumerate() {
            tested.emulator.reseed(i as u64);
            let together = tested.run(heads, sequences, decode, 1);
            tested.emulator.reseed(i as u64 + 100);
            assert_eq!(tested.run(heads, sequences, decode, 2), together, "{heads:?} {sequences:?}");
            for (i, s) in sequences.iter().enumerate() {
                let alone = tested.run(heads, &[*s], (i < decode) as usize, 3);
                assert_eq!(alone, together[i..=i], "{heads:?} {s:?}");
            }
        }
    }
}

#[test]
fn chunks_change_no_bit() {
    for tested in Tested::all() {
        for (heads, decode, len, chunks) in [
            ((2, 1, 64), 0, 150, [1, 7, 64]),
            ((1, 1, 128), 0, 70, [5, 33, 69]),
            ((2, 1, 80), 1, 140, [1, 3, 60]),
        ] {
            let whole = tested.run(heads, &[sequence(1, 0, len)], decode, 1).concat();
            for chunk in chunks {
                let part = |past| sequence(1, past, chunk.min(len - past));
                let parts = (0..len).step_by(chunk);
                let parts: Vec<_> =
                    parts.flat_map(|at| tested.run(heads, &[part(at)], decode, at as u64)).collect();
                assert_eq!(parts.concat(), whole, "{heads:?} in chunks of {chunk}, decode {decode}");
            }
        }
    }
}

/// How many blocks share the keys of a row depends on the device, and changes nothing.
#[test]
fn the_size_of_the_device_changes_no_bit() {
    for dtype in [DType::BF16, DType::F16] {
        for &(heads, sequences, decode) in CALLS.iter().filter(|call| call.2 > 0) {
            let run = |multiprocessors| Tested::new(dtype, multiprocessors).run(heads, sequences, decode, 1);
            let one = run(1);
            for multiprocessors in [2, 3, 132] {
                assert_eq!(run(multiprocessors), one, "{heads:?} {sequences:?} on {multiprocessors}");
            }
        }
    }
}

/// Each barrier, wait, ticket and mask of these kernels matters: without it, the device finds a fault or some
/// row is another, under one of three orders of execution.
#[test]
fn no_site_is_idle() {
    let tested = Tested::new(DType::BF16, 6);
    let run_all = || -> Vec<Rows> {
        let paged = CALLS.iter().map(|&(heads, sequences, decode)| tested.run(heads, sequences, decode, 1));
        let dense = [cases::attention(2, 65, 2, 72, false), cases::attention(1, 17, 2, 24, true)];
        let dense = dense.iter().map(|case| case.run(tested.backend.clone(), &case.data(1, DType::BF16)));
        paged.chain(dense).collect()
    };
    let right = run_all();
    let ours = |name: &str| name.contains("attention.") || name.contains("paged_decode.");
    let sites: Vec<_> = sites().into_iter().enumerate().filter(|(_, name)| ours(name)).collect();
    assert!(sites.len() >= 20, "{sites:?}");
    let idle = |site| {
        tested.emulator.switch_off(Some(site));
        (1..4).all(|seed| {
            tested.emulator.reseed(seed);
            catch_unwind(AssertUnwindSafe(run_all)).is_ok_and(|rows| rows == right)
        })
    };
    let idle: Vec<_> = sites.into_iter().filter(|(site, _)| idle(*site)).collect();
    assert!(idle.is_empty(), "nothing changes without {idle:?}");
}
