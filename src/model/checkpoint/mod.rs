//! Opening a directory of safetensors or PyTorch files. Only headers are read; the data is mapped and used
//! in place, so opening 14 GB takes as long as opening 14 MB and makes nothing resident.

mod header;
mod pickle;
mod torch;
mod zip;

use super::json;
use super::weights::{Source, TensorInfo, Weights};
use crate::error::{Error, Result};
use crate::folder::Folder;
use crate::tensor::Storage;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Read;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

/// How the bytes of the files are reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LoadMode {
    /// Mapped and read in place, and shared with every process that maps the same files. A file that
    /// is truncated while it is mapped kills the process (SIGBUS); one that is overwritten gives
    /// other weights.
    #[default]
    Mmap,
    /// Read into memory, for files that may change under the process.
    Read,
}

impl Weights {
    /// Opens the checkpoint in `folder`: `model.safetensors`, or the shards that
    /// `model.safetensors.index.json` lists, or else `pytorch_model.bin` or its shards, or else the only
    /// `*.safetensors` file there is. Where these have no projector, `mm_projector.bin` adds it, in which the first
    /// stage of LLaVA's training leaves it.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::Checkpoint`], naming the file and the tensor: malformed headers,
    /// shards that are missing or contradict the index, two tensors of one name, a pickle that holds
    /// something else than tensors.
    pub fn open(folder: &Folder, mode: LoadMode) -> Result<Weights> {
        match folder {
            Folder::Directory(dir) => Self::open_directory(dir, mode),
            Folder::BuiltIn { name, files } => Self::open_built_in(name, files),
            Folder::Made { name, .. } => Err(Error::checkpoint(name, "has no files of weights")),
        }
    }

    /// Opens one file: safetensors, or PyTorch's if its name ends in `.bin`, `.pt` or `.pth`.
    ///
    /// # Errors
    /// As for [`open`](Self::open).
    pub fn open_file(path: &Path, mode: LoadMode) -> Result<Weights> {
        let mut files = Files::default();
        files.open(path, mode)?;
        Weights::new(path.into(), files.sources, files.tensors)
    }

    /// Opens the weights that lie in `dir` in a file called `stem`, as adapters do, if there is one:
    /// safetensors, or else PyTorch's.
    pub(in crate::model) fn open_named(dir: &Path, stem: &str, mode: LoadMode) -> Result<Option<Weights>> {
        let paths = ["safetensors", "bin"].map(|extension| dir.join(format!("{stem}.{extension}")));
        paths.iter().find(|path| path.exists()).map(|path| Self::open_file(path, mode)).transpose()
    }

    fn open_directory(dir: &Path, mode: LoadMode) -> Result<Weights> {
        let found = find_files(dir)?;
        let mut files = Files::default();
        for path in &found.files {
            files.open(path, mode)?;
        }
        if let Some(index) = &found.index {
            index.check(&files)?;
        }
        let weights = Weights::new(dir.into(), files.sources, files.tensors)?;
        let projector = dir.join("mm_projector.bin");
        match projector.exists() && !weights.has_part("projector.") {
            true => weights.with_part(&["projector."], Self::open_file(&projector, mode)?),
            false => Ok(weights),
        }
    }

    /// The one safetensors file among files that are part of the program: used in place like any other.
    fn open_built_in(name: &str, files: &[(&str, &'static [u8])]) -> Result<Weights> {
        let mut found = Files::default();
        for (file, bytes) in files.iter().filter(|(file, _)| file.ends_with(".safetensors")) {
            found.add(Path::new(name).join(file), Storage::BuiltIn(bytes))?;
        }
        Weights::new(name.into(), found.sources, found.tensors)
    }
}

/// Files that were opened, and the tensors that their headers list.
#[derive(Default)]
struct Files {
    sources: Vec<Source>,
    tensors: Vec<TensorInfo>,
}

impl Files {
    fn open(&mut self, path: &Path, mode: LoadMode) -> Result<()> {
        self.add(path.into(), open_file(path, mode)?)
    }

    fn add(&mut self, path: PathBuf, storage: Storage) -> Result<()> {
        if !torch::is_torch(&path) {
            let entries = header::parse(storage.as_bytes(), &path)?;
            self.push(path, storage, entries);
            return Ok(());
        }
        let contents = torch::parse(storage.as_bytes(), &path)?;
        self.push(path.clone(), storage, contents.mapped);
        if !contents.copied.is_empty() {
            self.push(path, Storage::Owned(contents.copies.into()), contents.copied);
        }
        Ok(())
    }

    fn push(&mut self, path: PathBuf, storage: Storage, entries: Vec<header::Entry>) {
        let file = self.sources.len();
        self.tensors.extend(entries.into_iter().map(|header::Entry { name, dtype, shape, range }| {
            TensorInfo { name, dtype, shape, offset: range.start, bytes: range.len(), file }
        }));
        self.sources.push(Source { path, storage: Arc::new(storage) });
    }
}

/// The file names under which transformers saves a whole model, safetensors before PyTorch; each may be an index of
/// shards (`.index.json`) instead.
const WHOLE: [&str; 2] = ["model.safetensors", "pytorch_model.bin"];

/// Whether `dir` holds the weights of a whole model, and not those of an adapter or a projector alone.
pub fn has_weights(dir: &Path) -> bool {
    let named = |name: &str| dir.join(name).exists();
    let adapter = named("adapter_config.json");
    WHOLE.iter().any(|name| named(name) || named(&format!("{name}.index.json")))
        || (!adapter && list(dir).is_ok_and(|names| names.iter().any(|name| name.ends_with(".safetensors"))))
}

/// The files of a checkpoint.
struct Found {
    files: Vec<PathBuf>,
    index: Option<Index>,
}

/// `*.safetensors.index.json` or `*.bin.index.json`.
struct Index {
    path: PathBuf,
    /// Tensor to file, relative to the directory.
    weight_map: BTreeMap<String, PathBuf>,
}

/// Looks as transformers does: the single file, then the index, safetensors before PyTorch; then whatever is
/// unambiguous.
fn find_files(dir: &Path) -> Result<Found> {
    for file in WHOLE {
        let (single, index) = (dir.join(file), dir.join(format!("{file}.index.json")));
        if single.exists() {
            return Ok(Found { files: vec![single], index: None });
        }
        if index.exists() {
            return Index::read(dir, index);
        }
    }
    let names = list(dir)?;
    let ending = |suffix: &str| names.iter().filter(|name| name.ends_with(suffix)).collect::<Vec<_>>();
    match (ending(".safetensors.index.json").as_slice(), ending(".safetensors").as_slice()) {
        ([index], _) => Index::read(dir, dir.join(index)),
        ([], [file]) => Ok(Found { files: vec![dir.join(file)], index: None }),
        ([], []) if !ending(".gguf").is_empty() => {
            Err(Error::checkpoint(dir, "holds GGUF weights; only safetensors and PyTorch files can be read"))
        }
        ([], []) if !ending(".bin").is_empty() => Err(Error::checkpoint(
            dir,
            "has neither model.safetensors nor pytorch_model.bin, nor an index of shards; a projector or an adapter \
             alone is no model: put it beside the weights of the language model, or name that with --base",
        )),
        ([], []) => Err(Error::checkpoint(
            dir,
            "has neither model.safetensors nor pytorch_model.bin, nor an index of shards",
        )),
        (_, files) => {
            let count = files.len();
            let problem =
                format!("has {count} safetensors files and no model.safetensors.index.json to order them");
            Err(Error::checkpoint(dir, problem))
        }
    }
}

/// The names of the files in `dir`, sorted; those that are not UTF-8 cannot be a checkpoint's.
fn list(dir: &Path) -> Result<Vec<String>> {
    let io = |source| Error::io(dir, source);
    let entries = fs::read_dir(dir).map_err(io)?.collect::<std::io::Result<Vec<_>>>().map_err(io)?;
    let mut names: Vec<_> =
        entries.into_iter().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    Ok(names)
}

impl Index {
    fn read(dir: &Path, path: PathBuf) -> Result<Found> {
        let file = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let root = json::read_object(&dir.into(), file)?;
        let wrong = |problem: String| Error::checkpoint(&path, problem);
        let map = root.get("weight_map").and_then(|map| map.as_object());
        let map = map.ok_or_else(|| wrong("has no object `weight_map`".into()))?;
        let mut weight_map = BTreeMap::new();
        for (tensor, file) in map {
            let file = file.as_str().map(Path::new).filter(|file| stays_inside(file));
            let problem =
                || format!("`{tensor}` must be in a file of the same directory, not in {}", map[tensor]);
            weight_map.insert(tensor.clone(), file.ok_or_else(|| wrong(problem()))?.to_path_buf());
        }
        let shards: BTreeSet<&PathBuf> = weight_map.values().collect();
        let files: Vec<PathBuf> = shards.iter().map(|shard| dir.join(shard)).collect();
        if files.is_empty() {
            return Err(wrong("lists no tensors".into()));
        }
        for (file, shard) in files.iter().zip(&shards) {
            if !file.exists() {
                return Err(wrong(format!("lists {}, which is missing; download it", shard.display())));
            }
        }
        for name in list(dir)? {
            let sibling = |shard: &&&PathBuf| family(shard.to_str()?).zip(family(&name)).map(|(a, b)| a == b);
            if !shards.contains(&PathBuf::from(&name))
                && shards.iter().any(|shard| sibling(&shard) == Some(true))
            {
                return Err(wrong(format!(
                    "does not list {name}, a shard of the same name; is the index its own?"
                )));
            }
        }
        Ok(Found { files, index: Some(Index { path, weight_map }) })
    }

    /// Every tensor of the index must be in the shard it says, and in no other.
    fn check(&self, files: &Files) -> Result<()> {
        let mut homes: BTreeMap<&str, &Path> = BTreeMap::new();
        for tensor in &files.tensors {
            let file = files.sources[tensor.file].path.as_path();
            if let Some(other) = homes.insert(&tensor.name, file) {
                let problem = format!("`{}` is in {} as well", tensor.name, other.display());
                return Err(Error::checkpoint(file, problem));
            }
        }
        for (tensor, shard) in &self.weight_map {
            let home = homes.get(tensor.as_str());
            if !home.is_some_and(|file| file.ends_with(shard)) {
                let found =
                    home.map_or("no shard has it".into(), |file| format!("it is in {}", file.display()));
                let problem = format!("says that `{tensor}` is in {}, but {found}", shard.display());
                return Err(Error::checkpoint(&self.path, problem));
            }
        }
        Ok(())
    }
}

/// Whether a path from an index names something below the directory of the index.
fn stays_inside(file: &Path) -> bool {
    file.components().next().is_some() && file.components().all(|part| matches!(part, Component::Normal(_)))
}

/// `model-00002-of-00003.safetensors` without its own number: (`model`, `00003.safetensors`).
fn family(name: &str) -> Option<(&str, &str)> {
    let (numbered, total) = name.split_once("-of-")?;
    let (stem, number) = numbered.rsplit_once('-')?;
    let is_shard = number.bytes().all(|digit| digit.is_ascii_digit());
    (is_shard && (total.ends_with(".safetensors") || total.ends_with(".bin"))).then_some((stem, total))
}

fn open_file(path: &Path, mode: LoadMode) -> Result<Storage> {
    let io = |source| Error::io(path, source);
    let metadata = fs::metadata(path).map_err(io)?;
    // Asked before opening: to open a pipe is to wait for its writer.
    if !metadata.is_file() {
        return Err(Error::checkpoint(path, "is not a regular file"));
    }
    let file = File::open(path).map_err(io)?;
    // An empty file cannot be mapped; the header parser says what is wrong with it.
    if mode == LoadMode::Read || metadata.len() == 0 {
        return Ok(Storage::Owned(read(file, metadata.len(), path)?));
    }
    // The kernel's default read-ahead is what weights want, streamed once per step; MADV_SEQUENTIAL
    // would drop them behind the reader, MADV_WILLNEED would read 14 GB before they are asked for.
    //
    // SAFETY: the mapping is read-only. That nobody changes or truncates the file while it is mapped
    // is asked of the user in `LoadMode::Mmap`, where `LoadMode::Read` is offered to who cannot promise it.
    let map = unsafe { memmap2::Mmap::map(&file) }.map_err(io)?;
    Ok(Storage::Mapped(map))
}

/// The first `len` bytes of `file`, whose reservation may fail but not abort.
fn read(file: File, len: u64, path: &Path) -> Result<Box<[u8]>> {
    let mut bytes = Vec::new();
    usize::try_from(len)
        .ok()
        .and_then(|len| bytes.try_reserve_exact(len).ok())
        .ok_or_else(|| Error::checkpoint(path, format!("has {len} bytes, more than memory can hold")))?;
    file.take(len).read_to_end(&mut bytes).map_err(|source| Error::io(path, source))?;
    Ok(bytes.into_boxed_slice())
}
