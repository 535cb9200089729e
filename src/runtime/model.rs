//! A model: what a checkpoint says and holds, ready to be run by any number of sessions.

use super::device::DeviceOptions;
use super::pictures;
use super::rules::Rules;
use crate::backend::cpu::usable_memory;
use crate::backend::{Backend, Ceilings};
use crate::error::{Error, Result};
use crate::folder::Folder;
use crate::graph::Graph;
use crate::input::image::{DecodeOptions, ImageMode, Picture, Preprocess, decode};
use crate::input::prompt::{ChatTemplate, Original, Prompter};
use crate::model::checkpoint::LoadMode;
use crate::model::config::{ClipConfig, GenerationConfig, ModelConfig, Reference};
use crate::model::json;
use crate::model::llama::Llama;
use crate::model::llava::{self, Language, Vision};
use crate::model::lora::Lora;
use crate::model::parts::{Parts, TowerSearch};
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
    /// Where its files are, those of a preset but for the weights; an error for a directory that is not there:
    /// most likely a name misspelt.
    pub(super) fn folder(&self, options: &LoadOptions) -> Result<Folder> {
        match self {
            Source::Demo => Ok(DEMO),
            Source::Preset(preset) => Ok(preset.folder(options.preset_dtype)),
            Source::Directory(dir) if !dir.is_dir() => Err(Error::checkpoint(
                dir,
                "is not a directory; a model is `demo`, `preset:NAME` or a checkpoint directory",
            )),
            Source::Directory(dir) => Ok(dir.into()),
        }
    }

    /// The folders of the model, and its adapters.
    pub(super) fn parts(&self, options: &LoadOptions) -> Result<Parts> {
        let base = options.base.as_deref();
        Parts::find(&self.folder(options)?, base, &options.lora, &options.tower)
    }

    /// Whether this is a CLIP by itself, as far as its `config.json` says: a model for
    /// [`Clip`](super::Clip), not for [`Model`].
    ///
    /// # Errors
    /// A `config.json` that is missing or malformed.
    pub fn is_clip(&self) -> Result<bool> {
        match self {
            Source::Demo => Ok(false),
            Source::Preset(preset) => Ok(preset.is_clip()),
            // An adapter has no configuration of its own but LLaVA's.
            Source::Directory(dir) if dir.join("adapter_config.json").is_file() => Ok(false),
            Source::Directory(_) => {
                let folder = self.folder(&LoadOptions::default())?;
                Ok(ClipConfig::is_clip(&json::read_object(&folder, "config.json")?))
            }
        }
    }

    /// The weights in `folder`, or those that a preset makes.
    pub(super) fn weights(&self, folder: &Folder, options: &LoadOptions) -> Result<Weights> {
        match self {
            Source::Preset(preset) => preset_weights(preset, options),
            Source::Demo | Source::Directory(_) => Weights::open(folder, options.load_mode),
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
            Source::Preset(preset) => preset.fmt(f),
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
    /// Threads of the CPU backend, and of what the host does for any device; `None` takes one for each core.
    pub threads: Option<usize>,
    /// The language model's folder, if the source is an adapter or a projector that was trained over it.
    pub base: Option<PathBuf>,
    /// Where the vision tower of an original LLaVA is.
    pub tower: TowerSearch,
    /// A chat template by name or file, instead of the checkpoint's own.
    pub template: Option<String>,
    /// Crop or pad, instead of what the checkpoint says. A model that sees tiles then sees one square and
    /// nothing else, as the original code does with `image_aspect_ratio` square or pad: fewer tokens, less
    /// to read small print from.
    pub image_mode: Option<ImageMode>,
    /// Whose code to agree with where transformers and the original differ, instead of what the
    /// checkpoint's layout says.
    pub reference: Option<Reference>,
    /// The dtype of a preset's weights.
    pub preset_dtype: DType,
    /// Whether a preset's weights are drawn. Without, they are zero and take no memory, so that a model
    /// larger than the machine can be described.
    pub preset_values: bool,
    /// The seed of a preset's weights.
    pub preset_seed: u64,
    /// Adapters that are laid beside the weights; several add up. One that LLaVA's own training left makes a LLaVA
    /// of a bare language model.
    pub lora: Vec<Lora>,
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

impl LoadOptions {
    /// Threads of the host: as many as are asked for, or one for each core.
    pub(super) fn host_threads(&self) -> usize {
        self.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |n| n.get()))
    }
}

impl Default for LoadOptions {
    fn default() -> Self {
        LoadOptions {
            load_mode: LoadMode::Mmap,
            device: DeviceOptions::default(),
            threads: None,
            base: None,
            tower: TowerSearch::default(),
            template: None,
            image_mode: None,
            reference: None,
            preset_dtype: DType::F16,
            preset_values: true,
            preset_seed: 0,
            lora: Vec::new(),
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
    rules: Rules,
    tower: Option<Folder>,
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
        let backend = options.device.open(options.threads, || Ok(source.parts(options)?.config()?.dtype))?;
        Model::load_on(backend, source, options)
    }

    /// Loads a model onto a device.
    ///
    /// # Errors
    /// As for [`load`](Model::load).
    pub fn load_on(backend: Arc<dyn Backend>, source: &Source, options: &LoadOptions) -> Result<Self> {
        let parts = source.parts(options)?;
        let config = parts.config()?;
        let mut generation = GenerationConfig::load(parts.base(), &config.text)?;
        let mut weights = parts.complete(source.weights(parts.base(), options)?, options.load_mode)?;
        let tower = parts.tower().filter(|folder| weights.comes_from("vision.", folder)).cloned();
        weights.adapt_all(parts.adapters(), options.load_mode)?;
        check_fit(&*backend, source, &weights)?;
        let (config, rules) = pictures::settle(&parts, config, options)?;
        let vision = llava::vision(&*backend, &config, &weights)?;
        let language = llava::language(&*backend, &config, &weights)?;
        let preprocess = pictures::preprocess(&parts, &config, &rules, options)?;
        let prompter = prompter_of(&parts, &config, &rules, options)?;
        if let Some(stop) = prompter.stop_token().filter(|stop| !generation.eos_token_ids.contains(stop)) {
            generation.eos_token_ids.push(stop);
        }
        Ok(Model {
            name: source.to_string(),
            rules,
            tower,
            config,
            generation,
            prompter,
            preprocess,
            weights,
            backend,
            vision,
            language,
        })
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
        decode(name, bytes, &self.decode_options())
    }

    /// What is done where transformers and the original LLaVA differ.
    pub fn rules(&self) -> &Rules {
        &self.rules
    }

    /// How the bytes of a picture are read.
    pub fn decode_options(&self) -> DecodeOptions {
        self.rules.decode_options()
    }

    /// The folder that the vision tower's weights come from, if it is another than the model's.
    pub fn tower_folder(&self) -> Option<&Folder> {
        self.tower.as_ref()
    }

    /// The tensors.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// Bytes of the weights that the graphs use.
    pub fn weight_bytes(&self) -> u64 {
        self.language().weight_bytes() + self.vision().map_or(0, |vision| vision.graph.weight_bytes())
    }

    /// What the device can do at most, on this model's own weights; see [`Backend::ceilings`].
    ///
    /// # Errors
    /// As there.
    pub fn ceilings(&self) -> Result<Option<Ceilings>> {
        self.backend.ceilings(self.weights.largest())
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

/// Random weights, unless they are more than the machine's memory.
fn preset_weights(preset: &Preset, options: &LoadOptions) -> Result<Weights> {
    if !options.preset_values {
        return preset.blank_weights(options.preset_dtype);
    }
    let total = preset.bytes(options.preset_dtype)?;
    let available = usable_memory();
    if available > 0 && total > available {
        return Err(Error::Memory {
            what: format!("the weights of {preset}"),
            needed: total,
            available,
            remedy: "; `tessera inspect` describes it without making it".into(),
        });
    }
    let progress = |done| options.progress.iter().for_each(|p| p.0(done, total));
    preset.weights(options.preset_dtype, options.preset_seed, options.host_threads(), &progress)
}

/// Tokenizer and template, as the checkpoint or the options have it.
fn prompter_of(
    parts: &Parts,
    config: &ModelConfig,
    rules: &Rules,
    options: &LoadOptions,
) -> Result<Prompter> {
    let (folder, vocab) = (parts.base(), config.text.vocab_size);
    let prompter = match config.reference {
        Reference::Transformers => {
            let prompter = Prompter::load(folder, vocab, config.image_token_id)?;
            if rules.cuts_text() { prompter.cut_at_pictures() } else { prompter }
        }
        Reference::Original => {
            let original = Original {
                names: parts.names(),
                picture_tokens: config.picture_tokens,
                whole: !rules.cuts_text(),
            };
            Prompter::load_original(folder, vocab, &original)?
        }
    };
    Ok(match &options.template {
        Some(template) => prompter.with_template(ChatTemplate::named(template, folder)?),
        None => prompter,
    })
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
