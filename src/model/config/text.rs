//! The language model.

use super::{Rope, bounds, check_head_dim, split_heads};
use crate::error::Result;
use crate::model::json::Section;

/// A LLaMA: transformers' `LlamaConfig`, or a `MistralConfig`, which is the same network as long as no position is
/// further back than its sliding window.
#[derive(Clone, Debug, PartialEq)]
pub struct TextConfig {
    /// Rows of the embedding and of the head. May exceed the tokenizer's size: padding rows.
    pub vocab_size: usize,
    /// Columns of the residual stream, D.
    pub hidden_size: usize,
    /// Columns inside the MLP, F.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_layers: usize,
    /// Query heads, H.
    pub num_heads: usize,
    /// Key and value heads, K; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Columns of one head, E. H·E need not be D.
    pub head_dim: usize,
    /// Added to the mean square in every RMSNorm.
    pub rms_norm_eps: f32,
    /// Positions that can be run: those the model was made for, but no more than `sliding_window`.
    pub max_positions: usize,
    /// The sliding window, if it is what ends `max_positions`: beyond it Mistral would attend to the last positions
    /// alone, which is not done here.
    pub sliding_window: Option<usize>,
    /// The rotary embedding.
    pub rope: Rope,
    /// Whether q, k, v and o have a bias.
    pub attention_bias: bool,
    /// Whether gate, up and down have a bias.
    pub mlp_bias: bool,
    /// Whether the head is the embedding, if the files do not have both: what is there counts.
    pub tie_word_embeddings: bool,
    /// The tokens that end a text, unless `generation_config.json` says otherwise.
    pub eos_token_ids: Vec<u32>,
}

impl TextConfig {
    /// Reads `section`: a `text_config`, or the whole file (`root`) of a text model. Where transformers
    /// keeps a key at either level, `root` is asked as well.
    pub(super) fn parse(section: &Section, root: &Section) -> Result<Self> {
        // `llava` is what transformers 4.41 logs for the text_config of llava-hf/llava-1.5-7b-hf, and one of
        // the original's names for itself.
        let families = [
            ("llama", false),
            ("llava", false),
            ("llava_llama", false),
            ("mistral", true),
            ("llava_mistral", true),
        ];
        let mistral = section.choice("model_type", "llama", &families)?;
        section.choice("hidden_act", "silu", &[("silu", ())])?;
        let hidden_size = section.size("hidden_size", 4096, bounds::WIDTH)?;
        let num_heads = section.size("num_attention_heads", 32, bounds::HEADS)?;
        let (ffn, positions) = if mistral { (14336, 131_072) } else { (11008, 2048) };
        let made_for = section.size("max_position_embeddings", positions, bounds::CONTEXT)?;
        let sliding_window =
            if mistral { sliding_window(section)?.filter(|&window| window < made_for) } else { None };
        Ok(TextConfig {
            vocab_size: section.size("vocab_size", 32000, bounds::VOCAB)?,
            hidden_size,
            intermediate_size: section.size("intermediate_size", ffn, bounds::FFN)?,
            num_layers: section.size("num_hidden_layers", 32, bounds::LAYERS)?,
            num_heads,
            num_kv_heads: num_kv_heads(section, num_heads, mistral)?,
            head_dim: head_dim(section, hidden_size, num_heads)?,
            rms_norm_eps: section.positive("rms_norm_eps", 1e-6, 1.0)? as f32,
            max_positions: sliding_window.unwrap_or(made_for),
            sliding_window,
            rope: Rope::parse(section, made_for)?,
            attention_bias: section.bool("attention_bias", false)?,
            mlp_bias: section.bool("mlp_bias", false)?,
            tie_word_embeddings: section.bool("tie_word_embeddings", false)?
                || root.bool("tie_word_embeddings", false)?,
            eos_token_ids: eos_token_ids(section, root)?,
        })
    }

    /// The angle in radians by which one position turns each pair of columns, E/2 of them, after
    /// scaling. The columns of pair i are i and i + E/2.
    pub fn inv_freq(&self) -> Vec<f32> {
        self.rope.inv_freq(self.head_dim)
    }
}

/// `num_key_value_heads`: as many as query heads if absent, but 8 in a Mistral.
fn num_kv_heads(section: &Section, num_heads: usize, mistral: bool) -> Result<usize> {
    const KEY: &str = "num_key_value_heads";
    let default = if mistral && !section.has(KEY) { 8 } else { num_heads };
    let heads = section.size(KEY, default, bounds::HEADS)?;
    if num_heads.is_multiple_of(heads) {
        return Ok(heads);
    }
    Err(section.error(KEY, format!("a divisor of num_attention_heads, {num_heads}")))
}

/// `head_dim`, or the width over the heads.
fn head_dim(section: &Section, hidden_size: usize, num_heads: usize) -> Result<usize> {
    match section.optional_size("head_dim", bounds::WIDTH)? {
        Some(size) => check_head_dim(section, "head_dim", size),
        None => check_head_dim(section, "num_attention_heads", split_heads(section, hidden_size, num_heads)?),
    }
}

/// `sliding_window` of a Mistral: 4096 positions if absent, none if null.
fn sliding_window(section: &Section) -> Result<Option<usize>> {
    const KEY: &str = "sliding_window";
    match section.optional_size(KEY, bounds::CONTEXT)? {
        None if section.has(KEY) => Ok(None),
        window => Ok(Some(window.unwrap_or(4096))),
    }
}

/// `eos_token_id`, kept beside or above the other settings; 2 if neither place has the key.
fn eos_token_ids(section: &Section, root: &Section) -> Result<Vec<u32>> {
    const KEY: &str = "eos_token_id";
    let found = match section.token_ids(KEY)? {
        Some(ids) => Some(ids),
        None => root.token_ids(KEY)?,
    };
    let default = if section.has(KEY) { vec![] } else { vec![2] };
    Ok(found.unwrap_or(default))
}
