//! A device as launch functions see it: one dtype, limits, kernels by name.

use super::driver::{Driver, Kernel, Limits, Shape};
use crate::backend::{Buffer, Recording};
use crate::error::{Error, Result};
use crate::tensor::DType;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Counters of a device, for kernels whose last block finishes what the others began.
pub const COUNTERS: usize = 4096;

/// Words of a device for what its blocks found, one each.
pub const VERDICTS: usize = 128;

/// A kernel launch, apart from its arguments.
#[derive(Clone, Copy, Debug)]
pub struct Launch<'a> {
    /// The kernel's name without its dtype, which the device appends.
    pub kernel: &'a str,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block, in one dimension.
    pub block: u32,
    /// Bytes of dynamic shared memory of a block.
    pub shared: u32,
}

/// A driver, the dtype of the loaded model, and what launches share.
pub struct Device {
    driver: Arc<dyn Driver>,
    dtype: DType,
    limits: Limits,
    /// Looked up once, by name without dtype.
    kernels: Mutex<HashMap<String, Kernel>>,
    counters: Buffer,
    verdicts: Mutex<Buffer>,
}

/// Kernels read their arguments in constant memory; a tensor map among them must be aligned to 64.
#[repr(C, align(64))]
struct Aligned<A>(A);

impl Device {
    /// A device that computes in `dtype`.
    ///
    /// # Errors
    /// [`Error::Option`] for a dtype that kernels do not exist for; [`Error::Device`]; [`Error::Memory`].
    pub fn new(driver: Arc<dyn Driver>, dtype: DType) -> Result<Self> {
        if !matches!(dtype, DType::BF16 | DType::F16) {
            return Err(Error::option("--dtype", "bf16 or f16 on this device", dtype));
        }
        let limits = driver.limits();
        let counters = alloc(&driver, "counters", COUNTERS * size_of::<u32>())?;
        // SAFETY: the whole of a buffer that was just allocated.
        unsafe { driver.fill(counters.addr, 0, counters.bytes)? };
        let verdicts = Mutex::new(alloc(&driver, "verdicts", VERDICTS * size_of::<u32>())?);
        Ok(Device { driver, dtype, limits, kernels: Mutex::default(), counters, verdicts })
    }

    /// The dtype of activations and matrices: bf16 or f16.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// What kernels choose their tiles by.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// The address of [`COUNTERS`] u32 that are zero; a kernel that uses them leaves them zero.
    pub fn counters(&self) -> usize {
        self.counters.addr
    }

    /// [`VERDICTS`] u32 for one user at a time.
    pub fn verdicts(&self) -> MutexGuard<'_, Buffer> {
        self.verdicts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What runs underneath.
    pub fn driver(&self) -> &dyn Driver {
        &*self.driver
    }

    /// Memory aligned to 256, holding anything, freed when dropped.
    ///
    /// # Errors
    /// [`Error::Memory`] with the numbers.
    pub fn alloc(&self, what: &str, bytes: usize) -> Result<Buffer> {
        alloc(&self.driver, what, bytes)
    }

    /// Launches a kernel.
    ///
    /// # Errors
    /// [`Error::Device`] if there is no such kernel or the launch is refused.
    ///
    /// # Safety
    /// `args` is the kernel's argument struct, and points to live memory of this device as its contract says.
    pub unsafe fn launch<A: bytemuck::NoUninit>(&self, launch: Launch<'_>, args: &A) -> Result<()> {
        let Launch { kernel, grid, block, shared } = launch;
        let args = Aligned(*args);
        let found = self.kernel(kernel)?;
        let shape = Shape { grid, block, shared };
        // SAFETY: the caller's obligation.
        unsafe { self.driver.launch(found, shape, bytemuck::bytes_of(&args.0)) }.map_err(|error| {
            let Error::Device { device, problem } = error else { return error };
            let problem = format!("{kernel} {grid:?} x {block}, {shared} bytes of shared memory: {problem}");
            Error::Device { device, problem }
        })
    }

    /// Records launches; see [`Driver::record`].
    ///
    /// # Errors
    /// What `work` or the driver say.
    pub fn record(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<Box<dyn Recording>> {
        self.driver.record(work)
    }

    fn kernel(&self, name: &str) -> Result<Kernel> {
        let mut kernels = self.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&kernel) = kernels.get(name) {
            return Ok(kernel);
        }
        let kernel = self.driver.kernel(&format!("{name}_{}", self.dtype))?;
        kernels.insert(name.into(), kernel);
        Ok(kernel)
    }
}

fn alloc(driver: &Arc<dyn Driver>, what: &str, bytes: usize) -> Result<Buffer> {
    // A driver may refuse to allocate nothing, and a buffer of nothing still has an address.
    if let Some(addr) = driver.alloc(what, bytes.max(1))? {
        return Ok(Buffer::new(addr, bytes, Box::new(Allocation { driver: driver.clone(), addr })));
    }
    let (available, _) = driver.memory()?;
    Err(Error::Memory {
        what: what.into(),
        needed: bytes as u64,
        available,
        remedy: format!(
            " on {}; lower --context, --kv-memory or --prefill-chunk, or use --device cpu",
            driver.name()
        ),
    })
}

/// Memory of a driver, freed when dropped.
struct Allocation {
    driver: Arc<dyn Driver>,
    addr: usize,
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // SAFETY: `alloc` made this from the driver's own address, and only the buffer that owned it knew it.
        unsafe { self.driver.free(self.addr) };
    }
}
