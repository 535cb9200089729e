//! The LLaMA language model as a graph: one graph for prefill chunks, decode steps and any mixture of
//! sequences, because a row's page table and position are inputs.

use super::config::TextConfig;
use super::linear::linear;
use super::weights::Weights;
use crate::error::Result;
use crate::graph::{GraphBuilder, ValueId};
use crate::op::{Activation, Op, PAGE, SAMPLE_PARAMS, Select};
use crate::tensor::{Rows, TensorType};

/// The ends of the language model. T packed token rows, R rows whose logits are wanted, D model width,
/// V vocabulary.
#[derive(Clone, Debug)]
pub struct Llama {
    /// Token ids `[T, 1]`.
    pub ids: ValueId,
    /// The row of `image_rows` that stands in for a token's embedding, or -1 `[T, 1]`.
    pub sources: ValueId,
    /// Encoded image rows `[T, D]`; unused rows hold anything.
    pub image_rows: ValueId,
    /// Positions `[T, 1]`.
    pub positions: ValueId,
    /// KV slots that k and v are written to `[T, 1]`.
    pub slots: ValueId,
    /// Where each row's page table begins `[T, 1]`.
    pub table_starts: ValueId,
    /// Page tables of all sequences, end to end `[entries, 1]`.
    pub tables: ValueId,
    /// Rows whose logits are wanted `[R, 1]`.
    pub select: ValueId,
    /// Sampling parameters `[R, SAMPLE_PARAMS]`.
    pub params: ValueId,
    /// Ids already seen, as a bit set `[R, ⌈V/32⌉]`.
    pub seen: ValueId,
    /// Logits `[R, V]`.
    pub logits: ValueId,
    /// Chosen tokens `[R, 1]`.
    pub next: ValueId,
}

/// The states of the graph, in the order in which [`build`] makes them: the rotation table
/// `[context, E]`, then for each layer its K pages and its V pages.
pub fn states(layers: usize) -> usize {
    1 + 2 * layers
}

/// The canonical names of the embedding and the head. With `tie_word_embeddings` one may stand for the other; where
/// files have both, both count, as in transformers.
fn ends(config: &TextConfig, weights: &Weights) -> Result<(&'static str, &'static str)> {
    const NAMES: [&str; 2] = ["lm.embed_tokens", "lm.head"];
    let [embedding, head] = NAMES.map(|name| weights.contains(&format!("{name}.weight")).then_some(name));
    match (embedding, head) {
        (embedding, head) if config.tie_word_embeddings => {
            Ok((embedding.or(head).unwrap_or(NAMES[0]), head.unwrap_or(NAMES[0])))
        }
        (Some(_), None) => {
            let wanted = weights.layout().spell("lm.head.weight");
            let expected = "an output matrix, since config.json does not say `tie_word_embeddings`: true";
            Err(weights.missing(&wanted, &wanted, expected))
        }
        _ => Ok((NAMES[0], NAMES[1])),
    }
}

/// Builds the language model.
///
/// # Errors
/// A tensor that is missing or has the wrong shape.
pub fn build(b: &mut GraphBuilder<'_>, config: &TextConfig, weights: &Weights) -> Result<Llama> {
    let (width, vocab) = (config.hidden_size, config.vocab_size);
    let per_token = TensorType::i32(Rows::Tokens, 1);
    let ids = b.input("ids", per_token);
    let sources = b.input("sources", per_token);
    let image_rows = b.input("image_rows", b.float(Rows::Tokens, width));
    let positions = b.input("positions", per_token);
    let slots = b.input("slots", per_token);
    let table_starts = b.input("table_starts", per_token);
    let tables = b.input("tables", TensorType::i32(Rows::TableEntries, 1));
    let select = b.input("select", TensorType::i32(Rows::Outputs, 1));
    let params = b.input("params", TensorType::i32(Rows::Outputs, SAMPLE_PARAMS));
    let seen = b.input("seen", TensorType::i32(Rows::Outputs, vocab.div_ceil(32)));
    let rope = b.state("rope".into(), TensorType::f32(Rows::Context, config.head_dim));

    let step = Step { positions, slots, table_starts, tables, select, rope };
    let (embedding, head) = ends(config, weights)?;
    let table = weights.matrix(&format!("{embedding}.weight"), vocab, width)?;
    let mut x = b.push("embed", Op::EmbedRows, &[ids, sources, image_rows], &[table])?;
    for layer in 0..config.num_layers {
        x = block(b, config, layer, weights, &step, x)?;
    }

    b.scope("");
    let norm = Op::RmsNorm { eps: config.rms_norm_eps };
    let x = b.push("norm", norm, &[x], &[weights.vector("lm.norm.weight", width)?])?;
    let wide = Op::Linear { act: Activation::None, bias: false, residual: false, wide: true, pairs: vec![] };
    let logits = linear(b, weights, "lm_head", wide, &[x], &[(head.into(), vocab, width)])?;
    b.keep(logits);
    let next = b.push("sample", Op::Sample, &[logits, params, seen], &[])?;
    b.keep(next);
    Ok(Llama {
        ids,
        sources,
        image_rows,
        positions,
        slots,
        table_starts,
        tables,
        select,
        params,
        seen,
        logits,
        next,
    })
}

/// The inputs that every layer reads.
struct Step {
    positions: ValueId,
    slots: ValueId,
    table_starts: ValueId,
    tables: ValueId,
    select: ValueId,
    rope: ValueId,
}

/// One decoder layer. The last one drops the rows whose logits nobody wants as soon as their keys and
/// values are in the cache: a prefill of 640 tokens does the rest of that layer for one row.
fn block(
    b: &mut GraphBuilder<'_>,
    config: &TextConfig,
    layer: usize,
    weights: &Weights,
    step: &Step,
    x: ValueId,
) -> Result<ValueId> {
    let TextConfig { num_heads: heads, num_kv_heads: kv_heads, head_dim, .. } = *config;
    let (width, inner, eps) = (config.hidden_size, config.intermediate_size, config.rms_norm_eps);
    let name = |part: &str| format!("lm.layers.{layer}.{part}");
    let norm = |part: &str| weights.vector(&name(&format!("{part}.weight")), width);

    b.scope(format_args!("layers.{layer}."));
    let pages = b.float(Rows::Pages, kv_heads * head_dim * PAGE);
    let k = b.state(format!("layers.{layer}.k"), pages);
    let v = b.state(format!("layers.{layer}.v"), pages);

    let (q_width, kv_width) = (heads * head_dim, kv_heads * head_dim);
    let h = b.push("input_norm", Op::RmsNorm { eps }, &[x], &[norm("input_layernorm")?])?;
    let projection = Op::linear(Activation::None, config.attention_bias, false);
    let qkv = [
        (name("self_attn.q_proj"), q_width, width),
        (name("self_attn.k_proj"), kv_width, width),
        (name("self_attn.v_proj"), kv_width, width),
    ];
    let qkv = linear(b, weights, "qkv", projection.clone(), &[h], &qkv)?;
    let rope = Op::RopeAppend { heads, kv_heads, head_dim };
    let q = b.push("rope", rope, &[qkv, step.positions, step.slots, step.rope, k, v], &[])?;
    let attention = Op::PagedAttention { heads, kv_heads, head_dim };
    let a =
        b.push("attention", attention, &[q, step.positions, step.table_starts, step.tables, k, v], &[])?;

    let (x, a) = match layer + 1 == config.num_layers {
        true => {
            let select = Op::SelectRows { select: Select::Index };
            let x = b.push("select_x", select.clone(), &[x, step.select], &[])?;
            (x, b.push("select_attention", select, &[a, step.select], &[])?)
        }
        false => (x, a),
    };
    let o = [(name("self_attn.o_proj"), width, q_width)];
    let o = linear(b, weights, "out", projection, &[a], &o)?;
    let post = norm("post_attention_layernorm")?;
    let sum = b.push_all("post_attention_norm", Op::AddRmsNorm { eps }, &[x, o], &[post])?;
    let (x, h) = (sum[0], sum[1]);

    let bias = config.mlp_bias;
    let gate_up = [(name("mlp.gate_proj"), inner, width), (name("mlp.up_proj"), inner, width)];
    let gated = Op::GatedLinear { bias, pairs: vec![] };
    let h = linear(b, weights, "gate_up", gated, &[h], &gate_up)?;
    let down = [(name("mlp.down_proj"), width, inner)];
    linear(b, weights, "down", Op::linear(Activation::None, bias, true), &[h, x], &down)
}
