//! Linear layers as nodes: matrices by name, their biases, and what adapters add to them.

use super::weights::Weights;
use crate::error::Result;
use crate::graph::{GraphBuilder, ValueId};
use crate::op::{Op, Pair};

/// A matrix `[rows, cols]` by its canonical name without `.weight`.
pub type Part = (String, usize, usize);

/// Adds `op`, a [`Op::Linear`] or [`Op::GatedLinear`] without pairs, over `parts` side by side, and the pairs
/// that adapters have for them.
///
/// # Errors
/// A tensor that is missing or has the wrong shape.
///
/// # Panics
/// If `op` is no linear one.
pub fn linear(
    b: &mut GraphBuilder<'_>,
    weights: &Weights,
    node: &str,
    mut op: Op,
    ins: &[ValueId],
    parts: &[Part],
) -> Result<ValueId> {
    let (Op::Linear { bias, pairs, .. } | Op::GatedLinear { bias, pairs }) = &mut op else {
        panic!("{} has no matrices side by side", op.name());
    };
    let mut operands = Vec::new();
    for (name, rows, cols) in parts {
        operands.push(weights.matrix(&format!("{name}.weight"), *rows, *cols)?);
    }
    for (name, rows, _) in parts.iter().filter(|_| *bias) {
        operands.push(weights.vector(&format!("{name}.bias"), *rows)?);
    }
    for (matrix, (name, ..)) in parts.iter().enumerate() {
        for low_rank in weights.pairs(&format!("{name}.weight")) {
            pairs.push(Pair { matrix, scale: low_rank.scale });
            operands.extend([low_rank.a.clone(), low_rank.b.clone()]);
        }
    }
    b.push(node, op, ins, &operands)
}
