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
    match gpu::Gpu::open(0) {
        Ok(gpu) => drivers.push(Opened { driver: Arc::new(gpu), reseed: Box::new(|_| {}) }),
        Err(reason) => println!("not on a GPU: {reason}"),
    }
    if drivers.is_empty() {
        println!("skipped: no GPU, and this build is without the feature `emu`");
    }
    drivers
}
