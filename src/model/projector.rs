//! The projector: two linear layers with an exact-erf GELU between them turn patch features into
//! token embeddings.

use super::config::ProjectorConfig;
use super::weights::Weights;
use crate::error::Result;
use crate::graph::{GraphBuilder, ValueId};
use crate::op::{Activation, Op};

/// Builds the projector over `features` `[rows, in]`; the result is `[rows, text hidden size]`.
///
/// # Errors
/// A tensor that is missing or has the wrong shape.
pub fn projector(
    b: &mut GraphBuilder<'_>,
    config: &ProjectorConfig,
    weights: &Weights,
    features: ValueId,
) -> Result<ValueId> {
    b.scope("projector.");
    let bias = config.bias;
    let layer = |name: &str, rows, cols| {
        let mut operands = vec![weights.matrix(&format!("projector.{name}.weight"), rows, cols)?];
        if bias {
            operands.push(weights.vector(&format!("projector.{name}.bias"), rows)?);
        }
        Ok::<_, crate::Error>(operands)
    };
    let first = layer("linear_1", config.hidden_size, config.input_size)?;
    let second = layer("linear_2", config.hidden_size, config.hidden_size)?;
    let linear = |act| Op::Linear { act, bias, residual: false, wide: false };
    let h = b.push("linear_1", linear(Activation::GeluErf), &[features], &first)?;
    b.push("linear_2", linear(Activation::None), &[h], &second)
}
