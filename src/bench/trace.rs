//! Where one run's time went: spans of steps, layers, ops and threads, as a trace that Perfetto and
//! chrome://tracing open (`docs/schema/trace.json`), and as a summary by op.

use super::profile::Clock;
use super::report::Subject;
use crate::backend::{Ceilings, WorkingSet};
use crate::graph::{Executor, Span};
use crate::op::Cost;
use serde::Serialize;
use serde_json::{Value, json};
use std::time::Instant;

/// A stretch of time on a track.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// What happened.
    pub name: String,
    /// Which track it is shown on.
    pub track: Track,
    /// Microseconds since the trace began.
    pub start_us: f64,
    /// Microseconds.
    pub duration_us: f64,
    /// More about it: op, shapes, FLOPs, bytes.
    pub args: Value,
}

/// The rows of the picture, from the coarse to the fine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Track {
    /// Decode, resize, tower, projector, prefill chunks, decode steps.
    Stages,
    /// Layers of tower and language model.
    Layers,
    /// Ops; on the CPU each runs on all threads.
    Ops,
    /// One thread of the CPU by its number, the caller being 0: its parts of ops.
    Thread(usize),
}

impl Track {
    /// Its number in the trace, from the top. The process has 1: Perfetto would call that track its main thread.
    fn id(self) -> usize {
        match self {
            Track::Stages => 2,
            Track::Layers => 3,
            Track::Ops => 4,
            Track::Thread(thread) => 5 + thread,
        }
    }

    /// The category of its events.
    fn category(self) -> &'static str {
        match self {
            Track::Stages => "stages",
            Track::Layers => "layers",
            Track::Ops => "ops",
            Track::Thread(_) => "threads",
        }
    }

    fn name(self) -> String {
        match self {
            Track::Thread(thread) => format!("thread {thread}"),
            other => other.category().into(),
        }
    }
}

/// What one op kind on one shape took over the whole run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct OpTime {
    /// The op.
    pub op: &'static str,
    /// Rows and columns of its first operand, and of its weights.
    pub shape: String,
    /// How often it ran.
    pub calls: usize,
    /// Seconds in all; none where nothing is timed.
    pub seconds: Option<f64>,
    /// Work of all calls.
    pub flops: u64,
    /// Bytes of all calls.
    pub bytes: u64,
    /// The sum of the calls' floors, in seconds, where ceilings are known.
    pub floor: Option<f64>,
    /// What makes most of it: flops, bytes of memory, or bytes that a cache can give.
    pub bound_by: Option<&'static str>,
}

impl OpTime {
    /// How much of its time the ceilings explain, in percent.
    pub fn percent(&self) -> Option<f64> {
        let (floor, seconds) = self.floor.zip(self.seconds.filter(|seconds| *seconds > 0.0))?;
        Some(100.0 * floor / seconds)
    }
}

/// The events of an executor's spans, times counted from `epoch`. `stage` names a step that begins with a
/// given span.
pub fn events(executor: &Executor, epoch: Instant, stage: impl Fn(&Span) -> String) -> Vec<Event> {
    let graph = executor.graph();
    let mut events: Vec<Event> = Vec::new();
    // The step and the layer that are open: their places in `events`.
    let (mut step, mut layer): (Option<usize>, Option<usize>) = (None, None);
    let mut last_node = usize::MAX;
    for span in executor.spans() {
        let node = &graph.nodes[span.node];
        let start = us(epoch, span.start);
        let end = start + span.took.as_nanos() as f64 / 1e3;
        if last_node == usize::MAX || span.node <= last_node {
            step = Some(events.len());
            layer = None;
            events.push(Event::new(stage(span), Track::Stages, start, end));
        }
        last_node = span.node;
        let scope = scope(&node.name);
        if layer.is_none_or(|at| events[at].name != scope) {
            layer = Some(events.len());
            events.push(Event::new(scope.into(), Track::Layers, start, end));
        }
        let cost = graph.cost(span.node..span.node + 1, &span.bindings, span.kv);
        let mut op = Event::new(node.name.clone(), Track::Ops, start, end);
        op.args = json!({
            "op": node.op.name(),
            "shape": shape(executor, span),
            "flops": cost.flops,
            "bytes": cost.bytes,
            "gflops_per_s": round(cost.flops as f64 / (end - start).max(1e-3) / 1e3),
            "gb_per_s": round(cost.bytes as f64 / (end - start).max(1e-3) / 1e3),
        });
        events.push(op);
        for open in [step, layer].into_iter().flatten() {
            events[open].duration_us = end - events[open].start_us;
        }
    }
    events
}

impl Event {
    /// An event between two times in microseconds.
    pub fn new(name: String, track: Track, start_us: f64, end_us: f64) -> Self {
        Event { name, track, start_us, duration_us: end_us - start_us, args: json!({}) }
    }
}

/// Microseconds from `epoch` to `at`.
pub fn us(epoch: Instant, at: Instant) -> f64 {
    at.saturating_duration_since(epoch).as_nanos() as f64 / 1e3
}

fn round(x: f64) -> f64 {
    (x * 1e3).round() / 1e3
}

/// `vision.layers.3` of `vision.layers.3.qkv`; what stands outside layers is its own.
fn scope(name: &str) -> &str {
    let layer = name.find("layers.").map(|at| at + "layers.".len());
    match layer.and_then(|at| name[at..].find('.').map(|dot| at + dot)) {
        Some(end) => &name[..end],
        None => name,
    }
}

fn shape(executor: &Executor, span: &Span) -> String {
    let graph = executor.graph();
    let node = &graph.nodes[span.node];
    let shapes = graph.shapes(node, &span.bindings);
    let mut text = shapes.ins.first().map_or(String::new(), |view| format!("{}x{}", view.rows, view.cols));
    let matrices: Vec<_> = graph.weight_types(node).into_iter().filter(|w| w.rows > 1).collect();
    if let Some(first) = matrices.first() {
        let rows: usize = matrices.iter().filter(|w| w.cols == first.cols).map(|w| w.rows).sum();
        text += &format!(" {rows}x{} {}", first.cols, first.dtype);
    }
    text
}

/// The ops of those spans that are `wanted`, by kind and shape, the longest first; without ceilings, where nothing is
/// timed, in the order of the graph. Ops of no rows did nothing and are left out.
pub fn summary(
    executor: &Executor,
    ceilings: Option<Ceilings>,
    wanted: impl Fn(&Span) -> bool,
) -> Vec<OpTime> {
    let graph = executor.graph();
    let weights = graph.weight_bytes();
    let mut ops: Vec<OpTime> = Vec::new();
    for span in executor.spans().iter().filter(|span| wanted(span)) {
        let cost: Cost = graph.cost(span.node..span.node + 1, &span.bindings, span.kv);
        if cost == Cost::default() {
            continue;
        }
        // All weights go through the caches before an op's own come again; what it is given was just made.
        let set = WorkingSet { stored: weights, passing: cost.bytes - cost.stored };
        let (op, shape) = (graph.nodes[span.node].op.name(), shape(executor, span));
        let at = ops.iter().position(|o| o.op == op && o.shape == shape).unwrap_or_else(|| {
            let (seconds, floor) = (ceilings.map(|_| 0.0), ceilings.map(|_| 0.0));
            let bound_by = ceilings.map(|c| c.bound(cost, set));
            ops.push(OpTime { op, shape, calls: 0, seconds, flops: 0, bytes: 0, floor, bound_by });
            ops.len() - 1
        });
        let entry = &mut ops[at];
        entry.calls += 1;
        entry.flops += cost.flops;
        entry.bytes += cost.bytes;
        entry.seconds = entry.seconds.map(|seconds| seconds + span.took.as_secs_f64());
        entry.floor = entry.floor.zip(ceilings).map(|(floor, c)| floor + c.floor(cost, set));
    }
    ops.sort_by(|a, b| b.seconds.unwrap_or(0.0).total_cmp(&a.seconds.unwrap_or(0.0)));
    ops
}

/// The summary as a table: calls, time, share of the whole, rates, share of the ceiling; only counts where
/// nothing is timed.
pub fn table(ops: &[OpTime]) -> String {
    let Some(all) = ops.iter().map(|op| op.seconds).sum::<Option<f64>>().filter(|all| *all > 0.0) else {
        return counts(ops);
    };
    let mut text = String::from(
        "| op | shape | calls | ms | share | us/call | GFLOP/s | GB/s | of ceiling |\n\
         | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n",
    );
    for op in ops {
        let seconds = op.seconds.unwrap_or(0.0).max(1e-9);
        text += &format!(
            "| {} | {} | {} | {:.3} | {:.1} % | {:.1} | {:.1} | {:.1} | {} |\n",
            op.op,
            op.shape,
            op.calls,
            seconds * 1e3,
            100.0 * seconds / all,
            seconds * 1e6 / op.calls as f64,
            op.flops as f64 / seconds / 1e9,
            op.bytes as f64 / seconds / 1e9,
            op.percent().zip(op.bound_by).map_or("-".into(), |(p, by)| format!("{p:.0} % ({by})")),
        );
    }
    text
}

fn counts(ops: &[OpTime]) -> String {
    let mut text = String::from("| op | shape | calls | MFLOP | MB |\n| --- | --- | ---: | ---: | ---: |\n");
    for OpTime { op, shape, calls, flops, bytes, .. } in ops {
        let (flops, bytes) = (*flops as f64 / 1e6, *bytes as f64 / 1e6);
        text += &format!("| {op} | {shape} | {calls} | {flops:.3} | {bytes:.3} |\n");
    }
    text + "\nnothing is timed on this device: counts only\n"
}

/// The parts of ops that each thread ran, named by the op of `events` inside which they lie.
pub fn threads(parts: &[Vec<(Instant, Instant)>], epoch: Instant, events: &[Event]) -> Vec<Event> {
    let mut ops: Vec<&Event> = events.iter().filter(|event| event.track == Track::Ops).collect();
    ops.sort_by(|a, b| a.start_us.total_cmp(&b.start_us));
    let mut found = Vec::new();
    for (thread, parts) in parts.iter().enumerate() {
        for &(begin, end) in parts {
            let (begin, end) = (us(epoch, begin), us(epoch, end));
            let after = ops.partition_point(|op| op.start_us <= begin);
            if let Some(op) = after.checked_sub(1).map(|at| ops[at]) {
                let inside = begin < op.start_us + op.duration_us;
                let name = if inside { op.name.clone() } else { "between ops".into() };
                found.push(Event::new(name, Track::Thread(thread), begin, end));
            }
        }
    }
    found
}

/// The trace in the Trace Event Format's JSON object form: complete events (`ph: X`), one process, a named
/// thread for each track.
pub fn chrome(subject: &Subject, clock: Clock, events: &[Event]) -> Value {
    let mut tracks: Vec<Track> = vec![Track::Stages, Track::Layers, Track::Ops];
    for event in events {
        if !tracks.contains(&event.track) {
            tracks.push(event.track);
        }
    }
    let about = |tid: usize, name: &str, args: Value| json!({"ph": "M", "name": name, "pid": 1, "tid": tid, "args": args});
    let mut list = vec![about(0, "process_name", json!({"name": format!("tessera, {}", subject.device)}))];
    for track in tracks {
        list.push(about(track.id(), "thread_name", json!({"name": track.name()})));
        list.push(about(track.id(), "thread_sort_index", json!({"sort_index": track.id()})));
    }
    list.extend(events.iter().map(|event| {
        json!({
            "ph": "X", "cat": event.track.category(), "name": event.name, "pid": 1, "tid": event.track.id(),
            "ts": event.start_us, "dur": event.duration_us, "args": event.args,
        })
    }));
    let mut run = json!(subject);
    run["clock"] = clock.name().into();
    // In "ms" chrome://tracing draws what ends less than a microsecond later than its neighbour inside it.
    json!({"displayTimeUnit": "ns", "otherData": run, "traceEvents": list})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes() {
        for (name, layer) in [
            ("layers.3.qkv", "layers.3"),
            ("vision.layers.12.norm1", "vision.layers.12"),
            ("embed", "embed"),
            ("projector.linear_1", "projector.linear_1"),
        ] {
            assert_eq!(scope(name), layer);
        }
    }
}
