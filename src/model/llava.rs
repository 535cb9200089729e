//! LLaVA: the tower and the projector as one graph that turns pixels into rows of the language model's
//! input, and the language model beside it.

use super::clip::{Tower, tower};
use super::config::{ModelConfig, SelectStrategy};
use super::llama::{self, Llama};
use super::projector::projector;
use super::weights::Weights;
use crate::backend::Backend;
use crate::error::Result;
use crate::graph::{Graph, GraphBuilder, ValueId};
use crate::op::{Op, Select};
use std::sync::Arc;

/// Pixels to embedding rows.
#[derive(Clone, Debug)]
pub struct Vision {
    /// Tower, selection, projector.
    pub graph: Arc<Graph>,
    /// Normalised pixels `[images, 3*S*S]`.
    pub pixels: ValueId,
    /// The selected hidden states `[images*(N+1), D*k]`, class rows included.
    pub hidden: ValueId,
    /// Rows that take the place of token embeddings `[images*rows, text hidden size]`.
    pub features: ValueId,
    /// The node at which the tower ends and the projector begins.
    pub projector: usize,
}

/// Token ids to the next token.
#[derive(Clone, Debug)]
pub struct Language {
    /// Embedding, layers, head, sampling.
    pub graph: Arc<Graph>,
    /// Its inputs and results.
    pub ends: Llama,
}

/// Builds the vision graph, or `None` for a text model.
///
/// # Errors
/// A tensor that is missing or has the wrong shape.
pub fn vision(backend: &dyn Backend, config: &ModelConfig, weights: &Weights) -> Result<Option<Vision>> {
    let (Some(vision), Some(projection)) = (&config.vision, &config.projector) else { return Ok(None) };
    let mut b = GraphBuilder::new(backend);
    let Tower { pixels, hidden } = tower(&mut b, vision, &config.feature_layers, weights)?;
    b.keep(hidden);
    let selected = match config.select {
        SelectStrategy::Full => hidden,
        SelectStrategy::Default => {
            let select = Select::Patches { rows: vision.num_rows() };
            b.push("select_patches", Op::SelectRows { select }, &[hidden], &[])?
        }
    };
    let first = b.len();
    let features = projector(&mut b, projection, weights, selected)?;
    b.keep(features);
    Ok(Some(Vision { graph: Arc::new(b.finish()), pixels, hidden, features, projector: first }))
}

/// Builds the language graph.
///
/// # Errors
/// A tensor that is missing or has the wrong shape.
pub fn language(backend: &dyn Backend, config: &ModelConfig, weights: &Weights) -> Result<Language> {
    let mut b = GraphBuilder::new(backend);
    let ends = llama::build(&mut b, &config.text, weights)?;
    Ok(Language { graph: Arc::new(b.finish()), ends })
}
