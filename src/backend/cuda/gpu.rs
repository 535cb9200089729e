//! The driver of a GPU, over NVIDIA's library (`library.rs`).

use super::ceiling::SWEEP;
use super::clock::Clock;
use super::driver::{Driver, Kernel, Limits, Shape};
use super::library::{ask, check, library};
use super::marks::Marks;
use super::staging::{Landing, PINNED, Staging};
use crate::backend::Recording;
use crate::error::{Error, Result};
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute, CUresult};
use std::ffi::{CStr, CString, c_void};
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::ThreadId;
use std::time::Duration;

/// A file of kernels, compiled for all architectures.
pub struct Module {
    /// The file's name without extension.
    pub name: &'static str,
    /// A fat binary.
    pub image: &'static [u8],
    /// What the compiler made of them; [`resources`](super::resources) reads it.
    pub resources: &'static str,
}

/// What [`MODULES`], [`PROBES`] and the compiler that made them are, from the build.
mod embedded {
    use super::Module;
    include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
}
pub use embedded::{COMPILER, MODULES, PROBES};

/// What a build that found no nvcc lacks.
pub const NO_KERNELS: &str = "this build has no kernels for GPUs";

/// How many GPUs there are.
///
/// # Errors
/// Why there are none, in words.
pub fn count() -> Result<usize, String> {
    library()?;
    // SAFETY: the library is initialised; the number is ours.
    let count = ask("cuDeviceGetCount", |n| unsafe { sys::cuDeviceGetCount(n) })?;
    if count < 1 {
        return Err("the NVIDIA driver finds no GPU".into());
    }
    Ok(count as usize)
}

/// What the GPUs of this machine are, by their numbers; nothing is opened.
///
/// # Errors
/// Why there are none, in words.
pub fn list() -> Result<Vec<String>, String> {
    (0..count()?)
        .map(|ordinal| {
            // SAFETY: the library is initialised (`count`), the number is below the count.
            let device = ask("cuDeviceGet", |d| unsafe { sys::cuDeviceGet(d, ordinal as i32) })?;
            // SAFETY: as above.
            let bytes = ask("cuDeviceTotalMem", |b| unsafe { sys::cuDeviceTotalMem_v2(b, device) })?;
            let Limits { multiprocessors, capability: (major, minor), .. } = limits(device)?;
            Ok(format!(
                "{}, compute capability {major}.{minor}, {multiprocessors} multiprocessors, {:.1} GiB, driver of \
                 CUDA {}",
                name(device),
                bytes as f64 / (1u64 << 30) as f64,
                version()
            ))
        })
        .collect()
}

fn limits(device: sys::CUdevice) -> Result<Limits, String> {
    let attribute = |a: Attribute| {
        // SAFETY: the library is initialised and gave the device; the number is ours.
        let value = ask("cuDeviceGetAttribute", |v| unsafe { sys::cuDeviceGetAttribute(v, a, device) });
        value.map(|value| value.max(0) as u32)
    };
    Ok(Limits {
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        shared_per_block: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        capability: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
    })
}

fn name(device: sys::CUdevice) -> String {
    let mut name = [0u8; 256];
    // SAFETY: the array is as long as it is said to be; what is written ends with a zero byte.
    let told = unsafe { sys::cuDeviceGetName(name.as_mut_ptr().cast(), name.len() as i32, device) };
    let name = CStr::from_bytes_until_nul(&name).ok().filter(|_| told == CUresult::CUDA_SUCCESS);
    name.map_or("GPU".into(), |name| name.to_string_lossy().into_owned())
}

/// A GPU.
pub struct Gpu(Arc<Context>);

/// What recordings keep alive.
struct Context {
    ordinal: usize,
    device: sys::CUdevice,
    context: sys::CUcontext,
    /// All work runs here, in order.
    stream: sys::CUstream,
    /// Launches that are recorded go here, where they do not run.
    recorder: sys::CUstream,
    /// Which thread records.
    recording: Mutex<Option<ThreadId>>,
    /// Held while a thread records, so that others wait for their turn.
    turn: Mutex<()>,
    modules: Vec<sys::CUmodule>,
    limits: Limits,
    staging: Mutex<Option<Staging>>,
    landing: Mutex<Option<Landing>>,
    clock: Mutex<Option<Clock>>,
    marks: Mutex<Option<Marks>>,
}

// SAFETY: the driver's handles may be used from any thread whose current context is theirs (`enter`).
unsafe impl Send for Context {}
// SAFETY: as above; the library does its own locking, and what we change stands behind mutexes.
unsafe impl Sync for Context {}

impl Gpu {
    /// Opens the GPU of this number and loads the kernels of this build.
    ///
    /// # Errors
    /// [`Error::Device`] with the reason.
    pub fn open(ordinal: usize) -> Result<Self> {
        Gpu::open_with(ordinal, MODULES)
    }

    /// Opens the GPU of this number with these kernels.
    ///
    /// # Errors
    /// [`Error::Device`] with the reason.
    pub fn open_with(ordinal: usize, modules: &'static [Module]) -> Result<Self> {
        let named = |problem| Error::Device { device: format!("cuda:{ordinal}"), problem };
        let count = count().map_err(named)?;
        if ordinal >= count {
            return Err(named(format!("there is no such GPU; they are numbered 0 to {}", count - 1)));
        }
        if modules.is_empty() {
            return Err(named(format!("{NO_KERNELS}; see `tessera devices`")));
        }
        Context::open(ordinal, modules).map(|context| Gpu(Arc::new(context))).map_err(named)
    }
}

impl Context {
    fn open(ordinal: usize, modules: &[Module]) -> Result<Self, String> {
        // SAFETY: the library is initialised (`count`), the number is below the count; so for all calls here.
        let device = ask("cuDeviceGet", |d| unsafe { sys::cuDeviceGet(d, ordinal as i32) })?;
        let limits = limits(device)?;
        if limits.capability < (8, 0) {
            let (major, minor) = limits.capability;
            return Err(format!("its compute capability is {major}.{minor}; the kernels need 8.0 (Ampere)"));
        }
        // SAFETY: as above. The context is released when this is dropped, also when what follows fails.
        let context =
            ask("cuDevicePrimaryCtxRetain", |c| unsafe { sys::cuDevicePrimaryCtxRetain(c, device) })?;
        let mut this = Context {
            ordinal,
            device,
            context,
            stream: ptr::null_mut(),
            recorder: ptr::null_mut(),
            recording: Mutex::new(None),
            turn: Mutex::new(()),
            modules: Vec::new(),
            limits,
            staging: Mutex::new(None),
            landing: Mutex::new(None),
            clock: Mutex::new(None),
            marks: Mutex::new(None),
        };
        this.enter()?;
        for stream in [&mut this.stream, &mut this.recorder] {
            const NON_BLOCKING: u32 = 1;
            // SAFETY: the context is current.
            *stream = ask("cuStreamCreate", |s| unsafe { sys::cuStreamCreate(s, NON_BLOCKING) })?;
        }
        for module in modules {
            // The library reads the image as words; nothing promises that it is aligned where it is embedded.
            let mut aligned = vec![0u64; module.image.len().div_ceil(8)];
            bytemuck::cast_slice_mut(&mut aligned)[..module.image.len()].copy_from_slice(module.image);
            // SAFETY: the context is current, and the image is a whole fat binary, which tells its own length.
            let loaded =
                ask("cuModuleLoadData", |m| unsafe { sys::cuModuleLoadData(m, aligned.as_ptr().cast()) });
            this.modules.push(loaded.map_err(|problem| {
                format!(
                    "the kernels of {} cannot be loaded: {problem}; they were made by {COMPILER}, the driver has \
                     CUDA {}: update the driver, or build with an nvcc no newer than it",
                    module.name,
                    version()
                )
            })?);
        }
        Ok(this)
    }

    /// Makes this GPU's context the calling thread's own, as every call needs it.
    fn enter(&self) -> Result<(), String> {
        // SAFETY: the context is retained as long as `self` lives.
        check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.context) })
    }

    fn recording_thread(&self) -> Option<ThreadId> {
        *self.recording.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where this thread's work goes, and whether it is recorded there.
    fn stream(&self) -> (sys::CUstream, bool) {
        let recorded = self.recording_thread() == Some(std::thread::current().id());
        (if recorded { self.recorder } else { self.stream }, recorded)
    }

    fn synchronize(&self) -> Result<(), String> {
        // SAFETY: the stream is ours and lives.
        check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(self.stream) })
    }

    /// The error with the GPU's name.
    fn named<T>(&self, result: Result<T, String>) -> Result<T> {
        result.map_err(|problem| Error::Device { device: format!("cuda:{}", self.ordinal), problem })
    }

    /// Ends the part that marks have in what is recorded.
    fn join_marks(&self) -> Result<(), String> {
        let mut marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the context is current (the caller entered), the stream is ours and records.
        marks.as_mut().map_or(Ok(()), |marks| unsafe { marks.join(self.recorder) })
    }

    fn record(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<sys::CUgraphExec> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the context is current (the caller entered), the stream is ours, and no capture is under way.
        let begun =
            check("cuStreamBeginCapture", unsafe { sys::cuStreamBeginCapture_v2(self.recorder, mode) });
        self.named(begun)?;
        let done = work();
        let done = done.and(self.named(self.join_marks()));
        // SAFETY: the capture began on this stream and thread. A graph comes back only if all went well.
        let graph = ask("cuStreamEndCapture", |g| unsafe { sys::cuStreamEndCapture(self.recorder, g) });
        let graph = match self.named(graph) {
            Ok(graph) => graph,
            Err(error) => return Err(done.err().unwrap_or(error)),
        };
        let exec = done.is_ok().then(|| {
            // SAFETY: the graph came from the capture, whole.
            ask("cuGraphInstantiate", |e| unsafe { sys::cuGraphInstantiateWithFlags(e, graph, 0) })
        });
        // SAFETY: the graph is ours, and what was instantiated does not need it.
        let destroyed = check("cuGraphDestroy", unsafe { sys::cuGraphDestroy(graph) });
        done?;
        self.named(destroyed.and(exec.unwrap_or_else(|| Err("nothing was recorded".into()))))
    }
}

/// What is made when it is first needed.
fn made<T>(place: &mut Option<T>, make: impl FnOnce() -> Result<T, String>) -> Result<&mut T, String> {
    match place {
        Some(made) => Ok(made),
        none => Ok(none.insert(make()?)),
    }
}

/// The CUDA version of the driver, as 12.4.
fn version() -> String {
    // SAFETY: the library is loaded; the number is ours.
    let version = ask("cuDriverGetVersion", |v| unsafe { sys::cuDriverGetVersion(v) }).unwrap_or(0);
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

impl Drop for Context {
    fn drop(&mut self) {
        // Nothing can be done about an error here: the process goes on without this GPU.
        let _ = self.enter();
        if !self.stream.is_null() {
            let _ = self.synchronize();
        }
        *self.staging.get_mut().unwrap_or_else(PoisonError::into_inner) = None;
        *self.landing.get_mut().unwrap_or_else(PoisonError::into_inner) = None;
        *self.clock.get_mut().unwrap_or_else(PoisonError::into_inner) = None;
        *self.marks.get_mut().unwrap_or_else(PoisonError::into_inner) = None;
        for &module in &self.modules {
            // SAFETY: loaded by `open`; all work is done, and no kernel of it can be launched any more.
            let _ = unsafe { sys::cuModuleUnload(module) };
        }
        for stream in [self.stream, self.recorder].into_iter().filter(|stream| !stream.is_null()) {
            // SAFETY: made by `open`, and nobody else has it.
            let _ = unsafe { sys::cuStreamDestroy_v2(stream) };
        }
        // SAFETY: retained once by `open`.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

impl Driver for Gpu {
    fn name(&self) -> String {
        format!("cuda:{}", self.0.ordinal)
    }

    fn describe(&self) -> String {
        let Limits { multiprocessors, capability: (major, minor), .. } = self.0.limits;
        format!(
            "{}, compute capability {major}.{minor}, {multiprocessors} multiprocessors, driver of CUDA {}",
            name(self.0.device),
            version()
        )
    }

    fn limits(&self) -> Limits {
        self.0.limits
    }

    fn memory(&self) -> Result<(u64, u64)> {
        let this = &self.0;
        let (mut free, mut total) = (0usize, 0usize);
        // SAFETY: the context is current; both numbers are ours.
        let asked = this
            .enter()
            .and_then(|()| check("cuMemGetInfo", unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) }));
        this.named(asked.map(|()| (free as u64, total as u64)))
    }

    fn pinned(&self) -> usize {
        PINNED
    }

    fn alloc(&self, _: &str, bytes: usize) -> Result<Option<usize>> {
        let this = &self.0;
        this.named(this.enter())?;
        let mut addr = 0;
        // SAFETY: the context is current; the address is ours. The library aligns to 256 at least.
        match unsafe { sys::cuMemAlloc_v2(&mut addr, bytes) } {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => Ok(None),
            code => this.named(check("cuMemAlloc", code).map(|()| Some(addr as usize))),
        }
    }

    unsafe fn free(&self, addr: usize) {
        // An error of earlier work may show here; the next call tells it too.
        let _ = self.0.enter();
        // SAFETY: the caller's obligation. The library waits for work that uses the memory.
        let _ = unsafe { sys::cuMemFree_v2(addr as u64) };
    }

    unsafe fn upload(&self, to: usize, bytes: &[u8]) -> Result<()> {
        let this = &self.0;
        this.named(this.enter())?;
        let mut staging = this.staging.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the context is current, and the staging is dropped before it.
        let staging = this.named(made(&mut staging, || unsafe { Staging::new() }))?;
        // SAFETY: the caller's obligation; the context is current and the stream lives.
        this.named(unsafe { staging.send_all(to, bytes, this.stream) })
    }

    unsafe fn upload_rows(
        &self,
        to: usize,
        rows: usize,
        row_bytes: usize,
        fill: &mut dyn FnMut(usize, &mut [u8]) -> Result<()>,
    ) -> Result<()> {
        let this = &self.0;
        this.named(this.enter())?;
        let mut staging = this.staging.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the context is current, and the staging is dropped before it.
        let staging = this.named(made(&mut staging, || unsafe { Staging::new() }))?;
        let mut row = 0;
        while row < rows {
            let buffer = this.named(staging.next(row_bytes))?;
            let count = (buffer.len() / row_bytes).min(rows - row);
            let bytes = &mut buffer[..count * row_bytes];
            for (i, bytes) in bytes.chunks_exact_mut(row_bytes).enumerate() {
                fill(row + i, bytes)?;
            }
            // SAFETY: the rows lie in the caller's range; the context is current and the stream lives.
            this.named(unsafe { staging.send(to + row * row_bytes, count * row_bytes, this.stream) })?;
            row += count;
        }
        Ok(())
    }

    unsafe fn download(&self, from: usize, bytes: &mut [u8]) -> Result<()> {
        let this = &self.0;
        this.named(this.enter())?;
        let mut landing = this.landing.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the context is current, and the landing is dropped before it.
        let landing = this.named(made(&mut landing, || unsafe { Landing::new() }))?;
        // SAFETY: the caller's obligation; the context is current and the stream lives.
        this.named(unsafe { landing.fetch(from, bytes, this.stream) })
    }

    unsafe fn copy(&self, from: usize, to: usize, bytes: usize) -> Result<()> {
        let this = &self.0;
        this.named(this.enter().and_then(|()| {
            // SAFETY: the caller's obligation.
            check("cuMemcpyDtoDAsync", unsafe {
                sys::cuMemcpyDtoDAsync_v2(to as u64, from as u64, bytes, this.stream)
            })
        }))
    }

    unsafe fn fill(&self, to: usize, byte: u8, bytes: usize) -> Result<()> {
        let this = &self.0;
        this.named(this.enter().and_then(|()| {
            // SAFETY: the caller's obligation.
            check("cuMemsetD8Async", unsafe { sys::cuMemsetD8Async(to as u64, byte, bytes, this.stream) })
        }))
    }

    fn checks_reads(&self) -> bool {
        false
    }

    unsafe fn forget(&self, _: usize, _: usize) -> Result<()> {
        Ok(())
    }

    fn kernel(&self, name: &str) -> Result<Kernel> {
        let this = &self.0;
        this.named(this.enter())?;
        let missing = || Err(format!("there is no kernel {name} in this build"));
        let c_name = CString::new(name).unwrap_or_default();
        let found = this.modules.iter().find_map(|&module| {
            let mut function = ptr::null_mut();
            // SAFETY: the module is loaded, the name ends with a zero byte, the handle is ours.
            let code = unsafe { sys::cuModuleGetFunction(&mut function, module, c_name.as_ptr()) };
            (code != CUresult::CUDA_ERROR_NOT_FOUND)
                .then(|| check("cuModuleGetFunction", code).map(|()| function))
        });
        let function = this.named(found.unwrap_or_else(missing))?;
        // All shared memory is dynamic; without this a launch may ask for no more than 48 KiB.
        let most = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let shared = this.limits.shared_per_block as i32;
        // SAFETY: the function is one of a loaded module.
        let set = unsafe { sys::cuFuncSetAttribute(function, most, shared) };
        this.named(check("cuFuncSetAttribute", set))?;
        Ok(Kernel(function as usize))
    }

    unsafe fn launch(&self, kernel: Kernel, shape: Shape, args: &[u8]) -> Result<()> {
        let this = &self.0;
        this.named(this.enter())?;
        let (stream, _) = this.stream();
        let Shape { grid: [x, y, z], block, shared } = shape;
        let mut params = [args.as_ptr() as *mut c_void];
        // SAFETY: `kernel` is a function that `kernel()` gave; it has one parameter, whose bytes the library
        // copies before it returns; what they point to is the caller's obligation.
        let code = unsafe {
            let (function, params) = (kernel.0 as sys::CUfunction, params.as_mut_ptr());
            sys::cuLaunchKernel(function, x, y, z, block, 1, 1, shared, stream, params, ptr::null_mut())
        };
        this.named(check("cuLaunchKernel", code))
    }

    fn synchronize(&self) -> Result<()> {
        self.0.named(self.0.enter().and_then(|()| self.0.synchronize()))
    }

    fn time(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<Option<Duration>> {
        let this = &self.0;
        let sweep = self.kernel(SWEEP)?;
        let mut clock = this.clock.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the context is current, and the clock is dropped before it and its modules.
        let new = || unsafe { Clock::new(sweep, this.limits.multiprocessors) };
        let clock = this.named(made(&mut clock, new))?;
        // SAFETY: the context is current, the stream lives.
        this.named(unsafe { clock.begin(this.stream) })?;
        work()?;
        // SAFETY: as above.
        this.named(unsafe { clock.end(this.stream) }).map(Some)
    }

    fn marks(&self) -> bool {
        true
    }

    fn mark(&self, at: usize) -> Result<()> {
        let this = &self.0;
        this.named(this.enter())?;
        let mut marks = this.marks.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the context is current, and the marks are dropped before it.
        let marks = this.named(made(&mut marks, || unsafe { Marks::new() }))?;
        let (stream, recorded) = this.stream();
        // SAFETY: the context is current, the stream lives.
        this.named(unsafe { marks.mark(at, stream, recorded) })
    }

    fn between_marks(&self, count: usize) -> Result<Vec<Duration>> {
        let this = &self.0;
        this.named(this.enter())?;
        // An event that a replay records is known to be pending only by the replay.
        this.named(this.synchronize())?;
        let marks = this.marks.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the context is current.
        marks.as_ref().map_or(Ok(Vec::new()), |marks| this.named(unsafe { marks.between(count) }))
    }

    fn record(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<Box<dyn Recording>> {
        let this = &self.0;
        this.named(this.enter())?;
        let _turn = this.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let set = |thread| *this.recording.lock().unwrap_or_else(PoisonError::into_inner) = thread;
        set(Some(std::thread::current().id()));
        let exec = this.record(work);
        set(None);
        Ok(Box::new(Graph { context: this.clone(), exec: exec? }))
    }
}

/// A CUDA graph, ready to run.
struct Graph {
    context: Arc<Context>,
    exec: sys::CUgraphExec,
}

// SAFETY: the handle may be used from any thread, by one at a time: launches of one graph go to one stream.
unsafe impl Send for Graph {}
// SAFETY: as above; the library does its own locking.
unsafe impl Sync for Graph {}

impl Recording for Graph {
    unsafe fn replay(&self) -> Result<()> {
        let context = &self.context;
        context.named(context.enter())?;
        // SAFETY: the graph and the stream live; memory is the caller's obligation.
        let code = unsafe { sys::cuGraphLaunch(self.exec, context.stream) };
        context.named(check("cuGraphLaunch", code))
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        let _ = self.context.enter().and_then(|()| self.context.synchronize());
        // SAFETY: the graph is ours, and no launch of it is under way.
        let _ = unsafe { sys::cuGraphExecDestroy(self.exec) };
    }
}
