//! Rows of a report, and the formats they are written in.
//!
//! Field names are llama-bench's where the meaning is the same, so that scripts written for it read these
//! rows; what it has no name for is added.

use super::environment::{self, Environment};
use super::measure::Measured;
use super::plan::Test;
use super::stats::{mean, percentile, stddev};
use crate::backend::Ceilings;
use crate::model::checkpoint::LoadMode;
use crate::op::Cost;
use crate::runtime::Model;
use crate::tensor::DType;
use serde::Serialize;
use sha2::{Digest, Sha256};

/// How a report is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// A table for people.
    Md,
    /// Comma-separated values with a header.
    Csv,
    /// A list of objects.
    Json,
    /// An object a line.
    Jsonl,
}

/// What is the same for all rows of a model on a device.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Subject {
    /// The commit the program was built from.
    pub build_commit: String,
    /// The processor.
    pub cpu_info: String,
    /// The GPU; empty without one.
    pub gpu_info: String,
    /// The device as Tessera describes it.
    pub backends: String,
    /// Where the model came from.
    pub model_filename: String,
    /// Its kind, size and dtype.
    pub model_type: String,
    /// Bytes of the weights in use.
    pub model_size: u64,
    /// Numbers among the weights in use.
    pub model_n_params: u64,
    /// SHA-256 over every tensor's name, dtype and shape and its first 4 KiB.
    pub weights_sha256_sampled: String,
    /// Most token rows of one step.
    pub n_batch: usize,
    /// Threads that compute; 0 on a GPU.
    pub n_threads: usize,
    /// The dtype of cached keys.
    pub type_k: String,
    /// The dtype of cached values.
    pub type_v: String,
    /// Whether weights are mapped.
    pub use_mmap: bool,
}

impl Subject {
    /// Describes a model on its device.
    pub fn new(model: &Model, load_mode: LoadMode, n_batch: usize) -> Self {
        let graphs = [Some(model.language()), model.vision().map(|vision| &vision.graph)];
        let weights: Vec<_> =
            graphs.into_iter().flatten().flat_map(|graph| &graph.weights).map(|weight| weight.ty).collect();
        let params: u64 = weights.iter().map(|weight| (weight.rows * weight.cols) as u64).sum();
        // Norms may be kept wider than the matrices; the largest weight says what the model is made of.
        let dtype =
            weights.iter().max_by_key(|weight| weight.bytes()).map_or(DType::F32, |weight| weight.dtype);
        let kind = if model.vision().is_some() { "llava" } else { "llama" };
        let kv = model.backend().dtype().name().to_string();
        let threads = model.backend().threads();
        Subject {
            build_commit: environment::commit().into(),
            cpu_info: environment::cpu(),
            gpu_info: if threads > 0 { String::new() } else { model.backend().describe() },
            backends: model.backend().describe(),
            model_filename: model.name().into(),
            model_type: format!("{kind} {} {}", count(params), dtype.name().to_uppercase()),
            model_size: model.weight_bytes(),
            model_n_params: params,
            weights_sha256_sampled: digest(model),
            n_batch,
            n_threads: threads,
            type_k: kv.clone(),
            type_v: kv,
            use_mmap: load_mode == LoadMode::Mmap,
        }
    }
}

/// `7.1B`, `3.2M`: as people name models.
fn count(params: u64) -> String {
    match params {
        0..1_000_000_000 => format!("{:.1}M", params as f64 / 1e6),
        _ => format!("{:.1}B", params as f64 / 1e9),
    }
}

fn digest(model: &Model) -> String {
    let mut hash = Sha256::new();
    let storages: Vec<_> = model.weights().storages().collect();
    for tensor in model.weights().tensors() {
        hash.update(format!("{} {} {:?}\n", tensor.name, tensor.dtype, tensor.shape));
        let bytes = storages.get(tensor.file).map_or(&[][..], |storage| storage.as_bytes());
        let end = (tensor.offset + tensor.bytes.min(4096)).min(bytes.len());
        hash.update(bytes.get(tensor.offset..end).unwrap_or_default());
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Percentiles of the times of an event.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Latency {
    /// Which event: decode, resize, vision, projector, prefill, TTFT, TPOT or ITL.
    pub what: String,
    /// How many were timed.
    pub count: usize,
    /// Their mean.
    pub mean_ms: f64,
    /// Half took no longer.
    pub p50_ms: f64,
    /// Nine of ten took no longer.
    pub p90_ms: f64,
    /// Ninety-nine of a hundred took no longer.
    pub p99_ms: f64,
}

impl Latency {
    fn new(what: &str, seconds: &[f64]) -> Self {
        let ms = |p| percentile(seconds, p) * 1e3;
        Latency {
            what: what.into(),
            count: seconds.len(),
            mean_ms: mean(seconds) * 1e3,
            p50_ms: ms(50.0),
            p90_ms: ms(90.0),
            p99_ms: ms(99.0),
        }
    }
}

/// What stands inside the timed region.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Timed {
    /// Text to ids.
    pub tokenisation: bool,
    /// Logits to an id.
    pub sampling: bool,
    /// Ids to text.
    pub detokenisation: bool,
    /// File bytes to pixels.
    pub image_decode: bool,
}

/// The result of a test.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// The model and the device.
    #[serde(flatten)]
    pub subject: Subject,
    /// The test's name.
    pub test: String,
    /// Tokens of the prompt; of a picture test 0.
    pub n_prompt: usize,
    /// Generated tokens.
    pub n_gen: usize,
    /// Tokens cached beforehand.
    pub n_depth: usize,
    /// Sequences side by side.
    pub n_sequences: usize,
    /// Pictures.
    pub n_images: usize,
    /// When the test began, UTC.
    pub test_time: String,
    /// The mean of `samples_ns`.
    pub avg_ns: u64,
    /// Their standard deviation.
    pub stddev_ns: u64,
    /// The mean of `samples_ts`.
    pub avg_ts: f64,
    /// Their standard deviation.
    pub stddev_ts: f64,
    /// How long each repetition took.
    pub samples_ns: Vec<u64>,
    /// Tokens, or pictures, per second in each repetition.
    pub samples_ts: Vec<f64>,
    /// What `samples_ts` counts: tokens or images.
    pub unit: &'static str,
    /// Repetitions that ran before and were forgotten.
    pub warmups: usize,
    /// Percentiles of single events.
    pub latencies: Vec<Latency>,
    /// Floating-point operations of one repetition.
    pub flops: u64,
    /// Bytes that one repetition must move.
    pub bytes: u64,
    /// Ops started per step, counted: the launches of a token in decode.
    pub launches_per_step: f64,
    /// Whether recorded launches were replayed, as a GPU's vision and decode steps are.
    pub graph_replay: bool,
    /// The higher of the ceilings measured right before and right after; none where nothing is timed.
    pub ceilings: Option<Ceilings>,
    /// The time that the ceilings allow at best.
    pub floor_ms: Option<f64>,
    /// Achieved TFLOP/s.
    pub tflops: Option<f64>,
    /// Achieved GB/s.
    pub gbps: Option<f64>,
    /// Which ceiling makes the floor: flops or bytes.
    pub bound_by: Option<&'static str>,
    /// Floor over the mean time.
    pub percent_of_ceiling: Option<f64>,
    /// Standard deviation over mean.
    pub spread: Option<f64>,
    /// What the clock saw.
    pub timed: Timed,
    /// What was cached when the clock started.
    pub cache_state: &'static str,
    /// The machine meanwhile.
    pub environment: Environment,
}

impl Row {
    /// The row of a test. Without ceilings nothing was timed, and the row has counts only.
    pub fn new(
        subject: &Subject,
        test: Test,
        measured: &Measured,
        warmups: usize,
        ceilings: Option<Ceilings>,
        environment: Environment,
        began: u64,
    ) -> Self {
        let timed = ceilings.is_some();
        let seconds: &[f64] = if timed { &measured.samples } else { &[] };
        let per_second: Vec<f64> = seconds.iter().map(|s| measured.units as f64 / s).collect();
        let mut work = Cost::default();
        measured.steps.iter().for_each(|step| work += *step);
        let floor = ceilings.map(|c| measured.steps.iter().map(|step| c.floor(*step)).sum::<f64>());
        let time = mean(seconds);
        let rate = |work: u64| timed.then(|| work as f64 / time);
        let (n_prompt, n_gen, n_depth, n_images) = match test {
            Test::Image { images } => (0, 0, 0, images),
            Test::Text { prompt, generate, depth, .. } => (prompt, generate, depth, 0),
            Test::FirstToken { images, prompt } => (prompt, 1, 0, images),
        };
        Row {
            subject: subject.clone(),
            test: test.to_string(),
            n_prompt,
            n_gen,
            n_depth,
            n_sequences: test.batch(),
            n_images,
            test_time: environment::utc(began),
            avg_ns: (time * 1e9) as u64,
            stddev_ns: (stddev(seconds) * 1e9) as u64,
            avg_ts: mean(&per_second),
            stddev_ts: stddev(&per_second),
            samples_ns: seconds.iter().map(|s| (s * 1e9) as u64).collect(),
            samples_ts: per_second,
            unit: if matches!(test, Test::Image { .. }) { "images" } else { "tokens" },
            warmups,
            latencies: match timed {
                true => measured.latencies.iter().map(|(what, times)| Latency::new(what, times)).collect(),
                false => Vec::new(),
            },
            flops: work.flops,
            bytes: work.bytes,
            launches_per_step: measured.launches as f64 / measured.steps.len().max(1) as f64,
            graph_replay: measured.replayed,
            ceilings,
            floor_ms: floor.map(|s| s * 1e3),
            tflops: rate(work.flops).map(|r| r / 1e12),
            gbps: rate(work.bytes).map(|r| r / 1e9),
            bound_by: ceilings.map(|c| {
                let by_flops = work.flops as f64 / c.flops_per_s > work.bytes as f64 / c.bytes_per_s;
                if by_flops { "flops" } else { "bytes" }
            }),
            percent_of_ceiling: floor.map(|floor| 100.0 * floor / time),
            spread: timed.then(|| stddev(seconds) / time),
            timed: Timed {
                tokenisation: false,
                sampling: !matches!(test, Test::Image { .. }),
                detokenisation: false,
                image_decode: n_images > 0,
            },
            cache_state: "weights warm after the warm-ups; no prefix or picture is ever seen twice",
            environment,
        }
    }
}

/// All rows in a format.
pub fn write(rows: &[Row], format: Format) -> String {
    match format {
        Format::Md => table(rows),
        Format::Csv => csv(rows),
        Format::Json => serde_json::to_string_pretty(rows).expect("rows are plain data") + "\n",
        Format::Jsonl => {
            rows.iter().map(|row| serde_json::to_string(row).expect("rows are plain data") + "\n").collect()
        }
    }
}

/// The columns of llama-bench, then ours.
fn table(rows: &[Row]) -> String {
    let mut text = String::from(
        "| model | size | params | backend | threads | test | t/s | ms | floor ms | of ceiling | ops/step |\n\
         | --- | ---: | ---: | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |\n",
    );
    for row in rows {
        let s = &row.subject;
        let (size, params) = (s.model_size as f64 / (1u64 << 20) as f64, s.model_n_params as f64 / 1e6);
        let number = |x: Option<f64>, digits: usize| x.map_or("-".into(), |x| format!("{x:.digits$}"));
        let timed = row.ceilings.is_some();
        let rate =
            if timed { format!("{:.2} ± {:.2}", row.avg_ts, row.stddev_ts) } else { "not timed".into() };
        text += &format!(
            "| {} | {size:.1} MiB | {params:.1} M | {} | {} | {} | {rate} | {} | {} | {} | {:.0} |\n",
            s.model_type,
            s.backends,
            s.n_threads,
            row.test,
            number(timed.then_some(row.avg_ns as f64 / 1e6), 2),
            number(row.floor_ms, 2),
            row.percent_of_ceiling.zip(row.bound_by).map_or("-".into(), |(p, by)| format!("{p:.0} % ({by})")),
            row.launches_per_step,
        );
    }
    let latencies: Vec<_> = rows.iter().flat_map(|row| row.latencies.iter().map(move |l| (row, l))).collect();
    if !latencies.is_empty() {
        text += "\n| test | event | count | mean ms | p50 | p90 | p99 |\n| --- | --- | ---: | ---: | ---: | ---: | ---: |\n";
        for (row, l) in latencies {
            text += &format!(
                "| {} | {} | {} | {:.3} | {:.3} | {:.3} | {:.3} |\n",
                row.test, l.what, l.count, l.mean_ms, l.p50_ms, l.p90_ms, l.p99_ms
            );
        }
    }
    if let Some(c) = rows.iter().filter_map(|row| row.ceilings).reduce(Ceilings::max) {
        let commit = rows.first().map_or("unknown", |row| &row.subject.build_commit);
        text += &format!(
            "\nceilings of this run: {:.1} GFLOP/s, {:.1} GB/s read; build {commit}, {}\n",
            c.flops_per_s / 1e9,
            c.bytes_per_s / 1e9,
            rows.first().map_or(String::new(), |row| row.environment.build_flags.clone()),
        );
    } else {
        text += "\nnothing is timed on this device: counts only\n";
    }
    text
}

/// The flat fields in the order of the struct; lists and objects as JSON.
fn csv(rows: &[Row]) -> String {
    let mut text = String::new();
    for (i, row) in rows.iter().enumerate() {
        let value = serde_json::to_value(row).expect("rows are plain data");
        let fields = value.as_object().expect("a row is an object");
        if i == 0 {
            text += &(fields.keys().cloned().collect::<Vec<_>>().join(",") + "\n");
        }
        let cells: Vec<String> = fields
            .values()
            .map(|value| {
                let cell = value.as_str().map_or_else(|| value.to_string(), str::to_string);
                format!("\"{}\"", cell.replace('"', "\"\""))
            })
            .collect();
        text += &(cells.join(",") + "\n");
    }
    text
}
