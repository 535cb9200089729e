//! CLIP's towers as graphs: the vision tower that LLaVA looks through, and for CLIP by itself what comes
//! after it, and the text tower beside it.
//!
//! LLaVA reads a hidden state from before the end (usually -2), so only the blocks that lead there are
//! built: 23 of 24 for LLaVA-1.5, and `post_layernorm` never.

use super::config::{ClipTextConfig, VisionConfig};
use super::linear::linear;
use super::weights::Weights;
use crate::error::Result;
use crate::graph::{GraphBuilder, ValueId};
use crate::op::{Activation, Op, Select};
use crate::tensor::{Rows, TensorType, Weight};

/// The ends of the vision tower.
pub struct Tower {
    /// Normalised pixels `[images, 3*S*S]`, channels first.
    pub pixels: ValueId,
    /// The selected hidden states `[images*(N+1), D*k]`, class rows included.
    pub hidden: ValueId,
}

/// Builds the vision tower up to the hidden states named by `layers`: 0 is the output of `pre_layrnorm`, i
/// the output of block i. Several are put side by side in the order given.
///
/// # Errors
/// A tensor that is missing or has the wrong shape.
pub fn tower(
    b: &mut GraphBuilder<'_>,
    config: &VisionConfig,
    layers: &[usize],
    weights: &Weights,
) -> Result<Tower> {
    let VisionConfig { hidden_size: width, image_size: image, patch_size: patch, .. } = *config;
    let rows = config.num_rows();

    let pixels = b.input("pixels", TensorType::f32(Rows::PerImage(1), 3 * image * image));
    b.scope("vision.");
    let embeddings = [
        weights.tensor("vision.embeddings.patch_embedding.weight", &[width, 3, patch, patch])?,
        weights.vector("vision.embeddings.class_embedding", width)?,
        weights.matrix("vision.embeddings.position_embedding.weight", rows, width)?,
    ];
    let x = b.push("embeddings", Op::PatchEmbed { image, patch }, &[pixels], &embeddings)?;
    let blocks = Blocks {
        tower: "vision",
        width,
        inner: config.intermediate_size,
        heads: config.num_heads,
        rows,
        causal: false,
        activation: config.activation,
        eps: config.layer_norm_eps,
    };
    let mut x = blocks.norm(b, weights, "pre_norm", "vision.pre_layrnorm", x)?;

    let mut states = vec![x];
    for layer in 0..layers.iter().copied().max().unwrap_or(0) {
        x = blocks.push(b, weights, layer, x)?;
        states.push(x);
    }
    b.scope("vision.");
    let selected: Vec<_> = layers.iter().map(|&layer| states[layer]).collect();
    let hidden = match selected[..] {
        [one] => one,
        _ => b.push("select_layers", Op::SelectRows { select: Select::All }, &selected, &[])?,
    };
    Ok(Tower { pixels, hidden })
}

/// The ends of a tower of CLIP by itself.
#[derive(Clone, Copy, Debug)]
pub struct Encoder {
    /// Normalised pixels `[images, 3*S*S]`, or token ids `[texts*P, 1]`.
    pub input: ValueId,
    /// The row that stands for each picture or text `[n, 1]`: its class row, or the end of the text.
    pub pooled: ValueId,
    /// In the space that both towers share `[n, projection]`.
    pub projected: ValueId,
    /// The same, of length 1.
    pub unit: ValueId,
}

/// Builds the vision tower, all of it, and the projection of its class row.
///
/// # Errors
/// A tensor that is missing or has the wrong shape.
pub fn image_encoder(
    b: &mut GraphBuilder<'_>,
    config: &VisionConfig,
    projection: usize,
    weights: &Weights,
) -> Result<Encoder> {
    let Tower { pixels, hidden } = tower(b, config, &[config.num_layers], weights)?;
    let (width, eps) = (config.hidden_size, config.layer_norm_eps);
    project(
        b,
        weights,
        pixels,
        hidden,
        ("vision.post_layernorm", width, eps),
        ("visual_projection", projection),
    )
}

/// Builds the text tower for texts of `rows` rows, at most the positions there are, and the projection of the
/// row that ends a text. What stands behind that row is not looked at.
///
/// # Errors
/// A tensor that is missing or has the wrong shape.
pub fn text_encoder(
    b: &mut GraphBuilder<'_>,
    config: &ClipTextConfig,
    projection: usize,
    rows: usize,
    weights: &Weights,
) -> Result<Encoder> {
    let (width, eps) = (config.hidden_size, config.layer_norm_eps);
    let ids = b.input("ids", TensorType::i32(Rows::PerImage(rows), 1));
    b.scope("text.");
    let positions = "text.embeddings.position_embedding.weight";
    let positions = weights.matrix(positions, config.max_positions, width)?;
    let embeddings = [
        weights.matrix("text.embeddings.token_embedding.weight", config.vocab_size, width)?,
        Weight { rows, ..positions },
    ];
    let mut x = b.push("embeddings", Op::EmbedTokens, &[ids], &embeddings)?;
    let blocks = Blocks {
        tower: "text",
        width,
        inner: config.intermediate_size,
        heads: config.num_heads,
        rows,
        causal: true,
        activation: config.activation,
        eps,
    };
    for layer in 0..config.num_layers {
        x = blocks.push(b, weights, layer, x)?;
    }
    b.scope("text.");
    project(b, weights, ids, x, ("text.final_layer_norm", width, eps), ("text_projection", projection))
}

/// From hidden states to vectors of the shared space: pick a row, norm, project without a bias, normalise.
/// A norm knows one row at a time, so the other rows need none.
fn project(
    b: &mut GraphBuilder<'_>,
    weights: &Weights,
    input: ValueId,
    hidden: ValueId,
    (norm, width, eps): (&str, usize, f32),
    (projection, size): (&str, usize),
) -> Result<Encoder> {
    let pooled = b.input("pooled", TensorType::i32(Rows::Outputs, 1));
    let x = b.push("pool", Op::SelectRows { select: Select::Index }, &[hidden, pooled], &[])?;
    let affine = affine(weights, norm, width)?;
    let x = b.push("post_norm", Op::LayerNorm { eps }, &[x], &affine)?;
    b.scope("");
    let part = [(projection.into(), size, width)];
    let projected = linear(b, weights, projection, Op::linear(Activation::None, false, false), &[x], &part)?;
    b.keep(projected);
    let unit = b.push("normalise", Op::L2Normalize, &[projected], &[])?;
    b.keep(unit);
    Ok(Encoder { input, pooled, projected, unit })
}

/// Weight and bias of a LayerNorm.
fn affine(weights: &Weights, name: &str, width: usize) -> Result<[Weight; 2]> {
    let vector = |part: &str| weights.vector(&format!("{name}.{part}"), width);
    Ok([vector("weight")?, vector("bias")?])
}

/// The transformer blocks of a tower.
struct Blocks {
    /// `vision` or `text`, as canonical names begin.
    tower: &'static str,
    width: usize,
    inner: usize,
    heads: usize,
    /// Rows that attend to each other.
    rows: usize,
    causal: bool,
    activation: Activation,
    eps: f32,
}

impl Blocks {
    /// One block: `x + attention(norm(x))`, then `x + mlp(norm(x))`.
    fn push(&self, b: &mut GraphBuilder<'_>, weights: &Weights, layer: usize, x: ValueId) -> Result<ValueId> {
        let Blocks { tower, width, inner, heads, rows, causal, .. } = *self;
        let name = |part: &str| format!("{tower}.encoder.layers.{layer}.{part}");
        let op = |act, residual| Op::linear(act, true, residual);
        let none = Activation::None;

        b.scope(format_args!("{tower}.layers.{layer}."));
        let h = self.norm(b, weights, "norm1", &name("layer_norm1"), x)?;
        let qkv =
            ["q_proj", "k_proj", "v_proj"].map(|part| (name(&format!("self_attn.{part}")), width, width));
        let qkv = linear(b, weights, "qkv", op(none, false), &[h], &qkv)?;
        let attention = Op::Attention { heads, head_dim: width / heads, rows, causal };
        let a = b.push("attention", attention, &[qkv], &[])?;
        let out = [(name("self_attn.out_proj"), width, width)];
        let x = linear(b, weights, "out", op(none, true), &[a, x], &out)?;

        let h = self.norm(b, weights, "norm2", &name("layer_norm2"), x)?;
        let fc1 = [(name("mlp.fc1"), inner, width)];
        let h = linear(b, weights, "fc1", op(self.activation, false), &[h], &fc1)?;
        linear(b, weights, "fc2", op(none, true), &[h, x], &[(name("mlp.fc2"), width, inner)])
    }

    /// The LayerNorm called `name`, as node `node`.
    fn norm(
        &self,
        b: &mut GraphBuilder<'_>,
        weights: &Weights,
        node: &str,
        name: &str,
        x: ValueId,
    ) -> Result<ValueId> {
        let affine = affine(weights, name, self.width)?;
        b.push(node, Op::LayerNorm { eps: self.eps }, &[x], &affine)
    }
}
