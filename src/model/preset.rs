//! Models without a checkpoint: real and small dimensions, with seeded random weights. They answer
//! gibberish at the true speed and in the true memory.

mod files;

use super::config::{ClipConfig, ModelConfig};
use super::names::{self, Layout, TensorSpec};
use super::random::{self, Generator, Job, Progress};
use super::weights::{Source, TensorInfo, Weights};
use crate::error::{Error, Result};
use crate::tensor::{DType, Storage};
use memmap2::{MmapMut, MmapOptions};
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

/// A named set of dimensions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preset {
    /// The name, as the command line spells it.
    pub name: &'static str,
    /// One line about it.
    pub about: &'static str,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// A LLaMA, and before it, in a LLaVA, a tower.
    Language { vision: Option<Tower>, text: Llama },
    /// CLIP by itself, with the columns of the space that its towers share.
    Clip { vision: Tower, text: Texts, projection: usize },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tower {
    width: usize,
    ffn: usize,
    layers: usize,
    heads: usize,
    image: usize,
    /// Whether pictures are seen in tiles, as by LLaVA-1.6.
    tiles: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Llama {
    width: usize,
    ffn: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    vocab: usize,
}

/// A CLIP's text tower.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Texts {
    width: usize,
    ffn: usize,
    layers: usize,
    heads: usize,
    vocab: usize,
    positions: usize,
}

const VIT_L_336: Tower = Tower { width: 1024, ffn: 4096, layers: 24, heads: 16, image: 336, tiles: false };
const VIT_L_TEXTS: Texts =
    Texts { width: 768, ffn: 3072, layers: 12, heads: 12, vocab: 49408, positions: 77 };
const VICUNA_7B: Llama = Llama { width: 4096, ffn: 11008, layers: 32, heads: 32, kv_heads: 32, vocab: 32064 };
const VICUNA_13B: Llama =
    Llama { width: 5120, ffn: 13824, layers: 40, heads: 40, kv_heads: 40, vocab: 32064 };
const TINY_TOWER: Tower = Tower { width: 128, ffn: 256, layers: 2, heads: 2, image: 112, tiles: false };
const TINY_TEXTS: Texts = Texts { width: 128, ffn: 256, layers: 2, heads: 2, vocab: 640, positions: 77 };
const TINY_LLAMA: Llama = Llama { width: 256, ffn: 512, layers: 2, heads: 2, kv_heads: 2, vocab: 640 };

const fn llava(vision: Tower, text: Llama) -> Kind {
    Kind::Language { vision: Some(vision), text }
}

const fn llama(text: Llama) -> Kind {
    Kind::Language { vision: None, text }
}

/// Every preset.
pub const PRESETS: [Preset; 11] = [
    Preset {
        name: "llava-1.5-7b",
        about: "LLaVA-1.5-7B: ViT-L/14-336 and Vicuna-7B, 14.1 GB in 16 bits",
        kind: llava(VIT_L_336, VICUNA_7B),
    },
    Preset {
        name: "llava-1.5-13b",
        about: "LLaVA-1.5-13B: ViT-L/14-336 and Vicuna-13B, 26.7 GB in 16 bits",
        kind: llava(VIT_L_336, VICUNA_13B),
    },
    Preset {
        name: "llava-1.6-7b",
        about: "LLaVA-1.6 (NeXT) with Vicuna-7B: pictures in up to 4 tiles and the whole, 14.1 GB in 16 bits",
        kind: llava(Tower { tiles: true, ..VIT_L_336 }, VICUNA_7B),
    },
    Preset {
        name: "vicuna-7b",
        about: "Vicuna-7B, text only, 13.5 GB in 16 bits",
        kind: llama(Llama { vocab: 32000, ..VICUNA_7B }),
    },
    Preset {
        name: "clip-vit-l-14-336",
        about: "CLIP ViT-L/14 for pictures of 336 pixels, both towers, 0.86 GB in 16 bits",
        kind: Kind::Clip { vision: VIT_L_336, text: VIT_L_TEXTS, projection: 768 },
    },
    Preset {
        name: "clip-vit-l-14",
        about: "the same for pictures of 224 pixels",
        kind: Kind::Clip { vision: Tower { image: 224, ..VIT_L_336 }, text: VIT_L_TEXTS, projection: 768 },
    },
    Preset {
        name: "llava-1.5-7b-4-layers",
        about: "the widths of LLaVA-1.5-7B with 4 layers in tower and model, 2.3 GB in 16 bits",
        kind: llava(Tower { layers: 4, ..VIT_L_336 }, Llama { layers: 4, ..VICUNA_7B }),
    },
    Preset {
        name: "llava-tiny",
        about: "2 layers with the head sizes of LLaVA-1.5, 64 image tokens, 4 MB in 16 bits",
        kind: llava(TINY_TOWER, TINY_LLAMA),
    },
    Preset {
        name: "llava-next-tiny",
        about: "the same with up to 4 tiles and the whole, 336 image tokens at most",
        kind: llava(Tower { tiles: true, ..TINY_TOWER }, TINY_LLAMA),
    },
    Preset {
        name: "llama-tiny",
        about: "2 layers of grouped-query attention, text only, 3 MB in 16 bits",
        kind: llama(Llama { heads: 4, ..TINY_LLAMA }),
    },
    Preset {
        name: "clip-tiny",
        about: "2 layers in each tower with the head sizes of ViT-L/14, 1 MB in 16 bits",
        kind: Kind::Clip { vision: TINY_TOWER, text: TINY_TEXTS, projection: 64 },
    },
];

impl Preset {
    /// The preset called `name`.
    pub fn find(name: &str) -> Result<&'static Preset> {
        PRESETS.iter().find(|preset| preset.name == name).ok_or_else(|| {
            let names = PRESETS.map(|preset| preset.name).join(", ");
            Error::option("--model", format!("preset: and one of {names}"), format!("preset:{name}"))
        })
    }

    /// Whether it is a CLIP by itself.
    pub fn is_clip(&self) -> bool {
        matches!(self.kind, Kind::Clip { .. })
    }

    /// Its configuration.
    ///
    /// # Errors
    /// [`Error::Config`] for a CLIP.
    pub fn config(&self, dtype: DType) -> Result<ModelConfig> {
        ModelConfig::load(&self.folder(dtype))
    }

    /// The configuration of a CLIP.
    ///
    /// # Errors
    /// [`Error::Config`] for a language model.
    pub fn clip_config(&self, dtype: DType) -> Result<ClipConfig> {
        ClipConfig::load(&self.folder(dtype))
    }

    /// All its tensors, in the order in which they are stored.
    ///
    /// # Errors
    /// None, unless a preset contradicts itself.
    pub fn tensors(&self) -> Result<Vec<TensorSpec>> {
        // Whatever the dtype: shapes do not depend on it.
        Ok(match self.kind {
            Kind::Language { .. } => names::tensors(&self.config(DType::F16)?),
            Kind::Clip { .. } => names::clip_tensors(&self.clip_config(DType::F16)?),
        })
    }

    /// Bytes of all its weights.
    ///
    /// # Errors
    /// As for [`tensors`](Preset::tensors).
    pub fn bytes(&self, dtype: DType) -> Result<u64> {
        Ok(self.tensors()?.iter().map(|spec| (spec.elements() * dtype.size()) as u64).sum())
    }

    /// The layout that its tensor names are spelt in.
    pub fn layout(&self) -> Layout {
        match self.kind {
            Kind::Language { vision: Some(_), .. } => Layout::Hub,
            Kind::Language { vision: None, .. } => Layout::Llama,
            Kind::Clip { .. } => Layout::Clip,
        }
    }

    /// Random weights on anonymous pages, one tensor after the other. `progress` is told of the bytes
    /// made so far. The pages are not reserved: that [`Preset::bytes`] fit in memory is for the caller
    /// to see to.
    pub fn weights(&self, dtype: DType, seed: u64, threads: usize, progress: Progress) -> Result<Weights> {
        let (specs, tensors) = self.table(dtype)?;
        let mut map = self.pages(&tensors)?;
        let mut rest = &mut map[..];
        let jobs = specs.iter().zip(&tensors).map(|(spec, tensor)| {
            let (bytes, tail) = std::mem::take(&mut rest).split_at_mut(tensor.bytes);
            rest = tail;
            Job { generator: Generator::new(spec, dtype, seed), first: 0, bytes }
        });
        random::fill(jobs, threads, progress);
        self.over(map, tensors)
    }

    /// The same tensors, all zero, on pages that nobody has written and that so take no memory: enough to
    /// plan with a model that is larger than the machine.
    pub fn blank_weights(&self, dtype: DType) -> Result<Weights> {
        let (_, tensors) = self.table(dtype)?;
        self.over(self.pages(&tensors)?, tensors)
    }

    /// What tensors there are, and where each lies.
    fn table(&self, dtype: DType) -> Result<(Vec<TensorSpec>, Vec<TensorInfo>)> {
        let specs = self.tensors()?;
        let mut end = 0;
        let info = |spec: &TensorSpec| {
            let (offset, bytes) = (end, spec.elements() * dtype.size());
            end += bytes;
            TensorInfo {
                name: self.layout().spell(&spec.name),
                dtype: TensorInfo::dtype_name(dtype).into(),
                shape: spec.shape.clone(),
                offset,
                bytes,
                file: 0,
            }
        };
        let tensors = specs.iter().map(info).collect();
        Ok((specs, tensors))
    }

    /// Pages for the tensors. Ordinary ones, as a mapped file has them: huge ones, made from memory full of
    /// page cache, took twice the system time of these.
    fn pages(&self, tensors: &[TensorInfo]) -> Result<MmapMut> {
        let bytes = tensors.iter().map(|tensor| tensor.bytes).sum();
        let map = MmapOptions::new().len(bytes).no_reserve_swap().map_anon();
        map.map_err(|source| Error::io(self.origin(), source))
    }

    fn over(&self, map: MmapMut, tensors: Vec<TensorInfo>) -> Result<Weights> {
        let source = Source { path: self.origin(), storage: Arc::new(Storage::Anonymous(map)) };
        Weights::new(self.origin(), vec![source], tensors)
    }

    /// What errors call it in place of a file.
    fn origin(&self) -> PathBuf {
        PathBuf::from(self.to_string())
    }
}

/// `preset:` and its name, as the command line has it.
impl fmt::Display for Preset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "preset:{}", self.name)
    }
}
