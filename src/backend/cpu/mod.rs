//! The embedded CPU backend: one match over the closed list of ops, and a room for each family.
//!
//! Every kernel is written once over sixteen lanes ([`lanes`]) and runs on the instruction set that the
//! machine has ([`machine`]), on a persistent pool of threads ([`pool`]). Sums have one order on all of
//! them, so a result's bits depend on neither.

#![allow(clippy::needless_range_loop, reason = "loops over registers name several arrays by one index")]

pub mod attention;
pub mod ceilings;
pub mod embed;
pub mod lanes;
pub mod linear;
pub mod machine;
mod memory;
pub mod norm;
pub mod panel;
pub mod pool;
pub mod rope;
pub mod sample;

pub use memory::usable_memory;

use super::{Backend, Buffer, Call, Ceilings, Prepared, all_finite};
use crate::error::{Error, Result};
use crate::op::{Activation, MAX_PAIRS, Op, Select, WeightType};
use crate::tensor::{DType, View, Weight};
use attention::Heads;
use lanes::Isa;
use linear::{Layer, LowRank, Residual};
use machine::Machine;
use panel::Matrix;
use std::slice::{from_raw_parts, from_raw_parts_mut};

/// Bytes behind every allocation that may be read.
const SLACK: usize = 64;
/// Bytes that are read to see how fast memory is.
const CEILING_BYTES: usize = 512 << 20;

/// Most matrices that a linear op puts side by side.
const MAX_MATRICES: usize = 4;

/// The processor this program runs on.
pub struct CpuBackend {
    machine: Machine,
}

impl CpuBackend {
    /// The fastest instruction set there is, on `threads` threads, or one for each core.
    ///
    /// # Errors
    /// [`Error::Device`] when the operating system has no threads to give.
    pub fn new(threads: Option<usize>) -> Result<Self> {
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        Self::with_isa(Isa::detect(), threads.unwrap_or(cores))
    }

    /// A given instruction set, which must be one of [`Isa::available`], on `threads` threads.
    ///
    /// # Errors
    /// As for [`new`](CpuBackend::new).
    pub fn with_isa(isa: Isa, threads: usize) -> Result<Self> {
        let machine = Machine::with_isa(isa, threads).map_err(|error| Error::Device {
            device: "cpu".into(),
            problem: format!("{threads} threads cannot be started: {error}; lower --threads"),
        })?;
        Ok(CpuBackend { machine })
    }

    /// How many threads compute.
    pub fn threads(&self) -> usize {
        self.machine.threads()
    }

    /// The instruction sets that kernels exist for and this machine has, the fastest first.
    pub fn instruction_sets(&self) -> impl Iterator<Item = &'static str> {
        Isa::available().into_iter().map(Isa::name)
    }
}

/// The ranks of the pairs of a linear op, whose A and B are the last of its `weights`.
fn ranks(
    weights: usize,
    pairs: usize,
    ty: impl Fn(usize) -> WeightType + Clone,
) -> impl Iterator<Item = usize> + Clone {
    (weights - 2 * pairs..weights).step_by(2).map(move |a| ty(a).rows)
}

impl Backend for CpuBackend {
    fn describe(&self) -> String {
        let (isa, threads) = (self.machine.isa().name(), self.threads());
        format!("cpu ({isa}, {threads} thread{})", if threads == 1 { "" } else { "s" })
    }

    fn threads(&self) -> usize {
        self.machine.threads()
    }

    fn dtype(&self) -> DType {
        DType::F32
    }

    fn ceilings(&self, weights: &[u8]) -> Result<Option<Ceilings>> {
        if weights.len() >= CEILING_BYTES {
            return Ok(Some(ceilings::measure(
                &self.machine,
                &weights[..weights.len().min(4 * CEILING_BYTES)],
            )));
        }
        // Larger than any cache, in small pages as mapped weights are; written, or all of it would be
        // one page of zeros.
        let mut memory = memmap2::MmapMut::map_anon(CEILING_BYTES).map_err(|error| Error::Memory {
            what: "the read ceiling".into(),
            needed: CEILING_BYTES as u64,
            available: usable_memory(),
            remedy: format!("; the system says: {error}"),
        })?;
        memory.fill(1);
        Ok(Some(ceilings::measure(&self.machine, &memory)))
    }

    fn watch_threads(&self, capacity: usize) {
        self.machine.pool().watch(capacity);
    }

    fn thread_parts(&self) -> Vec<Vec<pool::Part>> {
        self.machine.pool().parts()
    }

    fn alloc(&self, what: &str, bytes: usize) -> Result<Buffer> {
        let available = usable_memory();
        let refuse = |remedy: &str| Error::Memory {
            what: what.into(),
            needed: bytes as u64,
            available,
            remedy: remedy.into(),
        };
        if available > 0 && bytes as u64 > available {
            return Err(refuse("; lower --context, --kv-memory or --prefill-chunk"));
        }
        // Anonymous pages are zero, page-aligned, and take memory when they are first written. Attention
        // reads whole vectors, so it may look up to one behind the last value of the last page.
        let map = memmap2::MmapMut::map_anon(bytes + SLACK)
            .map_err(|error| refuse(&format!("; the system says: {error}")))?;
        Ok(Buffer::new(map.as_ptr() as usize, bytes, Box::new(map)))
    }

    fn prepare(&self, _: &Op, weights: &[Weight]) -> Result<Vec<Prepared>> {
        let in_place = |weight: &Weight| {
            let (addr, owner) = (weight.bytes.as_bytes().as_ptr() as usize, Box::new(weight.bytes.clone()));
            Prepared::new(&weight.name, weight.into(), addr, weight.row_stride(), owner)
        };
        Ok(weights.iter().map(in_place).collect())
    }

    fn workspace(&self, op: &Op, ins: &[View], weights: &[WeightType], _: &[View]) -> usize {
        let threads = self.threads();
        match *op {
            Op::PatchEmbed { image, patch } => {
                embed::patch_workspace((image / patch).pow(2), weights[0].cols, threads)
            }
            Op::Linear { .. } | Op::GatedLinear { .. } => {
                let ranks = ranks(weights.len(), op.pairs().len(), |i| weights[i]);
                linear::linear_workspace(ins[0].rows, ins[0].cols, ranks, threads)
            }
            Op::Attention { heads, head_dim, rows, .. } => attention::dense_workspace(rows, heads, head_dim),
            Op::Sample => ins[0].cols * size_of::<sample::Candidate>(),
            Op::LayerNorm { .. }
            | Op::RmsNorm { .. }
            | Op::AddRmsNorm { .. }
            | Op::RopeAppend { .. }
            | Op::PagedAttention { .. }
            | Op::EmbedRows
            | Op::EmbedTokens
            | Op::SelectRows { .. }
            | Op::L2Normalize => 0,
        }
    }

    unsafe fn run(&self, call: &Call<'_>) -> Result<()> {
        // SAFETY: the caller's obligations are those of `Operands`.
        let operands = unsafe { Operands::new(call) };
        operands.run(&self.machine);
        Ok(())
    }

    unsafe fn upload(&self, addr: usize, bytes: &[u8]) -> Result<()> {
        // SAFETY: the caller's obligation.
        unsafe { from_raw_parts_mut(addr as *mut u8, bytes.len()) }.copy_from_slice(bytes);
        Ok(())
    }

    unsafe fn download(&self, addr: usize, bytes: &mut [u8]) -> Result<()> {
        // SAFETY: the caller's obligation.
        bytes.copy_from_slice(unsafe { from_raw_parts(addr as *const u8, bytes.len()) });
        Ok(())
    }

    unsafe fn finite(&self, view: &View) -> Result<bool> {
        assert_eq!(view.dtype, DType::F32, "what ops compute on the CPU");
        // SAFETY: the caller's obligation; activations are f32, and aligned as such.
        Ok(all_finite(unsafe { from_raw_parts(view.addr as *const f32, view.len()) }))
    }

    unsafe fn copy(&self, from: usize, to: usize, bytes: usize) -> Result<()> {
        // SAFETY: the caller's obligation.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, bytes) };
        Ok(())
    }
}

/// A call whose views may be turned into slices.
struct Operands<'a> {
    call: &'a Call<'a>,
}

impl<'a> Operands<'a> {
    /// # Safety
    /// Those of [`Backend::run`]: views are live, typed as `Op::infer` says, and apart from each other;
    /// nobody else touches them while the operands live.
    unsafe fn new(call: &'a Call<'a>) -> Self {
        Operands { call }
    }

    /// One arm for each op: it hands slices to the op's room.
    fn run(&self, machine: &Machine) {
        let call = self.call;
        match *call.op {
            Op::PatchEmbed { image, patch } => {
                let weights = embed::PatchWeights {
                    conv: self.matrix(0),
                    class: self.matrix(1),
                    positions: self.matrix(2),
                };
                let workspace =
                    embed::patch_workspace((image / patch).pow(2), weights.conv.cols, machine.threads());
                let workspace = self.workspace(workspace);
                embed::patch_embed(machine, (image, patch), self.floats(0), weights, self.out(0), workspace);
            }
            Op::LayerNorm { eps } => {
                let norm = norm::Norm::Layer { gamma: self.matrix(0), beta: self.matrix(1), eps };
                norm::norm(machine, norm, self.floats(0), call.ins[0].cols, None, self.out(0));
            }
            Op::RmsNorm { eps } => {
                let norm = norm::Norm::Rms { gamma: self.matrix(0), eps };
                norm::norm(machine, norm, self.floats(0), call.ins[0].cols, None, self.out(0));
            }
            Op::AddRmsNorm { eps } => {
                let norm = norm::Norm::Rms { gamma: self.matrix(0), eps };
                let add = Some((self.floats(1), self.out(0)));
                norm::norm(machine, norm, self.floats(0), call.ins[0].cols, add, self.out(1));
            }
            Op::L2Normalize => {
                norm::norm(machine, norm::Norm::L2, self.floats(0), call.ins[0].cols, None, self.out(0));
            }
            Op::Linear { act, bias, residual, .. } => self.linear(machine, act, bias, residual),
            Op::GatedLinear { bias, .. } => self.with_layers(bias, |layers| {
                let workspace = self.linear_workspace(machine);
                linear::gated_linear(machine, self.floats(0), layers[0], layers[1], self.out(0), workspace);
            }),
            Op::Attention { heads, head_dim, rows, causal } => {
                let of = Heads { heads, kv_heads: heads, head_dim };
                let workspace = self.workspace(attention::dense_workspace(rows, heads, head_dim));
                attention::dense(machine, of, self.floats(0), (rows, causal), self.out(0), workspace);
            }
            Op::RopeAppend { heads, kv_heads, head_dim } => {
                let operands = rope::Rope {
                    qkv: self.floats(0),
                    positions: self.indices(1),
                    slots: self.indices(2),
                    table: self.floats(3),
                };
                let pages = (self.state(4), self.state(5));
                rope::rope_append(machine, Heads { heads, kv_heads, head_dim }, operands, pages, self.out(0));
            }
            Op::PagedAttention { heads, kv_heads, head_dim } => {
                let operands = attention::Paged {
                    q: self.floats(0),
                    positions: self.indices(1),
                    starts: self.indices(2),
                    tables: self.indices(3),
                    k: self.floats(4),
                    v: self.floats(5),
                };
                attention::paged(machine, Heads { heads, kv_heads, head_dim }, operands, self.out(0));
            }
            Op::EmbedRows => {
                let ids = (self.indices(0), self.indices(1));
                embed::embed_rows(machine, ids, self.floats(2), self.matrix(0), self.out(0));
            }
            Op::EmbedTokens => {
                embed::embed_tokens(machine, self.indices(0), self.matrix(0), self.matrix(1), self.out(0));
            }
            Op::SelectRows { select } => self.select(select),
            Op::Sample => self.sample(),
        }
    }

    fn linear(&self, machine: &Machine, act: Activation, bias: bool, residual: bool) {
        let residual = if residual { Residual::Add(self.floats(1)) } else { Residual::None };
        self.with_layers(bias, |layers| {
            let workspace = self.linear_workspace(machine);
            linear::linear(machine, self.floats(0), layers, (act, residual), self.out(0), workspace);
        });
    }

    /// Hands the matrices of a linear op to `compute`, each with its bias and its pairs.
    fn with_layers(&self, bias: bool, compute: impl FnOnce(&[Layer<'_>])) {
        let pairs = self.call.op.pairs();
        let (n, own) = Op::matrices(self.call.weights.len(), bias, pairs);
        let mut low_rank = [LowRank { a: self.matrix(0), b: self.matrix(0), scale: 0.0 }; MAX_PAIRS];
        for (p, (low_rank, pair)) in low_rank.iter_mut().zip(pairs).enumerate() {
            let (a, b) = (self.matrix(own + 2 * p), self.matrix(own + 2 * p + 1));
            *low_rank = LowRank { a, b, scale: pair.scale };
        }
        let mut rest = &low_rank[..pairs.len()];
        let mut layers = [Layer::new(self.matrix(0), None); MAX_MATRICES];
        for (i, layer) in layers[..n].iter_mut().enumerate() {
            let count = pairs.iter().filter(|pair| pair.matrix == i).count();
            let (own_pairs, others) = rest.split_at(count);
            *layer = Layer::new(self.matrix(i), bias.then(|| self.matrix(n + i)));
            (layer.pairs, rest) = (own_pairs, others);
        }
        compute(&layers[..n]);
    }

    fn select(&self, select: Select) {
        let out = self.out(0);
        let width = self.call.outs[0].cols;
        for (row, out) in out.chunks_exact_mut(width).enumerate() {
            let (from, operands) = match select {
                Select::Index => (self.indices(1)[row] as usize, 1),
                Select::All => (row, self.call.ins.len()),
                Select::Patches { rows } => {
                    (row / (rows - 1) * rows + 1 + row % (rows - 1), self.call.ins.len())
                }
            };
            let mut at = 0;
            for i in 0..operands {
                let cols = self.call.ins[i].cols;
                out[at..at + cols].copy_from_slice(&self.floats(i)[from * cols..][..cols]);
                at += cols;
            }
        }
    }

    fn sample(&self) {
        let cols = self.call.ins[0].cols;
        let scratch = self.workspace(cols * size_of::<sample::Candidate>());
        let params = bytemuck::cast_slice(self.indices(1));
        let words = cols.div_ceil(32);
        let out: &mut [i32] = bytemuck::cast_slice_mut(self.out(0));
        for (row, id) in out.iter_mut().enumerate() {
            let logits = &self.floats(0)[row * cols..][..cols];
            let seen = &bytemuck::cast_slice(self.indices(2))[row * words..][..words];
            let scratch = bytemuck::cast_slice_mut(scratch);
            *id = sample::sample(logits, &params[row], seen, scratch).map_or(-1, |id| id as i32);
        }
    }

    fn linear_workspace(&self, machine: &Machine) -> &mut [u8] {
        let (x, weights) = (&self.call.ins[0], self.call.weights);
        let ranks = ranks(weights.len(), self.call.op.pairs().len(), |i| weights[i].ty);
        self.workspace(linear::linear_workspace(x.rows, x.cols, ranks, machine.threads()))
    }

    /// Operand `i` as numbers.
    fn floats(&self, i: usize) -> &'a [f32] {
        let view = &self.call.ins[i];
        // SAFETY: `new`: the view is live and holds f32, which nobody writes meanwhile.
        unsafe { from_raw_parts(view.addr as *const f32, view.len()) }
    }

    /// Operand `i` as indices.
    fn indices(&self, i: usize) -> &'a [i32] {
        let view = &self.call.ins[i];
        // SAFETY: as for `floats`, and it holds i32.
        unsafe { from_raw_parts(view.addr as *const i32, view.len()) }
    }

    /// Operand `i` as state that the op writes.
    #[allow(clippy::mut_from_ref, reason = "each state is asked for once, by the one op that writes it")]
    fn state(&self, i: usize) -> &'a mut [f32] {
        let view = &self.call.ins[i];
        // SAFETY: `new`: the view is live, and no other operand is the same pages.
        unsafe { from_raw_parts_mut(view.addr as *mut f32, view.len()) }
    }

    /// Result `i`.
    #[allow(clippy::mut_from_ref, reason = "each result is asked for once")]
    fn out(&self, i: usize) -> &'a mut [f32] {
        let view = &self.call.outs[i];
        // SAFETY: `new`: results overlap nothing. An i32 result has the size and alignment of f32.
        unsafe { from_raw_parts_mut(view.addr as *mut f32, view.len()) }
    }

    /// The first `bytes` of the workspace.
    #[allow(clippy::mut_from_ref, reason = "the workspace is asked for once")]
    fn workspace(&self, bytes: usize) -> &'a mut [u8] {
        // SAFETY: `new`: the workspace is as large as `Backend::workspace` said, and overlaps nothing.
        unsafe { from_raw_parts_mut(self.call.workspace as *mut u8, bytes) }
    }

    /// Weight `i`.
    fn matrix(&self, i: usize) -> Matrix<'a> {
        let weight = self.call.weights[i];
        // SAFETY: `prepare` made the weight: its bytes are at this address as long as it lives.
        let bytes = unsafe { from_raw_parts(weight.addr as *const u8, weight.ty.bytes()) };
        Matrix { bytes, dtype: weight.ty.dtype, rows: weight.ty.rows, cols: weight.ty.cols }
    }
}
