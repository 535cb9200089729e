//! `tessera bench ops`: each op at the model's shapes, or one product of given shape.

use super::bench::engine;
use super::options::ModelArgs;
use crate::backend::Ceilings;
use crate::bench::plan::Test;
use crate::bench::trace::OpTime;
use crate::bench::{ops, trace};
use crate::error::{Error, Result};
use crate::runtime::{Model, SessionOptions};
use clap::{Args, ValueEnum};
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Options of `tessera bench ops`.
#[derive(Debug, Args)]
pub struct Ops {
    #[command(flatten)]
    model: ModelArgs,
    /// Only ops whose name contains this, in any case
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
    /// One product instead of a model's ops: x [M, K] times W [N, K]; W is of --dtype [auto: f16]
    #[arg(long, value_name = "M,N,K", value_parser = parse_shape)]
    shape: Option<(usize, usize, usize)>,
    /// Rows of the prompt whose ops are timed
    #[arg(short = 'p', value_name = "N", default_value_t = 640, value_parser = parse_count)]
    prompt: usize,
    /// Positions cached before the decode steps that are timed
    #[arg(short = 'd', value_name = "N", default_value_t = 640, value_parser = parse_count)]
    depth: usize,
    /// Repetitions that count
    #[arg(short = 'r', value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    repetitions: u16,
    /// The format on stdout; json is one list of tests, jsonl an op a line
    #[arg(short = 'o', long = "output", value_enum, default_value_t = Output::Md)]
    output: Output,
    /// The same as -o json
    #[arg(long, conflicts_with = "output")]
    json: bool,
    /// An earlier report of `bench ops` (-o jsonl): how many times as fast each op is now
    #[arg(long, value_name = "FILE")]
    baseline: Option<PathBuf>,
}

/// `-o` of `bench ops`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    /// Tables for people.
    Md,
    /// A list of tests with their ops.
    Json,
    /// An op a line.
    Jsonl,
}

/// The ops of a test, and the ceilings they are held against.
struct Part {
    test: String,
    ceilings: Option<Ceilings>,
    ops: Vec<OpTime>,
}

impl Ops {
    pub fn run(self) -> Result<()> {
        let baseline = self.baseline.as_deref().map(Baseline::read).transpose()?;
        let (device, mut parts) = self.measure()?;
        let wanted = self.filter.as_deref().unwrap_or_default().to_lowercase();
        for part in &mut parts {
            part.ops.retain(|op| op.op.to_lowercase().contains(&wanted));
        }
        let output = if self.json { Output::Json } else { self.output };
        let text: String = match output {
            Output::Md => parts.iter().map(|part| table(part, &device, baseline.as_ref())).collect(),
            Output::Json => format!("{}\n", json!(parts.iter().map(Part::json).collect::<Vec<_>>())),
            Output::Jsonl => parts.iter().flat_map(|part| part.lines(&device, baseline.as_ref())).collect(),
        };
        super::print(&text)
    }

    /// The device, and the ops on it.
    fn measure(&self) -> Result<(String, Vec<Part>)> {
        let (source, load) = self.model.load_options()?;
        let repetitions = (1, usize::from(self.repetitions));
        if let Some((m, n, k)) = self.shape {
            let dtype = self.model.dtype.weights();
            let backend = load.device.open(load.threads, || Ok(Some(dtype)))?;
            let (ops, ceilings) = ops::time_linear(&backend, (m, n, k), dtype, repetitions)?;
            return Ok((
                backend.describe(),
                vec![Part { test: format!("linear {m}x{n}x{k}"), ceilings, ops }],
            ));
        }
        let model = Arc::new(Model::load(&source, &load)?);
        let text = |prompt, generate, depth| Test::Text { prompt, generate, depth, batch: 1 };
        let mut tests = vec![text(self.prompt, 0, 0), text(0, 16, self.depth)];
        if model.vision().is_some() {
            tests.insert(0, Test::Image { images: 1 });
        }
        tests.retain(|test| !matches!(test, Test::Text { prompt: 0, generate: 0, .. }));
        let mut engine = engine(model, &tests, SessionOptions::default())?;
        let model = engine.model().clone();
        let mut parts = Vec::new();
        for test in tests {
            let (ops, ceilings) = ops::time_ops(&mut engine, test, repetitions)?;
            parts.push(Part { test: test.to_string(), ceilings, ops });
        }
        Ok((model.backend().describe(), parts))
    }
}

impl Part {
    fn json(&self) -> Value {
        json!({"test": self.test, "ceilings": self.ceilings, "ops": self.ops})
    }

    fn lines(&self, device: &str, baseline: Option<&Baseline>) -> Vec<String> {
        let line = |op: &OpTime| {
            let mut object = json!({"test": self.test, "device": device, "percent_of_ceiling": op.percent()});
            if let Some(baseline) = baseline {
                object["baseline"] = json!(baseline.name);
                object["speed_of_baseline"] = json!(baseline.speed(&self.test, op));
            }
            let (Value::Object(object), Value::Object(mut own)) = (object, json!(op)) else {
                unreachable!("both are objects")
            };
            own.extend(object);
            format!("{}\n", Value::Object(own))
        };
        self.ops.iter().map(line).collect()
    }
}

fn table(part: &Part, device: &str, baseline: Option<&Baseline>) -> String {
    let mut text = format!("{} on {device}\n\n{}\n", part.test, trace::table(&part.ops));
    if let Some(baseline) = baseline {
        text += &format!("| op | shape | speed of {} |\n| --- | --- | ---: |\n", baseline.name);
        for op in &part.ops {
            let speed =
                baseline.speed(&part.test, op).map_or("not there".into(), |speed| format!("{speed:.3}"));
            text += &format!("| {} | {} | {speed} |\n", op.op, op.shape);
        }
        text += "\n";
    }
    text
}

/// What an earlier report says: seconds of a call by test, op and shape.
struct Baseline {
    name: String,
    calls: HashMap<(String, String, String), f64>,
}

/// What is read of a line.
#[derive(Deserialize)]
struct Line {
    test: String,
    op: String,
    shape: String,
    calls: f64,
    seconds: Option<f64>,
}

impl Baseline {
    fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|source| Error::io(path, source))?;
        let mut calls = HashMap::new();
        for line in text.lines().filter(|line| !line.trim().is_empty()) {
            let line: Line = serde_json::from_str(line).map_err(|error| {
                Error::checkpoint(path, format!("is no report of `tessera bench ops -o jsonl`: {error}"))
            })?;
            if let Some(seconds) = line.seconds {
                calls.insert((line.test, line.op, line.shape), seconds / line.calls.max(1.0));
            }
        }
        Ok(Baseline { name: path.display().to_string(), calls })
    }

    /// How many times as fast an op is as it was, if it was there.
    fn speed(&self, test: &str, op: &OpTime) -> Option<f64> {
        let before = self.calls.get(&(test.to_string(), op.op.to_string(), op.shape.clone()))?;
        Some(before / (op.seconds? / op.calls as f64))
    }
}

/// Rows and positions: at most as many as any model has.
fn parse_count(text: &str) -> std::result::Result<usize, String> {
    let expected = || format!("expected a number from 0 to 1000000, found {text:?}");
    text.parse().ok().filter(|n| *n <= 1_000_000).ok_or_else(expected)
}

fn parse_shape(text: &str) -> std::result::Result<(usize, usize, usize), String> {
    let numbers: Vec<usize> =
        text.split(',').filter_map(|n| n.parse().ok().filter(|n| (1..=1 << 20).contains(n))).collect();
    match numbers[..] {
        [m, n, k] if text.split(',').count() == 3 && n.saturating_mul(k) <= 1 << 31 => Ok((m, n, k)),
        _ => Err(format!("expected M,N,K such as 640,4096,4096, found {text:?}")),
    }
}
