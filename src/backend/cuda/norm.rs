//! Norms: `kernels/norm.cu`.

use super::device::{Device, Launch};
use crate::backend::Call;
use crate::error::Result;
use crate::op::Op;
use crate::tensor::DType;
use bytemuck::NoUninit;

/// Elements that a thread takes at once where rows are aligned for it.
const VECTOR: usize = 8;
const WARP: usize = 32;
const MAX_THREADS: usize = 1024;
/// A float for each warp, and one more for LayerNorm's second sum.
const SHARED: usize = 2 * WARP * size_of::<f32>();

/// As `NormArgs` in the kernel file; 0 for what a norm does not have.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct Args {
    x: usize,
    add: usize,
    gamma: usize,
    beta: usize,
    sum: usize,
    y: usize,
    cols: u32,
    eps: f32,
}
const _: () = assert!(size_of::<Args>() == 56);

/// [`Op::LayerNorm`].
///
/// # Errors
/// [`Error::Device`](crate::Error::Device).
///
/// # Safety
/// As for [`Backend::run`](crate::backend::Backend::run), with vectors in f32.
pub unsafe fn layer_norm(device: &Device, call: &Call<'_>) -> Result<()> {
    let Op::LayerNorm { eps } = *call.op else { unreachable!("a LayerNorm") };
    // SAFETY: the caller's obligation.
    unsafe { launch(device, call, "layer_norm", eps) }
}

/// [`Op::RmsNorm`].
///
/// # Errors
/// [`Error::Device`](crate::Error::Device).
///
/// # Safety
/// As for [`layer_norm`].
pub unsafe fn rms_norm(device: &Device, call: &Call<'_>) -> Result<()> {
    let Op::RmsNorm { eps } = *call.op else { unreachable!("an RmsNorm") };
    // SAFETY: the caller's obligation.
    unsafe { launch(device, call, "rms_norm", eps) }
}

/// [`Op::AddRmsNorm`]. The sum is normalised before it is rounded.
///
/// # Errors
/// [`Error::Device`](crate::Error::Device).
///
/// # Safety
/// As for [`layer_norm`].
pub unsafe fn add_rms_norm(device: &Device, call: &Call<'_>) -> Result<()> {
    let Op::AddRmsNorm { eps } = *call.op else { unreachable!("an AddRmsNorm") };
    // SAFETY: the caller's obligation.
    unsafe { launch(device, call, "add_rms_norm", eps) }
}

/// [`Op::L2Normalize`].
///
/// # Errors
/// [`Error::Device`](crate::Error::Device).
///
/// # Safety
/// As for [`layer_norm`].
pub unsafe fn l2_normalize(device: &Device, call: &Call<'_>) -> Result<()> {
    // SAFETY: the caller's obligation.
    unsafe { launch(device, call, "l2_normalize", 0.0) }
}

/// # Safety
/// As for [`layer_norm`]; `kernel` is the call's.
unsafe fn launch(device: &Device, call: &Call<'_>, kernel: &str, eps: f32) -> Result<()> {
    let (x, y) = (&call.ins[0], call.outs.last().expect("a result"));
    if x.is_empty() {
        return Ok(());
    }
    debug_assert!(call.weights.iter().all(|w| w.ty.dtype == DType::F32 && w.ty.cols == x.cols));
    debug_assert!((x.rows, x.cols, x.dtype) == (y.rows, y.cols, device.dtype()));
    let weight = |i: usize| call.weights.get(i).map_or(0, |w| w.addr);
    let args = Args {
        x: x.addr,
        add: call.ins.get(1).map_or(0, |add| add.addr),
        gamma: weight(0),
        beta: weight(1),
        sum: if call.outs.len() == 2 { call.outs[0].addr } else { 0 },
        y: y.addr,
        cols: x.cols as u32,
        eps,
    };
    let pieces = x.cols / if x.cols.is_multiple_of(VECTOR) { VECTOR } else { 1 };
    let threads = pieces.next_multiple_of(WARP).min(MAX_THREADS);
    let launch = Launch { kernel, grid: [x.rows as u32, 1, 1], block: threads as u32, shared: SHARED as u32 };
    // SAFETY: the caller's obligation.
    unsafe { device.launch(launch, &args) }
}
