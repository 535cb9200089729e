//! The CUDA devices that tests run on.

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
    let mut devices = Vec::new();
    for dtype in [DType::BF16, DType::F16] {
        #[cfg(feature = "emu")]
        {
            use tessera::backend::cuda::emu::Emulator;
            let emulator = Emulator::new(1, Emulator::LIMITS).unwrap();
            let driver = emulator.clone();
            devices.push(Tested {
                backend: backend(Arc::new(driver), dtype),
                reseed: Box::new(move |seed| emulator.reseed(seed)),
            });
        }
        match gpu::Gpu::open(0) {
            Ok(gpu) => {
                devices.push(Tested { backend: backend(Arc::new(gpu), dtype), reseed: Box::new(|_| {}) })
            }
            Err(reason) => println!("not on a GPU: {reason}"),
        }
    }
    if devices.is_empty() {
        println!("skipped: no GPU, and this build is without the feature `emu`");
    }
    devices
}

fn backend(driver: Arc<dyn Driver>, dtype: DType) -> Arc<dyn Backend> {
    Arc::new(CudaBackend::new(driver, dtype).unwrap().check_launches(true))
}
