//! What tensors are called. Inside the project every tensor has one canonical name; checkpoints in the
//! wild spell it in seven ways, and this is the only file that knows them.
//!
//! | canonical | what |
//! |---|---|
//! | `vision.X` | the tower: `embeddings.*`, `pre_layrnorm.*` (sic), `encoder.layers.N.*`, `post_layernorm.*` |
//! | `projector.X` | `linear_1.{weight,bias}`, `linear_2.{weight,bias}`, and so on |
//! | `image_newline` | LLaVA-NeXT's row that ends a line of patches, `[H]` |
//! | `lm.X` | `embed_tokens.weight`, `layers.N.*`, `norm.weight` |
//! | `lm.head.weight` | the output matrix, absent if it is tied to the embedding |
//! | `text.X` | CLIP's text tower: `embeddings.*`, `encoder.layers.N.*`, `final_layer_norm.*` |
//! | `visual_projection.weight`, `text_projection.weight`, `logit_scale` | the rest of a CLIP |
//!
//! X is spelt as transformers spells it.

use super::config::{ClipConfig, ClipTextConfig, ModelConfig, TextConfig, VisionConfig};
use crate::input::image::Tiling;
use std::fmt;

/// How a checkpoint spells its names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// `language_model.model.*`, `vision_tower.vision_model.*`: the files on the Hub.
    Hub,
    /// `model.language_model.*`, `model.vision_tower.vision_model.*`: a state dict saved raw, 4.52 on.
    StateDict,
    /// As `Hub` with `vision_tower.*`: transformers 5.
    HubFlatTower,
    /// As `StateDict` with `model.vision_tower.*`: transformers 5.
    StateDictFlatTower,
    /// `model.*`, `lm_head.weight`: a text model.
    Llama,
    /// As `Llama` with `model.mm_projector.{0,2,..}.*` and, where the file has the tower,
    /// `model.vision_tower.vision_tower.vision_model.*`: the original LLaVA.
    Original,
    /// As `Original` with `model.mm_projector.*`: a projector of one layer has no number.
    OriginalLinear,
    /// `vision_model.*`, `text_model.*`: CLIP by itself.
    Clip,
}

impl Layout {
    /// The layout of a file with these tensor names.
    pub fn detect<'a>(names: impl Iterator<Item = &'a str>) -> Layout {
        let (mut hub, mut state_dict, mut nested_tower, mut clip) = (false, false, false, false);
        for name in names {
            if let Some((_, rest)) = name.split_once("mm_projector.") {
                let numbered = rest.starts_with(|c: char| c.is_ascii_digit());
                return if numbered { Layout::Original } else { Layout::OriginalLinear };
            }
            clip |= name.starts_with("vision_model.") || name.starts_with("text_model.");
            let inner = name.strip_prefix("model.").unwrap_or(name);
            let multimodal = ["language_model.", "vision_tower.", "multi_modal_projector."];
            if multimodal.iter().any(|prefix| inner.starts_with(prefix)) {
                hub |= inner == name;
                state_dict |= inner != name;
                nested_tower |= inner.starts_with("vision_tower.vision_model.");
            }
        }
        match (hub, state_dict, nested_tower) {
            (true, _, true) => Layout::Hub,
            (true, _, false) => Layout::HubFlatTower,
            (false, true, true) => Layout::StateDict,
            (false, true, false) => Layout::StateDictFlatTower,
            (false, false, _) if clip => Layout::Clip,
            (false, false, _) => Layout::Llama,
        }
    }

    /// The name in this layout of the tensor whose canonical name is `name`.
    pub fn spell(self, name: &str) -> String {
        let model = match self {
            Layout::StateDict | Layout::StateDictFlatTower => "model.",
            _ => "",
        };
        let tower = match self {
            Layout::HubFlatTower | Layout::StateDictFlatTower => "vision_tower.",
            Layout::Original | Layout::OriginalLinear => "model.vision_tower.vision_tower.vision_model.",
            Layout::Clip => "vision_model.",
            _ => "vision_tower.vision_model.",
        };
        let (lm, head) = match self {
            Layout::Hub | Layout::HubFlatTower => ("language_model.model.", "language_model.lm_head."),
            Layout::StateDict | Layout::StateDictFlatTower => ("model.language_model.", "lm_head."),
            Layout::Llama | Layout::Original | Layout::OriginalLinear => ("model.", "lm_head."),
            Layout::Clip => ("", "lm_head."),
        };
        if let Some(rest) = name.strip_prefix("text.") {
            format!("text_model.{rest}")
        } else if name == "image_newline" {
            match self {
                Layout::Original | Layout::OriginalLinear => format!("model.{name}"),
                _ => format!("{model}{name}"),
            }
        } else if let Some(rest) = name.strip_prefix("vision.") {
            format!("{model}{tower}{rest}")
        } else if let Some(rest) = name.strip_prefix("projector.") {
            match self {
                Layout::Original | Layout::OriginalLinear => self.spell_mm_projector(rest),
                _ => format!("{model}multi_modal_projector.{rest}"),
            }
        } else if let Some(rest) = name.strip_prefix("lm.head.") {
            format!("{head}{rest}")
        } else if let Some(rest) = name.strip_prefix("lm.") {
            format!("{lm}{rest}")
        } else {
            name.into()
        }
    }

    /// `linear_2.bias` as the original spells it: a layer's number counts the activations between.
    fn spell_mm_projector(self, rest: &str) -> String {
        let numbered = rest.strip_prefix("linear_").and_then(|rest| rest.split_once('.'));
        let (layer, rest) = numbered.map_or((1, rest), |(n, rest)| (n.parse().unwrap_or(1), rest));
        match self {
            Layout::OriginalLinear if layer == 1 => format!("model.mm_projector.{rest}"),
            _ => format!("model.mm_projector.{}.{rest}", 2 * layer.max(1) - 2),
        }
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Layout::Hub => "language_model.model.*, vision_tower.vision_model.* (Hugging Face Hub)",
            Layout::StateDict => "model.language_model.*, model.vision_tower.vision_model.* (raw state dict)",
            Layout::HubFlatTower => "language_model.model.*, vision_tower.* (transformers 5)",
            Layout::StateDictFlatTower => {
                "model.language_model.*, model.vision_tower.* (transformers 5, raw)"
            }
            Layout::Llama => "model.*, lm_head.weight (text model)",
            Layout::Original => "model.*, model.mm_projector.N.* (original LLaVA)",
            Layout::OriginalLinear => "model.*, model.mm_projector.* (original LLaVA, linear projector)",
            Layout::Clip => "vision_model.*, text_model.* (CLIP)",
        })
    }
}

/// The canonical name of the tensor that a file calls `name`, or `None` if no model here uses it.
/// All layouts at once: drop `base_model.model.` (what peft puts before everything) and `model.`, then
/// `language_model.` or the name of a part, as often as it stands there, then `model.` or `vision_model.`.
pub fn canonical(name: &str) -> Option<String> {
    if is_buffer(name) {
        return None;
    }
    let name = name.strip_prefix("base_model.model.").unwrap_or(name);
    if ["visual_projection.weight", "text_projection.weight", "logit_scale"].contains(&name) {
        return Some(name.into());
    }
    if let Some(rest) = name.strip_prefix("text_model.") {
        return Some(format!("text.{rest}"));
    }
    let name = name.strip_prefix("model.").unwrap_or(name);
    if let Some(rest) = name.strip_prefix("vision_tower.") {
        let rest = rest.strip_prefix("vision_tower.").unwrap_or(rest);
        let rest = rest.strip_prefix("vision_model.").unwrap_or(rest);
        return Some(format!("vision.{rest}"));
    }
    // A tower in a folder of its own: CLIPModel and CLIPVisionModel, with and without the model's name.
    if let Some(rest) = name.strip_prefix("vision_model.") {
        return Some(format!("vision.{rest}"));
    }
    if ["embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm."]
        .iter()
        .any(|part| name.starts_with(part))
    {
        return Some(format!("vision.{name}"));
    }
    if let Some(rest) = name.strip_prefix("multi_modal_projector.") {
        return Some(format!("projector.{rest}"));
    }
    if name == "image_newline" {
        return Some(name.into());
    }
    if let Some(rest) = name.strip_prefix("mm_projector.") {
        return canonical_mm_projector(rest);
    }
    let name = name.strip_prefix("language_model.").unwrap_or(name);
    let name = name.strip_prefix("model.").unwrap_or(name);
    if let Some(rest) = name.strip_prefix("lm_head.") {
        return Some(format!("lm.head.{rest}"));
    }
    let lm = ["embed_tokens.", "layers.", "norm."].iter().any(|prefix| name.starts_with(prefix));
    lm.then(|| format!("lm.{name}"))
}

/// `2.bias` of the original's projector is `linear_2.bias`: between layers stand activations, which have a
/// number and no weights. The only layer of a linear projector has no number.
fn canonical_mm_projector(rest: &str) -> Option<String> {
    let (layer, rest) = match rest.split_once('.') {
        Some((index, rest)) => (index.parse::<u16>().ok()?, rest),
        None => (0, rest),
    };
    layer.is_multiple_of(2).then(|| format!("projector.linear_{}.{rest}", layer / 2 + 1))
}

/// Whether `name` is a buffer that old savers wrote beside the weights and every model recomputes.
pub fn is_buffer(name: &str) -> bool {
    name.ends_with(".rotary_emb.inv_freq") || name.ends_with(".position_ids")
}

/// A tensor that a model has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its canonical name.
    pub name: String,
    /// Its shape in a checkpoint.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// How many elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Every tensor of a model with this configuration, in the order a synthetic checkpoint stores them.
/// That is all transformers saves, `post_layernorm` and tower blocks that LLaVA never runs included.
pub fn tensors(config: &ModelConfig) -> Vec<TensorSpec> {
    let mut list = List::default();
    if let Some(vision) = &config.vision {
        list.tower(vision);
    }
    if let Some(projector) = &config.projector {
        for (layer, input) in (1..).zip(projector.inputs()) {
            list.linear(&format!("projector.linear_{layer}"), projector.hidden_size, input, projector.bias);
        }
    }
    if config.tiling.as_ref().is_some_and(Tiling::has_newline) {
        list.push("image_newline", &[config.text.hidden_size]);
    }
    list.language_model(&config.text);
    list.0
}

/// Every tensor of a CLIP by itself with this configuration, as [`tensors`]: each tower it has with its
/// projection, and what only both together have, the scale.
pub fn clip_tensors(config: &ClipConfig) -> Vec<TensorSpec> {
    let mut list = List::default();
    if let Some(vision) = &config.vision {
        list.tower(vision);
        list.linear("visual_projection", config.projection_dim, vision.hidden_size, false);
    }
    if let Some(text) = &config.text {
        list.text_tower(text);
        list.linear("text_projection", config.projection_dim, text.hidden_size, false);
    }
    if config.vision.is_some() && config.text.is_some() {
        list.push("logit_scale", &[]);
    }
    list.0
}

#[derive(Default)]
struct List(Vec<TensorSpec>);

impl List {
    fn push(&mut self, name: impl Into<String>, shape: &[usize]) {
        self.0.push(TensorSpec { name: name.into(), shape: shape.into() });
    }

    fn linear(&mut self, name: &str, rows: usize, cols: usize, bias: bool) {
        self.push(format!("{name}.weight"), &[rows, cols]);
        if bias {
            self.push(format!("{name}.bias"), &[rows]);
        }
    }

    fn layer_norm(&mut self, name: &str, cols: usize) {
        self.push(format!("{name}.weight"), &[cols]);
        self.push(format!("{name}.bias"), &[cols]);
    }

    fn tower(&mut self, config: &VisionConfig) {
        let (width, ffn, patch) = (config.hidden_size, config.intermediate_size, config.patch_size);
        self.push("vision.embeddings.class_embedding", &[width]);
        self.push("vision.embeddings.patch_embedding.weight", &[width, config.num_channels, patch, patch]);
        self.push("vision.embeddings.position_embedding.weight", &[config.num_rows(), width]);
        self.layer_norm("vision.pre_layrnorm", width);
        self.blocks("vision", config.num_layers, width, ffn);
        self.layer_norm("vision.post_layernorm", width);
    }

    fn text_tower(&mut self, config: &ClipTextConfig) {
        let width = config.hidden_size;
        self.push("text.embeddings.token_embedding.weight", &[config.vocab_size, width]);
        self.push("text.embeddings.position_embedding.weight", &[config.max_positions, width]);
        self.blocks("text", config.num_layers, width, config.intermediate_size);
        self.layer_norm("text.final_layer_norm", width);
    }

    /// The transformer blocks of CLIP's tower `tower`.
    fn blocks(&mut self, tower: &str, layers: usize, width: usize, ffn: usize) {
        for layer in 0..layers {
            let block = format!("{tower}.encoder.layers.{layer}");
            for name in ["q_proj", "k_proj", "v_proj", "out_proj"] {
                self.linear(&format!("{block}.self_attn.{name}"), width, width, true);
            }
            self.layer_norm(&format!("{block}.layer_norm1"), width);
            self.linear(&format!("{block}.mlp.fc1"), ffn, width, true);
            self.linear(&format!("{block}.mlp.fc2"), width, ffn, true);
            self.layer_norm(&format!("{block}.layer_norm2"), width);
        }
    }

    fn language_model(&mut self, config: &TextConfig) {
        let (width, ffn) = (config.hidden_size, config.intermediate_size);
        let queries = config.num_heads * config.head_dim;
        let keys = config.num_kv_heads * config.head_dim;
        self.push("lm.embed_tokens.weight", &[config.vocab_size, width]);
        for layer in 0..config.num_layers {
            let block = format!("lm.layers.{layer}");
            self.push(format!("{block}.input_layernorm.weight"), &[width]);
            let attention =
                [("q", queries, width), ("k", keys, width), ("v", keys, width), ("o", width, queries)];
            for (name, rows, cols) in attention {
                self.linear(&format!("{block}.self_attn.{name}_proj"), rows, cols, config.attention_bias);
            }
            self.push(format!("{block}.post_attention_layernorm.weight"), &[width]);
            for (name, rows, cols) in [("gate", ffn, width), ("up", ffn, width), ("down", width, ffn)] {
                self.linear(&format!("{block}.mlp.{name}_proj"), rows, cols, config.mlp_bias);
            }
        }
        self.push("lm.norm.weight", &[width]);
        if !config.tie_word_embeddings {
            self.push("lm.head.weight", &[config.vocab_size, width]);
        }
    }
}
