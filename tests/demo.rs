//! The demo model against Hugging Face on every shipped question: the same token ids, all of them.

use serde_json::Value;
use std::collections::HashMap;
use std::path::Path;
use tessera::runtime::{Engine, ImageHandle, LoadOptions, Request, SessionOptions, Source};

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
