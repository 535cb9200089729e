//! Linear and GatedLinear of prefill rows: `kernels/linear.cu`, on the core in `kernels/gemm.cuh`.

use super::device::{Device, Launch};
use super::matvec::{activation, part};
use super::tile::{self, ANY, Plan, Shape, TILES, Tile};
use crate::backend::{Call, Prepared};
use crate::error::{Error, Result};
use crate::op::Op;
use crate::tensor::DType;
use bytemuck::NoUninit;
use std::ops::Range;

/// As `GemmArgs` in gemm.cuh.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
pub(super) struct GemmArgs {
    w: usize,
    partials: usize,
    counters: usize,
    rows: u32,
    cols: u32,
    depth: u32,
    ldw: u32,
    slices: u32,
    group: u32,
}
const _: () = assert!(size_of::<GemmArgs>() == 48);

/// As `LinearArgs` in linear.cu.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct Args {
    gemm: GemmArgs,
    x: usize,
    bias: usize,
    residual: usize,
    y: usize,
    activation: u32,
    form: u32,
}
const _: () = assert!(size_of::<Args>() == 88);

/// What becomes of the sums, as `Form` in linear.cu.
const PLAIN: u32 = 0;
const WIDE: u32 = 1;
const GATED: u32 = 2;

impl GemmArgs {
    /// The arguments of a product with a matrix whose rows are `row_bytes` apart, in slices with partial sums
    /// in the workspace, and its launch by the quickest of `tiles`.
    ///
    /// # Errors
    /// [`Error::Device`] if a block may not have the shared memory of any of them.
    pub(super) fn plan(
        device: &Device,
        tiles: &'static [Tile],
        shape: Shape,
        (matrix, row_bytes): (&Prepared, usize),
        (slices, workspace): (u32, usize),
    ) -> Result<(GemmArgs, Launch<'static>)> {
        let ldw = row_bytes / device.dtype().size();
        debug_assert!(ldw.is_multiple_of(8) && ldw >= shape.depth as usize && matrix.addr.is_multiple_of(16));
        let limits = device.limits();
        let plan = Plan::new(tiles, shape, slices, limits).ok_or_else(|| Error::Device {
            device: device.driver().name(),
            problem: format!(
                "a block may have {} bytes of shared memory; {} needs {}",
                limits.shared_per_block,
                tiles[0].kernel,
                tiles[0].shared()
            ),
        })?;
        let gemm = GemmArgs {
            w: matrix.addr,
            partials: workspace,
            counters: device.counters(),
            rows: shape.rows,
            cols: shape.cols,
            depth: shape.depth,
            ldw: ldw as u32,
            slices: plan.slices,
            group: plan.group,
        };
        let Plan { tile, slices, .. } = plan;
        let grid = [tile.count(shape) as u32, slices, 1];
        Ok((gemm, Launch { kernel: tile.kernel, grid, block: tile.threads(), shared: tile.shared() }))
    }
}

/// Bytes of partial sums that [`linear`] and [`gated_linear`] need for `rows` rows of x `[rows, depth]` and the
/// `cols` columns of all matrices.
pub fn workspace(rows: usize, cols: usize, depth: usize) -> usize {
    let shape = shape(rows, cols, depth);
    tile::partials(tiles(shape.cols, shape.depth), shape, tile::slices(shape.cols, shape.depth)) as usize
}

/// `act(x · Wᵀ + b) + residual` of the rows `rows`; see [`Op::Linear`].
///
/// # Errors
/// [`Error::Device`].
///
/// # Safety
/// As for [`Backend::run`](crate::backend::Backend::run), with weights as this backend prepares them: the
/// matrices end to end, rows padded to a multiple of 8 with zeros; biases end to end in f32.
pub unsafe fn linear(device: &Device, call: &Call<'_>, rows: Range<usize>) -> Result<()> {
    // SAFETY: the caller's obligation.
    unsafe { linear_by(device, call, rows, tiles(call.outs[0].cols as u32, call.ins[0].cols as u32)) }
}

/// `silu(x·Wgᵀ + bg) ⊙ (x·Wuᵀ + bu)` of the rows `rows`; see [`Op::GatedLinear`].
///
/// # Errors
/// As for [`linear`].
///
/// # Safety
/// As for [`linear`], with rows of gate and up, and their biases, taking turns.
pub unsafe fn gated_linear(device: &Device, call: &Call<'_>, rows: Range<usize>) -> Result<()> {
    // SAFETY: the caller's obligation.
    unsafe {
        gated_linear_by(device, call, rows, tiles(2 * call.outs[0].cols as u32, call.ins[0].cols as u32))
    }
}

/// # Safety
/// As for [`linear`]; `tiles` are for operands aligned as these.
unsafe fn linear_by(
    device: &Device,
    call: &Call<'_>,
    rows: Range<usize>,
    tiles: &'static [Tile],
) -> Result<()> {
    let Op::Linear { act, bias, residual, wide, .. } = *call.op else { unreachable!("a Linear") };
    let matrices = if bias { call.weights.len() / 2 } else { call.weights.len() };
    let matrix = (call.weights[0], call.weights[0].row_stride);
    for (rows, slices) in launches(device, call, rows, tiles, call.outs[0].cols) {
        let (x, y) = (part(&call.ins[0], &rows), part(&call.outs[0], &rows));
        debug_assert!(y.cols >= call.weights[..matrices].iter().map(|w| w.ty.rows).sum::<usize>());
        debug_assert_eq!(y.dtype, if wide { DType::F32 } else { device.dtype() });
        let shape = shape(x.rows, y.cols, x.cols);
        let (gemm, launch) = GemmArgs::plan(device, tiles, shape, matrix, (slices, call.workspace))?;
        let args = Args {
            gemm,
            x: x.addr,
            bias: if bias { call.weights[matrices].addr } else { 0 },
            residual: if residual { part(&call.ins[1], &rows).addr } else { 0 },
            y: y.addr,
            activation: activation(act),
            form: if wide { WIDE } else { PLAIN },
        };
        // SAFETY: the caller's obligation; the rows are in their views, as `part` asserts, and the workspace
        // is as large as `workspace` said.
        unsafe { device.launch(launch, &args)? };
    }
    Ok(())
}

/// # Safety
/// As for [`gated_linear`]; `tiles` are for operands aligned as these.
unsafe fn gated_linear_by(
    device: &Device,
    call: &Call<'_>,
    rows: Range<usize>,
    tiles: &'static [Tile],
) -> Result<()> {
    let Op::GatedLinear { bias, .. } = *call.op else { unreachable!("a GatedLinear") };
    let gate = call.weights[0];
    debug_assert_eq!(call.weights[1].addr, gate.addr + gate.row_stride / 2, "gate and up take turns");
    let matrix = (gate, gate.row_stride / 2);
    for (rows, slices) in launches(device, call, rows, tiles, 2 * call.outs[0].cols) {
        let (x, y) = (part(&call.ins[0], &rows), part(&call.outs[0], &rows));
        let shape = shape(x.rows, 2 * y.cols, x.cols);
        let (gemm, launch) = GemmArgs::plan(device, tiles, shape, matrix, (slices, call.workspace))?;
        let args = Args {
            gemm,
            x: x.addr,
            bias: if bias { call.weights[2].addr } else { 0 },
            residual: 0,
            y: y.addr,
            activation: 0,
            form: GATED,
        };
        // SAFETY: as above.
        unsafe { device.launch(launch, &args)? };
    }
    Ok(())
}

/// M, N and K, which `Op::infer` and the arena keep far below 2^32.
pub(super) fn shape(rows: usize, cols: usize, depth: usize) -> Shape {
    Shape { rows: rows as u32, cols: cols as u32, depth: depth as u32 }
}

/// The tiles for rows of x that begin at 16-byte addresses and rows of y in whole fours of columns, or for any.
fn tiles(cols: u32, depth: u32) -> &'static [Tile] {
    if depth.is_multiple_of(8) && cols.is_multiple_of(4) { &TILES } else { &ANY }
}

/// The rows of each launch, and the slices of all of them.
fn launches(
    device: &Device,
    call: &Call<'_>,
    rows: Range<usize>,
    tiles: &[Tile],
    cols: usize,
) -> impl Iterator<Item = (Range<usize>, u32)> {
    debug_assert!(call.ins[0].addr.is_multiple_of(16));
    let slices = tile::slices(cols as u32, call.ins[0].cols as u32);
    let at_once = tile::rows_at_once(tiles, cols as u32, slices, device.limits().shared_per_block) as usize;
    rows.clone().step_by(at_once).map(move |start| (start..rows.end.min(start + at_once), slices))
}

#[cfg(feature = "emu")]
#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Backend;
    use crate::backend::cuda::{CudaBackend, emu::Emulator};
    use crate::op::Activation;
    use crate::tensor::{Storage, View, Weight, WeightBytes};
    use std::sync::Arc;

    /// Numbers between -1 and 1.
    fn numbers(count: usize, salt: u32) -> Vec<f32> {
        let hash = |i: u32| (i.wrapping_mul(2_654_435_769) ^ salt).wrapping_mul(0x85eb_ca6b) >> 8;
        (0..count as u32).map(|i| hash(i) as f32 / (1 << 23) as f32 - 1.0).collect()
    }

    fn weight(dtype: DType, rows: usize, cols: usize) -> Weight {
        let mut bytes = vec![0; rows * cols * dtype.size()];
        dtype.round_to(&numbers(rows * cols, cols as u32), &mut bytes);
        let (len, storage) = (bytes.len(), Arc::new(Storage::Owned(bytes.into())));
        let bytes = WeightBytes::new(storage, 0, len).unwrap();
        Weight { name: "w".into(), dtype, rows, cols, bytes }
    }

    /// The bytes that a product of `m` rows with matrices `[n, k]` gives, by some of `tiles`, with launches
    /// that are cut there.
    fn product(
        dtype: DType,
        op: &Op,
        (m, n, k): (usize, usize, usize),
        tiles: &'static [Tile],
        cuts: &[usize],
    ) -> Vec<u8> {
        let emulator = Emulator::new(k as u64, Emulator::LIMITS).unwrap();
        let backend = CudaBackend::new(Arc::new(emulator), dtype).unwrap();
        let matrices = if matches!(op, Op::GatedLinear { .. }) { 2 } else { 1 };
        let weights = backend.prepare(op, &vec![weight(dtype, n, k); matrices]).unwrap();
        let weights: Vec<_> = weights.iter().collect();
        let (x, y) = (backend.alloc("x", m * k * 2).unwrap(), backend.alloc("y", m * n * 2).unwrap());
        let view = |addr, cols| View { addr, rows: m, cols, dtype };
        let (ins, outs) = ([view(x.addr, k)], [view(y.addr, n)]);
        let workspace = backend.alloc("workspace", workspace(m, matrices * n, k)).unwrap();
        let call =
            Call { op, ins: &ins, weights: &weights, outs: &outs, decode: 0, workspace: workspace.addr };
        let (mut rows, mut bytes) = (vec![0; m * k * 2], vec![0; m * n * 2]);
        dtype.round_to(&numbers(m * k, 7), &mut rows);
        // SAFETY: operands, result and workspace are buffers of their own, as large as they must be.
        unsafe {
            backend.upload(x.addr, &rows).unwrap();
            for cut in cuts.windows(2) {
                let rows = cut[0]..cut[1];
                match op {
                    Op::Linear { .. } => linear_by(backend.device(), &call, rows, tiles).unwrap(),
                    _ => gated_linear_by(backend.device(), &call, rows, tiles).unwrap(),
                }
            }
            backend.download(y.addr, &mut bytes).unwrap();
        }
        bytes
    }

    const PLAIN: Op =
        Op::Linear { act: Activation::None, bias: false, residual: false, wide: false, pairs: Vec::new() };

    /// Several tiles high and wide, with tails; one of them cut into slices.
    const SHAPES: [(usize, usize, usize); 3] = [(131, 264, 200), (70, 40, 4136), (17, 28, 64)];

    /// Every tile gives the same bits: which one is chosen is a question of time alone.
    #[test]
    fn tiles_change_no_bit() {
        assert!(SHAPES.iter().any(|&(_, n, k)| tile::slices(n as u32, k as u32) > 1), "one is cut");
        for dtype in [DType::BF16, DType::F16] {
            for op in [PLAIN, Op::GatedLinear { bias: false, pairs: Vec::new() }] {
                for shape in SHAPES {
                    let reference = product(dtype, &op, shape, &ANY, &[0, shape.0]);
                    assert!(reference.iter().any(|byte| *byte != reference[0]));
                    for tile in &TILES {
                        let got = product(dtype, &op, shape, std::slice::from_ref(tile), &[0, shape.0]);
                        assert!(got == reference, "{} differs at {shape:?} in {dtype}, {op:?}", tile.kernel);
                    }
                }
            }
        }
    }

    /// Rows in one launch or in several, by whatever tiles are chosen for so many: the same bits.
    #[test]
    fn chunks_change_no_bit() {
        for op in [PLAIN, Op::GatedLinear { bias: false, pairs: Vec::new() }] {
            for shape in SHAPES {
                let m = shape.0;
                let whole = product(DType::BF16, &op, shape, &TILES, &[0, m]);
                for cuts in [vec![0, 1, m], vec![0, 16, 17, m], vec![0, 7, 10, 13, m - 2, m]] {
                    let got = product(DType::BF16, &op, shape, &TILES, &cuts);
                    assert!(got == whole, "{shape:?} cut at {cuts:?}, {op:?}");
                }
            }
        }
    }
}
