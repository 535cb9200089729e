//! Where one run's time went: spans of steps, layers and ops, as a trace that Perfetto and
//! chrome://tracing open, and as a summary by op.

use super::report::Subject;
use crate::backend::Ceilings;
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Track {
    /// Decode, resize, tower, projector, prefill chunks, decode steps.
    Stages,
    /// Layers of tower and language model.
    Layers,
    /// Ops; on the CPU each runs on all threads.
    Ops,
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
    /// Seconds in all.
    pub seconds: f64,
    /// Work of all calls.
    pub flops: u64,
    /// Bytes of all calls.
    pub bytes: u64,
    /// The sum of the calls' floors, in seconds, where ceilings are known.
    pub floor: Option<f64>,
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
            "gflops_per_s": round(cost.flops as f64 / (end - start) / 1e3),
            "gb_per_s": round(cost.bytes as f64 / (end - start) / 1e3),
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

/// The ops of some spans by kind and shape, the longest first.
pub fn summary(executor: &Executor, ceilings: Option<Ceilings>) -> Vec<OpTime> {
    let graph = executor.graph();
    let mut ops: Vec<OpTime> = Vec::new();
    for span in executor.spans() {
        let (op, shape) = (graph.nodes[span.node].op.name(), shape(executor, span));
        let cost: Cost = graph.cost(span.node..span.node + 1, &span.bindings, span.kv);
        let at = ops.iter().position(|o| o.op == op && o.shape == shape).unwrap_or_else(|| {
            let floor = ceilings.map(|_| 0.0);
            ops.push(OpTime { op, shape, calls: 0, seconds: 0.0, flops: 0, bytes: 0, floor });
            ops.len() - 1
        });
        let entry = &mut ops[at];
        entry.calls += 1;
        entry.seconds += span.took.as_secs_f64();
        entry.flops += cost.flops;
        entry.bytes += cost.bytes;
        entry.floor = ceilings.map(|c| entry.floor.unwrap_or(0.0) + c.floor(cost));
    }
    ops.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    ops
}

/// The summary as a table: calls, time, share of the whole, rates, share of the ceiling.
pub fn table(ops: &[OpTime]) -> String {
    let all: f64 = ops.iter().map(|op| op.seconds).sum();
    let mut text = String::from(
        "| op | shape | calls | ms | share | us/call | GFLOP/s | GB/s | of ceiling |\n\
         | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n",
    );
    for op in ops {
        text += &format!(
            "| {} | {} | {} | {:.3} | {:.1} % | {:.1} | {:.1} | {:.1} | {} |\n",
            op.op,
            op.shape,
            op.calls,
            op.seconds * 1e3,
            100.0 * op.seconds / all,
            op.seconds * 1e6 / op.calls as f64,
            op.flops as f64 / op.seconds / 1e9,
            op.bytes as f64 / op.seconds / 1e9,
            op.floor.map_or("-".into(), |floor| format!("{:.0} %", 100.0 * floor / op.seconds)),
        );
    }
    text
}

/// The trace in the Trace Event Format's JSON object form: complete events (`ph: X`), one process, a named
/// thread for each track.
pub fn chrome(subject: &Subject, events: &[Event]) -> Value {
    let tracks = [(Track::Stages, "stages"), (Track::Layers, "layers"), (Track::Ops, "ops")];
    let id = |track: Track| tracks.iter().position(|(t, _)| *t == track).unwrap_or(0) + 1;
    let mut list = vec![
        json!({"ph": "M", "name": "process_name", "pid": 1, "tid": 0, "args": {"name": format!("tessera, {}", subject.backends)}}),
    ];
    for (track, name) in tracks {
        list.push(
            json!({"ph": "M", "name": "thread_name", "pid": 1, "tid": id(track), "args": {"name": name}}),
        );
        list.push(json!({"ph": "M", "name": "thread_sort_index", "pid": 1, "tid": id(track), "args": {"sort_index": id(track)}}));
    }
    list.extend(events.iter().map(|event| {
        json!({
            "ph": "X", "cat": tracks[id(event.track) - 1].1, "name": event.name, "pid": 1, "tid": id(event.track),
            "ts": event.start_us, "dur": event.duration_us, "args": event.args,
        })
    }));
    json!({"displayTimeUnit": "ms", "otherData": subject, "traceEvents": list})
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
