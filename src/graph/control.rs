//! How work is watched and stopped from another thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Watches and stops work from another thread. Clones share one state.
///
/// The request to stop is read before every node, so a step stops within one op: milliseconds in a
/// vision tower, one matrix product in a prefill chunk. Progress counts nodes.
#[derive(Clone, Debug, Default)]
pub struct Control(Arc<State>);

#[derive(Debug, Default)]
struct State {
    cancelled: AtomicBool,
    done: AtomicUsize,
    total: AtomicUsize,
}

impl Control {
    /// Asks for a stop. It stays asked for until [`reset`](Control::reset).
    pub fn cancel(&self) {
        self.0.cancelled.store(true, Ordering::Relaxed);
    }

    /// Whether a stop was asked for.
    pub fn is_cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::Relaxed)
    }

    /// Takes the request to stop back.
    pub fn reset(&self) {
        self.0.cancelled.store(false, Ordering::Relaxed);
    }

    /// Starts counting a piece of work of so many nodes.
    pub fn begin(&self, nodes: usize) {
        self.0.done.store(0, Ordering::Relaxed);
        self.0.total.store(nodes, Ordering::Relaxed);
    }

    /// Counts nodes that have run.
    pub(super) fn advance(&self, nodes: usize) {
        self.0.done.fetch_add(nodes, Ordering::Relaxed);
    }

    /// How many nodes of the present piece of work have run, and how many there are.
    pub fn progress(&self) -> (usize, usize) {
        (self.0.done.load(Ordering::Relaxed), self.0.total.load(Ordering::Relaxed))
    }
}
