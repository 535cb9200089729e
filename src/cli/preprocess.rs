//! `tessera preprocess`: the pixels that the vision tower would see, and their hash.

use super::dump::Dump;
use super::options::PictureArgs;
use crate::error::Result;
use crate::input::image::{self, pixels_sha256};
use crate::runtime::{LoadOptions, Source, pictures};
use clap::Args;
use serde_json::json;
use std::path::PathBuf;

/// Options of `tessera preprocess`.
#[derive(Debug, Args)]
pub struct Preprocess {
    /// The model whose preprocessing applies: `demo`, a checkpoint directory, or `preset:NAME`
    #[arg(long, default_value = "demo")]
    model: String,
    /// The model that an adapter or a projector given as --model was trained over
    #[arg(long, value_name = "DIR")]
    base: Option<PathBuf>,
    /// A picture; may be given several times
    #[arg(long, value_name = "FILE", required = true)]
    image: Vec<PathBuf>,
    #[command(flatten)]
    pictures: PictureArgs,
    /// Write `pixel_values` f32 to a safetensors file: [n,3,S,S], or [n,squares,3,S,S] for LLaVA-NeXT
    #[arg(long, value_name = "FILE.safetensors")]
    out: Option<PathBuf>,
    /// Print one JSON object for each picture
    #[arg(long)]
    json: bool,
}

impl Preprocess {
    pub fn run(self) -> Result<()> {
        let options = self.pictures.apply(LoadOptions { base: self.base.clone(), ..LoadOptions::default() });
        let (decode, processor, config) = pictures::load_preprocess(&Source::parse(&self.model)?, &options)?;
        let (side, tiled) = (processor.side(), config.tiling.is_some());
        let out = self.out.as_deref().map(Dump::create).transpose()?;
        let mut all = Vec::new();
        for path in &self.image {
            let name = path.display().to_string();
            let picture = image::decode(&name, &super::read(path)?, &decode)?;
            let pixels = processor.pixels(&picture)?;
            let hash = pixels_sha256(&pixels);
            let (width, height) = (picture.width, picture.height);
            let squares = processor.squares(width, height);
            let tokens = config.image_tokens(width, height);
            super::print(&match self.json {
                true => {
                    let mode = match tiled {
                        true => "anyres".into(),
                        false => format!("{:?}", processor.mode).to_lowercase(),
                    };
                    let object = json!({
                        "file": name, "width": width, "height": height, "side": side, "squares": squares,
                        "tokens": tokens, "image_mode": mode, "pixels_sha256": hash,
                    });
                    format!("{object}\n")
                }
                false => {
                    let squares = if tiled { format!("{squares}x") } else { String::new() };
                    format!(
                        "{hash}  {name} ({width}x{height} -> {squares}3x{side}x{side}), {tokens} tokens\n"
                    )
                }
            })?;
            if out.is_some() {
                all.push(pixels);
            }
        }
        out.map_or(Ok(()), |out| out.write_pixels(side, tiled, &all))
    }
}
