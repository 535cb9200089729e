//! What a checkpoint's `config.json` says, with every default of every transformers generation filled
//! in and every number within sane bounds.
//!
//! Older savers omit whatever equals the class default, so the defaults here are those of transformers'
//! `LlavaConfig`, `LlavaNextConfig`, `LlamaConfig`, `MistralConfig` and `CLIPVisionConfig`, and not those of any one model.
//! Keys that were renamed over the years (`torch_dtype`, `rope_theta`, `image_token_id`, ...) are read
//! in all their spellings.

mod generation;
mod rope;
mod text;
mod tiling;
mod vision;

pub use generation::GenerationConfig;
pub use rope::{Rope, RopeScaling};
pub use text::TextConfig;
pub use tiling::{check_processor_tiling, original_tiling};
pub use vision::VisionConfig;

use super::json::{self, MAX_TOKEN_ID, Section};
use crate::error::Result;
use crate::folder::Folder;
use crate::input::image::Tiling;
use crate::tensor::DType;
use serde_json::{Map, Value};
use std::path::Path;

/// A model: a LLaMA, and for LLaVA the tower and the projector before it.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// The CLIP tower; absent in a text model, as are the four fields that follow.
    pub vision: Option<VisionConfig>,
    /// What turns tower features into embeddings.
    pub projector: Option<ProjectorConfig>,
    /// The id that stands for one image row in a prompt.
    pub image_token_id: Option<u32>,
    /// Which hidden states of the tower the projector sees, side by side. Index 0 is the embedding after
    /// `pre_layrnorm`, index i the output of block i, counted from 1. Negative layers are resolved.
    pub feature_layers: Vec<usize>,
    /// Which rows of those hidden states the projector sees.
    pub select: SelectStrategy,
    /// How pictures are seen in tiles, by a LLaVA-NeXT; without it each is one square.
    pub tiling: Option<Tiling>,
    /// The language model.
    pub text: TextConfig,
    /// The dtype the checkpoint claims to be in. A hint: each tensor carries its own.
    pub dtype: Option<DType>,
}

/// `linear_2(gelu(linear_1(x)))`, with the exact, erf form of GELU.
#[derive(Clone, Debug, PartialEq)]
pub struct ProjectorConfig {
    /// Columns of its input: the tower's width times the number of feature layers.
    pub input_size: usize,
    /// Columns of its output, the language model's width.
    pub hidden_size: usize,
    /// Whether both linear layers have a bias.
    pub bias: bool,
}

/// Which rows of a tower's hidden state are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SelectStrategy {
    /// The patches alone, without the class row.
    Default,
    /// The class row and the patches.
    Full,
}

impl ModelConfig {
    /// Reads `config.json` in `folder`.
    pub fn load(folder: &Folder) -> Result<Self> {
        const FILE: &str = "config.json";
        Self::from_json(&json::read_object(folder, FILE)?, &folder.path(FILE))
    }

    /// Reads a configuration that came from `file`, which is named in errors.
    pub fn from_json(map: &Map<String, Value>, file: &Path) -> Result<Self> {
        let root = Section::root(file, map);
        if root.get("quantization_config").is_some() {
            return Err(root.error("quantization_config", "none: weights are f16, bf16 or f32"));
        }
        match Family::of(&root)? {
            Family::Llava => Self::llava(&root, file),
            Family::LlavaNext => {
                let config = Self::llava(&root, file)?;
                let tiling = tiling::hugging_face(&root, &config)?;
                Ok(ModelConfig { tiling: Some(tiling), ..config })
            }
            Family::Text => Ok(ModelConfig {
                vision: None,
                projector: None,
                image_token_id: None,
                feature_layers: Vec::new(),
                select: SelectStrategy::Default,
                tiling: None,
                text: TextConfig::parse(&root, &root)?,
                dtype: dtype(&root)?,
            }),
        }
    }

    fn llava(root: &Section, file: &Path) -> Result<Self> {
        let empty = Map::new();
        let text = root.child("text_config", "text_config.")?.unwrap_or(Section::root(file, &empty));
        let text = TextConfig::parse(&text, root)?;
        let vision = match root.child("vision_config", "vision_config.")? {
            Some(section) => VisionConfig::parse(&section)?,
            None => VisionConfig::large_336(),
        };
        root.choice("projector_hidden_act", "gelu", &[("gelu", ())])?;
        let image_token = root.alias("image_token_index", "image_token_id")?;
        let feature_layers = feature_layers(root, vision.num_layers)?;
        let strategies = [("default", SelectStrategy::Default), ("full", SelectStrategy::Full)];
        Ok(ModelConfig {
            projector: Some(ProjectorConfig {
                input_size: vision.hidden_size * feature_layers.len(),
                hidden_size: text.hidden_size,
                bias: root.bool("multimodal_projector_bias", true)?,
            }),
            image_token_id: Some(root.size(image_token, 32000, 0..=MAX_TOKEN_ID)? as u32),
            feature_layers,
            select: root.choice("vision_feature_select_strategy", "default", &strategies)?,
            vision: Some(vision),
            tiling: None,
            text,
            dtype: dtype(root)?,
        })
    }

    /// Rows of one square after the projector, 0 in a text model.
    pub fn square_rows(&self) -> usize {
        self.vision.as_ref().map_or(0, |vision| match self.select {
            SelectStrategy::Default => vision.num_patches(),
            SelectStrategy::Full => vision.num_patches() + 1,
        })
    }

    /// Rows that an image of `width` x `height` pixels takes in a prompt, 0 in a text model.
    pub fn image_tokens(&self, width: usize, height: usize) -> usize {
        match &self.tiling {
            Some(tiling) => tiling.tiles(width, height).tokens(),
            None => self.square_rows(),
        }
    }
}

/// The kinds of checkpoint directory that can be run.
enum Family {
    Llava,
    LlavaNext,
    Text,
}

impl Family {
    const SUPPORTED: &'static str = "`llava` (LlavaForConditionalGeneration), `llava_next` (LlavaNextForConditionalGeneration), `llama` or `mistral` (LlamaForCausalLM, MistralForCausalLM)";

    /// The family by `model_type` and `architectures`. Both are looked at, because the original LLaVA
    /// files also say `llava` but keep their weights and settings under other names.
    fn of(root: &Section) -> Result<Family> {
        if root.get("mm_vision_tower").is_some() || root.get("mm_projector_type").is_some() {
            let expected = "LlavaForConditionalGeneration: the original LLaVA layout is not supported, \
                            use the converted checkpoint (llava-hf/...)";
            return Err(root.error("architectures", expected));
        }
        let architecture = match root.get("architectures") {
            None => None,
            Some(Value::Array(names)) if names.is_empty() => None,
            Some(Value::Array(names)) if names[0].is_string() => names[0].as_str(),
            Some(_) => return Err(root.error("architectures", "a list of class names")),
        };
        match (root.string("model_type")?, architecture) {
            (Some("llava"), None | Some("LlavaForConditionalGeneration")) => Ok(Family::Llava),
            (None, Some("LlavaForConditionalGeneration")) => Ok(Family::Llava),
            (Some("llava_next") | None, Some("LlavaNextForConditionalGeneration")) => Ok(Family::LlavaNext),
            (Some("llava_next"), None) => Ok(Family::LlavaNext),
            (Some("llama" | "mistral"), None) => Ok(Family::Text),
            (Some("llama") | None, Some("LlamaForCausalLM")) => Ok(Family::Text),
            (Some("mistral") | None, Some("MistralForCausalLM")) => Ok(Family::Text),
            (Some("llava" | "llava_next" | "llama" | "mistral") | None, Some(_)) => {
                Err(root.error("architectures", Self::SUPPORTED))
            }
            _ => Err(root.error("model_type", Self::SUPPORTED)),
        }
    }
}

/// `vision_feature_layer` as indices into the `num_layers + 1` hidden states.
fn feature_layers(root: &Section, num_layers: usize) -> Result<Vec<usize>> {
    const KEY: &str = "vision_feature_layer";
    let states = num_layers as i64 + 1;
    let resolve = |value: &Value| {
        let layer = value.as_i64().filter(|layer| (-states..states).contains(layer))?;
        Some(layer.rem_euclid(states) as usize)
    };
    let layers = match root.get(KEY) {
        None => resolve(&Value::from(-2)).map(|layer| vec![layer]),
        Some(Value::Array(items)) if (1..=states as usize).contains(&items.len()) => {
            items.iter().map(resolve).collect()
        }
        Some(value) => resolve(value).map(|layer| vec![layer]),
    };
    let expected = || format!("a layer from {} to {num_layers}, or a list of such", -states);
    layers.ok_or_else(|| root.error(KEY, expected()))
}

/// The claimed dtype: `dtype` since transformers 4.56, `torch_dtype` before.
fn dtype(root: &Section) -> Result<Option<DType>> {
    let nested = root.child("text_config", "text_config.")?;
    for section in [Some(*root), nested].into_iter().flatten() {
        if let Some(name) = section.string(section.alias("dtype", "torch_dtype")?)? {
            return Ok(match name {
                "float32" => Some(DType::F32),
                "float16" => Some(DType::F16),
                "bfloat16" => Some(DType::BF16),
                _ => None,
            });
        }
    }
    Ok(None)
}

/// An error unless `width` splits into `heads` heads of a size the attention kernels take.
fn check_head_dim(section: &Section, key: &str, head_dim: usize) -> Result<usize> {
    if head_dim.is_multiple_of(8) && (8..=128).contains(&head_dim) {
        return Ok(head_dim);
    }
    Err(section.error(key, format!("a head size that is a multiple of 8 up to 128, not {head_dim}")))
}

/// `width / heads`, or an error that names both keys.
fn split_heads(section: &Section, width: usize, heads: usize) -> Result<usize> {
    if width.is_multiple_of(heads) {
        return Ok(width / heads);
    }
    Err(section.error("num_attention_heads", format!("a divisor of hidden_size, {width}")))
}

/// The bounds of every configuration. They are wide, a dozen times the largest model in the wild, and
/// keep the product of any three sizes well inside 64 bits.
mod bounds {
    use std::ops::RangeInclusive;

    pub const WIDTH: RangeInclusive<usize> = 1..=1 << 16;
    pub const FFN: RangeInclusive<usize> = 1..=1 << 18;
    pub const LAYERS: RangeInclusive<usize> = 1..=1024;
    pub const HEADS: RangeInclusive<usize> = 1..=1024;
    pub const VOCAB: RangeInclusive<usize> = 1..=1 << 22;
    pub const CONTEXT: RangeInclusive<usize> = 1..=1 << 24;
    pub const IMAGE: RangeInclusive<usize> = 1..=4096;
    pub const PATCHES: usize = 1 << 14;
}
