//! Launches of `kernels/norm.cu`.

use super::device::{Device, Launch};
use crate::backend::Call;
use crate::error::Result;
use crate::op::Op;

/// Mirrors `RmsNormArgs`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct RmsNormArgs {
    x: usize,
    gamma: usize,
    y: usize,
    rows: u32,
    cols: u32,
    eps: f32,
    padding: u32,
}

/// [`Op::RmsNorm`]: one block a row.
///
/// # Safety
/// As for [`Backend::run`](crate::backend::Backend::run).
pub unsafe fn rms_norm(device: &Device, call: &Call<'_>) -> Result<()> {
    let Op::RmsNorm { eps } = *call.op else { unreachable!("not this op's room") };
    let (x, y) = (&call.ins[0], &call.outs[0]);
    let args = RmsNormArgs {
        x: x.addr,
        gamma: call.weights[0].addr,
        y: y.addr,
        rows: x.rows as u32,
        cols: x.cols as u32,
        eps,
        padding: 0,
    };
    let launch = Launch { kernel: "rms_norm", grid: [x.rows as u32, 1, 1], block: 256, shared: 8 * 4 };
    // SAFETY: operands have the types that `infer` gave and are live, the caller's obligation.
    unsafe { device.launch(launch, &args) }
}
