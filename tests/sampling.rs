//! The sampler against Hugging Face's logits processors: which tokens survive repetition penalty,
//! temperature, top-k, top-p and min-p, with which probabilities; and log-softmax.

use serde_json::Value;
use std::collections::BTreeSet;
use std::path::Path;
use tessera::backend::cpu::sample::{Candidate, sample, survivors};
use tessera::op::SampleParams;
use tessera::runtime::sampling::log_probs;

/// How far a probability may be from that of float64. A score s is a logit times the penalty over the
/// temperature, each rounded to f32, and so is s - max: |s| and |max| are off by at most four times
/// 2^-24 of themselves, which is a relative error of e^(s-max). Eight more units are for the exponential,
/// the sum and the nine digits of the goldens. What f32 has no normal number for may vanish.
fn bound(probability: f64, score: f64, max: f64) -> f64 {
    let unit = (-24f64).exp2();
    probability * unit * (8.0 + 4.0 * (score.abs() + max.abs())) + f32::MIN_POSITIVE as f64
}

fn goldens() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/sampling/cases.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn f32s(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|x| x.as_u64().unwrap() as u32).collect()
}

/// The settings of a case; one that is absent is off.
fn params(case: &Value) -> SampleParams {
    let number = |key: &str, off: f64| case[key].as_f64().unwrap_or(off) as f32;
    SampleParams {
        temperature: number("temperature", 1.0),
        top_k: case["top_k"].as_u64().unwrap_or(0) as u32,
        top_p: number("top_p", 1.0),
        min_p: number("min_p", 0.0),
        repetition_penalty: number("repetition_penalty", 1.0),
        seed_low: 7,
        seed_high: 0,
        position: 0,
    }
}

#[test]
fn survivors_and_their_probabilities_are_the_reference_s() {
    let goldens = goldens();
    let mut worst = 0.0f64;
    let cases = goldens["cases"].as_array().unwrap();
    assert!(cases.len() >= 81, "{} cases", cases.len());
    for case in cases {
        let vector = case["logits"].as_str().unwrap();
        let logits = f32s(&goldens["logits"][vector]);
        let seen = ids(&goldens["seen"][vector]);
        let params = params(case);
        let what = format!("{vector} {params:?}");

        // `survivors` begins after the repetition penalty, which is applied once to each id.
        let mut candidates: Vec<_> =
            logits.iter().zip(0..).map(|(&score, id)| Candidate { score, id }).collect();
        for &id in &seen.iter().copied().collect::<BTreeSet<_>>() {
            let score = &mut candidates[id as usize].score;
            let penalty = params.repetition_penalty;
            *score = if *score < 0.0 { *score * penalty } else { *score / penalty };
        }
        let scores: Vec<_> = candidates.iter().map(|c| (c.score / params.temperature) as f64).collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let kept = survivors(&mut candidates, &params);
        let kept = &candidates[..kept];
        let expected = ids(&case["tokens"]);
        assert_eq!(kept.iter().map(|c| c.id).collect::<Vec<_>>(), expected, "{what}");
        let sum: f64 = kept.iter().map(|c| c.score as f64).sum();
        for (c, p) in kept.iter().zip(case["probabilities"].as_array().unwrap()) {
            let p = p.as_f64().unwrap();
            let off = (c.score as f64 / sum - p).abs();
            let bound = bound(p, scores[c.id as usize], max);
            assert!(off <= bound, "{what}: token {} off by {off:.1e} of {p:.3e}, not {bound:.1e}", c.id);
            worst = worst.max(off / bound);
        }

        // The whole sampler, penalty included, draws survivors and in the end all that are likely.
        let mut bits = vec![0u32; logits.len().div_ceil(32)];
        for &id in &seen {
            bits[id as usize / 32] |= 1 << (id % 32);
        }
        let mut scratch = vec![Candidate { score: 0.0, id: 0 }; logits.len()];
        let drawn: BTreeSet<u32> = (0..400)
            .map(|position| {
                let params = SampleParams { position, ..params };
                sample(&logits, &params, &bits, &mut scratch).unwrap()
            })
            .collect();
        assert!(drawn.iter().all(|id| expected.contains(id)), "{what}: drew {drawn:?}");
        for (id, p) in expected.iter().zip(case["probabilities"].as_array().unwrap()) {
            // Missed 400 times with probability 0.9^400 = 5e-19.
            assert!(p.as_f64().unwrap() < 0.1 || drawn.contains(id), "{what}: never drew {id}");
        }
    }
    println!("worst probability: {:.0} % of the bound", 100.0 * worst);
}

#[test]
fn log_probabilities_are_log_softmax() {
    let goldens = goldens();
    let mut worst = 0.0f64;
    for (vector, expected) in goldens["log_softmax"].as_object().unwrap() {
        let logits = f32s(&goldens["logits"][vector]);
        let expected: Vec<f64> = expected.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
        let (_, all) = log_probs(&logits, 0, logits.len());
        assert_eq!(all.len(), expected.len());
        for (id, logprob) in all {
            assert_eq!(log_probs(&logits, id, 0).0, logprob, "alone and in the list");
            // f64 inside, rounded once to f32; the reference has nine digits.
            let expected = expected[id as usize];
            let bound = expected.abs().max(1.0) * 1e-7;
            let off = (logprob as f64 - expected).abs();
            assert!(off <= bound, "{vector} {id}: {logprob} for {expected}");
            worst = worst.max(off / bound);
        }
    }
    println!("worst log-probability: {:.0} % of the bound", 100.0 * worst);
}
