//! How a LLaVA-NeXT sees pictures in tiles, from a configuration of either kind.

use super::{ModelConfig, SelectStrategy, VisionConfig};
use crate::error::Result;
use crate::input::image::{Merge, Tiling};
use crate::model::json::Section;
use serde_json::Value;

const PINPOINTS: &str = "image_grid_pinpoints";

/// `image_grid_pinpoints` of `LlavaNextConfig`, (height, width), where a file leaves them out.
const DEFAULT: [(usize, usize); 5] = [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)];

/// The tiling of a `llava_next` configuration. Its pinpoints are (height, width).
pub(super) fn hugging_face(root: &Section, config: &ModelConfig) -> Result<Tiling> {
    if config.select == SelectStrategy::Full {
        let expected = "`default`: a class row has no place among tiles";
        return Err(root.error("vision_feature_select_strategy", expected));
    }
    let vision = config.vision.as_ref().ok_or_else(|| root.error("vision_config", "a vision tower"))?;
    let pinpoints = pinpoints(root)?.unwrap_or(DEFAULT.to_vec());
    let resolutions = pinpoints.into_iter().map(|(height, width)| (width, height)).collect();
    tiling(root, vision, resolutions, Merge::SpatialUnpad { rounded: true })
}

/// The tiling of a configuration in the original layout, whose pinpoints are (width, height) and may be
/// written as a string; `None` unless its `image_aspect_ratio` is `anyres`.
///
/// # Errors
/// A configuration that says anyres, with pinpoints or a way of merging tiles that cannot be used.
pub fn original_tiling(root: &Section, vision: &VisionConfig) -> Result<Option<Tiling>> {
    if root.string("image_aspect_ratio")? != Some("anyres") {
        return Ok(None);
    }
    let merges = [
        ("flat", Merge::Flat),
        ("spatial", Merge::Spatial),
        ("spatial_unpad", Merge::SpatialUnpad { rounded: false }),
    ];
    let merge = root.choice("mm_patch_merge_type", "flat", &merges)?;
    let resolutions = pinpoints(root)?.unwrap_or_default();
    tiling(root, vision, resolutions, merge).map(Some)
}

/// Checks that a `preprocessor_config.json` cuts the tiles that the model was configured for: transformers
/// reads pinpoints from both files, and fails later where they differ.
///
/// # Errors
/// Pinpoints that are malformed, or other ones than `tiling` has.
pub fn check_processor_tiling(root: &Section, tiling: &Tiling) -> Result<()> {
    let turned = |&(width, height): &(usize, usize)| (height, width);
    let expected: Vec<_> = tiling.resolutions().iter().map(turned).collect();
    match pinpoints(root)? {
        Some(found) if found != expected => {
            Err(root.error(PINPOINTS, format!("the same as in config.json, {expected:?}")))
        }
        _ => Ok(()),
    }
}

/// Checks that a `processor_config.json` counts the tokens of a picture as the model does.
///
/// # Errors
/// Another patch size or strategy than `config.json` has. (`num_additional_image_tokens` is 1 for every CLIP tower,
/// whatever a file says: old ones leave it out.)
pub fn check_processor(root: &Section, config: &ModelConfig) -> Result<()> {
    let Some(vision) = &config.vision else { return Ok(()) };
    let (key, patch) = ("patch_size", vision.patch_size);
    if root.get(key).is_some_and(|found| found.as_u64() != Some(patch as u64)) {
        return Err(root.error(key, format!("{patch}, as in config.json")));
    }
    let strategy = match config.select {
        SelectStrategy::Default => "default",
        SelectStrategy::Full => "full",
    };
    root.choice("vision_feature_select_strategy", strategy, &[(strategy, ())])
}

fn tiling(
    root: &Section,
    vision: &VisionConfig,
    resolutions: Vec<(usize, usize)>,
    merge: Merge,
) -> Result<Tiling> {
    Tiling::new(resolutions, vision.image_size, vision.grid(), merge)
        .map_err(|expected| root.error(PINPOINTS, expected))
}

/// Pairs of numbers in the order of the file: a list, or a string that holds one as Python writes it.
fn pinpoints(root: &Section) -> Result<Option<Vec<(usize, usize)>>> {
    let written = match root.get(PINPOINTS) {
        None => return Ok(None),
        Some(Value::String(text)) => {
            serde_json::from_str(&text.replace('(', "[").replace(')', "]")).unwrap_or_default()
        }
        Some(value) => value.clone(),
    };
    let number = |value: &Value| usize::try_from(value.as_u64()?).ok();
    let pair = |value: &Value| match value.as_array()?.as_slice() {
        [a, b] => Some((number(a)?, number(b)?)),
        _ => None,
    };
    let pairs = written.as_array().and_then(|pairs| pairs.iter().map(pair).collect());
    pairs.map(Some).ok_or_else(|| root.error(PINPOINTS, "a list of pairs of whole numbers"))
}
