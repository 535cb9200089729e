//! One answer, node by node, and what it costs to watch it: runs that are watched take turns with runs that are not.

use super::stats::{self, Ratio};
use super::trace::{self, Event, OpTime, Track};
use crate::backend::Ceilings;
use crate::error::Result;
use crate::graph::{Executor, Span, Timing};
use crate::input::prompt::Message;
use crate::runtime::{Engine, Input, Request};
use serde_json::json;
use std::time::Instant;

/// What is asked.
#[derive(Clone, Debug)]
pub struct Question {
    /// A file's bytes, if it is about a picture.
    pub picture: Option<Vec<u8>>,
    /// The text.
    pub prompt: String,
    /// Tokens to generate, no fewer and no more.
    pub max_tokens: usize,
}

/// What the last watched run was, and what watching costs.
#[derive(Clone, Debug)]
pub struct Profile {
    /// What happened, on all tracks.
    pub events: Vec<Event>,
    /// The ops by kind and shape, the longest first.
    pub ops: Vec<OpTime>,
    /// What they are held against, where anything is timed.
    pub ceilings: Option<Ceilings>,
    /// Nodes that ran.
    pub spans: usize,
    /// Whose clock timed them.
    pub clock: Clock,
    /// What watching costs, in words; none where nothing is timed.
    pub overhead: Option<String>,
}

/// Whose time a trace shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    /// Of the processor, which computes.
    Host,
    /// A GPU's own, from mark to mark behind each op; when the step was asked for is the host's time.
    Device,
    /// Nobody's: the emulated device has none.
    Unread,
}

impl Clock {
    /// As a trace spells it.
    pub fn name(self) -> &'static str {
        match self {
            Clock::Host => "host",
            Clock::Device => "device",
            Clock::Unread => "none",
        }
    }
}

impl Question {
    /// Checks that it fits the context and answers it once unwatched: so weights have been read when it is watched.
    ///
    /// # Errors
    /// What [`Engine::admit`] and [`Engine::generate`] say.
    pub fn rehearse(&self, engine: &mut Engine) -> Result<()> {
        self.spans(engine)?;
        self.answer(engine).map(drop)
    }

    /// Answers by turns with and without a watch, for as long as it takes to compare them. `before` are the model's
    /// ceilings, none where nothing is timed: one run is enough there.
    ///
    /// # Errors
    /// As for [`rehearse`](Question::rehearse).
    pub fn profile(&self, engine: &mut Engine, before: Option<Ceilings>) -> Result<Profile> {
        let (run, overhead) = self.by_turns(engine, before.is_some())?;
        let ceilings = Ceilings::around(before, engine.model().ceilings()?);
        let (model, session) = (engine.model(), engine.session());
        let executors: Vec<&Executor> = session.vision().into_iter().chain([session.language()]).collect();
        let mut events = run.stages.events(run.epoch);
        for executor in &executors {
            events.extend(trace::events(executor, run.epoch, |span| step_name(executor, span)));
        }
        events.extend(trace::threads(&model.backend().thread_parts(), run.epoch, &events));
        let mut ops: Vec<OpTime> =
            executors.iter().flat_map(|e| trace::summary(e, ceilings, |_| true)).collect();
        ops.sort_by(|a, b| b.seconds.unwrap_or(0.0).total_cmp(&a.seconds.unwrap_or(0.0)));
        let spans = executors.iter().map(|e| e.spans().len()).sum();
        let clock = match (ceilings, model.backend().threads()) {
            (None, _) => Clock::Unread,
            (_, 0) => Clock::Device,
            _ => Clock::Host,
        };
        Ok(Profile { events, ops, ceilings, spans, clock, overhead })
    }

    /// Most spans of a graph in one run, which is refused here if it does not fit the context.
    fn spans(&self, engine: &Engine) -> Result<usize> {
        let sizes = match &self.picture {
            Some(bytes) => {
                let decoded = engine.decode("the picture", bytes)?;
                vec![(decoded.picture.width, decoded.picture.height)]
            }
            None => Vec::new(),
        };
        let message = Message::prompt(&self.prompt, sizes.len())?;
        let request = self.request(Request::new(Input::Chat(vec![message])));
        engine.admit(&request, &sizes)?;
        let session = engine.session();
        let squares = session.vision().map_or(0, |vision| vision.graph().nodes.len()) * MOST_SQUARES;
        let steps = session.context().div_ceil(session.prefill_chunk()) + self.max_tokens + 1;
        Ok((session.language().graph().nodes.len() * steps).max(squares))
    }

    fn request(&self, request: Request) -> Request {
        Request { max_tokens: Some(self.max_tokens), ignore_eos: true, ..request }
    }

    /// Runs without and with a watch by turns; the last run, and what watching costs.
    fn by_turns(&self, engine: &mut Engine, timed: bool) -> Result<(Watched, Option<String>)> {
        let spans = self.spans(engine)?;
        let (mut plain, mut watched) = (Vec::new(), Vec::new());
        // Where steps are recorded, each side has recorded its own when it has run twice.
        let rehearsals: &[bool] = if engine.model().backend().marks() { &[false, true, true] } else { &[] };
        for watched in rehearsals {
            watch(engine, if *watched { spans } else { 0 });
            self.answer(engine)?;
        }
        let begin = Instant::now();
        loop {
            // Each side goes first as often: what runs second finds warmer caches.
            let plain_first = plain.len().is_multiple_of(2);
            if timed && plain_first {
                plain.push(self.unwatched(engine)?);
            }
            watch(engine, spans);
            let epoch = Instant::now();
            let stages = self.answer(engine)?;
            watched.push(epoch.elapsed().as_secs_f64());
            if !timed {
                return Ok((Watched { epoch, stages }, None));
            }
            if !plain_first {
                plain.push(self.unwatched(engine)?);
                continue;
            }
            // Three pairs at least, unless that takes a minute; then for some seconds, as the cost is small.
            let (pairs, seconds) = (plain.len(), begin.elapsed().as_secs());
            if pairs >= 3 && seconds >= 5 || seconds >= 60 {
                return Ok((Watched { epoch, stages }, Some(overhead(&plain, &watched))));
            }
        }
    }

    /// The seconds of a run that nothing watches.
    fn unwatched(&self, engine: &mut Engine) -> Result<f64> {
        watch(engine, 0);
        let start = Instant::now();
        self.answer(engine)?;
        Ok(start.elapsed().as_secs_f64())
    }

    /// Answers the question from nothing, and says when the stages before the graphs began and ended.
    fn answer(&self, engine: &mut Engine) -> Result<Stages> {
        engine.forget();
        let mut stages = Stages::default();
        let mut images = Vec::new();
        if let Some(bytes) = &self.picture {
            let begin = Instant::now();
            let image = engine.image("the picture", bytes)?;
            let decoded = begin + image.timings.decode;
            stages.0.push(("decode", begin, decoded));
            stages.0.push(("resize", decoded, decoded + image.timings.preprocess));
            images.push(image);
        }
        let request = self.request(Request::ask(&self.prompt, &images)?);
        engine.generate(&request, |_| {})?;
        Ok(stages)
    }
}

/// Squares of one picture that go through the tower, one by one at worst: as many as any tiling makes.
const MOST_SQUARES: usize = 64;

/// A run that was watched.
struct Watched {
    epoch: Instant,
    stages: Stages,
}

/// Stages that run outside the graphs.
#[derive(Default)]
struct Stages(Vec<(&'static str, Instant, Instant)>);

impl Stages {
    fn events(&self, epoch: Instant) -> Vec<Event> {
        let event = |&(name, begin, end): &(&str, Instant, Instant)| {
            let mut event =
                Event::new(name.into(), Track::Stages, trace::us(epoch, begin), trace::us(epoch, end));
            event.args = json!({"where": "host"});
            event
        };
        self.0.iter().map(event).collect()
    }
}

fn step_name(executor: &Executor, span: &Span) -> String {
    let b = &span.bindings;
    match (b.images, b.decode) {
        (images, _) if images > 0 && executor.graph().nodes[span.node].name.starts_with("vision") => {
            format!("vision, {images} image{}", if images == 1 { "" } else { "s" })
        }
        (images, _) if images > 0 => "projector".into(),
        (_, 0) => format!("prefill {}", b.tokens),
        (_, decode) => format!("decode {decode}"),
    }
}

/// Watches both graphs and all threads from now on, or stops.
fn watch(engine: &mut Engine, spans: usize) {
    engine.session_mut().trace(spans, Timing::Running);
    // An op is one run of the pool, or a few.
    engine.model().backend().watch_threads(4 * spans);
}

/// What watching costs, by pairs of runs that took turns.
fn overhead(plain: &[f64], watched: &[f64]) -> String {
    let Ratio { ratio, low, high } = stats::paired_ratio(plain, watched);
    let percent = |ratio: f64| 100.0 * (ratio - 1.0);
    let interval = match plain.len() {
        0..=2 => "fewer than three pairs of runs: no interval".into(),
        pairs => {
            let unseen = if (low..=high).contains(&1.0) { ", which holds 0" } else { "" };
            let (low, high) = (percent(low), percent(high));
            format!("95 % interval {low:+.1} to {high:+.1} %{unseen}, {pairs} pairs by turns")
        }
    };
    let ms = 1e3 * stats::percentile(plain, 50.0);
    format!("watching costs {:+.1} % of {ms:.1} ms ({interval})", percent(ratio))
}
