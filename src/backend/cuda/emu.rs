//! The driver of the emulated device: kernels run on the host, and every access of every thread is checked.
//! `kernels/emu/api.h` is the C interface that this file speaks, and tells what is checked.

use super::driver::{Driver, Kernel, Limits, Shape};
use crate::backend::{Counts, Recording};
use crate::error::{Error, Result};
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;
use std::time::Duration;

#[repr(C)]
struct Raw {
    _private: [u8; 0],
}

unsafe extern "C" {
    fn emu_open(seed: u64) -> *mut Raw;
    fn emu_close(device: *mut Raw);
    fn emu_seed(device: *mut Raw, seed: u64);
    fn emu_alloc(device: *mut Raw, bytes: usize, what: *const c_char) -> *mut c_void;
    fn emu_free(device: *mut Raw, at: *mut c_void);
    fn emu_upload(device: *mut Raw, to: *mut c_void, from: *const c_void, bytes: usize) -> c_int;
    fn emu_download(device: *mut Raw, to: *mut c_void, from: *const c_void, bytes: usize) -> c_int;
    fn emu_copy(device: *mut Raw, to: *mut c_void, from: *const c_void, bytes: usize) -> c_int;
    fn emu_fill(device: *mut Raw, to: *mut c_void, byte: c_int, bytes: usize) -> c_int;
    fn emu_forget(device: *mut Raw, at: *mut c_void, bytes: usize) -> c_int;
    fn emu_launch(
        device: *mut Raw,
        kernel: *const c_char,
        grid: *const u32,
        block: u32,
        shared: u32,
        args: *const c_void,
        args_bytes: usize,
    ) -> c_int;
    fn emu_error(device: *const Raw) -> *const c_char;
    fn emu_switch_off(device: *mut Raw, site: c_int);
    fn emu_sites() -> usize;
    fn emu_site(site: usize) -> *const c_char;
    fn emu_kernels() -> usize;
    fn emu_kernel(kernel: usize) -> *const c_char;
    fn emu_stats(device: *const Raw, launches: *mut u64, barriers: *mut u64, accesses: *mut u64);
}

/// An emulated device. Clones are the same device.
#[derive(Clone)]
pub struct Emulator {
    state: Arc<Mutex<State>>,
    /// Held while a thread records, so that others wait for their turn.
    turn: Arc<Mutex<()>>,
    limits: Limits,
}

struct State {
    /// From `emu_open`; closed when dropped.
    raw: *mut Raw,
    /// What a thread records, instead of running it.
    recording: Option<(ThreadId, Vec<Launched>)>,
}

// SAFETY: api.h lets a device be used by any thread, by one at a time; the mutex around the state sees to it.
unsafe impl Send for State {}

/// A recorded launch.
struct Launched {
    kernel: Kernel,
    shape: Shape,
    /// The argument struct, in memory aligned to 64 as a GPU has it.
    args: Vec<ArgsLine>,
    args_bytes: usize,
}

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct ArgsLine([u8; 64]);

impl Emulator {
    /// What an A100 lets a block have, and as few multiprocessors as make kernels that depend on their
    /// number do something.
    pub const LIMITS: Limits = Limits { multiprocessors: 6, shared_per_block: 163 << 10, capability: (8, 0) };

    /// A device whose scheduler draws from `seed`, and which kernels take for one with these limits.
    ///
    /// # Errors
    /// [`Error::Device`] when there is no address space for it.
    pub fn new(seed: u64, limits: Limits) -> Result<Self> {
        // SAFETY: it takes any number, and a null pointer is looked at below.
        let raw = unsafe { emu_open(seed) };
        if raw.is_null() {
            let problem = "the system has no address space for the emulated device".into();
            return Err(Error::Device { device: "emu".into(), problem });
        }
        let state = Arc::new(Mutex::new(State { raw, recording: None }));
        Ok(Emulator { state, turn: Arc::default(), limits })
    }

    /// Draws another order of blocks, warps, lanes and copies from now on.
    pub fn reseed(&self, seed: u64) {
        let state = self.lock();
        // SAFETY: the device is open as long as the state lives; so for all calls below.
        unsafe { emu_seed(state.raw, seed) };
    }

    /// Switches one site of [`sites`] off, or none: what it does, a barrier or a bounds check, is left out.
    pub fn switch_off(&self, site: Option<usize>) {
        let state = self.lock();
        // SAFETY: as above; a number that is no site switches nothing off.
        unsafe { emu_switch_off(state.raw, site.map_or(-1, |site| site as c_int)) };
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn check(&self, code: c_int) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: the text lives until the device's next call, which cannot come before it is copied here.
        let text = unsafe { text(emu_error(self.raw)) };
        Err(Error::Device { device: "emu".into(), problem: text })
    }

    /// # Safety
    /// As for [`Driver::launch`].
    unsafe fn launch(&self, kernel: Kernel, shape: Shape, args: &[u8]) -> Result<()> {
        let Shape { grid, block, shared } = shape;
        // SAFETY: `kernel` is an index that `kernel()` gave, so its name is a string of the library's own; the
        // arguments are the caller's obligation.
        let code = unsafe {
            let (name, args) = (emu_kernel(kernel.0), (args.as_ptr().cast(), args.len()));
            emu_launch(self.raw, name, grid.as_ptr(), block, shared, args.0, args.1)
        };
        self.check(code)
    }
}

impl Drop for State {
    fn drop(&mut self) {
        // SAFETY: it was open, nobody else has the pointer, and all buffers are freed (see `Driver`).
        unsafe { emu_close(self.raw) };
    }
}

impl Driver for Emulator {
    fn name(&self) -> String {
        "emu".into()
    }

    fn describe(&self) -> String {
        "the GPU's kernels on the processor, every access checked; slow, for tests".into()
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn memory(&self) -> Result<(u64, u64)> {
        let memory = crate::backend::cpu::usable_memory();
        Ok((memory, memory))
    }

    fn pinned(&self) -> usize {
        0
    }

    fn alloc(&self, what: &str, bytes: usize) -> Result<Option<usize>> {
        let state = self.lock();
        let what = CString::new(what).unwrap_or_default();
        // SAFETY: the name is a string; a null pointer is looked at.
        let addr = unsafe { emu_alloc(state.raw, bytes, what.as_ptr()) };
        Ok((!addr.is_null()).then_some(addr as usize))
    }

    unsafe fn free(&self, addr: usize) {
        let state = self.lock();
        // SAFETY: the caller's obligation.
        unsafe { emu_free(state.raw, addr as *mut c_void) };
    }

    unsafe fn upload(&self, to: usize, bytes: &[u8]) -> Result<()> {
        let state = self.lock();
        // SAFETY: the caller's obligation; a range that is not the device's is refused.
        state.check(unsafe { emu_upload(state.raw, to as _, bytes.as_ptr().cast(), bytes.len()) })
    }

    unsafe fn upload_rows(
        &self,
        to: usize,
        rows: usize,
        row_bytes: usize,
        fill: &mut dyn FnMut(usize, &mut [u8]) -> Result<()>,
    ) -> Result<()> {
        let at_once = ((1 << 20) / row_bytes).max(1);
        let mut bytes = vec![0; at_once.min(rows) * row_bytes];
        for first in (0..rows).step_by(at_once) {
            let bytes = &mut bytes[..at_once.min(rows - first) * row_bytes];
            for (i, row) in bytes.chunks_exact_mut(row_bytes).enumerate() {
                fill(first + i, row)?;
            }
            // SAFETY: the caller's obligation: all rows lie in live memory.
            unsafe { self.upload(to + first * row_bytes, bytes)? };
        }
        Ok(())
    }

    unsafe fn download(&self, from: usize, bytes: &mut [u8]) -> Result<()> {
        let state = self.lock();
        // SAFETY: as for `upload`.
        state.check(unsafe { emu_download(state.raw, bytes.as_mut_ptr().cast(), from as _, bytes.len()) })
    }

    unsafe fn copy(&self, from: usize, to: usize, bytes: usize) -> Result<()> {
        let state = self.lock();
        // SAFETY: as for `upload`.
        state.check(unsafe { emu_copy(state.raw, to as _, from as _, bytes) })
    }

    unsafe fn fill(&self, to: usize, byte: u8, bytes: usize) -> Result<()> {
        let state = self.lock();
        // SAFETY: as for `upload`.
        state.check(unsafe { emu_fill(state.raw, to as _, byte.into(), bytes) })
    }

    fn counts(&self) -> Option<Counts> {
        let state = self.lock();
        let mut counts = Counts::default();
        // SAFETY: the device is open as long as the state lives; the three addresses are of numbers of ours.
        unsafe {
            emu_stats(state.raw, &mut counts.launches, &mut counts.barriers, &mut counts.accesses);
        }
        Some(counts)
    }

    fn checks_reads(&self) -> bool {
        true
    }

    unsafe fn forget(&self, at: usize, bytes: usize) -> Result<()> {
        let state = self.lock();
        if state.recording.is_some() || bytes == 0 {
            return Ok(());
        }
        // SAFETY: as for `upload`.
        state.check(unsafe { emu_forget(state.raw, at as _, bytes) })
    }

    fn kernel(&self, name: &str) -> Result<Kernel> {
        let found = kernels().position(|kernel| kernel == name);
        found.map(Kernel).ok_or_else(|| Error::Device {
            device: "emu".into(),
            problem: format!(
                "there is no kernel {name}; there are {}",
                kernels().collect::<Vec<_>>().join(", ")
            ),
        })
    }

    unsafe fn launch(&self, kernel: Kernel, shape: Shape, args: &[u8]) -> Result<()> {
        let most = self.limits.shared_per_block;
        if shape.shared > most {
            let problem =
                format!("{} bytes of shared memory; a block of this device has {most} at most", shape.shared);
            return Err(Error::Device { device: "emu".into(), problem });
        }
        let mut state = self.lock();
        if let Some((thread, launches)) = &mut state.recording
            && *thread == std::thread::current().id()
        {
            let mut lines = vec![ArgsLine([0; 64]); args.len().div_ceil(64)];
            bytemuck::cast_slice_mut(&mut lines)[..args.len()].copy_from_slice(args);
            launches.push(Launched { kernel, shape, args: lines, args_bytes: args.len() });
            return Ok(());
        }
        // SAFETY: the caller's obligation.
        unsafe { state.launch(kernel, shape, args) }
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }

    fn time(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<Option<Duration>> {
        work().map(|()| None)
    }

    fn record(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<Box<dyn Recording>> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        self.lock().recording = Some((std::thread::current().id(), Vec::new()));
        let done = work();
        let launches = self.lock().recording.take().map(|(_, launches)| launches).unwrap_or_default();
        done?;
        Ok(Box::new(Recorded { device: self.clone(), launches }))
    }
}

/// Launches kept with copies of their arguments.
struct Recorded {
    device: Emulator,
    launches: Vec<Launched>,
}

impl Recording for Recorded {
    unsafe fn replay(&self) -> Result<()> {
        let state = self.device.lock();
        for Launched { kernel, shape, args, args_bytes } in &self.launches {
            let args: &[u8] = bytemuck::cast_slice(args);
            // SAFETY: the caller's obligation.
            unsafe { state.launch(*kernel, *shape, &args[..*args_bytes])? };
        }
        Ok(())
    }
}

/// Names of the kernels in this build, those of its own tests among them.
pub fn kernels() -> impl Iterator<Item = String> {
    // SAFETY: every index below the count names a kernel, and names live as long as the program.
    (0..unsafe { emu_kernels() }).map(|i| unsafe { text(emu_kernel(i)) })
}

/// Barriers, waits, tickets and masks that any launch has reached so far, as `kernels/x.cu:12 barrier`.
pub fn sites() -> Vec<String> {
    // SAFETY: as for `kernels`.
    (0..unsafe { emu_sites() }).map(|i| unsafe { text(emu_site(i)) }).collect()
}

/// # Safety
/// `string` ends with a zero byte and lives until this returns.
unsafe fn text(string: *const c_char) -> String {
    // SAFETY: the caller's obligation.
    unsafe { CStr::from_ptr(string) }.to_string_lossy().into_owned()
}
