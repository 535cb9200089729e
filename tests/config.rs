//! Configurations: the defaults of every transformers generation, the spellings of every key, and
//! JSON that lies.

use proptest::prelude::*;
use serde_json::{Map, Value, json};
use std::path::Path;
use tessera::Error;
use tessera::model::config::{
    GenerationConfig, ModelConfig, Rope, RopeScaling, SelectStrategy, VisionConfig,
};
use tessera::op::Activation;
use tessera::tensor::DType;

fn parse(config: Value) -> Result<ModelConfig, Error> {
    let Value::Object(map) = config else { panic!("a test's config is an object") };
    ModelConfig::from_json(&map, Path::new("config.json"))
}

/// `base` with the values of `changes` put over it, object by object; null is put like any other value.
fn with(mut base: Value, changes: Value) -> Value {
    for (key, value) in changes.as_object().expect("an object") {
        let old = &mut base[key.as_str()];
        *old = if old.is_object() && value.is_object() {
            with(old.take(), value.clone())
        } else {
            value.clone()
        };
    }
    base
}

fn llava() -> Value {
    json!({ "model_type": "llava" })
}

fn llama() -> Value {
    json!({ "model_type": "llama" })
}

const DEFAULT_ROPE: Rope = Rope { theta: 10000.0, scaling: RopeScaling::Default };

const VIT_L_336: VisionConfig = VisionConfig {
    hidden_size: 1024,
    intermediate_size: 4096,
    num_layers: 24,
    num_heads: 16,
    head_dim: 64,
    num_channels: 3,
    image_size: 336,
    patch_size: 14,
    activation: Activation::QuickGelu,
    layer_norm_eps: 1e-5,
};

#[test]
fn a_llava_config_with_nothing_in_it_has_the_class_defaults() {
    let config = parse(llava()).unwrap();
    let text = &config.text;
    assert_eq!(config.vision, Some(VIT_L_336), "vision_config missing: ViT-L/14-336");
    assert_eq!(
        (text.vocab_size, text.hidden_size, text.intermediate_size, text.num_layers),
        (32000, 4096, 11008, 32)
    );
    assert_eq!((text.num_heads, text.num_kv_heads, text.head_dim), (32, 32, 128));
    assert_eq!((text.max_positions, text.rms_norm_eps, &text.rope), (2048, 1e-6, &DEFAULT_ROPE));
    assert_eq!((text.attention_bias, text.mlp_bias, text.tie_word_embeddings), (false, false, false));
    assert_eq!(text.eos_token_ids, [2]);
    let projector = config.projector.as_ref().unwrap();
    assert_eq!((projector.input_size, projector.hidden_size, projector.bias), (1024, 4096, true));
    assert_eq!((config.image_token_id, config.select), (Some(32000), SelectStrategy::Default));
    assert_eq!((config.feature_layers.as_slice(), config.square_rows()), ([23].as_slice(), 576));
    assert_eq!(config.dtype, None);
}

#[test]
fn a_partial_vision_config_has_the_defaults_of_vit_b_32() {
    let config = parse(with(llava(), json!({ "vision_config": {} }))).unwrap();
    let expected = VisionConfig {
        hidden_size: 768,
        intermediate_size: 3072,
        num_layers: 12,
        num_heads: 12,
        image_size: 224,
        patch_size: 32,
        ..VIT_L_336
    };
    assert_eq!(config.vision, Some(expected));
    assert_eq!((config.feature_layers.as_slice(), config.square_rows()), ([11].as_slice(), 49));
}

#[test]
fn llava_15_7b_as_shipped_omits_most_of_its_text_config() {
    let config = parse(json!({
        "architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100, "image_token_index": 32000,
        "model_type": "llava", "pad_token_id": 32001, "projector_hidden_act": "gelu",
        "text_config": {
            "_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-05,
            "torch_dtype": "float16", "vocab_size": 32064
        },
        "tie_word_embeddings": false, "torch_dtype": "float16",
        "vision_config": {
            "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
            "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
            "vocab_size": 32000
        },
        "vision_feature_layer": -2, "vision_feature_select_strategy": "default"
    }))
    .unwrap();
    assert_eq!(config.vision, Some(VIT_L_336));
    let text = &config.text;
    assert_eq!(
        (text.vocab_size, text.max_positions, text.rms_norm_eps, text.hidden_size),
        (32064, 4096, 1e-5, 4096)
    );
    assert_eq!(config.dtype, Some(DType::F16));
}

#[test]
fn a_mistral_has_defaults_of_its_own() {
    let config = parse(json!({ "model_type": "mistral", "sliding_window": null })).unwrap();
    let text = config.text;
    assert_eq!((text.intermediate_size, text.num_kv_heads, text.max_positions), (14336, 8, 131_072));
    assert_eq!((config.vision, config.image_token_id, config.feature_layers.len()), (None, None, 0));
}

/// Up to the window every position attends to all before it, as in transformers without a window; beyond it, not.
#[test]
fn a_sliding_window_ends_the_positions() {
    let text = |change: Value| parse(with(json!({ "model_type": "mistral" }), change)).unwrap().text;
    let positions = |change: Value| (text(change.clone()).max_positions, text(change).sliding_window);
    assert_eq!(positions(json!({ "sliding_window": null })), (131_072, None));
    assert_eq!(positions(json!({})), (4096, Some(4096)));
    assert_eq!(positions(json!({ "sliding_window": 8 })), (8, Some(8)));
    let short = json!({ "sliding_window": 4096, "max_position_embeddings": 4096 });
    assert_eq!(positions(short), (4096, None));
    // A LLaMA has none, whatever its file says.
    let llama = parse(with(llama(), json!({ "sliding_window": 8 }))).unwrap().text;
    assert_eq!((llama.max_positions, llama.sliding_window), (2048, None));
}

/// What `LlamaConfig` of transformers 5 makes of two sections and two places for the base.
#[test]
fn rope_settings_come_from_one_section() {
    let linear = |factor| RopeScaling::Linear { factor };
    let cases = [
        (json!({ "rope_theta": 2e4 }), 2e4, RopeScaling::Default),
        (
            json!({ "rope_theta": 2e4, "rope_parameters": null, "rope_scaling": null }),
            2e4,
            RopeScaling::Default,
        ),
        (json!({ "rope_theta": 2e4, "rope_parameters": {} }), 2e4, RopeScaling::Default),
        (json!({ "rope_theta": 2e4, "rope_parameters": { "rope_theta": 5e5 } }), 5e5, RopeScaling::Default),
        (json!({ "rope_scaling": {}, "rope_parameters": { "rope_theta": 5e5 } }), 5e5, RopeScaling::Default),
        (
            json!({ "rope_scaling": null, "rope_parameters": { "rope_theta": 5e5 } }),
            5e5,
            RopeScaling::Default,
        ),
        (json!({ "rope_theta": 2e4, "rope_scaling": { "type": "linear", "factor": 4 } }), 2e4, linear(4.0)),
        (
            json!({ "rope_theta": 2e4, "rope_scaling": { "rope_type": "linear", "factor": 4, "rope_theta": 3e4 } }),
            3e4,
            linear(4.0),
        ),
        // The older name wins, and with it the base beside it.
        (
            json!({ "rope_scaling": { "rope_type": "linear", "factor": 4 },
                    "rope_parameters": { "rope_type": "default", "rope_theta": 5e5 } }),
            1e4,
            linear(4.0),
        ),
    ];
    for (change, theta, scaling) in cases {
        let expected = Rope { theta, scaling };
        assert_eq!(parse(with(llama(), change.clone())).unwrap().text.rope, expected, "{change}");
        let nested = with(llava(), json!({ "text_config": change.clone() }));
        assert_eq!(parse(nested).unwrap().text.rope, expected, "text_config {change}");
    }
    let llama3 = json!({ "max_position_embeddings": 777, "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0 } });
    let RopeScaling::Llama3 { original_positions, .. } =
        parse(with(llama(), llama3)).unwrap().text.rope.scaling
    else {
        panic!("llama3");
    };
    assert_eq!(original_positions, 777.0);
    let partial = parse(with(llama(), json!({ "partial_rotary_factor": 0.5 }))).unwrap_err().to_string();
    assert!(partial.contains("partial_rotary_factor"), "{partial}");
}

/// Pairs of configs that mean the same.
#[test]
fn keys_may_be_spelt_as_in_any_generation() {
    let llama3 = json!({ "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192 });
    let text = |value: Value| with(llava(), json!({ "text_config": value }));
    let cases = [
        (json!({ "dtype": "bfloat16" }), json!({ "torch_dtype": "bfloat16" })),
        (json!({ "dtype": "bfloat16" }), json!({ "text_config": { "dtype": "bfloat16" } })),
        (json!({ "image_token_index": 7 }), json!({ "image_token_id": 7 })),
        (json!({ "image_token_index": 7 }), json!({ "image_token_id": 7, "image_token_index": 7 })),
        (json!({ "tie_word_embeddings": true }), json!({ "text_config": { "tie_word_embeddings": true } })),
        (json!({ "eos_token_id": [2, 9] }), json!({ "text_config": { "eos_token_id": [2, 9] } })),
        (json!({ "eos_token_id": 5 }), json!({ "eos_token_id": [5] })),
        (json!({ "vision_feature_layer": -2 }), json!({ "vision_feature_layer": [23] })),
        (json!({ "vision_config": null, "text_config": null }), json!({})),
    ];
    let rope_cases = [
        (
            json!({ "rope_theta": 5e5 }),
            json!({ "rope_parameters": { "rope_theta": 5e5, "rope_type": "default" } }),
        ),
        (json!({}), json!({ "rope_scaling": null, "rope_theta": 10000 })),
        (
            json!({ "rope_scaling": { "type": "linear", "factor": 2 } }),
            json!({ "rope_parameters": { "rope_type": "linear", "factor": 2.0, "rope_theta": 1e4 } }),
        ),
        (
            json!({ "rope_theta": 5e5, "rope_scaling": with(llama3.clone(), json!({ "rope_type": "llama3" })) }),
            json!({ "rope_parameters": with(llama3, json!({ "rope_type": "llama3", "rope_theta": 5e5 })) }),
        ),
        (json!({ "head_dim": null }), json!({ "head_dim": 128 })),
        (json!({ "num_key_value_heads": null }), json!({ "num_key_value_heads": 32 })),
    ];
    let nested = rope_cases.map(|(a, b)| (text(a), text(b)));
    for (a, b) in cases.map(|(a, b)| (with(llava(), a), with(llava(), b))).into_iter().chain(nested) {
        assert_eq!(parse(a.clone()).unwrap(), parse(b.clone()).unwrap(), "{a}\nand\n{b}");
    }
}

#[test]
fn feature_layers_are_resolved_against_the_embedding_and_every_block() {
    let cases = [
        (json!(-1), vec![24]),
        (json!(-25), vec![0]),
        (json!(0), vec![0]),
        (json!(24), vec![24]),
        (json!([-2, 3, -2]), vec![23, 3, 23]),
    ];
    for (layers, expected) in cases {
        let config = parse(with(llava(), json!({ "vision_feature_layer": layers }))).unwrap();
        assert_eq!(config.projector.unwrap().input_size, 1024 * expected.len());
        assert_eq!(config.feature_layers, expected);
    }
    let config = parse(with(llava(), json!({ "vision_feature_select_strategy": "full" }))).unwrap();
    assert_eq!((config.select, config.square_rows()), (SelectStrategy::Full, 577));
}

#[test]
fn a_value_that_cannot_be_used_is_named_with_its_key() {
    let vision = |value: Value| json!({ "vision_config": value });
    let text = |value: Value| json!({ "text_config": value });
    let rope = |value: Value| text(json!({ "rope_scaling": value }));
    let cases = [
        ("model_type", json!({ "model_type": "blip-2" })),
        ("model_type", json!({ "model_type": "qwen2_vl" })),
        (
            "model_type",
            json!({ "model_type": "llava_onevision", "architectures": ["LlavaOnevisionForConditionalGeneration"] }),
        ),
        ("model_type", json!({ "model_type": null })),
        ("model_type", json!({ "model_type": 3 })),
        ("architectures", json!({ "architectures": ["LlavaMptForCausalLM"] })),
        ("architectures", json!({ "architectures": "LlavaForConditionalGeneration" })),
        (
            "architectures",
            json!({ "model_type": "llama", "architectures": ["LlamaForSequenceClassification"] }),
        ),
        ("quantization_config", json!({ "quantization_config": { "quant_method": "awq" } })),
        ("projector_hidden_act", json!({ "projector_hidden_act": "gelu_pytorch_tanh" })),
        ("multimodal_projector_bias", json!({ "multimodal_projector_bias": 1 })),
        ("vision_feature_select_strategy", json!({ "vision_feature_select_strategy": "patch" })),
        ("vision_feature_layer", json!({ "vision_feature_layer": 25 })),
        ("vision_feature_layer", json!({ "vision_feature_layer": -26 })),
        ("vision_feature_layer", json!({ "vision_feature_layer": [] })),
        ("vision_feature_layer", json!({ "vision_feature_layer": [1, 1.5] })),
        ("vision_feature_layer", json!({ "vision_feature_layer": i64::MIN })),
        ("image_token_index", json!({ "image_token_index": -200 })),
        ("image_token_index", json!({ "image_token_index": 4, "image_token_id": 5 })),
        ("image_token_id", json!({ "image_token_id": 1u64 << 31 })),
        ("eos_token_id", json!({ "eos_token_id": "</s>" })),
        ("dtype", json!({ "dtype": 16 })),
        ("vision_config", json!({ "vision_config": 3 })),
        ("vision_config.model_type", vision(json!({ "model_type": "siglip_vision_model" }))),
        ("vision_config.hidden_act", vision(json!({ "hidden_act": "gelu_new" }))),
        ("vision_config.num_attention_heads", vision(json!({ "num_attention_heads": 0 }))),
        ("vision_config.num_attention_heads", vision(json!({ "num_attention_heads": 7 }))),
        ("vision_config.num_attention_heads", vision(json!({ "num_attention_heads": 4 }))), // heads of 192
        ("vision_config.num_hidden_layers", vision(json!({ "num_hidden_layers": 1_000_000_000 }))),
        ("vision_config.num_channels", vision(json!({ "num_channels": 4 }))),
        ("vision_config.image_size", vision(json!({ "image_size": [336, 336] }))),
        ("vision_config.patch_size", vision(json!({ "patch_size": 0 }))),
        ("vision_config.patch_size", vision(json!({ "patch_size": 50 }))),
        ("vision_config.patch_size", vision(json!({ "patch_size": 448 }))),
        ("vision_config.patch_size", vision(json!({ "image_size": 4096, "patch_size": 1 }))),
        ("vision_config.layer_norm_eps", vision(json!({ "layer_norm_eps": 0 }))),
        ("text_config.model_type", text(json!({ "model_type": "qwen2" }))),
        ("text_config.hidden_act", text(json!({ "hidden_act": "gelu" }))),
        ("text_config.hidden_size", text(json!({ "hidden_size": -4096 }))),
        ("text_config.hidden_size", text(json!({ "hidden_size": "4096" }))),
        ("text_config.hidden_size", text(json!({ "hidden_size": 4096.5 }))),
        ("text_config.hidden_size", text(json!({ "hidden_size": u64::MAX }))),
        ("text_config.intermediate_size", text(json!({ "intermediate_size": 1e300 }))),
        ("text_config.num_hidden_layers", text(json!({ "num_hidden_layers": 1_000_000_000 }))),
        ("text_config.num_attention_heads", text(json!({ "num_attention_heads": 0 }))),
        ("text_config.num_attention_heads", text(json!({ "num_attention_heads": 33 }))),
        ("text_config.num_attention_heads", text(json!({ "num_attention_heads": 16 }))), // heads of 256
        ("text_config.num_key_value_heads", text(json!({ "num_key_value_heads": 5 }))),
        ("text_config.num_key_value_heads", text(json!({ "num_key_value_heads": 64 }))),
        ("text_config.head_dim", text(json!({ "head_dim": 12 }))),
        ("text_config.vocab_size", text(json!({ "vocab_size": 1u64 << 40 }))),
        ("text_config.max_position_embeddings", text(json!({ "max_position_embeddings": 0 }))),
        ("text_config.rms_norm_eps", text(json!({ "rms_norm_eps": -1e-5 }))),
        ("text_config.sliding_window", text(json!({ "model_type": "mistral", "sliding_window": 0 }))),
        ("text_config.sliding_window", text(json!({ "model_type": "mistral", "sliding_window": "all" }))),
        ("text_config.rope_theta", text(json!({ "rope_theta": 0 }))),
        ("text_config.rope_scaling", rope(json!("linear"))),
        ("rope_scaling.rope_type", rope(json!({ "rope_type": "dynamic", "factor": 2.0 }))),
        ("rope_scaling.type", rope(json!({ "type": "yarn", "factor": 2.0 }))),
        ("rope_scaling.factor", rope(json!({ "type": "linear" }))),
        ("rope_scaling.low_freq_factor", rope(json!({ "rope_type": "llama3", "factor": 8.0 }))),
        (
            "rope_scaling.high_freq_factor",
            rope(json!({ "rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4,
                         "original_max_position_embeddings": 8192 })),
        ),
        ("rope_scaling.partial_rotary_factor", rope(json!({ "partial_rotary_factor": 0.5 }))),
    ];
    for (expected, change) in cases {
        match parse(with(llava(), change.clone())) {
            Err(Error::Config { file, key, .. }) => {
                assert_eq!((file.as_path(), key.as_str()), (Path::new("config.json"), expected), "{change}");
            }
            other => panic!("{change}: expected an error about `{expected}`, found {other:?}"),
        }
    }
}

/// Values from torch: `1 / 10000 ** (arange(0, 128, 2) / 128)`, and transformers' llama3 scaling worked
/// by hand for one frequency of each of its three bands.
#[test]
fn rope_frequencies_are_those_of_transformers() {
    let near = |found: f32, expected: f64| {
        let error = (f64::from(found) - expected).abs() / expected;
        assert!(error < 1.2e-7, "{found} for {expected}: off by {error:e}, one f32 rounding is 6e-8");
    };
    let text = |change: Value| parse(with(llama(), change)).unwrap().text;
    let plain = text(json!({})).inv_freq();
    assert_eq!(plain.len(), 64);
    near(plain[0], 1.0);
    near(plain[1], 0.865_964_323_360_065_3);
    near(plain[32], 0.01);
    near(plain[63], 1.154_781_984_689_458_3e-4);

    let linear = text(json!({ "rope_scaling": { "type": "linear", "factor": 4.0 } })).inv_freq();
    near(linear[32], 0.0025);

    let llama3 = json!({ "rope_scaling": { "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192 } });
    let scaled = text(llama3).inv_freq();
    // Wavelength 628 < 8192 / 4: kept. 54,410 > 8192: divided.
    near(scaled[32], 0.01);
    near(scaled[63], 1.154_781_984_689_458_3e-4 / 8.0);
    // Pair 48: frequency 1e-3, wavelength 6283.2; (8192 / 6283.2 - 1) / 3 = 0.101265... of it is kept.
    let smooth = (8192.0 * 1e-3 / (2.0 * std::f64::consts::PI) - 1.0) / 3.0;
    let error = (f64::from(scaled[48]) / ((1.0 - smooth) * 1e-3 / 8.0 + smooth * 1e-3) - 1.0).abs();
    assert!(error < 1e-6, "off by {error:e}; the cancellation in `smooth` costs some of f32's 6e-8");
}

#[test]
fn end_tokens_come_from_the_generation_config_if_it_names_any() {
    let text = parse(with(llama(), json!({ "eos_token_id": [7, 8] }))).unwrap().text;
    let dir = tempfile::tempdir().unwrap();
    let load = |json: &str| {
        std::fs::write(dir.path().join("generation_config.json"), json).unwrap();
        GenerationConfig::load(&dir.path().into(), &text)
    };
    assert_eq!(GenerationConfig::load(&dir.path().into(), &text).unwrap().eos_token_ids, [7, 8], "no file");
    assert_eq!(load("{}").unwrap().eos_token_ids, [7, 8]);
    assert_eq!(load(r#"{"eos_token_id": 2}"#).unwrap().eos_token_ids, [2]);
    assert_eq!(load(r#"{"eos_token_id": [128001, 128009]}"#).unwrap().eos_token_ids, [128001, 128009]);
    let hints = load(r#"{"temperature": 0.9, "top_p": 0.6, "top_k": 50, "max_length": 4096}"#).unwrap();
    assert_eq!(
        (hints.temperature, hints.top_p, hints.top_k, hints.do_sample),
        (Some(0.9), Some(0.6), Some(50), false)
    );
    for lie in
        [r#"{"eos_token_id": -1}"#, r#"{"top_p": 1.5}"#, r#"{"temperature": "hot"}"#, r#"{"top_k": 0.5}"#]
    {
        assert!(matches!(load(lie), Err(Error::Config { .. })), "{lie}");
    }
    for malformed in ["", "[]", "{", "\u{0}", r#"{"temperature": NaN}"#] {
        assert!(matches!(load(malformed), Err(Error::Checkpoint { .. })), "{malformed}");
    }
}

#[test]
fn text_models_and_tied_heads() {
    let config = parse(json!({ "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": true,
        "attention_bias": true, "mlp_bias": true, "head_dim": 64, "num_key_value_heads": 1 }))
    .unwrap();
    let text = config.text;
    assert_eq!((text.attention_bias, text.mlp_bias, text.tie_word_embeddings), (true, true, true));
    assert_eq!((text.hidden_size, text.num_heads, text.num_kv_heads, text.head_dim), (4096, 32, 1, 64));
    assert_eq!(parse(with(llama(), json!({ "eos_token_id": null }))).unwrap().text.eos_token_ids, [0u32; 0]);
}

/// Every value of the shipped fixture's kind of config, replaced by any other.
fn any_value() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        (0u64..200).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        prop_oneof![
            Just("llama"),
            Just("llava"),
            Just("llava_next"),
            Just("mistral"),
            Just("gelu"),
            Just("full"),
            Just("linear")
        ]
        .prop_map(Value::from),
        prop::collection::vec(any::<i32>().prop_map(Value::from), 0..5).prop_map(Value::from),
        prop::collection::vec([0usize..500, 0usize..500], 0..5).prop_map(|pairs| json!(pairs)),
        Just(json!({})),
        Just(json!({ "rope_type": "llama3", "factor": 1e-300 })),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Whatever a config claims, the answer is a typed error, or a model whose sizes multiply safely.
    #[test]
    fn mutated_configs_never_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), any_value()), 1..4)) {
        let mut config = json!({
            "model_type": "llava_next", "architectures": null, "image_token_index": 4,
            "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "torch_dtype": "float16",
            "projector_hidden_act": "gelu", "multimodal_projector_bias": true, "tie_word_embeddings": false,
            "eos_token_id": 2, "quantization_config": null, "image_grid_pinpoints": [[112, 224], [224, 224]],
            "text_config": { "model_type": "llama", "hidden_size": 256, "intermediate_size": 512,
                "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
                "vocab_size": 640, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
                "rope_scaling": { "rope_type": "linear", "factor": 2.0 }, "rope_parameters": null,
                "sliding_window": null, "hidden_act": "silu", "attention_bias": false, "mlp_bias": false },
            "vision_config": { "model_type": "clip_vision_model", "hidden_size": 128, "intermediate_size": 512,
                "num_hidden_layers": 5, "num_attention_heads": 2, "image_size": 112, "patch_size": 14,
                "num_channels": 3, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu" },
        });
        for (index, value) in changes {
            let paths = paths(config.as_object().unwrap());
            *config.pointer_mut(index.get(&paths).as_str()).unwrap() = value;
        }
        match parse(config) {
            Err(Error::Config { key, expected, found, .. }) => {
                prop_assert!(!key.is_empty() && !expected.is_empty() && !found.is_empty());
            }
            Err(other) => prop_assert!(false, "not a config error: {}", other),
            Ok(model) => {
                let text = &model.text;
                prop_assert_eq!(text.inv_freq().len(), text.head_dim / 2);
                prop_assert!(text.vocab_size.checked_mul(text.hidden_size * text.num_layers).is_some());
                prop_assert!(model.square_rows() <= 1 << 14 | 1);
                if let Some(tiling) = &model.tiling {
                    prop_assert!(model.image_tokens(640, 480) <= tiling.max_tokens());
                    prop_assert!(tiling.max_squares() * model.square_rows() <= 65 << 14);
                }
            }
        }
    }
}

/// JSON pointers to every value below `map`.
fn paths(map: &Map<String, Value>) -> Vec<String> {
    map.iter()
        .flat_map(|(key, value)| {
            let below = value.as_object().map(paths).unwrap_or_default();
            std::iter::once(format!("/{key}"))
                .chain(below.into_iter().map(move |path| format!("/{key}{path}")))
        })
        .collect()
}
