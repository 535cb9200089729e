//! Matrix products with weights as stored: y = x Wᵀ, one weight or several side by side, with low-rank
//! pairs, bias, activation and residual; and the gated pair of a LLaMA feed-forward layer.
//!
//! **Reduction order.** For output (row, n), K is cut into blocks of [`K_BLOCK`]. In a block there are
//! sixteen partial sums: number l starts at 0 and takes `x[k] * w[n][k]` by fused multiply-add for k = l,
//! l + 16, l + 32 and so on (past the end of K both are 0). The sum starts with partial 0 of block 0, and
//! partials are added to it in order, block by block.
//!
//! A low-rank pair is more of the same sum: u = scale · (x Aᵀ), where x Aᵀ is such a product by itself and
//! is rounded once more by the scale, and the blocks of u Bᵀ follow those of x Wᵀ, pair after pair.
//! Then come bias, activation, residual. That is all: it names no row count, thread or instruction set, so
//! a row's result has the same bits alone, among 640 others, and on every path.
//!
//! **Two loops** compute it. Up to `FEW_ROWS` activation rows, `few` uses weights as they are read, sixteen
//! columns at a time, one to each partial sum: one row goes at the speed of memory, eight and more at that of
//! the multipliers. With more rows, `many` unpacks a strip of 32 outputs by one K-block to f32 for all of
//! them, and a register tile takes one partial sum at a time.
//!
//! Strips are handed to threads by a counter, whoever is free first.

mod few;
mod many;
mod pairs;

pub use pairs::LowRank;

use super::lanes::{LANES, Lanes, Math};
use super::machine::{Machine, Task};
use super::panel::{Matrix, RowGroup};
use super::pool::Worker;
use crate::op::Activation;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// Columns of x and W whose sixteen partial sums are brought together. Part of the reduction order.
pub const K_BLOCK: usize = 2048;
/// Up to so many activation rows the weights are used as they are read. There `few` runs at 75 % of the
/// multiply-add ceiling (two cores, Zen 4, f16), and `many` at 63; with 64 rows both reach 80.
const FEW_ROWS: usize = 32;
/// Activation rows that are packed, and whose sums a thread keeps, at a time.
const ROW_BLOCK: usize = 768;
/// The height of every tile, in either loop, divides this.
const TILE_ROWS: usize = 24;
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

/// One weight of a product, `[n, k]`, and what goes with it.
#[derive(Clone, Copy, Debug)]
pub struct Layer<'a> {
    /// The weight.
    pub weight: Matrix<'a>,
    /// The bias, one row of n elements.
    pub bias: Option<Matrix<'a>>,
    /// What adapters add to the weight.
    pub pairs: &'a [LowRank<'a>],
}

impl<'a> Layer<'a> {
    /// A weight and its bias, without pairs.
    pub fn new(weight: Matrix<'a>, bias: Option<Matrix<'a>>) -> Self {
        Layer { weight, bias, pairs: &[] }
    }
}

/// Bytes of workspace that [`linear`] and [`gated_linear`] need for up to `m` rows of `k` inputs, with
/// pairs of these ranks.
pub fn linear_workspace(
    m: usize,
    k: usize,
    ranks: impl Iterator<Item = usize> + Clone,
    threads: usize,
) -> usize {
    // The pairs' inner rows may begin on a cache line of their own.
    (m * ranks.clone().sum::<usize>()) * size_of::<f32>()
        + ALIGNMENT
        + product_workspace(m, k, ranks, threads)
}

/// The same without the pairs' inner rows.
fn product_workspace(m: usize, k: usize, ranks: impl Iterator<Item = usize>, threads: usize) -> usize {
    let rows = m.min(ROW_BLOCK).next_multiple_of(TILE_ROWS);
    let packed = std::iter::once(k).chain(ranks).map(|cols| rows * cols.next_multiple_of(LANES));
    let floats = packed.sum::<usize>() + threads * (GROUPS * PANEL + rows * STRIP);
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
    let (inner, workspace) = pairs::project(machine, x, layers, workspace);
    let mut product = Product::new(x, inner, layers, n, out, workspace, machine);
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
    let (inner, workspace) = pairs::project(machine, x, &layers, workspace);
    let mut product = Product::new(x, inner, &layers, n, out, workspace, machine);
    product.gated = true;
    product.strips = n.div_ceil(LANES);
    product.compute(machine);
}

/// The checked operands of a product, and how many strips it is cut into.
struct Product<'a> {
    layers: &'a [Layer<'a>],
    gated: bool,
    activation: Activation,
    x: Operand,
    /// u of every pair side by side `[m, Σr]`: what their B are multiplied by.
    inner: Operand,
    /// What the sums of each layer are multiplied by; none are if there are no numbers.
    scales: &'a [f32],
    /// As `out`, or null.
    residual: *const f32,
    out: *mut f32,
    workspace: *mut f32,
    m: usize,
    n: usize,
    strips: usize,
    /// The next strip that nobody has taken.
    next: AtomicUsize,
}

// SAFETY: the pointers come from slices borrowed for the whole computation. Workers write disjoint
// columns of `out` and read of `residual` only what they write themselves; they use disjoint parts of
// the workspace, or are kept apart by a barrier.
unsafe impl Sync for Product<'_> {}

/// Rows of activations `[m, cols]` that lie `stride` floats apart.
#[derive(Clone, Copy)]
struct Operand {
    at: *const f32,
    stride: usize,
    cols: usize,
}

impl Operand {
    fn new(values: &[f32], cols: usize) -> Self {
        Operand { at: values.as_ptr(), stride: cols, cols }
    }

    /// Columns `start..start + cols` of each row.
    #[inline(always)]
    fn columns(&self, start: usize, cols: usize) -> Operand {
        Operand { at: self.at.wrapping_add(start), stride: self.stride, cols }
    }

    /// The address of column `col` of a row.
    #[inline(always)]
    fn row(&self, row: usize, col: usize) -> *const f32 {
        self.at.wrapping_add(row * self.stride + col)
    }
}

/// Thirty-two outputs: two groups of sixteen rows of W. In a gated product they are a gate and its up.
struct Strip<'a> {
    groups: [RowGroup; GROUPS],
    layers: [&'a Layer<'a>; GROUPS],
    /// Which layers they are.
    indices: [usize; GROUPS],
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
        inner: &'a [f32],
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
        let ranks = || layers.iter().flat_map(|layer| layer.pairs).map(LowRank::rank);
        let rank = ranks().sum();
        assert_eq!(inner.len(), m * rank, "linear: what pairs are multiplied by");
        let needed = product_workspace(m, k, ranks(), machine.threads());
        assert!(m == 1 || workspace.len() >= needed, "linear: workspace");
        let skip = workspace.as_ptr().align_offset(ALIGNMENT);
        Product {
            layers,
            gated: false,
            activation: Activation::None,
            x: Operand::new(x, k),
            inner: Operand::new(inner, rank),
            scales: &[],
            residual: std::ptr::null(),
            out: out.as_mut_ptr(),
            workspace: workspace.as_mut_ptr().wrapping_add(skip).cast(),
            m,
            n,
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
        let strip = |indices: [usize; 2], rows: [usize; 2], columns, widths| {
            let layers = indices.map(|index| &self.layers[index]);
            let groups =
                [RowGroup::new(&layers[0].weight, rows[0]), RowGroup::new(&layers[1].weight, rows[1])];
            Strip { groups, layers, indices, rows, columns, widths }
        };
        if self.gated {
            let row = index * LANES;
            return strip([0, 1], [row; 2], [row; 2], [LANES.min(self.n - row); 2]);
        }
        let (mut index, mut column) = (index, 0);
        let mut layers = self.layers.iter().enumerate();
        loop {
            let (layer, of) = layers.next().expect("strips were counted over the same layers");
            let n = of.weight.rows;
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

    /// What rows are multiplied by W or B, in the order of the sum: x, then u of each pair, with the pair and
    /// the number of its layer.
    #[inline(always)]
    fn operands(&self) -> impl Iterator<Item = (Operand, Option<(usize, &'a LowRank<'a>)>)> {
        let layers = self.layers.iter().enumerate();
        let pairs = layers.flat_map(|(layer, of)| of.pairs.iter().map(move |pair| (layer, pair)));
        let mut start = 0;
        let inner = pairs.map(move |(layer, pair)| {
            let columns = self.inner.columns(start, pair.rank());
            start += pair.rank();
            (columns, Some((layer, pair)))
        });
        std::iter::once((self.x, None)).chain(inner)
    }

    /// Strips nobody has taken, one after another.
    #[inline(always)]
    fn take_strip(&self) -> Option<(usize, Strip<'a>)> {
        let index = self.next.fetch_add(1, Relaxed);
        (index < self.strips).then(|| (index, self.strip(index)))
    }

    /// Scale, bias, activation, residual; then the results are written.
    ///
    /// # Safety
    /// `row < m`, and the strip is this worker's.
    #[inline(always)]
    unsafe fn finish<L: Lanes>(&self, lanes: L, strip: &Strip<'_>, row: usize, sums: [L::V; GROUPS]) {
        let mut sums = sums;
        for g in 0..GROUPS {
            if let Some(&scale) = self.scales.get(strip.indices[g]) {
                sums[g] = lanes.mul(sums[g], lanes.splat(scale));
            }
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
            // As many sums as the register file holds: rows of x times rows of W. Tried for 4 to 32 rows of x on two
            // cores of a Zen 1 (AVX2, f16): two by two takes 1.3 times as long as four by one, which widens the fewest
            // weights for a multiply-add; six by one 1.2 to 1.4; four by one that asks for nothing ahead 1.1 to 1.6.
            match (self.m, L::TILE == (12, 2)) {
                (1, true) => self.few::<L, 1, 8>(lanes, worker),
                (1, false) => self.few::<L, 1, 4>(lanes, worker),
                (2, true) => self.few::<L, 2, 8>(lanes, worker),
                (2, false) => self.few::<L, 2, 2>(lanes, worker),
                (3..=4, true) => self.few::<L, 4, 4>(lanes, worker),
                (5..=FEW_ROWS, true) => self.few::<L, 8, 2>(lanes, worker),
                (3..=FEW_ROWS, false) => self.few::<L, 4, 1>(lanes, worker),
                _ => self.many(lanes, worker),
            }
        }
    }
}
