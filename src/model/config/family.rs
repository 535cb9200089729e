//! Which of the families that can be run a `config.json` belongs to; and the names of those that cannot,
//! so that the error says what was found.

use super::ClipConfig;
use crate::error::Result;
use crate::model::json::Section;
use serde_json::Value;
use std::fmt;

/// The kinds of checkpoint directory that can be run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// A LLaVA as transformers saves it.
    Llava,
    /// A LLaVA-NeXT as transformers saves it.
    LlavaNext,
    /// A LLaVA as its authors' code saves it.
    Original,
    /// A language model by itself.
    Text,
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Family::Llava => "LLaVA, as transformers saves it",
            Family::LlavaNext => "LLaVA-NeXT, as transformers saves it",
            Family::Original => "LLaVA, as its authors' code saves it",
            Family::Text => "a language model by itself",
        })
    }
}

/// Class names and `model_type`s of each family; the first that a config names decides.
const FAMILIES: [(&str, &[&str], Family); 5] = [
    ("LlavaForConditionalGeneration", &["llava"], Family::Llava),
    ("LlavaNextForConditionalGeneration", &["llava_next"], Family::LlavaNext),
    ("LlavaLlamaForCausalLM", &["llava", "llava_llama"], Family::Original),
    ("LlamaForCausalLM", &["llama"], Family::Text),
    ("MistralForCausalLM", &["mistral"], Family::Text),
];

/// A class that stands in files under more than one `model_type` and so is looked for by itself.
const MISTRAL: (&str, &str) = ("LlavaMistralForCausalLM", "llava_mistral");

const SUPPORTED: &str = "a LLaVA with a CLIP tower (`llava`: LlavaForConditionalGeneration; `llava_next`: \
                         LlavaNextForConditionalGeneration; `llava_llama`, \
                         `llava_mistral`: the original LlavaLlamaForCausalLM, LlavaMistralForCausalLM), `llama` or \
                         `mistral` (LlamaForCausalLM, MistralForCausalLM)";

/// What begins a `model_type` or a class name, in lower case without `_` and `-`, and what such a model is.
/// The longest that fits is named.
const OTHERS: [(&str, &str); 30] = [
    ("blip", "BLIP, with cross-attention to the picture"),
    ("blip2", "BLIP-2, with a Q-former between tower and language model"),
    ("chameleon", "Chameleon, with discrete picture tokens"),
    ("cogvlm", "CogVLM, with visual experts in every layer"),
    ("deepseekvl", "DeepSeek-VL, with a SigLIP tower"),
    ("fuyu", "Fuyu, without a vision tower"),
    ("gemma3", "Gemma 3, with a SigLIP tower"),
    ("idefics", "Idefics, with a perceiver and cross-attention"),
    ("instructblip", "InstructBLIP, with a Q-former between tower and language model"),
    ("internvl", "InternVL, with an InternViT tower"),
    ("kosmos2", "Kosmos-2"),
    ("llavampt", "a LLaVA over MPT"),
    ("llavanextvideo", "LLaVA-NeXT-Video"),
    ("llavaonevision", "LLaVA-OneVision, with a SigLIP tower and a Qwen2 language model"),
    ("llavaqwen", "a LLaVA over Qwen"),
    ("minicpmv", "MiniCPM-V, with a resampler between tower and language model"),
    ("minigpt", "MiniGPT-4, with a Q-former between tower and language model"),
    ("mistral3", "Mistral 3, with a Pixtral tower"),
    ("mllama", "Llama 3.2 Vision, with cross-attention to the picture"),
    ("molmo", "Molmo"),
    ("mpt", "MPT"),
    ("paligemma", "PaliGemma, with a SigLIP tower"),
    ("phi3v", "Phi-3-Vision"),
    ("pixtral", "Pixtral"),
    ("qwen", "Qwen"),
    ("qwen2vl", "Qwen2-VL, with a tower of its own"),
    ("qwen25vl", "Qwen2.5-VL, with a tower of its own"),
    ("siglip", "a SigLIP tower by itself"),
    ("videollava", "Video-LLaVA"),
    ("vipllava", "VipLLaVA, whose projector reads five hidden states through a LayerNorm"),
];

impl Family {
    /// The family by `architectures` and `model_type`. Both are looked at, because the original files say
    /// `llava` as well but keep their weights and settings under other names.
    pub(super) fn of(root: &Section) -> Result<Family> {
        if ClipConfig::is_clip(root.map()) {
            let expected = "a language model: this is a CLIP, use `tessera classify` or `tessera embed`";
            return Err(root.error("model_type", expected));
        }
        let architecture = match root.get("architectures") {
            None => None,
            Some(Value::Array(names)) if names.is_empty() => None,
            Some(Value::Array(names)) if names[0].is_string() => names[0].as_str(),
            Some(_) => return Err(root.error("architectures", "a list of class names")),
        };
        let model_type = root.string("model_type")?;
        if architecture == Some(MISTRAL.0) || (architecture.is_none() && model_type == Some(MISTRAL.1)) {
            return Ok(Family::Original);
        }
        // Whoever leaves the class out has the original's keys, or transformers'.
        let original = root.get("mm_vision_tower").is_some() || root.get("mm_projector_type").is_some();
        for (class, types, family) in FAMILIES {
            let named = match (architecture, model_type) {
                (Some(found), Some(kind)) => found == class && types.contains(&kind),
                (Some(found), None) => found == class,
                (None, Some(kind)) => types.contains(&kind) && original == (family == Family::Original),
                (None, None) => false,
            };
            if named {
                return Ok(family);
            }
        }
        // What is wrong is the class, if the type is one of these families'.
        let ours = |kind| kind == MISTRAL.1 || FAMILIES.iter().any(|(_, types, _)| types.contains(&kind));
        let key = match (architecture, model_type.is_none_or(ours)) {
            (Some(_), true) => "architectures",
            _ => "model_type",
        };
        let what = architecture.and_then(describe).or_else(|| model_type.and_then(describe));
        Err(root.error(key, SUPPORTED).with_found(what))
    }
}

/// What a family that is not supported is, by a class name or a `model_type`.
pub(super) fn describe(name: &str) -> Option<&'static str> {
    let name: String = name.chars().filter(char::is_ascii_alphanumeric).collect::<String>().to_lowercase();
    let fits = OTHERS.iter().filter(|(start, _)| name.starts_with(start));
    fits.max_by_key(|(start, _)| start.len()).map(|(_, what)| *what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_particular_description_wins() {
        for (name, part) in [
            ("InstructBlipForConditionalGeneration", "InstructBLIP"),
            ("Blip2ForConditionalGeneration", "BLIP-2"),
            ("blip-2", "BLIP-2"),
            ("qwen2_vl", "Qwen2-VL"),
            ("Qwen2_5_VLForConditionalGeneration", "Qwen2.5-VL"),
            ("QWenLMHeadModel", "Qwen"),
            ("llava_onevision", "OneVision"),
            ("MllamaForConditionalGeneration", "cross-attention"),
            ("Phi3VForCausalLM", "Phi-3-Vision"),
            ("siglip_vision_model", "SigLIP"),
            ("LlavaMptForCausalLM", "MPT"),
        ] {
            assert!(describe(name).unwrap().contains(part), "{name}: {:?}", describe(name));
        }
        assert_eq!(describe("gpt2"), None);
    }
}
