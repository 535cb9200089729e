//! Whether a result is finite: `kernels/finite.cu`.

use super::device::{Device, Launch, VERDICTS};
use crate::error::Result;
use crate::tensor::View;
use bytemuck::NoUninit;

const THREADS: u32 = 256;
/// A float for each warp.
const SHARED: u32 = THREADS / 32 * 4;

/// As `FiniteArgs` in the kernel file.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct Args {
    x: usize,
    bad: usize,
    count: u64,
}
const _: () = assert!(size_of::<Args>() == 24);

/// Whether all of a view of the device's dtype is finite: half a kilobyte comes back, not the view.
///
/// # Errors
/// [`Error::Device`](crate::Error::Device).
///
/// # Safety
/// As for [`Backend::finite`](crate::backend::Backend::finite).
pub unsafe fn finite(device: &Device, view: &View) -> Result<bool> {
    debug_assert!(view.dtype == device.dtype() && view.addr.is_multiple_of(16));
    // One at a time: the next would write over the verdicts.
    let verdicts = device.verdicts();
    let args = Args { x: view.addr, bad: verdicts.addr, count: view.len() as u64 };
    let launch = Launch { kernel: "finite", grid: [VERDICTS as u32, 1, 1], block: THREADS, shared: SHARED };
    let mut bad = [0u32; VERDICTS];
    // SAFETY: the view is the caller's obligation; there is a verdict for each block, and they are ours.
    unsafe {
        device.launch(launch, &args)?;
        device.driver().download(verdicts.addr, bytemuck::cast_slice_mut(&mut bad))?;
    }
    Ok(bad.iter().all(|bad| *bad == 0))
}
