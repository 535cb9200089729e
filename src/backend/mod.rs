//! Devices. A [`Backend`] owns memory, lays weights out its own way and runs one op at a time; it
//! knows nothing of models, sequences or files.
//!
//! Memory is named by address (see [`View`]), so that one executor drives a host and a GPU. The
//! executor in [`crate::graph`] is the only caller of [`Backend::run`], and the planner there is what
//! keeps operands apart.

pub mod cpu;
pub mod cuda;

use crate::error::Result;
use crate::op::{Cost, Op, WeightType};
#[cfg(doc)]
use crate::tensor::Rows;
use crate::tensor::{DType, View, Weight};
use serde::Serialize;
use std::any::Any;
use std::fmt;
use std::time::{Duration, Instant};

/// Device memory, freed when dropped.
pub struct Buffer {
    /// Where it begins.
    pub addr: usize,
    /// How long it is.
    pub bytes: usize,
    /// Frees the memory when dropped.
    _owner: Box<dyn Any + Send + Sync>,
}

impl Buffer {
    /// Memory at `addr` that lives as long as `owner`.
    pub fn new(addr: usize, bytes: usize, owner: Box<dyn Any + Send + Sync>) -> Self {
        Buffer { addr, bytes, _owner: owner }
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} bytes)", self.bytes)
    }
}

/// A weight where and how a device wants it.
pub struct Prepared {
    /// Shape, and the encoding on the device.
    pub ty: WeightType,
    /// The name in the checkpoint.
    pub name: String,
    /// Where its bytes are, on the device.
    pub addr: usize,
    /// Bytes from one row to the next.
    pub row_stride: usize,
    /// Bytes of memory that it takes, padding included. Of weights that lie together the first has them all.
    pub bytes: usize,
    /// Keeps the bytes alive: the mapping itself on the CPU, device memory elsewhere.
    _owner: Box<dyn Any + Send + Sync>,
}

impl Prepared {
    /// The weight `name` at `addr`, where it lives as long as `owner` and nothing is padded.
    pub fn new(
        name: &str,
        ty: WeightType,
        addr: usize,
        row_stride: usize,
        owner: Box<dyn Any + Send + Sync>,
    ) -> Self {
        Prepared { ty, name: name.into(), addr, row_stride, bytes: ty.bytes(), _owner: owner }
    }
}

impl fmt::Debug for Prepared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Prepared({} [{}, {}] {})", self.name, self.ty.rows, self.ty.cols, self.ty.dtype)
    }
}

/// One op with its operands bound.
#[derive(Clone, Copy, Debug)]
pub struct Call<'a> {
    /// What to do.
    pub op: &'a Op,
    /// Activations and index buffers, in the op's order.
    pub ins: &'a [View],
    /// Weights, in the op's order.
    pub weights: &'a [&'a Prepared],
    /// Results, in the op's order.
    pub outs: &'a [View],
    /// How many rows of the first operand, the leading ones, are decode rows ([`Rows::decode`]). The CPU does
    /// not care.
    pub decode: usize,
    /// Scratch memory of at least [`Backend::workspace`] bytes, aligned to 256.
    pub workspace: usize,
}

/// What a device can do at most, as loops that do nothing else show.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Ceilings {
    /// Floating-point operations per second.
    pub flops_per_s: f64,
    /// Bytes read per second, from memory that no cache holds.
    pub bytes_per_s: f64,
    /// Bytes read per second again and again from [`CACHED`] bytes, each twice as many as the last; 0 where it was
    /// not measured, as on a GPU.
    pub cached_per_s: [f64; CACHED.len()],
}

/// Working sets whose read rates are measured, in bytes: from what a core keeps to what no processor does.
pub const CACHED: [u64; 11] = {
    let mut sizes = [256 << 10; 11];
    let mut i = 1;
    while i < sizes.len() {
        sizes[i] = 2 * sizes[i - 1];
        i += 1;
    }
    sizes
};

/// How many bytes are used again and again while an op, or a step, runs: they decide what a cache can give.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WorkingSet {
    /// Weights, keys and values: [`Cost::stored`] comes from among these.
    pub stored: u64,
    /// Activations.
    pub passing: u64,
}

impl Ceilings {
    /// The higher of two measurements: a ceiling is what was reached once.
    pub fn max(self, other: Self) -> Self {
        Ceilings {
            flops_per_s: self.flops_per_s.max(other.flops_per_s),
            bytes_per_s: self.bytes_per_s.max(other.bytes_per_s),
            cached_per_s: std::array::from_fn(|i| self.cached_per_s[i].max(other.cached_per_s[i])),
        }
    }

    /// Those of a run, by the measurements before and after it: what disturbs one of them, such as threads that
    /// begin on one core, would make 187 % of a ceiling.
    pub fn around(before: Option<Self>, after: Option<Self>) -> Option<Self> {
        before.zip(after).map(|(before, after)| before.max(after))
    }

    /// The rate at which bytes of a working set of this size can be read at most: that of the largest set measured
    /// that is no larger.
    pub fn read_rate(&self, working_set: u64) -> f64 {
        let level = CACHED.iter().rposition(|&size| size <= working_set).unwrap_or(0);
        match CACHED.last() {
            Some(&last) if working_set >= 2 * last => self.bytes_per_s,
            // What a small loop reaches, a cache at least gives; a level that was disturbed is no ceiling.
            _ => self.cached_per_s[level..].iter().copied().fold(self.bytes_per_s, f64::max),
        }
    }

    /// Seconds that work takes at least: the longer of computing and of moving.
    pub fn floor(&self, cost: Cost, set: WorkingSet) -> f64 {
        (cost.flops as f64 / self.flops_per_s).max(self.moving(cost, set))
    }

    /// What makes the floor: `flops`, `bytes`, or `cache` where the bytes can come from one.
    pub fn bound(&self, cost: Cost, set: WorkingSet) -> &'static str {
        if cost.flops as f64 / self.flops_per_s > self.moving(cost, set) {
            return "flops";
        }
        // Memory's rate varies; a cache is a good deal faster.
        let cached = self.moving(cost, set) < 0.8 * (cost.bytes as f64 / self.bytes_per_s);
        if cached { "cache" } else { "bytes" }
    }

    /// Seconds that the bytes take at least to be moved.
    fn moving(&self, cost: Cost, set: WorkingSet) -> f64 {
        cost.stored as f64 / self.read_rate(set.stored)
            + (cost.bytes - cost.stored) as f64 / self.read_rate(set.passing)
    }
}

/// What a device that counts its work has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Kernels launched.
    pub launches: u64,
    /// Barriers that a block, or a warp, went through.
    pub barriers: u64,
    /// Accesses to memory that were checked.
    pub accesses: u64,
}

impl Counts {
    /// What was done since.
    pub fn since(self, before: Self) -> Self {
        Counts {
            launches: self.launches - before.launches,
            barriers: self.barriers - before.barriers,
            accesses: self.accesses - before.accesses,
        }
    }
}

impl std::ops::AddAssign for Counts {
    fn add_assign(&mut self, more: Self) {
        *self = Counts {
            launches: self.launches + more.launches,
            barriers: self.barriers + more.barriers,
            accesses: self.accesses + more.accesses,
        };
    }
}

/// Ops that were recorded and can be repeated on the same operands; see [`Backend::record`].
pub trait Recording: Send + Sync {
    /// Runs all of them, or starts to.
    ///
    /// # Errors
    /// As for [`Backend::run`].
    ///
    /// # Safety
    /// As for [`Backend::run`], for each of the ops: operands and weights are live and where they were, with
    /// the same row counts.
    unsafe fn replay(&self) -> Result<()>;
}

/// A device.
pub trait Backend: Send + Sync {
    /// The name, as the command line spells it, and what the device is.
    fn describe(&self) -> String;

    /// Threads of this machine that compute; 0 where another device does.
    fn threads(&self) -> usize {
        0
    }

    /// The dtype of activations and of the KV cache: f32 on the CPU, 16 bits on a GPU.
    fn dtype(&self) -> DType;

    /// Measures what the device can do at most, on the threads that run ops; `None` where nothing is timed. The
    /// CPU reads `weights`, if they are more than its caches hold: the ceiling of those very pages.
    ///
    /// # Errors
    /// [`Error::Memory`](crate::Error::Memory) if there is no room for what is read.
    fn ceilings(&self, _weights: &[u8]) -> Result<Option<Ceilings>> {
        Ok(None)
    }

    /// How long the ops that `work` runs take on the device, from the first's beginning to the last's end.
    ///
    /// # Errors
    /// What `work` says; [`Error::Device`](crate::Error::Device).
    fn time(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<Duration> {
        let start = Instant::now();
        work()?;
        Ok(start.elapsed())
    }

    /// Whether this device has marks: what is done without a pause can then be timed all the same.
    fn marks(&self) -> bool {
        false
    }

    /// Marks the moment when the op that was started last is done, as the `at`-th mark; in a recording, at each replay.
    /// A device has one row of marks: one session at a time is timed by them.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device).
    fn mark(&self, _at: usize) -> Result<()> {
        Ok(())
    }

    /// The times from each of the first `count` marks to the next, once all work that was asked for is done.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device).
    fn between_marks(&self, _count: usize) -> Result<Vec<Duration>> {
        Ok(Vec::new())
    }

    /// What has been done so far, on a device that counts: the emulated one, where nothing is timed.
    fn counts(&self) -> Option<Counts> {
        None
    }

    /// Begins a range that a profiler of this device shows, inside the one that is open.
    fn begin_range(&self, _name: &str) {}

    /// Ends the range that began last.
    fn end_range(&self) {}

    /// Whether a profiler is told of ranges.
    fn is_listened_to(&self) -> bool {
        false
    }

    /// From now on each thread that computes writes down when it worked, the first `capacity` times; 0 stops it.
    fn watch_threads(&self, _capacity: usize) {}

    /// What they wrote, thread by thread; nothing where another device computes.
    fn thread_parts(&self) -> Vec<Vec<(Instant, Instant)>> {
        Vec::new()
    }

    /// Bytes that are free for weights; `None` for a device that uses them where they are.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device).
    fn available(&self) -> Result<Option<u64>> {
        Ok(None)
    }

    /// Bytes of this machine's memory that copies to and from another device pass through.
    fn pinned(&self) -> usize {
        0
    }

    /// Memory, aligned to at least 64 bytes, on a GPU to 256. It holds anything: zeros on the CPU, on the
    /// emulated device what must not be read.
    ///
    /// # Errors
    /// [`Error::Memory`](crate::Error::Memory) with the numbers when there is not enough.
    fn alloc(&self, what: &str, bytes: usize) -> Result<Buffer>;

    /// Puts the weights of an op where and how its kernels want them, in the same order. The CPU returns the
    /// mappings themselves.
    ///
    /// # Errors
    /// [`Error::Memory`](crate::Error::Memory) when they do not fit; [`Error::Device`](crate::Error::Device).
    fn prepare(&self, op: &Op, weights: &[Weight]) -> Result<Vec<Prepared>>;

    /// Scratch bytes an op needs, whichever of its rows are decode rows; never less for more rows.
    fn workspace(&self, op: &Op, ins: &[View], weights: &[WeightType], outs: &[View]) -> usize;

    /// Runs one op, or starts it: its results are there for ops that run, and for copies that are made, later.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) when the device refuses; the CPU never does. A GPU may tell of
    /// a failed op only at a later one or at the next copy.
    ///
    /// # Safety
    /// Every view lies inside live memory of this backend and has the type that [`Op::infer`] gave;
    /// index operands name rows that exist; results overlap neither each other nor any operand nor the
    /// workspace (a residual operand of a Linear may be its result); nobody else touches any of them meanwhile.
    unsafe fn run(&self, call: &Call<'_>) -> Result<()>;

    /// Records the ops that `work` runs, without running them, so that they can be repeated with less work for
    /// the host. `None`, without calling `work`, from a device that gains nothing by it.
    ///
    /// # Errors
    /// What `work` says; [`Error::Device`](crate::Error::Device).
    fn record(&self, _work: &mut dyn FnMut() -> Result<()>) -> Result<Option<Box<dyn Recording>>> {
        Ok(None)
    }

    /// Waits until all that was started is done.
    ///
    /// # Errors
    /// As for [`run`](Backend::run).
    fn synchronize(&self) -> Result<()> {
        Ok(())
    }

    /// Copies host bytes to the device.
    ///
    /// # Errors
    /// As for [`run`](Backend::run).
    ///
    /// # Safety
    /// `addr..addr + bytes.len()` lies in live memory of this backend that nobody else touches meanwhile.
    unsafe fn upload(&self, addr: usize, bytes: &[u8]) -> Result<()>;

    /// Copies device bytes to the host, when all that was asked for before is done.
    ///
    /// # Errors
    /// As for [`run`](Backend::run).
    ///
    /// # Safety
    /// `addr..addr + bytes.len()` lies in live memory of this backend that nobody writes meanwhile.
    unsafe fn download(&self, addr: usize, bytes: &mut [u8]) -> Result<()>;

    /// Copies `bytes` bytes within the device.
    ///
    /// # Errors
    /// As for [`run`](Backend::run).
    ///
    /// # Safety
    /// As for [`upload`](Backend::upload) and [`download`](Backend::download); the ranges do not overlap.
    unsafe fn copy(&self, from: usize, to: usize, bytes: usize) -> Result<()>;

    /// Whether all floats of a view are finite, when all that was asked for before is done.
    ///
    /// # Errors
    /// As for [`run`](Backend::run).
    ///
    /// # Safety
    /// As for [`download`](Backend::download).
    unsafe fn finite(&self, view: &View) -> Result<bool> {
        // SAFETY: the caller's obligation.
        unsafe { finite_on_host(self, view) }
    }
}

/// [`Backend::finite`] by a copy of the view.
///
/// # Safety
/// As for it.
unsafe fn finite_on_host<B: Backend + ?Sized>(backend: &B, view: &View) -> Result<bool> {
    let mut bytes = vec![0u8; view.bytes()];
    // SAFETY: the caller's obligation.
    unsafe { backend.download(view.addr, &mut bytes)? };
    Ok(all_finite(&view.dtype.widen(&bytes)))
}

/// Whether no value is infinite or NaN. A block is looked at whole, which the compiler makes vectors of: a test that
/// stops at the first value takes twice as long.
pub(crate) fn all_finite(values: &[f32]) -> bool {
    const EXPONENT: u32 = 0x7f80_0000;
    values.chunks(1024).all(|block| {
        block.iter().fold(0, |found, x| found | u32::from(x.to_bits() & EXPONENT == EXPONENT)) == 0
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_finite_is_found_wherever_it_stands() {
        let mut values: Vec<f32> = (0..2050).map(|i| f32::MAX * (i as f32 / 1025.0 - 1.0)).collect();
        assert!(all_finite(&values) && all_finite(&[]));
        for at in [0, 1, 1023, 1024, 2047, 2048, 2049] {
            let before = values[at];
            for wrong in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, -f32::NAN, f32::from_bits(0x7f80_0001)]
            {
                values[at] = wrong;
                assert!(!all_finite(&values), "{wrong} at {at}");
            }
            values[at] = before;
        }
    }

    #[test]
    fn the_ceilings_of_a_run_are_the_higher_of_two_measurements() {
        let before = Ceilings { flops_per_s: 1.0, bytes_per_s: 4.0, cached_per_s: [2.0; CACHED.len()] };
        let after = Ceilings { flops_per_s: 2.0, bytes_per_s: 3.0, cached_per_s: [1.0; CACHED.len()] };
        let both = Ceilings { flops_per_s: 2.0, bytes_per_s: 4.0, cached_per_s: [2.0; CACHED.len()] };
        assert_eq!(Ceilings::around(Some(before), Some(after)), Some(both));
        assert_eq!(Ceilings::around(None, None), None, "nothing is timed");
    }
}
