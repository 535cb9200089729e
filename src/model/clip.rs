//! The CLIP vision tower as a graph.
//!
//! LLaVA reads a hidden state from before the end (usually -2), so only the blocks that lead there are
//! built: 23 of 24 for LLaVA-1.5, and `post_layernorm` never.

use super::config::VisionConfig;
use super::weights::Weights;
use crate::error::Result;
use crate::graph::{GraphBuilder, ValueId};
use crate::op::{Activation, Op, Select};
use crate::tensor::{Rows, TensorType};

/// The ends of the tower.
pub struct Tower {
    /// Normalised pixels `[images, 3*S*S]`, channels first.
    pub pixels: ValueId,
    /// The selected hidden states `[images*(N+1), D*k]`, class rows included.
    pub hidden: ValueId,
}

/// Builds the tower up to the hidden states named by `layers`: 0 is the output of `pre_layrnorm`, i the
/// output of block i. Several are put side by side in the order given.
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
    let eps = config.layer_norm_eps;

    let pixels = b.input("pixels", TensorType::f32(Rows::PerImage(1), 3 * image * image));
    b.scope("vision.");
    let embeddings = [
        weights.tensor("vision.embeddings.patch_embedding.weight", &[width, 3, patch, patch])?,
        weights.vector("vision.embeddings.class_embedding", width)?,
        weights.matrix("vision.embeddings.position_embedding.weight", rows, width)?,
    ];
    let x = b.push("embeddings", Op::PatchEmbed { image, patch }, &[pixels], &embeddings)?;
    let mut x = b.push(
        "pre_norm",
        Op::LayerNorm { eps },
        &[x],
        &[
            weights.vector("vision.pre_layrnorm.weight", width)?,
            weights.vector("vision.pre_layrnorm.bias", width)?,
        ],
    )?;

    let mut states = vec![x];
    for layer in 0..layers.iter().copied().max().unwrap_or(0) {
        x = block(b, config, layer, weights, x)?;
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

/// One encoder block: `x + attention(norm(x))`, then `x + mlp(norm(x))`.
fn block(
    b: &mut GraphBuilder<'_>,
    config: &VisionConfig,
    layer: usize,
    weights: &Weights,
    x: ValueId,
) -> Result<ValueId> {
    let (width, inner) = (config.hidden_size, config.intermediate_size);
    let norm = Op::LayerNorm { eps: config.layer_norm_eps };
    let linear = |act, residual| Op::Linear { act, bias: true, residual, wide: false };
    let name = |part: &str| format!("vision.encoder.layers.{layer}.{part}");
    let matrix = |part: &str, rows, cols| weights.matrix(&name(&format!("{part}.weight")), rows, cols);
    let vector = |part: &str, len| weights.vector(&name(part), len);
    let bias = |part: &str, len| vector(&format!("{part}.bias"), len);
    let affine = |part: &str| Ok([vector(&format!("{part}.weight"), width)?, bias(part, width)?]);

    b.scope(format_args!("vision.layers.{layer}."));
    let h = b.push("norm1", norm.clone(), &[x], &affine("layer_norm1")?)?;
    let qkv = [
        matrix("self_attn.q_proj", width, width)?,
        matrix("self_attn.k_proj", width, width)?,
        matrix("self_attn.v_proj", width, width)?,
        bias("self_attn.q_proj", width)?,
        bias("self_attn.k_proj", width)?,
        bias("self_attn.v_proj", width)?,
    ];
    let qkv = b.push("qkv", linear(Activation::None, false), &[h], &qkv)?;
    let attention = Op::Attention {
        heads: config.num_heads,
        head_dim: config.head_dim,
        rows: config.num_rows(),
        causal: false,
    };
    let a = b.push("attention", attention, &[qkv], &[])?;
    let out = [matrix("self_attn.out_proj", width, width)?, bias("self_attn.out_proj", width)?];
    let x = b.push("out", linear(Activation::None, true), &[a, x], &out)?;

    let h = b.push("norm2", norm, &[x], &affine("layer_norm2")?)?;
    let fc1 = [matrix("mlp.fc1", inner, width)?, bias("mlp.fc1", inner)?];
    let h = b.push("fc1", linear(config.activation, false), &[h], &fc1)?;
    let fc2 = [matrix("mlp.fc2", width, inner)?, bias("mlp.fc2", width)?];
    b.push("fc2", linear(Activation::None, true), &[h, x], &fc2)
}
