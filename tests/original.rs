//! The original LLaVA's layout: its configurations, its conversation styles, and the rules that differ from
//! transformers'.

use proptest::prelude::*;
use proptest::sample::Index;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use tessera::Error;
use tessera::input::image::{ImageMode, Merge, Picture};
use tessera::input::prompt::{ChatTemplate, Message};
use tessera::model::config::{ModelConfig, Reference, SelectStrategy};
use tessera::runtime::{Engine, LoadOptions, Model, Request, Sampling, Session, SessionOptions, Source};

const LINEAR: &str = "e1_original_linear";

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data")
}

/// The published config of liuhaotian/llava-v1.5-7b, as far as it says anything.
fn llava_15() -> Value {
    json!({
        "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", "hidden_size": 4096,
        "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
        "vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "rope_scaling": null,
        "tie_word_embeddings": false, "torch_dtype": "float16", "image_aspect_ratio": "pad",
        "mm_hidden_size": 1024, "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch", "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_use_im_start_end": false, "mm_use_im_patch_token": false, "mm_resampler_type": null,
    })
}

fn parse(changes: Value) -> tessera::Result<ModelConfig> {
    let mut config = llava_15();
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    ModelConfig::from_json(config.as_object().unwrap(), Path::new("config.json"))
}

#[test]
fn published_configs_mean_what_the_original_code_makes_of_them() {
    let config = parse(json!({})).unwrap();
    let (vision, projector) = (config.vision.as_ref().unwrap(), config.projector.as_ref().unwrap());
    assert_eq!(
        (vision.hidden_size, vision.num_layers, vision.num_heads, vision.image_size),
        (1024, 24, 16, 336)
    );
    assert_eq!((projector.layers, projector.input_size, projector.hidden_size), (2, 1024, 4096));
    assert_eq!((config.feature_layers.as_slice(), config.select), (&[23][..], SelectStrategy::Default));
    assert_eq!((config.square_rows(), config.pads, config.image_token_id), (576, true, None));
    assert_eq!((config.reference, config.picture_tokens.len()), (Reference::Original, 0));
    assert_eq!((config.text.vocab_size, config.text.max_positions), (32000, 4096));
    // LLaVA 1.0: 224 pixels; keys that are absent are linear, square, patch.
    let first = parse(json!({
        "mm_vision_tower": "openai/clip-vit-large-patch14", "mm_projector_type": null, "image_aspect_ratio": null,
        "mm_vision_select_feature": null, "mm_use_im_start_end": true, "mm_use_im_patch_token": null,
        "model_type": "llava_llama",
    }))
    .unwrap();
    assert_eq!(
        (first.projector.unwrap().layers, first.pads, first.select),
        (1, false, SelectStrategy::Default)
    );
    assert_eq!(first.vision.unwrap().num_patches(), 256);
    assert_eq!(first.picture_tokens, ["<im_patch>", "<im_start>", "<im_end>"]);
    let others = parse(json!({
        "mm_projector_type": "mlp3x_gelu", "mm_vision_select_feature": "cls_patch", "mm_vision_select_layer": -1,
        "mm_use_im_start_end": true, "architectures": ["LlavaMistralForCausalLM"], "model_type": "llava_mistral",
        "sliding_window": null, "num_key_value_heads": 8,
    }))
    .unwrap();
    assert_eq!((others.projector.as_ref().unwrap().layers, others.feature_layers.as_slice()), (3, &[24][..]));
    assert_eq!((others.square_rows(), others.text.num_kv_heads), (577, 8));
    assert_eq!(others.picture_tokens, ["<im_start>", "<im_end>"]);
}

/// LLaVA 1.6 as published: (width, height) where transformers writes (height, width), and a margin that is not
/// rounded as transformers rounds it.
#[test]
fn version_1_6_sees_tiles() {
    let grid = json!([[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]);
    let next = |changes: Value| {
        let mut config = json!({
            "image_aspect_ratio": "anyres", "image_grid_pinpoints": grid, "mm_patch_merge_type": "spatial_unpad",
        });
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        parse(config)
    };
    let config = next(json!({})).unwrap();
    let tiling = config.tiling.as_ref().unwrap();
    assert_eq!(tiling.resolutions()[3], (1008, 336));
    assert_eq!((config.pads, config.square_rows(), tiling.max_tokens()), (false, 576, 2928));
    // A square picture fills 672x672: the whole, four tiles, and a newline behind each of 48 lines.
    assert_eq!(config.image_tokens(1000, 1000), 576 + 4 * 576 + 48);
    assert_eq!(next(json!({"mm_patch_merge_type": "flat"})).unwrap().image_tokens(1000, 1000), 5 * 576);
    for (wrong, key) in [
        (json!({"mm_vision_select_feature": "cls_patch"}), "mm_vision_select_feature"),
        (json!({"image_grid_pinpoints": []}), "image_grid_pinpoints"),
        (json!({"image_aspect_ratio": "anyres_max_9"}), "image_aspect_ratio"),
        (json!({"mm_patch_merge_type": "maxpool2x2"}), "mm_patch_merge_type"),
    ] {
        let error = next(wrong).unwrap_err().to_string();
        assert!(error.contains(key), "{error}");
    }
}

#[test]
fn what_the_original_code_refuses_is_named() {
    for (key, changes, part) in [
        ("mm_projector_type", json!({"mm_projector_type": "mlp2x_relu"}), "mlpNx_gelu"),
        ("mm_projector_type", json!({"mm_projector_type": "mlp0x_gelu"}), "mlpNx_gelu"),
        ("mm_projector_type", json!({"mm_projector_type": "mlp99x_gelu"}), "N from 1 to 16"),
        ("mm_projector_type", json!({"mm_projector_type": "mlp2x_res_gelu"}), "mlpNx_gelu"),
        (
            "mm_projector_type",
            json!({"mm_projector_type": "identity"}),
            "1024 columns and the language model 4096",
        ),
        ("mm_vision_select_layer", json!({"mm_vision_select_layer": null}), "-25 to 24"),
        ("mm_vision_select_layer", json!({"mm_vision_select_layer": 25}), "-25 to 24"),
        ("mm_vision_select_layer", json!({"mm_vision_select_layer": [-2]}), "-25 to 24"),
        ("mm_vision_select_feature", json!({"mm_vision_select_feature": "cls"}), "cls_patch"),
        ("mm_hidden_size", json!({"mm_hidden_size": 768}), "1024, the width of the vision tower"),
        ("mm_resampler_type", json!({"mm_resampler_type": "qformer"}), "Q-formers"),
        ("mm_vision_tower", json!({"mm_vision_tower": "google/siglip-so400m-patch14-384"}), "SigLIP"),
        ("mm_vision_tower", json!({"mm_vision_tower": "somebody/some-clip"}), "--vision-tower"),
        ("mm_vision_tower", json!({"mm_vision_tower": 7}), "a string"),
        ("s2", json!({"s2": true}), "several scales"),
        ("mm_use_im_start_end", json!({"mm_use_im_start_end": "no"}), "true or false"),
        ("image_aspect_ratio", json!({"image_aspect_ratio": "stretch"}), "`square` or `pad`"),
    ] {
        let error = parse(changes).unwrap_err();
        assert!(matches!(&error, Error::Config { key: found, .. } if found == key), "{key}: {error}");
        assert!(error.to_string().contains(part), "{key} {part}: {error}");
    }
}

fn any_value() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (-30i64..30).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "mlp[0-9]{1,9}x_gelu|linear|identity|pad|square|patch|openai/clip-vit-base-patch(16|32)|../[a-z]/|\\PC{0,8}"
            .prop_map(Value::from),
        Just(json!([1, "x"])),
        Just(json!({ "a": 1 })),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn configs_with_other_values_never_panic(changes in prop::collection::vec((any::<Index>(), any_value()), 1..5)) {
        let keys: Vec<String> = llava_15().as_object().unwrap().keys().cloned().collect();
        let changes: serde_json::Map<_, _> =
            changes.into_iter().map(|(at, value)| (keys[at.index(keys.len())].clone(), value)).collect();
        if let Ok(config) = parse(Value::Object(changes)) {
            prop_assert!(config.square_rows() < 1 << 15);
        }
    }
}

/// Families that cannot be run: what they are, and what can.
#[test]
fn other_families_are_named() {
    for (config, parts) in [
        (json!({"model_type": "instructblip"}), ["InstructBLIP", "Q-former"]),
        (
            json!({"model_type": "blip-2", "architectures": ["Blip2ForConditionalGeneration"]}),
            ["BLIP-2", "Q-former"],
        ),
        (json!({"model_type": "qwen", "architectures": ["QWenLMHeadModel"]}), ["(Qwen)", "\"qwen\""]),
        (json!({"model_type": "qwen2_vl"}), ["Qwen2-VL", "tower of its own"]),
        (json!({"model_type": "llava_onevision"}), ["LLaVA-OneVision", "SigLIP"]),
        (json!({"model_type": "mllama"}), ["Llama 3.2 Vision", "cross-attention"]),
        (json!({"model_type": "phi3_v", "architectures": ["Phi3VForCausalLM"]}), ["Phi-3-Vision", "phi3_v"]),
        (
            json!({"model_type": "llava_mpt", "architectures": ["LlavaMptForCausalLM"]}),
            ["LLaVA over MPT", "llava_mpt"],
        ),
        (
            json!({"model_type": "llava_qwen", "architectures": ["LlavaQwenForCausalLM"]}),
            ["LLaVA over Qwen", "Qwen"],
        ),
        (json!({"model_type": "siglip"}), ["SigLIP tower by itself", "siglip"]),
        (
            json!({"model_type": "llava", "vision_config": {"model_type": "siglip_vision_model"}}),
            ["SigLIP", "vision_config.model_type"],
        ),
        (json!({"model_type": "gpt2"}), ["gpt2", "model_type"]),
    ] {
        let error =
            ModelConfig::from_json(config.as_object().unwrap(), Path::new("config.json")).unwrap_err();
        let text = error.to_string();
        assert!(parts.iter().all(|part| text.contains(part)), "{text}");
        assert!(
            text.contains("LlavaForConditionalGeneration") || text.contains("clip_vision_model"),
            "{text}"
        );
    }
}

/// Every style, as LLaVA's `conversation.py` renders it: question with a picture, answer, question.
#[test]
fn conversation_styles_are_as_published() {
    let human = "A chat between a curious human and an artificial intelligence assistant. The assistant gives \
                 helpful, detailed, and polite answers to the human's questions.";
    let user = human.replace("curious human", "curious user").replace("human's", "user's");
    let v1 = |system: &str| format!("{system} USER: <image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:");
    let v0 = format!("{human}###Human: <image>\nQ1###Assistant: A1###Human: Q2###Assistant:");
    let helpful = "You are a helpful language and vision assistant. You are able to understand the visual content that \
                   the user provides, and assist the user with a variety of tasks using natural language.";
    let llama_2 =
        format!("[INST] <<SYS>>\n{helpful}\n<</SYS>>\n\n<image>\nQ1 [/INST] A1 </s><s>[INST] Q2 [/INST]");
    let s_2 = "[INST] <<SYS>>\nS.\n<</SYS>>\n\n<image>\nQ1 [/INST] A1 </s><s>[INST] Q2 [/INST]";
    let turn = |role: &str, text: &str| format!("<|start_header_id|>{role}<|end_header_id|>\n\n{text}");
    let llama_3 = |system: &str| {
        let turns = [("system", system), ("user", "<image>\nQ1"), ("assistant", "A1"), ("user", "Q2")];
        turns.map(|(role, text)| turn(role, text) + "<|eot_id|>").concat() + &turn("assistant", "")
    };
    let mistral = "[INST] <image>\nQ1 [/INST] A1 </s>[INST] Q2 [/INST]";
    let chatml = |system: &str| {
        format!(
            "<|im_start|>system\n{system}<|im_end|><|im_start|>user\n<image>\nQ1<|im_end|><|im_start|>assistant\nA1\
             <|im_end|><|im_start|>user\nQ2<|im_end|><|im_start|>assistant\n"
        )
    };
    let mpt = "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest \
               answers.";
    let checkpoint = folder().join("e1_original_linear/llava-v1.5-tiny").into();
    let turns = [
        Message::prompt("Q1", 1).unwrap(),
        Message::text("assistant", "A1"),
        Message::prompt("Q2", 0).unwrap(),
    ];
    let with_system = |system: &str| [vec![Message::text("system", system)], turns.to_vec()].concat();
    let cases = [
        ("llava_v1", v1(human), v1("S.")),
        ("v1", v1(&user), v1("S.")),
        ("vicuna_v1", v1(&user), v1("S.")),
        ("llava_v0", v0.clone(), v0.replace(human, "S.")),
        (
            "llama_2",
            llama_2.replace(helpful, include_str!("../src/input/prompt/styles/llama_2.txt")),
            s_2.into(),
        ),
        ("llava_llama_2", llama_2.clone(), s_2.into()),
        ("llava_llama_3", llama_3(helpful), llama_3("S.")),
        (
            "mistral_instruct",
            mistral.into(),
            "[INST] <<SYS>>\nS.\n<</SYS>>\n\n<image>\nQ1 [/INST] A1 </s>[INST] Q2 [/INST]".into(),
        ),
        ("chatml_direct", chatml("Answer the questions."), chatml("S.")),
        ("chatml", chatml("Answer the questions."), chatml("S.")),
        ("mpt", chatml(mpt), chatml("S.")),
        ("plain", "<image>\nQ1\nA1\nQ2\n".into(), "S.\n<image>\nQ1\nA1\nQ2\n".into()),
    ];
    for (name, expected, expected_with_system) in cases {
        let template = ChatTemplate::named(name, &checkpoint).unwrap();
        let rendered = template.render(&turns, "<image>").unwrap();
        assert_eq!(rendered.text, expected, "{name}");
        let user = rendered.user.unwrap();
        let texts: Vec<_> = user.iter().map(|range| &rendered.text[range.clone()]).collect();
        assert_eq!(texts, ["Q1", "A1", "Q2"], "{name}: what users wrote");
        let rendered = template.render(&with_system("S."), "<image>").unwrap();
        assert_eq!(rendered.text, expected_with_system, "{name}");
        assert_eq!(
            template.stop().is_some(),
            !name.contains("v1") && !name.contains('2') && !name.contains("mistral")
        );
    }
    // The only style with turns of its own.
    for name in ["v0", "default"] {
        let text = ChatTemplate::named(name, &checkpoint).unwrap().render(&turns, "<image>").unwrap().text;
        let begin = format!(
            "{human}###Human: What are the key differences between renewable and non-renewable energy"
        );
        assert!(
            text.starts_with(&begin)
                && text.contains("instability.\n###Human: <image>\nQ1###Assistant: A1###")
        );
    }
    let error = ChatTemplate::named("vicuna_v2", &checkpoint).err().unwrap().to_string();
    for part in
        ["vicuna_v2", "vicuna_v1", "llava_v0", "llava_llama_3", "chatml_direct", "plain", "Jinja file"]
    {
        assert!(error.contains(part), "{part}: {error}");
    }
    let strange = [Message::text("tool", "x")];
    let error = ChatTemplate::named("v1", &checkpoint).unwrap().render(&strange, "<image>").unwrap_err();
    assert!(error.to_string().contains("the roles are"), "{error}");
    // By the rule of run_llava.py, from the folder's name.
    for (model, style) in [
        ("llava-llama-2-13b-chat-lightning-preview", "llava_llama_2"),
        ("llava-v1.6-mistral-7b", "mistral_instruct"),
        ("llava-v1.6-34b", "chatml_direct"),
        ("LLaVA-v1.5-7B", "llava_v1"),
        ("LLaVA-MPT-7B", "mpt"),
        ("LLaVA-7b-v0", "llava_v0"),
        ("llama3-llava-next-8b", "llava_llama_3"),
    ] {
        assert_eq!(ChatTemplate::of_original(&[model], &checkpoint).unwrap().name(), style, "{model}");
    }
}

fn engine(case: &str, model: &str, options: LoadOptions) -> Engine {
    let source = Source::Directory(folder().join(case).join(model));
    let model = Model::load(&source, &LoadOptions { threads: Some(1), ..options }).unwrap();
    Engine::new(Session::new(model.into(), SessionOptions::default()).unwrap())
}

/// The layout decides whose rules hold; an option overrides it.
#[test]
fn rules_follow_the_layout_and_the_option() {
    let hub = ("names_saved_v5", "model");
    let original = (LINEAR, "llava-v1.5-tiny");
    for ((case, model), option, reference, pads) in [
        (hub, None, Reference::Transformers, false),
        (hub, Some(Reference::Original), Reference::Original, true),
        (original, None, Reference::Original, true),
        (original, Some(Reference::Transformers), Reference::Transformers, false),
    ] {
        let mut engine = engine(case, model, LoadOptions { reference: option, ..LoadOptions::default() });
        let model = engine.model().clone();
        let transformers = reference == Reference::Transformers;
        let decoding = model.decode_options();
        assert_eq!((decoding.exif_orientation, decoding.whiten_transparent), (transformers, transformers));
        assert_eq!(model.rules().penalises_prompt(), transformers);
        assert_eq!(model.preprocess().unwrap().mode == ImageMode::Pad, pads);
        assert_eq!(model.prompter().cuts_at_pictures(), !transformers);
        // A picture on its side: only one of the two turns it.
        let turned = fs::read(folder().join(LINEAR).join("images/wide.png")).unwrap();
        let image = engine.image("wide.png", &turned).unwrap();
        assert_eq!((image.width, image.height), if transformers { (25, 44) } else { (44, 25) });
    }
    // Tiles: the sides of each pinpoint change places, and 20x13 lies on another canvas.
    for (case, model, made_for, own) in [
        ("e6_original_anyres", "llava-v1.6-tiny", Reference::Original, (28, 56)),
        ("next_mistral", "model", Reference::Transformers, (56, 28)),
    ] {
        for reference in [None, Some(Reference::Original), Some(Reference::Transformers)] {
            let engine = engine(case, model, LoadOptions { reference, ..LoadOptions::default() });
            let model = engine.model();
            let turned = reference.is_some_and(|reference| reference != made_for);
            let tiling = model.config().tiling.as_ref().unwrap();
            let expected = if turned { (own.1, own.0) } else { own };
            assert_eq!(tiling.resolutions()[0], expected, "{case} {reference:?}");
            let rounded = Merge::SpatialUnpad { rounded: model.rules().reference == Reference::Transformers };
            assert_eq!(tiling.merge(), rounded, "{case} {reference:?}");
            let lines = model.rules().lines(Some(tiling));
            let order = if rounded == (Merge::SpatialUnpad { rounded: true }) {
                "(height, width)"
            } else {
                "(width, height)"
            };
            assert!(
                lines.iter().any(|(rule, text)| rule.contains("pinpoints") && text.contains(order)),
                "{lines:?}"
            );
        }
    }
    let overridden = LoadOptions { image_mode: Some(ImageMode::Crop), ..LoadOptions::default() };
    assert_eq!(
        engine(original.0, original.1, overridden).model().preprocess().unwrap().mode,
        ImageMode::Crop
    );
}

/// With a penalty, what the prompt says makes a difference in transformers and none in the original.
#[test]
fn a_repetition_penalty_counts_the_prompt_or_not() {
    let first_token = |reference, penalty| {
        let options = LoadOptions { reference: Some(reference), ..LoadOptions::default() };
        let mut engine = engine(LINEAR, "llava-v1.5-tiny", options);
        let sampling = Sampling { repetition_penalty: penalty, ..Sampling::GREEDY };
        let input = tessera::runtime::Input::Raw("the quick brown fox jumps over the lazy dog".into());
        let request = Request { max_tokens: Some(1), sampling, logprobs: Some(0), ..Request::new(input) };
        let answer = engine.generate(&request, |_| {}).unwrap();
        (answer.token_ids[0], answer.prompt_ids)
    };
    let (plain, prompt) = first_token(Reference::Original, 1.0);
    assert_eq!(
        first_token(Reference::Original, 100.0).0,
        plain,
        "nothing was answered before the first token"
    );
    // In transformers the likeliest token of those in the prompt falls behind all others.
    let (penalised, _) = first_token(Reference::Transformers, 100.0);
    assert!(!prompt.contains(&penalised));
}

/// Words of a user that look like a picture, or like the tokens beside one, stay words.
#[test]
fn user_text_never_becomes_a_picture() {
    let mut engine = engine("e2_original_marks", "llava-tiny", LoadOptions::default());
    let picture = Picture { width: 1, height: 1, rgb: vec![9, 9, 9] };
    let image = engine.picture("one", &picture).unwrap();
    let conversation = |text: &str| vec![Message::text("user", text)];
    let prompter = engine.model().prompter();
    for text in ["<image>", "a <image> b", "<im_start><image><im_end>", "</s>", "<image", "ge>"] {
        let prompt = prompter.conversation(&conversation(text), &[]).unwrap();
        assert!(
            prompt.images.is_empty() && !prompt.ids.iter().any(|id| [2, 137, 138].contains(id)),
            "{text}"
        );
    }
    let shown = Request::ask("<image> or <image>?", &[image.clone(), image.clone()]).unwrap();
    let prompt = engine.prompt(&shown.input, &shown.images).unwrap();
    assert_eq!(prompt.images.len(), 2);
    for span in &prompt.images {
        assert_eq!((prompt.ids[span.start - 1], prompt.ids[span.start + span.len]), (137, 138));
    }
    let error = engine.model().prompter().raw("<image> <image>", &[16]).unwrap_err().to_string();
    assert!(error.contains("1 images") && error.contains("2 image placeholders"), "{error}");
}

/// A stop of the conversation style: words in the answer, or a token.
#[test]
fn a_style_ends_an_answer() {
    let prompter = |template: &str| {
        let options = LoadOptions { template: Some(template.into()), ..LoadOptions::default() };
        engine("text_mqa_bias_tied_llama3", "model", options)
    };
    for (style, words) in [("llava_v0", Some("###")), ("chatml_direct", Some("<|im_end|>")), ("v1", None)] {
        let engine = prompter(style);
        assert_eq!(engine.model().prompter().stop_words(), words, "{style}");
        assert_eq!(engine.model().eos_token_ids(), [2], "{style}");
    }
    let options = LoadOptions { template: Some("chatml".into()), ..LoadOptions::default() };
    let engine = engine("j_llama_chatml_f32", "model", options);
    assert_eq!(engine.model().prompter().stop_words(), None);
    assert_eq!(engine.model().eos_token_ids(), [2], "its <|im_end|>, once");
}
