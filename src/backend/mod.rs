//! Devices. A [`Backend`] owns memory, lays weights out its own way and runs one op at a time; it
//! knows nothing of models, sequences or files.
//!
//! Memory is named by address (see [`View`]), so that one executor drives a host and a GPU. The
//! executor in [`crate::graph`] is the only caller of [`Backend::run`], and the planner there is what
//! keeps operands apart.

pub mod cpu;

use crate::error::Result;
use crate::op::{Op, WeightType};
use crate::tensor::{View, Weight};
use std::any::Any;
use std::fmt;

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
    /// Shape and encoding.
    pub ty: WeightType,
    /// The name in the checkpoint.
    pub name: String,
    /// Where its bytes are, on the device.
    pub addr: usize,
    /// Bytes from one row to the next.
    pub row_stride: usize,
    /// Keeps the bytes alive: the mapping itself on the CPU, device memory elsewhere.
    _owner: Box<dyn Any + Send + Sync>,
}

impl Prepared {
    /// A weight at `addr` that lives as long as `owner`.
    pub fn new(weight: &Weight, addr: usize, row_stride: usize, owner: Box<dyn Any + Send + Sync>) -> Self {
        let ty = WeightType { rows: weight.rows, cols: weight.cols, dtype: weight.dtype };
        Prepared { ty, name: weight.name.clone(), addr, row_stride, _owner: owner }
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
    /// Scratch memory of at least [`Backend::workspace`] bytes, aligned to 64.
    pub workspace: usize,
}

/// A device.
pub trait Backend: Send + Sync {
    /// The name, as the command line spells it, and what the device is.
    fn describe(&self) -> String;

    /// Zeroed memory, aligned to at least 64 bytes.
    ///
    /// # Errors
    /// [`Error::Memory`](crate::Error::Memory) with the numbers when there is not enough.
    fn alloc(&self, what: &str, bytes: usize) -> Result<Buffer>;

    /// Puts a weight where the device's kernels want it. The CPU returns the mapping itself.
    ///
    /// # Errors
    /// [`Error::Memory`](crate::Error::Memory) when it does not fit.
    fn prepare(&self, weight: &Weight) -> Result<Prepared>;

    /// Scratch bytes an op needs; never less for more rows.
    fn workspace(&self, op: &Op, ins: &[View], weights: &[WeightType], outs: &[View]) -> usize;

    /// Runs one op.
    ///
    /// # Safety
    /// Every view lies inside live memory of this backend and has the type that [`Op::infer`] gave;
    /// index operands name rows that exist; results overlap neither each other nor any operand nor the
    /// workspace (a residual operand of a Linear may be its result); nobody else touches any of them meanwhile.
    unsafe fn run(&self, call: &Call<'_>);

    /// Copies host bytes to the device.
    ///
    /// # Safety
    /// `addr..addr + bytes.len()` lies in live memory of this backend that nobody else touches meanwhile.
    unsafe fn upload(&self, addr: usize, bytes: &[u8]);

    /// Copies device bytes to the host.
    ///
    /// # Safety
    /// `addr..addr + bytes.len()` lies in live memory of this backend that nobody writes meanwhile.
    unsafe fn download(&self, addr: usize, bytes: &mut [u8]);

    /// Copies `bytes` bytes within the device.
    ///
    /// # Safety
    /// As for [`upload`](Backend::upload) and [`download`](Backend::download); the ranges do not overlap.
    unsafe fn copy(&self, from: usize, to: usize, bytes: usize);
}
