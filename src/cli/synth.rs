//! `tessera synth`: a checkpoint of real dimensions and seeded random weights, written as a directory.

use super::options::{Dtype, parse_size};
use super::progress;
use crate::error::Result;
use crate::model::preset::{PRESETS, Preset};
use crate::model::synth::{SynthOptions, synth};
use clap::Args;
use std::path::PathBuf;

/// Options of `tessera synth`.
#[derive(Debug, Args)]
#[command(after_help = presets())]
pub struct Synth {
    /// The dimensions, such as llava-1.5-7b or clip-vit-l-14-336: see below
    #[arg(long, value_name = "NAME")]
    preset: String,
    /// The directory to write; made if it is not there
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// The dtype of the weights [auto: f16]
    #[arg(long, value_enum, default_value_t = Dtype::Auto)]
    dtype: Dtype,
    /// The same seed gives the same bytes
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Most bytes of one file
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = parse_size)]
    shard_size: u64,
}

impl Synth {
    pub fn run(self) -> Result<()> {
        let preset = Preset::find(self.preset.strip_prefix("preset:").unwrap_or(&self.preset))
            .map_err(|error| error.about_option("--preset"))?;
        let dtype = self.dtype.weights();
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        let bar = progress::bar("writing weights", preset.bytes(dtype)?);
        let options = SynthOptions { dtype, seed: self.seed, shard_bytes: self.shard_size, threads };
        synth(preset, &self.out, options, &|done| bar.set_position(done))?;
        bar.finish_and_clear();
        super::say(format_args!("wrote {} to {}", preset.name, self.out.display()));
        Ok(())
    }
}

/// The list of presets, for `--help`.
fn presets() -> String {
    let line = |preset: Preset| format!("\n  {:<22} {}", preset.name, preset.about);
    format!("Presets, also for --model preset:NAME:{}", PRESETS.map(line).concat())
}
