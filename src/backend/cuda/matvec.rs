//! Linear and GatedLinear of decode rows: `kernels/matvec.cu`.

use super::device::{Device, Launch};
use crate::backend::Call;
use crate::error::{Error, Result};
use crate::op::{Activation, Op};
use crate::tensor::{DType, View};
use bytemuck::NoUninit;
use std::ops::Range;

/// Outputs of a block.
const OUTS: usize = 8;
const WARPS: usize = 16;
/// Blocks in the second and third dimension of a grid.
const MAX_GRID: usize = 65535;

/// As `MatvecArgs` in the kernel file.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct Args {
    x: usize,
    weights: usize,
    bias: usize,
    residual: usize,
    y: usize,
    rows: u32,
    n: u32,
    k: u32,
    ldw: u32,
    activation: u32,
    wide: u32,
}
const _: () = assert!(size_of::<Args>() == 64);

/// `act(x · Wᵀ + b) + residual` of the rows `rows`; see [`Op::Linear`].
///
/// # Errors
/// [`Error::Device`], also for more outputs than a grid has tiles.
///
/// # Safety
/// As for [`Backend::run`](crate::backend::Backend::run), with weights as this backend prepares them: the
/// matrices end to end, rows padded to a multiple of 8 with zeros; biases end to end in f32.
pub unsafe fn linear(device: &Device, call: &Call<'_>, rows: Range<usize>) -> Result<()> {
    let Op::Linear { act, bias, residual, wide, .. } = *call.op else { unreachable!("a Linear") };
    let matrices = if bias { call.weights.len() / 2 } else { call.weights.len() };
    let (x, y) = (part(&call.ins[0], &rows), part(&call.outs[0], &rows));
    debug_assert!(y.cols >= call.weights[..matrices].iter().map(|w| w.ty.rows).sum::<usize>());
    debug_assert_eq!(y.dtype, if wide { DType::F32 } else { device.dtype() });
    let args = Args {
        x: x.addr,
        weights: call.weights[0].addr,
        bias: if bias { call.weights[matrices].addr } else { 0 },
        residual: if residual { part(&call.ins[1], &rows).addr } else { 0 },
        y: y.addr,
        rows: x.rows as u32,
        n: y.cols as u32,
        k: x.cols as u32,
        ldw: (call.weights[0].row_stride / device.dtype().size()) as u32,
        activation: activation(act),
        wide: wide as u32,
    };
    // SAFETY: the caller's obligation; the rows are in their views, as `part` asserts.
    unsafe { launch(device, ["matvec_8", "matvec_16"], &args) }
}

/// `silu(x·Wgᵀ + bg) ⊙ (x·Wuᵀ + bu)` of the rows `rows`; see [`Op::GatedLinear`].
///
/// # Errors
/// As for [`linear`].
///
/// # Safety
/// As for [`linear`], with rows of gate and up, and their biases, taking turns.
pub unsafe fn gated_linear(device: &Device, call: &Call<'_>, rows: Range<usize>) -> Result<()> {
    let Op::GatedLinear { bias, .. } = *call.op else { unreachable!("a GatedLinear") };
    let (x, y) = (part(&call.ins[0], &rows), part(&call.outs[0], &rows));
    let gate = call.weights[0];
    debug_assert_eq!(call.weights[1].addr, gate.addr + gate.row_stride / 2, "gate and up take turns");
    let args = Args {
        x: x.addr,
        weights: gate.addr,
        bias: if bias { call.weights[2].addr } else { 0 },
        residual: 0,
        y: y.addr,
        rows: x.rows as u32,
        n: 2 * y.cols as u32,
        k: x.cols as u32,
        ldw: (gate.row_stride / 2 / device.dtype().size()) as u32,
        activation: 0,
        wide: 0,
    };
    // SAFETY: as above.
    unsafe { launch(device, ["matvec_gated_8", "matvec_gated_16"], &args) }
}

/// Launches the first kernel for up to eight rows, and the second for more.
///
/// # Safety
/// `args` points to live memory, as the kernels' contract says.
unsafe fn launch(device: &Device, kernels: [&str; 2], args: &Args) -> Result<()> {
    if args.rows == 0 {
        return Ok(());
    }
    debug_assert!(args.ldw.is_multiple_of(8) && args.ldw >= args.k && args.weights.is_multiple_of(16));
    debug_assert!(!args.k.is_multiple_of(8) || args.x.is_multiple_of(16));
    let tiles = (args.n as usize).div_ceil(OUTS);
    if tiles > MAX_GRID {
        let problem = format!("a product with {} outputs; at most {} are possible", args.n, MAX_GRID * OUTS);
        return Err(Error::Device { device: device.driver().name(), problem });
    }
    let (kernel, rows) = if args.rows <= 8 { (kernels[0], 8) } else { (kernels[1], 16) };
    let grid = [args.rows.div_ceil(rows as u32), tiles as u32, 1];
    let shared = WARPS * rows * OUTS * size_of::<f32>();
    let launch = Launch { kernel, grid, block: 32 * WARPS as u32, shared: shared as u32 };
    // SAFETY: the caller's obligation.
    unsafe { device.launch(launch, args) }
}

/// As `Activation` in the kernels' common.cuh.
pub(super) fn activation(act: Activation) -> u32 {
    match act {
        Activation::None => 0,
        Activation::QuickGelu => 1,
        Activation::GeluErf => 2,
    }
}

/// Some rows of a view.
pub(super) fn part(view: &View, rows: &Range<usize>) -> View {
    assert!(rows.start <= rows.end && rows.end <= view.rows, "rows {rows:?} of {}", view.rows);
    let addr = view.addr + rows.start * view.cols * view.dtype.size();
    View { addr, rows: rows.len(), ..*view }
}
