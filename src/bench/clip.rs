//! Runs tests on a CLIP by itself, as [`measure`](super::measure) does on an engine: inside the clock is everything
//! from a picture's bytes or a text's ids to a vector.

use super::drawn::Random;
use super::measure::{Measured, Step, repeat};
use super::plan::Test;
use crate::error::{Error, Result};
use crate::graph::Executor;
use crate::input::image::{DecodeOptions, decode};
use crate::op::KvExtent;
use crate::runtime::Clip;
use std::borrow::Cow;
use std::time::{Duration, Instant};

/// Runs a test as [`measure`](super::measure::measure) does. A given `picture` is encoded as it is: a CLIP keeps none.
///
/// # Errors
/// Whatever the model says; [`Error::Prompt`] for a test that no CLIP can run, or a tower that this one lacks.
pub fn measure(
    clip: &mut Clip,
    test: Test,
    repetitions: (usize, usize),
    picture: Option<&[u8]>,
) -> Result<Measured> {
    repeat(repetitions, |repetition| {
        let mut random = Random::of(test, repetition);
        let mut done = Measured::default();
        let time = match test {
            Test::Image { images } => {
                let mut total = Duration::ZERO;
                for _ in 0..images {
                    let file = picture.map_or_else(|| Cow::Owned(random.picture()), Cow::Borrowed);
                    total += encode_picture(clip, &file, &mut done)?;
                }
                total
            }
            Test::Caption { tokens } => encode_text(clip, tokens, &mut random, &mut done)?,
            Test::Text { .. } | Test::FirstToken { .. } => {
                return Err(Error::Prompt(format!("{} writes no text", clip.name())));
            }
        };
        Ok((time.as_secs_f64(), done))
    })
}

/// From the bytes of a picture to its vector.
fn encode_picture(clip: &mut Clip, file: &[u8], done: &mut Measured) -> Result<Duration> {
    let start = Instant::now();
    let picture = decode("a picture", file, &DecodeOptions::default())?;
    let decoded = start.elapsed();
    clip.picture(&picture)?;
    let time = start.elapsed();
    done.latency("decode", [decoded.as_secs_f64()]);
    done.latency("encode", [(time - decoded).as_secs_f64()]);
    count(clip.vision_tower()?, 1, done);
    Ok(time)
}

/// From drawn ids between those that begin and end a text to its vector.
fn encode_text(clip: &mut Clip, tokens: usize, random: &mut Random, done: &mut Measured) -> Result<Duration> {
    let mut ids = clip.tokens("")?.ids;
    // What ends a text has the largest id, or is looked for: no id before it may be as large.
    let end = ids.last().copied().unwrap_or_default().max(1);
    ids.splice(1..1, random.ids(tokens.saturating_sub(ids.len()), end));
    // Built before the clock starts, if it is the first of this length.
    clip.text_tower(ids.len())?;
    let start = Instant::now();
    clip.ids(&ids)?;
    let time = start.elapsed();
    count(clip.text_tower(ids.len())?, ids.len(), done);
    Ok(time)
}

/// Counts one run of a tower, which encodes so many units.
fn count(tower: &Executor, units: usize, done: &mut Measured) {
    let nodes = tower.graph().nodes.len();
    done.steps.push(Step::new(tower.graph(), 0..nodes, &tower.plan().max, KvExtent::default()));
    done.launches += nodes;
    done.units += units;
}
