//! How tokens are chosen: the options a request carries.

use crate::error::{Error, Result};
use crate::op::SampleParams;

/// Sampling options. The default is greedy.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 is greedy, which ignores the four options that follow.
    pub temperature: f32,
    /// Keep the k most probable tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the most probable tokens up to this much probability; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens less probable than this fraction of the most probable one; 0 keeps all.
    pub min_p: f32,
    /// Makes ids of the prompt and of the answer so far less probable; 1 changes nothing. Applies to
    /// greedy decoding too.
    pub repetition_penalty: f32,
    /// With the position of a token, determines the random number that chooses it.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, seed: 0 }
    }
}

impl Sampling {
    /// Greedy decoding.
    pub const GREEDY: Sampling =
        Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, seed: 0 };

    /// Whether no random number is drawn.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }

    /// Checks every option.
    ///
    /// # Errors
    /// [`Error::Option`] naming the first that is out of range.
    pub fn validate(&self) -> Result<()> {
        let check = |name: &str, value: f32, ok: bool, expected: &str| match ok {
            true => Ok(()),
            false => Err(Error::option(name, expected, value)),
        };
        let t = self.temperature;
        check("--temperature", t, t == 0.0 || (1e-4..=1e4).contains(&t), "0 (greedy) or 0.0001 to 10000")?;
        check("--top-p", self.top_p, self.top_p > 0.0 && self.top_p <= 1.0, "above 0, at most 1")?;
        check("--min-p", self.min_p, (0.0..=1.0).contains(&self.min_p), "0 to 1")?;
        let r = self.repetition_penalty;
        check("--repetition-penalty", r, (1e-3..=1e3).contains(&r), "0.001 to 1000")
    }

    /// The parameters for the token at `position`.
    pub fn params(&self, position: usize) -> SampleParams {
        SampleParams {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            seed_low: self.seed as u32,
            seed_high: (self.seed >> 32) as u32,
            position: position as u32,
        }
    }
}

/// `log softmax(logits)[id]` for the ids asked for, in f64, as `(id, log-probability)`: the ids of the
/// `top` largest (ties by id), after the chosen one.
pub fn log_probs(logits: &[f32], chosen: u32, top: usize) -> (f32, Vec<(u32, f32)>) {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
    let sum: f64 = logits.iter().map(|&x| (x as f64 - max).exp()).sum();
    let log_prob = |id: u32| (logits[id as usize] as f64 - max - sum.ln()) as f32;
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    let top = top.min(ids.len());
    let by_logit = |&a: &u32, &b: &u32| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b));
    if top > 0 && top < ids.len() {
        ids.select_nth_unstable_by(top - 1, by_logit);
    }
    ids.truncate(top);
    ids.sort_unstable_by(by_logit);
    (log_prob(chosen), ids.into_iter().map(|id| (id, log_prob(id))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn out_of_range_options_are_named() {
        type Spoil = fn(&mut Sampling);
        let table: [(&str, Spoil); 7] = [
            ("--temperature", |s| s.temperature = -1.0),
            ("--temperature", |s| s.temperature = f32::NAN),
            ("--top-p", |s| s.top_p = 0.0),
            ("--top-p", |s| s.top_p = 1.5),
            ("--min-p", |s| s.min_p = -0.1),
            ("--repetition-penalty", |s| s.repetition_penalty = 0.0),
            ("--repetition-penalty", |s| s.repetition_penalty = f32::INFINITY),
        ];
        assert!(Sampling::default().validate().is_ok());
        for (name, spoil) in table {
            let mut sampling = Sampling::default();
            spoil(&mut sampling);
            let text = sampling.validate().unwrap_err().to_string();
            assert!(text.contains(name), "{text}");
        }
    }

    #[test]
    fn log_probs_sum_to_one_and_are_ordered() {
        let logits = [0.5f32, 2.0, -1.0, 2.0, 0.0];
        let (chosen, top) = log_probs(&logits, 4, 5);
        assert_eq!(top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 3, 0, 4, 2]);
        assert_eq!(top[3], (4, chosen));
        let sum: f64 = top.iter().map(|t| (t.1 as f64).exp()).sum();
        assert!((sum - 1.0).abs() < 1e-6, "{sum}");
        assert_eq!(log_probs(&logits, 0, 2).1.len(), 2);
        assert!(log_probs(&logits, 0, 0).1.is_empty());
    }
}
