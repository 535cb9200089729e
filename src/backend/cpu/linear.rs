//! Matrix products with weights as stored: y = x Wᵀ, one weight or several side by side, with bias,
//! activation and residual; and the gated pair of a LLaMA feed-forward layer.
//!
//! **Reduction order.** For output (row, n), K is cut into blocks of [`K_BLOCK`]. In a block the sum
//! starts at 0 and takes `x[k] * w[n][k]` by fused multiply-add, k ascending. The block sums are added
//! in block order; then come bias, activation, residual. That is all: it names no row count, thread or
//! instruction set, so a row's result has the same bits alone, among 640 others, and on every path.
//!
//! **Two loops** share the primitive of `panel`. Up to [`FEW_ROWS`] activation rows, each weight is
//! read once, in registers, and goes straight into the sums: memory bandwidth decides. With more rows,
//! a strip of 32 outputs by one K-block is unpacked to f32 once, stays in the first-level cache, and
//! meets the packed activations in a register tile: the multipliers decide.
//!
//! Strips are handed to threads by a counter, whoever is free first.

use super::lanes::{LANES, Lanes, Math};
use super::machine::{Machine, Task};
use super::panel::{Bf16, F16, F32, Format, Matrix, RowGroup};
use super::pool::Worker;
use crate::op::Activation;
use crate::tensor::DType;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// Products summed by one chain of fused multiply-adds. Part of the reduction order.
pub const K_BLOCK: usize = 256;
/// Up to so many activation rows the weights are used as they are read.
const FEW_ROWS: usize = 4;
/// Activation rows that are packed, and whose sums a thread keeps, at a time.
const ROW_BLOCK: usize = 768;
/// How many columns ahead of their use packed rows are asked for: they stream from an outer cache.
const PACKED_AHEAD: usize = 256;
/// Every tile's height divides this.
const TILE_ROWS: usize = 12;
/// Sixteen-output groups in a strip.
const GROUPS: usize = 2;
/// Floats in a row of sums.
const STRIP: usize = GROUPS * LANES;
/// The workspace begins on a cache line.
const ALIGNMENT: usize = 64;
/// Floats in an unpacked group.
const PANEL: usize = K_BLOCK * LANES;

/// What is added last.
#[derive(Clone, Copy, Debug)]
pub enum Residual<'a> {
    /// Nothing.
    None,
    /// An `[m, n]` block.
    Add(&'a [f32]),
    /// What the output held before.
    InPlace,
}

/// One weight of a product, `[n, k]`, and its bias of n elements.
#[derive(Clone, Copy, Debug)]
pub struct Layer<'a> {
    /// The weight.
    pub weight: Matrix<'a>,
    /// The bias, one row.
    pub bias: Option<Matrix<'a>>,
}

/// Bytes of workspace that [`linear`] and [`gated_linear`] need for up to `m` rows of `k` inputs.
pub fn linear_workspace(m: usize, k: usize, threads: usize) -> usize {
    let rows = m.min(ROW_BLOCK).next_multiple_of(TILE_ROWS);
    let floats = rows * k + threads * (GROUPS * PANEL + rows * STRIP);
    floats * size_of::<f32>() + ALIGNMENT
}

/// `out = activation(x Wᵢᵀ + bᵢ) + residual`, the outputs of all layers side by side in each row.
///
/// `x` is `[m, k]`, `out` `[m, n]` with n the sum of the layers' rows.
///
/// # Panics
/// If shapes or the workspace do not fit: `Op::infer` and [`linear_workspace`] are the authority.
pub fn linear(
    machine: &Machine,
    x: &[f32],
    layers: &[Layer<'_>],
    (activation, residual): (Activation, Residual<'_>),
    out: &mut [f32],
    workspace: &mut [u8],
) {
    let n = layers.iter().map(|layer| layer.weight.rows).sum();
    let mut product = Product::new(x, layers, n, out, workspace, machine);
    product.activation = activation;
    product.residual = match residual {
        Residual::None => std::ptr::null(),
        Residual::InPlace => product.out,
        Residual::Add(values) => {
            assert_eq!(values.len(), product.m * n, "linear: residual");
            values.as_ptr()
        }
    };
    product.strips = layers.iter().map(|layer| layer.weight.rows.div_ceil(STRIP)).sum();
    product.compute(machine);
}

/// `out = silu(x gateᵀ + b) * (x upᵀ + b)` for two layers of one shape.
///
/// # Panics
/// As [`linear`].
pub fn gated_linear(
    machine: &Machine,
    x: &[f32],
    gate: Layer<'_>,
    up: Layer<'_>,
    out: &mut [f32],
    workspace: &mut [u8],
) {
    let n = gate.weight.rows;
    assert_eq!(n, up.weight.rows, "gated_linear: rows of gate and up");
    let layers = [gate, up];
    let mut product = Product::new(x, &layers, n, out, workspace, machine);
    product.gated = true;
    product.strips = n.div_ceil(LANES);
    product.compute(machine);
}

/// The checked operands of a product, and how many strips it is cut into.
struct Product<'a> {
    layers: &'a [Layer<'a>],
    gated: bool,
    activation: Activation,
    x: *const f32,
    /// As `out`, or null.
    residual: *const f32,
    out: *mut f32,
    workspace: *mut f32,
    m: usize,
    n: usize,
    k: usize,
    strips: usize,
    /// The next strip that nobody has taken.
    next: AtomicUsize,
}

// SAFETY: the pointers come from slices borrowed for the whole computation. Workers write disjoint
// columns of `out` and read of `residual` only what they write themselves; they use disjoint parts of
// the workspace, or are kept apart by a barrier.
unsafe impl Sync for Product<'_> {}

/// Thirty-two outputs: two groups of sixteen rows of W. In a gated product they are a gate and its up.
struct Strip<'a> {
    groups: [RowGroup; GROUPS],
    layers: [&'a Layer<'a>; GROUPS],
    /// The first row of W in each group.
    rows: [usize; GROUPS],
    /// The column of `out` for each group.
    columns: [usize; GROUPS],
    /// How many columns of each group are outputs.
    widths: [usize; GROUPS],
}

impl<'a> Product<'a> {
    fn new(
        x: &'a [f32],
        layers: &'a [Layer<'a>],
        n: usize,
        out: &'a mut [f32],
        workspace: &'a mut [u8],
        machine: &Machine,
    ) -> Self {
        let k = layers[0].weight.cols;
        let m = x.len() / k.max(1);
        assert!(k > 0 && x.len() == m * k, "linear: {} activations are no rows of {k}", x.len());
        assert_eq!(out.len(), m * n, "linear: output");
        for layer in layers {
            assert_eq!(layer.weight.cols, k, "linear: inputs of each weight");
            layer.weight.assert_valid();
            if let Some(bias) = &layer.bias {
                assert_eq!((bias.rows, bias.cols), (1, layer.weight.rows), "linear: bias");
                bias.assert_valid();
            }
        }
        let needed = linear_workspace(m, k, machine.threads());
        assert!(m <= FEW_ROWS || workspace.len() >= needed, "linear: workspace");
        let skip = workspace.as_ptr().align_offset(ALIGNMENT);
        Product {
            layers,
            gated: false,
            activation: Activation::None,
            x: x.as_ptr(),
            residual: std::ptr::null(),
            out: out.as_mut_ptr(),
            workspace: workspace.as_mut_ptr().wrapping_add(skip).cast(),
            m,
            n,
            k,
            strips: 0,
            next: AtomicUsize::new(0),
        }
    }

    fn compute(&self, machine: &Machine) {
        if self.m > 0 {
            machine.run(self);
        }
    }

    /// The strip of that number.
    #[inline(always)]
    fn strip(&self, index: usize) -> Strip<'a> {
        let strip = |layers: [&'a Layer<'a>; 2], rows: [usize; 2], columns, widths| Strip {
            groups: [RowGroup::new(&layers[0].weight, rows[0]), RowGroup::new(&layers[1].weight, rows[1])],
            layers,
            rows,
            columns,
            widths,
        };
        if self.gated {
            let row = index * LANES;
            return strip(
                [&self.layers[0], &self.layers[1]],
                [row; 2],
                [row; 2],
                [LANES.min(self.n - row); 2],
            );
        }
        let (mut index, mut column) = (index, 0);
        let mut layers = self.layers.iter();
        loop {
            let layer = layers.next().expect("strips were counted over the same layers");
            let n = layer.weight.rows;
            if index >= n.div_ceil(STRIP) {
                index -= n.div_ceil(STRIP);
                column += n;
                continue;
            }
            let row = index * STRIP;
            let widths = [LANES.min(n - row), LANES.min(n.saturating_sub(row + LANES))];
            // An absent second group computes the first again, and writes nothing.
            let second = if widths[1] == 0 { row } else { row + LANES };
            return strip([layer; 2], [row, second], [column + row, column + second], widths);
        }
    }

    /// Strips nobody has taken, one after another.
    #[inline(always)]
    fn take_strip(&self) -> Option<Strip<'a>> {
        let index = self.next.fetch_add(1, Relaxed);
        (index < self.strips).then(|| self.strip(index))
    }

    /// Bias, activation, residual; then the results are written.
    ///
    /// # Safety
    /// `row < m`, and the strip is this worker's.
    #[inline(always)]
    unsafe fn finish<L: Lanes>(&self, lanes: L, strip: &Strip<'_>, row: usize, sums: [L::V; GROUPS]) {
        let mut sums = sums;
        for g in 0..GROUPS {
            if let Some(bias) = &strip.layers[g].bias {
                // SAFETY: the bias was checked to have an element for each output of its weight.
                let bias = unsafe { bias.load(lanes, 0, strip.rows[g], strip.groups[g].rows) };
                sums[g] = lanes.add(sums[g], bias);
            }
        }
        if self.gated {
            sums[0] = lanes.mul(lanes.silu(sums[0]), sums[1]);
        }
        for g in 0..if self.gated { 1 } else { GROUPS } {
            let (at, width) = (row * self.n + strip.columns[g], strip.widths[g]);
            let mut y = match self.activation {
                Activation::None => sums[g],
                Activation::QuickGelu => lanes.quick_gelu(sums[g]),
                Activation::GeluErf => lanes.gelu_erf(sums[g]),
            };
            // SAFETY: `width` columns from `at` on are this strip's, in `out` and in `residual`.
            unsafe {
                if !self.residual.is_null() {
                    y = lanes.add(y, lanes.load_first(self.residual.add(at), width));
                }
                lanes.store_first(self.out.add(at), y, width);
            }
        }
    }
}

impl Task for Product<'_> {
    #[inline(always)]
    fn run<L: Lanes>(&self, lanes: L, worker: Worker<'_>) {
        // SAFETY: `Product::new` has checked every extent.
        unsafe {
            match self.m {
                1 => self.few::<L, 1>(lanes),
                2 => self.few::<L, 2>(lanes),
                3 => self.few::<L, 3>(lanes),
                4 => self.few::<L, 4>(lanes),
                _ => self.many(lanes, worker),
            }
        }
    }
}

/// The loop for few rows: every weight is read once and used in registers.
impl Product<'_> {
    /// # Safety
    /// The product has `R` rows.
    #[inline(always)]
    unsafe fn few<L: Lanes, const R: usize>(&self, lanes: L) {
        while let Some(strip) = self.take_strip() {
            let mut sums = [[lanes.splat(0.0); GROUPS]; R];
            // Groups of one dtype advance side by side, which hides the latency of the sums; a gate
            // and an up of different dtypes go one after the other.
            let together = strip.groups[0].dtype == strip.groups[1].dtype;
            for round in 0..if together { 1 } else { GROUPS } {
                let groups = if together { strip.groups } else { [strip.groups[round]; GROUPS] };
                // SAFETY: the caller's obligation; the dtype of each arm is that of the groups.
                let found = unsafe {
                    match groups[0].dtype {
                        DType::F16 => self.sums::<L, F16, R>(lanes, &groups),
                        DType::BF16 => self.sums::<L, Bf16, R>(lanes, &groups),
                        DType::F32 | DType::I32 => self.sums::<L, F32, R>(lanes, &groups),
                    }
                };
                for row in 0..R {
                    for g in 0..GROUPS {
                        if together || g == round {
                            sums[row][g] = found[row][g];
                        }
                    }
                }
            }
            for (row, sums) in sums.into_iter().enumerate() {
                // SAFETY: the product has `R` rows, and the strip was taken.
                unsafe { self.finish(lanes, &strip, row, sums) }
            }
        }
    }

    /// x Wᵀ for two groups of sixteen rows of W.
    ///
    /// # Safety
    /// The product has `R` rows, the groups are of its layers and have dtype `F`.
    #[inline(always)]
    unsafe fn sums<L: Lanes, F: Format, const R: usize>(
        &self,
        lanes: L,
        groups: &[RowGroup; GROUPS],
    ) -> [[L::V; GROUPS]; R] {
        let (x, k) = (self.x, self.k);
        let line = LANES * F::PER_WORD;
        let mut total = [[lanes.splat(0.0); GROUPS]; R];
        for start in (0..k).step_by(K_BLOCK) {
            let end = k.min(start + K_BLOCK);
            let whole = start + (end - start) / line * line;
            let mut sums = [[lanes.splat(0.0); GROUPS]; R];
            let mut add = |g: usize, column: usize, w: L::V| {
                for row in 0..R {
                    // SAFETY: `row < m` and `column < k`.
                    let x = lanes.splat(unsafe { *x.add(row * k + column) });
                    sums[row][g] = lanes.fma(x, w, sums[row][g]);
                }
            };
            for at in (start..whole).step_by(line) {
                for g in 0..GROUPS {
                    // SAFETY: the columns of the line exist; the caller vouches for the dtype.
                    let words = unsafe { groups[g].columns::<L, F>(lanes, at) };
                    for w in 0..LANES {
                        let columns = F::split(lanes, words[w]);
                        for half in 0..F::PER_WORD {
                            add(g, at + F::PER_WORD * w + half, columns[half]);
                        }
                    }
                }
            }
            for g in 0..if whole < end { GROUPS } else { 0 } {
                // SAFETY: columns `whole..end` exist; the caller vouches for the dtype.
                let words = unsafe { groups[g].last_columns::<L, F>(lanes, whole, end - whole) };
                for column in whole..end {
                    let columns = F::split(lanes, words[(column - whole) / F::PER_WORD]);
                    add(g, column, columns[(column - whole) % F::PER_WORD]);
                }
            }
            total = accumulate(lanes, start == 0, total, sums);
        }
        total
    }
}

/// The loop for many rows: a strip of weights is unpacked once for all of them.
impl Product<'_> {
    /// # Safety
    /// The product's operands were checked.
    #[inline(always)]
    unsafe fn many<L: Lanes>(&self, lanes: L, worker: Worker<'_>) {
        let blocks = self.m.div_ceil(ROW_BLOCK);
        let rows = self.m.div_ceil(blocks).next_multiple_of(TILE_ROWS);
        for first in (0..self.m).step_by(rows) {
            let rows = first..self.m.min(first + rows);
            // SAFETY: the rows exist. Between the barriers the packed rows are only read.
            unsafe {
                self.pack(lanes, worker, &rows);
                worker.barrier();
                while let Some(strip) = self.take_strip() {
                    self.multiply(lanes, worker, &strip, &rows);
                }
                worker.barrier();
            }
            if worker.index == 0 {
                // The others look at it after the next barrier.
                self.next.store(0, Relaxed);
            }
        }
    }

    /// Packs this worker's share of `rows` of x, by K-blocks and tiles: `[k][height]` each.
    ///
    /// # Safety
    /// The rows exist, and no worker reads the packed rows.
    #[inline(always)]
    unsafe fn pack<L: Lanes>(&self, lanes: L, worker: Worker<'_>, rows: &Range<usize>) {
        // SAFETY: x has m rows of k elements, and lives as long as the self.
        let x = unsafe { std::slice::from_raw_parts(self.x, self.m * self.k) };
        let x = Matrix::f32(x, self.m, self.k);
        let tiles = rows.len().div_ceil(L::TILE.0);
        for unit in worker.share(tiles * self.k.div_ceil(K_BLOCK)) {
            let (start, tile) = (unit / tiles * K_BLOCK, unit % tiles * L::TILE.0);
            let count = K_BLOCK.min(self.k - start);
            let height = tile_height::<L>(rows.len() - tile);
            let group = RowGroup::new(&x, rows.start + tile);
            // SAFETY: the workspace holds `padded(rows) * k` floats here, and the units are disjoint.
            unsafe {
                group.unpack(lanes, start, count, self.packed::<L>(rows.len(), start, count, tile), height)
            }
        }
    }

    /// Where the tile of packed rows that begins `tile` rows into the block lies.
    #[inline(always)]
    fn packed<L: Lanes>(&self, rows: usize, start: usize, count: usize, tile: usize) -> *mut f32 {
        let last = rows / L::TILE.0 * L::TILE.0;
        let padded = last + tile_height::<L>(rows - last);
        self.workspace.wrapping_add(padded * start + tile * count)
    }

    /// One strip for a block of packed rows.
    ///
    /// # Safety
    /// The rows are packed, and the strip was taken.
    #[inline(always)]
    unsafe fn multiply<L: Lanes>(
        &self,
        lanes: L,
        worker: Worker<'_>,
        strip: &Strip<'_>,
        rows: &Range<usize>,
    ) {
        let room = self.m.min(ROW_BLOCK).next_multiple_of(TILE_ROWS);
        let own = room * self.k + worker.index * (GROUPS * PANEL + room * STRIP);
        let panels = self.workspace.wrapping_add(own);
        let sums = panels.wrapping_add(GROUPS * PANEL);
        for start in (0..self.k).step_by(K_BLOCK) {
            let count = K_BLOCK.min(self.k - start);
            // SAFETY: the columns exist; panels and sums are this worker's part of the workspace, large
            // enough for K_BLOCK columns and a row of sums for each packed row.
            unsafe {
                for g in 0..GROUPS {
                    strip.groups[g].unpack(lanes, start, count, panels.add(g * PANEL), LANES);
                }
                for tile in (0..rows.len()).step_by(L::TILE.0) {
                    let packed = self.packed::<L>(rows.len(), start, count, tile);
                    let sums = sums.add(tile * STRIP);
                    let height = tile_height::<L>(rows.len() - tile);
                    multiply_tile(lanes, height, count, packed, panels, sums, start == 0);
                }
            }
        }
        for row in 0..rows.len() {
            // SAFETY: every row of the block has its sums by now.
            unsafe {
                let found = std::array::from_fn(|g| lanes.load(sums.add(row * STRIP + g * LANES)));
                self.finish(lanes, strip, rows.start + row, found);
            }
        }
    }
}

/// The height of the next tile when so many rows are left: full, or rounded up to a third.
#[inline(always)]
fn tile_height<L: Lanes>(rows: usize) -> usize {
    rows.next_multiple_of(L::TILE.0 / 3).min(L::TILE.0)
}

/// Adds `packed[count][height]` times two panels `[count][16]` to `sums[height][32]`, or, for the first
/// K-block, begins them.
///
/// # Safety
/// The operands have those extents, and `height` is one of [`tile_height`]'s.
#[inline(always)]
unsafe fn multiply_tile<L: Lanes>(
    lanes: L,
    height: usize,
    count: usize,
    packed: *const f32,
    panels: *const f32,
    sums: *mut f32,
    first: bool,
) {
    // SAFETY: the caller's obligations; each tile is `height` rows by one or two groups.
    unsafe {
        if L::TILE == (12, 2) {
            match height {
                12 => tile::<L, 12, 2>(lanes, count, packed, panels, sums, first),
                8 => tile::<L, 8, 2>(lanes, count, packed, panels, sums, first),
                _ => tile::<L, 4, 2>(lanes, count, packed, panels, sums, first),
            }
        } else {
            for g in 0..GROUPS {
                let (panel, sums) = (panels.add(g * PANEL), sums.add(g * LANES));
                match height {
                    6 => tile::<L, 6, 1>(lanes, count, packed, panel, sums, first),
                    4 => tile::<L, 4, 1>(lanes, count, packed, panel, sums, first),
                    _ => tile::<L, 2, 1>(lanes, count, packed, panel, sums, first),
                }
            }
        }
    }
}

/// The register tile: `R` rows by `G` groups of sums.
///
/// # Safety
/// As [`multiply_tile`], with `R` rows and `G` groups.
#[inline(always)]
unsafe fn tile<L: Lanes, const R: usize, const G: usize>(
    lanes: L,
    count: usize,
    packed: *const f32,
    panels: *const f32,
    sums: *mut f32,
    first: bool,
) {
    let mut tile = [[lanes.splat(0.0); G]; R];
    for k in 0..count {
        // SAFETY: `k < count`; the caller vouches for the extents.
        unsafe {
            let w: [L::V; G] = std::array::from_fn(|g| lanes.load(panels.add(g * PANEL + k * LANES)));
            lanes.prefetch(packed.wrapping_add((k + PACKED_AHEAD) * R).cast());
            for row in 0..R {
                let x = lanes.splat(*packed.add(k * R + row));
                for g in 0..G {
                    tile[row][g] = lanes.fma(x, w[g], tile[row][g]);
                }
            }
        }
    }
    for row in 0..R {
        for g in 0..G {
            // SAFETY: `sums` has a row of 32 for each of the `R` rows.
            unsafe {
                let at = sums.add(row * STRIP + g * LANES);
                let sum = if first { tile[row][g] } else { lanes.add(lanes.load(at), tile[row][g]) };
                lanes.store(at, sum);
            }
        }
    }
}

/// `total + sums`, or `sums` for the first K-block.
#[inline(always)]
fn accumulate<L: Lanes, const R: usize>(
    lanes: L,
    first: bool,
    total: [[L::V; GROUPS]; R],
    sums: [[L::V; GROUPS]; R],
) -> [[L::V; GROUPS]; R] {
    if first {
        return sums;
    }
    let mut total = total;
    for row in 0..R {
        for g in 0..GROUPS {
            total[row][g] = lanes.add(total[row][g], sums[row][g]);
        }
    }
    total
}
