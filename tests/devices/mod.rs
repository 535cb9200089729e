//! The CUDA devices that tests run on: the emulated one (feature `emu`), and a GPU where there is one.
#![allow(dead_code, reason = "each test program uses a part")]

pub mod watched;

use std::sync::Arc;
use tessera::backend::Backend;
use tessera::backend::cuda::driver::Driver;
use tessera::backend::cuda::{CudaBackend, gpu};
use tessera::tensor::DType;

/// A device that the table runs on.
pub struct Tested {
    /// Its backend, in one dtype.
    pub backend: Arc<dyn Backend>,
    /// Draws another order of execution, where that can be done.
    pub reseed: Box<dyn Fn(u64)>,
}

/// Every device of this machine, in both dtypes. Without any, the tests say so.
pub fn devices() -> Vec<Tested> {
    let in_dtype = |dtype: DType| {
        drivers().into_iter().map(move |opened| {
            let backend = Arc::new(opened.backend(dtype).check_launches(true));
            Tested { backend, reseed: opened.reseed }
        })
    };
    [DType::BF16, DType::F16].into_iter().flat_map(in_dtype).collect()
}

/// A driver, for tests that make backends of their own.
pub struct Opened {
    /// The driver.
    pub driver: Arc<dyn Driver>,
    /// As in [`Tested`].
    pub reseed: Box<dyn Fn(u64)>,
}

impl Opened {
    /// A backend over it.
    pub fn backend(&self, dtype: DType) -> CudaBackend {
        CudaBackend::new(self.driver.clone(), dtype).unwrap()
    }
}

/// A driver for every device of this machine. Without any, the tests say so.
pub fn drivers() -> Vec<Opened> {
    let mut drivers = Vec::new();
    #[cfg(feature = "emu")]
    {
        use tessera::backend::cuda::emu::Emulator;
        let emulator = Emulator::new(1, Emulator::LIMITS).unwrap();
        let driver = Arc::new(emulator.clone());
        drivers.push(Opened { driver, reseed: Box::new(move |seed| emulator.reseed(seed)) });
    }
    if let Some(driver) = gpu(gpu::MODULES) {
        drivers.push(Opened { driver, reseed: Box::new(|_| {}) });
    }
    if drivers.is_empty() {
        println!("skipped: no GPU, and this build is without the feature `emu`");
    }
    drivers
}

/// The GPU of this machine with these kernels. Without one the tests say so, or fail if `TESSERA_NEEDS_GPU` is set,
/// as `scripts/gpu/prove` sets it: what ran on no GPU proves nothing of one.
pub fn gpu(modules: &'static [gpu::Module]) -> Option<Arc<dyn Driver>> {
    match gpu::Gpu::open_with(0, modules) {
        Ok(gpu) => Some(Arc::new(gpu)),
        Err(reason) if std::env::var_os("TESSERA_NEEDS_GPU").is_some() => {
            panic!("TESSERA_NEEDS_GPU is set, and there is no GPU to test: {reason}")
        }
        Err(reason) => {
            println!("not on a GPU: {reason}");
            None
        }
    }
}
