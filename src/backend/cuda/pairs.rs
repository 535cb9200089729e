//! Low-rank pairs: what adapters add to a weight, y += scale · (x Aᵀ) Bᵀ.
//!
//! They need no kernels of their own. One small product makes u = x Aᵀ of all pairs of an op; behind x it is so many
//! more columns of K, for which W has those of scale · B (`weights.rs`). So [x | u] passes once through the
//! kernels of the op, in their reduction order, with bias and activation where they always are; u is rounded to
//! 16 bits, as activations are.

use super::device::Device;
use super::{Rows, embed, linear as prefill, matvec};
use crate::backend::Call;
use crate::error::Result;
use crate::op::{Activation, Op, Select, WeightType};
use crate::tensor::View;
use std::ops::Range;

/// What the sum of all ranks is rounded up to, with zeros, so that rows of [x | u] are aligned if those of x are.
pub const PAD: usize = 8;

/// Alignment of what lies in the workspace.
const ALIGN: usize = 256;

/// Where the workspace of an op with pairs has what; offsets are bytes.
struct Layout {
    /// Columns of u.
    rank: usize,
    /// Before it stand partial sums, first those of u, then those of the product.
    u: usize,
    xu: usize,
    bytes: usize,
}

impl Layout {
    /// For `rows` rows of x `[rows, depth]`, `cols` columns of all matrices, and A and B of each pair.
    fn new(rows: usize, cols: usize, depth: usize, pairs: impl Iterator<Item = WeightType>) -> Self {
        const SIZE: usize = 2;
        let rank = pairs.step_by(2).map(|a| a.rows).sum::<usize>().next_multiple_of(PAD);
        let partials =
            prefill::workspace(rows, rank, depth).max(prefill::workspace(rows, cols, depth + rank));
        let u = partials.next_multiple_of(ALIGN);
        let xu = u + (rows * rank * SIZE).next_multiple_of(ALIGN);
        Layout { rank, u, xu, bytes: xu + rows * (depth + rank) * SIZE }
    }
}

/// Bytes of scratch memory that a linear op needs for `rows` rows of x.
pub fn workspace(op: &Op, rows: usize, weights: &[WeightType]) -> usize {
    let (Op::Linear { bias, pairs, .. } | Op::GatedLinear { bias, pairs }) = op else {
        unreachable!("a linear op")
    };
    let (matrices, own) = Op::matrices(weights.len(), *bias, pairs);
    let (cols, depth) = (weights[..matrices].iter().map(|w| w.rows).sum(), weights[0].cols);
    match pairs.is_empty() {
        true => prefill::workspace(rows, cols, depth),
        false => Layout::new(rows, cols, depth, weights[own..].iter().copied()).bytes,
    }
}

/// Some rows of a linear op by the kernels of a phase: `plain` is its Linear, `product` the op's launch function.
///
/// # Errors
/// What the launch functions say.
///
/// # Safety
/// As for them.
pub unsafe fn linear(
    device: &Device,
    call: &Call<'_>,
    rows: Range<usize>,
    plain: Rows,
    product: Rows,
) -> Result<()> {
    let (Op::Linear { bias, pairs, .. } | Op::GatedLinear { bias, pairs }) = call.op else {
        unreachable!("a linear op")
    };
    if pairs.is_empty() {
        // SAFETY: the caller's obligation.
        return unsafe { product(device, call, rows) };
    }
    let x = call.ins[0];
    let (matrices, own) = Op::matrices(call.weights.len(), *bias, pairs);
    let cols = call.weights[..matrices].iter().map(|w| w.ty.rows).sum();
    let layout = Layout::new(x.rows, cols, x.cols, call.weights[own..].iter().map(|w| w.ty));
    let u = View { addr: call.workspace + layout.u, cols: layout.rank, ..x };
    let xu = View { addr: call.workspace + layout.xu, cols: x.cols + layout.rank, ..x };

    let first = Op::linear(Activation::None, false, false);
    // A of all pairs lie end to end, from where that of the first is.
    let first = Call { op: &first, ins: &[x], weights: &call.weights[own..own + 1], outs: &[u], ..*call };
    let beside = Op::SelectRows { select: Select::All };
    let [x, u, some] = [x, u, xu].map(|view| matvec::part(&view, &rows));
    let beside = Call { op: &beside, ins: &[x, u], weights: &[], outs: &[some], ..*call };
    let ins = [xu, *call.ins.last().expect("x, and perhaps a residual")];
    let last = Call { ins: &ins[..call.ins.len()], weights: &call.weights[..own], ..*call };
    // SAFETY: the caller's obligation; u and [x | u] are in the workspace, apart from each other and from the partial
    // sums of both products, which `workspace` made room for.
    unsafe {
        plain(device, &first, rows.clone())?;
        embed::select_rows(device, &beside)?;
        product(device, &last, rows)
    }
}
