//! CLIP by itself: one tower or both, and the space they share.

use super::{VisionConfig, bounds, check_head_dim, dtype, split_heads};
use crate::error::Result;
use crate::folder::Folder;
use crate::model::json::{self, MAX_TOKEN_ID, Section};
use crate::op::Activation;
use crate::tensor::DType;
use serde_json::{Map, Value};
use std::path::Path;

/// A CLIP: transformers' `CLIPConfig`, or, with one tower, what `CLIPVisionModelWithProjection` and
/// `CLIPTextModelWithProjection` save.
#[derive(Clone, Debug, PartialEq)]
pub struct ClipConfig {
    /// The vision tower.
    pub vision: Option<VisionConfig>,
    /// The text tower.
    pub text: Option<ClipTextConfig>,
    /// Columns of the vectors that both towers make.
    pub projection_dim: usize,
    /// The dtype the checkpoint claims to be in. A hint: each tensor carries its own.
    pub dtype: Option<DType>,
}

/// A CLIP text tower: transformers' `CLIPTextConfig`.
#[derive(Clone, Debug, PartialEq)]
pub struct ClipTextConfig {
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Columns of the residual stream.
    pub hidden_size: usize,
    /// Columns inside the MLP.
    pub intermediate_size: usize,
    /// Encoder blocks.
    pub num_layers: usize,
    /// Attention heads.
    pub num_heads: usize,
    /// Most tokens of a text, its beginning and end included.
    pub max_positions: usize,
    /// Between the two layers of the MLP.
    pub activation: Activation,
    /// Added to the variance in every LayerNorm.
    pub layer_norm_eps: f32,
    /// Which row stands for a text.
    pub pooling: Pooling,
}

/// Which row of the text tower stands for a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// That of the largest id, the first of equals: the end token has the largest id there is. The rule of
    /// configurations whose `eos_token_id` is 2, as OpenAI's are: it is not the id of any end token.
    LargestId,
    /// The first one that has this id.
    First(u32),
}

impl Pooling {
    /// The row that stands for `ids`, if there is one.
    pub fn row(self, ids: &[u32]) -> Option<usize> {
        match self {
            Pooling::LargestId => {
                let largest = ids.iter().max()?;
                ids.iter().position(|id| id == largest)
            }
            Pooling::First(end) => ids.iter().position(|&id| id == end),
        }
    }
}

impl ClipConfig {
    /// Reads `config.json` in `folder`.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) naming the key; for a model of another family, what to do with it.
    pub fn load(folder: &Folder) -> Result<Self> {
        const FILE: &str = "config.json";
        Self::from_json(&json::read_object(folder, FILE)?, &folder.path(FILE))
    }

    /// Whether a `config.json` says that it is a CLIP.
    pub fn is_clip(map: &Map<String, Value>) -> bool {
        let kinds = ["clip", "clip_vision_model", "clip_text_model"];
        map.get("model_type").and_then(Value::as_str).is_some_and(|kind| kinds.contains(&kind))
    }

    /// Reads a configuration that came from `file`, which is named in errors.
    ///
    /// # Errors
    /// As for [`load`](ClipConfig::load).
    pub fn from_json(map: &Map<String, Value>, file: &Path) -> Result<Self> {
        let root = Section::root(file, map);
        let kind = root.string("model_type")?;
        let (vision, text) = match kind {
            Some("clip") => (
                Some(tower(
                    &root,
                    ["vision_config_dict", "vision_config"],
                    ["vision_config_dict.", "vision_config."],
                )?),
                Some(tower(
                    &root,
                    ["text_config_dict", "text_config"],
                    ["text_config_dict.", "text_config."],
                )?),
            ),
            Some("clip_vision_model") => (Some(root), None),
            Some("clip_text_model") => (None, Some(root)),
            Some("llava" | "llava_next" | "llava_llama" | "llama" | "mistral") => {
                let expected = "`clip`, `clip_vision_model` or `clip_text_model`: this is a language model, \
                                use `tessera run`";
                return Err(root.error("model_type", expected));
            }
            _ => {
                let expected = "`clip`, `clip_vision_model` or `clip_text_model`: CLIP is the only kind that \
                                can classify and embed";
                return Err(root.error("model_type", expected));
            }
        };
        Ok(ClipConfig {
            vision: vision.map(|section| VisionConfig::parse(&section)).transpose()?,
            text: text.map(|section| ClipTextConfig::parse(&section)).transpose()?,
            projection_dim: root.size("projection_dim", 512, bounds::WIDTH)?,
            dtype: dtype(&root)?,
        })
    }
}

/// The section of a tower. Where an old file has it twice, the one called `_dict` holds, altogether: so
/// `CLIPConfig` reads it.
fn tower<'a>(root: &Section<'a>, keys: [&str; 2], prefixes: [&'static str; 2]) -> Result<Section<'a>> {
    for (key, prefix) in keys.into_iter().zip(prefixes) {
        if let Some(section) = root.child(key, prefix)? {
            return Ok(section);
        }
    }
    Ok(root.empty(prefixes[1]))
}

impl ClipTextConfig {
    /// A `text_config`; what it omits is as in `CLIPTextConfig`.
    fn parse(section: &Section) -> Result<Self> {
        section.choice("model_type", "clip_text_model", &[("clip_text_model", ())])?;
        let hidden_size = section.size("hidden_size", 512, bounds::WIDTH)?;
        let num_heads = section.size("num_attention_heads", 8, bounds::HEADS)?;
        let head_dim = split_heads(section, hidden_size, num_heads)?;
        check_head_dim(section, "num_attention_heads", head_dim)?;
        let activations = [("quick_gelu", Activation::QuickGelu), ("gelu", Activation::GeluErf)];
        let end = section.size("eos_token_id", 49407, 0..=MAX_TOKEN_ID)? as u32;
        Ok(ClipTextConfig {
            vocab_size: section.size("vocab_size", 49408, bounds::VOCAB)?,
            hidden_size,
            intermediate_size: section.size("intermediate_size", 2048, bounds::FFN)?,
            num_layers: section.size("num_hidden_layers", 12, bounds::LAYERS)?,
            num_heads,
            max_positions: section.size("max_position_embeddings", 77, 2..=bounds::PATCHES)?,
            activation: section.choice("hidden_act", "quick_gelu", &activations)?,
            layer_norm_eps: section.positive("layer_norm_eps", 1e-5, 1.0)? as f32,
            pooling: if end == 2 { Pooling::LargestId } else { Pooling::First(end) },
        })
    }
}
