//! Linear layers as nodes: matrices by name, their biases, and what adapters add to them.

use super::weights::Weights;
use crate::error::Result;
use crate::graph::{GraphBuilder, ValueId};
use crate::op::{Activation, Op, Pair};
use crate::tensor::Weight;

/// A matrix `[rows, cols]` by its canonical name without `.weight`.
pub type Part = (String, usize, usize);

/// Adds an [`Op::Linear`] over `parts` side by side. A second value of `ins` is the residual.
///
/// # Errors
/// A tensor that is missing or has the wrong shape.
pub fn linear(
    b: &mut GraphBuilder<'_>,
    weights: &Weights,
    node: &str,
    ins: &[ValueId],
    parts: &[Part],
    bias: bool,
    act: Activation,
) -> Result<ValueId> {
    let (operands, pairs) = operands(weights, parts, bias)?;
    b.push(node, Op::Linear { act, bias, residual: ins.len() == 2, pairs }, ins, &operands)
}

/// Adds an [`Op::GatedLinear`] of gate and up.
///
/// # Errors
/// As for [`linear`].
pub fn gated_linear(
    b: &mut GraphBuilder<'_>,
    weights: &Weights,
    node: &str,
    x: ValueId,
    parts: [Part; 2],
    bias: bool,
) -> Result<ValueId> {
    let (operands, pairs) = operands(weights, &parts, bias)?;
    b.push(node, Op::GatedLinear { bias, pairs }, &[x], &operands)
}

/// The weights of a linear op in its order: matrices, biases, A and B of each pair.
fn operands(weights: &Weights, parts: &[Part], bias: bool) -> Result<(Vec<Weight>, Vec<Pair>)> {
    let mut operands = Vec::new();
    for (name, rows, cols) in parts {
        operands.push(weights.matrix(&format!("{name}.weight"), *rows, *cols)?);
    }
    for (name, rows, _) in parts.iter().filter(|_| bias) {
        operands.push(weights.vector(&format!("{name}.bias"), *rows)?);
    }
    let mut pairs = Vec::new();
    for (matrix, (name, ..)) in parts.iter().enumerate() {
        for low_rank in weights.pairs(&format!("{name}.weight")) {
            pairs.push(Pair { matrix, scale: low_rank.scale });
            operands.extend([low_rank.a.clone(), low_rank.b.clone()]);
        }
    }
    Ok((operands, pairs))
}
