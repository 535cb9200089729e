//! CLIP by itself against values from Hugging Face transformers: tokens, both pooling rules, towers,
//! projections, probabilities; halves of a model; and what is refused.

use safetensors::SafeTensors;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tessera::backend::cpu::CpuBackend;
use tessera::backend::cpu::lanes::Isa;
use tessera::folder::Folder;
use tessera::input::prompt::ClipTokenizer;
use tessera::runtime::{Clip, Embedding, Engine, LoadOptions, Model, SessionOptions, Source, softmax};

const CASES: [&str; 2] = ["f_clip_zeroshot", "clip_first_end"];

/// A case: a checkpoint, pictures, texts, and what the reference made of them.
struct Case {
    folder: PathBuf,
    json: Value,
    expected: Vec<u8>,
}

impl Case {
    fn load(name: &str) -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name);
        let json = serde_json::from_slice(&fs::read(folder.join("case.json")).unwrap()).unwrap();
        let expected = fs::read(folder.join("expected.safetensors")).unwrap();
        Case { folder, json, expected }
    }

    fn model(&self) -> PathBuf {
        self.folder.join("model")
    }

    fn clip(&self) -> Clip {
        clip(&self.model())
    }

    fn texts(&self) -> Vec<&str> {
        self.json["texts"].as_array().unwrap().iter().map(|t| t.as_str().unwrap()).collect()
    }

    fn images(&self) -> Vec<(String, Vec<u8>)> {
        let names = self.json["images"].as_array().unwrap().iter().map(|n| n.as_str().unwrap().to_string());
        names.map(|name| (name.clone(), fs::read(self.folder.join("images").join(name)).unwrap())).collect()
    }

    /// The largest deviation from a tensor of the reference, which may be ten times as far as f32 is from
    /// f64 there, but at least 2e-6: room for another order of summation.
    fn compare(&self, tensor: &str, ours: &[f32]) -> f64 {
        let all = SafeTensors::deserialize(&self.expected).unwrap();
        let bytes = all.tensor(tensor).unwrap().data();
        let expected: Vec<f32> =
            bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        let noise = self.json["measured"][format!("{tensor}_max_abs_diff_f32_vs_f64")].as_f64().unwrap();
        assert_eq!(ours.len(), expected.len(), "{tensor}");
        let worst = ours.iter().zip(&expected).map(|(a, b)| (*a as f64 - *b as f64).abs());
        let worst = worst.fold(0.0, |m, d| if d.is_nan() { f64::INFINITY } else { f64::max(m, d) });
        let bound = (10.0 * noise).max(2e-6);
        assert!(worst <= bound, "{tensor} deviates by {worst:e}, the bound is {bound:e}");
        worst
    }
}

fn clip(dir: &Path) -> Clip {
    Clip::load(&Source::Directory(dir.into()), &LoadOptions::default()).unwrap()
}

/// Why a directory is no CLIP.
fn refusal(dir: &Path) -> String {
    match Clip::load(&Source::Directory(dir.into()), &LoadOptions::default()) {
        Ok(_) => panic!("{} was loaded", dir.display()),
        Err(error) => error.to_string(),
    }
}

fn concat(embeddings: &[Embedding], part: fn(&Embedding) -> &Vec<f32>) -> Vec<f32> {
    embeddings.iter().flat_map(|e| part(e).iter().copied()).collect()
}

#[test]
fn vectors_and_probabilities_agree_with_the_reference() {
    for name in CASES {
        let case = Case::load(name);
        let mut clip = case.clip();
        let images: Vec<_> =
            case.images().iter().map(|(name, bytes)| clip.image(name, bytes).unwrap()).collect();
        let texts: Vec<_> = case.texts().iter().map(|text| clip.text(text).unwrap()).collect();
        let logits: Vec<_> = images.iter().map(|image| clip.logits(image, &texts).unwrap()).collect();
        let probabilities: Vec<_> = logits.iter().flat_map(|logits| softmax(logits)).collect();
        for (tensor, ours) in [
            ("vision.projected", concat(&images, |e| &e.projected)),
            ("image_embeds", concat(&images, |e| &e.unit)),
            ("text.projected", concat(&texts, |e| &e.projected)),
            ("text_embeds", concat(&texts, |e| &e.unit)),
            ("logits_per_image", logits.concat()),
            ("probs", probabilities),
        ] {
            println!("{name} {tensor}: {:.1e}", case.compare(tensor, &ours));
        }
    }
}

/// Lower case, white space, digits, accents, special tokens in a text, and where a text is cut off.
#[test]
fn tokens_are_those_of_transformers() {
    for name in CASES {
        let case = Case::load(name);
        let clip = case.clip();
        let positions = clip.config().text.as_ref().unwrap().max_positions;
        let mut cut = 0;
        for entry in case.json["tokens"].as_array().unwrap() {
            let text = entry["text"].as_str().unwrap();
            let expected: Vec<u32> =
                entry["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
            let tokens = clip.tokens(text).unwrap();
            assert_eq!(tokens.ids, expected, "{name}: {text:?}");
            assert_eq!(tokens.dropped > 0, text.len() > 200, "{name}: {text:?}");
            cut += usize::from(tokens.dropped > 0 && tokens.ids.len() == positions);
        }
        assert!(cut > 0, "no text was long enough");
    }
}

/// `vocab.json` and `merges.txt` make the tokenizer that `tokenizer.json` holds.
#[test]
fn both_forms_of_a_tokenizer_are_one() {
    let case = Case::load("f_clip_zeroshot");
    let scratch = tempfile::tempdir().unwrap();
    for file in ["vocab.json", "merges.txt"] {
        fs::copy(case.model().join(file), scratch.path().join(file)).unwrap();
    }
    let load = |dir: &Path| ClipTokenizer::load(&Folder::from(dir), 700, 77).unwrap();
    let (one, two) = (load(&case.model()), load(scratch.path()));
    for entry in case.json["tokens"].as_array().unwrap() {
        let text = entry["text"].as_str().unwrap();
        assert_eq!(one.encode(text).unwrap(), two.encode(text).unwrap(), "{text:?}");
    }
}

/// A vector has the same bits on every instruction set and thread count, and a text the same whether it runs
/// at 16 rows or, with more behind its end, at all of them.
#[test]
fn vectors_have_the_same_bits_everywhere() {
    let case = Case::load("f_clip_zeroshot");
    let (name, bytes) = case.images().remove(0);
    let mut first = None;
    for isa in Isa::available() {
        for threads in [1, 3] {
            let backend = Arc::new(CpuBackend::with_isa(isa, threads).unwrap());
            let source = Source::Directory(case.model());
            let mut clip = Clip::load_on(backend, &source, &LoadOptions::default()).unwrap();
            let found = (clip.image(&name, &bytes).unwrap(), clip.text("a photo of a cat").unwrap());
            assert_eq!(first.get_or_insert_with(|| found.clone()), &found, "{isa:?}, {threads} threads");
        }
    }
    let mut clip = case.clip();
    let short = clip.tokens("a photo of a cat").unwrap().ids;
    let end = *short.last().unwrap();
    for len in [short.len() + 1, 17, 33, 49, 77] {
        let padded: Vec<_> = short.iter().copied().chain(std::iter::repeat(end)).take(len).collect();
        assert_eq!(clip.ids(&padded).unwrap(), first.as_ref().unwrap().1, "{len} rows");
    }
}

/// A model of one tower, as `CLIPTextModelWithProjection` and `CLIPVisionModelWithProjection` are saved.
#[test]
fn half_a_model_does_its_half() {
    let case = Case::load("clip_first_end");
    let mut whole = case.clip();
    let (name, bytes) = case.images().remove(0);
    let config: Value = serde_json::from_slice(&fs::read(case.model().join("config.json")).unwrap()).unwrap();
    for (part, kept) in [("text", "text_"), ("vision", "vis")] {
        let scratch = tempfile::tempdir().unwrap();
        for file in ["vocab.json", "merges.txt", "preprocessor_config.json"] {
            fs::copy(case.model().join(file), scratch.path().join(file)).unwrap();
        }
        let mut config = config[format!("{part}_config")].clone();
        config["projection_dim"] = json!(24);
        fs::write(scratch.path().join("config.json"), config.to_string()).unwrap();
        let all = fs::read(case.model().join("model.safetensors")).unwrap();
        let all = SafeTensors::deserialize(&all).unwrap();
        let tensors = all.tensors().into_iter().filter(|(name, _)| name.starts_with(kept));
        safetensors::serialize_to_file(tensors, None, &scratch.path().join("model.safetensors")).unwrap();

        let mut half = clip(scratch.path());
        let (image, text) = (half.image(&name, &bytes), half.text("a fox"));
        let (Ok(done), Err(refused)) = (if part == "text" { (text, image) } else { (image, text) }) else {
            panic!("{part}: one of the two must work")
        };
        let expected = if part == "text" { whole.text("a fox") } else { whole.image(&name, &bytes) };
        assert_eq!(done, expected.unwrap(), "{part}");
        assert!(refused.to_string().contains("tower"), "{refused}");
        let error = half.logits(&done, std::slice::from_ref(&done)).unwrap_err().to_string();
        assert!(error.contains("logit_scale"), "{error}");
    }
}

/// Each kind of model says which command is for it.
#[test]
fn families_point_to_each_other() {
    let llava = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/a_llava15_new_bf16/model");
    let error = refusal(&llava);
    assert!(error.contains("tessera run") && error.contains("llava"), "{error}");
    let case = Case::load("f_clip_zeroshot");
    let source = Source::Directory(case.model());
    let error = Model::load(&source, &LoadOptions::default()).err().unwrap().to_string();
    assert!(error.contains("tessera classify") && error.contains("tessera embed"), "{error}");
    assert!(Engine::load(&source, &LoadOptions::default(), SessionOptions::default()).is_err());
    assert!(Clip::load(&Source::Demo, &LoadOptions::default()).is_err());
}

/// A checkpoint with one thing changed, and what the error must say.
#[test]
fn what_is_wrong_is_named() {
    let case = Case::load("clip_first_end");
    let change = |file: &str, edit: &dyn Fn(Vec<u8>) -> Option<Vec<u8>>| {
        let scratch = tempfile::tempdir().unwrap();
        for entry in fs::read_dir(case.model()).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), scratch.path().join(entry.file_name())).unwrap();
        }
        let path = scratch.path().join(file);
        match edit(fs::read(&path).unwrap_or_default()) {
            Some(bytes) => fs::write(&path, bytes).unwrap(),
            None => fs::remove_file(&path).unwrap(),
        }
        refusal(scratch.path())
    };
    let config = |pointer: &str, value: Value| {
        change("config.json", &|bytes| {
            let mut json: Value = serde_json::from_slice(&bytes).unwrap();
            let (parent, key) = pointer.rsplit_once('/').unwrap();
            json.pointer_mut(parent).unwrap()[key] = value.clone();
            Some(json.to_string().into_bytes())
        })
    };
    let text = |file: &str, new: &str| change(file, &|_| Some(new.as_bytes().to_vec()));
    let cases = [
        (config("/model_type", json!("siglip")), "CLIP is the only kind"),
        (config("/text_config/eos_token_id", json!(7)), "text_config.eos_token_id"),
        (config("/text_config/max_position_embeddings", json!(41)), "position_embedding"),
        (config("/text_config/max_position_embeddings", json!(1)), "max_position_embeddings"),
        (config("/text_config/vocab_size", json!(599)), "vocabulary ends before 599"),
        (config("/text_config/vocab_size", json!(601)), "token_embedding"),
        (config("/text_config/hidden_act", json!("relu")), "`quick_gelu` or `gelu`"),
        (config("/text_config/num_attention_heads", json!(5)), "divisor"),
        (config("/text_config", json!([])), "an object"),
        (config("/projection_dim", json!(25)), "visual_projection"),
        (config("/vision_config/num_hidden_layers", json!(3)), "encoder.layers.2"),
        (config("/vision_config/image_size", json!(40)), "crop_size"),
        (text("vocab.json", "{"), "vocab.json"),
        (text("vocab.json", "{\"a\": -1}"), "<|startoftext|>"),
        (text("vocab.json", "{\"<|startoftext|>\": 1, \"<|endoftext|>\": \"x\"}"), "<|endoftext|>"),
        (text("vocab.json", "{\"<|startoftext|>\": 1, \"<|endoftext|>\": 2, \"a\": \"b\"}"), "tokenizer"),
        (text("merges.txt", "#version: 0.2\na b c\n"), "line 2 is not two tokens"),
        (text("merges.txt", "zz yy\n"), "vocab.json"),
        (change("merges.txt", &|_| Some(vec![0xff, 0xfe])), "not UTF-8"),
        (change("merges.txt", &|_| None), "merges.txt"),
        (change("vocab.json", &|_| None), "tokenizer.json, or a vocab.json"),
        (text("tokenizer.json", "{}"), "tokenizer.json"),
        (text("tokenizer.json", "{\"version\":"), "tokenizer.json"),
        (change("model.safetensors", &|bytes| Some(bytes[..bytes.len() - 9].to_vec())), "model.safetensors"),
    ];
    for (error, expected) in cases {
        assert!(error.contains(expected), "no {expected:?} in: {error}");
    }

    let mut clip = case.clip();
    for (ids, expected) in [
        (vec![], "end token"),
        (vec![5; 41], "at most 40"),
        (vec![600], "below 600"),
        (vec![u32::MAX], "below 600"),
        (vec![1, 2], "end token"),
    ] {
        let error = clip.ids(&ids).unwrap_err().to_string();
        assert!(error.contains(expected), "no {expected:?} in: {error}");
    }
}
