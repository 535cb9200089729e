//! NVIDIA's library: loaded when first asked for and probed before it is called, so that a machine without it, or
//! with one that lacks a function, has no GPU and a reason, never a panic.

use cudarc::driver::sys::{self, CUresult};
use std::ffi::{CStr, c_char, c_void};
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::OnceLock;

/// The functions that `gpu.rs` calls, by the names they have in the library.
const FUNCTIONS: [&str; 31] = [
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
    "cuMemcpyDtoDAsync_v2",
    "cuMemsetD8Async",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuModuleGetFunction",
    "cuFuncSetAttribute",
    "cuLaunchKernel",
];

/// Loads and initialises the library, once a process; why there is none.
pub(super) fn library() -> Result<(), String> {
    static LIBRARY: OnceLock<Result<(), String>> = OnceLock::new();
    LIBRARY.get_or_init(load).clone()
}

fn load() -> Result<(), String> {
    // SAFETY: loading NVIDIA's library runs its initialisers, which is what a user of CUDA asks for.
    if !unsafe { sys::is_culib_present() } {
        return Err("no NVIDIA driver: the library libcuda is not installed".into());
    }
    let of_rooms =
        super::staging::FUNCTIONS.iter().chain(&super::clock::FUNCTIONS).chain(&super::marks::FUNCTIONS);
    for name in FUNCTIONS.iter().chain(of_rooms) {
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
