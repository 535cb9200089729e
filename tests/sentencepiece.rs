//! `tokenizer.model`: the ids of SentencePiece itself, those of the `tokenizer.json` beside it, and models that are
//! refused.

use proptest::prelude::*;
use proptest::sample::Index;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;
use tessera::Result;
use tessera::input::prompt::{TextStream, Tokenizer};

const CASES: [&str; 3] = ["legacy", "first", "no_byte_fallback"];

fn data(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/sentencepiece").join(file)
}

/// A copy of a case's folder without its tokenizer.json, changed by `change`.
fn copy(case: &str, change: impl FnOnce(&Path)) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for file in ["tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"] {
        fs::write(dir.path().join(file), fs::read(data(case).join(file)).unwrap()).unwrap();
    }
    change(dir.path());
    dir
}

fn load(dir: &Path) -> Result<Tokenizer> {
    Tokenizer::load(&dir.into(), 512, None)
}

/// The tokenizer of tokenizer.json and the one of tokenizer.model.
fn both(case: &str) -> [Tokenizer; 2] {
    [load(&data(case)).unwrap(), load(copy(case, |_| ()).path()).unwrap()]
}

#[test]
fn ids_are_those_of_sentencepiece() {
    let cases: Value = serde_json::from_slice(&fs::read(data("cases.json")).unwrap()).unwrap();
    for case in CASES {
        let [_, model] = both(case);
        let texts = cases[case].as_array().unwrap();
        assert!(texts.len() > 150, "{case}");
        for pair in texts {
            let text = pair[0].as_str().unwrap();
            let mut expected: Vec<u32> = serde_json::from_value(pair[1].clone()).unwrap();
            assert_eq!(model.encode(text, false).unwrap(), expected, "{case} {text:?}");
            expected.insert(0, 1);
            assert_eq!(model.encode(text, true).unwrap(), expected, "{case} {text:?}: BOS");
        }
    }
}

/// What SentencePiece knows nothing of: special tokens within a text, and text behind them.
#[test]
fn special_tokens_are_as_in_tokenizer_json() {
    for case in CASES {
        let [json, model] = both(case);
        for text in [
            "</s>",
            "<s>a",
            "a</s>b",
            "a </s> b",
            "a<image>\nb",
            "<image><image> a",
            "</s></s>",
            "<pad>x",
            " </s>",
        ] {
            for special in [false, true] {
                let expected = json.encode(text, special).unwrap();
                assert_eq!(model.encode(text, special).unwrap(), expected, "{case} {text:?}");
                assert_eq!(model.decode(&expected), json.decode(&expected), "{case} {text:?}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn any_text_has_the_ids_and_the_text_of_tokenizer_json(
        text in r"([ a-zA-Z0-9.,▁\n]{0,12}|\PC{0,6}|</s>|<image>|the|  ){0,8}",
        ids in prop::collection::vec(0u32..440, 0..20),
    ) {
        thread_local! {
            static TOKENIZERS: [[Tokenizer; 2]; 3] = CASES.map(both);
        }
        TOKENIZERS.with(|all| {
            for [json, model] in all {
                let expected = json.encode(&text, true).unwrap();
                assert_eq!(model.encode(&text, true).unwrap(), expected, "{text:?}");
                assert_eq!(model.decode(&expected), json.decode(&expected), "{text:?}");
                let stream = |tokenizer: &Tokenizer| {
                    let mut stream = TextStream::new(tokenizer);
                    let mut text: Vec<String> = ids.iter().map(|&id| stream.push(id)).collect();
                    text.push(stream.finish());
                    text
                };
                assert_eq!(stream(model), stream(json), "{ids:?}");
            }
        });
    }

    #[test]
    fn damaged_models_never_panic(
        case in 0..3usize,
        changes in prop::collection::vec((any::<Index>(), any::<u8>()), 0..4),
        cut in prop::option::weighted(0.2, any::<Index>()),
    ) {
        let dir = copy(CASES[case], |dir| {
            let mut bytes = fs::read(dir.join("tokenizer.model")).unwrap();
            // Half of the changes among the settings, which stand at the end.
            for (i, (at, byte)) in changes.into_iter().enumerate() {
                let tail = if i % 2 == 0 { bytes.len() } else { 200 };
                let at = bytes.len() - tail + at.index(tail);
                bytes[at] = byte;
            }
            if let Some(cut) = cut {
                bytes.truncate(cut.index(bytes.len()));
            }
            fs::write(dir.join("tokenizer.model"), bytes).unwrap();
        });
        if let Ok(tokenizer) = load(dir.path()) {
            let ids = tokenizer.encode("USER: the quick\nbrown 日本 fox</s>", true);
            ids.map(|ids| tokenizer.decode(&ids)).ok();
        }
    }
}

/// A SentencePiece model: pieces with kinds, then raw fields of TrainerSpec and NormalizerSpec.
fn model(pieces: &[(&str, u8)], trainer: &[u8], normalizer: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let field = |number: u8, content: &[u8]| [&[number << 3 | 2, content.len() as u8], content].concat();
    for &(text, kind) in pieces {
        let piece = [field(1, text.as_bytes()), vec![2 << 3 | 5, 0, 0, 0, 0, 3 << 3, kind]].concat();
        bytes.extend(field(1, &piece));
    }
    bytes.extend(field(2, trainer));
    bytes.extend(field(3, normalizer));
    bytes
}

const PIECES: [(&str, u8); 4] = [("<unk>", 2), ("<s>", 3), ("</s>", 3), ("a", 1)];
/// `model_type` BPE.
const BPE: &[u8] = &[3 << 3, 2];
/// `remove_extra_whitespaces` false.
const KEEP_SPACES: &[u8] = &[4 << 3, 0];

#[test]
fn other_models_are_refused_by_name() {
    let keep = |more: &[u8]| [KEEP_SPACES, more].concat();
    let bpe = |more: &[u8]| [BPE, more].concat();
    let long = "x".repeat(100);
    for (bytes, part) in [
        (model(&PIECES, BPE, KEEP_SPACES), ""),
        (model(&PIECES, &[], KEEP_SPACES), "is a unigram model, expected BPE"),
        (model(&PIECES, &[3 << 3, 1], KEEP_SPACES), "is a unigram model"),
        (model(&PIECES, &[3 << 3, 4], KEEP_SPACES), "is a character model"),
        (model(&PIECES, &bpe(&[0xC0, 1, 1]), KEEP_SPACES), "treat_whitespace_as_suffix"),
        (model(&PIECES, BPE, &[]), "remove_extra_whitespaces"),
        (model(&PIECES, BPE, &keep(&[2 << 3 | 2, 1, 7])), "a character map"),
        (model(&PIECES, BPE, &keep(&[5 << 3, 0])), "escape_whitespaces"),
        (model(&PIECES, &bpe(&[0xC0, 2, 4]), KEEP_SPACES), "<unk> is 4"),
        (model(&PIECES, &bpe(&[0xC8, 2, 9]), KEEP_SPACES), "<s> 9"),
        (model(&[], BPE, KEEP_SPACES), "has no pieces"),
        (model(&[PIECES[0], PIECES[1], ("a", 1), ("a", 1)], BPE, KEEP_SPACES), "two pieces of one text"),
        (model(&[PIECES[0], PIECES[1], ("a", 5)], BPE, KEEP_SPACES), "an unused piece, \"a\""),
        (model(&[PIECES[0], PIECES[1], ("", 1)], BPE, KEEP_SPACES), "a piece without a text"),
        (b"{\"version\": \"1.0\"}".to_vec(), "is not a SentencePiece model"),
        (long.into_bytes(), "has no pieces"),
    ] {
        let dir = copy("legacy", |dir| {
            fs::write(dir.join("tokenizer.model"), &bytes).unwrap();
            fs::remove_file(dir.join("tokenizer_config.json")).unwrap();
        });
        match load(dir.path()) {
            Ok(_) => assert!(part.is_empty(), "{part}: accepted"),
            Err(error) => {
                let error = error.to_string();
                assert!(
                    !part.is_empty() && error.contains(part) && error.contains("tokenizer.model"),
                    "{error}"
                );
            }
        }
    }
}

#[test]
fn tokens_are_added_as_the_files_beside_the_model_say() {
    let with = |added: Value| {
        copy("legacy", |dir| {
            fs::remove_file(dir.join("tokenizer_config.json")).unwrap();
            fs::write(dir.join("added_tokens.json"), added.to_string()).unwrap();
            let map = json!({"additional_special_tokens": ["<im_start>", {"content": "<im_end>"}]});
            fs::write(dir.join("special_tokens_map.json"), map.to_string()).unwrap();
        })
    };
    let dir = with(json!({"<im_end>": 482, "<im_start>": 481, "<other>": 480}));
    let tokenizer = load(dir.path()).unwrap();
    let ids = tokenizer.encode("<im_start><other>a<im_end>", true).unwrap();
    assert_eq!((ids[0], ids[1], ids[2], ids[ids.len() - 1]), (1, 481, 480, 482));
    assert_eq!(tokenizer.decode(&ids), "<other> a", "special tokens are not shown, others are");
    for (added, part) in [
        (json!({"<x>": 481}), "adds \"<x>\" as id 481, expected 480"),
        (json!({"<x>": 5}), "says that 5 is \"<x>\""),
        (json!({"<x>": "480"}), "a token with its id"),
        (json!([1]), "expected a JSON object"),
        (json!({"<x>": 480, "<y>": 600}), "adds \"<y>\" as id 600, expected 481"),
    ] {
        let error = load(with(added).path()).err().unwrap().to_string();
        assert!(error.contains(part), "{error}");
    }
    // Nothing at all.
    let empty = tempfile::tempdir().unwrap();
    let error = load(empty.path()).err().unwrap().to_string();
    assert!(error.contains("tokenizer.json") && error.contains("tokenizer.model"), "{error}");
}
