//! `tessera profile`: one run, node by node.

use super::options::{ModelArgs, SessionArgs};
use crate::bench::report::Subject;
use crate::bench::roofline;
use crate::bench::trace::{self, Event, OpTime, Track};
use crate::error::{Error, Result};
use crate::graph::{Control, Executor, Span};
use crate::runtime::{Engine, Request};
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
        // Once without a watch, so that nothing is done for the first time; once with one.
        self.answer(&mut engine, picture.as_deref(), self.max_tokens.min(2))?;
        let ceilings = engine.model().ceilings()?;
        let nodes = |executor: Option<&Executor>| executor.map_or(0, |e| e.graph().nodes.len());
        let session = engine.session();
        let most = nodes(Some(session.language())).max(nodes(session.vision()));
        let steps = session.context().div_ceil(session.prefill_chunk()) + self.max_tokens + 1;
        engine.forget();
        engine.session_mut().trace(most * steps);
        let epoch = Instant::now();
        let stages = self.answer(&mut engine, picture.as_deref(), self.max_tokens)?;
        let total = epoch.elapsed();

        let session = engine.session();
        let executors: Vec<&Executor> = session.vision().into_iter().chain([session.language()]).collect();
        let mut events = stages.events(epoch);
        for executor in &executors {
            events.extend(trace::events(executor, epoch, |span| step_name(executor, span)));
        }
        let mut ops: Vec<OpTime> = executors.iter().flat_map(|e| trace::summary(e, ceilings)).collect();
        ops.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));

        let subject = Subject::new(engine.model(), load.load_mode, session.prefill_chunk());
        if let Some(path) = &self.output {
            let file = std::fs::File::create(path).map_err(|error| Error::io(path, error))?;
            serde_json::to_writer(std::io::BufWriter::new(file), &trace::chrome(&subject, &events))
                .map_err(|error| Error::io(path, error.into()))?;
        }
        if let Some(path) = &self.svg {
            let Some(ceilings) = ceilings else {
                return Err(Error::option(
                    "--svg",
                    "a device that is timed",
                    engine.model().backend().describe(),
                ));
            };
            let title = format!("{} on {}", subject.model_filename, subject.backends);
            std::fs::write(path, roofline::svg(&title, &ops, ceilings))
                .map_err(|error| Error::io(path, error))?;
        }
        if self.summary || (self.output.is_none() && self.svg.is_none()) {
            super::print(&trace::table(&ops))?;
        }
        let spans: usize = executors.iter().map(|e| e.spans().len()).sum();
        let each = cost_of_a_span();
        super::say(format_args!(
            "{spans} spans at {:.0} ns: {:.3} % of the run's {:.1} ms",
            each * 1e9,
            100.0 * each * spans as f64 / total.as_secs_f64(),
            total.as_secs_f64() * 1e3
        ));
        Ok(())
    }

    /// Answers the question, and says when the stages before the graphs began and ended.
    fn answer(&self, engine: &mut Engine, picture: Option<&[u8]>, max_tokens: usize) -> Result<Stages> {
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
        let request = Request::ask(&self.prompt, &images)?;
        engine.generate(&Request { max_tokens: Some(max_tokens), ignore_eos: true, ..request }, |_| {})?;
        Ok(stages)
    }
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

/// Seconds that writing down a span takes, measured on many.
fn cost_of_a_span() -> f64 {
    const MANY: u32 = 100_000;
    let control = Control::default();
    let mut spans: Vec<(Instant, Instant)> = Vec::with_capacity(MANY as usize);
    let begin = Instant::now();
    for _ in 0..MANY {
        let start = Instant::now();
        std::hint::black_box(control.is_cancelled());
        spans.push((start, Instant::now()));
    }
    std::hint::black_box(&spans);
    begin.elapsed().as_secs_f64() / f64::from(MANY)
}
