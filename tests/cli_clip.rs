//! CLIP and adapters as a user of the program meets them.

use safetensors::SafeTensors;
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output};

fn tessera(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tessera")).args(args).current_dir(std::env::temp_dir()).output().unwrap()
}

fn data(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name).display().to_string()
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// Probabilities of the case, ranked, as text and as JSON.
#[test]
fn classify_ranks_labels() {
    let (model, image) = (data("f_clip_zeroshot/model"), data("f_clip_zeroshot/images/cat.png"));
    let labels = [
        "a photo of a cat",
        "A photo of a DOG, riding a bicycle along the river!",
        "white text   in the corner: 42%",
    ];
    let mut args = vec!["classify", "--model", &model, "--image", &image];
    labels.iter().for_each(|label| args.extend(["--label", label]));
    let text = stdout(&tessera(&args));
    let expected = [(71.81, labels[2]), (22.41, labels[0]), (5.78, labels[1])];
    let lines = expected.map(|(percent, label)| format!(" {percent:5.2} %  {label}\n"));
    assert_eq!(text, format!("{image}\n{}", lines.concat()));

    // Labels may also follow one another, and pictures.
    let mut args = vec!["classify", "--json", "--model", &model, "--image", &image, &image, "--label"];
    args.extend(labels);
    let text = stdout(&tessera(&args));
    let (first, second) = text.split_once('\n').unwrap();
    assert_eq!(first, second.trim_end());
    let text = first;
    let object: Value = serde_json::from_str(text).unwrap();
    assert_eq!((&object["width"], &object["height"]), (&180.into(), &130.into()));
    for (found, (percent, label)) in object["labels"].as_array().unwrap().iter().zip(expected) {
        assert_eq!(found["label"], label);
        assert!((100.0 * found["probability"].as_f64().unwrap() - percent).abs() < 0.01, "{found}");
        assert!(found["logit"].as_f64().unwrap().abs() < 20.0);
    }
}

/// The same vectors as JSON lines and as safetensors; a text that is too long is told.
#[test]
fn embed_writes_vectors() {
    let model = data("clip_first_end/model");
    let long = "the quick brown fox ".repeat(30);
    let output = tessera(&["embed", "--model", &model, "--text", "a fox", "--text", &long]);
    let warning = stderr(&output);
    assert!(warning.contains("only the first 40 of") && !warning.contains("a fox\""), "{warning}");
    let lines: Vec<Value> = stdout(&output).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines[0]["text"], "a fox");
    let vectors: Vec<f64> = lines
        .iter()
        .flat_map(|line| line["embedding"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()))
        .collect();

    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("out.safetensors").display().to_string();
    let output = tessera(&["embed", "--model", &model, "--text", "a fox", "--text", &long, "-o", &path]);
    assert_eq!(stdout(&output), "");
    let bytes = std::fs::read(&path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = file.tensor("text_embeds").unwrap();
    assert_eq!(tensor.shape(), [2, 24]);
    let stored = tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()) as f64);
    assert!(stored.zip(&vectors).all(|(a, &b)| (a - b).abs() < 1e-7));

    let image = data("clip_first_end/images/fox.png");
    let text = stdout(&tessera(&["embed", "--model", &model, "--image", &image]));
    let object: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(object["file"], image.as_str());
    let norm: f64 = object["embedding"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap().powi(2)).sum();
    assert!((norm - 1.0).abs() < 1e-6);
}

/// A model of the other kind says which command is for it; what is missing is a usage error.
#[test]
fn the_wrong_command_names_the_right_one() {
    let (clip, llava) = (data("f_clip_zeroshot/model"), data("a_llava15_new_bf16/model"));
    let output = tessera(&["run", "--model", &clip, "--prompt", "x"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("tessera classify"), "{}", stderr(&output));
    let image = data("f_clip_zeroshot/images/cat.png");
    let output = tessera(&["classify", "--model", &llava, "--image", &image, "--label", "x"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("tessera run"), "{}", stderr(&output));
    let output = tessera(&["embed", "--model", "preset:llama-tiny", "--text", "x"]);
    assert!(
        stderr(&output).contains("preset:llama-tiny/config.json") && stderr(&output).contains("tessera run")
    );
    for args in [
        &["classify", "--model", &clip, "--image", &image][..],
        &["classify", "--model", &clip, "--label", "x"],
        &["embed", "--model", &clip],
        &["embed", "--model", &clip, "--image", &image, "--text", "x"],
        &["embed", "--model", "preset:clip", "--text", "x"],
        &["inspect", "--model", &clip, "--graph", "prefill"],
        &["inspect", "--model", &llava, "--graph", "text"],
        &["run", "--lora", "x:inf", "--prompt", "x"],
    ] {
        assert_eq!(tessera(args).status.code(), Some(2), "{args:?}");
    }
    let output = tessera(&["embed", "--model", &clip, "--text", "x", "-o", "/nowhere/x"]);
    assert!(stderr(&output).contains("/nowhere/x"));
}

#[test]
fn inspect_tells_of_clip_and_of_adapters() {
    let text = stdout(&tessera(&["inspect", "--model", &data("clip_first_end/model")]));
    for words in
        ["vision tower    CLIP, 2 of 2 blocks", "text tower      2 blocks, width 32", "the first 599"]
    {
        assert!(text.contains(words), "no {words}: {text}");
    }
    let (model, one, two) = (data("names_saved_v5/model"), data("lora_two/one"), data("lora_two/two"));
    let text =
        stdout(&tessera(&["inspect", "--model", &model, "--lora", &one, "--lora", &format!("{two}:0.5")]));
    let adapters: Vec<_> = text.lines().filter(|line| line.starts_with("adapter ")).collect();
    assert_eq!(adapters.len(), 2, "{text}");
    for words in [&*one, "rsLoRA, rank 3, 6, scale ", "q_proj x2", "vision fc1 x3", "linear_1 x1"] {
        assert!(adapters[0].contains(words), "no {words}: {}", adapters[0]);
    }
    for words in [
        &*two,
        "LoRA, rank 4, scale 1, ",
        "gate_proj x2",
        "lm_head x1",
        "; replaces language_model.lm_head.weight, multi_modal_projector.linear_2.bias, ",
    ] {
        assert!(adapters[1].contains(words), "no {words}: {}", adapters[1]);
    }
}

/// A CLIP of full size is described without being made, and a small one classifies the same from its directory.
#[test]
fn presets_are_clips_too() {
    let large = ["inspect", "--model", "preset:clip-vit-l-14-336"];
    let card = stdout(&tessera(&large));
    for words in [
        "24 of 24 blocks run, width 1024, 16 heads of 64, MLP 4096, 336x336 pixels in patches of 14",
        "12 blocks, width 768, 12 heads of 64, MLP 3072, vocabulary 49408, 77 positions",
        "the largest id",
        "768 columns",
        "590 tensors",
    ] {
        assert!(card.contains(words), "no {words}: {card}");
    }
    let graph = |name| stdout(&tessera(&[&large[..], &["--graph", name]].concat()));
    // 24 blocks of 2*577*12*1024^2 + 4*577^2*1024 operations, and 12 of 2*77*12*768^2 + 4*77^2*768.
    assert!(graph("vision").contains("visual_projection") && graph("vision").contains(", 382."));
    assert!(graph("text").contains("text_projection") && graph("text").contains(", 13."));

    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("clip").display().to_string();
    stdout(&tessera(&["synth", "--preset", "clip-tiny", "--out", &out]));
    let image = data("f_clip_zeroshot/images/cat.png");
    let classify = |model: &str| {
        stdout(&tessera(&["classify", "--model", model, "--image", &image, "--label", "a cat", "a dog"]))
    };
    assert_eq!(classify(&out), classify("preset:clip-tiny"));
    let help = stdout(&tessera(&["synth", "--help"]));
    assert!(help.contains("clip-vit-l-14-336") && help.contains("llava-1.5-7b"), "{help}");
}

/// `--lora` changes the answer to that of the reference.
#[test]
fn run_takes_an_adapter() {
    let json = std::fs::read(data("h_lora_on_a/case.json")).unwrap();
    let case: Value = serde_json::from_slice(&json).unwrap();
    let request = &case["requests"][1];
    let (model, adapter) = (data("a_llava15_new_bf16/model"), data("h_lora_on_a/adapter"));
    let prompt = request["prompt"].as_str().unwrap();
    let args = ["run", "--model", &model, "--lora", &adapter, "--raw", "--prompt", prompt];
    let output = tessera(&[&args[..], &["--max-tokens", "32", "--quiet"]].concat());
    assert_eq!(stdout(&output).trim_end_matches('\n'), request["expected_text"].as_str().unwrap());
}
