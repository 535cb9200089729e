//! Rows of a report.
//!
//! Field names are llama-bench's where the meaning is the same, so that scripts written for it read these
//! rows; what it has no name for is added. `docs/schema/bench.json` describes every field.

use super::environment::{self, Environment};
use super::measure::{Measured, Step};
use super::plan::Test;
use super::stats::{mean, percentile, stddev};
pub use super::subject::Subject;
use crate::backend::{Ceilings, Counts, WorkingSet};
use crate::op::Cost;
use serde::Serialize;

/// Percentiles of the times of an event.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Latency {
    /// Which event: decode, resize, vision, projector, prefill, TTFT, TPOT or ITL; of a CLIP, encode is all that
    /// follows decode.
    pub what: String,
    /// How many were timed.
    pub count: usize,
    /// Their mean.
    pub mean_ms: f64,
    /// Their standard deviation.
    pub stddev_ms: f64,
    /// Half took no longer.
    pub p50_ms: f64,
    /// Nine of ten took no longer.
    pub p90_ms: f64,
    /// Ninety-nine of a hundred took no longer.
    pub p99_ms: f64,
}

impl Latency {
    /// Of times in seconds.
    pub fn new(what: &str, seconds: &[f64]) -> Self {
        let ms = |p| percentile(seconds, p) * 1e3;
        Latency {
            what: what.into(),
            count: seconds.len(),
            mean_ms: mean(seconds) * 1e3,
            stddev_ms: stddev(seconds) * 1e3,
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
    /// Token rows that are asked for together: those of a step for each sequence, or picture, of the test.
    pub n_batch: usize,
    /// Tokens of the prompt, pictures among them; of a picture test 0.
    pub n_prompt: usize,
    /// Generated tokens.
    pub n_gen: usize,
    /// Tokens cached beforehand.
    pub n_depth: usize,
    /// Whether the result is embeddings: pictures, and texts of a CLIP.
    pub embeddings: bool,
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
    /// Bytes that one repetition's largest step uses again and again; they decide what a cache can give.
    pub working_set: u64,
    /// Steps of one repetition: runs of a graph.
    pub steps: usize,
    /// Ops started per step, counted: the launches of a token in decode.
    pub launches_per_step: f64,
    /// Whether recorded launches were replayed inside the clock, as a GPU's vision and decode steps are.
    pub graph_replay: bool,
    /// How many were in one repetition; a picture has two, tower and projector.
    pub graph_replays: usize,
    /// What the device counted in one repetition, where it counts: the emulated one.
    pub device_counts: Option<Counts>,
    /// The higher of the ceilings measured right before and right after; none where nothing is timed.
    pub ceilings: Option<Ceilings>,
    /// The time that the ceilings allow at best.
    pub floor_ms: Option<f64>,
    /// Achieved TFLOP/s.
    pub tflops: Option<f64>,
    /// Achieved GB/s.
    pub gbps: Option<f64>,
    /// Which ceiling makes most of the floor: flops, bytes of memory, or bytes that a cache can give.
    pub bound_by: Option<&'static str>,
    /// Floor over the mean time.
    pub percent_of_ceiling: Option<f64>,
    /// Standard deviation over mean.
    pub spread: Option<f64>,
    /// What the clock saw.
    pub timed: Timed,
    /// What was cached when the clock started.
    pub cache_state: &'static str,
    /// Pictures and tokens that came from a cache all the same.
    pub cache_hits: usize,
    /// Why the figures may not be what they seem; empty is good.
    pub doubts: Vec<String>,
    /// The machine meanwhile.
    pub environment: Environment,
}

/// How pictures and prompts are made, for every row.
const CACHE_STATE: &str = "weights warm after the warm-ups; prompts and pictures differ in every repetition, a given picture by its \
                           first pixel; no prefix is reused";

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
        let work = Work::of(&measured.steps);
        let floor = ceilings.map(|c| measured.steps.iter().map(|s| c.floor(s.cost, s.set)).sum::<f64>());
        let time = mean(seconds);
        let rate = |work: u64| timed.then(|| work as f64 / time);
        let percent = floor.map(|floor| 100.0 * floor / time);
        let (n_prompt, n_gen, n_depth, n_images) = match test {
            Test::Image { images } => (0, 0, 0, images),
            Test::Text { prompt, generate, depth, .. } => (prompt, generate, depth, 0),
            Test::FirstToken { images, .. } => (measured.units, 1, 0, images),
            Test::Caption { tokens } => (tokens, 0, 0, 0),
        };
        let doubts = doubts(percent, measured.cache_hits, subject.n_threads, &environment);
        Row {
            subject: subject.clone(),
            test: test.to_string(),
            n_batch: subject.n_ubatch * test.batch().max(n_images),
            n_prompt,
            n_gen,
            n_depth,
            embeddings: test.embeds(),
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
            flops: work.cost.flops,
            bytes: work.cost.bytes,
            working_set: work.set.stored + work.set.passing,
            steps: measured.steps.len(),
            launches_per_step: measured.launches as f64 / measured.steps.len().max(1) as f64,
            graph_replay: measured.replays > 0,
            graph_replays: measured.replays,
            device_counts: measured.counts,
            ceilings,
            floor_ms: floor.map(|s| s * 1e3),
            tflops: rate(work.cost.flops).map(|r| r / 1e12),
            gbps: rate(work.cost.bytes).map(|r| r / 1e9),
            bound_by: ceilings.map(|c| c.bound(work.cost, work.set)),
            percent_of_ceiling: percent,
            spread: timed.then(|| stddev(seconds) / time),
            timed: Timed {
                tokenisation: false,
                sampling: !test.embeds(),
                detokenisation: false,
                image_decode: n_images > 0,
            },
            cache_state: CACHE_STATE,
            cache_hits: measured.cache_hits,
            doubts,
            environment,
        }
    }
}

/// All steps together: the sum of what they do, the largest of what they use.
#[derive(Default)]
struct Work {
    cost: Cost,
    set: WorkingSet,
}

impl Work {
    fn of(steps: &[Step]) -> Self {
        let mut work = Work::default();
        for step in steps {
            work.cost += step.cost;
            work.set.stored = work.set.stored.max(step.set.stored);
            work.set.passing = work.set.passing.max(step.set.passing);
        }
        work
    }
}

/// More than the whole of a ceiling, with some room for its own error.
const TOO_GOOD: f64 = 105.0;

/// Reasons not to believe a row.
fn doubts(percent: Option<f64>, cache_hits: usize, threads: usize, environment: &Environment) -> Vec<String> {
    let mut doubts = Vec::new();
    if let Some(percent) = percent.filter(|percent| *percent > TOO_GOOD) {
        doubts.push(format!(
            "{percent:.0} % of the ceiling: the ceiling was measured while the machine was slower, or a cache helped"
        ));
    }
    if cache_hits > 0 {
        doubts.push(format!("{cache_hits} pictures or tokens came from a cache"));
    }
    let load = environment.load_average.iter().flatten().copied().fold(0.0, f64::max);
    if load > threads as f64 + 1.5 {
        doubts.push(format!("load average {load:.1} with {threads} threads: others were at work"));
    }
    if let Some(steal) = environment.steal.filter(|steal| *steal > 0.02) {
        doubts.push(format!("the hypervisor gave {:.0} % of the time to others", steal * 100.0));
    }
    if let Some(governor) = environment.governor.as_ref().filter(|governor| *governor == "powersave") {
        doubts.push(format!("the frequency governor is {governor}"));
    }
    doubts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubts_are_spoken() {
        let calm = Environment::default();
        assert_eq!(doubts(Some(104.0), 0, 2, &calm), Vec::<String>::new());
        let busy = Environment {
            governor: Some("powersave".into()),
            load_average: [Some(1.0), Some(9.0)],
            steal: Some(0.1),
            ..calm
        };
        let all = doubts(Some(300.0), 1, 2, &busy).join("; ");
        for word in ["300 %", "from a cache", "load average 9.0", "10 % of the time", "powersave"] {
            assert!(all.contains(word), "{word}: {all}");
        }
    }
}
