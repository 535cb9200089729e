//! Files of `torch.save`: those that torch wrote hold what torch says, those that hold anything but tensors are
//! refused by name, and no damage does more than an error.

mod spoilt;
mod torch_file;

use proptest::prelude::*;
use proptest::sample::{Index, select};
use spoilt::Checkpoint;
use std::fs;
use std::path::{Path, PathBuf};
use tessera::model::checkpoint::LoadMode;
use tessera::model::weights::Weights;
use torch_file::{Saved, save, zip, zip_64};

fn data(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/torch").join(file)
}

/// Name, dtype, shape and bytes of every tensor, by name.
fn contents(weights: &Weights) -> Vec<(String, String, Vec<usize>, Vec<u8>)> {
    let storages: Vec<_> = weights.storages().collect();
    let tensors = weights.tensors().iter();
    let bytes = |t: &tessera::model::weights::TensorInfo| {
        storages[t.file].as_bytes()[t.offset..t.offset + t.bytes].to_vec()
    };
    tensors.map(|t| (t.name.clone(), t.dtype.clone(), t.shape.clone(), bytes(t))).collect()
}

/// Strides, offsets, shared storages, parameters, both pickle protocols.
#[test]
fn what_torch_wrote_is_what_is_read() {
    let expected = contents(&Weights::open_file(&data("tensors.safetensors"), LoadMode::Read).unwrap());
    assert_eq!(expected.len(), 14);
    for file in ["ordered.bin", "plain_protocol_4.bin", "parameters.bin", "state_dict.bin"] {
        for mode in [LoadMode::Mmap, LoadMode::Read] {
            let weights = Weights::open_file(&data(file), mode).unwrap();
            assert_eq!(contents(&weights), expected, "{file}");
            // Only what lies in another order was copied.
            let copied = ["columns_of_base", "every_other", "permuted", "transposed"];
            let others = weights.tensors().iter().filter(|t| t.file != 0);
            assert_eq!(others.map(|t| t.name.as_str()).collect::<Vec<_>>(), copied, "{file}");
        }
    }
}

#[test]
fn what_is_not_tensors_is_refused_by_name() {
    let cases = [
        ("legacy.bin", "before 1.6"),
        ("a_number.bin", "the number 7 as `step`, expected a tensor"),
        ("a_list.bin", "a list, expected a dictionary"),
        ("a_call.bin", "names `posix.system`, which is not allowed"),
        ("a_module.bin", "names `torch.nn.modules.linear.Linear`"),
        ("sparse.bin", "names `torch._utils._rebuild_sparse_tensor`"),
        ("expanded.bin", "tensor `wide`: it and the other tensors in another order"),
        ("torchscript.bin", "TorchScript"),
        ("compressed.bin", "is compressed"),
    ];
    for (file, part) in cases {
        let error = Weights::open_file(&data(file), LoadMode::Mmap).unwrap_err().to_string();
        assert!(error.contains(file) && error.contains(part), "{error}");
    }
}

/// A pickle in an archive of its own, with one storage of four floats.
fn with_pickle(pickle: &[u8]) -> Result<Weights, String> {
    open(&zip(&[("a/data.pkl", pickle), ("a/data/0", &[0; 16])]))
}

fn open(file: &[u8]) -> Result<Weights, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.bin");
    fs::write(&path, file).unwrap();
    Weights::open_file(&path, LoadMode::Read).map_err(|error| error.to_string())
}

/// `{"x": tensor}` over four floats with this offset, shape and strides, as pickle operations.
fn tensor(offset: &str, shape: &str, stride: &str) -> Vec<u8> {
    let storage = "((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ";
    let rest = "I00\nccollections\nOrderedDict\n)RtRs.".replace("I00\n", "N");
    format!("}}X\x01\0\0\0xctorch._utils\n_rebuild_tensor_v2\n{storage}{offset}{shape}{stride}{rest}")
        .into_bytes()
}

#[test]
fn tensors_stay_inside_their_storage() {
    let good = with_pickle(&tensor("K\x01", "K\x03\u{85}", "K\x01\u{85}").latin()).unwrap();
    assert_eq!((good.tensors()[0].shape.as_slice(), good.tensors()[0].bytes), (&[3][..], 12));
    for (offset, shape, stride, part) in [
        ("K\x02", "K\x03\u{85}", "K\x01\u{85}", "not inside its storage of 4"),
        ("K\x00", "K\x05\u{85}", "K\x01\u{85}", "not inside its storage of 4"),
        ("K\x00", "K\x02\u{85}", "K\x04\u{85}", "not inside its storage of 4"),
        ("K\x00", "J\u{ff}\u{ff}\u{ff}\u{7f}\u{85}", "K\x00\u{85}", "larger than the file"),
        ("K\x00", "(J\0\0\0@J\0\0\0@J\0\0\0@t", "(K\0K\0K\0t", "not inside its storage of 4"),
        ("J\u{ff}\u{ff}\u{ff}\u{ff}", "K\x01\u{85}", "K\x01\u{85}", "something else than numbers"),
        (")", "K\x01\u{85}", "K\x01\u{85}", "something else than numbers"),
        ("K\x00", "K\x01\u{85}", "(K\x01K\x01t", "of shape [1] and strides [1, 1]"),
        ("K\x00", "(K\x01K\x01K\x01K\x01K\x01K\x01K\x01K\x01K\x01t", ")", "something else than numbers"),
    ] {
        let error = with_pickle(&tensor(offset, shape, stride).latin()).unwrap_err();
        assert!(error.contains(part), "{offset:?} {shape:?} {stride:?}: {error}");
    }
}

/// Bytes that were written as characters of Latin-1, because Rust's texts hold no others.
trait Latin {
    fn latin(&self) -> Vec<u8>;
}

impl Latin for Vec<u8> {
    fn latin(&self) -> Vec<u8> {
        std::str::from_utf8(self).unwrap().chars().map(|c| c as u8).collect()
    }
}

#[test]
fn programs_that_are_no_dictionary_are_refused() {
    for (pickle, part) in [
        (&b""[..], "ends in the middle"),
        (b".", "empty stack"),
        (b"(.", "empty stack"),
        (b"N.", "holds None, expected a dictionary"),
        (b"}N", "ends in the middle"),
        (b"}K\x01s.", "empty stack"),
        (b"}(K\x01u.", "a key without a value"),
        (b"}K\x01K\x02s.", "called the number 1"),
        (b"NK\x01K\x02s.", "sets items of None"),
        (b"NNa.", "appends to None"),
        (b"u.", "never began"),
        (b"h\x05.", "never noted"),
        (b"cos\nsystem\n.", "names `os.system`"),
        (b"cbuiltins\neval\n(X\x01\0\0\0xtR.", "names `builtins.eval`"),
        (b"X\x02\0\0\0osX\x06\0\0\0system\x93.", "names `os.system`"),
        (b"ccollections\nOrderedDict\n)R(K\x01tR.", "calls a dictionary"),
        (b"ccollections\nOrderedDict\n(K\x01tR.", "calls OrderedDict with 1 arguments"),
        (b"Nb.", "empty stack"),
        (b"NNb.", "sets attributes of None"),
        (b"NQ.", "not a tensor's storage"),
        (b"\x8a\x09\0\0\0\0\0\0\0\0\0.", "a number of 9 bytes"),
        (b"X\xff\xff\xff\xffx", "ends in the middle"),
        (b"i", "operation 'i' (0x69)"),
        (b"P1\n.", "operation 'P'"),
        (b"\x81", "(0x81)"),
        // A list of itself.
        (b"]q\0h\0a.", "holds a list"),
    ] {
        let error = with_pickle(pickle).unwrap_err();
        assert!(error.contains(part), "{:?}: {error}", String::from_utf8_lossy(pickle));
    }
    // Deep nesting and endless copies end at a limit, not in the machine's.
    for (pickle, part) in [
        (b"]".repeat(2 << 20), "more than"),
        ([&b"Nq\0"[..], &b"h\0".repeat(2 << 20)].concat(), "more than"),
        (b"(".repeat(2 << 20), "ends in the middle"),
        ([b"N".repeat(1000), b"\x85".repeat(100_000), b".".to_vec()].concat(), "holds a tuple"),
    ] {
        let error = with_pickle(&pickle).unwrap_err();
        assert!(error.contains(part), "{error}");
    }
}

/// Files of 4 GiB and more: the same tensors, and numbers of 64 bits that lie are found out.
#[test]
fn wide_archives_are_read() {
    let pickle = tensor("K\x01", "K\x03\u{85}", "K\x01\u{85}").latin();
    let entries: [(&str, &[u8]); 2] = [("a/data.pkl", &pickle), ("a/data/0", &[7; 16])];
    let [narrow, wide] = [zip(&entries), zip_64(&entries)];
    assert_eq!(contents(&open(&wide).unwrap()), contents(&open(&narrow).unwrap()));
    for at in (0..wide.len()).rev().take(260) {
        for byte in [0, 1, 0x7F, 0xFF] {
            let mut file = wide.clone();
            file[at] = byte;
            survives(&file);
        }
    }
}

#[test]
fn archives_that_contradict_themselves_are_refused() {
    let good = fs::read(data("ordered.bin")).unwrap();
    let cases: [(Vec<u8>, &str); 7] = [
        (Vec::new(), "is not a file of torch.save"),
        (b"PK\x03\x04".to_vec(), "without its end"),
        (good[..good.len() - 1].to_vec(), "without its end"),
        (zip(&[("a/data.pkl", b"}."), ("b/data.pkl", b"}.")]), "the one entry"),
        (zip(&[("data.pkl", b"}.")]), "the one entry"),
        (zip(&[("a/data.pkl", b"}."), ("a/data.pkl", b"}.")]), "twice"),
        (zip(&[("a/data.pkl", b"}."), ("a/byteorder", b"big")]), "\"big\", expected little"),
    ];
    for (file, part) in cases {
        let error = open(&file).unwrap_err();
        assert!(error.contains(part), "{part}: {error}");
    }
    let missing = zip(&[("a/data.pkl", &tensor("K\x00", "K\x03\u{85}", "K\x01\u{85}").latin())]);
    assert!(open(&missing).unwrap_err().contains("tensor `x`: its storage `data/0` is missing"));
    let short = tensor("K\x00", "K\x03\u{85}", "K\x01\u{85}").latin();
    let short = zip(&[("a/data.pkl", &short), ("a/data/0", &[0; 15])]);
    assert!(open(&short).unwrap_err().contains("15 bytes, expected 4 elements of F32"));
    assert!(open(&zip(&[("a/data.pkl", b"}.")])).unwrap().tensors().is_empty());
}

/// A checkpoint whose weights were written by torch makes the same bits: one file, shards with an index, and
/// the projector apart.
#[test]
fn a_twin_in_torch_files_makes_the_same_text() {
    let tensors = spoilt::read(&fs::read(Checkpoint::copy().path(spoilt::WEIGHTS)).unwrap());
    let file = |keep: &dyn Fn(&str) -> bool| {
        let kept = tensors.iter().filter(|t| keep(&t.name));
        let saved = kept.map(|t| Saved { name: &t.name, dtype: &t.dtype, shape: &t.shape, bytes: &t.bytes });
        save(&saved.collect::<Vec<_>>())
    };
    let is_projector = |name: &str| name.contains("projector");
    let index = |shards: [&str; 2]| {
        let shard = |name: &str| shards[usize::from(is_projector(name))];
        let map: serde_json::Map<_, _> =
            tensors.iter().map(|t| (t.name.clone(), shard(&t.name).into())).collect();
        serde_json::json!({ "weight_map": map }).to_string().into_bytes()
    };
    let shards = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"];
    let twins: [Vec<(&str, Vec<u8>)>; 3] = [
        vec![("pytorch_model.bin", file(&|_| true))],
        vec![
            (shards[0], file(&|name| !is_projector(name))),
            (shards[1], file(&is_projector)),
            ("pytorch_model.bin.index.json", index(shards)),
        ],
        vec![
            ("pytorch_model.bin", file(&|name| !is_projector(name))),
            ("mm_projector.bin", file(&is_projector)),
        ],
    ];
    let logits = |checkpoint: &Checkpoint| {
        let mut engine = checkpoint.engine().unwrap();
        let image = spoilt::picture(&mut engine).unwrap();
        let request = tessera::runtime::Request {
            max_tokens: Some(4),
            logprobs: Some(3),
            ..tessera::runtime::Request::ask("What is it?", &[image]).unwrap()
        };
        let answer = engine.generate(&request, |_| {}).unwrap();
        let bits = |token: &tessera::runtime::request::TokenLogProb| (token.id, token.logprob.to_bits());
        answer.logprobs.iter().map(bits).collect::<Vec<_>>()
    };
    let expected = logits(&Checkpoint::copy());
    for files in twins {
        let twin = Checkpoint::copy();
        fs::remove_file(twin.path(spoilt::WEIGHTS)).unwrap();
        for (name, bytes) in &files {
            fs::write(twin.path(name), bytes).unwrap();
        }
        assert_eq!(logits(&twin), expected, "{:?}", files.iter().map(|f| f.0).collect::<Vec<_>>());
    }
}

/// Reads everything that a file claims to hold.
fn survives(file: &[u8]) {
    if let Ok(weights) = open(file) {
        assert!(contents(&weights).iter().map(|tensor| tensor.3.len()).sum::<usize>() <= 64 * file.len());
    }
}

/// Operations that pickles of tensors are made of, and some that are not allowed.
fn operation() -> impl Strategy<Value = Vec<u8>> {
    let fixed: Vec<&'static [u8]> = vec![
        b"(",
        b"N",
        b"\x88",
        b"]",
        b"}",
        b")",
        b"t",
        b"a",
        b"e",
        b"s",
        b"u",
        b"R",
        b"b",
        b"Q",
        b"0",
        b"1",
        b"\x85",
        b"\x86",
        b"\x87",
        b"\x94",
        b"q\x01",
        b"h\x01",
        b"h\0",
        b"q\0",
        b"K\x03",
        b"J\xff\xff\xff\xff",
        b"\x93",
        b".",
        b"ccollections\nOrderedDict\n",
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"ctorch\nFloatStorage\n",
        b"ctorch._utils\n_rebuild_parameter\n",
        b"X\x01\0\0\x000",
        b"X\x07\0\0\0storage",
        b"\x8c\x03cpu",
        b"\x8a\x01\x04",
        b"G\0\0\0\0\0\0\0\0",
        b"\x95\0\0\0\0\0\0\0\0",
        b"cos\nsystem\n",
        b"\x81",
        b"i",
    ];
    select(fixed).prop_map(<[u8]>::to_vec)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn damaged_files_never_panic(
        file in select(vec!["ordered.bin", "parameters.bin", "plain_protocol_4.bin", "state_dict.bin"]),
        changes in prop::collection::vec((any::<Index>(), any::<u8>()), 0..4),
        cut in prop::option::weighted(0.1, any::<Index>()),
    ) {
        let mut bytes = fs::read(data(file)).unwrap();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        survives(&bytes);
    }

    #[test]
    fn any_program_ends(
        before in prop::collection::vec(operation(), 0..12),
        after in prop::collection::vec(operation(), 0..40),
        at in any::<Index>(),
    ) {
        survives(&zip(&[("a/data.pkl", &after.concat()), ("a/data/0", &[0; 16])]));
        // The same put into a program that is right.
        let mut good = tensor("K\x01", "K\x03\u{85}", "K\x01\u{85}").latin();
        let at = at.index(good.len());
        good.splice(at..at, before.concat());
        survives(&zip(&[("a/data.pkl", &good), ("a/data/0", &[0; 16])]));
    }
}
