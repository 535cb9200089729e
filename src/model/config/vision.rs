//! The CLIP vision tower.

use super::{bounds, check_head_dim, family, split_heads};
use crate::error::{Error, Result};
use crate::folder::Folder;
use crate::model::json::{self, Section};
use crate::op::Activation;

/// A CLIP vision tower: transformers' `CLIPVisionConfig`.
#[derive(Clone, Debug, PartialEq)]
pub struct VisionConfig {
    /// Columns of the residual stream.
    pub hidden_size: usize,
    /// Columns inside the MLP.
    pub intermediate_size: usize,
    /// Encoder blocks. LLaVA runs only as many as its feature layers need.
    pub num_layers: usize,
    /// Attention heads.
    pub num_heads: usize,
    /// Columns of one head.
    pub head_dim: usize,
    /// Colour channels, 3.
    pub num_channels: usize,
    /// Pixels along either side of the input.
    pub image_size: usize,
    /// Pixels along either side of a patch; divides `image_size`.
    pub patch_size: usize,
    /// Between the two layers of the MLP: quick_gelu as OpenAI trained it, or the exact form.
    pub activation: Activation,
    /// Added to the variance in every LayerNorm.
    pub layer_norm_eps: f32,
}

/// The error about a tower's `model_type`, with words about what that is.
fn describe_found(error: Error, section: &Section) -> Error {
    error.with_found(section.string("model_type").ok().flatten().and_then(family::describe))
}

impl VisionConfig {
    /// CLIP ViT-L/14 at 336 pixels, which `LlavaConfig` takes if `vision_config` is missing altogether.
    pub(super) fn large_336() -> Self {
        VisionConfig {
            hidden_size: 1024,
            intermediate_size: 4096,
            num_layers: 24,
            num_heads: 16,
            head_dim: 64,
            num_channels: 3,
            image_size: 336,
            patch_size: 14,
            activation: Activation::QuickGelu,
            layer_norm_eps: 1e-5,
        }
    }

    /// Reads the `config.json` of a tower that has a folder of its own: a whole CLIP (`CLIPModel`), of which the
    /// vision part is taken, or a `CLIPVisionModel`.
    pub(super) fn load(folder: &Folder) -> Result<Self> {
        const FILE: &str = "config.json";
        const WHOLE: &str = "clip";
        let (map, file) = (json::read_object(folder, FILE)?, folder.path(FILE));
        let root = Section::root(&file, &map);
        let kinds = [(WHOLE, true), ("clip_vision_model", false)];
        if root.choice("model_type", WHOLE, &kinds).map_err(|error| describe_found(error, &root))? {
            // OpenAI's configurations hold the section twice; transformers lets the second one win.
            let mut merged = serde_json::Map::new();
            for key in ["vision_config", "vision_config_dict"] {
                if let Some(section) = root.child(key, "vision_config.")? {
                    merged.extend(section.entries());
                }
            }
            return VisionConfig::parse(&Section::part(&file, "vision_config.", &merged));
        }
        VisionConfig::parse(&root)
    }

    /// A `vision_config` that is present. What it omits is as in `CLIPVisionConfig`, that is ViT-B/32.
    pub(super) fn parse(section: &Section) -> Result<Self> {
        let kinds = [("clip_vision_model", ())];
        let kind = section.choice("model_type", "clip_vision_model", &kinds);
        kind.map_err(|error| describe_found(error, section))?;
        let hidden_size = section.size("hidden_size", 768, bounds::WIDTH)?;
        let num_heads = section.size("num_attention_heads", 12, bounds::HEADS)?;
        let head_dim = split_heads(section, hidden_size, num_heads)?;
        let image_size = section.size("image_size", 224, bounds::IMAGE)?;
        let patch_size = section.size("patch_size", 32, 1..=image_size)?;
        let grid = image_size / patch_size;
        if !image_size.is_multiple_of(patch_size) || grid * grid > bounds::PATCHES {
            let most = bounds::PATCHES;
            let expected =
                format!("a divisor of image_size, {image_size}, that makes at most {most} patches");
            return Err(section.error("patch_size", expected));
        }
        let activations = [("quick_gelu", Activation::QuickGelu), ("gelu", Activation::GeluErf)];
        Ok(VisionConfig {
            hidden_size,
            intermediate_size: section.size("intermediate_size", 3072, bounds::FFN)?,
            num_layers: section.size("num_hidden_layers", 12, bounds::LAYERS)?,
            num_heads,
            head_dim: check_head_dim(section, "num_attention_heads", head_dim)?,
            num_channels: section.size("num_channels", 3, 3..=3)?,
            image_size,
            patch_size,
            activation: section.choice("hidden_act", "quick_gelu", &activations)?,
            layer_norm_eps: section.positive("layer_norm_eps", 1e-5, 1.0)? as f32,
        })
    }

    /// Patches along either side of the image.
    pub fn grid(&self) -> usize {
        self.image_size / self.patch_size
    }

    /// Patches of an image, row after row.
    pub fn num_patches(&self) -> usize {
        self.grid() * self.grid()
    }

    /// Rows of a hidden state: the class row and the patches.
    pub fn num_rows(&self) -> usize {
        self.num_patches() + 1
    }
}
