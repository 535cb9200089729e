//! `tessera preprocess`: the pixels that the vision tower would see, and their hash.

use super::dump;
use super::options::PictureArgs;
use crate::error::Result;
use crate::input::image::{self, pixels_sha256};
use crate::runtime::{LoadOptions, Source, model};
use clap::Args;
use serde_json::json;
use std::path::PathBuf;

/// Options of `tessera preprocess`.
#[derive(Debug, Args)]
pub struct Preprocess {
    /// The model whose preprocessing applies: `demo`, a checkpoint directory, or `preset:NAME`
    #[arg(long, default_value = "demo")]
    model: String,
    /// A picture; may be given several times
    #[arg(long, value_name = "FILE", required = true)]
    image: Vec<PathBuf>,
    #[command(flatten)]
    pictures: PictureArgs,
    /// Write `pixel_values` [n,3,S,S] f32 to a safetensors file
    #[arg(long, value_name = "FILE.safetensors")]
    out: Option<PathBuf>,
    /// Print one JSON object for each picture
    #[arg(long)]
    json: bool,
}

impl Preprocess {
    pub fn run(self) -> Result<()> {
        let options = self.pictures.apply(LoadOptions::default());
        let (decode, processor) = model::load_preprocess(&Source::parse(&self.model)?, &options)?;
        let side = processor.side();
        let mut all = Vec::with_capacity(self.image.len());
        for path in &self.image {
            let name = path.display().to_string();
            let picture = image::decode(&name, &super::read(path)?, &decode)?;
            let mut pixels = vec![0f32; 3 * side * side];
            processor.pixels(&picture, &mut pixels)?;
            let hash = pixels_sha256(&pixels);
            let (width, height) = (picture.width, picture.height);
            super::print(&match self.json {
                true => {
                    let mode = format!("{:?}", processor.mode).to_lowercase();
                    let object = json!({
                        "file": name, "width": width, "height": height,
                        "side": side, "image_mode": mode, "pixels_sha256": hash,
                    });
                    format!("{object}\n")
                }
                false => format!("{hash}  {name} ({width}x{height} -> 3x{side}x{side})\n"),
            })?;
            all.push(pixels);
        }
        match &self.out {
            Some(path) => dump::write_pixels(path, side, &all),
            None => Ok(()),
        }
    }
}
