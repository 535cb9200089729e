//! The projector: linear layers with an exact-erf GELU between them turn patch features into token
//! embeddings. LLaVA-1.5 has two layers, the first LLaVA one; none at all is the identity.

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
    let (rows, bias) = (config.hidden_size, config.bias);
    let mut x = features;
    for (layer, cols) in (1..).zip(config.inputs()) {
        let name = format!("linear_{layer}");
        let act = if layer == config.layers { Activation::None } else { Activation::GeluErf };
        let parts = [(format!("projector.{name}"), rows, cols)];
        x = linear(b, weights, &name, Op::linear(act, bias, false), &[x], &parts)?;
    }
    Ok(x)
}
