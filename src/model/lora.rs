//! LoRA adapters as peft saves them: `adapter_config.json` and `adapter_model.safetensors`, and the
//! `non_lora_trainables.safetensors` that LLaVA's trainer puts beside them.
//!
//! An adapter lies beside the weights of a model: low-rank pairs that a linear layer adds to its result
//! (`W x + scale B (A x)`), and whole tensors that take the place of the model's own. Nothing is merged,
//! so a mapped checkpoint stays mapped, and several adapters add up.

mod config;

pub use config::LoraConfig;

use super::checkpoint::LoadMode;
use super::names;
use super::weights::{TensorInfo, Weights};
use crate::error::{Error, Result};
use crate::folder::Folder;
use crate::tensor::Weight;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Most adapters at once: so many pairs for each of q, k and v fit into one op.
pub const MAX_ADAPTERS: usize = crate::op::MAX_PAIRS / 3;

/// An adapter to be loaded.
#[derive(Clone, Debug, PartialEq)]
pub struct Lora {
    /// Where it is.
    pub dir: PathBuf,
    /// What the scale of its pairs is multiplied by: 1 as it was trained, 0 for no effect. Tensors that it
    /// replaces are replaced whatever the scale.
    pub scale: f64,
}

impl Lora {
    /// Reads `DIR` or `DIR:SCALE`. What follows the last colon is a scale if it is a number.
    ///
    /// # Errors
    /// [`Error::Option`] for a scale that is not finite.
    pub fn parse(text: &str) -> Result<Self> {
        let scaled = text.rsplit_once(':').and_then(|(dir, scale)| Some((dir, scale.parse::<f64>().ok()?)));
        let (dir, scale) = scaled.unwrap_or((text, 1.0));
        if !scale.is_finite() || dir.is_empty() {
            return Err(Error::option("--lora", "DIR or DIR:SCALE with a finite scale", text));
        }
        Ok(Lora { dir: dir.into(), scale })
    }
}

/// A low-rank pair: `W x` becomes `W x + scale B (A x)`.
#[derive(Clone, Debug)]
pub struct LowRank {
    /// A `[r, k]`.
    pub a: Weight,
    /// B `[n, r]`.
    pub b: Weight,
    /// alpha / r, or alpha / √r, times what the user asked for.
    pub scale: f32,
}

/// An adapter that fits the model it was opened for.
#[derive(Debug)]
pub struct Adapter {
    dir: PathBuf,
    config: LoraConfig,
    /// By the canonical name of the matrix.
    pairs: BTreeMap<String, LowRank>,
    /// By the canonical name of the tensor whose place it takes.
    replacements: BTreeMap<String, Weight>,
}

impl Adapter {
    /// Opens an adapter for the model whose weights are `base`.
    ///
    /// # Errors
    /// [`Error::Config`] for settings that cannot be honoured, by name; [`Error::Tensor`] naming the tensor that
    /// is missing, has the wrong shape or belongs to another model; [`Error::Checkpoint`] for broken files.
    pub fn open(lora: &Lora, mode: LoadMode, base: &Weights) -> Result<Self> {
        let dir = &lora.dir;
        let config = LoraConfig::load(&Folder::Directory(dir.clone()))?;
        let Some(weights) = Weights::open_named(dir, "adapter_model", mode)? else {
            return Err(Error::checkpoint(dir, "has no adapter_model.safetensors; peft saves one"));
        };
        let mut adapter =
            Adapter { dir: dir.clone(), config, pairs: BTreeMap::new(), replacements: BTreeMap::new() };
        let mut halves: BTreeMap<&str, [Option<&TensorInfo>; 2]> = BTreeMap::new();
        for tensor in weights.tensors() {
            match Part::of(&tensor.name) {
                Part::Half(module, half) => {
                    let slot = &mut halves.entry(module).or_default()[half];
                    if let Some(other) = slot.replace(tensor) {
                        let problem = format!("`{}` and `{}` are the same tensor", other.name, tensor.name);
                        return Err(Error::checkpoint(weights.file(tensor.file), problem));
                    }
                }
                Part::Whole(name) => adapter.replace(&name, tensor, &weights, base)?,
                Part::Unknown(why) => return Err(refused(&tensor.name, why)),
            }
        }
        for (module, halves) in halves {
            adapter.pair_up(module, halves, lora.scale, &weights, base)?;
        }
        if let Some(others) = Weights::open_named(dir, "non_lora_trainables", mode)? {
            for tensor in others.tensors() {
                let Part::Whole(name) = Part::of(&tensor.name) else {
                    return Err(refused(
                        &tensor.name,
                        "no part of a low-rank pair: those are in adapter_model",
                    ));
                };
                adapter.replace(&name, tensor, &others, base)?;
            }
        }
        if adapter.pairs.is_empty() && adapter.replacements.is_empty() {
            return Err(Error::checkpoint(dir, "holds no tensors of an adapter"));
        }
        Ok(adapter)
    }

    /// Where it was read from.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its settings.
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }

    /// The pair beside the matrix with this canonical name.
    pub fn pair(&self, name: &str) -> Option<&LowRank> {
        self.pairs.get(name)
    }

    /// All pairs, by the canonical names of their matrices.
    pub fn pairs(&self) -> impl Iterator<Item = (&str, &LowRank)> {
        self.pairs.iter().map(|(name, pair)| (&**name, pair))
    }

    /// What takes the place of the tensor with this canonical name.
    pub fn replacement(&self, name: &str) -> Option<&Weight> {
        self.replacements.get(name)
    }

    /// The canonical names of all tensors that are replaced.
    pub fn replacements(&self) -> impl Iterator<Item = &str> {
        self.replacements.keys().map(String::as_str)
    }

    /// Puts A and B of a module together.
    fn pair_up(
        &mut self,
        module: &str,
        halves: [Option<&TensorInfo>; 2],
        strength: f64,
        weights: &Weights,
        base: &Weights,
    ) -> Result<()> {
        let (a, b) = match halves {
            [Some(a), Some(b)] => (a, b),
            [Some(one), None] => return Err(refused(&one.name, "lora_B of the same module as well")),
            [None, Some(one)] => return Err(refused(&one.name, "lora_A of the same module as well")),
            [None, None] => return Ok(()),
        };
        let rank = self.config.rank(module);
        let target = names::canonical(&format!("{module}.weight"));
        let target = target.filter(|name| is_linear(name)).ok_or_else(|| {
            refused(&a.name, "a linear layer of the language model, the tower or the projector")
        })?;
        let Some(matrix) = base.find(&target) else {
            let wanted = base.layout().spell(&target);
            return Err(base.missing(&a.name, &wanted, &format!("a model that has `{wanted}`")));
        };
        let [n, k] = matrix.shape[..] else {
            return Err(refused(&a.name, &format!("`{}` to be a matrix", matrix.name)));
        };
        let scale = (strength * self.config.scale(module)) as f32;
        let pair = LowRank { a: weights.weight(a, &[rank, k])?, b: weights.weight(b, &[n, rank])?, scale };
        self.pairs.insert(target, pair);
        Ok(())
    }

    /// Takes a whole tensor that stands in for one of the model's.
    fn replace(&mut self, name: &str, tensor: &TensorInfo, from: &Weights, base: &Weights) -> Result<()> {
        let Some(target) = names::canonical(name) else {
            return Err(refused(
                &tensor.name,
                "a tensor of the model, or lora_A and lora_B of a linear layer",
            ));
        };
        let Some(own) = base.find(&target) else {
            let wanted = base.layout().spell(&target);
            return Err(base.missing(&tensor.name, &wanted, &format!("a model that has `{wanted}`")));
        };
        let weight = from.weight(tensor, &own.shape)?;
        if self.replacements.insert(target, weight).is_some() {
            let problem = format!("`{}` is there twice, under two names", tensor.name);
            return Err(Error::checkpoint(from.file(tensor.file), problem));
        }
        Ok(())
    }
}

/// What a tensor of an adapter is, by its name.
enum Part<'a> {
    /// A (0) or B (1) of the pair beside a module.
    Half(&'a str, usize),
    /// A tensor of the model, by the name it has there.
    Whole(String),
    /// Neither; why.
    Unknown(&'static str),
}

impl<'a> Part<'a> {
    /// peft calls a tensor `base_model.model.MODULE.lora_A.weight`; of a state dict saved raw the name of the
    /// adapter, `default`, stands before `weight`. Beside the pair of an output head it saves the head itself, as
    /// `base_layer`; modules that were trained whole (`modules_to_save`) have the names they have in the model.
    fn of(name: &'a str) -> Self {
        let inner = name.strip_prefix("base_model.model.").unwrap_or(name);
        for (half, part) in [".lora_A.", ".lora_B."].into_iter().enumerate() {
            if let Some((module, rest)) = inner.split_once(part) {
                return match rest {
                    "weight" | "default.weight" => Part::Half(module, half),
                    "bias" | "default.bias" => Part::Unknown("no bias of lora_B: lora_bias is not supported"),
                    _ => Part::Unknown("lora_A.weight or lora_A.default.weight of one adapter"),
                };
            }
        }
        if inner.contains(".lora_magnitude_vector") {
            return Part::Unknown("no magnitude vector: DoRA is not supported");
        }
        if inner.contains(".lora_embedding_") {
            return Part::Unknown("no adapter of an embedding: only linear layers have adapters here");
        }
        if [".lora_", ".modules_to_save.", ".original_module."].iter().any(|part| inner.contains(part)) {
            return Part::Unknown("a file that peft's save_pretrained wrote, not a raw state dict");
        }
        Part::Whole(inner.replace(".base_layer.", "."))
    }
}

/// Whether a canonical name is that of a linear layer's matrix, to which a pair can be added.
fn is_linear(name: &str) -> bool {
    let prefixes = ["projector.", "visual_projection.", "text_projection.", "lm.head."];
    let inside = [".self_attn.", ".mlp."];
    name.ends_with(".weight")
        && (prefixes.iter().any(|p| name.starts_with(p)) || inside.iter().any(|part| name.contains(part)))
}

/// An error about a tensor of an adapter that cannot be used.
fn refused(tensor: &str, expected: &str) -> Error {
    Error::Tensor { name: tensor.into(), expected: expected.into(), found: "it in the adapter".into() }
}
