//! The next token of every row: `kernels/sample.cu`.

use super::device::{Device, Launch};
use crate::backend::Call;
use crate::error::{Error, Result};
use crate::tensor::DType;
use bytemuck::NoUninit;

const THREADS: u32 = 1024;
/// `sizeof(SampleShared)` in the kernel file: two u64 a warp, a cut and an id; 2048 bins of three counts.
const SHARED: u32 = 2 * 32 * 8 + 24 + 2048 * 3 * 4;
/// More ids would let a sum of their probabilities, in units of 2^-44, overflow 64 bits.
const MAX_VOCAB: usize = 1 << 19;

/// As `SampleArgs` in the kernel file.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct Args {
    logits: usize,
    params: usize,
    seen: usize,
    token: usize,
    vocab: u32,
    seen_words: u32,
}
const _: () = assert!(size_of::<Args>() == 40);

/// [`Op::Sample`](crate::op::Op::Sample).
///
/// # Errors
/// [`Error::Device`], also for a vocabulary of more than 2^19 ids.
///
/// # Safety
/// As for [`Backend::run`](crate::backend::Backend::run).
pub unsafe fn sample(device: &Device, call: &Call<'_>) -> Result<()> {
    let [logits, params, seen] = call.ins else { unreachable!("three operands") };
    if logits.is_empty() {
        return Ok(());
    }
    debug_assert!(logits.dtype == DType::F32 && seen.cols == logits.cols.div_ceil(32));
    if logits.cols > MAX_VOCAB {
        let problem = format!("a vocabulary of {}; at most {MAX_VOCAB} can be sampled from", logits.cols);
        return Err(Error::Device { device: device.driver().name(), problem });
    }
    let args = Args {
        logits: logits.addr,
        params: params.addr,
        seen: seen.addr,
        token: call.outs[0].addr,
        vocab: logits.cols as u32,
        seen_words: seen.cols as u32,
    };
    let launch =
        Launch { kernel: "sample", grid: [logits.rows as u32, 1, 1], block: THREADS, shared: SHARED };
    // SAFETY: the caller's obligation.
    unsafe { device.launch(launch, &args) }
}
