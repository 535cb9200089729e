//! CUDA devices: a GPU, or the emulated device that runs the same kernels anywhere. Activations are bf16 or
//! f16, sums f32.
//!
//! The rooms are those of `backend/cpu` and of `kernels/`: each family of ops has one file of kernels, and
//! beside it here one of launch functions, which check operands and fill argument structs. Below them stand
//! [`device`] (kernels by name) and a [`driver`] (memory and a queue of work).
//!
//! An op's rows may be of two phases ([`Call::decode`]): Linear, GatedLinear and PagedAttention have a family of
//! kernels for each. A row's bits are the same in any batch, chunk and pages, but differ between the phases, and
//! between architectures.

mod attention;
mod ceiling;
mod clock;
pub mod device;
pub mod driver;
mod embed;
#[cfg(feature = "emu")]
pub mod emu;
mod finite;
pub mod gpu;
pub mod ledger;
mod library;
mod linear;
mod marks;
mod matvec;
mod norm;
mod nvtx;
mod pairs;
mod patch;
pub mod resources;
mod rope;
mod sample;
mod staging;
pub mod tile;
mod weights;

use super::{Backend, Buffer, Call, Ceilings, Counts, Prepared, Recording, finite_on_host};
#[cfg(doc)]
use crate::error::Error;
use crate::error::Result;
use crate::op::{Op, WeightType};
use crate::tensor::{DType, View, Weight};
use device::Device;
use driver::Driver;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;
use weights::Tied;

/// A CUDA device that computes in one 16-bit dtype.
pub struct CudaBackend {
    device: Device,
    tied: Tied,
    check_launches: bool,
}

impl CudaBackend {
    /// A backend over a driver, in bf16 or f16.
    ///
    /// # Errors
    /// [`Error::Option`] for another dtype; what the driver says.
    pub fn new(driver: Arc<dyn Driver>, dtype: DType) -> Result<Self> {
        Ok(CudaBackend { device: Device::new(driver, dtype)?, tied: Tied::default(), check_launches: false })
    }

    /// Waits for every op before the next begins, so that an error is told of the op that made it. Nothing is
    /// recorded then.
    pub fn check_launches(self, yes: bool) -> Self {
        CudaBackend { check_launches: yes, ..self }
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// On a device that checks reads, what the op is about to write holds nothing any more.
    ///
    /// # Safety
    /// As for [`Backend::run`].
    unsafe fn forget(&self, call: &Call<'_>) -> Result<()> {
        let driver = self.device.driver();
        let types: Vec<_> = call.weights.iter().map(|weight| weight.ty).collect();
        let workspace = self.workspace(call.op, call.ins, &types, call.outs);
        // SAFETY: the workspace is as large as `workspace` said, and belongs to this op alone.
        unsafe { driver.forget(call.workspace, workspace)? };
        for out in call.outs {
            // The residual of a Linear may be its result.
            if call.ins.iter().all(|operand| operand.addr != out.addr) {
                // SAFETY: a result belongs to this op alone.
                unsafe { driver.forget(out.addr, out.bytes())? };
            }
        }
        Ok(())
    }

    /// One arm for each op: it hands the call to the op's room.
    ///
    /// # Safety
    /// As for [`Backend::run`].
    unsafe fn dispatch(&self, call: &Call<'_>) -> Result<()> {
        let device = &self.device;
        // SAFETY: for every arm, the caller's obligations are those of the launch functions.
        unsafe {
            match call.op {
                Op::PatchEmbed { .. } => patch::patch_embed(device, call),
                Op::LayerNorm { .. } => norm::layer_norm(device, call),
                Op::RmsNorm { .. } => norm::rms_norm(device, call),
                Op::AddRmsNorm { .. } => norm::add_rms_norm(device, call),
                Op::L2Normalize => norm::l2_normalize(device, call),
                Op::Linear { .. } => by_phase(
                    call,
                    |rows| pairs::linear(device, call, rows, matvec::linear, matvec::linear),
                    |rows| pairs::linear(device, call, rows, linear::linear, linear::linear),
                ),
                Op::GatedLinear { .. } => by_phase(
                    call,
                    |rows| pairs::linear(device, call, rows, matvec::linear, matvec::gated_linear),
                    |rows| pairs::linear(device, call, rows, linear::linear, linear::gated_linear),
                ),
                Op::Attention { .. } => attention::dense(device, call),
                Op::RopeAppend { .. } => rope::rope_append(device, call),
                Op::PagedAttention { .. } => by_phase(
                    call,
                    |rows| attention::paged_decode(device, call, rows),
                    |rows| attention::paged_prefill(device, call, rows),
                ),
                Op::EmbedRows => embed::embed_rows(device, call),
                Op::EmbedTokens => embed::embed_tokens(device, call),
                Op::SelectRows { .. } => embed::select_rows(device, call),
                Op::Sample => sample::sample(device, call),
            }
        }
    }
}

/// A launch function for some of a call's rows.
type Rows = unsafe fn(&Device, &Call<'_>, Range<usize>) -> Result<()>;

/// Runs the leading decode rows with one family of kernels, and the others with the other.
fn by_phase(
    call: &Call<'_>,
    decode: impl FnOnce(Range<usize>) -> Result<()>,
    prefill: impl FnOnce(Range<usize>) -> Result<()>,
) -> Result<()> {
    let rows = call.ins[0].rows;
    if call.decode > 0 {
        decode(0..call.decode)?;
    }
    if call.decode < rows {
        prefill(call.decode..rows)?;
    }
    Ok(())
}

impl Backend for CudaBackend {
    fn describe(&self) -> String {
        let driver = self.device.driver();
        format!("{} ({}, {})", driver.name(), driver.describe(), self.device.dtype())
    }

    fn dtype(&self) -> DType {
        self.device.dtype()
    }

    fn ceilings(&self, _: &[u8]) -> Result<Option<Ceilings>> {
        match self.device.driver().time(&mut || Ok(()))? {
            Some(_) => ceiling::measure(&self.device).map(Some),
            None => Ok(None),
        }
    }

    fn time(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<Duration> {
        Ok(self.device.driver().time(work)?.unwrap_or_default())
    }

    fn marks(&self) -> bool {
        self.device.driver().marks()
    }

    fn mark(&self, at: usize) -> Result<()> {
        self.device.driver().mark(at)
    }

    fn between_marks(&self, count: usize) -> Result<Vec<Duration>> {
        self.device.driver().between_marks(count)
    }

    fn counts(&self) -> Option<Counts> {
        self.device.driver().counts()
    }

    fn begin_range(&self, name: &str) {
        nvtx::begin(name);
    }

    fn end_range(&self) {
        nvtx::end();
    }

    fn is_listened_to(&self) -> bool {
        nvtx::listening()
    }

    fn available(&self) -> Result<Option<u64>> {
        self.device.driver().memory().map(|(free, _)| Some(free))
    }

    fn pinned(&self) -> usize {
        self.device.driver().pinned()
    }

    fn record(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<Option<Box<dyn Recording>>> {
        if self.check_launches { Ok(None) } else { self.device.record(work).map(Some) }
    }

    fn alloc(&self, what: &str, bytes: usize) -> Result<Buffer> {
        self.device.alloc(what, bytes)
    }

    fn prepare(&self, op: &Op, weights: &[Weight]) -> Result<Vec<Prepared>> {
        weights::prepare(&self.device, &self.tied, op, weights)
    }

    fn workspace(&self, op: &Op, ins: &[View], weights: &[WeightType], _outs: &[View]) -> usize {
        match op {
            Op::Linear { .. } | Op::GatedLinear { .. } => pairs::workspace(op, ins[0].rows, weights),
            Op::PagedAttention { .. } => attention::workspace(&self.device, op, ins[0].rows, ins[3].rows),
            Op::PatchEmbed { .. }
            | Op::LayerNorm { .. }
            | Op::RmsNorm { .. }
            | Op::AddRmsNorm { .. }
            | Op::L2Normalize
            | Op::Attention { .. }
            | Op::RopeAppend { .. }
            | Op::EmbedRows
            | Op::EmbedTokens
            | Op::SelectRows { .. }
            | Op::Sample => 0,
        }
    }

    unsafe fn run(&self, call: &Call<'_>) -> Result<()> {
        let driver = self.device.driver();
        if driver.checks_reads() {
            // SAFETY: the caller's obligation.
            unsafe { self.forget(call)? };
        }
        // SAFETY: the caller's obligation.
        unsafe { self.dispatch(call)? };
        if self.check_launches { driver.synchronize() } else { Ok(()) }
    }

    fn synchronize(&self) -> Result<()> {
        self.device.driver().synchronize()
    }

    unsafe fn upload(&self, addr: usize, bytes: &[u8]) -> Result<()> {
        // SAFETY: the caller's obligation.
        unsafe { self.device.driver().upload(addr, bytes) }
    }

    unsafe fn download(&self, addr: usize, bytes: &mut [u8]) -> Result<()> {
        // SAFETY: the caller's obligation.
        unsafe { self.device.driver().download(addr, bytes) }
    }

    unsafe fn copy(&self, from: usize, to: usize, bytes: usize) -> Result<()> {
        // SAFETY: the caller's obligation.
        unsafe { self.device.driver().copy(from, to, bytes) }
    }

    unsafe fn finite(&self, view: &View) -> Result<bool> {
        if view.dtype == self.dtype() {
            // SAFETY: the caller's obligation.
            return unsafe { finite::finite(&self.device, view) };
        }
        // Logits.
        // SAFETY: the caller's obligation.
        unsafe { finite_on_host(self, view) }
    }
}
