//! Where a model runs, as the command line spells it.

use crate::backend::Backend;
use crate::backend::cpu::CpuBackend;
use crate::backend::cuda::driver::Driver;
use crate::backend::cuda::{CudaBackend, gpu, ledger};
use crate::error::{Error, Result};
use crate::tensor::DType;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// Where a model runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Device {
    /// The first GPU if there is one that can be used and the [`ledger`] says that every kernel, as it stands,
    /// has been verified on one; otherwise the processor.
    #[default]
    Auto,
    /// The processor.
    Cpu,
    /// The GPU of this number.
    Cuda(usize),
    /// The emulated device: the GPU's kernels on the processor, every access checked. Slow, for tests; only in
    /// builds with the feature `emu`.
    Emu,
}

/// How a device is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceOptions {
    /// Which one.
    pub device: Device,
    /// What a device of 16 bits computes in, bf16 or f16; `None` takes the checkpoint's, and bf16, which has the
    /// range of f32, for one of f32. The CPU computes in f32 whatever this is.
    pub dtype: Option<DType>,
    /// Whether a GPU waits for every op before the next, so that an error names the op that made it.
    pub check_launches: bool,
}

impl DeviceOptions {
    /// Whether the device is, or may turn out to be, one with memory of its own.
    pub fn may_be_gpu(&self) -> bool {
        match self.device {
            Device::Cpu => false,
            Device::Auto => ledger::verified_on_gpu() && !gpu::MODULES.is_empty() && gpu::count().is_ok(),
            Device::Cuda(_) | Device::Emu => true,
        }
    }

    /// Opens the device for a model whose weights are, as far as it says, of dtype `stored`; the CPU with so many
    /// threads, or one for each core.
    ///
    /// # Errors
    /// [`Error::Device`] with the reason; [`Error::Option`] for a dtype that the device does not convert to; what
    /// `stored` says, where that matters.
    pub fn open(
        &self,
        threads: Option<usize>,
        stored: impl FnOnce() -> Result<Option<DType>>,
    ) -> Result<Arc<dyn Backend>> {
        let driver = match self.device {
            Device::Cpu => None,
            // `tessera devices` tells why there is none.
            Device::Auto if self.may_be_gpu() => {
                gpu::Gpu::open(0).ok().map(|gpu| Arc::new(gpu) as Arc<dyn Driver>)
            }
            Device::Auto => None,
            Device::Cuda(ordinal) => Some(Arc::new(gpu::Gpu::open(ordinal)?) as _),
            Device::Emu => Some(emulator()?),
        };
        let Some(driver) = driver else {
            if let Some(dtype) = self.dtype
                && stored()? != Some(dtype)
            {
                let expected = "auto: on the CPU a checkpoint's weights are used as stored";
                return Err(Error::option("--dtype", expected, dtype));
            }
            return Ok(Arc::new(CpuBackend::new(threads)?));
        };
        let dtype = match self.dtype {
            Some(dtype) => dtype,
            None => match stored()? {
                Some(DType::F16) => DType::F16,
                Some(DType::BF16 | DType::F32 | DType::I32) | None => DType::BF16,
            },
        };
        Ok(Arc::new(CudaBackend::new(driver, dtype)?.check_launches(self.check_launches)))
    }
}

#[cfg(feature = "emu")]
fn emulator() -> Result<Arc<dyn Driver>> {
    use crate::backend::cuda::emu::Emulator;
    Ok(Arc::new(Emulator::new(0, Emulator::LIMITS)?))
}

#[cfg(not(feature = "emu"))]
fn emulator() -> Result<Arc<dyn Driver>> {
    let problem = "not in this build; build with `--features emu`".into();
    Err(Error::Device { device: "emu".into(), problem })
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| text.parse().ok().filter(|n: &usize| *n <= i32::MAX as usize);
        let device = match text {
            "auto" => Some(Device::Auto),
            "cpu" => Some(Device::Cpu),
            "cuda" => Some(Device::Cuda(0)),
            "emu" => Some(Device::Emu),
            _ => text.strip_prefix("cuda:").and_then(number).map(Device::Cuda),
        };
        device.ok_or_else(|| format!("expected auto, cpu, cuda, cuda:N or emu, found {text:?}"))
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Auto => f.write_str("auto"),
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
            Device::Emu => f.write_str("emu"),
        }
    }
}
