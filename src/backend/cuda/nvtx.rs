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
/// `NVTX_ETID_VERSIONINFO`.
const VERSION_TABLE: u32 = 3;
/// Functions of each module, by its number; the first of them does not exist. NVIDIA's profilers refuse whoever lacks a
/// module, though a range needs but the first.
const FUNCTIONS: [usize; 7] = [0, 16, 9, 15, 7, 16, 7];
/// The most of any, and a null behind them.
const PLACES: usize = 16 + 1;
/// `NVTX_CB_MODULE_CORE`, and the places of our functions in it.
const CORE: usize = 1;
const PUSH_ASCII: usize = 9;
const POP: usize = 11;

/// `NvtxExportTableCallbacks`.
#[repr(C)]
struct Callbacks {
    size: usize,
    module: unsafe extern "C" fn(c_int, *mut *const Slot, *mut c_uint) -> c_int,
}

/// `NvtxExportTableVersionInfo`: a profiler calls `set`, without asking whether it is there.
#[repr(C)]
struct Version {
    size: usize,
    version: u32,
    reserved: u32,
    set: unsafe extern "C" fn(u32),
}

/// Where a profiler writes the address of a function, by way of [`SLOTS`].
type Function = AtomicPtr<c_void>;
#[repr(transparent)]
struct Slot(*const Function);
// SAFETY: it refers to a static of atomics.
unsafe impl Sync for Slot {}

static PROVIDED: [[Function; PLACES]; FUNCTIONS.len()] =
    [const { [const { AtomicPtr::new(ptr::null_mut()) }; PLACES] }; FUNCTIONS.len()];
static SLOTS: [[Slot; PLACES]; FUNCTIONS.len()] = {
    let mut slots = [const { [const { Slot(ptr::null()) }; PLACES] }; FUNCTIONS.len()];
    let mut module = 0;
    while module < FUNCTIONS.len() {
        let mut i = 1;
        while i < FUNCTIONS[module] {
            slots[module][i] = Slot(&PROVIDED[module][i]);
            i += 1;
        }
        module += 1;
    }
    slots
};
static CALLBACKS: Callbacks = Callbacks { size: size_of::<Callbacks>(), module: functions };
static VERSION: Version = Version { size: size_of::<Version>(), version: 3, reserved: 0, set: any_version };

unsafe extern "C" fn table(id: u32) -> *const c_void {
    match id {
        CALLBACKS_TABLE => ptr::from_ref(&CALLBACKS).cast(),
        VERSION_TABLE => ptr::from_ref(&VERSION).cast(),
        _ => ptr::null(),
    }
}

unsafe extern "C" fn any_version(_: u32) {}

/// Tells a profiler where to write the functions of a module; 0 if there is no such module.
unsafe extern "C" fn functions(module: c_int, slots: *mut *const Slot, count: *mut c_uint) -> c_int {
    let Some(module) = usize::try_from(module).ok().filter(|module| (1..FUNCTIONS.len()).contains(module))
    else {
        return 0;
    };
    // SAFETY: the protocol: both are null or may be written.
    unsafe {
        if !slots.is_null() {
            *slots = SLOTS[module].as_ptr();
        }
        if !count.is_null() {
            *count = FUNCTIONS[module] as c_uint;
        }
    }
    1
}

/// Lets a profiler write its functions, once a process; whether one listens.
pub fn listening() -> bool {
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
    done && [PUSH_ASCII, POP].iter().all(|&f| !PROVIDED[CORE][f].load(Acquire).is_null())
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
        let push = std::mem::transmute::<*mut c_void, Push>(PROVIDED[CORE][PUSH_ASCII].load(Acquire));
        push(name.as_ptr());
    }
}

fn pop() {
    // SAFETY: as in `push`.
    unsafe {
        let pop = std::mem::transmute::<*mut c_void, Pop>(PROVIDED[CORE][POP].load(Acquire));
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
            let version = &*table(VERSION_TABLE).cast::<Version>();
            assert_eq!((version.size, version.version, version.reserved), (24, 3, 0));
            (version.set)(2);
            for none in [-1, 0, 7] {
                assert_eq!((callbacks.module)(none, &mut slots, &mut count), 0, "no such module");
            }
            for module in 1..=6 {
                assert_eq!((callbacks.module)(module, &mut slots, &mut count), 1);
                let slots: &[Slot] = std::slice::from_raw_parts(slots, count as usize + 1);
                let (first, last) = (&slots[0], &slots[count as usize]);
                assert!(first.0.is_null() && last.0.is_null(), "{module}");
                assert!(slots[1..count as usize].iter().all(|slot| !slot.0.is_null()), "{module}");
            }
            assert_eq!((callbacks.module)(CORE as c_int, &mut slots, &mut count), 1);
            assert_eq!(count, 16);
            let slots: &[Slot] = std::slice::from_raw_parts(slots, count as usize);
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
