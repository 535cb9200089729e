//! A model's weights: a table of named tensors over the storages that hold their bytes. Whoever builds a
//! graph asks for a tensor by its canonical name and the shape it must have.

use super::checkpoint::LoadMode;
use super::lora::{Adapter, Lora, LowRank, MAX_ADAPTERS};
use super::names::{self, Layout};
use crate::error::{Error, Result};
use crate::folder::Folder;
use crate::tensor::{DType, Storage, Weight, WeightBytes};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// All tensors of a checkpoint directory ([`Weights::open`]) or of a preset
/// ([`Preset::weights`](super::preset::Preset::weights)).
/// Cheap to make: the bytes stay where they are until a kernel reads them.
#[derive(Debug)]
pub struct Weights {
    origin: PathBuf,
    layout: Layout,
    sources: Vec<Source>,
    tensors: Vec<TensorInfo>,
    /// Canonical name to index in `tensors`.
    canonical: HashMap<String, usize>,
    /// What was added with [`Weights::adapt`], in that order.
    adapters: Vec<Adapter>,
}

/// A file, or a preset, with its bytes.
#[derive(Debug)]
pub(super) struct Source {
    pub path: PathBuf,
    pub storage: Arc<Storage>,
}

/// What a checkpoint's header says of one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// The name in the file.
    pub name: String,
    /// The safetensors dtype, such as `F16`; not all can be used as weights.
    pub dtype: String,
    /// The shape in the file.
    pub shape: Vec<usize>,
    /// Where its bytes begin in its file.
    pub offset: usize,
    /// How many bytes it has.
    pub bytes: usize,
    /// Which file, an index for [`Weights::file`].
    pub file: usize,
}

impl TensorInfo {
    /// What safetensors calls `dtype`.
    pub(super) fn dtype_name(dtype: DType) -> &'static str {
        match dtype {
            DType::F32 => "F32",
            DType::F16 => "F16",
            DType::BF16 => "BF16",
            DType::I32 => "I32",
        }
    }

    /// The dtype, if kernels can read it.
    pub fn weight_dtype(&self) -> Option<DType> {
        let floats = [DType::F32, DType::F16, DType::BF16];
        floats.into_iter().find(|&dtype| Self::dtype_name(dtype) == self.dtype)
    }
}

impl Weights {
    /// Checks that no two tensors have one name, in the files or after mapping names to canonical ones.
    pub(super) fn new(origin: PathBuf, sources: Vec<Source>, mut tensors: Vec<TensorInfo>) -> Result<Self> {
        tensors.sort_by(|a, b| (&a.name, a.file).cmp(&(&b.name, b.file)));
        let mut canonical: HashMap<String, usize> = HashMap::new();
        for (index, tensor) in tensors.iter().enumerate() {
            let Some(name) = names::canonical(&tensor.name) else { continue };
            if let Some(other) = canonical.insert(name, index) {
                let other = &tensors[other];
                let file = sources[other.file].path.display();
                let problem = format!("`{}` and `{}` in {file} are the same tensor", tensor.name, other.name);
                return Err(Error::checkpoint(&sources[tensor.file].path, problem));
            }
        }
        let layout = Layout::detect(tensors.iter().map(|tensor| tensor.name.as_str()));
        Ok(Weights { origin, layout, sources, tensors, canonical, adapters: Vec::new() })
    }

    /// The matrix `[rows, cols]` called `name`.
    pub fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Weight> {
        self.tensor(name, &[rows, cols])
    }

    /// The vector of `len` elements called `name`, as one row.
    pub fn vector(&self, name: &str, len: usize) -> Result<Weight> {
        self.tensor(name, &[len])
    }

    /// The tensor with the canonical name `name`, which must have this very shape. The first dimension
    /// becomes the rows, all others the columns; a vector becomes one row.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<Weight> {
        let Some(tensor) = self.find(name) else {
            let spelt = self.layout.spell(name);
            return Err(self.missing(&spelt, &spelt, &floats(shape)));
        };
        // A replacement has the shape of what it replaces.
        let own = self.weight(tensor, shape)?;
        Ok(self.adapters.iter().find_map(|adapter| adapter.replacement(name)).cloned().unwrap_or(own))
    }

    /// The bytes of one of these [`tensors`](Weights::tensors), which must have this very shape.
    pub(super) fn weight(&self, tensor: &TensorInfo, shape: &[usize]) -> Result<Weight> {
        let Some(dtype) = tensor.weight_dtype().filter(|_| tensor.shape == shape) else {
            let file = self.file(tensor.file).display();
            let found = format!("{} {:?} in {file}", tensor.dtype, tensor.shape);
            return Err(Error::Tensor { name: tensor.name.clone(), expected: floats(shape), found });
        };
        let (rows, cols) = match *shape {
            [] => (1, 1),
            [len] => (1, len),
            [rows, ref rest @ ..] => (rows, rest.iter().product()),
        };
        let storage = self.sources[tensor.file].storage.clone();
        let bytes = WeightBytes::new(storage, tensor.offset, rows * cols * dtype.size());
        let bytes = bytes.ok_or_else(|| {
            Error::checkpoint(self.file(tensor.file), format!("ends within `{}`", tensor.name))
        })?;
        Ok(Weight { name: tensor.name.clone(), dtype, rows, cols, bytes })
    }

    /// Whether there is any tensor whose canonical name begins with `part`, as `vision.`
    pub fn has_part(&self, part: &str) -> bool {
        self.canonical.keys().any(|name| name.starts_with(part))
    }

    /// Whether tensors whose canonical names begin with `part` are in files of `folder`.
    pub fn comes_from(&self, part: &str, folder: &Folder) -> bool {
        let inside = |&index: &usize| {
            let file = self.file(self.tensors[index].file);
            file.parent() == folder.path("x").parent()
        };
        self.canonical.iter().any(|(name, index)| name.starts_with(part) && inside(index))
    }

    /// These tensors, and those of `other` whose canonical names begin with one of `parts`.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if both have one of them.
    pub fn with_part(self, parts: &[&str], other: Weights) -> Result<Weights> {
        let (mut sources, mut tensors) = (self.sources, self.tensors);
        let taken = |tensor: &TensorInfo| {
            let name = names::canonical(&tensor.name);
            name.is_some_and(|name| parts.iter().any(|part| name.starts_with(part)))
        };
        let first = sources.len();
        let more = other.tensors.into_iter().filter(taken);
        tensors.extend(more.map(|tensor| TensorInfo { file: tensor.file + first, ..tensor }));
        sources.extend(other.sources);
        Weights::new(self.origin, sources, tensors)
    }

    /// Lays an adapter beside these weights, which stay as they are. Several add up.
    ///
    /// # Errors
    /// Those of [`Adapter::open`]; [`Error::Checkpoint`] if two adapters replace one tensor.
    pub fn adapt(&mut self, lora: &Lora, mode: LoadMode) -> Result<()> {
        let adapter = Adapter::open(lora, mode, self)?;
        for name in adapter.replacements() {
            if let Some(other) = self.adapters.iter().find(|other| other.replacement(name).is_some()) {
                let (other, name) = (other.dir().display(), self.layout.spell(name));
                let problem = format!("replaces `{name}`, as {other} does; use one of them");
                return Err(Error::checkpoint(adapter.dir(), problem));
            }
        }
        self.adapters.push(adapter);
        Ok(())
    }

    /// Lays all of these adapters beside these weights.
    ///
    /// # Errors
    /// As for [`adapt`](Weights::adapt); [`Error::Option`] if they are too many.
    pub fn adapt_all(&mut self, adapters: &[Lora], mode: LoadMode) -> Result<()> {
        if adapters.len() > MAX_ADAPTERS {
            return Err(Error::option("--lora", format!("at most {MAX_ADAPTERS} adapters"), adapters.len()));
        }
        adapters.iter().try_for_each(|lora| self.adapt(lora, mode))
    }

    /// The adapters, in the order in which they were added.
    pub fn adapters(&self) -> &[Adapter] {
        &self.adapters
    }

    /// What the adapters add to the matrix with this canonical name.
    pub fn pairs(&self, name: &str) -> impl Iterator<Item = &LowRank> {
        self.adapters.iter().filter_map(move |adapter| adapter.pair(name))
    }

    /// The tensor with this canonical name.
    pub(super) fn find(&self, name: &str) -> Option<&TensorInfo> {
        self.canonical.get(name).map(|&index| &self.tensors[index])
    }

    /// An error about `tensor`, for which a tensor spelt `wanted` should be here.
    pub(super) fn missing(&self, tensor: &str, wanted: &str, expected: &str) -> Error {
        let found = format!("no such tensor in {}{}", self.origin.display(), self.near(wanted));
        Error::Tensor { name: tensor.into(), expected: expected.into(), found }
    }

    /// Whether there is a tensor with this canonical name.
    pub fn contains(&self, name: &str) -> bool {
        self.canonical.contains_key(name)
    }

    /// All tensors by name, those included that no model uses.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// How this checkpoint spells its names.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// The path of the file with this index, or a preset's name.
    pub fn file(&self, index: usize) -> &Path {
        &self.sources[index].path
    }

    /// What holds the bytes, one storage for each file.
    pub fn storages(&self) -> impl Iterator<Item = &Arc<Storage>> {
        self.sources.iter().map(|source| &source.storage)
    }

    /// The bytes of the largest of them.
    pub fn largest(&self) -> &[u8] {
        let bytes = self.sources.iter().map(|source| source.storage.as_bytes());
        bytes.max_by_key(|bytes| bytes.len()).unwrap_or_default()
    }

    /// Bytes of all tensors together.
    pub fn bytes(&self) -> u64 {
        self.tensors.iter().map(|tensor| tensor.bytes as u64).sum()
    }

    /// The three names most like `wanted`, by the length of what begins and ends alike.
    fn near(&self, wanted: &str) -> String {
        let alike = |name: &str| {
            let pairs = || name.bytes().zip(wanted.bytes());
            let backwards = name.bytes().rev().zip(wanted.bytes().rev());
            pairs().take_while(|(a, b)| a == b).count() + backwards.take_while(|(a, b)| a == b).count()
        };
        let mut names: Vec<_> = self.tensors.iter().map(|tensor| tensor.name.as_str()).collect();
        names.sort_by_key(|name| std::cmp::Reverse(alike(name)));
        match names.len().min(3) {
            0 => ", which holds no tensors".into(),
            count => format!("; the nearest are `{}`", names[..count].join("`, `")),
        }
    }
}

/// What a tensor of this shape must be.
fn floats(shape: &[usize]) -> String {
    format!("F32, F16 or BF16 {shape:?}")
}
