//! The projector: two linear layers with an exact-erf GELU between them turn patch features into
//! token embeddings.

use super::config::ProjectorConfig;
use super::linear::linear;
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
    let ProjectorConfig { input_size, hidden_size, bias } = *config;
    let first = [("projector.linear_1".into(), hidden_size, input_size)];
    let second = [("projector.linear_2".into(), hidden_size, hidden_size)];
    let h =
        linear(b, weights, "linear_1", Op::linear(Activation::GeluErf, bias, false), &[features], &first)?;
    linear(b, weights, "linear_2", Op::linear(Activation::None, bias, false), &[h], &second)
}
