//! Prompts of the original LLaVA against the tokenizer that its code loads.

use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use tessera::input::prompt::{ChatTemplate, Message, Original, Prompt, Prompter};

/// Prompts of every style, and their ids, against the slow tokenizer that the original code loads: see
/// `tests/data/make_original_ids.py`.
#[test]
fn ids_are_those_of_the_original_code() {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    let file = fs::read(data.join("original_ids.json")).unwrap();
    let expected: Value = serde_json::from_slice(&file).unwrap();
    let turn = |at: usize| expected["turns"][at].as_str().unwrap();
    let turns = [
        Message::prompt(turn(0), 1).unwrap(),
        Message::text("assistant", turn(1)),
        Message::prompt(turn(2), 0).unwrap(),
    ];
    let mut compared = 0;
    for case in expected["tokenizers"].as_array().unwrap() {
        let dir = tempfile::tempdir().unwrap();
        let from = data.join("sentencepiece").join(case["folder"].as_str().unwrap());
        // A tokenizer.json beside the model is not what the original code looks at.
        for file in ["tokenizer.model", "special_tokens_map.json", "tokenizer.json"] {
            fs::write(dir.path().join(file), fs::read(from.join(file)).unwrap()).unwrap();
        }
        let mut config: Value =
            serde_json::from_slice(&fs::read(from.join("tokenizer_config.json")).unwrap()).unwrap();
        config.as_object_mut().unwrap().extend(case["changes"].as_object().unwrap().clone());
        fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        let picture_tokens: &'static [&'static str] =
            if case["marks"] == json!([]) { &[] } else { &["<im_patch>", "<im_start>", "<im_end>"] };
        let original = Original { names: vec!["llava-v1.5-7b".into()], picture_tokens, whole: false };
        let load = || Prompter::load_original(&dir.path().into(), 512, &original).unwrap();
        let prompter = load();
        let prompts = case["prompts"].as_array().unwrap();
        let ids = |prompt: &str| -> Vec<i64> {
            let pair = prompts.iter().find(|pair| pair[0] == prompt).unwrap();
            serde_json::from_value(pair[1].clone()).unwrap()
        };
        let marked = |prompt: Prompt| -> Vec<i64> {
            let mut ids: Vec<i64> = prompt.ids.into_iter().map(i64::from).collect();
            prompt.images.iter().for_each(|span| ids[span.start] = -200);
            ids
        };
        for pair in prompts {
            let prompt = pair[0].as_str().unwrap();
            let pictures = vec![1; prompt.matches("<image>").count()];
            let found = marked(prompter.raw(prompt, &pictures).unwrap());
            assert_eq!(found, ids(prompt), "{} {} {prompt:?}", case["folder"], case["changes"]);
            compared += 1;
        }
        for (style, prompt) in
            expected["styles"].as_object().unwrap().iter().filter(|_| picture_tokens.is_empty())
        {
            let prompter = load().with_template(ChatTemplate::named(style, &dir.path().into()).unwrap());
            assert_eq!(prompter.render(&turns).unwrap().text, prompt.as_str().unwrap(), "{style}");
            let found = marked(prompter.conversation(&turns, &[1]).unwrap());
            assert_eq!(
                found,
                ids(prompt.as_str().unwrap()),
                "{} {} {style}",
                case["folder"],
                case["changes"]
            );
            compared += 1;
        }
    }
    assert!(compared > 400, "{compared}");
}
