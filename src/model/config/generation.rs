//! `generation_config.json`: where a text ends, and how its author would sample it.

use super::TextConfig;
use crate::error::Result;
use crate::folder::Folder;
use crate::model::json::{self, Section};

/// The checkpoint's own generation settings. The sampling fields are hints: a run is greedy
/// unless its user asks for sampling.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationConfig {
    /// Each of these ends a text.
    pub eos_token_ids: Vec<u32>,
    /// The token a text begins with; the tokenizer, not this, puts it there.
    pub bos_token_id: Option<u32>,
    /// The token that fills batches.
    pub pad_token_id: Option<u32>,
    /// Whether the author samples by default.
    pub do_sample: bool,
    /// Divides the logits.
    pub temperature: Option<f32>,
    /// Keeps the k most probable tokens; 0 keeps all.
    pub top_k: Option<usize>,
    /// Keeps the smallest set of tokens with this much probability.
    pub top_p: Option<f32>,
    /// Drops tokens less probable than this times the most probable one.
    pub min_p: Option<f32>,
    /// Divides (or, below zero, multiplies) the logits of tokens already in the text.
    pub repetition_penalty: Option<f32>,
    /// How many tokens the author generates at most.
    pub max_new_tokens: Option<usize>,
}

impl GenerationConfig {
    /// Reads `generation_config.json` in `folder`. Without the file, or where it names no end token, the
    /// model's own end tokens hold; if it names some, as transformers does, only those.
    pub fn load(folder: &Folder, text: &TextConfig) -> Result<Self> {
        const FILE: &str = "generation_config.json";
        let Some(map) = json::find_object(folder, FILE)? else {
            return Ok(GenerationConfig { eos_token_ids: text.eos_token_ids.clone(), ..Default::default() });
        };
        let file = folder.path(FILE);
        let root = Section::root(&file, &map);
        let one = |key| Ok(root.token_ids(key)?.and_then(|ids| ids.first().copied()));
        Ok(GenerationConfig {
            eos_token_ids: root.token_ids("eos_token_id")?.unwrap_or_else(|| text.eos_token_ids.clone()),
            bos_token_id: one("bos_token_id")?,
            pad_token_id: one("pad_token_id")?,
            do_sample: root.bool("do_sample", false)?,
            temperature: fraction(&root, "temperature", 100.0)?,
            top_k: root.optional_size("top_k", 0..=usize::MAX)?,
            top_p: fraction(&root, "top_p", 1.0)?,
            min_p: fraction(&root, "min_p", 1.0)?,
            repetition_penalty: fraction(&root, "repetition_penalty", 100.0)?,
            max_new_tokens: root.optional_size("max_new_tokens", 0..=usize::MAX)?,
        })
    }
}

/// A number from 0 to `most`, if there is one. 0 is allowed: some authors write temperature 0.
fn fraction(root: &Section, key: &str, most: f64) -> Result<Option<f32>> {
    let Some(value) = root.get(key) else { return Ok(None) };
    let number = value.as_f64().filter(|x| (0.0..=most).contains(x));
    number.map(|x| Some(x as f32)).ok_or_else(|| root.error(key, format!("a number from 0 to {most}")))
}
