//! Checkpoints: every layout and kind of directory that opens, and every lie that does not.

use proptest::prelude::*;
use serde_json::{Value, json};
use std::fs::{self, File};
use std::path::Path;
use tempfile::TempDir;
use tessera::folder::Folder;
use tessera::model::checkpoint::LoadMode;
use tessera::model::config::{GenerationConfig, ModelConfig};
use tessera::model::names::{self, Layout};
use tessera::model::preset::Preset;
use tessera::model::weights::Weights;
use tessera::tensor::DType;
use tessera::{Error, Result};

/// A safetensors file: the length of the header, the header, the data.
fn safetensors(header: &str, data: usize) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend((0..data).map(|i| i as u8));
    file
}

/// A file's name and contents.
type Named<'a> = (&'a str, Vec<u8>);

/// A directory of these files.
fn directory(files: &[Named]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        fs::write(dir.path().join(name), bytes).unwrap();
    }
    dir
}

fn open(dir: &TempDir) -> Result<Weights> {
    Weights::open(&dir.path().into(), LoadMode::Mmap)
}

/// `model.norm.weight` of 2 f32, at 0, and one tensor more.
fn two_tensors(second: &str) -> String {
    format!(r#"{{"model.norm.weight":{{"dtype":"F32","shape":[2],"data_offsets":[0,8]}},{second}}}"#)
}

#[test]
fn fixtures_and_the_demo_open_and_hold_what_their_configs_imply() {
    let cases = [
        ("tests/data/a_llava15_new_bf16/model", Layout::StateDict, DType::BF16, 1),
        ("tests/data/b_llava15_old_f16_sharded/model", Layout::Hub, DType::F16, 3),
        ("tests/data/j_llama_chatml_f32/model", Layout::Llama, DType::F32, 1),
        ("tests/data/names_saved_v5/model", Layout::HubFlatTower, DType::BF16, 1),
        ("tests/data/names_memory_v5/model", Layout::StateDictFlatTower, DType::BF16, 1),
        ("assets/demo", Layout::HubFlatTower, DType::BF16, 1),
    ];
    for (dir, layout, dtype, files) in cases {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join(dir);
        let folder = Folder::from(&dir);
        let config = ModelConfig::load(&folder).unwrap();
        let generation = GenerationConfig::load(&folder, &config.text).unwrap();
        assert_eq!(generation.eos_token_ids, [2]);
        for mode in [LoadMode::Mmap, LoadMode::Read] {
            let weights = Weights::open(&folder, mode).unwrap();
            assert_eq!((weights.layout(), weights.storages().count()), (layout, files), "{}", dir.display());
            let specs = names::tensors(&config);
            let expected: Vec<_> = specs.iter().map(|spec| layout.spell(&spec.name)).collect();
            let mut found: Vec<_> = weights.tensors().iter().map(|tensor| tensor.name.clone()).collect();
            let mut sorted = expected.clone();
            sorted.sort();
            found.sort();
            assert_eq!(found, sorted, "{}", dir.display());
            for (spec, name) in specs.iter().zip(&expected) {
                let weight = weights.tensor(&spec.name, &spec.shape).unwrap();
                assert_eq!((&weight.name, weight.dtype), (name, dtype));
                assert_eq!(weight.rows * weight.cols, spec.elements());
                assert_eq!(weight.bytes.as_bytes().len(), spec.elements() * dtype.size());
            }
        }
    }
}

/// Every tensor of a LLaVA and of a LLaMA, in every layout, comes back to its canonical name.
#[test]
fn every_layout_spells_and_reads_every_name() {
    let multimodal =
        [Layout::Hub, Layout::StateDict, Layout::HubFlatTower, Layout::StateDictFlatTower, Layout::Original];
    let presets = [
        ("llava-tiny", &multimodal[..]),
        ("llava-next-tiny", &multimodal[..]),
        ("llama-tiny", &[Layout::Llama][..]),
    ];
    for (preset, layouts) in presets {
        let specs = names::tensors(&Preset::find(preset).unwrap().config(DType::F16).unwrap());
        for &layout in layouts {
            let spelt: Vec<_> = specs.iter().map(|spec| layout.spell(&spec.name)).collect();
            assert_eq!(Layout::detect(spelt.iter().map(String::as_str)), layout);
            for (spec, name) in specs.iter().zip(&spelt) {
                assert_eq!(names::canonical(name).as_ref(), Some(&spec.name), "{name} in {layout}");
            }
        }
    }
    // Spelt out once by hand, as the files have them.
    let by_hand = [
        (Layout::Hub, "vision.pre_layrnorm.bias", "vision_tower.vision_model.pre_layrnorm.bias"),
        (Layout::Hub, "lm.head.weight", "language_model.lm_head.weight"),
        (Layout::Hub, "lm.norm.weight", "language_model.model.norm.weight"),
        (
            Layout::StateDict,
            "lm.layers.1.mlp.up_proj.weight",
            "model.language_model.layers.1.mlp.up_proj.weight",
        ),
        (
            Layout::StateDict,
            "vision.post_layernorm.bias",
            "model.vision_tower.vision_model.post_layernorm.bias",
        ),
        (Layout::StateDict, "lm.head.weight", "lm_head.weight"),
        (Layout::Hub, "image_newline", "image_newline"),
        (Layout::StateDict, "image_newline", "model.image_newline"),
        (
            Layout::HubFlatTower,
            "vision.embeddings.class_embedding",
            "vision_tower.embeddings.class_embedding",
        ),
        (Layout::HubFlatTower, "projector.linear_2.bias", "multi_modal_projector.linear_2.bias"),
        (
            Layout::StateDictFlatTower,
            "projector.linear_1.weight",
            "model.multi_modal_projector.linear_1.weight",
        ),
        (Layout::StateDictFlatTower, "vision.pre_layrnorm.bias", "model.vision_tower.pre_layrnorm.bias"),
        (Layout::Llama, "lm.embed_tokens.weight", "model.embed_tokens.weight"),
        (Layout::Llama, "lm.head.weight", "lm_head.weight"),
        (Layout::Original, "projector.linear_1.weight", "model.mm_projector.0.weight"),
        (Layout::Original, "projector.linear_3.bias", "model.mm_projector.4.bias"),
        (Layout::OriginalLinear, "projector.linear_1.bias", "model.mm_projector.bias"),
        (Layout::OriginalLinear, "lm.norm.weight", "model.norm.weight"),
        (
            Layout::Original,
            "vision.pre_layrnorm.bias",
            "model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias",
        ),
    ];
    for (layout, canonical, name) in by_hand {
        assert_eq!(layout.spell(canonical), name);
        assert_eq!(names::canonical(name).as_deref(), Some(canonical));
    }
    // Names that only files beside a model have.
    for (name, canonical) in [
        ("base_model.model.model.mm_projector.2.weight", Some("projector.linear_2.weight")),
        ("vision_model.encoder.layers.3.mlp.fc1.bias", Some("vision.encoder.layers.3.mlp.fc1.bias")),
        ("encoder.layers.3.mlp.fc1.bias", Some("vision.encoder.layers.3.mlp.fc1.bias")),
        ("model.mm_projector.1.weight", None),
        ("model.mm_projector.x.weight", None),
        ("text_model.encoder.layers.0.mlp.fc1.bias", Some("text.encoder.layers.0.mlp.fc1.bias")),
        ("visual_projection.weight", Some("visual_projection.weight")),
        ("logit_scale", Some("logit_scale")),
    ] {
        assert_eq!(names::canonical(name).as_deref(), canonical, "{name}");
    }
    for buffer in
        ["model.layers.0.self_attn.rotary_emb.inv_freq", "vision_tower.vision_model.embeddings.position_ids"]
    {
        assert_eq!((names::canonical(buffer), names::is_buffer(buffer)), (None, true));
    }
}

#[test]
fn headers_that_cannot_be_trusted_are_refused() {
    let norm = r#"{"model.norm.weight":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
    let entry = |body: &str| format!(r#"{{"x":{{{body}}}}}"#);
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("has 0 bytes", vec![]),
        ("has 3 bytes", vec![1, 2, 3]),
        ("claims a header of 18446744073709551615 bytes", vec![255; 64]),
        ("claims a header of 100000001 bytes", [&100_000_001u64.to_le_bytes()[..], b"{}"].concat()),
        ("is truncated: the header has 2000 bytes", [&2000u64.to_le_bytes()[..], b"{}"].concat()),
        ("is truncated: the tensors need 8 bytes of data, the file has 7", safetensors(norm, 7)),
        ("1 unused bytes after `model.norm.weight`", safetensors(norm, 9)),
        ("the header is not valid", safetensors("", 0)),
        ("the header is not valid", safetensors("[]", 0)),
        ("the header is not valid", safetensors("{\"\u{fffd}", 0)),
        ("the header is not valid", safetensors(&"[".repeat(10_000), 0)),
        (
            "`x` stands there twice",
            safetensors(
                r#"{"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#,
                0,
            ),
        ),
        ("`__metadata__` stands there twice", safetensors(r#"{"__metadata__":{},"__metadata__":{}}"#, 0)),
        (
            "duplicate field `shape`",
            safetensors(&entry(r#""dtype":"U8","shape":[1],"shape":[0],"data_offsets":[0,0]"#), 0),
        ),
        (
            "overlap",
            safetensors(&two_tensors(r#""y":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}"#), 12),
        ),
        ("overlap", safetensors(&two_tensors(r#""y":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#), 8)),
        (
            "4 unused bytes between `model.norm.weight` and `y`",
            safetensors(&two_tensors(r#""y":{"dtype":"F32","shape":[2],"data_offsets":[12,20]}"#), 20),
        ),
        (
            "before it begins",
            safetensors(&two_tensors(r#""y":{"dtype":"F32","shape":[2],"data_offsets":[16,8]}"#), 16),
        ),
        (
            "does not fill the 8 bytes",
            safetensors(&two_tensors(r#""y":{"dtype":"F32","shape":[3],"data_offsets":[8,16]}"#), 16),
        ),
        (
            "does not fill",
            safetensors(
                &two_tensors(r#""y":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[8,8]}"#),
                8,
            ),
        ),
        (
            "the header is not valid",
            safetensors(&two_tensors(r#""y":{"dtype":"F32","shape":[-1],"data_offsets":[8,16]}"#), 16),
        ),
        (
            "the header is not valid",
            safetensors(&two_tensors(r#""y":{"dtype":"F32","shape":[2],"data_offsets":[8,1e30]}"#), 16),
        ),
        ("the header is not valid", safetensors(&two_tensors(r#""y":{"dtype":"F32","shape":[2]}"#), 8)),
        (
            "at most 8 dimensions",
            safetensors(
                &two_tensors(r#""y":{"dtype":"F32","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[8,12]}"#),
                12,
            ),
        ),
        (
            "is truncated",
            safetensors(&entry(r#""dtype":"F99","shape":[1],"data_offsets":[0,18446744073709551615]"#), 8),
        ),
        (
            "are the same tensor",
            safetensors(
                &two_tensors(
                    r#""language_model.model.norm.weight":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}"#,
                ),
                16,
            ),
        ),
    ];
    for (expected, bytes) in cases {
        let dir = directory(&[("model.safetensors", bytes)]);
        for mode in [LoadMode::Mmap, LoadMode::Read] {
            match Weights::open(&dir.path().into(), mode) {
                Err(Error::Checkpoint { file, problem }) => {
                    assert_eq!(file, dir.path().join("model.safetensors"));
                    assert!(problem.contains(expected), "expected `{expected}`, found `{problem}`");
                }
                other => panic!("expected `{expected}`, found {other:?}"),
            }
        }
    }
}

#[test]
fn odd_but_valid_files_open() {
    // The header's length puts the data at an odd address; sizes of 0, scalars, a dtype of the future.
    let header = two_tensors(
        r#""scalar":{"dtype":"I64","shape":[],"data_offsets":[8,16]},
           "none":{"dtype":"F32","shape":[0,5],"data_offsets":[16,16]},
           "future":{"dtype":"F5_NEW","shape":[3],"data_offsets":[16,19]},
           "lm_head.weight":{"dtype":"F16","shape":[1,2],"data_offsets":[19,23]},
           "__metadata__":{"format":"pt","note":[1]}"#,
    );
    for padding in 0..8 {
        let header = header.clone() + &" ".repeat(padding);
        let dir = directory(&[("model.safetensors", safetensors(&header, 23))]);
        let weights = open(&dir).unwrap();
        assert_eq!(weights.tensors().len(), 5);
        assert_eq!(weights.bytes(), 23);
        let norm = weights.vector("lm.norm.weight", 2).unwrap();
        assert_eq!((norm.rows, norm.cols, norm.bytes.as_bytes()), (1, 2, &[0, 1, 2, 3, 4, 5, 6, 7][..]));
        let head = weights.matrix("lm.head.weight", 1, 2).unwrap();
        assert_eq!((head.dtype, head.bytes.as_bytes()), (DType::F16, &[19, 20, 21, 22][..]));
    }
}

#[test]
fn a_tensor_of_the_wrong_kind_is_named_with_both_shapes() {
    let header =
        two_tensors(r#""model.embed_tokens.weight":{"dtype":"I8","shape":[2,4],"data_offsets":[8,16]}"#);
    let dir = directory(&[("model.safetensors", safetensors(&header, 16))]);
    let weights = open(&dir).unwrap();
    let cases = [
        (weights.vector("lm.norm.weight", 3), "model.norm.weight", "[3]", "F32 [2] in"),
        (weights.matrix("lm.norm.weight", 1, 2), "model.norm.weight", "[1, 2]", "F32 [2] in"),
        (
            weights.matrix("lm.embed_tokens.weight", 2, 4),
            "model.embed_tokens.weight",
            "[2, 4]",
            "I8 [2, 4] in",
        ),
        (
            weights.vector("lm.nrm.weight", 2),
            "model.nrm.weight",
            "[2]",
            "the nearest are `model.norm.weight`",
        ),
        (weights.vector("vision.x", 2), "vision_tower.vision_model.x", "[2]", "no such tensor in"),
    ];
    for (result, expected_name, expected_shape, expected_found) in cases {
        match result {
            Err(Error::Tensor { name, expected, found }) => {
                assert_eq!(name, expected_name);
                assert_eq!(expected, format!("F32, F16 or BF16 {expected_shape}"));
                assert!(found.contains(expected_found), "{found}");
            }
            other => panic!("{expected_name}: {other:?}"),
        }
    }
}

/// A file of one U8 tensor of one element for each name.
fn shard(names: &[&str]) -> Vec<u8> {
    let entry = |(i, name): (usize, &&str)| {
        format!(r#""{name}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{}]}}"#, i + 1)
    };
    let entries: Vec<_> = names.iter().enumerate().map(entry).collect();
    safetensors(&format!("{{{}}}", entries.join(",")), names.len())
}

fn index(map: Value) -> Vec<u8> {
    json!({ "metadata": { "total_size": 3 }, "weight_map": map }).to_string().into_bytes()
}

#[test]
fn shards_and_their_index_must_agree() {
    const INDEX: &str = "model.safetensors.index.json";
    let (one, two) = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors");
    let both = json!({ "a": one, "b": one, "c": two });
    let shards = || [(one, shard(&["a", "b"])), (two, shard(&["c"]))];
    let dir = |index: Vec<u8>, shards: &[Named]| directory(&[&[(INDEX, index)], shards].concat());

    let weights = open(&dir(index(both.clone()), &shards())).unwrap();
    let names: Vec<_> = weights.tensors().iter().map(|tensor| (tensor.name.as_str(), tensor.file)).collect();
    assert_eq!(names, [("a", 0), ("b", 0), ("c", 1)]);

    let cases: Vec<(&str, &str, Vec<u8>, Vec<Named>)> = vec![
        (two, "which is missing", index(both.clone()), shards()[..1].to_vec()),
        ("`d`", "no shard has it", index(json!({ "a": one, "c": two, "d": one })), shards().to_vec()),
        ("`b`", "but it is in", index(json!({ "a": one, "b": two, "c": one })), shards().to_vec()),
        (two, "does not list", index(json!({ "a": one, "b": one })), shards().to_vec()),
        ("`a`", "as well", index(both.clone()), vec![(one, shard(&["a", "b"])), (two, shard(&["c", "a"]))]),
        ("/etc/passwd", "same directory", index(json!({ "a": "/etc/passwd" })), vec![]),
        ("../x.safetensors", "same directory", index(json!({ "a": "../x.safetensors" })), vec![]),
        ("``", "", index(json!({ "": "./" })), vec![]),
        ("3", "same directory", index(json!({ "a": 3 })), vec![]),
        ("lists no tensors", "", index(json!({})), vec![]),
        ("weight_map", "has no object", b"{}".to_vec(), vec![]),
        ("not a JSON object", "", b"[".to_vec(), vec![]),
    ];
    for (name, problem, index, shards) in cases {
        let error = open(&dir(index, &shards)).unwrap_err().to_string();
        assert!(
            error.contains(name) && error.contains(problem),
            "expected `{name}` and `{problem}`: {error}"
        );
    }
}

#[test]
fn directories_without_an_index_are_taken_as_far_as_they_are_clear() {
    let good = shard(&["a"]);
    assert!(open(&directory(&[("weights.safetensors", good.clone())])).is_ok(), "the only file");
    let preferred = directory(&[("model.safetensors", good.clone()), ("other.safetensors", vec![])]);
    assert!(open(&preferred).is_ok(), "model.safetensors before others");
    let cases: [(&str, &[Named]); 5] = [
        ("has neither model.safetensors nor pytorch_model.bin", &[("readme.txt", vec![])]),
        ("a projector or an adapter alone is no model", &[("mm_projector.bin", vec![])]),
        ("is not a file of torch.save", &[("pytorch_model.bin", vec![])]),
        ("only safetensors and PyTorch", &[("model.gguf", vec![])]),
        ("has 2 safetensors files", &[("a.safetensors", good.clone()), ("b.safetensors", good.clone())]),
    ];
    for (expected, files) in cases {
        let error = open(&directory(files)).unwrap_err().to_string();
        assert!(error.contains(expected), "expected `{expected}`: {error}");
    }
    let dir = directory(&[]);
    assert!(matches!(
        Weights::open(&dir.path().join("nowhere").into(), LoadMode::Mmap),
        Err(Error::Io { .. })
    ));
    fs::create_dir(dir.path().join("model.safetensors")).unwrap();
    assert!(open(&dir).unwrap_err().to_string().contains("is not a regular file"));
}

/// To open a pipe is to wait for somebody to write to it.
#[cfg(unix)]
#[test]
fn pipes_are_refused_and_not_waited_for() {
    use std::os::unix::ffi::OsStrExt;
    let dir = directory(&[]);
    for name in ["model.safetensors", "config.json"] {
        let path = dir.path().join(name);
        let c_path = std::ffi::CString::new(path.as_os_str().as_bytes()).unwrap();
        // SAFETY: `c_path` is a nul-terminated string that outlives the call.
        assert_eq!(unsafe { libc::mkfifo(c_path.as_ptr(), 0o600) }, 0, "{}", std::io::Error::last_os_error());
    }
    let refused = [open(&dir).map(|_| ()), ModelConfig::load(&dir.path().into()).map(|_| ())];
    for error in refused.map(Result::unwrap_err) {
        assert!(error.to_string().contains("is not a regular file"), "{error}");
    }
}

/// Real header, no data: the file is a hole of 14 GB that takes no disk.
#[cfg(target_os = "linux")]
#[test]
fn opening_14_gb_makes_next_to_nothing_resident() {
    let preset = Preset::find("llava-1.5-7b").unwrap();
    let config = preset.config(DType::F16).unwrap();
    let specs = names::tensors(&config);
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for spec in &specs {
        let begin = end;
        end += spec.elements() * 2;
        let entry = json!({ "dtype": "F16", "shape": spec.shape, "data_offsets": [begin, end] });
        header.insert(Layout::Hub.spell(&spec.name), entry);
    }
    assert_eq!(end, 14_126_854_144, "the size of llava-hf/llava-1.5-7b-hf in f16");
    let bytes = safetensors(&Value::Object(header).to_string(), 0);
    let dir = directory(&[("model.safetensors", bytes.clone())]);
    let file = File::options().write(true).open(dir.path().join("model.safetensors")).unwrap();
    file.set_len((bytes.len() + end) as u64).unwrap();

    let weights = open(&dir).unwrap();
    for spec in &specs {
        weights.tensor(&spec.name, &spec.shape).unwrap();
    }
    for storage in weights.storages() {
        let resident = resident_bytes(storage.as_bytes());
        println!("{resident} bytes resident of {}", storage.as_bytes().len());
        assert!(resident < 4 << 20, "{resident} bytes are resident");
    }
}

/// Bytes of `mapping`, which begins at a page, that are in memory.
#[cfg(target_os = "linux")]
fn resident_bytes(mapping: &[u8]) -> usize {
    const PAGE: usize = 4096;
    let mut pages = vec![0u8; mapping.len().div_ceil(PAGE)];
    let address = mapping.as_ptr() as *mut libc::c_void;
    // SAFETY: `mapping` is a live mapping that begins at a page, and `pages` has one byte for each of
    // its pages, as mincore asks; it is a system call that only writes there.
    let status = unsafe { libc::mincore(address, mapping.len(), pages.as_mut_ptr()) };
    assert_eq!(status, 0, "mincore: {}", std::io::Error::last_os_error());
    pages.iter().filter(|&&page| page & 1 == 1).count() * PAGE
}

/// A valid header to damage.
fn sample_header() -> String {
    two_tensors(
        r#""model.embed_tokens.weight":{"dtype":"F16","shape":[3,4],"data_offsets":[8,32]},
           "lm_head.weight":{"dtype":"BF16","shape":[3,4],"data_offsets":[32,56]},
           "__metadata__":{"format":"pt"}"#,
    )
}

/// Opens the bytes and asks for every tensor; whatever happens is a typed error naming something.
fn survives(bytes: Vec<u8>) -> Result<(), TestCaseError> {
    let dir = directory(&[("model.safetensors", bytes)]);
    match open(&dir) {
        Ok(weights) => {
            for (name, shape) in [
                ("lm.norm.weight", &[2][..]),
                ("lm.embed_tokens.weight", &[3, 4]),
                ("lm.head.weight", &[3, 4]),
            ] {
                match weights.tensor(name, shape) {
                    Ok(weight) => prop_assert_eq!(
                        weight.bytes.as_bytes().len(),
                        shape.iter().product::<usize>() * weight.dtype.size()
                    ),
                    Err(error) => prop_assert!(matches!(error, Error::Tensor { .. }), "{}", error),
                }
            }
        }
        Err(error) => prop_assert!(matches!(error, Error::Checkpoint { .. }), "{}", error),
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn damaged_files_never_panic(
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        cut in any::<Option<prop::sample::Index>>(),
    ) {
        let mut bytes = safetensors(&sample_header(), 56);
        for (index, value) in damage {
            let at = index.index(bytes.len());
            bytes[at] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        survives(bytes)?;
    }

    /// Well-formed JSON with other numbers, which gets further than random bytes do.
    #[test]
    fn headers_with_other_numbers_never_panic(
        numbers in prop::collection::vec(prop_oneof![0u64..64, any::<u64>()], 11),
        which in prop::collection::vec(any::<prop::sample::Index>(), 1..3),
    ) {
        let header = sample_header();
        let mut pieces: Vec<String> = Vec::new();
        for c in header.chars() {
            let digit = c.is_ascii_digit();
            match pieces.last_mut() {
                Some(last) if digit && last.ends_with(|c: char| c.is_ascii_digit()) => last.push(c),
                Some(last) if !digit && !last.ends_with(|c: char| c.is_ascii_digit()) => last.push(c),
                _ => pieces.push(c.to_string()),
            }
        }
        let places: Vec<usize> = (0..pieces.len())
            .filter(|&i| i > 0 && pieces[i].parse::<u64>().is_ok() && pieces[i - 1].ends_with(['[', ',']))
            .collect();
        for (index, number) in which.iter().zip(numbers) {
            pieces[*index.get(&places)] = number.to_string();
        }
        survives(safetensors(&pieces.concat(), 56))?;
    }
}
