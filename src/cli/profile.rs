//! `tessera profile`: one run, node by node.

use super::options::{ModelArgs, SessionArgs};
use crate::bench::roofline;
use crate::bench::stats::{self, Ratio};
use crate::bench::subject::Subject;
use crate::bench::trace::{self, Event, OpTime, Track};
use crate::error::{Error, Result};
use crate::graph::{Executor, Span};
use crate::input::prompt::Message;
use crate::runtime::{Engine, Input, Request};
use clap::Args;
use serde_json::json;
use std::path::PathBuf;
use std::time::Instant;

/// Options of `tessera profile`.
#[derive(Debug, Args)]
pub struct Profile {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    session: SessionArgs,
    /// A picture to ask about
    #[arg(long, value_name = "FILE")]
    image: Option<PathBuf>,
    /// The question
    #[arg(long, value_name = "TEXT", default_value = "What is in this picture?")]
    prompt: String,
    /// Tokens to generate
    #[arg(long, value_name = "N", default_value_t = 16)]
    max_tokens: usize,
    /// Write a trace for Perfetto or chrome://tracing
    #[arg(short = 'o', long, value_name = "FILE.json")]
    output: Option<PathBuf>,
    /// Print calls, time, share and distance from the ceiling of every op; what is done without -o and --svg
    #[arg(long)]
    summary: bool,
    /// Draw a roofline plot
    #[arg(long, value_name = "FILE.svg")]
    svg: Option<PathBuf>,
}

impl Profile {
    pub fn run(self) -> Result<()> {
        let (source, load) = self.model.load_options()?;
        let mut engine = Engine::load(&source, &load, self.session.session_options())?;
        super::ask::stop_on_ctrl_c(&engine.control)?;
        let picture = self.image.as_deref().map(super::read).transpose()?;
        let spans = self.spans(&engine, picture.as_deref())?;
        // Once without a watch, so that nothing is done for the first time.
        self.answer(&mut engine, picture.as_deref())?;
        let ceilings = engine.model().ceilings()?;
        if let (None, Some(_)) = (ceilings, &self.svg) {
            return Err(Error::option(
                "--svg",
                "a device that is timed",
                engine.model().backend().describe(),
            ));
        }
        let (run, overhead) = self.by_turns(&mut engine, picture.as_deref(), spans, ceilings.is_some())?;

        let session = engine.session();
        let executors: Vec<&Executor> = session.vision().into_iter().chain([session.language()]).collect();
        let mut events = run.stages.events(run.epoch);
        for executor in &executors {
            events.extend(trace::events(executor, run.epoch, |span| step_name(executor, span)));
        }
        events.extend(trace::threads(&engine.model().backend().thread_parts(), run.epoch, &events));
        let mut ops: Vec<OpTime> =
            executors.iter().flat_map(|e| trace::summary(e, ceilings, |_| true)).collect();
        ops.sort_by(|a, b| b.seconds.unwrap_or(0.0).total_cmp(&a.seconds.unwrap_or(0.0)));

        let subject = Subject::new(engine.model(), load.load_mode, session.prefill_chunk());
        if let Some(path) = &self.output {
            let file = std::fs::File::create(path).map_err(|error| Error::io(path, error))?;
            serde_json::to_writer(std::io::BufWriter::new(file), &trace::chrome(&subject, &events))
                .map_err(|error| Error::io(path, error.into()))?;
        }
        if let Some((path, ceilings)) = self.svg.as_ref().zip(ceilings) {
            let title = format!("{} on {}", subject.model_filename, subject.device);
            std::fs::write(path, roofline::svg(&title, &ops, ceilings))
                .map_err(|error| Error::io(path, error))?;
        }
        if self.summary || (self.output.is_none() && self.svg.is_none()) {
            super::print(&trace::table(&ops))?;
        }
        let spans: usize = executors.iter().map(|e| e.spans().len()).sum();
        match overhead {
            Some(overhead) => super::say(format_args!("{spans} spans; {overhead}")),
            None => super::say(format_args!("{spans} spans; nothing is timed on this device")),
        }
        Ok(())
    }

    /// Most spans of a graph in one run, which is refused here if it does not fit the context.
    fn spans(&self, engine: &Engine, picture: Option<&[u8]>) -> Result<usize> {
        let sizes = match picture {
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

    /// Runs without and with a watch by turns, for as long as it takes to compare them; the last run, and what
    /// watching costs.
    fn by_turns(
        &self,
        engine: &mut Engine,
        picture: Option<&[u8]>,
        spans: usize,
        timed: bool,
    ) -> Result<(Watched, Option<String>)> {
        let (mut plain, mut watched) = (Vec::new(), Vec::new());
        let begin = Instant::now();
        loop {
            // Each side goes first as often: what runs second finds warmer caches.
            let plain_first = plain.len().is_multiple_of(2);
            if timed && plain_first {
                plain.push(self.unwatched(engine, picture)?);
            }
            watch(engine, spans);
            let epoch = Instant::now();
            let stages = self.answer(engine, picture)?;
            watched.push(epoch.elapsed().as_secs_f64());
            if !timed {
                return Ok((Watched { epoch, stages }, None));
            }
            if !plain_first {
                plain.push(self.unwatched(engine, picture)?);
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
    fn unwatched(&self, engine: &mut Engine, picture: Option<&[u8]>) -> Result<f64> {
        watch(engine, 0);
        let start = Instant::now();
        self.answer(engine, picture)?;
        Ok(start.elapsed().as_secs_f64())
    }

    /// Answers the question from nothing, and says when the stages before the graphs began and ended.
    fn answer(&self, engine: &mut Engine, picture: Option<&[u8]>) -> Result<Stages> {
        engine.forget();
        let mut stages = Stages::default();
        let mut images = Vec::new();
        if let Some(bytes) = picture {
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
            event.args = json!({"where": "host, one thread"});
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
    engine.session_mut().trace(spans);
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
