//! NVIDIA's library: loaded when first asked for, and probed before it is called, because a function that is
//! missing would panic. What has no GPU has a reason.

use super::driver::Limits;
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute, CUresult};
use std::ffi::{CStr, c_char, c_void};
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::OnceLock;

/// The functions called here and by [`gpu`](super::gpu), by the names they have in the library.
const FUNCTIONS: [&str; 33] = [
    "cuInit",
    "cuDriverGetVersion",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuDeviceGetCount",
    "cuDeviceGet",
    "cuDeviceGetName",
    "cuDeviceGetAttribute",
    "cuDeviceTotalMem_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease_v2",
    "cuCtxSetCurrent",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamSynchronize",
    "cuStreamBeginCapture_v2",
    "cuStreamEndCapture",
    "cuGraphInstantiateWithFlags",
    "cuGraphLaunch",
    "cuGraphExecDestroy",
    "cuGraphDestroy",
    "cuMemGetInfo_v2",
    "cuMemAlloc_v2",
    "cuMemFree_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyDtoDAsync_v2",
    "cuMemsetD8Async",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuModuleGetFunction",
    "cuFuncSetAttribute",
    "cuLaunchKernel",
];

/// Loads and initialises the library, once a process; why there is none.
fn library() -> Result<(), String> {
    static LIBRARY: OnceLock<Result<(), String>> = OnceLock::new();
    LIBRARY.get_or_init(load).clone()
}

fn load() -> Result<(), String> {
    // SAFETY: loading NVIDIA's library runs its initialisers, which is what a user of CUDA asks for.
    if !unsafe { sys::is_culib_present() } {
        return Err("no NVIDIA driver: the library libcuda is not installed".into());
    }
    for name in FUNCTIONS.iter().chain(&super::staging::FUNCTIONS) {
        // SAFETY: `culib` loads what was just found; the symbol is looked at and not called.
        let found = unsafe { sys::culib().get::<*const c_void>(name.as_bytes()).is_ok() };
        if !found {
            return Err(format!("the NVIDIA driver is too old: it has no {name}; update it"));
        }
    }
    // SAFETY: the function is there (probed above); it may be called from any thread, any number of times.
    check("cuInit", unsafe { sys::cuInit(0) })
}

/// An error of the library in words, with the function that gave it.
pub(super) fn check(function: &str, code: CUresult) -> Result<(), String> {
    if code == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    type Describe = unsafe fn(CUresult, *mut *const c_char) -> CUresult;
    let text = |describe: Describe| {
        let mut text = ptr::null();
        // SAFETY: both functions write the address of a string that lives as long as the library, or null.
        unsafe {
            let known = describe(code, &mut text) == CUresult::CUDA_SUCCESS && !text.is_null();
            if known { CStr::from_ptr(text).to_string_lossy().into_owned() } else { "unknown".into() }
        }
    };
    Err(format!("{function}: {} ({})", text(sys::cuGetErrorString), text(sys::cuGetErrorName)))
}

/// A number that a function writes.
pub(super) fn ask<T>(function: &str, f: impl FnOnce(*mut T) -> CUresult) -> Result<T, String> {
    let mut value = MaybeUninit::zeroed();
    check(function, f(value.as_mut_ptr()))?;
    // SAFETY: the function succeeded, so it has written a number or a handle.
    Ok(unsafe { value.assume_init() })
}

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

pub(super) fn limits(device: sys::CUdevice) -> Result<Limits, String> {
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

pub(super) fn name(device: sys::CUdevice) -> String {
    let mut name = [0u8; 256];
    // SAFETY: the array is as long as it is said to be; what is written ends with a zero byte.
    let told = unsafe { sys::cuDeviceGetName(name.as_mut_ptr().cast(), name.len() as i32, device) };
    let name = CStr::from_bytes_until_nul(&name).ok().filter(|_| told == CUresult::CUDA_SUCCESS);
    name.map_or("GPU".into(), |name| name.to_string_lossy().into_owned())
}

/// The CUDA version of the driver, as 12.4.
pub(super) fn version() -> String {
    // SAFETY: the library is loaded; the number is ours.
    let version = ask("cuDriverGetVersion", |v| unsafe { sys::cuDriverGetVersion(v) }).unwrap_or(0);
    format!("{}.{}", version / 1000, version % 1000 / 10)
}
