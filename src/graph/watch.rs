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
    /// How long the device took; of running nodes, from the end of the one before.
    pub took: Duration,
    /// The row counts of the step.
    pub bindings: Bindings,
    /// What the step touched of the KV cache.
    pub kv: KvExtent,
}

impl Executor {
    /// Writes down from now on when nodes run, the first `capacity` of them; 0 stops it. It costs two
    /// readings of the clock a node.
    pub fn trace(&mut self, capacity: usize, timing: Timing) {
        (self.spans, self.timing) = (Vec::with_capacity(capacity), timing);
    }

    /// What has been written down since [`trace`](Executor::trace).
    pub fn spans(&self) -> &[Span] {
        &self.spans
    }

    /// Writes down what the marks of a step say.
    pub(super) fn read_marks(
        &mut self,
        nodes: Range<usize>,
        mut start: Instant,
        bindings: &Bindings,
    ) -> Result<()> {
        let times = self.backend.between_marks(nodes.len() + 1)?;
        for (node, took) in nodes.zip(times) {
            if self.spans.len() < self.spans.capacity() {
                self.spans.push(Span { node, start, took, bindings: *bindings, kv: self.kv });
            }
            start += took;
        }
        Ok(())
    }
}
