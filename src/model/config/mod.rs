//! What a checkpoint's `config.json` says, with every default of every transformers generation filled
//! in and every number within sane bounds.
//!
//! Older savers omit whatever equals the class default, so the defaults here are those of transformers'
//! `LlavaConfig`, `LlavaNextConfig`, `LlamaConfig`, `MistralConfig` and `CLIPVisionConfig`, and not those of
//! any one model. The original LLaVA's configurations have keys and defaults of their own, in `original.rs`.
//! Keys that were renamed over the years (`torch_dtype`, `rope_theta`, `image_token_id`, ...) are read
//! in all their spellings.

mod clip;
mod family;
mod generation;
mod original;
mod rope;
mod text;
mod tiling;
mod vision;

pub use clip::{ClipConfig, ClipTextConfig, Pooling};
pub use family::Family;
pub use generation::GenerationConfig;
pub use rope::{Rope, RopeScaling};
pub use text::TextConfig;
pub use tiling::{check_processor, check_processor_tiling, original_tiling};
pub use vision::VisionConfig;

use super::json::{self, MAX_TOKEN_ID, Section};
use crate::error::Result;
use crate::folder::Folder;
use crate::input::image::Tiling;
use crate::tensor::DType;
use serde_json::{Map, Value};
use std::path::Path;

const FILE: &str = "config.json";

/// A model: a LLaMA, and for LLaVA the tower and the projector before it.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// What kind of checkpoint it is.
    pub family: Family,
    /// The CLIP tower; absent in a text model, as are the four fields that follow.
    pub vision: Option<VisionConfig>,
    /// What turns tower features into embeddings.
    pub projector: Option<ProjectorConfig>,
    /// The id that stands for one image row in a prompt. The original LLaVA has none.
    pub image_token_id: Option<u32>,
    /// Which hidden states of the tower the projector sees, side by side. Index 0 is the embedding after
    /// `pre_layrnorm`, index i the output of block i, counted from 1. Negative layers are resolved.
    pub feature_layers: Vec<usize>,
    /// Which rows of those hidden states the projector sees.
    pub select: SelectStrategy,
    /// Whether pictures are padded to a square where nothing else says so (`image_aspect_ratio`).
    pub pads: bool,
    /// Tokens that the original appends to its vocabulary, in this order, if a picture is to stand between
    /// `<im_start>` and `<im_end>`; else none.
    pub picture_tokens: &'static [&'static str],
    /// Whose code the checkpoint was made for.
    pub reference: Reference,
    /// How pictures are seen in tiles, by a LLaVA-NeXT; without it each is one square.
    pub tiling: Option<Tiling>,
    /// The language model.
    pub text: TextConfig,
    /// The dtype the checkpoint claims to be in. A hint: each tensor carries its own.
    pub dtype: Option<DType>,
}

/// Whose numbers are meant where two programs that run LLaVA differ: which way up a picture is, how it
/// becomes a square, how the text beside it is tokenised, and what a repetition penalty counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reference {
    /// Hugging Face's transformers.
    Transformers,
    /// The code that LLaVA was published with.
    Original,
}

/// Linear layers with the exact, erf form of GELU between them.
#[derive(Clone, Debug, PartialEq)]
pub struct ProjectorConfig {
    /// Columns of its input: the tower's width times the number of feature layers.
    pub input_size: usize,
    /// Columns of its output, the language model's width.
    pub hidden_size: usize,
    /// How many linear layers: 2 in LLaVA-1.5, 1 in the first LLaVA, 0 is the identity.
    pub layers: usize,
    /// Whether the linear layers have a bias.
    pub bias: bool,
}

impl ProjectorConfig {
    /// Columns of each layer's input.
    pub fn inputs(&self) -> impl Iterator<Item = usize> {
        std::iter::once(self.input_size).chain(std::iter::repeat(self.hidden_size)).take(self.layers)
    }
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
        Self::load_with_tower(folder, None)
    }

    /// Reads `config.json` in `folder`; `tower` is the folder of a vision tower that is apart from the
    /// model, whose `config.json` is read as well.
    pub fn load_with_tower(folder: &Folder, tower: Option<&Folder>) -> Result<Self> {
        let tower = tower.map(VisionConfig::load).transpose()?;
        let (map, file) = (json::read_object(folder, FILE)?, folder.path(FILE));
        Self::parse(&Section::root(&file, &map), tower)
    }

    /// Reads a configuration that came from `file`, which is named in errors.
    pub fn from_json(map: &Map<String, Value>, file: &Path) -> Result<Self> {
        Self::parse(&Section::root(file, map), None)
    }

    /// What the checkpoint in `folder` calls the vision tower that it expects to find elsewhere; `None` for
    /// checkpoints that have theirs inside.
    pub fn tower_name(folder: &Folder) -> Result<Option<String>> {
        let (map, file) = (json::read_object(folder, FILE)?, folder.path(FILE));
        Ok(original::tower_name(&Section::root(&file, &map))?.map(String::from))
    }

    /// Whether the checkpoint in `folder` is a language model by itself.
    pub fn is_text(folder: &Folder) -> Result<bool> {
        let (map, file) = (json::read_object(folder, FILE)?, folder.path(FILE));
        Ok(Family::of(&Section::root(&file, &map))? == Family::Text)
    }

    fn parse(root: &Section, tower: Option<VisionConfig>) -> Result<Self> {
        if root.get("quantization_config").is_some() {
            return Err(root.error("quantization_config", "none: weights are f16, bf16 or f32"));
        }
        match Family::of(root)? {
            Family::Llava => Self::llava(root),
            Family::LlavaNext => {
                let config = Self::llava(root)?;
                let tiling = tiling::hugging_face(root, &config)?;
                Ok(ModelConfig { family: Family::LlavaNext, tiling: Some(tiling), ..config })
            }
            Family::Original => Self::original(root, tower),
            Family::Text => Ok(ModelConfig {
                family: Family::Text,
                vision: None,
                projector: None,
                image_token_id: None,
                feature_layers: Vec::new(),
                select: SelectStrategy::Default,
                tiling: None,
                pads: false,
                picture_tokens: &[],
                reference: Reference::Transformers,
                text: TextConfig::parse(root, root)?,
                dtype: dtype(root)?,
            }),
        }
    }

    fn llava(root: &Section) -> Result<Self> {
        let empty = Map::new();
        let text = root.child("text_config", "text_config.")?.unwrap_or(root.other(&empty));
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
            family: Family::Llava,
            projector: Some(ProjectorConfig {
                input_size: vision.hidden_size * feature_layers.len(),
                hidden_size: text.hidden_size,
                layers: 2,
                bias: root.bool("multimodal_projector_bias", true)?,
            }),
            image_token_id: Some(root.size(image_token, 32000, 0..=MAX_TOKEN_ID)? as u32),
            feature_layers,
            select: root.choice("vision_feature_select_strategy", "default", &strategies)?,
            pads: false,
            picture_tokens: &[],
            reference: Reference::Transformers,
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

/// `vision_feature_layer` as indices into the `num_layers + 1` hidden states.
fn feature_layers(root: &Section, num_layers: usize) -> Result<Vec<usize>> {
    const KEY: &str = "vision_feature_layer";
    let states = num_layers as i64 + 1;
    let resolve = |value: &Value| resolve_layer(value, num_layers);
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

/// The hidden state that a config means: negative ones are counted from the end.
fn resolve_layer(value: &Value, num_layers: usize) -> Option<usize> {
    let states = num_layers as i64 + 1;
    let layer = value.as_i64().filter(|layer| (-states..states).contains(layer))?;
    Some(layer.rem_euclid(states) as usize)
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
