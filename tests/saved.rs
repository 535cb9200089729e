//! What transformers makes of files that say something twice, or leave it out: tied matrices, and the settings of the
//! image processor in either of two files.

mod spoilt;

use serde_json::{Value, json};
use spoilt::{Checkpoint, Tensor};
use std::fs;
use tessera::input::image::Preprocess;
use tessera::runtime::{Engine, Input, LoadOptions, Request, pictures};

const HEAD: &str = "language_model.lm_head.weight";
const EMBEDDING: &str = "language_model.model.embed_tokens.weight";

fn tied(checkpoint: Checkpoint, top: Value, text: Value) -> Checkpoint {
    checkpoint.json("config.json", |config| {
        config["tie_word_embeddings"] = top;
        config["text_config"]["tie_word_embeddings"] = text;
    })
}

/// The logits of every position of a text.
fn logits(checkpoint: &Checkpoint) -> Vec<u32> {
    let mut engine = checkpoint.engine().unwrap();
    let input = Input::Raw("the quick brown fox".into());
    let request = Request { max_tokens: Some(1), logprobs: Some(5), ..Request::new(input) };
    let answer = engine.generate(&request, |_| {}).unwrap();
    let first = &answer.logprobs[0];
    first.top.iter().flat_map(|&(id, logprob)| [id, logprob.to_bits()]).collect()
}

/// A copy in which the bytes of one matrix are those of another.
fn same(to: &str, from: &str) -> Checkpoint {
    Checkpoint::copy().tensors(|all| {
        let bytes = find(all, from).bytes.clone();
        all.iter_mut().find(|t| t.name == to).unwrap().bytes = bytes;
    })
}

fn find<'a>(all: &'a [Tensor], name: &str) -> &'a Tensor {
    all.iter().find(|t| t.name == name).unwrap()
}

fn without(name: &str) -> Checkpoint {
    Checkpoint::copy().tensors(|all| all.retain(|t| t.name != name))
}

#[test]
fn tied_matrices_are_as_in_transformers() {
    let plain = logits(&Checkpoint::copy());
    let as_embedding = logits(&same(HEAD, EMBEDDING));
    assert_ne!(plain, as_embedding);
    for (top, text) in [(json!(true), json!(false)), (json!(false), json!(true)), (json!(true), Value::Null)]
    {
        assert_eq!(logits(&tied(without(HEAD), top.clone(), text.clone())), as_embedding, "{top} {text}");
        // Both are there: both count.
        assert_eq!(logits(&tied(Checkpoint::copy(), top, text)), plain);
    }
    // The other way round.
    assert_eq!(logits(&tied(without(EMBEDDING), json!(true), Value::Null)), logits(&same(EMBEDDING, HEAD)));
    for checkpoint in [without(HEAD), tied(without(HEAD), json!(false), json!(false))] {
        let error = checkpoint.load().err().unwrap().to_string();
        assert!(error.contains(HEAD) && error.contains("tie_word_embeddings"), "{error}");
    }
}

/// transformers 5 saves one file; where both are, the settings inside `processor_config.json` count.
#[test]
fn the_image_processor_is_found_in_either_file() {
    const OLD: &str = "preprocessor_config.json";
    const NEW: &str = "processor_config.json";
    let load = |checkpoint: &Checkpoint| -> tessera::Result<Preprocess> {
        Ok(pictures::load_preprocess(&checkpoint.source(), &LoadOptions::default())?.1)
    };
    let old: Value = serde_json::from_slice(&fs::read(Checkpoint::copy().path(OLD)).unwrap()).unwrap();
    let mut changed = old.clone();
    for (key, value) in [("image_mean", json!([0.1, 0.2, 0.3])), ("resample", json!(2))] {
        changed[key] = value;
    }
    let nested =
        |settings: &Value| Checkpoint::copy().json(NEW, |file| file["image_processor"] = settings.clone());
    let [plain, other] = [&old, &changed]
        .map(|settings| load(&Checkpoint::copy().json(OLD, |file| *file = settings.clone())).unwrap());
    assert_ne!(plain, other);
    let alone = nested(&changed);
    fs::remove_file(alone.path(OLD)).unwrap();
    assert_eq!(load(&alone).unwrap(), other, "alone");
    assert_eq!(load(&nested(&changed)).unwrap(), other, "both");
    assert_eq!(load(&nested(&Value::Null)).unwrap(), plain, "null is none");
    let engine: Engine = alone.engine().unwrap();
    // Threads decide no pixel; an engine of the tests has one.
    let mut own = engine.model().preprocess().unwrap().clone();
    own.threads = other.threads;
    assert_eq!(own, other, "the model's own");

    let size = old["size"].clone();
    for (change, key) in [
        (json!({ "image_processor": [] }), "image_processor"),
        (json!({ "image_processor": { "crop_size": 1, "size": size } }), "crop_size"),
        (json!({ "patch_size": 3 }), "patch_size"),
        (json!({ "vision_feature_select_strategy": "full" }), "vision_feature_select_strategy"),
    ] {
        let checkpoint = Checkpoint::copy().json(NEW, |file| {
            file.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        });
        let error = load(&checkpoint).err().unwrap().to_string();
        assert!(error.contains(NEW) && error.contains(key), "{change}: {error}");
    }
    // A count that old files leave out, and class defaults get wrong, is known.
    load(&Checkpoint::copy().json(NEW, |file| file["num_additional_image_tokens"] = json!(0))).unwrap();

    // The pinpoints of tiles, too.
    let next = Checkpoint::copy_of("tests/data/next_mistral/model");
    let settings: Value = serde_json::from_slice(&fs::read(next.path(OLD)).unwrap()).unwrap();
    fs::remove_file(next.path(OLD)).unwrap();
    let next = next.json(NEW, |file| file["image_processor"] = settings);
    load(&next).unwrap();
    let next = next.json(NEW, |file| file["image_processor"]["image_grid_pinpoints"] = json!([[28, 56]]));
    let error = load(&next).err().unwrap().to_string();
    assert!(error.contains(NEW) && error.contains("image_grid_pinpoints"), "{error}");
}
