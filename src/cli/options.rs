//! Options that several commands share, and what the library makes of them.

use super::progress;
use crate::error::Result;
use crate::input::image::ImageMode;
use crate::model::checkpoint::LoadMode;
use crate::model::config::Reference;
use crate::model::lora::Lora;
use crate::model::parts::TowerSearch;
use crate::runtime::{Device, DeviceOptions, LoadOptions, Sampling, SessionOptions, Source};
use crate::tensor::DType;
use clap::{Args, ValueEnum};
use std::path::PathBuf;

/// Which model, and how it is loaded.
#[derive(Debug, Args)]
pub struct ModelArgs {
    /// `demo` (built in), a checkpoint directory, or `preset:NAME` (random weights)
    #[arg(long, default_value = "demo")]
    pub model: String,
    /// The model that an adapter or a projector given as --model was trained over
    #[arg(long, value_name = "DIR")]
    pub base: Option<PathBuf>,
    /// An adapter (peft) laid over the model, with a factor for its effect; may be given several times
    #[arg(long, value_name = "DIR[:SCALE]", value_parser = parse_lora)]
    pub lora: Vec<Lora>,
    /// Where the model runs
    #[arg(long, value_name = "auto|cpu|cuda[:N]|emu", default_value_t = Device::Auto)]
    pub device: Device,
    /// Threads of the CPU backend, and of what the host does beside a GPU [default: one for each core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// Map weight files, or read them (for files that may change meanwhile) [default: mmap]
    #[arg(long, value_enum)]
    pub load_mode: Option<Load>,
    /// A conversation style (vicuna; llava_v0, llava_v1, vicuna_v1, llava_llama_2, llava_llama_3, mistral_instruct,
    /// chatml_direct, plain and others of the original's names) or a Jinja file, instead of the checkpoint's
    #[arg(long, value_name = "NAME|FILE")]
    pub template: Option<String>,
    #[command(flatten)]
    pub pictures: PictureArgs,
    /// What a GPU computes in [auto: as stored, bf16 for f32]; the dtype of a preset's weights [auto: f16]
    #[arg(long, value_enum, default_value_t = Dtype::Auto)]
    pub dtype: Dtype,
    /// Wait for every op on a GPU, so that an error names the one that made it
    #[arg(long)]
    pub check_launches: bool,
}

/// How pictures are read, and by whose rules.
#[derive(Debug, Args)]
pub struct PictureArgs {
    /// What happens to pictures that are not square [auto: as the checkpoint says]
    #[arg(long, value_enum, default_value_t = Mode::Auto)]
    pub image_mode: Mode,
    /// The vision tower of an original LLaVA [default: found beside the model or in the Hugging Face cache]
    #[arg(long, value_name = "DIR")]
    pub vision_tower: Option<PathBuf>,
    /// Whose rules hold where programs differ: EXIF, pad or crop, the order of pinpoints, text beside pictures, what
    /// a repetition penalty counts [auto: those the checkpoint was made for]
    #[arg(long, value_enum, default_value_t = Rules::Auto)]
    pub reference: Rules,
}

/// How large a session is.
#[derive(Debug, Args)]
pub struct SessionArgs {
    /// Most positions of the conversation [default: what the model was made for, at most 4096]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub context: Option<usize>,
    /// Memory of the KV cache, as 512MiB or 2G [default: enough for --context]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub kv_memory: Option<u64>,
    /// Most prompt positions processed at once
    #[arg(long, value_name = "N", allow_negative_numbers = true, default_value_t = SessionOptions::default().prefill_chunk)]
    pub prefill_chunk: usize,
}

/// How tokens are chosen.
#[derive(Debug, Args)]
pub struct SamplingArgs {
    /// 0 is greedy [default: 0, or 1 if another sampling option is given]
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    pub temperature: Option<f32>,
    /// Keep the K most probable tokens
    #[arg(long, value_name = "K", allow_negative_numbers = true)]
    pub top_k: Option<u32>,
    /// Keep the most probable tokens up to this much probability
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub top_p: Option<f32>,
    /// Drop tokens less probable than this fraction of the most probable
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub min_p: Option<f32>,
    /// Above 1: make tokens of the prompt and the answer less probable
    #[arg(long, value_name = "R", allow_negative_numbers = true)]
    pub repetition_penalty: Option<f32>,
    /// The same seed gives the same text [default: from the clock, and printed]
    #[arg(long, value_name = "S", allow_negative_numbers = true)]
    pub seed: Option<u64>,
}

/// `--load-mode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Load {
    /// Map files and use them in place.
    Mmap,
    /// Read files into memory.
    Read,
}

/// `--image-mode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// As the checkpoint says.
    Auto,
    /// Resize the shorter side, cut the longer one.
    Crop,
    /// Put the picture on a square.
    Pad,
}

/// `--reference`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Rules {
    /// As the checkpoint's layout says.
    Auto,
    /// Those of Hugging Face's transformers.
    #[value(name = "hf", alias = "transformers")]
    Transformers,
    /// Those of the code LLaVA was published with.
    Original,
}

/// `--dtype`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Dtype {
    /// As the checkpoint says; f16 for presets.
    Auto,
    /// bfloat16.
    Bf16,
    /// IEEE half.
    F16,
}

impl From<Load> for LoadMode {
    fn from(load: Load) -> Self {
        match load {
            Load::Mmap => LoadMode::Mmap,
            Load::Read => LoadMode::Read,
        }
    }
}

impl Dtype {
    /// The dtype asked for.
    pub fn given(self) -> Option<DType> {
        match self {
            Dtype::Auto => None,
            Dtype::F16 => Some(DType::F16),
            Dtype::Bf16 => Some(DType::BF16),
        }
    }

    /// The dtype of random weights.
    pub fn weights(self) -> DType {
        self.given().unwrap_or(DType::F16)
    }
}

impl ModelArgs {
    /// The model's source and how to load it.
    pub fn load_options(&self) -> Result<(Source, LoadOptions)> {
        let source = Source::parse(&self.model)?;
        let options = LoadOptions {
            load_mode: self.load_mode.unwrap_or(Load::Mmap).into(),
            base: self.base.clone(),
            lora: self.lora.clone(),
            device: DeviceOptions {
                device: self.device,
                dtype: self.dtype.given(),
                check_launches: self.check_launches,
            },
            threads: self.threads.map(usize::from),
            template: self.template.clone(),
            preset_dtype: self.dtype.weights(),
            progress: Some(progress::making_weights()),
            ..LoadOptions::default()
        };
        Ok((source, self.pictures.apply(options)))
    }

    /// Whether times tell anything: those of the emulated device do not.
    pub fn times(&self) -> bool {
        self.device != Device::Emu
    }
}

impl PictureArgs {
    /// `options` with what is asked for here.
    pub fn apply(&self, options: LoadOptions) -> LoadOptions {
        LoadOptions {
            image_mode: match self.image_mode {
                Mode::Auto => None,
                Mode::Crop => Some(ImageMode::Crop),
                Mode::Pad => Some(ImageMode::Pad),
            },
            reference: match self.reference {
                Rules::Auto => None,
                Rules::Transformers => Some(Reference::Transformers),
                Rules::Original => Some(Reference::Original),
            },
            tower: TowerSearch { given: self.vision_tower.clone(), hub_cache: hub_cache() },
            ..options
        }
    }
}

/// Where `huggingface-cli download` puts what it downloads.
fn hub_cache() -> Option<PathBuf> {
    let dir = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let home = || {
        let cache = dir("XDG_CACHE_HOME").or_else(|| Some(dir("HOME")?.join(".cache")))?;
        Some(cache.join("huggingface"))
    };
    dir("HF_HUB_CACHE").or_else(|| Some(dir("HF_HOME").or_else(home)?.join("hub")))
}

impl SessionArgs {
    /// The session's size.
    pub fn session_options(&self) -> SessionOptions {
        SessionOptions {
            context: self.context,
            kv_memory: self.kv_memory,
            prefill_chunk: self.prefill_chunk,
            // A command line runs one sequence at a time.
            max_sequences: 1,
            ..SessionOptions::default()
        }
    }
}

impl SamplingArgs {
    /// Greedy, unless an option says otherwise; then the seed is drawn if none is given.
    ///
    /// # Errors
    /// [`Error::Option`] for a value out of range.
    pub fn sampling(&self) -> Result<Sampling> {
        let drawn = self.top_k.is_some() || self.top_p.is_some() || self.min_p.is_some();
        let sampled = drawn || self.seed.is_some();
        let greedy = Sampling::GREEDY;
        let sampling = Sampling {
            temperature: self.temperature.unwrap_or(if sampled { 1.0 } else { 0.0 }),
            top_k: self.top_k.unwrap_or(greedy.top_k),
            top_p: self.top_p.unwrap_or(greedy.top_p),
            min_p: self.min_p.unwrap_or(greedy.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(greedy.repetition_penalty),
            seed: self.seed.unwrap_or_else(clock_seed),
        };
        sampling.validate()?;
        Ok(sampling)
    }
}

/// A seed that differs from run to run; short, because people copy it.
fn clock_seed() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    (now.as_nanos() as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40
}

/// `DIR` or `DIR:SCALE`.
pub fn parse_lora(text: &str) -> std::result::Result<Lora, String> {
    Lora::parse(text).map_err(|error| error.to_string())
}

/// Bytes from `1073741824`, `512MiB`, `512M`, `2GB`: K, M, G and T are powers of 1024, with or without
/// `iB`; `KB` and its like are powers of 1000.
pub fn parse_size(text: &str) -> std::result::Result<u64, String> {
    let expected = || format!("expected a size such as 512MiB, 2G or 1000000, found {text:?}");
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: f64 = number.parse().map_err(|_| expected())?;
    let unit = unit.trim().to_ascii_lowercase();
    let power = match unit.chars().next() {
        None | Some('b') => 0,
        Some(prefix) => 1 + "kmgt".find(prefix).ok_or_else(expected)? as i32,
    };
    let base: f64 = match unit.get(power.min(1) as usize..) {
        Some("") | Some("ib") => 1024.0,
        Some("b") => 1000.0,
        _ => return Err(expected()),
    };
    let bytes = number * base.powi(power);
    if bytes >= u64::MAX as f64 { Err(expected()) } else { Ok(bytes as u64) }
}

/// Bytes for people.
pub fn format_size(bytes: u64) -> String {
    match bytes {
        0..1024 => format!("{bytes} B"),
        1024..0x10_0000 => format!("{:.1} KiB", bytes as f64 / 1024.0),
        0x10_0000..0x4000_0000 => format!("{:.1} MiB", bytes as f64 / (1 << 20) as f64),
        _ => format!("{:.2} GiB", bytes as f64 / (1 << 30) as f64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        let good = [
            ("123", 123),
            ("123b", 123),
            ("2k", 2048),
            ("2KiB", 2048),
            ("2kb", 2000),
            ("1.5G", 3 << 29),
            ("1 GiB", 1 << 30),
            ("3TB", 3_000_000_000_000),
        ];
        for (text, bytes) in good {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "x", "1x", "-1", "1.2.3", "1kk", "1kib2", "99999999999T"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
