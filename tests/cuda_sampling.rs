//! Sampling on CUDA devices against the CPU's: the same logits, options and seed give the same token.
//!
//! Scores and random numbers have the same bits on both. Probabilities may not: a device's expf and the host's
//! are each within 2 units in the last place of the exact value, 2^-22 of it, so a sum of them, and the
//! threshold it is compared with, can be off by 2^-21 of the sum each; what the device rounds off, 2^-44 an
//! id, is nothing beside it. So where a comparison is decided by more than 2^-20 of the sum, both must decide it
//! alike; where it is not, the token may be another, and the test counts how often it is.

#[allow(dead_code, reason = "each test program uses a part")]
mod cases;
mod devices;

use cases::Random;
use cases::sampling::{Row, case_of, row};
use devices::{Tested, devices};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use tessera::backend::Backend;
use tessera::backend::cpu::CpuBackend;
use tessera::backend::cpu::sample::uniform;
use tessera::op::SampleParams;
use tessera::tensor::DType;

const BORDER: f64 = 1.0 / (1 << 20) as f64;

fn tokens(backend: &Arc<dyn Backend>, rows: &[Row]) -> Vec<i32> {
    let (case, data) = case_of(rows);
    case.run(backend.clone(), &data)[0].iter().map(|&token| token as i32).collect()
}

/// Whether a comparison of sums or probabilities that chooses the token is decided by less than [`BORDER`].
fn is_borderline(row: &Row) -> bool {
    let Row { logits, params, seen } = row;
    if params.temperature == 0.0 {
        return false;
    }
    let mut tokens: Vec<(f32, usize)> = (logits.iter().enumerate())
        .map(|(id, &x)| {
            let x = match seen[id / 32] >> (id % 32) & 1 == 1 {
                true if x < 0.0 => x * params.repetition_penalty,
                true => x / params.repetition_penalty,
                false => x,
            };
            (x / params.temperature, id)
        })
        .collect();
    tokens.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    let max = tokens[0].0;
    if params.top_k > 0 && (params.top_k as usize) < tokens.len() {
        let least = tokens[params.top_k as usize - 1].0;
        tokens.retain(|t| t.0 >= least);
    }
    let probability = |t: &(f32, usize)| ((t.0 - max) as f64).exp();
    let near = |a: f64, b: f64, whole: f64| (a - b).abs() <= BORDER * whole;
    let mut borderline = false;
    if params.top_p < 1.0 {
        let sum: f64 = tokens.iter().map(probability).sum();
        let (limit, mut before) = (params.top_p as f64 * sum, 0.0);
        borderline |= tokens.iter().any(|t| {
            before += probability(t);
            near(before, limit, sum)
        });
        let mut before = 0.0;
        let full = |t: &(f32, usize)| {
            let full = before >= limit;
            before += probability(t);
            full
        };
        let kept = tokens.iter().position(full).unwrap_or(tokens.len()).max(1);
        tokens.truncate(kept);
    }
    let min_p = params.min_p as f64;
    borderline |= tokens[1..].iter().any(|t| t.0 < max && near(probability(t), min_p, min_p));
    tokens.retain(|t| probability(t) >= min_p * (1.0 - BORDER));
    tokens.sort_by_key(|t| t.1);
    let sum: f64 = tokens.iter().map(probability).sum();
    let (target, mut running) = (uniform(params) as f64 * sum, 0.0);
    borderline
        | tokens.iter().any(|t| {
            running += probability(t);
            near(running, target, sum)
        })
}

#[test]
fn the_token_is_the_cpu_s() {
    let cpu: Arc<dyn Backend> = Arc::new(CpuBackend::new(Some(1)).unwrap());
    // The kernel is one for both dtypes.
    for Tested { backend, .. } in devices().iter().filter(|tested| tested.backend.dtype() == DType::BF16) {
        let (mut rows_seen, mut borderline, mut other) = (0, 0, 0);
        // Odd widths take single logits, multiples of four take vectors; 4099 is more than four for every thread.
        for (vocab, rounds) in
            [(1, 2), (7, 12), (32, 8), (33, 8), (1000, 12), (1025, 8), (4099, 8), (4100, 8)]
        {
            for round in 0..rounds {
                let mut random = Random(vocab as u64 * 1000 + round);
                let rows: Vec<Row> = (0..16).map(|_| row(vocab, &mut random)).collect();
                let (ours, theirs) = (tokens(backend, &rows), tokens(&cpu, &rows));
                for ((row, ours), theirs) in rows.iter().zip(ours).zip(theirs) {
                    rows_seen += 1;
                    let may_differ = is_borderline(row);
                    borderline += may_differ as usize;
                    other += (ours != theirs) as usize;
                    let what = format!("vocabulary {vocab}, round {round}, {:?}", row.params);
                    assert!(ours == theirs || may_differ, "{what}: {ours}, not {theirs}");
                }
            }
        }
        println!(
            "{}: {rows_seen} rows, {borderline} at a border, {other} with another token",
            backend.describe()
        );
        // Most rows at a border are ties whose sums meet a limit exactly, and there both are exact.
        assert!(borderline * 5 < rows_seen && other * 100 < rows_seen);
    }
}

#[test]
fn logits_that_are_not_finite_are_told() {
    for Tested { backend, .. } in devices() {
        for vocab in [7, 1028] {
            let mut random = Random(vocab as u64);
            let mut rows: Vec<Row> = (0..7).map(|_| row(vocab, &mut random)).collect();
            for (row, x) in rows.iter_mut().zip([f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY]) {
                row.logits[vocab - 1 - row.params.seed_low as usize % 7] = x;
            }
            let tokens = tokens(&backend, &rows);
            assert!(tokens[..4].iter().all(|&token| token == -1), "{tokens:?}");
            assert!(tokens[4..].iter().all(|&token| (0..vocab as i32).contains(&token)), "{tokens:?}");
        }
    }
}

/// The largest and the lowest finite logits overflow under a penalty; a token comes out all the same, the first of
/// the largest or one that is as large.
#[test]
fn scores_that_overflow_choose_a_token() {
    for Tested { backend, .. } in devices() {
        let mut random = Random(9);
        let mut rows: Vec<Row> = (0..16).map(|_| row(40, &mut random)).collect();
        for row in &mut rows {
            row.params.temperature = 1e-4;
            row.logits[..8].fill(f32::MAX);
            row.logits[8..16].fill(f32::MIN);
        }
        let tokens = tokens(&backend, &rows);
        assert!(tokens.iter().all(|token| (0..8).contains(token)), "{tokens:?}");
    }
}

/// Options that `Sampling::validate` would refuse: no fault, no endless loop, a token that exists.
#[test]
fn options_out_of_range_choose_a_token() {
    type Spoil = fn(&mut SampleParams);
    let spoils: [Spoil; 15] = [
        |p| p.temperature = f32::NAN,
        // The NaN that a GPU makes.
        |p| p.temperature = f32::from_bits(0x7fff_ffff),
        |p| p.temperature = -1.0,
        |p| p.temperature = f32::INFINITY,
        |p| p.temperature = 1e-40,
        |p| p.top_k = u32::MAX,
        |p| p.top_p = 0.0,
        |p| p.top_p = -1.0,
        |p| p.top_p = f32::NAN,
        |p| p.top_p = f32::NEG_INFINITY,
        |p| p.min_p = 2.0,
        |p| p.min_p = f32::NAN,
        |p| p.repetition_penalty = 0.0,
        |p| p.repetition_penalty = -1.0,
        |p| p.repetition_penalty = f32::NAN,
    ];
    for Tested { backend, .. } in devices() {
        let mut random = Random(5);
        let mut rows: Vec<Row> = (0..4 * spoils.len()).map(|_| row(50, &mut random)).collect();
        for (row, spoil) in rows.iter_mut().zip(spoils.iter().cycle()) {
            row.params.temperature = 1.0;
            spoil(&mut row.params);
        }
        let tokens = tokens(&backend, &rows);
        assert!(tokens.iter().all(|token| (0..50).contains(token)), "{tokens:?}");
    }
}

/// The most ids there may be, all as probable as can be: sums of probabilities go up to 2^63.
#[test]
fn the_largest_vocabulary_fits_the_sums() {
    let cpu: Arc<dyn Backend> = Arc::new(CpuBackend::new(Some(1)).unwrap());
    let vocab = 1 << 19;
    let rows = |vocab: usize| {
        let params = SampleParams { temperature: 1.0, top_p: 0.75, ..row(1, &mut Random(0)).params };
        let params = SampleParams { top_k: 0, min_p: 0.0, repetition_penalty: 1.0, ..params };
        [Row { logits: vec![1.5; vocab], params, seen: vec![0; vocab.div_ceil(32)] }]
    };
    for Tested { backend, .. } in devices() {
        assert_eq!(tokens(&backend, &rows(vocab)), tokens(&cpu, &rows(vocab)));
        let refused = catch_unwind(AssertUnwindSafe(|| tokens(&backend, &rows(vocab + 1)))).unwrap_err();
        let text = refused.downcast_ref::<String>().unwrap();
        assert!(text.contains("a vocabulary of 524289; at most 524288"), "{text}");
    }
}
