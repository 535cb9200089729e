//! The rotary embedding's frequencies, as transformers computes them: in f32, with the scalings
//! that LLaMA checkpoints use.

use crate::error::Result;
use crate::model::json::Section;
use std::f32::consts::PI;
use std::fmt;

/// How fast the pairs of columns of a head turn.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// The base of the frequencies.
    pub theta: f32,
    /// What is done to them to reach longer contexts.
    pub scaling: RopeScaling,
}

/// A rope scaling. All are fixed when the model is loaded; those that depend on the length of a
/// sequence (dynamic, yarn, longrope) are refused.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// None.
    Default,
    /// Every frequency is divided by the factor.
    Linear {
        /// The divisor.
        factor: f32,
    },
    /// Llama 3: long waves are divided by the factor, short ones kept, those between blended.
    Llama3 {
        /// The divisor of waves longer than `original_positions / low_freq_factor`.
        factor: f32,
        /// See `factor`.
        low_freq_factor: f32,
        /// Waves shorter than `original_positions / high_freq_factor` are kept.
        high_freq_factor: f32,
        /// The context before it was stretched.
        original_positions: f32,
    },
}

impl fmt::Display for Rope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rotary base {}", self.theta)?;
        match self.scaling {
            RopeScaling::Default => Ok(()),
            RopeScaling::Linear { factor } => write!(f, ", linear scaling by {factor}"),
            RopeScaling::Llama3 { factor, original_positions, .. } => {
                write!(f, ", llama3 scaling by {factor} from {original_positions} positions")
            }
        }
    }
}

/// Larger than any rope setting in the wild, far below what overflows f32.
const MOST: f64 = 1e12;

impl Rope {
    /// Reads `rope_theta` and one of two sections, as transformers 5 does: `rope_scaling`, its older name, if there
    /// is anything in it, else `rope_parameters`. Within it stands the base that counts, or else beside it.
    /// `max_positions` is what a scaling takes for the context before it was stretched if it does not say.
    pub(super) fn parse(text: &Section, max_positions: usize) -> Result<Self> {
        check_whole(text)?;
        let theta = text.positive("rope_theta", 10_000.0, MOST)?;
        let section = match text.child("rope_scaling", "rope_scaling.")? {
            Some(section) if !section.map().is_empty() => Some(section),
            _ => text.child("rope_parameters", "rope_parameters.")?,
        };
        let Some(section) = section else {
            return Ok(Rope { theta: theta as f32, scaling: RopeScaling::Default });
        };
        check_whole(&section)?;
        Ok(Rope {
            theta: section.positive("rope_theta", theta, MOST)? as f32,
            scaling: RopeScaling::parse(&section, max_positions)?,
        })
    }

    /// One frequency for each of the `head_dim / 2` pairs, in radians per position.
    pub fn inv_freq(&self, head_dim: usize) -> Vec<f32> {
        let turn = |pair: usize| {
            let exponent = (2 * pair) as f32 / head_dim as f32;
            // The power in f64, rounded once: f32 `powf` differs between C libraries in the last bit.
            1.0 / f64::from(self.theta).powf(f64::from(exponent)) as f32
        };
        (0..head_dim / 2).map(turn).map(|frequency| self.scaling.apply(frequency)).collect()
    }
}

/// Refuses an embedding that turns a part of the columns only.
fn check_whole(section: &Section) -> Result<()> {
    const KEY: &str = "partial_rotary_factor";
    match section.positive(KEY, 1.0, 1.0)? {
        1.0 => Ok(()),
        _ => Err(section.error(KEY, "1")),
    }
}

impl RopeScaling {
    fn parse(section: &Section, max_positions: usize) -> Result<Self> {
        const ORIGINAL: &str = "original_max_position_embeddings";
        let key = section.alias("rope_type", "type")?;
        let number = |key: &str| match section.get(key) {
            Some(_) => Ok(section.positive(key, 1.0, MOST)? as f32),
            None => Err(section.error(key, "a number above 0")),
        };
        match section.string(key)?.unwrap_or("default") {
            "default" => Ok(RopeScaling::Default),
            "linear" => Ok(RopeScaling::Linear { factor: number("factor")? }),
            "llama3" => {
                let (low, high) = (number("low_freq_factor")?, number("high_freq_factor")?);
                if low >= high {
                    return Err(section.error("high_freq_factor", format!("above low_freq_factor, {low}")));
                }
                Ok(RopeScaling::Llama3 {
                    factor: number("factor")?,
                    low_freq_factor: low,
                    high_freq_factor: high,
                    original_positions: section.positive(ORIGINAL, max_positions as f64, MOST)? as f32,
                })
            }
            _ => Err(section.error(key, "`default`, `linear` or `llama3`")),
        }
    }

    /// The scaled frequency; transformers' `_compute_llama3_parameters` for Llama 3.
    fn apply(&self, frequency: f32) -> f32 {
        match *self {
            RopeScaling::Default => frequency,
            RopeScaling::Linear { factor } => frequency / factor,
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_positions } => {
                let wavelength = 2.0 * PI / frequency;
                if wavelength > original_positions / low_freq_factor {
                    frequency / factor
                } else if wavelength < original_positions / high_freq_factor {
                    frequency
                } else {
                    let smooth = (original_positions / wavelength - low_freq_factor)
                        / (high_freq_factor - low_freq_factor);
                    (1.0 - smooth) * frequency / factor + smooth * frequency
                }
            }
        }
    }
}
