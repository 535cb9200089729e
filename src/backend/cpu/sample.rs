//! [`Op::Sample`](crate::op::Op::Sample): one row of logits becomes one token.
//!
//! Steps in Hugging Face's order (`LogitsProcessorList` as `generate` builds it): repetition penalty on
//! the raw logits; then, unless greedy, temperature, top-k, top-p, min-p, softmax, draw. The random
//! number is a function of (seed, position) alone, so a text does not depend on threads, batches,
//! chunks, or on how many numbers were drawn before.

use crate::backend::all_finite;
use crate::op::SampleParams;

/// A token that is still in the running.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Candidate {
    /// The logit, after penalty and temperature; later the unnormalised probability.
    pub score: f32,
    /// The token.
    pub id: u32,
}

/// The token chosen from `logits` `[V]`, or `None` if one of them is not finite. `seen` is a bit set
/// over ids; `scratch` holds V candidates.
pub fn sample(logits: &[f32], params: &SampleParams, seen: &[u32], scratch: &mut [Candidate]) -> Option<u32> {
    if !all_finite(logits) {
        return None;
    }
    let candidates = &mut scratch[..logits.len()];
    for (id, (slot, &logit)) in candidates.iter_mut().zip(logits).enumerate() {
        let is_seen = seen[id / 32] >> (id % 32) & 1 == 1;
        *slot = Candidate { score: penalised(logit, is_seen, params), id: id as u32 };
    }
    if params.temperature == 0.0 {
        return Some(argmax(candidates));
    }
    let kept = survivors(candidates, params);
    Some(draw(&candidates[..kept], uniform(params)))
}

/// The number of survivors, which stand first in `candidates`, in ascending order of id, their scores
/// turned into probabilities up to a common factor.
pub fn survivors(candidates: &mut [Candidate], params: &SampleParams) -> usize {
    let n = candidates.len();
    for c in candidates.iter_mut() {
        c.score /= params.temperature;
    }
    let mut kept = n;
    let top_k = params.top_k as usize;
    if top_k > 0 && top_k < n {
        // Ties with the k-th survive, as they do in Hugging Face.
        candidates.select_nth_unstable_by(top_k - 1, descending);
        let least = candidates[top_k - 1].score;
        kept = partition(candidates, |c| c.score >= least);
    }
    let max = candidates[..kept].iter().fold(f32::NEG_INFINITY, |m, c| m.max(c.score));
    for c in &mut candidates[..kept] {
        c.score = (c.score - max).exp();
    }
    if params.top_p < 1.0 {
        let sum: f64 = candidates[..kept].iter().map(|c| c.score as f64).sum();
        candidates[..kept].sort_unstable_by(descending);
        // A token stays if the more probable ones leave room below top_p; the first always stays.
        let (mut before, limit) = (0.0, params.top_p as f64 * sum);
        kept = candidates[..kept]
            .iter()
            .position(|c| {
                let full = before >= limit;
                before += c.score as f64;
                full
            })
            .unwrap_or(kept)
            .max(1);
    }
    if params.min_p > 0.0 {
        // The most probable token has score exp(0) = 1.
        kept = partition(&mut candidates[..kept], |c| c.score >= params.min_p);
    }
    candidates[..kept].sort_unstable_by_key(|c| c.id);
    kept
}

/// `logit` after the repetition penalty: seen ids move towards less probable.
fn penalised(logit: f32, seen: bool, params: &SampleParams) -> f32 {
    match seen {
        true if logit < 0.0 => logit * params.repetition_penalty,
        true => logit / params.repetition_penalty,
        false => logit,
    }
}

/// The largest score; the lowest id among equals.
fn argmax(candidates: &[Candidate]) -> u32 {
    let mut best = candidates[0];
    for &c in &candidates[1..] {
        if c.score > best.score {
            best = c;
        }
    }
    best.id
}

/// Larger scores first, lower ids first among equals: a total order, so results do not depend on how
/// an unstable sort moves things.
fn descending(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    b.score.total_cmp(&a.score).then(a.id.cmp(&b.id))
}

/// Moves the candidates that pass to the front and returns how many they are.
fn partition(candidates: &mut [Candidate], keep: impl Fn(&Candidate) -> bool) -> usize {
    let mut kept = 0;
    for i in 0..candidates.len() {
        if keep(&candidates[i]) {
            candidates.swap(kept, i);
            kept += 1;
        }
    }
    kept
}

/// The first candidate at which the running sum passes `u` of the whole.
fn draw(candidates: &[Candidate], u: f32) -> u32 {
    let sum: f64 = candidates.iter().map(|c| c.score as f64).sum();
    let target = u as f64 * sum;
    let mut running = 0.0;
    for c in candidates {
        running += c.score as f64;
        if running > target {
            return c.id;
        }
    }
    candidates[candidates.len() - 1].id
}

/// A number in [0, 1) from the seed and the position: the first word of Philox4x32-10 (Salmon et al.,
/// "Parallel random numbers: as easy as 1, 2, 3", SC 2011), 24 bits of it.
pub fn uniform(params: &SampleParams) -> f32 {
    let word = philox([params.position, 0, 0, 0], [params.seed_low, params.seed_high])[0];
    (word >> 8) as f32 * (1.0 / (1 << 24) as f32)
}

/// Philox4x32-10.
fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let a = counter[0] as u64 * 0xD251_1F53;
        let b = counter[2] as u64 * 0xCD9E_8D57;
        counter = [
            (b >> 32) as u32 ^ counter[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ counter[3] ^ key[1],
            a as u32,
        ];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: SampleParams = SampleParams {
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        seed_low: 1,
        seed_high: 2,
        position: 3,
    };

    /// Known-answer vectors of Random123's `kat_vectors`, philox4x32 10.
    #[test]
    fn philox_known_answers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
        assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
        assert_eq!(
            philox([0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344], [0xa4093822, 0x299f31d0]),
            [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]
        );
    }

    #[test]
    fn greedy_takes_the_lowest_of_equals_and_penalises_seen_ids() {
        let mut scratch = [Candidate { score: 0.0, id: 0 }; 4];
        let greedy = SampleParams { temperature: 0.0, ..PLAIN };
        assert_eq!(sample(&[1.0, 3.0, 3.0, -1.0], &greedy, &[0], &mut scratch), Some(1));
        let penalty = SampleParams { repetition_penalty: 2.0, ..greedy };
        assert_eq!(sample(&[1.0, 3.0, 2.9, -1.0], &penalty, &[0b0010], &mut scratch), Some(2));
        assert_eq!(sample(&[-1.0, -0.9, -5.0, -7.0], &penalty, &[0b0010], &mut scratch), Some(0));
    }

    /// Draws over many positions follow the probabilities: a chi-square far below what a wrong order,
    /// a reused number or a missing token would give.
    #[test]
    fn draws_follow_the_distribution() {
        let logits = [0.0f32, 1.0, 2.0, -1.0, 0.5];
        let total: f64 = logits.iter().map(|l| (*l as f64).exp()).sum();
        let mut counts = [0f64; 5];
        let mut scratch = [Candidate { score: 0.0, id: 0 }; 5];
        const DRAWS: u32 = 40_000;
        for position in 0..DRAWS {
            let params = SampleParams { position, ..PLAIN };
            counts[sample(&logits, &params, &[0], &mut scratch).unwrap() as usize] += 1.0;
        }
        let chi: f64 = logits
            .iter()
            .zip(counts)
            .map(|(l, n)| {
                let expected = DRAWS as f64 * (*l as f64).exp() / total;
                (n - expected).powi(2) / expected
            })
            .sum();
        println!("chi-square with 4 degrees of freedom: {chi:.2}");
        assert!(chi < 23.5, "chi-square {chi}: p < 1e-4");
    }
}
