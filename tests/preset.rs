//! Presets: the sizes of the real models, seeds that mean the same bytes everywhere, and checkpoints
//! written from them.

use std::sync::atomic::{AtomicU64, Ordering};
use tessera::model::checkpoint::LoadMode;
use tessera::model::config::{ClipConfig, ModelConfig};
use tessera::model::names::TensorSpec;
use tessera::model::preset::{PRESETS, Preset};
use tessera::model::random::{self, Generator, Job};
use tessera::model::synth::{SynthOptions, synth};
use tessera::model::weights::Weights;
use tessera::tensor::DType;

/// Parameter counts of the published checkpoints.
#[test]
fn presets_have_the_sizes_of_the_real_models() {
    let cases = [
        ("llava-1.5-7b", 7_063_427_072),
        ("llava-1.5-13b", 13_351_494_656),
        // The newline is one row more.
        ("llava-1.6-7b", 7_063_427_072 + 4096),
        ("vicuna-7b", 6_738_415_616),
        ("clip-vit-l-14-336", 427_944_193),
        ("clip-vit-l-14", 427_616_513),
    ];
    for (name, parameters) in cases {
        assert_eq!(Preset::find(name).unwrap().bytes(DType::F16).unwrap(), 2 * parameters, "{name}");
    }
    for preset in PRESETS {
        // One of the two, and the other says which command is for it.
        match (preset.config(DType::BF16), preset.clip_config(DType::BF16)) {
            (Ok(_), Err(error)) => assert!(!preset.is_clip() && error.to_string().contains("tessera run")),
            (Err(error), Ok(_)) => assert!(preset.is_clip() && error.to_string().contains("tessera embed")),
            _ => panic!("{preset} is a language model or a CLIP"),
        }
    }
    let error = Preset::find("llava-70b").unwrap_err().to_string();
    assert!(error.contains("preset:llava-70b") && error.contains("llava-1.5-7b"), "{error}");
}

fn random(preset: &str, dtype: DType, seed: u64, threads: usize) -> Weights {
    Preset::find(preset).unwrap().weights(dtype, seed, threads, &|_| ()).unwrap()
}

fn all_bytes(weights: &Weights) -> &[u8] {
    weights.storages().next().unwrap().as_bytes()
}

#[test]
fn a_seed_means_the_same_weights_on_any_number_of_threads() {
    for dtype in [DType::F16, DType::BF16, DType::F32] {
        let one = random("llava-tiny", dtype, 7, 1);
        for threads in [2, 3] {
            assert!(
                all_bytes(&one) == all_bytes(&random("llava-tiny", dtype, 7, threads)),
                "{threads} threads"
            );
        }
        assert!(all_bytes(&one) != all_bytes(&random("llava-tiny", dtype, 8, 1)), "another seed");
    }
}

/// A tensor of three chunks, each a thread's share, has the bytes of one made in a single call.
#[test]
fn a_tensor_is_the_same_however_it_is_cut() {
    let spec = TensorSpec { name: "lm.embed_tokens.weight".into(), shape: vec![4500, 1024] };
    for dtype in [DType::BF16, DType::F32] {
        let generator = Generator::new(&spec, dtype, 5);
        let mut whole = vec![0; spec.elements() * dtype.size()];
        generator.fill(0, &mut whole);
        let mut cut = vec![0; whole.len()];
        let done = AtomicU64::new(0);
        let progress = |bytes| _ = done.fetch_max(bytes, Ordering::Relaxed);
        random::fill([Job { generator, first: 0, bytes: &mut cut }].into_iter(), 3, &progress);
        assert!(whole == cut, "{dtype}");
        assert_eq!(done.into_inner(), whole.len() as u64, "progress ends at the whole");
        let (first, size) = (1000, dtype.size());
        generator.fill(first, &mut cut[..40]);
        assert_eq!(cut[..40], whole[first * size..][..40], "from element {first}");
    }
}

/// Mean and deviation of a matrix, a norm, the head and a bias, within 5 standard errors.
#[test]
fn random_weights_have_the_variance_that_keeps_activations() {
    let weights = random("llava-tiny", DType::F32, 1, 2);
    let cases = [
        ("lm.layers.1.self_attn.q_proj.weight", vec![256, 256], 0.0, 1.0 / 16.0),
        ("lm.head.weight", vec![640, 256], 0.0, 3.0 / 16.0),
        ("lm.embed_tokens.weight", vec![640, 256], 0.0, 1.0),
        ("vision.embeddings.patch_embedding.weight", vec![128, 3, 14, 14], 0.0, 1.0 / 588f64.sqrt()),
        ("vision.encoder.layers.0.layer_norm1.weight", vec![128], 1.0, 0.1),
        ("vision.encoder.layers.0.mlp.fc1.bias", vec![256], 0.0, 0.02),
    ];
    for (name, shape, mean, std) in cases {
        let weight = weights.tensor(name, &shape).unwrap();
        let values: Vec<f64> = weight
            .bytes
            .as_bytes()
            .chunks_exact(4)
            .map(|bytes| f64::from(f32::from_le_bytes(bytes.try_into().unwrap())))
            .collect();
        let count = values.len() as f64;
        let found_mean = values.iter().sum::<f64>() / count;
        let found_std = (values.iter().map(|x| (x - found_mean).powi(2)).sum::<f64>() / count).sqrt();
        // A uniform variable's sample deviation has the relative standard error sqrt((1.8 - 1) / 4n).
        let (mean_error, std_error) = (std / count.sqrt(), std * (0.2 / count).sqrt());
        let off = ((found_mean - mean) / mean_error, (found_std - std) / std_error);
        println!("{name}: mean {:.2}, deviation {:.2} standard errors off, 5 allowed", off.0, off.1);
        assert!(off.0.abs() < 5.0 && off.1.abs() < 5.0, "{name}: {found_mean} ± {found_std}");
    }
}

#[test]
fn synth_writes_the_bytes_that_a_preset_makes() {
    let whole = u64::MAX;
    for (name, shard_bytes, files) in [
        ("llava-tiny", 1 << 20, 5),
        ("llava-next-tiny", whole, 1),
        ("llama-tiny", whole, 1),
        ("clip-tiny", whole, 1),
    ] {
        let preset = Preset::find(name).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let options = SynthOptions { dtype: DType::F16, seed: 3, shard_bytes, threads: 2 };
        synth(preset, dir.path(), options, &|_| ()).unwrap();

        match preset.is_clip() {
            true => assert_eq!(
                ClipConfig::load(&dir.path().into()).unwrap(),
                preset.clip_config(DType::F16).unwrap()
            ),
            false => {
                assert_eq!(ModelConfig::load(&dir.path().into()).unwrap(), preset.config(DType::F16).unwrap())
            }
        }
        let written = Weights::open(&dir.path().into(), LoadMode::Mmap).unwrap();
        let made = random(name, DType::F16, 3, 1);
        assert_eq!(written.storages().count(), files, "{name}");
        assert_eq!((written.layout(), written.tensors().len()), (made.layout(), made.tensors().len()));
        for spec in preset.tensors().unwrap() {
            let (a, b) = (written.tensor(&spec.name, &spec.shape), made.tensor(&spec.name, &spec.shape));
            assert!(a.unwrap().bytes.as_bytes() == b.unwrap().bytes.as_bytes(), "{}", spec.name);
        }
        for storage in written.storages() {
            // What Hugging Face's own reader thinks of it.
            safetensors::SafeTensors::deserialize(storage.as_bytes()).unwrap();
        }
        let again = synth(preset, dir.path(), options, &|_| ()).unwrap_err().to_string();
        assert!(again.contains("is not empty"), "{again}");
    }
}
