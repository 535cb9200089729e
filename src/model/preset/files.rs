//! The files of a preset beside its weights: configurations as their authors publish them, and a tokenizer.
//!
//! No real tokenizer may be shipped. A language model has that of the demo model, whose 640 tokens fit into
//! every vocabulary here; so the image token has its id, 4, and not 32000 as in LLaVA-1.5. A CLIP has one that
//! has learnt no merges: every byte of a text is a token of its own.

use super::{Kind, Llama, Preset, Texts, Tower};
use crate::folder::Folder;
use crate::input::prompt::byte_vocabulary;
use crate::tensor::DType;
use serde_json::{Value, json};

/// The tokenizer and the template of the demo model.
const DEMO: [(&str, &[u8]); 4] = [
    ("tokenizer.json", include_bytes!("../../../assets/demo/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("../../../assets/demo/tokenizer_config.json")),
    ("special_tokens_map.json", include_bytes!("../../../assets/demo/special_tokens_map.json")),
    ("chat_template.jinja", include_bytes!("../../../assets/demo/chat_template.jinja")),
];

/// Pixels along either side of a patch, in every preset.
const PATCH: usize = 14;

impl Preset {
    /// The files that stand beside its weights in a checkpoint directory, as a folder.
    pub fn folder(&self, dtype: DType) -> Folder {
        Folder::Made { name: self.to_string(), files: self.files(dtype) }
    }

    /// Names and contents of the files that stand beside its weights of `dtype` in a checkpoint directory.
    pub fn files(&self, dtype: DType) -> Vec<(&'static str, Vec<u8>)> {
        let json = |name, value: Value| (name, format!("{value:#}\n").into_bytes());
        let mut files = vec![json("config.json", self.config_json(dtype))];
        match self.kind {
            Kind::Language { vision, .. } => {
                let ends = json!({ "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3 });
                files.push(json("generation_config.json", ends));
                if let Some(tower) = vision {
                    files.push(json("preprocessor_config.json", self.image_processor(tower)));
                    files.push(json("processor_config.json", self.processor()));
                }
                files.extend(DEMO.map(|(name, bytes)| (name, bytes.to_vec())));
            }
            Kind::Clip { vision, text, .. } => {
                files.push(json("preprocessor_config.json", self.image_processor(vision)));
                files.push(json("tokenizer_config.json", clip_tokenizer(text)));
                files.push(json("vocab.json", byte_vocabulary(text.vocab).into()));
                files.push(("merges.txt", b"#version: 0.2\n".to_vec()));
            }
        }
        files
    }

    /// `config.json`, in the spelling of the files on the Hub.
    fn config_json(&self, dtype: DType) -> Value {
        let mut config = match self.kind {
            Kind::Language { vision: None, text } => llama(text),
            Kind::Language { vision: Some(tower), text } => json!({
                "model_type": "llava",
                "architectures": ["LlavaForConditionalGeneration"],
                "image_token_index": 4,
                "pad_token_id": 3,
                "projector_hidden_act": "gelu",
                "vision_feature_layer": -2,
                "vision_feature_select_strategy": "default",
                "tie_word_embeddings": false,
                "text_config": llama(text),
                "vision_config": vision(tower),
            }),
            Kind::Clip { vision: tower, text, projection } => json!({
                "model_type": "clip",
                "architectures": ["CLIPModel"],
                "projection_dim": projection,
                "logit_scale_init_value": 2.6592,
                "text_config": texts(text, projection),
                "vision_config": with(vision(tower), "projection_dim", projection),
            }),
        };
        if let Some(pinpoints) = self.pinpoints() {
            config["model_type"] = "llava_next".into();
            config["architectures"] = json!(["LlavaNextForConditionalGeneration"]);
            config["image_grid_pinpoints"] = json!(pinpoints);
        }
        let dtype = match dtype {
            DType::F16 => "float16",
            DType::BF16 => "bfloat16",
            DType::F32 | DType::I32 => "float32",
        };
        with(config, "torch_dtype", dtype)
    }

    /// LLaVA-1.6's canvases, (height, width) in pixels, for a tower that sees tiles.
    fn pinpoints(&self) -> Option<[[usize; 2]; 5]> {
        let Kind::Language { vision: Some(Tower { tiles: true, image: side, .. }), .. } = self.kind else {
            return None;
        };
        Some([[1, 2], [2, 1], [2, 2], [3, 1], [1, 3]].map(|tiles| tiles.map(|tiles| tiles * side)))
    }

    /// `processor_config.json`.
    fn processor(&self) -> Value {
        json!({
            "processor_class": self.class("Processor"),
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": PATCH,
            "vision_feature_select_strategy": "default",
        })
    }

    /// `preprocessor_config.json`: CLIP's preprocessing for this tower.
    fn image_processor(&self, tower: Tower) -> Value {
        let size = tower.image;
        let mut json = json!({
            "image_processor_type": "CLIPImageProcessor",
            "processor_class": self.class("Processor"),
            "do_convert_rgb": true,
            "do_resize": true,
            "size": { "shortest_edge": size },
            "resample": 3,
            "do_center_crop": true,
            "crop_size": { "height": size, "width": size },
            "do_rescale": true,
            "rescale_factor": 1.0 / 255.0,
            "do_normalize": true,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        });
        if let Some(pinpoints) = self.pinpoints() {
            json["image_processor_type"] = self.class("ImageProcessor").into();
            json["image_grid_pinpoints"] = json!(pinpoints);
            json["do_pad"] = true.into();
        }
        json
    }

    /// The name of a class of transformers for the preset's family.
    fn class(&self, class: &str) -> String {
        let family = match self.kind {
            Kind::Clip { .. } => "CLIP",
            Kind::Language { .. } if self.pinpoints().is_some() => "LlavaNext",
            Kind::Language { .. } => "Llava",
        };
        format!("{family}{class}")
    }
}

/// `object` with one key more.
fn with(mut object: Value, key: &str, value: impl Into<Value>) -> Value {
    object[key] = value.into();
    object
}

fn llama(text: Llama) -> Value {
    json!({
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
    })
}

fn vision(tower: Tower) -> Value {
    json!({
        "model_type": "clip_vision_model",
        "hidden_size": tower.width,
        "intermediate_size": tower.ffn,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "image_size": tower.image,
        "patch_size": PATCH,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    })
}

fn texts(text: Texts, projection: usize) -> Value {
    json!({
        "model_type": "clip_text_model",
        "hidden_size": text.width,
        "intermediate_size": text.ffn,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "vocab_size": text.vocab,
        "max_position_embeddings": text.positions,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": projection,
        // OpenAI's, which are no ids of its tokenizer.
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    })
}

/// `tokenizer_config.json` of a CLIP.
fn clip_tokenizer(text: Texts) -> Value {
    json!({
        "tokenizer_class": "CLIPTokenizer",
        "do_lower_case": true,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "model_max_length": text.positions,
    })
}
