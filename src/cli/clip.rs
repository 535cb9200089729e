//! `tessera classify` and `tessera embed`: CLIP by itself.

use super::dump::Dump;
use super::options::{Load, parse_lora};
use super::progress;
use crate::error::Result;
use crate::input::image::{self, DecodeOptions, Picture};
use crate::model::checkpoint::LoadMode;
use crate::model::lora::Lora;
use crate::runtime::{Clip, Device, DeviceOptions, Embedding, LoadOptions, Source, softmax};
use clap::Args;
use serde_json::json;
use std::path::{Path, PathBuf};

/// Which CLIP, and how it is loaded.
#[derive(Debug, Args)]
struct ClipArgs {
    /// The directory of a CLIP checkpoint, or `preset:NAME` (random weights)
    #[arg(long)]
    model: String,
    /// An adapter (peft) laid over the model, with a factor for its effect; may be given several times
    #[arg(long, value_name = "DIR[:SCALE]", value_parser = parse_lora)]
    lora: Vec<Lora>,
    /// Where the model runs
    #[arg(long, value_name = "auto|cpu|cuda[:N]|emu", default_value_t = Device::Auto)]
    device: Device,
    /// Threads of the CPU backend, and of what the host does beside a GPU [default: one for each core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Map weight files, or read them (for files that may change meanwhile)
    #[arg(long, value_enum, default_value_t = Load::Mmap)]
    load_mode: Load,
}

impl ClipArgs {
    fn load(&self) -> Result<Clip> {
        let options = LoadOptions {
            load_mode: LoadMode::from(self.load_mode),
            threads: self.threads.map(usize::from),
            lora: self.lora.clone(),
            device: DeviceOptions { device: self.device, ..DeviceOptions::default() },
            progress: Some(progress::making_weights()),
            ..LoadOptions::default()
        };
        Clip::load(&Source::parse(&self.model)?, &options)
    }
}

/// Options of `tessera classify`.
#[derive(Debug, Args)]
pub struct Classify {
    #[command(flatten)]
    model: ClipArgs,
    /// Pictures
    #[arg(long, value_name = "FILE", required = true, num_args = 1..)]
    image: Vec<PathBuf>,
    /// What a picture may show, each as `a photo of a cat`
    #[arg(long, value_name = "TEXT", required = true, num_args = 1..)]
    label: Vec<String>,
    /// Print one JSON object for each picture
    #[arg(long)]
    json: bool,
}

impl Classify {
    pub fn run(self) -> Result<()> {
        let mut clip = self.model.load()?;
        let labels = texts(&mut clip, &self.label)?;
        for path in &self.image {
            let (name, picture) = read(path)?;
            let embedding = clip.picture(&picture)?;
            let logits = clip.logits(&embedding, &labels)?;
            let mut ranked: Vec<_> = self.label.iter().zip(&logits).zip(softmax(&logits)).collect();
            ranked.sort_by(|a, b| b.1.total_cmp(&a.1));
            super::print(&match self.json {
                true => {
                    let labels: Vec<_> = ranked
                        .iter()
                        .map(|((label, logit), probability)| {
                            json!({"label": label, "probability": probability, "logit": logit})
                        })
                        .collect();
                    let (width, height) = (picture.width, picture.height);
                    let object = json!({"file": name, "width": width, "height": height, "labels": labels});
                    format!("{object}\n")
                }
                false => {
                    let lines = ranked
                        .iter()
                        .map(|((label, _), probability)| format!("{:6.2} %  {label}\n", 100.0 * probability));
                    format!("{name}\n{}", lines.collect::<String>())
                }
            })?;
        }
        Ok(())
    }
}

/// Options of `tessera embed`.
#[derive(Debug, Args)]
pub struct Embed {
    #[command(flatten)]
    model: ClipArgs,
    /// Pictures
    #[arg(long, value_name = "FILE", num_args = 1.., required_unless_present = "text", conflicts_with = "text")]
    image: Vec<PathBuf>,
    /// Texts
    #[arg(long, value_name = "TEXT", num_args = 1..)]
    text: Vec<String>,
    /// Write `image_embeds` or `text_embeds` [n,D] f32 to a safetensors file, instead of JSON lines to stdout
    #[arg(long, short, value_name = "FILE.safetensors")]
    out: Option<PathBuf>,
}

impl Embed {
    pub fn run(self) -> Result<()> {
        let mut clip = self.model.load()?;
        let out = self.out.as_deref().map(Dump::create).transpose()?;
        let mut rows = Vec::new();
        let mut tell = |key: &str, name: &str, embedding: Embedding| {
            if out.is_none() {
                super::print(&format!("{}\n", json!({key: name, "embedding": embedding.unit})))?;
            } else {
                rows.push(embedding.unit);
            }
            Ok(())
        };
        for path in &self.image {
            let (name, picture) = read(path)?;
            tell("file", &name, clip.picture(&picture)?)?;
        }
        for (text, embedding) in self.text.iter().zip(texts(&mut clip, &self.text)?) {
            tell("text", text, embedding)?;
        }
        let name = if self.image.is_empty() { "text_embeds" } else { "image_embeds" };
        out.map_or(Ok(()), |out| out.write_rows(name, &rows))
    }
}

/// The vectors of texts, with a warning for each that is too long.
fn texts(clip: &mut Clip, texts: &[String]) -> Result<Vec<Embedding>> {
    let mut embeddings = Vec::with_capacity(texts.len());
    for text in texts {
        let tokens = clip.tokens(text)?;
        if tokens.dropped > 0 {
            let (kept, all) = (tokens.ids.len(), tokens.ids.len() + tokens.dropped);
            let start: String = text.chars().take(40).collect();
            super::say(format_args!("warning: only the first {kept} of {all} tokens count of {start:?}..."));
        }
        embeddings.push(clip.ids(&tokens.ids)?);
    }
    Ok(embeddings)
}

/// A picture, upright, and what messages call it.
fn read(path: &Path) -> Result<(String, Picture)> {
    let name = path.display().to_string();
    let picture = image::decode(&name, &super::read(path)?, &DecodeOptions::default())?;
    Ok((name, picture))
}
