//! Low-rank pairs: what adapters add to a weight, y += scale · (x Aᵀ) Bᵀ.
//!
//! Here is the first half, one small product for all pairs of an op. The second half is no product of its
//! own: a pair's rank is so many more columns of K, in which u = scale · (x Aᵀ) stands for x and B for W.

use super::super::machine::Machine;
use super::super::panel::Matrix;
use super::{ALIGNMENT, Layer, Product, STRIP};
use crate::op::MAX_PAIRS;

/// A low-rank pair beside a weight `[n, k]`.
#[derive(Clone, Copy, Debug)]
pub struct LowRank<'a> {
    /// `[r, k]`.
    pub a: Matrix<'a>,
    /// `[n, r]`.
    pub b: Matrix<'a>,
    /// What x Aᵀ is multiplied by.
    pub scale: f32,
}

impl LowRank<'_> {
    /// r.
    pub fn rank(&self) -> usize {
        self.a.rows
    }
}

/// u of all pairs of `layers` side by side `[m, Σr]`, at the head of the workspace, and what is left of it.
///
/// # Panics
/// If shapes or the workspace do not fit, or there are more than [`MAX_PAIRS`].
pub(super) fn project<'w>(
    machine: &Machine,
    x: &[f32],
    layers: &[Layer<'_>],
    workspace: &'w mut [u8],
) -> (&'w [f32], &'w mut [u8]) {
    let Some(first) = layers.iter().flat_map(|layer| layer.pairs).next() else { return (&[], workspace) };
    let mut firsts = [Layer::new(first.a, None); MAX_PAIRS];
    let mut scales = [first.scale; MAX_PAIRS];
    let (mut count, mut rank) = (0, 0);
    for layer in layers {
        for pair in layer.pairs {
            assert_eq!((pair.b.rows, pair.b.cols), (layer.weight.rows, pair.rank()), "linear: B of a pair");
            pair.b.assert_valid();
            firsts[count] = Layer::new(pair.a, None);
            scales[count] = pair.scale;
            (count, rank) = (count + 1, rank + pair.rank());
        }
    }
    let m = x.len() / first.a.cols;
    let skip = workspace.as_ptr().align_offset(ALIGNMENT);
    let (inner, rest) = workspace[skip..].split_at_mut(m * rank * size_of::<f32>());
    let inner = bytemuck::cast_slice_mut(inner);
    let mut product = Product::new(x, &[], &firsts[..count], rank, inner, rest, machine);
    product.scales = &scales[..count];
    product.strips = firsts[..count].iter().map(|layer| layer.weight.rows.div_ceil(STRIP)).sum();
    product.compute(machine);
    (inner, rest)
}
