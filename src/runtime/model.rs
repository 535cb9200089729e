//! A model: what a checkpoint says and holds, ready to be run by any number of sessions.

use super::device::DeviceOptions;
use crate::backend::Backend;
use crate::backend::cpu::physical_memory;
use crate::error::{Error, Result};
use crate::folder::Folder;
use crate::graph::Graph;
use crate::input::image::{ImageMode, Preprocess};
use crate::input::prompt::{ChatTemplate, Prompter};
use crate::model::checkpoint::LoadMode;
use crate::model::config::{GenerationConfig, ModelConfig};
use crate::model::json;
use crate::model::llama::Llama;
use crate::model::llava::{self, Language, Vision};
use crate::model::preset::Preset;
use crate::model::weights::{TensorInfo, Weights};
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
    /// Where it runs.
    pub device: DeviceOptions,
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
            device: DeviceOptions::default(),
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
    /// Loads a model. On the CPU weight files are mapped, not read: this takes milliseconds however large they
    /// are. A GPU's memory is filled from them.
    ///
    /// # Errors
    /// Whatever is wrong with the files or the options, named.
    pub fn load(source: &Source, options: &LoadOptions) -> Result<Self> {
        let backend = options.device.open(options.threads, || stored_dtype(source, options))?;
        Model::load_on(backend, source, options)
    }

    /// Loads a model onto a device.
    ///
    /// # Errors
    /// As for [`load`](Model::load).
    pub fn load_on(backend: Arc<dyn Backend>, source: &Source, options: &LoadOptions) -> Result<Self> {
        let folder = source.existing_folder()?;
        let (config, generation, weights) = match source {
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
        check_fit(&*backend, source, &weights)?;
        let vision = llava::vision(&*backend, &config, &weights)?;
        let language = llava::language(&*backend, &config, &weights)?;
        let mut preprocess = preprocess_of(source, &config)?;
        if let (Some(processor), Some(mode)) = (&mut preprocess, options.image_mode) {
            processor.mode = mode;
        }
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

/// The dtype that a model's weights are in, as far as it says.
fn stored_dtype(source: &Source, options: &LoadOptions) -> Result<Option<DType>> {
    match source {
        Source::Preset(_) => Ok(Some(options.preset_dtype)),
        Source::Demo | Source::Directory(_) => Ok(ModelConfig::load(&source.existing_folder()?)?.dtype),
    }
}

/// Refuses weights that will not fit before the first of them is copied.
fn check_fit(backend: &dyn Backend, source: &Source, weights: &Weights) -> Result<()> {
    let Some(available) = backend.available()? else { return Ok(()) };
    let bytes = |tensor: &TensorInfo| {
        let elements = tensor.bytes / tensor.weight_dtype().map_or(1, DType::size);
        (elements * backend.dtype().size()) as u64
    };
    let needed = weights.tensors().iter().map(bytes).sum();
    if needed > available {
        let (what, remedy) = (format!("the weights of {source}"), " on the device".into());
        return Err(Error::Memory { what, needed, available, remedy });
    }
    Ok(())
}

/// How pictures become pixels for a model that is not loaded: only its configuration files are read.
///
/// # Errors
/// As for [`Model::load`]; [`Error::Prompt`] for a text model.
pub fn load_preprocess(source: &Source) -> Result<Preprocess> {
    let config = match source {
        Source::Preset(preset) => preset.config(DType::F16)?,
        Source::Demo | Source::Directory(_) => ModelConfig::load(&source.existing_folder()?)?,
    };
    preprocess_of(source, &config)?
        .ok_or_else(|| Error::Prompt(format!("{source} is a text model; it takes no pictures")))
}

/// How pictures become pixels; `None` for a text model.
///
/// # Errors
/// A configuration that cannot be used, or one whose pixels would not fit the tower.
fn preprocess_of(source: &Source, config: &ModelConfig) -> Result<Option<Preprocess>> {
    let Some(vision) = &config.vision else { return Ok(None) };
    const FILE: &str = "preprocessor_config.json";
    let folder = source.folder();
    let processor = match source {
        Source::Preset(_) => None,
        Source::Demo | Source::Directory(_) => json::find_object(&folder, FILE)?,
    };
    let file = folder.path(FILE);
    let processor = match processor {
        None => Preprocess::clip(vision.image_size),
        Some(map) => Preprocess::from_json(&file, &map.into())?,
    };
    if processor.side() != vision.image_size {
        return Err(Error::Config {
            file,
            key: "crop_size".into(),
            expected: format!("{}, the image_size of the vision tower", vision.image_size),
            found: processor.side().to_string(),
        });
    }
    Ok(Some(processor))
}
