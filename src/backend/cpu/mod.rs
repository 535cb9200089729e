//! The embedded CPU backend: one match over the closed list of ops, and a room for each family.
//!
//! Every kernel is written once over sixteen lanes ([`lanes`]) and runs on the instruction set that the
//! machine has ([`machine`]), on a persistent pool of threads ([`pool`]). Sums have one order on all of
//! them, so a result's bits depend on neither.

pub mod attention;
pub mod embed;
pub mod lanes;
pub mod linear;
pub mod machine;
pub mod norm;
pub mod panel;
pub mod pool;
pub mod rope;
pub mod sample;

use super::{Backend, Buffer, Call, Prepared};
use crate::error::{Error, Result};
use crate::op::{Activation, Op, SAMPLE_PARAMS, Select, WeightType};
use crate::tensor::{View, Weight};
use lanes::Isa;
use linear::{Layer, Residual};
use machine::Machine;
use panel::Matrix;
use std::slice::{from_raw_parts, from_raw_parts_mut};

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

/// Bytes of memory this machine has, or 0 if it does not tell.
pub fn physical_memory() -> u64 {
    // SAFETY: sysconf reads a number and touches no memory of ours.
    let (pages, size) = unsafe { (libc::sysconf(libc::_SC_PHYS_PAGES), libc::sysconf(libc::_SC_PAGESIZE)) };
    u64::try_from(pages).unwrap_or(0) * u64::try_from(size).unwrap_or(0)
}

impl Backend for CpuBackend {
    fn describe(&self) -> String {
        let (isa, threads) = (self.machine.isa().name(), self.threads());
        format!("cpu ({isa}, {threads} thread{})", if threads == 1 { "" } else { "s" })
    }

    fn alloc(&self, what: &str, bytes: usize) -> Result<Buffer> {
        let available = physical_memory();
        let refuse = |remedy: &str| Error::Memory {
            what: what.into(),
            needed: bytes as u64,
            available,
            remedy: remedy.into(),
        };
        if available > 0 && bytes as u64 > available {
            return Err(refuse("; lower --context, --kv-memory or --prefill-chunk"));
        }
        // Anonymous pages are zero, page-aligned, and take memory when they are first written.
        let map = memmap2::MmapMut::map_anon(bytes.max(1))
            .map_err(|error| refuse(&format!("; the system says: {error}")))?;
        Ok(Buffer::new(map.as_ptr() as usize, bytes, Box::new(map)))
    }

    fn prepare(&self, weight: &Weight) -> Result<Prepared> {
        let addr = weight.bytes.as_bytes().as_ptr() as usize;
        Ok(Prepared::new(weight, addr, weight.row_stride(), Box::new(weight.bytes.clone())))
    }

    fn workspace(&self, op: &Op, ins: &[View], weights: &[WeightType], outs: &[View]) -> usize {
        let threads = self.threads();
        match *op {
            Op::PatchEmbed { .. } => embed::patch_workspace(outs[0].rows, weights[0].cols, threads),
            Op::Linear { .. } | Op::GatedLinear { .. } => {
                linear::linear_workspace(ins[0].rows, ins[0].cols, threads)
            }
            Op::Attention { heads, head_dim, rows, .. } => {
                attention::dense_workspace(rows, heads, head_dim, threads)
            }
            Op::PagedAttention { head_dim, .. } => attention::paged_workspace(head_dim, threads),
            Op::Sample => ins[0].cols * size_of::<sample::Candidate>(),
            Op::LayerNorm { .. }
            | Op::RmsNorm { .. }
            | Op::AddRmsNorm { .. }
            | Op::RopeAppend { .. }
            | Op::EmbedRows
            | Op::SelectRows { .. }
            | Op::L2Normalize => 0,
        }
    }

    unsafe fn run(&self, call: &Call<'_>) {
        todo!()
    }

    unsafe fn upload(&self, addr: usize, bytes: &[u8]) {
        // SAFETY: the caller's obligation.
        unsafe { from_raw_parts_mut(addr as *mut u8, bytes.len()) }.copy_from_slice(bytes);
    }

    unsafe fn download(&self, addr: usize, bytes: &mut [u8]) {
        // SAFETY: the caller's obligation.
        bytes.copy_from_slice(unsafe { from_raw_parts(addr as *const u8, bytes.len()) });
    }

    unsafe fn copy(&self, from: usize, to: usize, bytes: usize) {
        // SAFETY: the caller's obligation.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, bytes) };
    }
}
