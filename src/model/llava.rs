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
use crate::input::image::Tiling;
use crate::op::{Op, Select};
use crate::tensor::{Rows, TensorType};
use std::sync::Arc;

/// Pixels to embedding rows.
#[derive(Clone, Debug)]
pub struct Vision {
    /// Tower, selection, projector.
    pub graph: Arc<Graph>,
    /// Normalised pixels `[images, 3*S*S]`, each image a square: a picture, or a tile of one.
    pub pixels: ValueId,
    /// The selected hidden states `[images*(N+1), D*k]`, class rows included.
    pub hidden: ValueId,
    /// Projected rows `[images*rows, H]`, H the language model's width. Without tiles they are what takes
    /// the place of token embeddings.
    pub features: ValueId,
    /// The node at which the tower ends and the projector begins.
    pub projector: usize,
    /// How rows of tiles become rows of a picture, in a model that sees tiles.
    pub assembly: Option<Assembly>,
}

/// The graph's last node, which runs once for a picture when all its squares are projected: it gathers
/// the picture's rows from theirs. Tower and projector may have taken several runs to get there, so the
/// projected rows wait in memory that outlives a run.
#[derive(Clone, Debug)]
pub struct Assembly {
    /// The node.
    pub node: usize,
    /// Projected rows of all squares of a picture `[squares*rows, H]`, a state.
    pub squares: ValueId,
    /// Which row of `squares` each row is, or [`NEWLINE`](crate::input::image::NEWLINE): `[T, 1] i32`.
    pub sources: ValueId,
    /// Rows of the newline's table, all 0 `[T, 1] i32`, if there is a newline.
    pub ids: Option<ValueId>,
    /// The picture's rows, which take the place of token embeddings `[T, H]`.
    pub rows: ValueId,
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
    let assembly =
        config.tiling.as_ref().map(|tiling| assembly(&mut b, config, tiling, weights)).transpose()?;
    let graph = Arc::new(b.finish());
    Ok(Some(Vision { graph, pixels, hidden, features, projector: first, assembly }))
}

fn assembly(
    b: &mut GraphBuilder<'_>,
    config: &ModelConfig,
    tiling: &Tiling,
    weights: &Weights,
) -> Result<Assembly> {
    b.scope("");
    let width = config.text.hidden_size;
    let rows = Rows::Fixed(tiling.max_squares() * config.square_rows());
    let squares = b.state("squares".into(), b.float(rows, width));
    let index = TensorType::i32(Rows::Tokens, 1);
    let sources = b.input("sources", index);
    let (node, name) = (b.len(), "assemble_tiles");
    let (ids, rows) = if tiling.has_newline() {
        let ids = b.input("newline_ids", index);
        let newline = [weights.vector("image_newline", width)?];
        (Some(ids), b.push(name, Op::EmbedRows, &[ids, sources, squares], &newline)?)
    } else {
        let op = Op::SelectRows { select: Select::Index };
        (None, b.push(name, op, &[squares, sources], &[])?)
    };
    b.keep(rows);
    Ok(Assembly { node, squares, sources, ids, rows })
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
