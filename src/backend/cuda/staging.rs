//! Pinned memory, which the bus reads and writes by itself: two buffers through which all that goes to a GPU passes,
//! weights and the inputs of a step, one filled while the other is copied; and one for what comes back.

use super::library::check;
use cudarc::driver::sys::{self, CUresult};
use std::ffi::c_void;
use std::ptr;

/// Bytes of one buffer: large enough that starting a copy (10 us) is nothing beside it (1 ms at 25 GB/s).
const BYTES: usize = 32 << 20;

/// Bytes of the buffer for what comes back: logits of many rows, most often a token.
const LANDING: usize = 1 << 20;

/// Bytes of this machine's memory that a GPU in use keeps pinned.
pub(super) const PINNED: usize = 2 * BYTES + LANDING;

/// The functions called here, by the names they have in the library; [`library`](super::library) probes them.
pub(super) const FUNCTIONS: [&str; 9] = [
    "cuMemAllocHost_v2",
    "cuMemFreeHost",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuStreamSynchronize",
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

/// Pinned memory, and the event after which a copy from it is over.
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
        Ok(pinned.bytes())
    }

    /// Starts to copy bytes of the host to the device; they may be changed when it returns.
    ///
    /// # Safety
    /// As for [`send`](Staging::send).
    pub unsafe fn send_all(
        &mut self,
        mut to: usize,
        bytes: &[u8],
        stream: sys::CUstream,
    ) -> Result<(), String> {
        for bytes in bytes.chunks(BYTES) {
            self.next(bytes.len())?[..bytes.len()].copy_from_slice(bytes);
            // SAFETY: the caller's obligation.
            unsafe { self.send(to, bytes.len(), stream)? };
            to += bytes.len();
        }
        Ok(())
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

/// The buffer for what comes back.
pub(super) struct Landing(Pinned);

impl Landing {
    /// # Safety
    /// As for [`Staging::new`].
    pub unsafe fn new() -> Result<Self, String> {
        // SAFETY: the caller's obligation.
        unsafe { Pinned::new(LANDING) }.map(Landing)
    }

    /// Copies device bytes to `to`, when the stream is done with all before.
    ///
    /// # Safety
    /// `from..from + to.len()` is live memory of the device that nothing writes, and `stream` a live stream of it.
    pub unsafe fn fetch(
        &mut self,
        mut from: usize,
        to: &mut [u8],
        stream: sys::CUstream,
    ) -> Result<(), String> {
        for to in to.chunks_mut(self.0.bytes) {
            // SAFETY: the source is the caller's obligation; the target is ours and as long (`chunks_mut`).
            check("cuMemcpyDtoHAsync", unsafe {
                sys::cuMemcpyDtoHAsync_v2(self.0.memory, from as u64, to.len(), stream)
            })?;
            // SAFETY: the stream lives.
            check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(stream) })?;
            to.copy_from_slice(&self.0.bytes()[..to.len()]);
            from += to.len();
        }
        Ok(())
    }
}

impl Pinned {
    /// What it holds; no copy is under way.
    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the memory is ours, as long as it says, and was zeroed when it was made.
        unsafe { std::slice::from_raw_parts_mut(self.memory.cast(), self.bytes) }
    }

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
            format!("{bytes} bytes of pinned memory, for copies on their way: {problem}")
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
