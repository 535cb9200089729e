//! A model: what a checkpoint says and holds, ready to be run by any number of sessions.

use crate::backend::Backend;
use crate::backend::cpu::{CpuBackend, physical_memory};
use crate::error::{Error, Result};
use crate::folder::Folder;
use crate::graph::Graph;
use crate::input::image::{DecodeOptions, ImageMode, Picture, Preprocess, decode};
use crate::input::prompt::{ChatTemplate, Prompter};
use crate::model::checkpoint::LoadMode;
use crate::model::config::{GenerationConfig, ModelConfig, check_processor_tiling};
use crate::model::json::{self, Section};
use crate::model::llama::Llama;
use crate::model::llava::{self, Language, Vision};
use crate::model::preset::Preset;
use crate::model::weights::Weights;
use crate::tensor::DType;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

/// Where a model comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// The demo model, which is part of this library.
    Demo,
    /// A checkpoint directory, as a download from the Hub leaves it.
    Directory(PathBuf),
    /// Real dimensions, seeded random weights.
    Preset(&'static Preset),
}

/// The files of the demo model.
const DEMO: Folder = Folder::BuiltIn {
    name: "demo",
    files: &[
        ("config.json", include_bytes!("../../assets/demo/config.json")),
        ("generation_config.json", include_bytes!("../../assets/demo/generation_config.json")),
        ("preprocessor_config.json", include_bytes!("../../assets/demo/preprocessor_config.json")),
        ("processor_config.json", include_bytes!("../../assets/demo/processor_config.json")),
        ("tokenizer.json", include_bytes!("../../assets/demo/tokenizer.json")),
        ("tokenizer_config.json", include_bytes!("../../assets/demo/tokenizer_config.json")),
        ("special_tokens_map.json", include_bytes!("../../assets/demo/special_tokens_map.json")),
        ("chat_template.jinja", include_bytes!("../../assets/demo/chat_template.jinja")),
        ("model.safetensors", include_bytes!("../../assets/demo/model.safetensors")),
    ],
};

impl Source {
    /// Where its files are. A preset has a tokenizer at least: that of the demo model.
    pub fn folder(&self) -> Folder {
        match self {
            Source::Demo | Source::Preset(_) => DEMO,
            Source::Directory(dir) => Folder::Directory(dir.clone()),
        }
    }

    /// The same, or an error for a directory that is not there: most likely a name misspelt.
    fn existing_folder(&self) -> Result<Folder> {
        match self {
            Source::Directory(dir) if !dir.is_dir() => Err(Error::checkpoint(
                dir,
                "is not a directory; a model is `demo`, `preset:NAME` or a checkpoint directory",
            )),
            source => Ok(source.folder()),
        }
    }

    /// Reads `demo`, `preset:NAME` or the path of a directory.
    ///
    /// # Errors
    /// [`Error::Option`] for a preset that does not exist.
    pub fn parse(text: &str) -> Result<Self> {
        match text.strip_prefix("preset:") {
            Some(name) => Ok(Source::Preset(Preset::find(name)?)),
            None if text == "demo" => Ok(Source::Demo),
            None => Ok(Source::Directory(text.into())),
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Demo => f.write_str("demo"),
            Source::Directory(dir) => write!(f, "{}", dir.display()),
            Source::Preset(preset) => write!(f, "preset:{}", preset.name),
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
    /// Crop or pad, instead of what the checkpoint says. A model that sees tiles then sees one square and
    /// nothing else, as the original code does with `image_aspect_ratio` square or pad: fewer tokens, less
    /// to read small print from.
    pub image_mode: Option<ImageMode>,
    /// The dtype of a preset's weights.
    pub preset_dtype: DType,
    /// The seed of a preset's weights.
    pub preset_seed: u64,
    /// Told how many bytes of a preset's weights are made, and how many there will be.
    pub progress: Option<Progress>,
}

/// A callback that is given (done, all).
#[derive(Clone)]
pub struct Progress(pub Arc<dyn Fn(u64, u64) + Send + Sync>);

impl fmt::Debug for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Progress")
    }
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
            progress: None,
        }
    }
}

/// Configuration, tokenizer, graphs and weights: shared by sessions, never changed.
pub struct Model {
    name: String,
    config: ModelConfig,
    generation: GenerationConfig,
    prompter: Prompter,
    preprocess: Option<Preprocess>,
    weights: Weights,
    backend: Arc<dyn Backend>,
    vision: Option<Vision>,
    language: Language,
}

impl Model {
    /// Loads a model. Weight files are mapped, not read: this takes milliseconds however large they are.
    ///
    /// # Errors
    /// Whatever is wrong with the files or the options, named.
    pub fn load(source: &Source, options: &LoadOptions) -> Result<Self> {
        let backend: Arc<dyn Backend> = Arc::new(CpuBackend::new(options.threads)?);
        Model::load_on(backend, source, options)
    }

    /// Loads a model onto a device.
    ///
    /// # Errors
    /// As for [`load`](Model::load).
    pub fn load_on(backend: Arc<dyn Backend>, source: &Source, options: &LoadOptions) -> Result<Self> {
        let folder = source.existing_folder()?;
        let (mut config, generation, weights) = match source {
            Source::Preset(preset) => {
                let config = preset.config(options.preset_dtype)?;
                let generation = GenerationConfig {
                    eos_token_ids: config.text.eos_token_ids.clone(),
                    ..Default::default()
                };
                let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
                let total = preset.bytes(options.preset_dtype)?;
                let available = physical_memory();
                if available > 0 && total > available {
                    return Err(Error::Memory {
                        what: format!("the weights of {source}"),
                        needed: total,
                        available,
                        remedy: "; a checkpoint directory is mapped and needs less, see `tessera synth`"
                            .into(),
                    });
                }
                let progress = |done| options.progress.iter().for_each(|p| p.0(done, total));
                let weights =
                    preset.weights(options.preset_dtype, options.preset_seed, threads, &progress)?;
                (config, generation, weights)
            }
            Source::Demo | Source::Directory(_) => {
                let config = ModelConfig::load(&folder)?;
                let generation = GenerationConfig::load(&folder, &config.text)?;
                (config, generation, Weights::open(&folder, options.load_mode)?)
            }
        };
        leave_tiles_out(&mut config, options.image_mode);
        let vision = llava::vision(&*backend, &config, &weights)?;
        let language = llava::language(&*backend, &config, &weights)?;
        let preprocess = preprocess_of(source, &config, options.image_mode)?;
        let mut prompter = Prompter::load(&folder, config.text.vocab_size, config.image_token_id)?;
        if let Some(template) = &options.template {
            prompter = prompter.with_template(ChatTemplate::named(template, &folder)?);
        }
        let name = source.to_string();
        Ok(Model { name, config, generation, prompter, preprocess, weights, backend, vision, language })
    }

    /// What the model was called when it was loaded.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Dimensions and layout.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Tokens that end a text.
    pub fn eos_token_ids(&self) -> &[u32] {
        &self.generation.eos_token_ids
    }

    /// Template and tokenizer.
    pub fn prompter(&self) -> &Prompter {
        &self.prompter
    }

    /// How pictures become pixels.
    ///
    /// # Errors
    /// [`Error::Prompt`] for a text model.
    pub fn preprocess(&self) -> Result<&Preprocess> {
        self.preprocess
            .as_ref()
            .ok_or_else(|| Error::Prompt(format!("{} is a text model; it takes no pictures", self.name)))
    }

    /// A picture's upright RGB pixels. `name` is for messages only.
    ///
    /// # Errors
    /// [`Error::Image`]; [`Error::Prompt`] for a text model.
    pub fn decode(&self, name: &str, bytes: &[u8]) -> Result<Picture> {
        self.preprocess()?;
        decode(name, bytes, &DecodeOptions { exif_orientation: self.exif_orientation() })
    }

    /// Whether pictures are turned as their EXIF orientation says, as Hugging Face's loader does.
    pub fn exif_orientation(&self) -> bool {
        true
    }

    /// The tensors.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// Bytes of the weights that the graphs use.
    pub fn weight_bytes(&self) -> u64 {
        self.language().weight_bytes() + self.vision().map_or(0, |vision| vision.graph.weight_bytes())
    }

    /// The device.
    pub fn backend(&self) -> &Arc<dyn Backend> {
        &self.backend
    }

    /// Pixels to embedding rows, unless this is a text model.
    pub fn vision(&self) -> Option<&Vision> {
        self.vision.as_ref()
    }

    /// Ids to the next token.
    pub fn language(&self) -> &Arc<Graph> {
        &self.language.graph
    }

    /// The ends of the language graph.
    pub fn llama(&self) -> &Llama {
        &self.language.ends
    }
}

/// How pictures become pixels for a model that is not loaded, and its configuration: only configuration
/// files are read.
///
/// # Errors
/// As for [`Model::load`]; [`Error::Prompt`] for a text model.
pub fn load_preprocess(source: &Source, mode: Option<ImageMode>) -> Result<(Preprocess, ModelConfig)> {
    let mut config = match source {
        Source::Preset(preset) => preset.config(DType::F16)?,
        Source::Demo | Source::Directory(_) => ModelConfig::load(&source.existing_folder()?)?,
    };
    leave_tiles_out(&mut config, mode);
    let processor = preprocess_of(source, &config, mode)?
        .ok_or_else(|| Error::Prompt(format!("{source} is a text model; it takes no pictures")))?;
    Ok((processor, config))
}

/// Crop and pad are ways of making one square.
fn leave_tiles_out(config: &mut ModelConfig, mode: Option<ImageMode>) {
    if mode.is_some() {
        config.tiling = None;
    }
}

/// How pictures become pixels; `None` for a text model.
///
/// # Errors
/// A configuration that cannot be used, or one whose pixels would not fit the tower.
fn preprocess_of(
    source: &Source,
    config: &ModelConfig,
    mode: Option<ImageMode>,
) -> Result<Option<Preprocess>> {
    let Some(vision) = &config.vision else { return Ok(None) };
    const FILE: &str = "preprocessor_config.json";
    let folder = source.folder();
    let processor = match source {
        Source::Preset(_) => None,
        Source::Demo | Source::Directory(_) => json::find_object(&folder, FILE)?,
    };
    let file = folder.path(FILE);
    let mut processor = match processor {
        None => Preprocess::clip(vision.image_size),
        Some(map) => {
            if let Some(tiling) = &config.tiling {
                check_processor_tiling(&Section::root(&file, &map), tiling)?;
            }
            Preprocess::from_json(&file, &map.into())?
        }
    };
    if processor.side() != vision.image_size {
        return Err(Error::Config {
            file,
            key: "crop_size".into(),
            expected: format!("{}, the image_size of the vision tower", vision.image_size),
            found: processor.side().to_string(),
        });
    }
    processor.mode = mode.unwrap_or(processor.mode);
    processor.tiling = config.tiling.clone();
    Ok(Some(processor))
}
