//! Calls of paged attention with several sequences: the table has one sequence a call. A sequence's queries, keys
//! and values follow from its name and the position alone, so that a row can be computed in any company.

use super::{Case, Data, Random, paged_attention};
use tessera::op::PAGE;
use tessera::tensor::Bindings;

/// H, K and E.
pub type Heads = (usize, usize, usize);

/// `new` rows after `past` cached ones.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sequence {
    /// What its numbers follow from.
    pub name: u64,
    /// Positions before its rows.
    pub past: usize,
    /// Its rows.
    pub new: usize,
}

/// A sequence of rows.
pub const fn sequence(name: u64, past: usize, new: usize) -> Sequence {
    Sequence { name, past, new }
}

/// One row that sees `seen` positions.
const fn one(name: u64, seen: usize) -> Sequence {
    sequence(name, seen - 1, 1)
}

/// Heads, sequences, and how many of them are of decode rows. Every kernel, tiles that sequences share, ends of
/// pages, chunks and tiles, groups of all kinds, and decode batches of mixed lengths.
pub const CALLS: &[(Heads, &[Sequence], usize)] = &[
    ((2, 2, 64), &[sequence(1, 0, 40), sequence(2, 30, 40), sequence(3, 63, 2)], 0),
    ((4, 1, 24), &[sequence(1, 5, 3), sequence(2, 0, 1), sequence(3, 127, 70), sequence(4, 16, 17)], 0),
    ((2, 1, 72), &[sequence(1, 64, 64), sequence(2, 1, 1)], 0),
    ((3, 3, 88), &[sequence(1, 15, 17), sequence(2, 0, 16)], 0),
    ((2, 2, 128), &[sequence(1, 40, 33), sequence(2, 0, 20)], 0),
    ((4, 2, 64), &[one(1, 1), one(2, 500)], 2),
    ((3, 1, 80), &[one(1, 140), one(2, 1), one(3, 401), one(4, 128), one(5, 129)], 5),
    ((20, 1, 40), &[one(1, 260)], 1),
    ((8, 2, 128), &[one(1, 300), one(2, 16), one(3, 257)], 3),
    ((1, 1, 96), &[one(1, 384), one(2, 385)], 2),
    // Decode rows of one sequence, for which the workspace has no room, beside prefill rows.
    ((4, 2, 32), &[sequence(1, 300, 5), one(2, 200), sequence(3, 70, 7), sequence(4, 0, 30)], 2),
];

/// A call over sequences, the first `decode` of which are of decode rows, with pages wherever `placement` puts
/// them. What no position has written is NaN.
pub fn call((h, k, e): Heads, sequences: &[Sequence], decode: usize, placement: u64) -> (Case, Data) {
    let pages_of = |s: &Sequence| (s.past + s.new).div_ceil(PAGE);
    let entries: usize = sequences.iter().map(pages_of).sum();
    let pages = entries + 3;
    let mut free: Vec<usize> = (0..pages).collect();
    let mut random = Random(placement);
    (1..pages).rev().for_each(|i| free.swap(i, random.below(i + 1)));

    let past = sequences.iter().map(|s| s.past).max().expect("a sequence");
    let mut case = paged_attention(past, 1, h, k, e);
    case.bindings = Bindings {
        tokens: sequences.iter().map(|s| s.new).sum(),
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

/// `len` numbers that bf16 and f16 hold, given by what they belong to.
fn numbers(name: u64, kind: u64, position: usize, len: usize) -> impl Iterator<Item = u32> {
    let mut random = Random((name * 3 + kind) << 32 | position as u64);
    (0..len).map(move |_| ((random.below(257) as f32 - 128.0) / 128.0).to_bits())
}
