//! `tessera bench`: every stage timed, and how far it is from the hardware.

use super::bench_ops::Ops;
use super::options::{ModelArgs, format_size};
use super::startup::Startup;
use crate::backend::Ceilings;
use crate::bench::environment::{Watch, peak_resident};
use crate::bench::format::{Format, write};
use crate::bench::measure::{Measured, measure};
use crate::bench::plan::{Plan, Test, parse_list, parse_pair};
use crate::bench::report::Row;
use crate::bench::subject::Subject;
use crate::bench::{clip, compare};
use crate::error::{Error, Result};
use crate::graph::Control;
use crate::op::PAGE;
use crate::runtime::kv::page_bytes;
use crate::runtime::{Clip, Engine, LoadOptions, Model, Session, SessionOptions, Source};
use clap::{Args, Subcommand};
use serde_json::json;
use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// Options of `tessera bench`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Bench {
    #[command(subcommand)]
    command: Option<BenchCommand>,
    #[command(flatten)]
    model: ModelArgs,
    /// Lengths of prompts, or of a CLIP's texts, which are cut off where its positions end; lists 16,32 and ranges
    /// 128-512+128 or 1-8*2, as everywhere here
    #[arg(short = 'p', long = "n-prompt", visible_alias = "input-len", value_name = "LIST", default_value = "512", value_parser = List::parse)]
    prompt: List,
    /// Numbers of generated tokens
    #[arg(short = 'n', long = "n-gen", visible_alias = "output-len", value_name = "LIST", default_value = "128", value_parser = List::parse)]
    generate: List,
    /// A prompt with tokens generated after it, as -pg 512,128; may be repeated
    #[arg(long = "pg", value_name = "P,N", value_parser = parse_pair)]
    pairs: Vec<(usize, usize)>,
    /// Tokens cached before the clock starts
    #[arg(short = 'd', long = "n-depth", value_name = "LIST", default_value = "0", value_parser = List::parse)]
    depth: List,
    /// Sequences that advance side by side
    #[arg(short = 'b', long = "batch", visible_alias = "batch-size", value_name = "LIST", default_value = "1", value_parser = List::sequences)]
    batch: List,
    /// Numbers of pictures; 0 leaves pictures out
    #[arg(long, value_name = "LIST", default_value = "1", value_parser = List::parse)]
    images: List,
    /// Tokens of text after the pictures, up to the first token
    #[arg(long, value_name = "LIST", default_value = "64", value_parser = List::parse)]
    ttft: List,
    /// A picture file instead of drawn ones
    #[arg(long, value_name = "FILE")]
    image: Option<PathBuf>,
    /// Repetitions that count
    #[arg(short = 'r', long, visible_alias = "num-iters", value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    repetitions: u16,
    /// Repetitions before them
    #[arg(long, value_name = "N", default_value_t = 1)]
    warmup: u16,
    /// Numbers of threads; the model is loaded anew for each [default: --threads]
    #[arg(short = 't', value_name = "LIST", value_parser = List::threads, conflicts_with = "threads")]
    thread_list: Option<List>,
    /// Most prompt positions processed at once
    #[arg(long, value_name = "N", default_value_t = SessionOptions::default().prefill_chunk)]
    prefill_chunk: usize,
    /// Launch every kernel anew, instead of replaying recorded steps as a GPU session does
    #[arg(long)]
    no_replay: bool,
    /// The format on stdout
    #[arg(short = 'o', long = "output", value_enum, default_value_t = Format::Md)]
    output: Format,
    /// A second format, on stderr
    #[arg(long = "oe", visible_alias = "output-err", value_enum, value_name = "FORMAT")]
    output_err: Option<Format>,
    /// Fail (exit 1) if the standard deviation of any row is more than this share of its mean
    #[arg(long, value_name = "SHARE")]
    max_spread: Option<f64>,
    /// Say which test runs
    #[arg(long)]
    progress: bool,
}

#[derive(Debug, Subcommand)]
enum BenchCommand {
    /// Each op at the model's shapes, or one product of given shape
    Ops(Ops),
    /// Two reports side by side; exit 1 on a regression
    Compare(Compare),
    /// From process start to ready and to the first token
    Startup(Startup),
}

/// The arguments of the process, in which two options of `bench` may have one dash before their two letters, as
/// llama-bench writes them.
pub fn llama_bench_spelling(args: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut args: Vec<OsString> = args.collect();
    if args.get(1).is_some_and(|command| command == "bench") {
        for arg in args.iter_mut().filter(|arg| *arg == "-pg" || *arg == "-oe") {
            *arg = format!("-{}", arg.to_string_lossy()).into();
        }
    }
    args
}

/// A list of counts on the command line.
#[derive(Clone, Debug)]
struct List(Vec<usize>);

impl List {
    fn parse(text: &str) -> std::result::Result<List, String> {
        parse_list(text).map(List)
    }

    fn sequences(text: &str) -> std::result::Result<List, String> {
        List::within(text, 1, 4096)
    }

    /// More threads than this only wait for one another.
    fn threads(text: &str) -> std::result::Result<List, String> {
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        List::within(text, 1, 4 * cores)
            .map_err(|error| format!("{error}; this process may use {cores} cores, and four threads on each"))
    }

    fn within(text: &str, least: usize, most: usize) -> std::result::Result<List, String> {
        let list = parse_list(text)?;
        match list.iter().find(|n| !(least..=most).contains(n)) {
            Some(n) => Err(format!("{n} is not from {least} to {most}")),
            None => Ok(List(list)),
        }
    }
}

impl Bench {
    pub fn run(self) -> Result<()> {
        match self.command {
            Some(BenchCommand::Ops(command)) => command.run(),
            Some(BenchCommand::Compare(command)) => command.run(),
            Some(BenchCommand::Startup(command)) => command.run(),
            None => self.bench(),
        }
    }

    fn bench(self) -> Result<()> {
        if let Some(bound) = self.max_spread.filter(|bound| bound.is_nan() || *bound < 0.0) {
            return Err(Error::option("--max-spread", "a share of the mean such as 0.1", bound));
        }
        let plan = Plan {
            prompts: self.prompt.0.clone(),
            generates: self.generate.0.clone(),
            pairs: self.pairs.clone(),
            depths: self.depth.0.clone(),
            batches: self.batch.0.clone(),
            images: self.images.0.clone(),
            first_tokens: self.ttft.0.clone(),
        };
        let picture = self.image.as_deref().map(super::read).transpose()?;
        let (source, load) = self.model.load_options()?;
        let threads: Vec<Option<usize>> = match &self.thread_list {
            Some(list) => list.0.iter().map(|&n| Some(n)).collect(),
            None => vec![load.threads],
        };
        // One for all engines: the signal has one handler.
        let control = Control::default();
        super::ask::stop_on_ctrl_c(&control)?;
        let mut rows = Vec::new();
        for threads in threads {
            rows.extend(self.on_threads(
                &plan,
                &source,
                &LoadOptions { threads, ..load.clone() },
                picture.as_deref(),
                &control,
            )?);
        }
        super::print(&write(&rows, self.output))?;
        if let Some(format) = self.output_err {
            super::say(format_args!("{}", write(&rows, format).trim_end()));
        }
        if let Some(peak) = peak_resident().filter(|_| self.output == Format::Md) {
            super::print(&format!("peak resident memory {}\n", format_size(peak)))?;
        }
        steady(&rows, self.max_spread)
    }

    fn on_threads(
        &self,
        plan: &Plan,
        source: &Source,
        load: &LoadOptions,
        picture: Option<&[u8]>,
        control: &Control,
    ) -> Result<Vec<Row>> {
        if source.is_clip()? {
            let mut clip = Clip::load(source, load)?;
            clip.control = control.clone();
            let subject = Subject::of_clip(&clip, load.load_mode);
            let tests = fitting_clip(plan, &clip);
            return self.rows(&subject, &tests, &mut clip, Clip::ceilings, |clip, test, repetitions| {
                clip::measure(clip, test, repetitions, picture)
            });
        }
        let model = Arc::new(Model::load(source, load)?);
        let tests = fitting(plan, &model);
        let options = SessionOptions {
            prefill_chunk: self.prefill_chunk,
            replay: !self.no_replay,
            ..SessionOptions::default()
        };
        let mut engine = engine(model, &tests, options)?;
        engine.control = control.clone();
        let subject = Subject::new(engine.model(), load.load_mode, engine.session().prefill_chunk());
        let ceilings = |engine: &Engine| engine.model().ceilings();
        self.rows(&subject, &tests, &mut engine, ceilings, |engine, test, repetitions| {
            measure(engine, test, repetitions, picture)
        })
    }

    /// Runs tests on `it`, an engine or a CLIP, between measurements of what the device can do.
    fn rows<T>(
        &self,
        subject: &Subject,
        tests: &[Test],
        it: &mut T,
        ceilings: impl Fn(&T) -> Result<Option<Ceilings>>,
        measure: impl Fn(&mut T, Test, (usize, usize)) -> Result<Measured>,
    ) -> Result<Vec<Row>> {
        let mut rows = Vec::new();
        let mut before = ceilings(it)?;
        for &test in tests {
            if self.progress {
                super::say(format_args!("{test}"));
            }
            let (began, watch) = (now(), Watch::begin(subject.gpu_number()));
            let repetitions = match before {
                Some(_) => (usize::from(self.warmup), usize::from(self.repetitions)),
                // Where nothing is timed, once is enough to count.
                None => (0, 1),
            };
            let measured = measure(it, test, repetitions)?;
            // What was measured after one test was measured before the next.
            let after = ceilings(it)?;
            let highest = Ceilings::around(before, after);
            before = after;
            rows.push(Row::new(subject, test, &measured, repetitions.0, highest, watch.end(), began));
        }
        Ok(rows)
    }
}

/// The tests of a plan that a model can run: a text model sees no pictures.
fn fitting(plan: &Plan, model: &Model) -> Vec<Test> {
    let pictures = model.vision().is_some();
    let tests = plan.tests().into_iter();
    tests.filter(|test| pictures || matches!(test, Test::Text { .. })).collect()
}

/// The tests of a plan that a CLIP can run: pictures, and prompts as texts, as far as it has towers for them.
fn fitting_clip(plan: &Plan, clip: &Clip) -> Vec<Test> {
    let config = clip.config();
    let pictures = config.vision.iter().flat_map(|_| plan.pictures());
    let texts = config.text.iter().flat_map(|text| plan.captions(text.max_positions));
    pictures.chain(texts).collect()
}

/// An engine with room for the largest of the tests, in other respects as `options` say.
pub fn engine(model: Arc<Model>, tests: &[Test], options: SessionOptions) -> Result<Engine> {
    let config = model.config();
    let image_tokens =
        config.tiling.as_ref().map_or_else(|| config.square_rows(), |tiling| tiling.max_tokens());
    let longest = tests.iter().map(|test| test.positions(image_tokens)).max().unwrap_or(0).max(1);
    let sequences = tests.iter().map(Test::batch).max().unwrap_or(1).max(1);
    let pages = sequences * longest.div_ceil(PAGE);
    let options = SessionOptions {
        context: Some(longest),
        kv_memory: Some((pages * page_bytes(&config.text, model.backend().dtype())) as u64),
        max_sequences: sequences,
        ..options
    };
    Ok(Engine::new(Session::new(model, options)?))
}

/// An error that names the rows whose samples differ too much.
fn steady(rows: &[Row], bound: Option<f64>) -> Result<()> {
    let Some(bound) = bound else { return Ok(()) };
    let unsteady: Vec<_> = rows
        .iter()
        .filter_map(|row| {
            row.spread.filter(|s| *s > bound).map(|s| format!("{} ({:.1} %)", row.test, s * 100.0))
        })
        .collect();
    match unsteady.is_empty() {
        true => Ok(()),
        false => Err(Error::Device {
            device: "this machine".into(),
            problem: format!(
                "is too unsteady to believe these rows: {}; --max-spread is {:.1} %",
                unsteady.join(", "),
                bound * 100.0
            ),
        }),
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// Options of `tessera bench compare`.
#[derive(Debug, Args)]
struct Compare {
    /// The report to compare with (json or jsonl): before
    a: PathBuf,
    /// The report that is judged: after
    b: PathBuf,
    /// How much slower B may be: 0.05 is 5 %
    #[arg(long, value_name = "SHARE", default_value_t = 0.05)]
    bound: f64,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

impl Compare {
    fn run(self) -> Result<()> {
        if !(0.0..1.0).contains(&self.bound) {
            return Err(Error::option("--bound", "a share from 0 to below 1", self.bound));
        }
        let found = compare::compare(&self.a, &self.b, self.bound)?;
        super::print(&if self.json { format!("{}\n", json!(found)) } else { found.table() })?;
        match found.regressed() {
            false => Ok(()),
            true => Err(Error::checkpoint(
                &self.b,
                format!("is slower than {} by more than {:.0} %", self.a.display(), self.bound * 100.0),
            )),
        }
    }
}
