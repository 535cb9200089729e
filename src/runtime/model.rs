//! A model: what a checkpoint says and holds, ready to be run by any number of sessions.

use crate::backend::Backend;
use crate::backend::cpu::CpuBackend;
use crate::error::{Error, Result};
use crate::graph::Graph;
use crate::input::image::{ImageMode, Preprocess};
use crate::input::prompt::Prompter;
use crate::model::checkpoint::LoadMode;
use crate::model::config::{GenerationConfig, ModelConfig};
use crate::model::llama::Llama;
use crate::model::llava::{self, Language, Vision};
use crate::model::preset::Preset;
use crate::model::weights::Weights;
use crate::tensor::DType;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Where a model comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// The demo model, which is part of this library.
    Demo,
    /// A checkpoint directory, as a download from the Hub leaves it.
    Directory(PathBuf),
    /// Real dimensions, seeded random weights.
    Preset(Preset),
}

impl Source {
    /// Reads `demo`, `preset:NAME` or the path of a directory.
    ///
    /// # Errors
    /// [`Error::Option`] for a preset that does not exist.
    pub fn parse(text: &str) -> Result<Self> {
        match text.strip_prefix("preset:") {
            Some(name) => Ok(Source::Preset(Preset::parse(name)?)),
            None if text == "demo" => Ok(Source::Demo),
            None => Ok(Source::Directory(text.into())),
        }
    }
}

/// How a model is loaded.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Map weight files, or read them.
    pub load_mode: LoadMode,
    /// Threads of the CPU backend; `None` takes one for each core.
    pub threads: Option<usize>,
    /// A chat template by name or file, instead of the checkpoint's own.
    pub template: Option<String>,
    /// Crop or pad, instead of what the checkpoint says.
    pub image_mode: Option<ImageMode>,
    /// The dtype of a preset's weights.
    pub preset_dtype: DType,
    /// The seed of a preset's weights.
    pub preset_seed: u64,
}

impl Default for LoadOptions {
    fn default() -> Self {
        LoadOptions {
            load_mode: LoadMode::Mmap,
            threads: None,
            template: None,
            image_mode: None,
            preset_dtype: DType::F16,
            preset_seed: 0,
        }
    }
}
