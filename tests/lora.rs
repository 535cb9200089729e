//! Adapters beside mapped weights: what they leave alone, how they add up, and that no malformed one gets
//! further than an error that names what is wrong. That their numbers are right is told in `golden.rs`.

mod spoilt;
mod torch_file;

use proptest::prelude::*;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tessera::backend::Prepared;
use tessera::graph::Control;
use tessera::model::lora::Lora;
use tessera::runtime::{Advance, Engine, Input, LoadOptions, Model, Phase, Request, Sampling, Session};
use tessera::runtime::{SessionOptions, Source, Want};

fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(path)
}

fn lora(path: &str, scale: f64) -> Lora {
    Lora { dir: data(path), scale }
}

/// The model of `names_saved_v5`: two decoder layers of width 32.
fn load(adapters: &[Lora], threads: usize) -> tessera::Result<Model> {
    let options = LoadOptions { lora: adapters.to_vec(), threads: Some(threads), ..LoadOptions::default() };
    Model::load(&Source::Directory(data("names_saved_v5/model")), &options)
}

fn session(adapters: &[Lora], threads: usize) -> Session {
    let options = SessionOptions {
        context: Some(128),
        prefill_chunk: 64,
        max_sequences: 3,
        all_logits: true,
        ..SessionOptions::default()
    };
    Session::new(Arc::new(load(adapters, threads).unwrap()), options).unwrap()
}

/// The logits of every row of a text, run in chunks.
fn logits(session: &mut Session, chunk: usize) -> Vec<f32> {
    let vocab = session.model().config().text.vocab_size;
    let ids: Vec<u32> = (0..50u32).map(|i| (i * 7919 + i * i * 31) % 128 + 5).collect();
    let mut sequence = session.sequence(&ids, Vec::new(), Sampling::GREEDY).unwrap();
    let mut all = Vec::new();
    while sequence.pending() > 0 {
        let tokens = sequence.pending().min(chunk);
        let advance = Advance { sequence: &mut sequence, tokens, want: Want::All, phase: Phase::Prefill };
        session.step(&mut [advance], &Control::default()).unwrap();
        for row in 0..tokens {
            let start = all.len();
            all.resize(start + vocab, 0.0);
            session.logits(0, row, &mut all[start..]).unwrap();
        }
    }
    all
}

fn furthest(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// A row's logits have the same bits in any chunk and on any number of threads, adapters or not.
#[test]
fn rows_do_not_know_one_another() {
    let adapters = [lora("lora_two/one", 1.0), lora("lora_two/two", 0.5)];
    let whole = logits(&mut session(&adapters, 1), 64);
    for (chunk, threads) in [(1, 1), (7, 3), (33, 2)] {
        let found = logits(&mut session(&adapters, threads), chunk);
        assert_eq!(found, whole, "chunks of {chunk}, {threads} threads");
    }
}

/// Scale 0 is no adapter; twice the half is the whole; and the order does not matter beyond rounding.
#[test]
fn adapters_add_up() {
    let [plain, zero, whole, halves, swapped, minus] = [
        vec![],
        vec![lora("lora_two/one", 0.0)],
        vec![lora("lora_two/one", 1.0)],
        vec![lora("lora_two/one", 0.5), lora("lora_two/one", 0.5)],
        vec![lora("lora_two/one", -1.0), lora("lora_two/one", 2.0)],
        vec![lora("lora_two/one", -1.0)],
    ]
    .map(|adapters| logits(&mut session(&adapters, 2), 64));
    assert_eq!(plain, zero);
    assert!(furthest(&plain, &whole) > 0.5, "the adapter does something");
    assert!(furthest(&minus, &whole) > 0.5, "and its sign matters");
    // Logits are of order 4, and a few roundings of f32 lie between: the goldens' own noise is 3e-5.
    for (name, other) in [("two halves", &halves), ("minus one and two", &swapped)] {
        let apart = furthest(other, &whole);
        assert!(apart < 5e-4, "{name} is {apart} from the whole");
    }
}

/// The same adapters in files of PyTorch, as peft and LLaVA's trainer wrote them for years: the same bits.
#[test]
fn a_twin_in_torch_files_makes_the_same_logits() {
    for name in ["one", "two"] {
        let (from, twin) = (data("lora_two").join(name), tempfile::tempdir().unwrap());
        fs::copy(from.join("adapter_config.json"), twin.path().join("adapter_config.json")).unwrap();
        let mut files = 0;
        for stem in ["adapter_model", "non_lora_trainables"] {
            let Ok(file) = fs::read(from.join(stem).with_extension("safetensors")) else { continue };
            let tensors = spoilt::read(&file);
            let saved = tensors.iter().map(|t| torch_file::Saved {
                name: &t.name,
                dtype: &t.dtype,
                shape: &t.shape,
                bytes: &t.bytes,
            });
            let bytes = torch_file::save(&saved.collect::<Vec<_>>());
            fs::write(twin.path().join(stem).with_extension("bin"), bytes).unwrap();
            files += 1;
        }
        assert_eq!(files, if name == "two" { 2 } else { 1 });
        let twin = Lora { dir: twin.path().into(), scale: 1.0 };
        let [twin, expected] = [twin, lora(&format!("lora_two/{name}"), 1.0)]
            .map(|adapter| logits(&mut session(&[adapter], 1), 64));
        assert_eq!(twin, expected, "{name}");
    }
}

/// What an adapter lies beside stays where it is, in the mapping, and so does the adapter itself.
#[test]
fn nothing_is_copied() {
    let model = load(&[lora("lora_two/one", 1.0)], 1).unwrap();
    let adapters = model.weights().adapters();
    let base: Vec<_> = model.weights().storages().map(|s| s.as_bytes().as_ptr_range()).collect();
    let graphs = [model.language(), &model.vision().unwrap().graph];
    let weights: Vec<_> = graphs.iter().flat_map(|graph| &graph.weights).collect();
    let inside = |addr: usize| base.iter().any(|r| (r.start.addr()..r.end.addr()).contains(&addr));
    let (own, added): (Vec<&Prepared>, Vec<&Prepared>) =
        weights.iter().partition(|weight| inside(weight.addr));
    let plain = load(&[], 1).unwrap();
    let count = plain.language().weights.len() + plain.vision().unwrap().graph.weights.len();
    assert_eq!(own.len(), count, "every weight of the model is in its file");
    assert!(added.iter().all(|weight| weight.name.contains(".lora_")), "{added:?}");
    let mapped = adapters[0].pairs().flat_map(|(_, pair)| [&pair.a, &pair.b]);
    let mapped: Vec<_> = mapped.map(|weight| weight.bytes.as_bytes().as_ptr().addr()).collect();
    assert!(added.iter().all(|weight| mapped.contains(&weight.addr)));
    // The tower's last block never runs, and so do its pairs.
    assert_eq!(added.len(), mapped.len() - 2 * 2);
}

/// Two engines over one checkpoint, with an adapter and without, asked in turn: what one has cached for a prefix
/// is not the other's, and what is continued is what is made at once.
#[test]
fn caches_are_not_shared_between_adapters() {
    let engine = |adapters: &[Lora]| Engine::new(session(adapters, 1));
    let ask = |engine: &mut Engine, text: &str| {
        let request = Request { max_tokens: Some(6), ..Request::new(Input::Raw(text.into())) };
        engine.generate(&request, |_| {}).unwrap()
    };
    let (first, second) = ("<s>What is it, and", "<s>What is it, and who made the whole thing?");
    let adapters = [lora("lora_two/one", 1.0)];
    let (mut plain, mut adapted) = (engine(&[]), engine(&adapters));
    for text in [first, second, first] {
        let (a, b) = (ask(&mut plain, text), ask(&mut adapted, text));
        assert_eq!(a.token_ids, ask(&mut engine(&[]), text).token_ids);
        assert_eq!(b.token_ids, ask(&mut engine(&adapters), text).token_ids);
        assert_ne!(a.token_ids, b.token_ids);
    }
    assert!(ask(&mut adapted, second).reused_tokens > 0, "something is reused");
    // Nor is a picture that the other has looked at.
    let bytes = fs::read(data("names_saved_v5/images/tree.png")).unwrap();
    let image = plain.image("tree.png", &bytes).unwrap();
    let request = Request { images: vec![image], ..Request::new(Input::Raw("<s><image>What?".into())) };
    plain.generate(&request, |_| {}).unwrap();
    let error = adapted.generate(&request, |_| {}).unwrap_err().to_string();
    assert!(error.contains("other adapters"), "{error}");
}

#[test]
fn adapters_are_spelt_with_and_without_a_scale() {
    for (text, dir, scale) in [
        ("a/b", "a/b", 1.0),
        ("a/b:0.5", "a/b", 0.5),
        ("a:b", "a:b", 1.0),
        ("a:b:2", "a:b", 2.0),
        ("a:-1e-1", "a", -0.1),
        ("a:", "a:", 1.0),
        ("a:0", "a", 0.0),
    ] {
        assert_eq!(Lora::parse(text).unwrap(), Lora { dir: dir.into(), scale }, "{text}");
    }
    for text in ["", ":1", "a:inf", "a:NaN", "a:-infinity"] {
        let error = Lora::parse(text).unwrap_err().to_string();
        assert!(error.contains("--lora"), "{text}: {error}");
    }
}

/// Tensors by name, as (dtype, shape, bytes).
type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// An adapter of q_proj of layer 0 and of the projector, which a test spoils.
struct Spoilt {
    config: Value,
    tensors: Tensors,
    others: Tensors,
}

const Q: &str = "base_model.model.model.language_model.layers.0.self_attn.q_proj";
const PROJECTOR: &str = "base_model.model.model.mm_projector.2";

fn zeros(shape: &[usize]) -> (Dtype, Vec<usize>, Vec<u8>) {
    (Dtype::F32, shape.to_vec(), vec![0; 4 * shape.iter().product::<usize>()])
}

impl Spoilt {
    fn new() -> Self {
        let tensors = [
            (format!("{Q}.lora_A.weight"), zeros(&[4, 32])),
            (format!("{Q}.lora_B.weight"), zeros(&[32, 4])),
        ];
        let others =
            [(format!("{PROJECTOR}.weight"), zeros(&[32, 32])), (format!("{PROJECTOR}.bias"), zeros(&[32]))];
        Spoilt {
            config: json!({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none"}),
            tensors: tensors.into(),
            others: others.into(),
        }
    }

    /// Writes it, and loads the model with it.
    fn load(&self) -> tessera::Result<Model> {
        let scratch = tempfile::tempdir().unwrap();
        fs::write(scratch.path().join("adapter_config.json"), self.config.to_string()).unwrap();
        write(&scratch.path().join("adapter_model.safetensors"), &self.tensors);
        write(&scratch.path().join("non_lora_trainables.safetensors"), &self.others);
        load(&[Lora { dir: scratch.path().into(), scale: 1.0 }], 1)
    }
}

fn write(path: &Path, tensors: &Tensors) {
    let views = tensors
        .iter()
        .map(|(name, (dtype, shape, bytes))| (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, path).unwrap();
}

#[test]
fn the_adapter_that_is_spoilt_below_is_sound() {
    let model = Spoilt::new().load().unwrap();
    let adapter = &model.weights().adapters()[0];
    assert_eq!(adapter.pairs().count(), 1);
    assert_eq!(adapter.pair("lm.layers.0.self_attn.q_proj.weight").unwrap().scale, 2.0);
    let replaced: Vec<_> = adapter.replacements().collect();
    assert_eq!(replaced, ["projector.linear_2.bias", "projector.linear_2.weight"]);
}

/// Every way in which settings cannot be honoured is refused by the setting's name.
#[test]
fn settings_that_cannot_be_honoured_are_named() {
    for (key, value) in [
        ("peft_type", json!("LOHA")),
        ("peft_type", json!(7)),
        ("r", json!(0)),
        ("r", json!(-4)),
        ("r", json!("4")),
        ("r", json!(1 << 20)),
        ("lora_alpha", json!(0)),
        ("lora_alpha", json!(-1.5)),
        ("lora_alpha", json!("8")),
        ("lora_alpha", json!(1e300)),
        ("use_rslora", json!("yes")),
        ("use_dora", json!(true)),
        ("lora_bias", json!(true)),
        ("use_qalora", json!(true)),
        ("fan_in_fan_out", json!(true)),
        ("layer_replication", json!([[0, 1]])),
        ("target_parameters", json!(["x"])),
        ("trainable_token_indices", json!([1])),
        ("alora_invocation_tokens", json!([1])),
        ("loftq_config", json!({"loftq_bits": 4})),
        ("init_lora_weights", json!("pissa_niter_4")),
        ("init_lora_weights", json!("olora")),
        ("rank_pattern", json!([])),
        ("rank_pattern", json!({"(": 4})),
        ("rank_pattern", json!({"q_proj": 0})),
        ("rank_pattern", json!({"q_proj": 1.5})),
        ("alpha_pattern", json!({"q_proj": -2})),
        ("alpha_pattern", json!({"q_proj": null})),
    ] {
        let mut spoilt = Spoilt::new();
        spoilt.config[key] = value.clone();
        let error = spoilt.load().err().unwrap_or_else(|| panic!("{key}: {value}")).to_string();
        assert!(error.contains(key) && error.contains("adapter_config.json"), "{key} {value}: {error}");
    }
    // Settings of the training alone are of no concern.
    let mut sound = Spoilt::new();
    for (key, value) in [
        ("use_dora", json!(false)),
        ("lora_dropout", json!(0.5)),
        ("layer_replication", Value::Null),
        ("loftq_config", json!({})),
        ("init_lora_weights", json!("gaussian")),
        ("a_key_of_the_future", json!({"x": 1})),
    ] {
        sound.config[key] = value;
    }
    sound.load().unwrap();
}

/// Patterns fit whole names or what stands behind a dot, the first one holds, and dots are any character.
#[test]
fn patterns_fit_as_in_peft() {
    for (pattern, fits) in [
        ("q_proj", true),
        ("proj", false),
        ("self_attn.q_proj", true),
        (r"layers\.0\.self_attn\.q_proj", true),
        ("layers.1.self_attn.q_proj", false),
        (r"layers\.\d+\.self_attn\.(q|k)_proj", true),
        ("k_proj|q_proj", true),
        ("model.language_model.layers.0.self_attn.q_proj", true),
        ("q_proj.weight", false),
    ] {
        let mut spoilt = Spoilt::new();
        spoilt.config["alpha_pattern"] = json!({"nothing": 1, pattern: 16, "q_proj$": 2, ".*": 8});
        let model = spoilt.load().unwrap();
        let scale = model.weights().adapters()[0].pairs().next().unwrap().1.scale;
        let expected = if fits { 4.0 } else { 0.5 };
        assert_eq!(scale, expected, "{pattern}");
    }
    let mut spoilt = Spoilt::new();
    spoilt.config["use_rslora"] = json!(true);
    let model = spoilt.load().unwrap();
    assert_eq!(model.weights().adapters()[0].pairs().next().unwrap().1.scale, 4.0, "8 / sqrt 4");
}

/// What a test does to the sound adapter.
type Edit = Box<dyn Fn(&mut Spoilt)>;

/// Removes a tensor of the adapter.
fn remove(name: String) -> Edit {
    Box::new(move |s| drop(s.tensors.remove(&name)))
}

/// Puts a tensor of zeros there, or in the place of one.
fn put(name: &str, shape: &'static [usize]) -> Edit {
    let name = name.to_string();
    Box::new(move |s| drop(s.tensors.insert(name.clone(), zeros(shape))))
}

/// The same among the tensors that are replaced whole.
fn put_whole(name: &str, shape: &'static [usize]) -> Edit {
    let name = name.to_string();
    Box::new(move |s| drop(s.others.insert(name.clone(), zeros(shape))))
}

fn set(key: &'static str, value: Value) -> Edit {
    Box::new(move |s| s.config[key] = value.clone())
}

/// Renames all tensors.
fn rename(from: &'static str, to: &'static str) -> Edit {
    Box::new(move |s| {
        let tensors = std::mem::take(&mut s.tensors).into_iter();
        s.tensors = tensors.map(|(name, tensor)| (name.replace(from, to), tensor)).collect();
    })
}

/// Tensors that are wrong are named, with what was expected.
#[test]
fn tensors_that_do_not_fit_are_named() {
    let (a, b) = (&*format!("{Q}.lora_A.weight"), &*format!("{Q}.lora_B.weight"));
    let of_q = |part: &str| format!("{Q}.{part}");
    let embedding = "base_model.model.model.language_model.embed_tokens.lora_embedding_A";
    let saved = "base_model.model.lm_head.modules_to_save.default.weight";
    let indices = {
        let a = a.to_string();
        move |s: &mut Spoilt| s.tensors.get_mut(&a).unwrap().0 = Dtype::I32
    };
    let nothing = |s: &mut Spoilt| {
        s.tensors.clear();
        s.others.clear();
    };
    let cases: Vec<(Edit, &str, &str)> = vec![
        (remove(a.into()), b, "lora_A of the same module"),
        (remove(b.into()), a, "lora_B of the same module"),
        // Rank: A and B by themselves, both against the settings, and none at all.
        (put(a, &[5, 32]), a, "[4, 32]"),
        (put(b, &[32, 5]), b, "[32, 4]"),
        (set("r", json!(8)), a, "[8, 32]"),
        (set("rank_pattern", json!({"q_proj": 2})), a, "[2, 32]"),
        (put(a, &[0, 32]), a, "[4, 32]"),
        // Another model's: wider, with more heads, deeper, of another family.
        (put(a, &[4, 64]), a, "[4, 32]"),
        (put(b, &[64, 4]), b, "[32, 4]"),
        (rename("layers.0.", "layers.2."), "layers.2.self_attn", "layers.2.self_attn.q_proj.weight"),
        (rename("q_proj", "qkv_proj"), "qkv_proj", "no such tensor"),
        (rename("model.language_model.layers.0", "transformer.h.0"), "transformer.h.0", "linear layer"),
        (rename("layers.0.self_attn.q_proj", "embed_tokens"), "embed_tokens", "linear layer"),
        (rename("self_attn.q_proj", "input_layernorm"), "input_layernorm", "linear layer"),
        // Shapes and dtypes that are no matrices of numbers.
        (put(a, &[128]), a, "[4, 32]"),
        (put(a, &[4, 32, 1]), a, "[4, 32]"),
        (Box::new(indices), a, "F32, F16 or BF16"),
        // What is no LoRA.
        (put(&of_q("lora_magnitude_vector"), &[32]), "magnitude", "DoRA"),
        (put(&of_q("lora_B.bias"), &[32]), "lora_B.bias", "lora_bias"),
        (put(&of_q("lora_C.weight"), &[32]), "lora_C", "save_pretrained"),
        (put(&of_q("lora_A.other.weight"), &[4, 32]), "other", "of one adapter"),
        (put(embedding, &[4, 136]), "embed_tokens", "adapter of an embedding"),
        (put(saved, &[136, 32]), "lm_head", "raw state dict"),
        (put("something.else", &[1]), "something.else", "a tensor of the model"),
        // The same tensor twice.
        (put(&of_q("lora_A.default.weight"), &[4, 32]), "lora_A.default.weight", "the same tensor"),
        (put_whole("multi_modal_projector.linear_2.bias", &[32]), "linear_2.bias", "the same tensor"),
        // Whole tensors.
        (put_whole(&format!("{PROJECTOR}.weight"), &[32, 31]), PROJECTOR, "[32, 32]"),
        (put_whole("model.mm_projector.9.weight", &[32, 32]), "mm_projector.9", "a tensor of the model"),
        (put_whole(a, &[4, 32]), a, "adapter_model"),
        (Box::new(nothing), "", "holds no tensors"),
    ];
    for (number, (edit, tensor, expected)) in cases.into_iter().enumerate() {
        let mut spoilt = Spoilt::new();
        edit(&mut spoilt);
        let error = spoilt.load().err().unwrap_or_else(|| panic!("case {number} is sound")).to_string();
        assert!(
            error.contains(tensor) && error.contains(expected),
            "{number}: no {tensor}, {expected}: {error}"
        );
    }
}

#[test]
fn what_is_no_adapter_is_told() {
    let refused = |adapters: &[Lora]| load(adapters, 1).err().unwrap().to_string();
    let error = refused(&[lora("nowhere", 1.0)]);
    assert!(error.contains("nowhere") && error.contains("adapter_config.json"), "{error}");
    let error = refused(&[lora("names_saved_v5/model", 1.0)]);
    assert!(error.contains("adapter_config.json"), "{error}");
    let error = refused(&vec![lora("lora_two/one", 0.1); 9]);
    assert!(error.contains("--lora") && error.contains("at most 8") && error.contains('9'), "{error}");
    load(&vec![lora("lora_two/one", 0.1); 8], 1).unwrap();
    // Two that replace one tensor cannot both be meant.
    let error = refused(&[lora("lora_two/two", 1.0), lora("lora_two/two", 0.5)]);
    assert!(error.contains("replaces") && error.contains("use one of them"), "{error}");
    // The adapter of another model.
    let error = refused(&[lora("h_lora_on_a/adapter", 1.0)]);
    assert!(error.contains("lora_A.weight") && error.contains("[8, "), "{error}");

    let scratch = tempfile::tempdir().unwrap();
    let dir = Lora { dir: scratch.path().into(), scale: 1.0 };
    for (file, bytes, expected) in [
        ("adapter_config.json", &b"["[..], "not a JSON object"),
        ("adapter_config.json", br#"{"peft_type": "LORA"}"#, "no adapter_model.safetensors"),
        ("adapter_model.safetensors", b"", "adapter_model.safetensors"),
        ("adapter_model.safetensors", b"\xff\xff\xff\xff\xff\xff\xff\x7f{}", "adapter_model.safetensors"),
    ] {
        fs::write(scratch.path().join(file), bytes).unwrap();
        let error = refused(std::slice::from_ref(&dir));
        assert!(error.contains(expected), "no {expected}: {error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// An adapter with flipped, cut or doubled bytes is an error or an adapter, never a panic.
    #[test]
    fn damaged_files_are_errors_or_adapters(
        file in prop::sample::select(vec!["adapter_config.json", "adapter_model.safetensors", "non_lora_trainables.safetensors"]),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let scratch = tempfile::tempdir().unwrap();
        for entry in fs::read_dir(data("lora_two/two")).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), scratch.path().join(entry.file_name())).unwrap();
        }
        let path = scratch.path().join(file);
        let mut bytes = fs::read(&path).unwrap();
        // Headers are where the harm is: half of the damage goes there.
        let head = bytes.len().min(1200);
        for (i, (at, byte)) in damage.iter().enumerate() {
            let at = at.index(if i % 2 == 0 { head } else { bytes.len() });
            bytes[at] = *byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        fs::write(&path, bytes).unwrap();
        let _ = load(&[Lora { dir: scratch.path().into(), scale: 1.0 }], 1);
    }
}
