//! Two pinned buffers through which weights stream to a GPU: while one is copied, the other is filled.

use super::library::check;
use cudarc::driver::sys::{self, CUresult};
use std::ffi::c_void;
use std::ptr;

/// Bytes of one buffer: large enough that starting a copy (10 us) is nothing beside it (1 ms at 25 GB/s).
const BYTES: usize = 32 << 20;

/// The functions called here, by the names they have in the library; [`library`](super::library) probes them.
pub(super) const FUNCTIONS: [&str; 7] = [
    "cuMemAllocHost_v2",
    "cuMemFreeHost",
    "cuMemcpyHtoDAsync_v2",
    "cuEventCreate",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuEventDestroy_v2",
];

/// The buffers, in turn.
pub(super) struct Staging {
    buffers: [Pinned; 2],
    turn: usize,
}

/// Memory that the bus reads by itself, and the event after which it has.
struct Pinned {
    memory: *mut c_void,
    bytes: usize,
    read: sys::CUevent,
}

impl Staging {
    /// # Safety
    /// A context is current, is current for every later call, and lives until this is dropped.
    pub unsafe fn new() -> Result<Self, String> {
        // SAFETY: the caller's obligation.
        let pinned = || unsafe { Pinned::new(BYTES) };
        Ok(Staging { buffers: [pinned()?, pinned()?], turn: 0 })
    }

    /// A buffer for at least `bytes` bytes that no copy reads any more.
    pub fn next(&mut self, bytes: usize) -> Result<&mut [u8], String> {
        self.turn = 1 - self.turn;
        let pinned = &mut self.buffers[self.turn];
        // SAFETY: the event is ours; one that was never recorded is over.
        check("cuEventSynchronize", unsafe { sys::cuEventSynchronize(pinned.read) })?;
        if bytes > pinned.bytes {
            // SAFETY: the context is current (`new`).
            *pinned = unsafe { Pinned::new(bytes)? };
        }
        // SAFETY: the memory is ours, as long as it says, written by nobody, and was zeroed when it was made.
        Ok(unsafe { std::slice::from_raw_parts_mut(pinned.memory.cast(), pinned.bytes) })
    }

    /// Starts to copy the first `bytes` bytes of the buffer that [`next`](Staging::next) gave.
    ///
    /// # Safety
    /// `to..to + bytes` is live memory of the device, and `stream` a live stream of it.
    pub unsafe fn send(&mut self, to: usize, bytes: usize, stream: sys::CUstream) -> Result<(), String> {
        let pinned = &self.buffers[self.turn];
        assert!(bytes <= pinned.bytes);
        // SAFETY: the target is the caller's obligation; the source stays as it is until the event.
        check("cuMemcpyHtoDAsync", unsafe {
            sys::cuMemcpyHtoDAsync_v2(to as u64, pinned.memory, bytes, stream)
        })?;
        // SAFETY: both handles are live.
        check("cuEventRecord", unsafe { sys::cuEventRecord(pinned.read, stream) })
    }
}

impl Pinned {
    /// # Safety
    /// As for [`Staging::new`].
    unsafe fn new(bytes: usize) -> Result<Self, String> {
        let mut this = Pinned { memory: ptr::null_mut(), bytes, read: ptr::null_mut() };
        const NO_TIMING: u32 = 2;
        // SAFETY: a context is current; the handle is ours.
        check("cuEventCreate", unsafe { sys::cuEventCreate(&mut this.read, NO_TIMING) })?;
        // SAFETY: as above.
        let code = unsafe { sys::cuMemAllocHost_v2(&mut this.memory, bytes) };
        check("cuMemAllocHost", code).map_err(|problem| {
            format!("{bytes} bytes of pinned memory, for weights on their way: {problem}")
        })?;
        // SAFETY: the memory was just allocated with this length.
        unsafe { ptr::write_bytes(this.memory.cast::<u8>(), 0, bytes) };
        Ok(this)
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let ok = |code| code == CUresult::CUDA_SUCCESS;
        // SAFETY: the handles are ours or null; memory is freed when no copy reads it any more.
        unsafe {
            if !self.read.is_null() {
                let _ = ok(sys::cuEventSynchronize(self.read)) && ok(sys::cuEventDestroy_v2(self.read));
            }
            if !self.memory.is_null() {
                let _ = ok(sys::cuMemFreeHost(self.memory));
            }
        }
    }
}
