//! The demo model against Hugging Face: on the processor the same token ids to every shipped question, all of them; on
//! CUDA devices, whose activations have 16 bits, the right answer wherever Hugging Face has it.

mod devices;

use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;
use tessera::runtime::{Engine, ImageHandle, LoadOptions, Model, Request, Session, SessionOptions, Source};
use tessera::tensor::DType;

fn lines(file: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(file).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn every_shipped_question_is_answered_as_by_the_reference() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/eval");
    let mut engine = Engine::load(&Source::Demo, &LoadOptions::default(), SessionOptions::default()).unwrap();
    let mut images: HashMap<String, ImageHandle> = HashMap::new();
    let expected = lines(&folder.join("expected_hf.jsonl"));
    assert_eq!(expected.len(), lines(&folder.join("questions.jsonl")).len());
    for line in &expected {
        let (image, question) = (line["image"].as_str().unwrap(), line["question"].as_str().unwrap());
        if !images.contains_key(image) {
            let bytes = std::fs::read(folder.join(image)).unwrap();
            images.insert(image.into(), engine.image(image, &bytes).unwrap());
        }
        let request = Request::ask(question, &[images[image].clone()]).unwrap();
        let answer = engine.generate(&request, |_| {}).unwrap();
        let ids: Vec<u32> =
            line["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
        assert_eq!(answer.token_ids, ids, "{image}: {question} {}", answer.text);
        assert_eq!(answer.text, line["answer"].as_str().unwrap(), "{image}: {question}");
    }
    println!("{} questions", expected.len());
    assert!(expected.len() >= 600);
}

/// One question of every type, most of them on one picture: all 697 would take the emulated device an hour, and
/// `scripts/gpu/prove` asks a GPU those.
#[test]
fn every_type_of_question_is_answered_on_every_device() {
    let folder = Path::new("assets/eval");
    let (questions, expected) =
        (lines(&folder.join("questions.jsonl")), lines(&folder.join("expected_hf.jsonl")));
    let mut first_of_type: BTreeMap<&str, &Value> = BTreeMap::new();
    for (question, line) in questions.iter().zip(&expected).filter(|(_, line)| line["correct"] == true) {
        first_of_type.entry(question["type"].as_str().unwrap()).or_insert(line);
    }
    assert!(first_of_type.len() >= 11, "{:?}", first_of_type.keys());
    for tested in devices::drivers() {
        let backend = Arc::new(tested.backend(DType::BF16));
        let model = Model::load_on(backend, &Source::Demo, &LoadOptions::default()).unwrap();
        let mut engine = Engine::new(Session::new(Arc::new(model), SessionOptions::default()).unwrap());
        let mut images: HashMap<&str, ImageHandle> = HashMap::new();
        for line in first_of_type.values() {
            let (image, question) = (line["image"].as_str().unwrap(), line["question"].as_str().unwrap());
            let bytes = std::fs::read(folder.join(image)).unwrap();
            let handle = images.entry(image).or_insert_with(|| engine.image(image, &bytes).unwrap());
            let request = Request::ask(question, std::slice::from_ref(handle)).unwrap();
            let answer = engine.generate(&request, |_| {}).unwrap();
            assert_eq!(answer.text, line["answer"].as_str().unwrap(), "{image}: {question}");
        }
        println!("{} questions of as many types, {} pictures", first_of_type.len(), images.len());
    }
}
