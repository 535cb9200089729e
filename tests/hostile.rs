//! Checkpoints that lie, at the level of a whole model: each is a typed error that names what is wrong,
//! when it is loaded or at the latest when it is run, and never a panic.

mod spoilt;

use serde_json::{Value, json};
use spoilt::{Checkpoint, Tensor, WEIGHTS, picture, read};
use std::fs;
use tessera::Error;
use tessera::model::checkpoint::LoadMode;
use tessera::runtime::{Engine, Input, LoadOptions, Request, SessionOptions};

const EMBED: &str = "language_model.model.embed_tokens.weight";

/// The node that is blamed for tensors of the tower, the projector and the language model.
#[test]
fn weights_that_are_not_finite_are_found() {
    let table = [
        ("vision_tower.embeddings.class_embedding", "vision.embeddings"),
        ("vision_tower.embeddings.position_embedding.weight", "vision.embeddings"),
        ("vision_tower.pre_layrnorm.weight", "vision.pre_norm"),
        ("vision_tower.encoder.layers.0.self_attn.k_proj.bias", "vision.layers.0.qkv"),
        ("vision_tower.encoder.layers.0.self_attn.out_proj.weight", "vision.layers.0.out"),
        ("vision_tower.encoder.layers.1.mlp.fc1.weight", "vision.layers.1.fc1"),
        ("multi_modal_projector.linear_1.weight", "projector.linear_1"),
        ("multi_modal_projector.linear_2.bias", "projector.linear_2"),
        (EMBED, "embed"),
        ("language_model.model.layers.0.input_layernorm.weight", "layers.0.input_norm"),
        ("language_model.model.layers.0.self_attn.q_proj.weight", "layers.0.qkv"),
        ("language_model.model.layers.0.post_attention_layernorm.weight", "layers.0.post_attention_norm"),
        ("language_model.model.layers.1.self_attn.v_proj.weight", "layers.1.qkv"),
        ("language_model.model.layers.1.self_attn.o_proj.weight", "layers.1.out"),
        ("language_model.model.layers.1.mlp.up_proj.weight", "layers.1.gate_up"),
        ("language_model.model.layers.1.mlp.down_proj.weight", "layers.1.down"),
        ("language_model.model.norm.weight", "norm"),
        ("language_model.lm_head.weight", "lm_head"),
    ];
    for (tensor, expected) in table {
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let checkpoint = Checkpoint::copy().tensor(tensor, |t| t.fill(value, true));
            match checkpoint.answer() {
                Err(Error::NonFinite { position: 0, node, .. }) => {
                    assert_eq!(node, expected, "{value} in {tensor}");
                }
                other => panic!("{value} in {tensor}: {other:?}"),
            }
        }
    }
}

/// One NaN anywhere in what is used reaches the logits: no kernel turns it into a number on the way.
#[test]
fn no_kernel_swallows_a_nan() {
    let tensors = read(&fs::read(Checkpoint::copy().path(WEIGHTS)).unwrap());
    let mut unused = Vec::new();
    for Tensor { name, .. } in &tensors {
        // The first row of the embedding belongs to a token that the prompt does not hold.
        let all = name == EMBED;
        let checkpoint = Checkpoint::copy().tensor(name, |t| t.fill(f32::NAN, all));
        match checkpoint.answer() {
            Err(Error::NonFinite { .. }) => {}
            Ok(_) => unused.push(name.as_str()),
            Err(other) => panic!("{name}: {other}"),
        }
    }
    // The features are those of the last block but one.
    let expected = |name: &&str| name.contains("encoder.layers.2.") || name.contains("post_layernorm");
    let swallowed: Vec<_> = unused.iter().filter(|name| !expected(name)).collect();
    assert!(swallowed.is_empty(), "{swallowed:?}");
    assert_eq!(unused.len(), 18, "{unused:?}");
}

/// After an error of one picture or prompt, the engine serves the next as if nothing had been.
#[test]
fn an_engine_survives_what_it_cannot_compute() {
    let good = Checkpoint::copy();
    // One token's embedding is bad: prompts without it are not affected, whatever its pages held.
    let model = good.load().unwrap();
    let bad_id = model.prompter().tokenizer().encode("~", false).unwrap().pop().unwrap() as usize;
    let spoilt = Checkpoint::copy().tensor(EMBED, |t| {
        let row = t.bytes.len() / t.shape[0];
        t.bytes[bad_id * row..][..row].as_chunks_mut::<2>().0.fill(0x7FC0u16.to_le_bytes());
    });
    let request = |text: &str| Request { max_tokens: Some(6), ..Request::new(Input::Raw(text.into())) };
    let fine = request("USER: What is it? ASSISTANT:");
    let expected = good.engine().unwrap().generate(&fine, |_| {}).unwrap().token_ids;
    let mut engine = spoilt.engine().unwrap();
    for _ in 0..2 {
        let error = engine.generate(&request("USER: What ~ is it? ASSISTANT:"), |_| {}).unwrap_err();
        assert!(matches!(&error, Error::NonFinite { node, .. } if node == "embed"), "{error}");
        let pages = engine.session().pages();
        assert_eq!(pages.free(), pages.total());
        assert_eq!(engine.generate(&fine, |_| {}).unwrap().token_ids, expected);
    }
}

#[test]
fn tensors_that_do_not_fit_are_named() {
    const DOWN: &str = "language_model.model.layers.1.mlp.down_proj.weight";
    const PATCH: &str = "vision_tower.embeddings.patch_embedding.weight";
    type Spoil = fn(&mut Tensor);
    let table: [(&str, Spoil, &[&str]); 6] = [
        (DOWN, |t| t.shape = vec![64, 32], &["[32, 64]", "[64, 32]"]),
        (DOWN, |t| t.shape = vec![2048], &["[32, 64]", "[2048]"]),
        (PATCH, |t| t.shape = vec![16, 147], &["[16, 3, 7, 7]", "[16, 147]"]),
        (DOWN, |t| (t.dtype, t.bytes) = ("I64".into(), vec![0; 32 * 64 * 8]), &["I64", "BF16"]),
        (DOWN, |t| (t.dtype, t.bytes) = ("F8_E4M3".into(), vec![0; 32 * 64]), &["F8_E4M3", "BF16"]),
        (DOWN, |t| t.name.push('x'), &["no such tensor", "nearest"]),
    ];
    for (name, spoil, words) in table {
        let error = Checkpoint::copy().tensor(name, spoil).load().err().unwrap().to_string();
        for word in [&[name], words].concat() {
            assert!(error.contains(word), "{error} does not mention {word}");
        }
    }
    // Every tensor that is used is missed; those of unused blocks are not.
    let tensors = read(&fs::read(Checkpoint::copy().path(WEIGHTS)).unwrap());
    let mut missed = 0;
    for Tensor { name, .. } in &tensors {
        match Checkpoint::copy().tensors(|all| all.retain(|t| t.name != *name)).load() {
            Err(Error::Tensor { name: missing, .. }) => {
                assert_eq!(missing, *name);
                missed += 1;
            }
            Err(other) => panic!("{name}: {other}"),
            Ok(_) => assert!(name.contains("layers.2.") || name.contains("post_layernorm"), "{name}"),
        }
    }
    assert_eq!(missed, tensors.len() - 18);
}

#[test]
fn a_config_that_contradicts_the_tensors_is_refused() {
    type Spoil = fn(&mut Value);
    let table: [(Spoil, &[&str]); 14] = [
        (|c| c["text_config"]["num_hidden_layers"] = json!(3), &["layers.2.", "no such tensor"]),
        (|c| c["text_config"]["num_attention_heads"] = json!(4), &["k_proj", "[8, 32]"]),
        (|c| c["text_config"]["num_key_value_heads"] = json!(2), &["k_proj", "[32, 32]"]),
        (|c| c["text_config"]["head_dim"] = json!(32), &["q_proj", "[64, 32]"]),
        (|c| c["text_config"]["vocab_size"] = json!(200), &["embed_tokens", "[200, 32]"]),
        (|c| c["text_config"]["vocab_size"] = json!(100), &["embed_tokens", "[100, 32]"]),
        (|c| c["text_config"]["hidden_size"] = json!(64), &["[64"]),
        (|c| c["text_config"]["intermediate_size"] = json!(1 << 18), &["[262144, 32]"]),
        (|c| c["text_config"]["attention_bias"] = json!(true), &["q_proj.bias", "no such tensor"]),
        (|c| c["vision_config"]["image_size"] = json!(35), &["position_embedding", "[26, 16]"]),
        (|c| c["vision_config"]["patch_size"] = json!(14), &["`patch_size` is 7", "expected 14"]),
        (|c| c["vision_config"]["num_hidden_layers"] = json!(9), &["encoder.layers.3", "no such tensor"]),
        (|c| c["vision_feature_layer"] = json!([-2, -1]), &["linear_1", "[32, 32]"]),
        (|c| c["image_token_id"] = json!(7), &["image token is 7"]),
    ];
    for (spoil, words) in table {
        let error = Checkpoint::copy().json("config.json", spoil).load().err().unwrap().to_string();
        for word in words {
            assert!(error.contains(word), "{error} does not mention {word}");
        }
    }
    // The processor, which the patches contradicted above, may agree with the config against the tensors.
    let error = Checkpoint::copy()
        .json("config.json", |c| c["vision_config"]["patch_size"] = json!(14))
        .json("processor_config.json", |p| p["patch_size"] = json!(14))
        .load()
        .err()
        .unwrap()
        .to_string();
    assert!(error.contains("patch_embedding") && error.contains("[16, 3, 14, 14]"), "{error}");
}

/// The tensors may agree with the config and yet be too few for the tokenizer.
#[test]
fn a_tokenizer_larger_than_the_model_is_refused() {
    let checkpoint = Checkpoint::copy()
        .json("config.json", |c| c["text_config"]["vocab_size"] = json!(120))
        .tensors(|all| {
            for t in all.iter_mut().filter(|t| t.shape[0] == 136) {
                t.shape[0] = 120;
                t.bytes.truncate(120 * 32 * 2);
            }
        });
    let error = checkpoint.load().err().unwrap();
    assert!(matches!(error, Error::Tokenizer { .. }), "{error}");
    assert!(error.to_string().contains("vocabulary ends before 120"), "{error}");
}

#[test]
fn a_shard_that_ends_early_is_named() {
    const SHARDED: &str = "tests/data/b_llava15_old_f16_sharded/model";
    let whole = Checkpoint::copy_of(SHARDED);
    let shards: Vec<_> = fs::read_dir(whole.dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|ext| ext == "safetensors"))
        .collect();
    assert_eq!(shards.len(), 3);
    for shard in shards {
        let name = shard.file_name().unwrap().to_str().unwrap();
        let len = fs::metadata(&shard).unwrap().len();
        for keep in [0, 7, 8, 100, len / 2, len - 1] {
            let checkpoint = Checkpoint::copy_of(SHARDED);
            fs::File::options().write(true).open(checkpoint.path(name)).unwrap().set_len(keep).unwrap();
            let error = checkpoint.load().err().unwrap();
            assert!(matches!(error, Error::Checkpoint { .. }), "{keep} bytes: {error}");
            assert!(error.to_string().contains(name), "{keep} bytes: {error}");
        }
        fs::remove_file(&shard).unwrap();
        assert!(whole.load().err().unwrap().to_string().contains(name));
        fs::copy(std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(SHARDED).join(name), &shard).unwrap();
    }
    whole.load().unwrap();
}

#[test]
fn any_of_several_end_tokens_ends_a_text() {
    let good = Checkpoint::copy();
    let run = |checkpoint: &Checkpoint| {
        let mut engine = checkpoint.engine().unwrap();
        let image = picture(&mut engine).unwrap();
        let request = Request { max_tokens: Some(8), ..Request::ask("What is it?", &[image]).unwrap() };
        engine.generate(&request, |_| {}).unwrap().token_ids
    };
    let all = run(&good);
    assert_eq!(all.len(), 8);
    let third = all[2];
    assert!(!all[..2].contains(&third), "{all:?}");
    let stops =
        |eos: Value| run(&Checkpoint::copy().json("generation_config.json", |c| c["eos_token_id"] = eos));
    assert_eq!(stops(json!(third)), all[..3]);
    assert_eq!(stops(json!([2, third])), all[..3]);
    assert_eq!(stops(json!([])), all, "no end token at all");
    // One that the model cannot make is harmless.
    assert_eq!(stops(json!([2, 1_000_000])), all);
    let odd = |eos: Value| {
        let checkpoint = Checkpoint::copy().json("generation_config.json", |c| c["eos_token_id"] = eos);
        checkpoint.load().err().unwrap().to_string()
    };
    for eos in [json!("</s>"), json!(-1), json!([2, "x"]), json!({"a": 1}), json!(1.5)] {
        assert!(odd(eos.clone()).contains("eos_token_id"), "{eos}");
    }
}

/// Mapped or read, the weights are the same bytes.
#[test]
fn load_modes_agree() {
    let checkpoint = Checkpoint::copy();
    let run = |load_mode| {
        let options = LoadOptions { load_mode, ..LoadOptions::default() };
        let mut engine = Engine::load(&checkpoint.source(), &options, SessionOptions::default()).unwrap();
        let image = picture(&mut engine).unwrap();
        let request = Request {
            max_tokens: Some(12),
            logprobs: Some(3),
            ..Request::ask("What is it?", &[image]).unwrap()
        };
        engine.generate(&request, |_| {}).unwrap().logprobs
    };
    assert_eq!(run(LoadMode::Mmap), run(LoadMode::Read));
}
