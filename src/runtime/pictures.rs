//! How a model's pictures become pixels: what the checkpoint's files say, the rules of the code that is followed, and
//! the options.
//!
//! The settings of the image processor are, as in transformers: `image_processor` in `processor_config.json` (since
//! transformers 5), else `preprocessor_config.json`, else CLIP's own. Of an original LLaVA they are those of its
//! tower's folder, if it has any. How many tokens a picture takes, and which pinpoints there are, `config.json` says
//! alone; where the processor's files say something else, transformers would fail later, and this does now.

use super::model::{LoadOptions, Source};
use super::rules::Rules;
use crate::error::{Error, Result};
use crate::folder::Folder;
use crate::input::image::{DecodeOptions, Preprocess};
use crate::model::config::{ModelConfig, Reference, check_processor, check_processor_tiling};
use crate::model::json::{self, Section};
use crate::model::parts::Parts;
use serde_json::{Map, Value};
use std::path::PathBuf;

/// How the bytes of pictures are read and become pixels for a model that is not loaded, and its configuration:
/// only configuration files are read.
///
/// # Errors
/// As for [`Model::load`](super::Model::load); [`Error::Prompt`] for a text model.
pub fn load_preprocess(
    source: &Source,
    options: &LoadOptions,
) -> Result<(DecodeOptions, Preprocess, ModelConfig)> {
    let parts = source.parts(options)?;
    let (config, rules) = settle(&parts, parts.config()?, options)?;
    let processor = preprocess(&parts, &config, &rules, options)?
        .ok_or_else(|| Error::Prompt(format!("{source} is a text model; it takes no pictures")))?;
    Ok((rules.decode_options(), processor, config))
}

/// The rules that hold for a model, and its configuration under them, which the processor's files must not contradict.
pub(super) fn settle(
    parts: &Parts,
    mut config: ModelConfig,
    options: &LoadOptions,
) -> Result<(ModelConfig, Rules)> {
    if config.reference == Reference::Transformers {
        check(parts.folder(), &config)?;
    }
    let rules = Rules::of(&config, options.reference);
    config.tiling = rules.tiling(config.tiling, options.image_mode);
    Ok((config, rules))
}

/// How pictures become pixels; `None` for a text model.
///
/// # Errors
/// A configuration that cannot be used, or one whose pixels would not fit the tower.
pub(super) fn preprocess(
    parts: &Parts,
    config: &ModelConfig,
    rules: &Rules,
    options: &LoadOptions,
) -> Result<Option<Preprocess>> {
    let Some(vision) = &config.vision else { return Ok(None) };
    let folders = parts.tower().into_iter().chain([parts.folder()]);
    let mut processor = processor_in(folders, vision.image_size, options)?;
    processor.mode = options.image_mode.unwrap_or_else(|| rules.image_mode(processor.mode));
    processor.tiling = config.tiling.clone();
    Ok(Some(processor))
}

/// How pictures become pixels for a tower that reads squares of `image_size`, as the first of `folders` that
/// says so has it.
///
/// # Errors
/// A configuration that cannot be used, or one whose pixels would not fit the tower.
pub(super) fn processor_in<'a>(
    folders: impl IntoIterator<Item = &'a Folder>,
    image_size: usize,
    options: &LoadOptions,
) -> Result<Preprocess> {
    let mut found = None;
    for folder in folders {
        let Some((file, map)) = settings(folder)? else { continue };
        let processor = Preprocess::from_json(&file, &map.into())?;
        if processor.side() != image_size {
            return Err(Error::Config {
                file,
                key: "crop_size".into(),
                expected: format!("{image_size}, the image_size of the vision tower"),
                found: processor.side().to_string(),
            });
        }
        found = Some(processor);
        break;
    }
    let mut processor = found.unwrap_or_else(|| Preprocess::clip(image_size));
    processor.threads = options.host_threads();
    Ok(processor)
}

const PROCESSOR: &str = "processor_config.json";

/// The settings of the image processor in `folder`, and the file that they stand in.
fn settings(folder: &Folder) -> Result<Option<(PathBuf, Map<String, Value>)>> {
    const NESTED: &str = "image_processor";
    if let Some(map) = json::find_object(folder, PROCESSOR)? {
        let file = folder.path(PROCESSOR);
        if let Some(section) = Section::root(&file, &map).child(NESTED, "image_processor.")? {
            return Ok(Some((file.clone(), section.map().clone())));
        }
    }
    const FILE: &str = "preprocessor_config.json";
    Ok(json::find_object(folder, FILE)?.map(|map| (folder.path(FILE), map)))
}

/// Checks what the processor's files say of tiles and tokens against `config.json`.
fn check(folder: &Folder, config: &ModelConfig) -> Result<()> {
    if let Some(map) = json::find_object(folder, PROCESSOR)? {
        check_processor(&Section::root(&folder.path(PROCESSOR), &map), config)?;
    }
    match (settings(folder)?, &config.tiling) {
        (Some((file, map)), Some(tiling)) => check_processor_tiling(&Section::root(&file, &map), tiling),
        _ => Ok(()),
    }
}
