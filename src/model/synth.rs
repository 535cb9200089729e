//! A preset as a checkpoint directory, for other runtimes to be measured with the very same bytes. The
//! weights are made block by block on their way to the disk, never held together.

use super::names::TensorSpec;
use super::preset::Preset;
use super::random::{self, Generator, Job, Progress};
use super::weights::TensorInfo;
use crate::error::{Error, Result};
use crate::tensor::DType;
use serde_json::{Map, Value, json};
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

/// What to write.
#[derive(Clone, Copy, Debug)]
pub struct SynthOptions {
    /// How elements are stored.
    pub dtype: DType,
    /// The seed: the bytes are those of [`Preset::weights`] with the same one.
    pub seed: u64,
    /// No file has more bytes of tensors than this, unless one tensor has.
    pub shard_bytes: u64,
    /// Threads that make the elements.
    pub threads: usize,
}

/// Writes `preset` to `dir`, which must be new or empty. `progress` is told of the tensor bytes
/// written so far.
pub fn synth(preset: &Preset, dir: &Path, options: SynthOptions, progress: Progress) -> Result<()> {
    fs::create_dir_all(dir).map_err(|source| Error::io(dir, source))?;
    if fs::read_dir(dir).map_err(|source| Error::io(dir, source))?.next().is_some() {
        return Err(Error::checkpoint(dir, "is not empty; name a new directory"));
    }
    let specs = preset.tensors()?;
    let shards = split(&specs, options);
    let mut weight_map = Map::new();
    let mut done = 0;
    for (number, shard) in shards.iter().enumerate() {
        let file = match shards.len() {
            1 => "model.safetensors".to_string(),
            count => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
        };
        for spec in *shard {
            weight_map.insert(preset.layout().spell(&spec.name), file.clone().into());
        }
        let before = done;
        write_shard(preset, shard, &dir.join(file), options, &|bytes| progress(before + bytes))?;
        done += bytes(shard, options.dtype);
    }
    if shards.len() > 1 {
        let index = json!({ "metadata": { "total_size": done }, "weight_map": weight_map });
        write(dir, "model.safetensors.index.json", format!("{index:#}\n").as_bytes())?;
    }
    preset.files(options.dtype).iter().try_for_each(|(name, bytes)| write(dir, name, bytes))
}

/// Cuts the tensors, in order, into runs of at most `shard_bytes`.
fn split(mut specs: &[TensorSpec], options: SynthOptions) -> Vec<&[TensorSpec]> {
    let mut shards = Vec::new();
    while !specs.is_empty() {
        let mut total = 0;
        let fits = |spec: &&TensorSpec| {
            total += bytes(std::slice::from_ref(*spec), options.dtype);
            total <= options.shard_bytes
        };
        let count = specs.iter().take_while(fits).count().max(1);
        let (shard, rest) = specs.split_at(count);
        shards.push(shard);
        specs = rest;
    }
    shards
}

/// Bytes of these tensors.
fn bytes(specs: &[TensorSpec], dtype: DType) -> u64 {
    specs.iter().map(|spec| (spec.elements() * dtype.size()) as u64).sum()
}

fn write_shard(
    preset: &Preset,
    specs: &[TensorSpec],
    path: &Path,
    options: SynthOptions,
    progress: Progress,
) -> Result<()> {
    /// Bytes made in parallel before they are written.
    const BLOCK: usize = 64 << 20;
    let SynthOptions { dtype, seed, threads, .. } = options;
    let io = |source| Error::io(path, source);
    let mut file = File::create_new(path).map_err(io)?;
    file.write_all(&header(preset, specs, dtype)).map_err(io)?;
    let mut block = vec![0; BLOCK.min(bytes(specs, dtype) as usize)];
    let mut done = 0;
    for spec in specs {
        let total = spec.elements() * dtype.size();
        for begin in (0..total).step_by(BLOCK) {
            let bytes = &mut block[..BLOCK.min(total - begin)];
            let generator = Generator::new(spec, dtype, seed);
            let job = Job { generator, first: begin / dtype.size(), bytes };
            random::fill([job].into_iter(), threads, &|_| ());
            let written = BLOCK.min(total - begin);
            file.write_all(&block[..written]).map_err(io)?;
            done += written as u64;
            progress(done);
        }
    }
    Ok(())
}

/// The header of a shard, padded with blanks so that the data begins at a multiple of 8.
fn header(preset: &Preset, specs: &[TensorSpec], dtype: DType) -> Vec<u8> {
    let mut map = Map::new();
    map.insert("__metadata__".into(), json!({ "format": "pt" }));
    let mut begin = 0;
    for spec in specs {
        let end = begin + spec.elements() * dtype.size();
        let dtype = TensorInfo::dtype_name(dtype);
        let tensor = json!({ "dtype": dtype, "shape": spec.shape, "data_offsets": [begin, end] });
        map.insert(preset.layout().spell(&spec.name), tensor);
        begin = end;
    }
    let mut json = Value::Object(map).to_string().into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    [&(json.len() as u64).to_le_bytes()[..], &json].concat()
}

fn write(dir: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    let path = dir.join(name);
    fs::write(&path, bytes).map_err(|source| Error::io(path, source))
}
