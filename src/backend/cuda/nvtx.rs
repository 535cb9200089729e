//! Named ranges for NVIDIA's profilers, by the protocol of NVTX 3: a profiler says where its library is
//! (`NVTX_INJECTION64_PATH`); that is loaded, asks for a table, and writes the addresses of its functions there.
//! Nobody listens otherwise, and a range costs one comparison.

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering::*};

type Push = unsafe extern "C" fn(*const c_char) -> c_int;
type Pop = unsafe extern "C" fn() -> c_int;
/// Gives the table of an id, or null.
type GetTable = unsafe extern "C" fn(u32) -> *const c_void;
/// What a profiler's library exports as [`INITIALIZE`]; 0 is failure.
type Initialize = unsafe extern "C" fn(GetTable) -> c_int;

const INITIALIZE: &CStr = c"InitializeInjectionNvtx2";
/// `NVTX_ETID_CALLBACKS`.
const CALLBACKS_TABLE: u32 = 1;
/// `NVTX_CB_MODULE_CORE`.
const CORE: c_int = 1;
/// Functions of the core module, the first of which does not exist, and the places of ours.
const FUNCTIONS: usize = 16;
const PUSH_ASCII: usize = 9;
const POP: usize = 11;

/// `NvtxExportTableCallbacks`.
#[repr(C)]
struct Callbacks {
    size: usize,
    module: unsafe extern "C" fn(c_int, *mut *const Slot, *mut c_uint) -> c_int,
}

/// Where a profiler writes the address of a function, by way of [`SLOTS`].
type Function = AtomicPtr<c_void>;
#[repr(transparent)]
struct Slot(*const Function);
// SAFETY: it refers to a static of atomics.
unsafe impl Sync for Slot {}

static PROVIDED: [Function; FUNCTIONS] = [const { AtomicPtr::new(ptr::null_mut()) }; FUNCTIONS];
static SLOTS: [Slot; FUNCTIONS] = {
    let mut slots = [const { Slot(ptr::null()) }; FUNCTIONS];
    let mut i = 1;
    while i < FUNCTIONS {
        slots[i] = Slot(&PROVIDED[i]);
        i += 1;
    }
    slots
};
static CALLBACKS: Callbacks = Callbacks { size: size_of::<Callbacks>(), module: core_functions };

unsafe extern "C" fn table(id: u32) -> *const c_void {
    if id == CALLBACKS_TABLE { ptr::from_ref(&CALLBACKS).cast() } else { ptr::null() }
}

/// Tells a profiler where to write the functions of a module; 0 if there is no such module.
unsafe extern "C" fn core_functions(module: c_int, slots: *mut *const Slot, count: *mut c_uint) -> c_int {
    if module != CORE {
        return 0;
    }
    // SAFETY: the protocol: both are null or may be written.
    unsafe {
        if !slots.is_null() {
            *slots = SLOTS.as_ptr();
        }
        if !count.is_null() {
            *count = FUNCTIONS as c_uint;
        }
    }
    1
}

/// Lets a profiler write its functions, once a process; whether one listens.
fn listening() -> bool {
    static LISTENING: OnceLock<bool> = OnceLock::new();
    *LISTENING.get_or_init(|| {
        let path = std::env::var("NVTX_INJECTION64_PATH").ok().and_then(|path| CString::new(path).ok());
        path.and_then(|path| load(&path)).is_some_and(attach)
    })
}

fn load(path: &CStr) -> Option<Initialize> {
    // SAFETY: loading the library that the user's profiler names runs its initialisers, as the profiler wants; it is
    // never unloaded. The symbol has the type that the protocol gives it.
    unsafe {
        let library = libc::dlopen(path.as_ptr(), libc::RTLD_NOW);
        let symbol =
            if library.is_null() { ptr::null_mut() } else { libc::dlsym(library, INITIALIZE.as_ptr()) };
        (!symbol.is_null()).then(|| std::mem::transmute::<*mut c_void, Initialize>(symbol))
    }
}

fn attach(initialize: Initialize) -> bool {
    // SAFETY: the protocol; `table` gives it what it asks for.
    let done = unsafe { initialize(table) } != 0;
    done && [PUSH_ASCII, POP].iter().all(|&f| !PROVIDED[f].load(Acquire).is_null())
}

/// Begins a range on this thread, inside the one that is open.
pub fn begin(name: &str) {
    if listening() {
        push(name);
    }
}

/// Ends the range that began last on this thread.
pub fn end() {
    if listening() {
        pop();
    }
}

fn push(name: &str) {
    let name = CString::new(name).unwrap_or_default();
    // SAFETY: a profiler wrote it there (`attach`), and promises this type; the name ends with a zero byte.
    unsafe {
        let push = std::mem::transmute::<*mut c_void, Push>(PROVIDED[PUSH_ASCII].load(Acquire));
        push(name.as_ptr());
    }
}

fn pop() {
    // SAFETY: as in `push`.
    unsafe {
        let pop = std::mem::transmute::<*mut c_void, Pop>(PROVIDED[POP].load(Acquire));
        pop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    static SEEN: Mutex<Vec<String>> = Mutex::new(Vec::new());

    unsafe extern "C" fn see_push(name: *const c_char) -> c_int {
        // SAFETY: `push` gives a string that ends.
        let name = unsafe { CStr::from_ptr(name) };
        SEEN.lock().unwrap().push(name.to_string_lossy().into_owned());
        0
    }

    unsafe extern "C" fn see_pop() -> c_int {
        SEEN.lock().unwrap().push("end".into());
        0
    }

    /// A profiler, as NVIDIA's own do it.
    unsafe extern "C" fn profiler(table: GetTable) -> c_int {
        let (mut slots, mut count) = (ptr::null(), 0);
        // SAFETY: what the protocol promises a profiler.
        unsafe {
            let callbacks = &*table(CALLBACKS_TABLE).cast::<Callbacks>();
            assert!(table(99).is_null() && callbacks.size == 16);
            assert_eq!((callbacks.module)(7, &mut slots, &mut count), 0, "no such module");
            assert_eq!((callbacks.module)(CORE, &mut slots, &mut count), 1);
            let slots: &[Slot] = std::slice::from_raw_parts(slots, count as usize);
            assert!(slots[0].0.is_null() && slots.len() == 16);
            (*slots[9].0).store(see_push as *mut c_void, Release);
            (*slots[11].0).store(see_pop as *mut c_void, Release);
        }
        1
    }

    #[test]
    fn a_profiler_is_told_of_ranges() {
        begin("nobody listens");
        end();
        assert!(attach(profiler));
        push("decode");
        push("layers.0.qkv");
        pop();
        pop();
        assert_eq!(*SEEN.lock().unwrap(), ["decode", "layers.0.qkv", "end", "end"]);
        assert!(load(c"/no/such/library.so").is_none());
    }
}
