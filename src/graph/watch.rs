//! When nodes ran: what an executor writes down of its steps if anyone wants to know.

use super::Executor;
use crate::error::Result;
use crate::op::KvExtent;
use crate::tensor::Bindings;
use std::ops::Range;
use std::time::{Duration, Instant};

/// How nodes are timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timing {
    /// One by one: each waits for the one before, and finds nothing in a GPU's caches
    /// ([`Backend::time`](crate::backend::Backend::time)).
    Alone,
    /// As they follow each other when nobody watches, recorded steps included, where the device can
    /// ([`Backend::mark`](crate::backend::Backend::mark)); else one by one.
    Running,
}

/// When a node ran, and on what.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    /// Its place in the graph.
    pub node: usize,
    /// When the device was asked; of running nodes, when the step was, and then what those before it took.
    pub start: Instant,
    /// How long the device took; of running nodes, from the end of the one before, so with any wait for the host
    /// where a step is not replayed.
    pub took: Duration,
    /// The row counts of the step.
    pub bindings: Bindings,
    /// What the step touched of the KV cache.
    pub kv: KvExtent,
}

/// Where nodes write down when they ran, if anyone wants to know. It never grows while a step runs.
pub(super) struct Watch {
    pub spans: Vec<Span>,
    pub timing: Timing,
}

impl Watch {
    /// Nobody's.
    pub const NONE: Watch = Watch { spans: Vec::new(), timing: Timing::Running };

    /// Whether there is room for another span.
    pub fn wants_more(&self) -> bool {
        self.spans.len() < self.spans.capacity()
    }

    /// Keeps a span if there is room for it.
    pub fn keep(&mut self, span: Span) {
        if self.wants_more() {
            self.spans.push(span);
        }
    }
}

impl Executor {
    /// Writes down from now on when nodes run, the first `capacity` of them; 0 stops it. It costs a node two
    /// readings of the clock; on a GPU a mark and a wait at the end of a step, or, alone, its caches.
    pub fn trace(&mut self, capacity: usize, timing: Timing) {
        self.watch = Watch { spans: Vec::with_capacity(capacity), timing };
    }

    /// What has been written down since [`trace`](Executor::trace).
    pub fn spans(&self) -> &[Span] {
        &self.watch.spans
    }

    /// Writes down what the marks of a step say that was asked for at `start`.
    pub(super) fn read_marks(
        &mut self,
        nodes: Range<usize>,
        mut start: Instant,
        bindings: &Bindings,
    ) -> Result<()> {
        let times = self.backend.between_marks(nodes.len() + 1)?;
        for (node, took) in nodes.zip(times) {
            self.watch.keep(Span { node, start, took, bindings: *bindings, kv: self.kv });
            start += took;
        }
        Ok(())
    }
}
