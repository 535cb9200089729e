//! What a GPU can do at most: products on registers, and reads and copies of its memory.

use super::device::{Device, Launch};
use super::driver::Shape;
use crate::backend::Ceilings;
use crate::error::Result;
use std::time::Duration;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct CeilingArgs {
    sums: u64,
    steps: u32,
    zero: u32,
}
const _: () = assert!(size_of::<CeilingArgs>() == 16);

/// As `SweepArgs` in the kernel file.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
pub(super) struct SweepArgs {
    /// Memory aligned to 16.
    pub from: u64,
    /// One word.
    pub to: u64,
    /// Of 16 bytes each.
    pub words: u64,
}
const _: () = assert!(size_of::<SweepArgs>() == 24);

/// The name of the kernel that reads memory; it has no dtype.
pub(super) const SWEEP: &str = "sweep";

/// How it is launched: what a device of so many multiprocessors holds at once.
pub(super) fn sweep_shape(multiprocessors: u32) -> Shape {
    Shape { grid: [2 * multiprocessors, 1, 1], block: 512, shared: 0 }
}

/// FLOPs of one warp in one step: eight products of 16x8x16.
const STEP_FLOPS: f64 = 8.0 * 2.0 * 16.0 * 8.0 * 16.0;
/// Steps of a launch: a few milliseconds.
const STEPS: u32 = 1 << 14;
/// Most bytes that are read or copied: many times any cache, a millisecond of an H100.
const MOVED: usize = 2 << 30;

/// Measures both ceilings, the best of a few runs each. The first is that of `mma.sync`, which all kernels here are
/// made of; a Hopper GPU's own `wgmma` is faster.
///
/// # Errors
/// [`Error::Memory`](crate::Error::Memory), [`Error::Device`](crate::Error::Device).
pub fn measure(device: &Device) -> Result<Ceilings> {
    let blocks = 2 * device.limits().multiprocessors;
    let sums = device.alloc("sums of a ceiling", blocks as usize * 8 * size_of::<f32>())?;
    let args = CeilingArgs { sums: sums.addr as u64, steps: STEPS, zero: 0 };
    let launch = Launch { kernel: "ceiling", grid: [blocks, 1, 1], block: 256, shared: 0 };
    // SAFETY: the sums are as many as the kernel writes.
    let products = best(device, &mut || unsafe { device.launch(launch, &args) })?;
    drop(sums);

    let driver = device.driver();
    // Beside a model that nearly fills the device less will do.
    let bytes = MOVED.min(driver.memory()?.0 as usize / 4) & !15;
    let (from, to) = (device.alloc("a copy's source", bytes)?, device.alloc("a copy's target", bytes)?);
    // SAFETY: both are live and apart.
    let copied = best(device, &mut || unsafe { driver.copy(from.addr, to.addr, bytes) })?;
    let args = SweepArgs { from: from.addr as u64, to: to.addr as u64, words: bytes as u64 / 16 };
    let (kernel, shape) = (driver.kernel(SWEEP)?, sweep_shape(device.limits().multiprocessors));
    // SAFETY: as above; the source is as long as the words are, and the target has one.
    let read = best(device, &mut || unsafe { driver.launch(kernel, shape, bytemuck::bytes_of(&args)) })?;
    Ok(Ceilings {
        flops_per_s: f64::from(blocks) * 8.0 * f64::from(STEPS) * STEP_FLOPS / products.as_secs_f64(),
        // A copy reads every byte once and writes it once.
        bytes_per_s: bytes as f64 / read.as_secs_f64().min(copied.as_secs_f64() / 2.0),
        ..Ceilings::default()
    })
}

fn best(device: &Device, work: &mut dyn FnMut() -> Result<()>) -> Result<Duration> {
    let mut best = Duration::MAX;
    for _ in 0..4 {
        best = best.min(device.driver().time(work)?.unwrap_or(Duration::MAX));
    }
    Ok(best.max(Duration::from_nanos(1)))
}
