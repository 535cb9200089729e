//! CLIP without a checkpoint: tensors as transformers writes them, a tokenizer of bytes, and what a preset answers in
//! memory and from a directory.

use safetensors::SafeTensors;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tessera::backend::cpu::CpuBackend;
use tessera::folder::Folder;
use tessera::input::prompt::{ClipTokenizer, byte_vocabulary};
use tessera::model::config::{ClipConfig, Pooling};
use tessera::model::names::{self, Layout, is_buffer};
use tessera::model::preset::Preset;
use tessera::model::synth::{SynthOptions, synth};
use tessera::runtime::{Clip, Embedding, LoadOptions, Source, softmax};
use tessera::tensor::DType;

fn checkpoint(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(case).join("model")
}

#[test]
fn tensors_are_those_that_transformers_writes() {
    for case in ["f_clip_zeroshot", "clip_first_end"] {
        let config = ClipConfig::load(&checkpoint(case).into()).unwrap();
        let specs = names::clip_tensors(&config).into_iter();
        let ours: BTreeMap<_, _> = specs.map(|spec| (Layout::Clip.spell(&spec.name), spec.shape)).collect();
        let bytes = fs::read(checkpoint(case).join("model.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let written = file.tensors().into_iter().filter(|(name, _)| !is_buffer(name));
        let written: BTreeMap<_, _> = written.map(|(name, view)| (name, view.shape().to_vec())).collect();
        assert_eq!(ours, written, "{case}");

        // Of one tower what CLIPVisionModelWithProjection and CLIPTextModelWithProjection have.
        let part = |config: ClipConfig| names::clip_tensors(&config).len();
        let (vision, text) =
            (ClipConfig { text: None, ..config.clone() }, ClipConfig { vision: None, ..config });
        assert_eq!(part(vision) + part(text) + 1, ours.len(), "{case}: the scale belongs to both together");
    }
}

/// A vocabulary begins as OpenAI's does; what it makes of a text, by hand: a byte's id, or 256 more at the end of a
/// word.
#[test]
fn every_byte_of_a_text_is_a_token() {
    let json = fs::read(checkpoint("f_clip_zeroshot").join("vocab.json")).unwrap();
    let theirs: Value = serde_json::from_slice(&json).unwrap();
    let bytes = byte_vocabulary(49408);
    for (token, id) in bytes.iter().filter(|(_, id)| id.as_u64() < Some(512)) {
        assert_eq!(&theirs[token], id, "{token}");
    }
    assert_eq!(bytes.len(), 514);

    let folder = Preset::find("clip-vit-l-14-336").unwrap().folder(DType::F16);
    let tokenizer = ClipTokenizer::load(&folder, 49408, 77).unwrap();
    assert_eq!(tokenizer.end(), 49407);
    let cases: [(&str, &[u32]); 4] = [
        ("", &[]),
        // a, c a t, ' s, 4, 2, and é as two bytes.
        ("A  CAT's 42\né", &[320, 66, 64, 339, 6, 338, 275, 273, 127, 358]),
        ("x.", &[343, 269]),
        ("<|endoftext|>", &[49407]),
    ];
    for (text, expected) in cases {
        let tokens = tokenizer.encode(text).unwrap();
        assert_eq!(tokens.ids, [&[49406], expected, &[49407]].concat(), "{text:?}");
    }
    let tokens = tokenizer.encode(&"cat ".repeat(30)).unwrap();
    assert_eq!((tokens.ids.len(), tokens.ids[76], tokens.dropped), (77, 49407, 15));
}

/// The dimensions of openai/clip-vit-large-patch14-336 and -patch14.
#[test]
fn full_sizes_are_as_published() {
    for (name, image) in [("clip-vit-l-14-336", 336), ("clip-vit-l-14", 224)] {
        let config = Preset::find(name).unwrap().clip_config(DType::F16).unwrap();
        let (vision, text) = (config.vision.unwrap(), config.text.unwrap());
        assert_eq!((vision.image_size, vision.patch_size, vision.num_layers), (image, 14, 24));
        assert_eq!((vision.hidden_size, vision.intermediate_size, vision.num_heads), (1024, 4096, 16));
        assert_eq!((text.hidden_size, text.intermediate_size, text.num_layers), (768, 3072, 12));
        assert_eq!((text.num_heads, text.vocab_size, text.max_positions), (12, 49408, 77));
        assert_eq!((config.projection_dim, text.pooling), (768, Pooling::LargestId));
    }
}

const LABELS: [&str; 3] = ["a photo of a cat", "a photo of a dog, riding a bicycle", "white text: 42 %"];

/// A picture, the labels, and the logits of the labels.
fn answer(clip: &mut Clip) -> (Embedding, Vec<Embedding>, Vec<f32>) {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/samples/scene1.png");
    let picture = clip.image("scene1.png", &fs::read(file).unwrap()).unwrap();
    let labels = LABELS.map(|label| clip.text(label).unwrap()).to_vec();
    let logits = clip.logits(&picture, &labels).unwrap();
    (picture, labels, logits)
}

#[test]
fn a_preset_answers_in_memory_as_from_a_directory() {
    let preset = Preset::find("clip-tiny").unwrap();
    let load = |source: &Source, seed: u64| {
        let options = LoadOptions { preset_seed: seed, ..LoadOptions::default() };
        Clip::load_on(Arc::new(CpuBackend::new(Some(2)).unwrap()), source, &options).unwrap()
    };
    let mut made = load(&Source::Preset(preset), 3);
    let found = answer(&mut made);
    let (picture, labels, logits) = &found;
    let probabilities = softmax(logits);
    println!("{logits:?}: {probabilities:?}");
    assert!((probabilities.iter().sum::<f32>() - 1.0).abs() < 1e-6);
    // The scale of a CLIP that nobody has trained: exp(2.6592) times a cosine.
    assert!(logits.iter().all(|logit| logit.abs() <= 14.3) && logits[0] != logits[1]);
    for embedding in labels.iter().chain([picture]) {
        let length: f32 = embedding.unit.iter().map(|x| x * x).sum();
        assert!(embedding.unit.len() == 64 && (length - 1.0).abs() < 1e-5, "{length}");
    }

    let dir = tempfile::tempdir().unwrap();
    let options = SynthOptions { dtype: DType::F16, seed: 3, shard_bytes: u64::MAX, threads: 2 };
    synth(preset, dir.path(), options, &|_| ()).unwrap();
    let mut written = load(&Source::Directory(dir.path().into()), 0);
    assert_eq!(written.config(), made.config());
    assert!(answer(&mut written) == found, "the same bits");
    assert!(answer(&mut load(&Source::Preset(preset), 4)) != found, "another seed");

    // Its files are those that the preset has in memory, and none is missing.
    let Folder::Made { files, .. } = preset.folder(DType::F16) else { panic!("a preset's folder is made") };
    for (name, bytes) in &files {
        assert!(fs::read(dir.path().join(name)).unwrap() == *bytes, "{name}");
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), files.len() + 1);
}
