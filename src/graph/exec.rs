//! The executor: a for-loop over the nodes of a planned graph.
//!
//! Addresses of everything are resolved once; a step binds row counts and runs. It allocates nothing. What is
//! written to index inputs waits on the host and goes to the device in one copy when nodes run.
//!
//! On a device that records ([`Backend::record`]), work that comes again and again with the same row counts is
//! recorded and from then on replayed with one call to the device: vision, and decode steps of up to
//! [`MAX_RECORDED_ROWS`] rows. The first such step runs node by node, the second is recorded. Whatever else differs from
//! step to step (ids, positions, page tables) is read from device memory. Where recording fails, steps go on node by
//! node ([`Executor::unrecorded`]).

use super::watch::{Span, Timing, Watch};
use super::{Control, Graph, Plan, Source, ValueId};
use crate::backend::{Backend, Buffer, Call, Recording};
use crate::error::{Error, Result};
use crate::op::KvExtent;
use crate::tensor::{Bindings, DType, View};
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

/// Most operands any op has.
const MAX_INS: usize = 8;
const MAX_WEIGHTS: usize = 8 + 2 * crate::op::MAX_PAIRS;
const MAX_OUTS: usize = 2;

/// Decode steps of more rows than this run node by node: their launches take longer than asking for them does.
pub const MAX_RECORDED_ROWS: usize = 8;

/// Most recordings of one executor; what does not fit runs node by node.
const MAX_RECORDINGS: usize = 16;

/// What must be the same for work to be replayed.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Repeatable {
    nodes: Range<usize>,
    tokens: usize,
    outputs: usize,
    images: usize,
    /// Whether there are marks between the nodes.
    marked: bool,
}

/// How far a recording has come.
enum Recorded {
    /// It ran once, so the device knows all of its kernels.
    Once,
    /// It is replayed.
    Ready(Box<dyn Recording>),
}

/// What a step is called in a profiler.
fn stage(bindings: &Bindings) -> &'static str {
    match bindings {
        Bindings { images: 1.., .. } => "vision",
        Bindings { decode: 1.., .. } => "decode",
        _ => "prefill",
    }
}

/// A planned graph over an arena.
pub struct Executor {
    graph: Arc<Graph>,
    pub(super) backend: Arc<dyn Backend>,
    plan: Plan,
    arena: Arc<Buffer>,
    /// The address of each value.
    addrs: Vec<usize>,
    pub(super) watch: Watch,
    /// What the next step touches of the KV cache, for spans.
    pub(super) kv: KvExtent,
    recordings: Vec<(Repeatable, Recorded)>,
    records: bool,
    unrecorded: Option<Error>,
    /// What index inputs hold, or will when nodes run; -1, which is no index, where nothing was written.
    indices: Vec<u8>,
    /// Which bytes of them the device does not have yet.
    unsent: Range<usize>,
    /// How often recorded work has been replayed.
    replayed: usize,
}

impl Executor {
    /// Binds `graph` to memory: intermediates in `arena`, which may be shared with executors that never
    /// run at the same time, and states at the addresses that `states` gives for them, in graph order.
    ///
    /// # Panics
    /// If the arena is smaller than the plan or a state is missing: both are the caller's bugs.
    pub fn new(
        graph: Arc<Graph>,
        backend: Arc<dyn Backend>,
        plan: Plan,
        arena: Arc<Buffer>,
        states: &[usize],
    ) -> Self {
        assert!(plan.bytes <= arena.bytes, "the arena is smaller than the plan");
        let mut states = states.iter();
        let addrs = graph
            .values
            .iter()
            .zip(&plan.offsets)
            .map(|(value, offset)| match (value.source, offset) {
                (Source::State, _) => *states.next().expect("an address for every state"),
                (_, Some(offset)) => arena.addr + offset,
                (_, None) => unreachable!("only states are unplanned"),
            })
            .collect();
        for node in &graph.nodes {
            assert!(node.ins.len() <= MAX_INS && node.outs.len() <= MAX_OUTS);
            assert!(node.weights.len() <= MAX_WEIGHTS);
        }
        let kv = KvExtent::default();
        let recordings = Vec::with_capacity(MAX_RECORDINGS);
        let (indices, unsent) = (vec![0xff; plan.indices], 0..0);
        let (records, unrecorded) = (true, None);
        Executor {
            graph,
            backend,
            plan,
            arena,
            addrs,
            watch: Watch::NONE,
            kv,
            recordings,
            records,
            unrecorded,
            indices,
            unsent,
            replayed: 0,
        }
    }

    /// The graph.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// The memory plan.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// How often recorded work has been replayed so far.
    pub fn replayed(&self) -> usize {
        self.replayed
    }

    /// Whether work that comes again is recorded and replayed, where the device can; it is unless told otherwise.
    pub fn record(&mut self, yes: bool) {
        self.records = yes;
    }

    /// Why nothing is recorded, on a device that tried and failed.
    pub fn unrecorded(&self) -> Option<&Error> {
        self.unrecorded.as_ref()
    }

    /// Says what the next step touches of the KV cache, for those who count its work.
    pub fn set_kv_extent(&mut self, kv: KvExtent) {
        self.kv = kv;
    }

    /// What was said of the last step.
    pub fn kv_extent(&self) -> KvExtent {
        self.kv
    }

    /// Where a value lies in a step of these row counts.
    pub fn view(&self, value: ValueId, bindings: &Bindings) -> View {
        let ty = self.graph.ty(value);
        View { addr: self.addrs[value.0], rows: ty.rows.bind(bindings), cols: ty.cols, dtype: ty.dtype }
    }

    /// Writes the leading rows of an input.
    ///
    /// # Errors
    /// [`Error::Device`] when the copy fails.
    ///
    /// # Panics
    /// If `data` is longer than the planned input.
    pub fn write<T: bytemuck::NoUninit>(&mut self, value: ValueId, data: &[T]) -> Result<()> {
        self.write_at(value, 0, data)
    }

    /// Writes part of an input, beginning at `row`. The device has it when nodes run.
    ///
    /// # Errors
    /// [`Error::Device`] when the copy fails.
    ///
    /// # Panics
    /// If `data` ends outside the planned input.
    pub fn write_at<T: bytemuck::NoUninit>(&mut self, value: ValueId, row: usize, data: &[T]) -> Result<()> {
        let view = self.view(value, &self.plan.max);
        let offset = row * view.cols * view.dtype.size();
        let bytes: &[u8] = bytemuck::cast_slice(data);
        assert!(offset + bytes.len() <= view.bytes(), "input `{}`", self.graph.values[value.0].name);
        let start = (view.addr + offset).wrapping_sub(self.arena.addr);
        if let Some(waiting) = self.indices.get_mut(start..start.saturating_add(bytes.len())) {
            waiting.copy_from_slice(bytes);
            self.unsent = match self.unsent.is_empty() {
                true => start..start + bytes.len(),
                false => self.unsent.start.min(start)..self.unsent.end.max(start + bytes.len()),
            };
            return Ok(());
        }
        // SAFETY: the range lies inside the input's block of the arena (asserted); `&mut self` and the
        // rule that executors sharing an arena never run at once keep everyone else away.
        unsafe { self.backend.upload(view.addr + offset, bytes) }
    }

    /// Copies device memory into part of an input, beginning at `row`.
    ///
    /// # Errors
    /// [`Error::Device`] when the copy fails.
    ///
    /// # Safety
    /// `from..from + bytes` is live memory of this backend outside the arena that nobody writes.
    ///
    /// # Panics
    /// If the copy ends outside the planned input.
    pub unsafe fn copy_in(&mut self, value: ValueId, row: usize, from: usize, bytes: usize) -> Result<()> {
        let view = self.view(value, &self.plan.max);
        let offset = row * view.cols * view.dtype.size();
        assert!(offset + bytes <= view.bytes(), "input `{}`", self.graph.values[value.0].name);
        // SAFETY: the target as in `write_at`; the source is the caller's obligation.
        unsafe { self.backend.copy(from, view.addr + offset, bytes) }
    }

    /// Reads a kept value's leading elements as they are on the device.
    ///
    /// # Errors
    /// [`Error::Device`] when the copy, or an op that was started before, fails.
    ///
    /// # Panics
    /// If `data` is longer than the value in a step of `bindings`.
    pub fn read<T: bytemuck::AnyBitPattern + bytemuck::NoUninit>(
        &self,
        value: ValueId,
        bindings: &Bindings,
        data: &mut [T],
    ) -> Result<()> {
        let view = self.view(value, bindings);
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(data);
        assert!(bytes.len() <= view.bytes(), "value `{}`", self.graph.values[value.0].name);
        // SAFETY: the range lies inside the value's block of the arena; no step runs, because `run`
        // takes `&mut self` and executors sharing an arena never run at once.
        unsafe { self.backend.download(view.addr, bytes) }
    }

    /// Writes a value that a node made, on a device of f32.
    pub(super) fn overwrite(&mut self, value: ValueId, bindings: &Bindings, data: &[f32]) -> Result<()> {
        let view = self.view(value, bindings);
        assert_eq!((view.len(), view.dtype), (data.len(), DType::F32));
        // SAFETY: the value's own block of the arena; `&mut self` as in `write_at`.
        unsafe { self.backend.upload(view.addr, bytemuck::cast_slice(data)) }
    }

    /// Reads a kept value of floats, widened to f32.
    ///
    /// # Errors
    /// As for [`read`](Executor::read).
    pub fn read_floats(&self, value: ValueId, bindings: &Bindings) -> Result<Vec<f32>> {
        let view = self.view(value, bindings);
        let mut bytes = vec![0u8; view.bytes()];
        self.read(value, bindings, &mut bytes)?;
        Ok(view.dtype.widen(&bytes))
    }

    /// Whether all floats of a kept value are finite.
    ///
    /// # Errors
    /// As for [`read`](Executor::read).
    pub fn is_finite(&self, value: ValueId, bindings: &Bindings) -> Result<bool> {
        // SAFETY: as in `read`.
        unsafe { self.backend.finite(&self.view(value, bindings)) }
    }

    /// Runs all nodes on the given row counts.
    ///
    /// # Safety
    /// Index inputs (ids, slots, tables, selections) have been written for this step and name rows that
    /// exist; state memory is live and nobody else touches it or the arena meanwhile.
    ///
    /// # Errors
    /// [`Error::Cancelled`] between two nodes; [`Error::Device`].
    ///
    /// # Panics
    /// If a row count is larger than planned.
    pub unsafe fn run(&mut self, bindings: &Bindings, control: &Control) -> Result<()> {
        // SAFETY: passed on from the caller.
        unsafe { self.run_nodes(0..self.graph.nodes.len(), bindings, control) }
    }

    /// Runs some of the nodes; all before them have run on the same row counts.
    ///
    /// # Safety
    /// As for [`run`](Executor::run).
    ///
    /// # Errors
    /// As for [`run`](Executor::run).
    pub unsafe fn run_nodes(
        &mut self,
        nodes: Range<usize>,
        bindings: &Bindings,
        control: &Control,
    ) -> Result<()> {
        self.begin(bindings)?;
        if control.is_cancelled() {
            return Err(Error::Cancelled);
        }
        let backend = self.backend.clone();
        backend.begin_range(stage(bindings));
        // SAFETY: passed on from the caller.
        let done = unsafe { self.run_any(nodes, bindings, control) };
        backend.end_range();
        done
    }

    /// Runs nodes the way that is wanted: timed, replayed or one by one.
    ///
    /// # Safety
    /// As for [`run`](Executor::run).
    unsafe fn run_any(&mut self, nodes: Range<usize>, bindings: &Bindings, control: &Control) -> Result<()> {
        let watched = self.watch.wants_more();
        let marked = watched && self.watch.timing == Timing::Running && self.backend.marks();
        if watched && !marked {
            // SAFETY: passed on from the caller.
            return unsafe { self.run_timed(nodes, bindings, control) };
        }
        let start = Instant::now();
        match self.repeatable(&nodes, bindings, marked) {
            // SAFETY: passed on from the caller.
            Some(key) => unsafe { self.repeat(key, bindings, control)? },
            // SAFETY: passed on from the caller.
            None => unsafe { self.run_each(nodes.clone(), bindings, control, marked)? },
        }
        if marked { self.read_marks(nodes, start, bindings) } else { Ok(()) }
    }

    /// Runs nodes one by one, with marks between them or not.
    ///
    /// # Safety
    /// As for [`run`](Executor::run).
    unsafe fn run_each(
        &self,
        nodes: Range<usize>,
        bindings: &Bindings,
        control: &Control,
        marked: bool,
    ) -> Result<()> {
        let first = nodes.start;
        let mark = |at| if marked { self.backend.mark(at) } else { Ok(()) };
        mark(0)?;
        for node in nodes {
            if control.is_cancelled() {
                return Err(Error::Cancelled);
            }
            self.backend.begin_range(&self.graph.nodes[node].name);
            // SAFETY: passed on from the caller.
            let done = unsafe { self.run_node(node, bindings) };
            self.backend.end_range();
            done?;
            mark(node - first + 1)?;
            control.advance(1);
        }
        Ok(())
    }

    /// Whether this is work to record.
    fn repeatable(&self, nodes: &Range<usize>, bindings: &Bindings, marked: bool) -> Option<Repeatable> {
        let Bindings { tokens, decode, outputs, decode_outputs, images, .. } = *bindings;
        let decode_step = (tokens, outputs) == (decode, decode_outputs) && tokens <= MAX_RECORDED_ROWS;
        // A profiler that is told of ranges sees every node of a step that is watched.
        let seen = marked && self.backend.is_listened_to();
        let worth = self.records && !seen && (images > 0 || decode_step);
        worth.then(|| Repeatable { nodes: nodes.clone(), tokens, outputs, images, marked })
    }

    /// Runs nodes one by one and writes down how long each took.
    ///
    /// # Safety
    /// As for [`run`](Executor::run).
    unsafe fn run_timed(
        &mut self,
        nodes: Range<usize>,
        bindings: &Bindings,
        control: &Control,
    ) -> Result<()> {
        for node in nodes {
            let start = Instant::now();
            // SAFETY: passed on from the caller.
            let mut work = || unsafe { self.run_each(node..node + 1, bindings, control, false) };
            let took = self.backend.time(&mut work)?;
            self.watch.keep(Span { node, start, took, bindings: *bindings, kv: self.kv });
        }
        Ok(())
    }

    /// Runs nodes that may have been recorded.
    ///
    /// # Safety
    /// As for [`run`](Executor::run).
    unsafe fn repeat(&mut self, key: Repeatable, bindings: &Bindings, control: &Control) -> Result<()> {
        let (nodes, marked) = (key.nodes.clone(), key.marked);
        let Some(at) = self.recordings.iter().position(|(known, _)| *known == key) else {
            if self.recordings.len() < MAX_RECORDINGS {
                self.recordings.push((key, Recorded::Once));
            }
            // SAFETY: passed on from the caller.
            return unsafe { self.run_each(nodes, bindings, control, marked) };
        };
        if matches!(self.recordings[at].1, Recorded::Once) {
            // Page tables grow from step to step; recorded launches see room for the longest.
            let longest = &Bindings { table_entries: self.plan.max.table_entries, ..*bindings };
            // SAFETY: passed on from the caller; while they are recorded, nodes touch nothing.
            let mut work = || unsafe { self.run_each(nodes.clone(), longest, &Control::default(), marked) };
            match self.backend.record(&mut work) {
                Ok(Some(recording)) => self.recordings[at].1 = Recorded::Ready(recording),
                none => {
                    (self.records, self.unrecorded) = (false, none.err());
                    // SAFETY: passed on from the caller.
                    return unsafe { self.run_each(nodes, bindings, control, marked) };
                }
            }
        }
        if let Recorded::Ready(recording) = &self.recordings[at].1 {
            // SAFETY: the arena, the weights and the states are where they were when this was recorded (they are
            // fixed in `new`), and row counts are the same (`key`); the rest is passed on from the caller.
            unsafe { recording.replay()? };
            control.advance(nodes.len());
            self.replayed += 1;
        }
        Ok(())
    }

    /// Runs all nodes again, looking at every result: the name of the first node that makes a value
    /// that is not finite. Every op gives the same results when it runs twice, KV writes included.
    ///
    /// # Errors
    /// [`Error::Device`].
    ///
    /// # Safety
    /// As for [`run`](Executor::run).
    pub unsafe fn first_non_finite(&mut self, bindings: &Bindings) -> Result<Option<String>> {
        self.begin(bindings)?;
        let graph = self.graph.clone();
        for (n, node) in graph.nodes.iter().enumerate() {
            // SAFETY: passed on from the caller.
            unsafe { self.run_node(n, bindings)? };
            for &out in &node.outs {
                if graph.ty(out).dtype != DType::I32 && !self.is_finite(out, bindings)? {
                    return Ok(Some(node.name.clone()));
                }
            }
        }
        Ok(None)
    }

    /// Runs one node.
    ///
    /// # Safety
    /// As for [`run`](Executor::run).
    pub(super) unsafe fn run_node(&self, node: usize, bindings: &Bindings) -> Result<()> {
        let node = &self.graph.nodes[node];
        let mut ins = [View::EMPTY; MAX_INS];
        let mut outs = [View::EMPTY; MAX_OUTS];
        for (view, &value) in ins.iter_mut().zip(&node.ins) {
            *view = self.view(value, bindings);
        }
        for (view, &value) in outs.iter_mut().zip(&node.outs) {
            *view = self.view(value, bindings);
        }
        let decode = node.ins.first().map_or(0, |&value| self.graph.ty(value).rows.decode(bindings));
        let Some(&first) = node.weights.first() else {
            return self.call(node, &ins, &[], &outs, decode);
        };
        let mut weights = [&self.graph.weights[first]; MAX_WEIGHTS];
        for (slot, &weight) in weights.iter_mut().zip(&node.weights) {
            *slot = &self.graph.weights[weight];
        }
        self.call(node, &ins, &weights[..node.weights.len()], &outs, decode)
    }

    fn call(
        &self,
        node: &super::Node,
        ins: &[View; MAX_INS],
        weights: &[&crate::backend::Prepared],
        outs: &[View; MAX_OUTS],
        decode: usize,
    ) -> Result<()> {
        let call = Call {
            op: &node.op,
            ins: &ins[..node.ins.len()],
            weights,
            outs: &outs[..node.outs.len()],
            decode,
            workspace: self.arena.addr + self.plan.workspace,
        };
        // SAFETY: views are blocks of the arena or states, with the types `infer` gave (the builder) and
        // no more rows than planned (`begin`); the planner keeps blocks that live at once apart and
        // sized the workspace for this op; index operands and states are the caller's obligation.
        unsafe { self.backend.run(&call) }.map_err(|error| match error {
            Error::Device { device, problem } => {
                let problem = format!("node `{}` ({}): {problem}", node.name, node.op.name());
                Error::Device { device, problem }
            }
            other => other,
        })
    }

    /// Checks the row counts of a step, and sends what was written for it.
    pub(super) fn begin(&mut self, bindings: &Bindings) -> Result<()> {
        let (b, max) = (bindings, &self.plan.max);
        assert!(
            b.decode <= b.tokens
                && b.decode_outputs <= b.outputs
                && b.tokens <= max.tokens
                && b.outputs <= max.outputs
                && b.images <= max.images
                && b.table_entries <= max.table_entries
                && (b.pages, b.context) == (max.pages, max.context),
            "{b:?} is more than was planned: {max:?}"
        );
        let unsent = std::mem::take(&mut self.unsent);
        if unsent.is_empty() {
            return Ok(());
        }
        // SAFETY: index inputs are the first bytes of the arena; the rest as in `write_at`.
        unsafe { self.backend.upload(self.arena.addr + unsent.start, &self.indices[unsent]) }
    }
}
