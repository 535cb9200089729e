//! The `config.json` of the original LLaVA code: a language model's own keys, and `mm_*` keys for what
//! stands before it. The tower is a checkpoint of its own, whose `config.json` has its dimensions.

use super::{Family, ModelConfig, ProjectorConfig, Reference, SelectStrategy, TextConfig, VisionConfig};
use super::{dtype, original_tiling, resolve_layer};
use crate::error::Result;
use crate::model::json::Section;

/// What the original calls its vision tower: a name on the Hub or a path, under either of two keys.
///
/// # Errors
/// [`Error::Config`](crate::Error::Config) if it is not a string.
pub(super) fn tower_name<'a>(root: &Section<'a>) -> Result<Option<&'a str>> {
    if Family::of(root)? != Family::Original {
        return Ok(None);
    }
    match root.string("mm_vision_tower")? {
        Some(name) => Ok(Some(name)),
        None => root.string("vision_tower"),
    }
}

impl ModelConfig {
    /// Reads `root`; `tower` is what the tower's own configuration says, if that was found.
    pub(super) fn original(root: &Section, tower: Option<VisionConfig>) -> Result<Self> {
        let text = TextConfig::parse(root, root)?;
        refuse_other_parts(root)?;
        let vision = match tower {
            Some(vision) => vision,
            None => published_tower(root)?,
        };
        const WIDTH: &str = "mm_hidden_size";
        if root.optional_size(WIDTH, 0..=usize::MAX)?.is_some_and(|width| width != vision.hidden_size) {
            let expected =
                format!("{}, the width of the vision tower; is it another tower's?", vision.hidden_size);
            return Err(root.error(WIDTH, expected));
        }
        // The original has no default when it loads a model, and -1 when it trains one.
        const LAYER: &str = "mm_vision_select_layer";
        let layer = root.get(LAYER).and_then(|value| resolve_layer(value, vision.num_layers));
        let states = vision.num_layers as i64 + 1;
        let layer =
            layer.ok_or_else(|| root.error(LAYER, format!("a layer from {} to {}", -states, states - 1)))?;
        let features = [("patch", SelectStrategy::Default), ("cls_patch", SelectStrategy::Full)];
        let select = root.choice("mm_vision_select_feature", "patch", &features)?;
        let shapes = [("square", false), ("pad", true), ("anyres", false)];
        let pads = root.choice("image_aspect_ratio", "square", &shapes)?;
        let tiling = original_tiling(root, &vision)?;
        if tiling.is_some() && select == SelectStrategy::Full {
            let expected = "`patch`: a class row has no place among tiles";
            return Err(root.error("mm_vision_select_feature", expected));
        }
        Ok(ModelConfig {
            family: Family::Original,
            projector: Some(ProjectorConfig {
                input_size: vision.hidden_size,
                hidden_size: text.hidden_size,
                layers: projector_layers(root, &vision, &text)?,
                bias: true,
            }),
            image_token_id: None,
            feature_layers: vec![layer],
            select,
            pads,
            tiling,
            picture_tokens: picture_tokens(root)?,
            reference: Reference::Original,
            vision: Some(vision),
            text,
            dtype: dtype(root)?,
        })
    }
}

/// `<im_patch>` stands in no prompt, but takes an id before those that do, unless the config says otherwise.
fn picture_tokens(root: &Section) -> Result<&'static [&'static str]> {
    let patch = root.bool("mm_use_im_patch_token", true)?;
    Ok(match (root.bool("mm_use_im_start_end", false)?, patch) {
        (false, _) => &[],
        (true, false) => &["<im_start>", "<im_end>"],
        (true, true) => &["<im_patch>", "<im_start>", "<im_end>"],
    })
}

/// `mm_projector_type`: how many linear layers there are.
fn projector_layers(root: &Section, vision: &VisionConfig, text: &TextConfig) -> Result<usize> {
    const KEY: &str = "mm_projector_type";
    let name = root.string(KEY)?.unwrap_or("linear");
    let depth = || name.strip_prefix("mlp")?.strip_suffix("x_gelu")?.parse().ok();
    match name {
        "linear" => Ok(1),
        "identity" if vision.hidden_size == text.hidden_size => Ok(0),
        "identity" => {
            let expected = format!(
                "a projector: the tower has {} columns and the language model {}",
                vision.hidden_size, text.hidden_size
            );
            Err(root.error(KEY, expected))
        }
        _ => depth().filter(|depth| (1..=MAX_DEPTH).contains(depth)).ok_or_else(|| {
            root.error(KEY, format!("`linear`, `identity`, or `mlpNx_gelu` with N from 1 to {MAX_DEPTH}"))
        }),
    }
}

/// Deeper than any projector in the wild, which have one, two or three layers.
const MAX_DEPTH: usize = 16;

/// Parts of the original code that are not built here.
fn refuse_other_parts(root: &Section) -> Result<()> {
    if root.string("mm_resampler_type")?.is_some_and(|kind| kind != "identity") {
        return Err(root.error("mm_resampler_type", "null: Q-formers and other resamplers are not supported"));
    }
    if root.bool("s2", false)? {
        return Err(root.error("s2", "false: towers over several scales are not supported"));
    }
    Ok(())
}

/// Dimensions of the towers that OpenAI published, for a checkpoint that holds its tower's weights
/// but whose tower's `config.json` is not at hand: width, MLP, layers, image and patch size. Heads
/// have 64 columns.
const PUBLISHED: [(&str, [usize; 5]); 4] = [
    ("openai/clip-vit-base-patch32", [768, 3072, 12, 224, 32]),
    ("openai/clip-vit-base-patch16", [768, 3072, 12, 224, 16]),
    ("openai/clip-vit-large-patch14", [1024, 4096, 24, 224, 14]),
    ("openai/clip-vit-large-patch14-336", [1024, 4096, 24, 336, 14]),
];

fn published_tower(root: &Section) -> Result<VisionConfig> {
    let key = if root.has("mm_vision_tower") { "mm_vision_tower" } else { "vision_tower" };
    let name = tower_name(root)?;
    if name.is_some_and(|name| name.to_lowercase().contains("siglip")) {
        return Err(root.error(key, "a CLIP tower: SigLIP towers are not supported"));
    }
    let found = PUBLISHED.iter().find(|(published, _)| Some(*published) == name);
    let Some(&(_, [hidden_size, intermediate_size, num_layers, image_size, patch_size])) = found else {
        let expected = "a CLIP tower whose folder is found beside the model or named with --vision-tower";
        return Err(root.error(key, expected));
    };
    let (num_heads, head_dim) = (hidden_size / 64, 64);
    let dims = VisionConfig {
        hidden_size,
        intermediate_size,
        num_layers,
        num_heads,
        head_dim,
        ..VisionConfig::large_336()
    };
    Ok(VisionConfig { image_size, patch_size, ..dims })
}
