//! Runs tests on an engine and keeps every sample.
//!
//! Prompts and pictures are drawn anew for each repetition, so that no cache can flatter, and sequences
//! begin empty; what came from a cache all the same is counted. Inside the clock: sampling on the device, and for
//! pictures everything from the file's bytes on. Outside: tokenisation and detokenisation, for ids are drawn and
//! not shown, and all counting.

use super::drawn::{Random, vary};
use super::plan::Test;
use crate::backend::{Counts, WorkingSet};
use crate::error::{Error, Result};
use crate::graph::{Executor, Graph};
use crate::op::{Cost, KvExtent};
use crate::runtime::{Advance, Engine, ImageHandle, Phase, Sampling, Sequence, Want};
use crate::tensor::Bindings;
use std::ops::Range;
use std::time::{Duration, Instant};

/// What the repetitions of a test gave. Times are in seconds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Measured {
    /// One for each repetition: how long its units took.
    pub samples: Vec<f64>,
    /// Tokens, or pictures, of one repetition.
    pub units: usize,
    /// Times of single events over all repetitions, by name: stages of a picture, TTFT, TPOT, ITL.
    pub latencies: Vec<(&'static str, Vec<f64>)>,
    /// The work of each step of one repetition.
    pub steps: Vec<Step>,
    /// Ops that were started in one repetition.
    pub launches: usize,
    /// How many recordings were replayed inside the clock of one repetition.
    pub replays: usize,
    /// What the device counted inside the clock of one repetition, where it counts.
    pub counts: Option<Counts>,
    /// Pictures and tokens that came from a cache, over all repetitions: 0, or the times flatter.
    pub cache_hits: usize,
}

impl Measured {
    /// Adds times of an event.
    pub(super) fn latency(&mut self, name: &'static str, seconds: impl IntoIterator<Item = f64>) {
        match self.latencies.iter_mut().find(|(known, _)| *known == name) {
            Some((_, known)) => known.extend(seconds),
            None => self.latencies.push((name, seconds.into_iter().collect())),
        }
    }
}

/// The work of a step, and what it uses again and again.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Step {
    /// What is done.
    pub cost: Cost,
    /// Among which bytes.
    pub set: WorkingSet,
}

impl Step {
    /// Some nodes of a graph on bound shapes. A step goes through all weights of its graph; what one op makes
    /// the next one uses.
    pub(super) fn new(graph: &Graph, nodes: Range<usize>, bindings: &Bindings, kv: KvExtent) -> Self {
        let mut step =
            Step { set: WorkingSet { stored: graph.weight_bytes(), passing: 0 }, ..Step::default() };
        for node in nodes {
            let cost = graph.cost(node..node + 1, bindings, kv);
            step.cost += cost;
            step.set.passing = step.set.passing.max(cost.bytes - cost.stored);
        }
        step
    }
}

/// Runs a test: `warmups` repetitions that are forgotten, then `repetitions`. Variations of an encoded `picture`
/// replace the drawn ones if given.
///
/// # Errors
/// Whatever the engine says; [`Error::Cancelled`].
pub fn measure(
    engine: &mut Engine,
    test: Test,
    repetitions: (usize, usize),
    picture: Option<&[u8]>,
) -> Result<Measured> {
    repeat(repetitions, |repetition| {
        let random = Random::of(test, repetition);
        let mut run =
            Run { engine, random, picture, repetition, asked: Vec::new(), done: Measured::default() };
        let seconds = run.test(test)?;
        Ok((seconds, run.finish()))
    })
}

/// Puts together what the repetitions of a test give, each its seconds and the rest, but for warm-ups.
pub(super) fn repeat(
    (warmups, repetitions): (usize, usize),
    mut run: impl FnMut(usize) -> Result<(f64, Measured)>,
) -> Result<Measured> {
    let mut all = Measured::default();
    for repetition in 0..warmups + repetitions {
        let (seconds, done) = run(repetition)?;
        all.cache_hits += done.cache_hits;
        if repetition < warmups {
            continue;
        }
        all.samples.push(seconds);
        for (name, times) in done.latencies {
            all.latency(name, times);
        }
        (all.units, all.steps, all.launches) = (done.units, done.steps, done.launches);
        (all.replays, all.counts) = (done.replays, done.counts);
    }
    Ok(all)
}

/// TTFT, ITL and TPOT of an answer, as vLLM defines them, by the times from the request until each token: until
/// the first, between two, and the mean of those between; the latter two are empty for one token.
pub fn token_times(tokens: &[Duration]) -> (Duration, Vec<Duration>, Option<Duration>) {
    let between: Vec<_> = tokens.windows(2).map(|pair| pair[1] - pair[0]).collect();
    let mean = (!between.is_empty()).then(|| between.iter().sum::<Duration>() / between.len() as u32);
    (tokens.first().copied().unwrap_or_default(), between, mean)
}

/// One repetition.
struct Run<'a> {
    engine: &'a mut Engine,
    random: Random,
    picture: Option<&'a [u8]>,
    repetition: usize,
    /// Steps of the language graph inside the clock; what they cost is worked out after it has stopped.
    asked: Vec<(Bindings, KvExtent)>,
    done: Measured,
}

impl Run<'_> {
    fn test(&mut self, test: Test) -> Result<f64> {
        match test {
            Test::Image { images } => {
                self.done.units = images;
                self.images(images).map(|(time, _)| time.as_secs_f64())
            }
            Test::Text { prompt, generate, depth, batch } => self.text(prompt, generate, depth, batch),
            Test::FirstToken { images, prompt } => self.first_token(images, prompt),
            Test::Caption { .. } => Err(Error::Prompt("only a CLIP makes a vector of a text".into())),
        }
    }

    /// Counts the work of the steps.
    fn finish(mut self) -> Measured {
        let graph = self.engine.session().language().graph();
        for (bindings, kv) in &self.asked {
            self.done.steps.push(Step::new(graph, 0..graph.nodes.len(), bindings, *kv));
            self.done.launches += graph.nodes.len();
        }
        self.done
    }

    /// Replays of both graphs, and what the device counted, so far.
    fn mark(&self) -> (usize, Option<Counts>) {
        let session = self.engine.session();
        let replays = session.language().replayed() + session.vision().map_or(0, Executor::replayed);
        (replays, self.engine.model().backend().counts())
    }

    /// Adds what was done since a mark.
    fn add_since(&mut self, (replays, counts): (usize, Option<Counts>)) {
        let now = self.mark();
        self.done.replays += now.0 - replays;
        if let Some((now, before)) = now.1.zip(counts) {
            *self.done.counts.get_or_insert_default() += now.since(before);
        }
    }

    /// Encodes pictures; how long it took from their bytes on, and the pictures.
    fn images(&mut self, images: usize) -> Result<(Duration, Vec<ImageHandle>)> {
        let mut total = Duration::ZERO;
        let mut handles = Vec::new();
        let before = self.mark();
        for i in 0..images {
            let drawn;
            let file: &[u8] = match self.picture {
                Some(file) => file,
                None => {
                    drawn = self.random.picture();
                    &drawn[..]
                }
            };
            let mut decoded = self.engine.decode("a picture", file)?;
            if self.picture.is_some() {
                vary(&mut decoded.picture, self.repetition * images + i + 1);
            }
            let start = Instant::now();
            let image = self.engine.encode(&decoded)?;
            total += decoded.time + start.elapsed();
            let times = image.timings;
            self.done.cache_hits += usize::from(times.vision.is_zero());
            self.latency("decode", times.decode);
            self.latency("resize", times.preprocess);
            self.latency("vision", times.vision);
            self.latency("projector", times.projector);
            self.count_picture((image.width, image.height));
            handles.push(image);
        }
        self.add_since(before);
        Ok((total, handles))
    }

    /// Counts the work of a picture's squares, which go through the vision graph in batches.
    fn count_picture(&mut self, (width, height): (usize, usize)) {
        let (session, model) = (self.engine.session(), self.engine.model());
        let (Some(vision), Ok(preprocess)) = (session.vision(), model.preprocess()) else { return };
        let assembly =
            model.vision().and_then(|vision| vision.assembly.as_ref()).map(|assembly| assembly.node);
        let graph = vision.graph();
        let (nodes, batch) = (0..assembly.unwrap_or(graph.nodes.len()), vision.plan().max.images);
        let mut left = preprocess.squares(width, height);
        while left > 0 {
            let images = left.min(batch);
            left -= images;
            let bindings = Bindings { images, ..Bindings::default() };
            self.done.steps.push(Step::new(graph, nodes.clone(), &bindings, KvExtent::default()));
            self.done.launches += nodes.len();
        }
        if let Some(node) = assembly {
            let tokens = model.config().image_tokens(width, height);
            let bindings = Bindings { tokens, ..Bindings::default() };
            self.done.steps.push(Step::new(graph, node..node + 1, &bindings, KvExtent::default()));
            self.done.launches += 1;
        }
    }

    fn text(&mut self, prompt: usize, generate: usize, depth: usize, batch: usize) -> Result<f64> {
        // Without a prompt the first generated token needs one token to follow.
        let ids = depth + prompt.max(1);
        let mut sequences = Vec::new();
        for _ in 0..batch {
            let ids = self.random.ids(ids, self.vocab());
            sequences.push(self.sequence(&ids, Vec::new())?);
        }
        if depth > 0 {
            self.prefill(&mut sequences, prompt.max(1), Instant::now())?;
            self.asked.clear();
            // A device may still be at it; what follows must not wait for it inside the clock.
            self.engine.model().backend().synchronize()?;
        }
        self.done.units = batch * (prompt + generate);
        let mut tokens: Vec<Vec<Duration>> = vec![Vec::with_capacity(generate + 1); batch];
        let before = self.mark();
        let start = Instant::now();
        if prompt > 0 {
            let next = self.prefill(&mut sequences, 0, start)?;
            for ((sequence, times), (id, time)) in sequences.iter_mut().zip(&mut tokens).zip(next) {
                if generate > 0 {
                    sequence.push(id);
                    times.push(time);
                }
            }
        }
        for _ in 0..generate - usize::from(prompt > 0).min(generate) {
            let next = self.advance(&mut sequences)?;
            let time = start.elapsed();
            for ((sequence, times), id) in sequences.iter_mut().zip(&mut tokens).zip(next) {
                sequence.push(id);
                times.push(time);
            }
        }
        let seconds = start.elapsed().as_secs_f64();
        self.add_since(before);
        for times in tokens.iter().filter(|times| !times.is_empty()) {
            let (first, between, mean) = token_times(times);
            if prompt > 0 {
                self.latency("TTFT", first);
            }
            between.into_iter().for_each(|time| self.latency("ITL", time));
            mean.into_iter().for_each(|time| self.latency("TPOT", time));
        }
        Ok(seconds)
    }

    fn first_token(&mut self, images: usize, prompt: usize) -> Result<f64> {
        let (time, handles) = self.images(images)?;
        let image_token = self.engine.model().config().image_token_id.unwrap_or(0);
        let (mut ids, mut spans) = (Vec::new(), Vec::new());
        for image in handles {
            let begin = ids.len();
            ids.resize(begin + image.encoded.len, image_token);
            spans.push((begin..ids.len(), image.encoded.clone()));
        }
        ids.extend(self.random.ids(prompt, self.vocab()));
        self.done.units = ids.len();
        let before = self.mark();
        let start = Instant::now();
        let sequence = self.sequence(&ids, spans)?;
        self.prefill(&mut [sequence], 0, start)?;
        let prefill = start.elapsed();
        self.add_since(before);
        self.latency("prefill", prefill);
        self.latency("TTFT", time + prefill);
        Ok((time + prefill).as_secs_f64())
    }

    fn sequence(
        &mut self,
        ids: &[u32],
        images: Vec<(Range<usize>, std::sync::Arc<crate::runtime::EncodedImage>)>,
    ) -> Result<Sequence> {
        let sequence = self.engine.session().sequence(ids, images, Sampling::GREEDY)?;
        self.done.cache_hits += sequence.cached();
        Ok(sequence)
    }

    /// Processes pending ids until `keep` are left in every sequence: all of them advance together, each by its
    /// share of a step's rows. Of each, if none is kept, the token that follows and when it was there.
    fn prefill(
        &mut self,
        sequences: &mut [Sequence],
        keep: usize,
        start: Instant,
    ) -> Result<Vec<(u32, Duration)>> {
        let mut next = vec![(0, Duration::ZERO); sequences.len()];
        loop {
            let left = |sequence: &Sequence| sequence.pending() - keep;
            let waiting = sequences.iter().filter(|sequence| left(sequence) > 0).count();
            if waiting == 0 {
                return Ok(next);
            }
            let share = (self.engine.session().prefill_chunk() / waiting).max(1);
            let (mut advances, mut owners) = (Vec::new(), Vec::new());
            for (owner, sequence) in sequences.iter_mut().enumerate().filter(|(_, s)| left(s) > 0) {
                let tokens = left(sequence).min(share);
                let last = keep == 0 && tokens == left(sequence);
                let want = if last { Want::Next } else { Want::Nothing };
                advances.push(Advance { sequence, tokens, want, phase: Phase::Prefill });
                owners.push((owner, want));
            }
            self.step(&mut advances)?;
            let time = start.elapsed();
            for (i, (owner, _)) in owners.iter().enumerate().filter(|(_, (_, want))| *want == Want::Next) {
                next[*owner] = (self.engine.session().next(i), time);
            }
        }
    }

    /// One token for every sequence.
    fn advance(&mut self, sequences: &mut [Sequence]) -> Result<Vec<u32>> {
        let mut advances: Vec<_> = sequences
            .iter_mut()
            .map(|sequence| Advance { sequence, tokens: 1, want: Want::Next, phase: Phase::Decode })
            .collect();
        self.step(&mut advances)?;
        Ok((0..advances.len()).map(|i| self.engine.session().next(i)).collect())
    }

    fn step(&mut self, advances: &mut [Advance<'_>]) -> Result<()> {
        let control = self.engine.control.clone();
        self.engine.session_mut().step(advances, &control)?;
        self.asked.push(self.engine.session().last_step());
        Ok(())
    }

    fn latency(&mut self, name: &'static str, time: Duration) {
        self.done.latency(name, [time.as_secs_f64()]);
    }

    fn vocab(&self) -> u32 {
        self.engine.model().config().text.vocab_size as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_times_are_those_of_vllm() {
        let ms = |times: &[u64]| times.iter().map(|&ms| Duration::from_millis(ms)).collect::<Vec<_>>();
        // (end - first) / (n - 1) = (54 - 30) / 2.
        assert_eq!(
            token_times(&ms(&[30, 40, 54])),
            (Duration::from_millis(30), ms(&[10, 14]), Some(Duration::from_millis(12)))
        );
        assert_eq!(token_times(&ms(&[30])), (Duration::from_millis(30), Vec::new(), None));
    }
}
