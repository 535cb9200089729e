//! Runs tests on an engine and keeps every sample.
//!
//! Prompts and pictures are drawn anew for each repetition, so that no cache can flatter, and sequences
//! begin empty. Inside the clock: sampling on the device, and for pictures everything from the file's bytes
//! on. Outside: tokenisation and detokenisation, for ids are drawn and not shown.

use super::plan::Test;
use crate::error::Result;
use crate::op::{Cost, KvExtent};
use crate::runtime::{Advance, Engine, Phase, Sampling, Sequence, Want};
use crate::tensor::Bindings;
use image::codecs::jpeg::JpegEncoder;
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
    pub steps: Vec<Cost>,
    /// Ops that were started in one repetition.
    pub launches: usize,
    /// Whether recorded launches were replayed.
    pub replayed: bool,
}

/// Side lengths of the pictures that are drawn.
const PICTURE: (u32, u32) = (1024, 768);

/// Runs a test: `warmups` repetitions that are forgotten, then `repetitions`. `encoded` pictures replace
/// the drawn ones if given.
///
/// # Errors
/// Whatever the engine says; [`Error::Cancelled`](crate::Error::Cancelled).
pub fn measure(
    engine: &mut Engine,
    test: Test,
    (warmups, repetitions): (usize, usize),
    picture: Option<&[u8]>,
) -> Result<Measured> {
    let mut all = Measured::default();
    for repetition in 0..warmups + repetitions {
        let mut run = Run { engine, random: Random(repetition as u64), done: Measured::default() };
        let seconds = run.test(test, picture)?;
        let done = run.done;
        if repetition < warmups {
            continue;
        }
        all.samples.push(seconds);
        for (name, times) in done.latencies {
            match all.latencies.iter_mut().find(|(known, _)| *known == name) {
                Some((_, known)) => known.extend(times),
                None => all.latencies.push((name, times)),
            }
        }
        (all.units, all.steps, all.launches) = (done.units, done.steps, done.launches);
    }
    let session = engine.session();
    all.replayed = match test {
        Test::Image { .. } | Test::FirstToken { .. } => {
            session.vision().is_some_and(|vision| vision.replays())
        }
        Test::Text { .. } => session.language().replays(),
    };
    Ok(all)
}

/// One repetition.
struct Run<'a> {
    engine: &'a mut Engine,
    random: Random,
    done: Measured,
}

impl Run<'_> {
    fn test(&mut self, test: Test, picture: Option<&[u8]>) -> Result<f64> {
        match test {
            Test::Image { images } => {
                self.done.units = images;
                self.images(images, picture).map(|(time, _)| time.as_secs_f64())
            }
            Test::Text { prompt, generate, depth, batch } => self.text(prompt, generate, depth, batch),
            Test::FirstToken { images, prompt } => self.first_token(images, prompt, picture),
        }
    }

    /// Encodes pictures; how long it took from their bytes on, and the pictures.
    fn images(
        &mut self,
        images: usize,
        picture: Option<&[u8]>,
    ) -> Result<(Duration, Vec<crate::runtime::ImageHandle>)> {
        let files: Vec<Vec<u8>> =
            (0..images).map(|_| picture.map_or_else(|| self.random.picture(), <[u8]>::to_vec)).collect();
        let mut total = Duration::ZERO;
        let mut handles = Vec::new();
        for file in files {
            let start = Instant::now();
            let image = self.engine.image("a picture", &file)?;
            total += start.elapsed();
            let times = image.timings;
            self.latency("decode", times.decode);
            self.latency("resize", times.preprocess);
            self.latency("vision", times.vision);
            self.latency("projector", times.projector);
            let image_size = (image.width, image.height);
            handles.push(image);
            self.count_picture(image_size);
        }
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
            self.done.steps.push(graph.cost(nodes.clone(), &bindings, KvExtent::default()));
            self.done.launches += nodes.len();
        }
        if let Some(node) = assembly {
            let tokens = model.config().image_tokens(width, height);
            let bindings = Bindings { tokens, ..Bindings::default() };
            self.done.steps.push(graph.cost(node..node + 1, &bindings, KvExtent::default()));
            self.done.launches += 1;
        }
    }

    fn text(&mut self, prompt: usize, generate: usize, depth: usize, batch: usize) -> Result<f64> {
        // Without a prompt the first generated token needs one token to follow.
        let ids = depth + prompt.max(1);
        let mut sequences = Vec::new();
        for _ in 0..batch {
            let ids = self.random.ids(ids, self.vocab());
            sequences.push(self.engine.session().sequence(&ids, Vec::new(), Sampling::GREEDY)?);
        }
        if depth > 0 {
            self.prefill(&mut sequences, prompt.max(1))?;
            (self.done.steps, self.done.launches) = (Vec::new(), 0);
        }
        self.done.units = batch * (prompt + generate);
        let start = Instant::now();
        let mut left = generate;
        if prompt > 0 {
            let next = self.prefill(&mut sequences, 0)?;
            let first = start.elapsed();
            if generate > 0 {
                self.latency("TTFT", first);
                sequences.iter_mut().zip(next).for_each(|(sequence, id)| sequence.push(id));
                left -= 1;
            }
        }
        let decode = Instant::now();
        for _ in 0..left {
            let token = Instant::now();
            let next = self.advance(&mut sequences)?;
            sequences.iter_mut().zip(next).for_each(|(sequence, id)| sequence.push(id));
            self.latency("ITL", token.elapsed());
        }
        if left > 0 {
            self.latency("TPOT", decode.elapsed() / left as u32);
        }
        Ok(start.elapsed().as_secs_f64())
    }

    fn first_token(&mut self, images: usize, prompt: usize, picture: Option<&[u8]>) -> Result<f64> {
        let (time, handles) = self.images(images, picture)?;
        let image_token = self.engine.model().config().image_token_id.unwrap_or(0);
        let (mut ids, mut spans) = (Vec::new(), Vec::new());
        for image in handles {
            let begin = ids.len();
            ids.resize(begin + image.encoded.len, image_token);
            spans.push((begin..ids.len(), image.encoded.clone()));
        }
        ids.extend(self.random.ids(prompt, self.vocab()));
        self.done.units = ids.len();
        let start = Instant::now();
        let sequence = self.engine.session().sequence(&ids, spans, Sampling::GREEDY)?;
        self.prefill(&mut [sequence], 0)?;
        let prefill = start.elapsed();
        self.latency("prefill", prefill);
        self.latency("TTFT", time + prefill);
        Ok((time + prefill).as_secs_f64())
    }

    /// Processes pending ids until `keep` are left in every sequence; the tokens chosen after them, if none is.
    fn prefill(&mut self, sequences: &mut [Sequence], keep: usize) -> Result<Vec<u32>> {
        let mut next = vec![0; sequences.len()];
        loop {
            let mut budget = self.engine.session().prefill_chunk();
            let (mut advances, mut owners) = (Vec::new(), Vec::new());
            for (owner, sequence) in sequences.iter_mut().enumerate() {
                let pending = sequence.pending() - keep;
                let tokens = pending.min(budget);
                budget -= tokens;
                if tokens > 0 {
                    let want = if keep == 0 && tokens == pending { Want::Next } else { Want::Nothing };
                    advances.push(Advance { sequence, tokens, want, phase: Phase::Prefill });
                    owners.push((owner, want));
                }
            }
            if advances.is_empty() {
                return Ok(next);
            }
            self.step(&mut advances)?;
            for (i, (owner, want)) in owners.into_iter().enumerate() {
                if want == Want::Next {
                    next[owner] = self.engine.session().next(i);
                }
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
        let session = self.engine.session();
        self.done.steps.push(session.step_cost());
        self.done.launches += session.language().graph().nodes.len();
        Ok(())
    }

    fn latency(&mut self, name: &'static str, time: Duration) {
        let latencies = &mut self.done.latencies;
        let at = latencies.iter().position(|(known, _)| *known == name).unwrap_or_else(|| {
            latencies.push((name, Vec::new()));
            latencies.len() - 1
        });
        latencies[at].1.push(time.as_secs_f64());
    }

    fn vocab(&self) -> u32 {
        self.engine.model().config().text.vocab_size as u32
    }
}

/// Numbers from a seed: splitmix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn ids(&mut self, n: usize, vocab: u32) -> Vec<u32> {
        (0..n).map(|_| (self.next() % u64::from(vocab)) as u32).collect()
    }

    /// A JPEG with the detail of a photograph: gradients under noise.
    fn picture(&mut self) -> Vec<u8> {
        let (width, height) = PICTURE;
        let slopes = [self.next() as u32 % 255, self.next() as u32 % 255, self.next() as u32 % 255];
        let mut rgb = Vec::with_capacity((width * height * 3) as usize);
        for y in 0..height {
            for x in 0..width {
                let noise = self.next();
                for (c, slope) in slopes.iter().enumerate() {
                    let base = (x * slope / width + y * (255 - slope) / height) as u64;
                    rgb.push((base * 7 / 8 + (noise >> (8 * c)) % 32) as u8);
                }
            }
        }
        let mut file = Vec::new();
        let encoded = JpegEncoder::new_with_quality(&mut file, 90).encode(
            &rgb,
            width,
            height,
            image::ExtendedColorType::Rgb8,
        );
        encoded.expect("a picture in memory of valid size");
        file
    }
}
