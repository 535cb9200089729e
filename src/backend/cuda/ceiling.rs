//! What a GPU can do at most: products on registers, and copies within its memory.

use super::device::{Device, Launch};
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

/// FLOPs of one warp in one step: eight products of 16x8x16.
const STEP_FLOPS: f64 = 8.0 * 2.0 * 16.0 * 8.0 * 16.0;
/// Steps of a launch: a few milliseconds.
const STEPS: u32 = 1 << 14;
/// Bytes that are copied: many times any cache.
const COPY: usize = 2 << 30;

/// Measures both ceilings, the best of three each. The first is that of `mma.sync`, which all kernels here are
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

    let (from, to) = (device.alloc("a copy's source", COPY)?, device.alloc("a copy's target", COPY)?);
    // SAFETY: both are live and apart.
    let copied = best(device, &mut || unsafe { device.driver().copy(from.addr, to.addr, COPY) })?;
    Ok(Ceilings {
        flops_per_s: f64::from(blocks) * 8.0 * f64::from(STEPS) * STEP_FLOPS / products.as_secs_f64(),
        // Every byte is read once and written once.
        bytes_per_s: 2.0 * COPY as f64 / copied.as_secs_f64(),
    })
}

fn best(device: &Device, work: &mut dyn FnMut() -> Result<()>) -> Result<Duration> {
    let mut best = Duration::MAX;
    for _ in 0..4 {
        best = best.min(device.driver().time(work)?.unwrap_or(Duration::MAX));
    }
    Ok(best.max(Duration::from_nanos(1)))
}
