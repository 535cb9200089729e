//! Device time between two events.

use super::ceiling::{SweepArgs, sweep_shape};
use super::driver::{Kernel, Shape};
use super::library::check;
use cudarc::driver::sys;
use std::ffi::c_void;
use std::ptr;
use std::time::Duration;

/// Bytes that are read before the clock starts: more than twice the second-level cache of an H200, so that what is
/// timed finds nothing there, and long enough (40 us) for the host to have queued the work behind it. Without it
/// the time of a small kernel would be that of asking for it. They are read, not set: lines that were set would be
/// written back while the clock runs.
const FLUSH: usize = 128 << 20;

/// The functions called here, by the names they have in the library; [`library`](super::library) probes them.
pub(super) const FUNCTIONS: [&str; 5] =
    ["cuEventCreate", "cuEventRecord", "cuEventSynchronize", "cuEventElapsedTime_v2", "cuEventDestroy_v2"];

/// Two events and the memory to flush caches with.
pub(super) struct Clock {
    begin: sys::CUevent,
    end: sys::CUevent,
    flush: sys::CUdeviceptr,
    /// Reads it.
    sweep: sys::CUfunction,
    shape: Shape,
}

// SAFETY: the handles may be used from any thread whose current context is theirs.
unsafe impl Send for Clock {}

impl Clock {
    /// # Safety
    /// A context is current, is current for every later call, and lives until this is dropped.
    /// `sweep` is the kernel of that name, of a module that lives as long.
    pub unsafe fn new(sweep: Kernel, multiprocessors: u32) -> Result<Self, String> {
        let mut clock = Clock {
            begin: ptr::null_mut(),
            end: ptr::null_mut(),
            flush: 0,
            sweep: sweep.0 as sys::CUfunction,
            shape: sweep_shape(multiprocessors),
        };
        const TIMED: u32 = 0;
        // SAFETY: the context is current; the handles are ours, and dropped with the clock also when one fails.
        unsafe {
            check("cuEventCreate", sys::cuEventCreate(&mut clock.begin, TIMED))?;
            check("cuEventCreate", sys::cuEventCreate(&mut clock.end, TIMED))?;
            check("cuMemAlloc", sys::cuMemAlloc_v2(&mut clock.flush, FLUSH))?;
        }
        Ok(clock)
    }

    /// Empties the caches and starts.
    ///
    /// # Safety
    /// As for [`new`](Clock::new), and the stream lives.
    pub unsafe fn begin(&self, stream: sys::CUstream) -> Result<(), String> {
        let Shape { grid: [x, y, z], block, shared } = self.shape;
        let args = SweepArgs { from: self.flush, to: self.flush, words: FLUSH as u64 / 16 };
        let mut params = [ptr::from_ref(&args) as *mut c_void];
        let params = params.as_mut_ptr();
        // SAFETY: the memory and the event are ours, and the kernel's only parameter is such a struct, which the
        // library copies before it returns; the rest is the caller's obligation.
        unsafe {
            let launched = sys::cuLaunchKernel(
                self.sweep,
                x,
                y,
                z,
                block,
                1,
                1,
                shared,
                stream,
                params,
                ptr::null_mut(),
            );
            check("cuLaunchKernel", launched)?;
            check("cuEventRecord", sys::cuEventRecord(self.begin, stream))
        }
    }

    /// Stops, waits, and tells the time since [`begin`](Clock::begin).
    ///
    /// # Safety
    /// As for [`begin`](Clock::begin).
    pub unsafe fn end(&self, stream: sys::CUstream) -> Result<Duration, String> {
        let mut ms = 0f32;
        // SAFETY: the events are ours and both recorded; the number is ours.
        unsafe {
            check("cuEventRecord", sys::cuEventRecord(self.end, stream))?;
            check("cuEventSynchronize", sys::cuEventSynchronize(self.end))?;
            check("cuEventElapsedTime_v2", sys::cuEventElapsedTime_v2(&mut ms, self.begin, self.end))?;
        }
        Ok(Duration::from_secs_f32(ms.max(0.0) / 1e3))
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        for event in [self.begin, self.end].into_iter().filter(|event| !event.is_null()) {
            // SAFETY: made by `new`, and nobody else has it.
            let _ = unsafe { sys::cuEventDestroy_v2(event) };
        }
        if self.flush != 0 {
            // SAFETY: allocated by `new`; the library waits for work that uses it.
            let _ = unsafe { sys::cuMemFree_v2(self.flush) };
        }
    }
}
