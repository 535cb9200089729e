//! What a CUDA device must be able to do. Two drivers stand under [`Device`](super::device::Device): a GPU, and
//! the emulated device that runs the same kernels on any machine.

use crate::backend::{Counts, Recording};
use crate::error::Result;
use std::time::Duration;

/// What kernels must know of a device to choose their tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Most bytes of shared memory that one block may have.
    pub shared_per_block: u32,
    /// Compute capability, as (8, 6).
    pub capability: (u32, u32),
}

/// A kernel that was looked up, as its driver knows it.
#[derive(Clone, Copy, Debug)]
pub struct Kernel(pub usize);

/// How a kernel is launched.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block, in one dimension.
    pub block: u32,
    /// Bytes of dynamic shared memory of a block.
    pub shared: u32,
}

/// A device's memory and one queue of work: what is asked for runs in order, and may run later.
/// Every method may fail with [`Error::Device`](crate::Error::Device), also because of earlier work.
///
/// A driver frees all of its memory when it is dropped, and is dropped after all of its buffers.
pub trait Driver: Send + Sync {
    /// The name, as the command line spells it.
    fn name(&self) -> String;

    /// The hardware and the version of what drives it, for people.
    fn describe(&self) -> String;

    /// What kernels must know.
    fn limits(&self) -> Limits;

    /// Bytes of memory that are free, and that there are.
    fn memory(&self) -> Result<(u64, u64)>;

    /// Bytes of this machine's memory that copies pass through.
    fn pinned(&self) -> usize;

    /// The address of `bytes` bytes of memory, aligned to 256, holding anything; `None` if there are not so
    /// many. `what` names them.
    fn alloc(&self, what: &str, bytes: usize) -> Result<Option<usize>>;

    /// Frees memory when the work that was asked for before is done.
    ///
    /// # Safety
    /// `addr` came from [`alloc`](Driver::alloc) and is not used again.
    unsafe fn free(&self, addr: usize);

    /// Copies host bytes to the device. They may be changed when it returns.
    ///
    /// # Safety
    /// The range is live memory of this driver that nobody else touches meanwhile; so for all that follows.
    unsafe fn upload(&self, to: usize, bytes: &[u8]) -> Result<()>;

    /// Fills `rows` rows of `row_bytes` bytes with what `fill` makes of each, in order. A driver that can
    /// overlaps making the next rows with copying the last ones; so files are read while the bus is busy.
    ///
    /// # Safety
    /// As for [`upload`](Driver::upload).
    unsafe fn upload_rows(
        &self,
        to: usize,
        rows: usize,
        row_bytes: usize,
        fill: &mut dyn FnMut(usize, &mut [u8]) -> Result<()>,
    ) -> Result<()>;

    /// Copies device bytes to the host, when all that was asked for before is done.
    ///
    /// # Safety
    /// As for [`upload`](Driver::upload).
    unsafe fn download(&self, from: usize, bytes: &mut [u8]) -> Result<()>;

    /// Copies within the device.
    ///
    /// # Safety
    /// As for [`upload`](Driver::upload); the ranges do not overlap.
    unsafe fn copy(&self, from: usize, to: usize, bytes: usize) -> Result<()>;

    /// Sets bytes.
    ///
    /// # Safety
    /// As for [`upload`](Driver::upload).
    unsafe fn fill(&self, to: usize, byte: u8, bytes: usize) -> Result<()>;

    /// What has been done so far, where that is counted.
    fn counts(&self) -> Option<Counts> {
        None
    }

    /// Whether reads of memory that holds nothing are found, so that it pays to [`forget`](Driver::forget).
    fn checks_reads(&self) -> bool;

    /// Declares that what memory holds does not matter any more.
    ///
    /// # Safety
    /// As for [`upload`](Driver::upload).
    unsafe fn forget(&self, at: usize, bytes: usize) -> Result<()>;

    /// Looks a kernel up by its name. Slow; asked once a kernel.
    fn kernel(&self, name: &str) -> Result<Kernel>;

    /// Launches a kernel whose only parameter is a struct of these bytes.
    ///
    /// # Safety
    /// The arguments are those that the kernel declares, and point to live memory of this driver as its
    /// contract says.
    unsafe fn launch(&self, kernel: Kernel, shape: Shape, args: &[u8]) -> Result<()>;

    /// Waits until all that was asked for is done.
    fn synchronize(&self) -> Result<()>;

    /// How long what `work` asks for takes on the device, with nothing of it in the caches before. `None` where
    /// time means nothing.
    fn time(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<Option<Duration>>;

    /// Whether there are marks; see [`Backend::mark`](crate::backend::Backend::mark).
    fn marks(&self) -> bool {
        false
    }

    /// Marks the moment when the launch that was asked for last is done; what follows does not wait for it.
    fn mark(&self, _at: usize) -> Result<()> {
        Ok(())
    }

    /// The times from each of the first `count` marks to the next.
    fn between_marks(&self, _count: usize) -> Result<Vec<Duration>> {
        Ok(Vec::new())
    }

    /// Records the launches that `work` makes on this thread, instead of running them. Meanwhile `work` asks
    /// for nothing but launches of kernels that ran before. Threads that record take turns.
    fn record(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<Box<dyn Recording>>;
}
