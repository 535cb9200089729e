//! Models without a checkpoint: real and small dimensions, with seeded random weights. They answer
//! gibberish at the true speed and in the true memory.
//!
//! A preset uses the tokenizer of the demo model, since no other may be shipped. Its 640 tokens fit
//! into every vocabulary here, and so the image token has its id, 4, and not 32000 as in LLaVA-1.5.

use super::config::ModelConfig;
use super::names::{self, Layout, TensorSpec};
use super::random::{self, Generator, Job, Progress};
use super::weights::{Source, TensorInfo, Weights};
use crate::error::{Error, Result};
use crate::tensor::{DType, Storage};
use memmap2::{MmapMut, MmapOptions};
use serde_json::{Map, Value, json};
use std::path::PathBuf;
use std::sync::Arc;

/// A named set of dimensions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preset {
    /// The name, as the command line spells it.
    pub name: &'static str,
    /// One line about it.
    pub about: &'static str,
    vision: Option<Tower>,
    text: Llama,
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

const VIT_L_336: Tower = Tower { width: 1024, ffn: 4096, layers: 24, heads: 16, image: 336, tiles: false };
const VICUNA_7B: Llama = Llama { width: 4096, ffn: 11008, layers: 32, heads: 32, kv_heads: 32, vocab: 32064 };
const VICUNA_13B: Llama =
    Llama { width: 5120, ffn: 13824, layers: 40, heads: 40, kv_heads: 40, vocab: 32064 };
const TINY_TOWER: Tower = Tower { width: 128, ffn: 256, layers: 2, heads: 2, image: 112, tiles: false };
const TINY_LLAMA: Llama = Llama { width: 256, ffn: 512, layers: 2, heads: 2, kv_heads: 2, vocab: 640 };

/// Every preset.
pub const PRESETS: [Preset; 8] = [
    Preset {
        name: "llava-1.5-7b",
        about: "LLaVA-1.5-7B: ViT-L/14-336 and Vicuna-7B, 14.1 GB in 16 bits",
        vision: Some(VIT_L_336),
        text: VICUNA_7B,
    },
    Preset {
        name: "llava-1.5-13b",
        about: "LLaVA-1.5-13B: ViT-L/14-336 and Vicuna-13B, 26.7 GB in 16 bits",
        vision: Some(VIT_L_336),
        text: VICUNA_13B,
    },
    Preset {
        name: "llava-1.6-7b",
        about: "LLaVA-1.6 (NeXT) with Vicuna-7B: pictures in up to 4 tiles and the whole, 14.1 GB in 16 bits",
        vision: Some(Tower { tiles: true, ..VIT_L_336 }),
        text: VICUNA_7B,
    },
    Preset {
        name: "vicuna-7b",
        about: "Vicuna-7B, text only, 13.5 GB in 16 bits",
        vision: None,
        text: Llama { vocab: 32000, ..VICUNA_7B },
    },
    Preset {
        name: "llava-1.5-7b-4-layers",
        about: "the widths of LLaVA-1.5-7B with 4 layers in tower and model, 2.3 GB in 16 bits",
        vision: Some(Tower { layers: 4, ..VIT_L_336 }),
        text: Llama { layers: 4, ..VICUNA_7B },
    },
    Preset {
        name: "llava-tiny",
        about: "2 layers with the head sizes of LLaVA-1.5, 64 image tokens, 4 MB in 16 bits",
        vision: Some(TINY_TOWER),
        text: TINY_LLAMA,
    },
    Preset {
        name: "llava-next-tiny",
        about: "the same with up to 4 tiles and the whole, 336 image tokens at most",
        vision: Some(Tower { tiles: true, ..TINY_TOWER }),
        text: TINY_LLAMA,
    },
    Preset {
        name: "llama-tiny",
        about: "2 layers of grouped-query attention, text only, 3 MB in 16 bits",
        vision: None,
        text: Llama { width: 256, ffn: 512, layers: 2, heads: 4, kv_heads: 2, vocab: 640 },
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

    /// Its `config.json`, in the spelling of the files on the Hub.
    pub fn config_json(&self, dtype: DType) -> Map<String, Value> {
        let text = self.text;
        let dtype = match dtype {
            DType::F16 => "float16",
            DType::BF16 => "bfloat16",
            DType::F32 | DType::I32 => "float32",
        };
        let llama = json!({
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": text.width,
            "intermediate_size": text.ffn,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "num_key_value_heads": text.kv_heads,
            "vocab_size": text.vocab,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": false,
            "torch_dtype": dtype,
        });
        let mut config = match self.vision {
            None => llama,
            Some(tower) => json!({
                "model_type": "llava",
                "architectures": ["LlavaForConditionalGeneration"],
                "image_token_index": 4,
                "pad_token_id": 3,
                "projector_hidden_act": "gelu",
                "vision_feature_layer": -2,
                "vision_feature_select_strategy": "default",
                "tie_word_embeddings": false,
                "torch_dtype": dtype,
                "text_config": llama,
                "vision_config": {
                    "model_type": "clip_vision_model",
                    "hidden_size": tower.width,
                    "intermediate_size": tower.ffn,
                    "num_hidden_layers": tower.layers,
                    "num_attention_heads": tower.heads,
                    "image_size": tower.image,
                    "patch_size": 14,
                },
            }),
        };
        if let Some(pinpoints) = self.pinpoints() {
            config["model_type"] = "llava_next".into();
            config["architectures"] = json!(["LlavaNextForConditionalGeneration"]);
            config["image_grid_pinpoints"] = json!(pinpoints);
        }
        match config {
            Value::Object(map) => map,
            _ => unreachable!("both arms are objects"),
        }
    }

    /// LLaVA-1.6's canvases, (height, width) in pixels, for a tower that sees tiles.
    pub fn pinpoints(&self) -> Option<[[usize; 2]; 5]> {
        let side = self.vision.filter(|tower| tower.tiles)?.image;
        Some([[1, 2], [2, 1], [2, 2], [3, 1], [1, 3]].map(|tiles| tiles.map(|tiles| tiles * side)))
    }

    /// Its configuration.
    pub fn config(&self, dtype: DType) -> Result<ModelConfig> {
        ModelConfig::from_json(&self.config_json(dtype), &self.origin())
    }

    /// Bytes of all its weights.
    pub fn bytes(&self, dtype: DType) -> Result<u64> {
        Ok(names::tensors(&self.config(dtype)?)
            .iter()
            .map(|spec| (spec.elements() * dtype.size()) as u64)
            .sum())
    }

    /// The layout that its tensor names are spelt in.
    pub fn layout(&self) -> Layout {
        if self.vision.is_some() { Layout::Hub } else { Layout::Llama }
    }

    /// Random weights on anonymous pages, one tensor after the other. `progress` is told of the bytes
    /// made so far. The pages are not reserved: that [`Preset::bytes`] fit in memory is for the caller
    /// to see to.
    pub fn weights(&self, dtype: DType, seed: u64, threads: usize, progress: Progress) -> Result<Weights> {
        let (specs, tensors) = self.tensors(dtype)?;
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
        let (_, tensors) = self.tensors(dtype)?;
        self.over(self.pages(&tensors)?, tensors)
    }

    /// What tensors there are, and where each lies.
    fn tensors(&self, dtype: DType) -> Result<(Vec<TensorSpec>, Vec<TensorInfo>)> {
        let specs = names::tensors(&self.config(dtype)?);
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
        PathBuf::from(format!("preset:{}", self.name))
    }
}
