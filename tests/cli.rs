//! The program as a user meets it: what it prints, and with which exit code it ends.

use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn tessera(args: &[&str]) -> Output {
    // From a directory that has nothing to do with the project.
    Command::new(env!("CARGO_BIN_EXE_tessera")).args(args).current_dir(std::env::temp_dir()).output().unwrap()
}

fn asset(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("assets").join(name).display().to_string()
}

fn data(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name).display().to_string()
}

fn stdout(output: &Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// The demo model answers every question about its sample pictures as it did when they were made.
#[test]
fn run_answers_from_any_directory() {
    let answers: Value =
        serde_json::from_slice(&std::fs::read(asset("samples/answers.json")).unwrap()).unwrap();
    let mut asked = 0;
    for (picture, questions) in answers.as_object().unwrap() {
        for q in questions.as_array().unwrap() {
            let image = asset(&format!("samples/{picture}"));
            let question = q["question"].as_str().unwrap();
            let output = tessera(&["run", "--image", &image, "--prompt", question, "--quiet"]);
            assert_eq!(stdout(&output).trim_end(), q["answer"].as_str().unwrap(), "{picture}: {question}");
            assert!(output.stderr.is_empty(), "--quiet is quiet");
            asked += 1;
        }
    }
    assert!(asked >= 6, "{asked} questions");
}

#[test]
fn run_reports_json() {
    let image = asset("samples/scene1.png");
    let args = ["run", "--image", &image, "--prompt", "Where is the circle?", "--json", "--logprobs", "2"];
    let object: Value = serde_json::from_str(&stdout(&tessera(&args))).unwrap();
    let keys = [
        "model",
        "device",
        "text",
        "token_ids",
        "finish_reason",
        "prompt_tokens",
        "image_tokens",
        "completion_tokens",
        "images",
        "timings_ms",
        "decode_tokens_per_s",
    ];
    for key in keys {
        assert!(!object[key].is_null(), "{key}");
    }
    for key in [
        "load",
        "image_decode",
        "preprocess",
        "vision",
        "projector",
        "prefill",
        "first_token",
        "decode",
        "total",
    ] {
        assert!(object["timings_ms"][key].is_number(), "timings_ms.{key}");
    }
    assert_eq!(object["finish_reason"], "stop");
    assert_eq!(object["image_tokens"], 64);
    assert_eq!(object["images"][0]["width"], 448);
    assert_eq!(object["images"][0]["pixels_sha256"].as_str().unwrap().len(), 64);
    let tokens = object["token_ids"].as_array().unwrap();
    assert_eq!(tokens.last().unwrap(), 2, "end of text is part of the ids");
    let logprobs = object["logprobs"].as_array().unwrap();
    assert_eq!(logprobs.len(), tokens.len());
    for (token, logprob) in tokens.iter().zip(logprobs) {
        // Greedy: the chosen token is the likeliest.
        assert_eq!((&logprob["id"], &logprob["top"][0]["id"]), (token, token));
    }
}

#[test]
fn run_dumps_what_went_through() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("dump.safetensors");
    let image = asset("samples/scene2.png");
    let dump = file.display().to_string();
    stdout(&tessera(&["run", "--image", &image, "--prompt", "What is this?", "--dump", &dump]));
    let bytes = std::fs::read(&file).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let shape = |name: &str| tensors.tensor(name).unwrap().shape().to_vec();
    assert_eq!(shape("pixel_values"), [1, 3, 112, 112]);
    assert_eq!(shape("vision_hidden"), [1, 65, 128]);
    assert_eq!(shape("image_features"), [64, 256]);
    let prompt = shape("input_ids")[0];
    assert_eq!(shape("logits"), [prompt, 640]);
    assert!(shape("generated_ids")[0] > 1);
}

/// Pictures seen in tiles: pixels of the one with fewer are filled with zeros, as Hugging Face does.
#[test]
fn tiles_are_dumped_and_counted() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("dump.safetensors").display().to_string();
    let model = format!("{}/tests/data/next_mistral", env!("CARGO_MANIFEST_DIR"));
    let images = ["wide", "dot"].map(|name| format!("{model}/images/{name}.png"));
    let model = format!("{model}/model");
    let given = ["--model", model.as_str(), "--image", &images[0], "--image", &images[1]];
    let read = || {
        let bytes = std::fs::read(&file).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let pixels = tensors.tensor("pixel_values").unwrap();
        assert_eq!(pixels.shape(), [2, 4, 3, 28, 28]);
        // 5 x 3 pixels lie on 56 x 28: two tiles and the whole.
        assert!(pixels.data().rchunks(3 * 28 * 28 * 4).next().unwrap().iter().all(|&byte| byte == 0));
        tensors
            .iter()
            .map(|(name, view)| (name.to_string(), view.shape().to_vec()))
            .collect::<HashMap<_, _>>()
    };
    let run = ["run", "--prompt", "Compare.", "--max-tokens", "2", "--json", "--dump", &file];
    let object: Value = serde_json::from_str(&stdout(&tessera(&[&run[..], &given].concat()))).unwrap();
    let shapes = read();
    assert_eq!(shapes["vision_hidden"], [7, 17, 16]);
    let tokens = object["image_tokens"].as_u64().unwrap() as usize;
    assert_eq!(shapes["image_features"], [tokens, 32]);

    let preprocess = ["preprocess", "--json", "--out", &file];
    let lines = stdout(&tessera(&[&preprocess[..], &given].concat()));
    let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    read();
    assert_eq!(lines[0]["pixels_sha256"], object["images"][0]["pixels_sha256"]);
    assert_eq!((&lines[0]["squares"], &lines[1]["squares"]), (&json!(4), &json!(3)));
    let counted: u64 = lines.iter().map(|line| line["tokens"].as_u64().unwrap()).sum();
    assert_eq!(counted as usize, tokens);
    let lines = stdout(&tessera(&[&["preprocess", "--image-mode", "pad", "--json"][..], &given].concat()));
    assert!(lines.lines().all(|line| line.contains("\"squares\":1,\"tokens\":16,")), "{lines}");

    let card = stdout(&tessera(&["inspect", "--model", &model]));
    for words in
        ["anyres: the whole, and tiles of 56x28, 28x56", "for 5 of 5 squares at a time", "a picture at most"]
    {
        assert!(card.contains(words), "{card}");
    }
    let card = stdout(&tessera(&["inspect", "--model", &model, "--image-mode", "crop"]));
    assert!(card.contains("16 tokens a picture") && !card.contains("projected squares"), "{card}");
}

#[test]
fn sampling_is_repeatable_and_says_its_seed() {
    let image = asset("samples/scene3.png");
    let base =
        ["run", "--image", image.as_str(), "--prompt", "Please describe the image.", "--temperature", "8"];
    let run = |more: &[&str]| {
        let output = tessera(&[&base[..], more].concat());
        (stdout(&output), String::from_utf8(output.stderr).unwrap())
    };
    let (one, stderr) = run(&["--seed", "11", "--threads", "1"]);
    assert!(stderr.contains("seed 11"), "{stderr}");
    assert_eq!(one, run(&["--seed", "11", "--threads", "2"]).0);
    assert_eq!(one, run(&["--seed", "11", "--prefill-chunk", "5"]).0);
    let others: Vec<_> = (0..5).map(|seed| run(&["--seed", &seed.to_string()]).0).collect();
    assert!(others.iter().any(|text| *text != one), "another seed can give another text");
    let stderr = run(&[]).1;
    assert!(stderr.contains("seed "), "a drawn seed is printed: {stderr}");
}

#[test]
fn messages_take_pictures_from_files_and_data_urls() {
    use base64::Engine as _;
    let dir = tempfile::tempdir().unwrap();
    let picture = std::fs::read(asset("samples/scene1.png")).unwrap();
    std::fs::write(dir.path().join("here.png"), &picture).unwrap();
    let encoded = base64::engine::general_purpose::STANDARD.encode(&picture);
    let mut texts = Vec::new();
    for url in ["here.png".to_string(), format!("data:image/png;base64,{encoded}")] {
        let messages = serde_json::json!([{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": "Where is the circle?"},
        ]}]);
        let file = dir.path().join("messages.json");
        std::fs::write(&file, messages.to_string()).unwrap();
        texts.push(stdout(&tessera(&["run", "--messages", &file.display().to_string(), "--quiet"])));
    }
    assert_eq!(texts[0], texts[1]);
    assert_eq!(texts[0].trim_end(), "The circle is at the top left.");
}

#[test]
fn stop_strings_and_limits_end_an_answer() {
    let image = asset("samples/scene1.png");
    let base = ["run", "--image", image.as_str(), "--prompt", "Where is the circle?", "--quiet", "--json"];
    let run = |more: &[&str]| -> Value {
        serde_json::from_str(&stdout(&tessera(&[&base[..], more].concat()))).unwrap()
    };
    let stopped = run(&["--stop", "at the"]);
    assert_eq!((&stopped["text"], &stopped["finish_reason"]), (&"The circle is ".into(), &"stop".into()));
    let short = run(&["--max-tokens", "2"]);
    assert_eq!((&short["completion_tokens"], &short["finish_reason"]), (&2.into(), &"length".into()));
    let long = run(&["--ignore-eos", "--max-tokens", "20"]);
    assert_eq!(long["completion_tokens"], 20);
}

/// What is wrong is named, what would be right is said, and the exit code tells usage from failure.
#[test]
fn errors_are_for_people() {
    let image = asset("samples/scene1.png");
    let text = asset("samples/answers.json");
    let samples = asset("samples");
    let missing = "no-such-file.png";
    let questions = asset("eval/questions.jsonl");
    let table: &[(&[&str], i32, &[&str])] = &[
        (&["run"], 2, &["--prompt"]),
        (&["run", "--prompt", "x", "--temperature", "-1"], 2, &["--temperature"]),
        (&["run", "--prompt", "x", "--top-p", "2"], 2, &["--top-p", "at most 1"]),
        (&["run", "--prompt", "x", "--model", "preset:nonsense"], 2, &["preset:", "llava-1.5-7b"]),
        (&["run", "--prompt", "x", "--model", "/no/such/model"], 1, &["/no/such/model", "preset:NAME"]),
        (&["run", "--prompt", "x", "--model", &text], 1, &["answers.json", "is not a directory"]),
        (&["run", "--prompt", "x", "--model", &samples], 1, &["config.json", "not found"]),
        (&["run", "--prompt", "x", "--max-tokens", "-1"], 2, &["--max-tokens", "-1"]),
        (&["run", "--prompt", "x", "--top-k", "-1"], 2, &["--top-k", "-1"]),
        (&["run", "--prompt", "x", "--context", "-1"], 2, &["--context", "-1"]),
        (&["run", "--prompt", "x", "--image", missing], 1, &[missing]),
        (&["run", "--prompt", "x", "--image", &text], 1, &["answers.json", "PNG"]),
        (&["run", "--prompt", "<image> and <image>", "--image", &image], 1, &["2 images", "1 were given"]),
        (&["run", "--prompt", "x", "--max-tokens", "5000"], 1, &["5000", "1024", "--context"]),
        (&["run", "--prompt", "x", "--context", "0"], 2, &["--context", "1024"]),
        (&["run", "--prompt", "x", "--kv-memory", "10"], 2, &["--kv-memory", "page"]),
        (&["run", "--prompt", "x", "--kv-memory", "lots"], 2, &["--kv-memory", "512MiB"]),
        (&["run", "--prompt", "x", "--dtype", "f16"], 2, &["--dtype"]),
        (&["run", "--prompt", "x", "--stop", ""], 2, &["--stop"]),
        (&["run", "--prompt", "x", "--template", "no-such-template"], 2, &["--template", "vicuna"]),
        (&["preprocess", "--image", &text], 1, &["answers.json"]),
        (&["eval", "--questions", missing], 1, &[missing]),
        (&["eval"], 2, &["option --questions", "the project's folder"]),
        (&["eval", "--limit", "0", "--questions", &questions], 1, &["questions.jsonl", "no question"]),
        (&["eval", "--questions", &text], 1, &["answers.json", "line 1, column "]),
        (&["synth", "--preset", "nonsense", "--out", missing], 2, &["option --preset", "llava-1.5-7b"]),
        (&["run", "--prompt", "x", "--logprobs", "3"], 2, &["--json"]),
        (&["run", "--prompt", "x", "--image", "/dev/zero"], 1, &["/dev/zero", "longer than"]),
        (&["inspect", "--graph", "vision", "--model", "preset:llama-tiny"], 2, &["text model"]),
        (
            &["run", "--prompt", "x", "--kv-memory", "900T", "--context", "1024"],
            1,
            &["KV cache", "available"],
        ),
        (&["frobnicate"], 2, &["frobnicate"]),
    ];
    for (args, code, words) in table {
        let output = tessera(args);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(*code), "{args:?}: {stderr}");
        for word in *words {
            assert!(stderr.contains(word), "{args:?} does not mention {word}: {stderr}");
        }
        assert!(!stderr.contains("panicked"), "{stderr}");
    }
}

#[test]
fn inspect_describes_models_and_graphs() {
    let card = stdout(&tessera(&["inspect"]));
    for word in [
        "CLIP inside the checkpoint, 4 of 5 blocks",
        "64 tokens a picture",
        "vocabulary 640",
        "memory plan",
        "transformers 5",
    ] {
        assert!(card.contains(word), "{word}: {card}");
    }
    for graph in ["vision", "prefill", "decode"] {
        let text = stdout(&tessera(&["inspect", "--graph", graph]));
        assert!(text.contains("nodes,") && text.contains("arena offset"), "{text}");
    }
    let old = stdout(&tessera(&["inspect", "--model", &data("b_llava15_old_f16_sharded/model")]));
    assert!(old.contains("Hugging Face Hub"), "{old}");
    let text = stdout(&tessera(&["inspect", "--model", &data("j_llama_chatml_f32/model")]));
    assert!(!text.contains("vision tower"), "{text}");
}

/// Larger than this machine or not: nothing is drawn, read or allocated to describe it.
#[test]
fn inspect_describes_models_larger_than_the_machine() {
    let card = stdout(&tessera(&["inspect", "--model", "preset:llava-1.5-13b"]));
    for word in
        ["40 layers, width 5120", "23 of 24 blocks", "memory plan", "weights 24.8", "KV cache", "machine"]
    {
        assert!(card.contains(word), "{word}: {card}");
    }
    let text = stdout(&tessera(&["inspect", "--model", "preset:llava-1.5-13b", "--graph", "decode"]));
    assert!(text.contains("nodes,") && text.contains("GFLOP"), "{text}");
}

#[test]
fn an_original_checkpoint_runs_and_is_described() {
    let model = data("e1_original_linear/llava-v1.5-tiny");
    let card = stdout(&tessera(&["inspect", "--model", &model]));
    for word in [
        "LLaVA, as its authors' code saves it",
        "original LLaVA, linear projector",
        "e1_original_linear/vision_tower",
        "16 -> 32, linear",
        "EXIF rotation ignored",
        "tokenised piece by piece",
        "counts the answer",
        "pad: put on a square",
        "original LLaVA, by the checkpoint's layout",
        "llava_v1",
    ] {
        assert!(card.contains(word), "{word}: {card}");
    }
    let card =
        stdout(&tessera(&["inspect", "--model", &model, "--reference", "hf", "--template", "llava_v0"]));
    for word in
        ["transformers, by --reference", "EXIF rotation applied", "tokenised as a whole", "crop:", "llava_v0"]
    {
        assert!(card.contains(word), "{word}: {card}");
    }
    let image = data("e1_original_linear/images/wide.png");
    let tower = data("e1_original_linear/vision_tower");
    let args =
        ["run", "--model", &model, "--vision-tower", &tower, "--image", &image, "--prompt", "What is it?"];
    let case: Value =
        serde_json::from_slice(&std::fs::read(data("e1_original_linear/case.json")).unwrap()).unwrap();
    let answer = stdout(&tessera(&[&args[..], &["--max-tokens", "12", "--quiet"]].concat()));
    assert_eq!(answer.trim_end_matches('\n'), case["requests"][0]["expected_text"].as_str().unwrap());
    let output = tessera(&["preprocess", "--model", &model, "--image", &image]);
    assert!(stdout(&output).contains("(44x25 -> 3x28x28)"));
    let output = tessera(&["run", "--model", &model, "--prompt", "x", "--vision-tower", &image]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(2) && stderr.contains("--vision-tower"), "{stderr}");
}

#[test]
fn preprocess_prints_a_hash_and_writes_pixels() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("pixels.safetensors");
    let (image, out_name) = (asset("samples/scene1.png"), out.display().to_string());
    let line = stdout(&tessera(&["preprocess", "--image", &image, "--out", &out_name]));
    assert!(line.contains("scene1.png (448x448 -> 3x112x112)"), "{line}");
    let bytes = std::fs::read(out).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(tensors.tensor("pixel_values").unwrap().shape(), [1, 3, 112, 112]);
    let run = tessera(&["run", "--image", &image, "--prompt", "x", "--json"]);
    let object: Value = serde_json::from_str(&stdout(&run)).unwrap();
    assert_eq!(object["images"][0]["pixels_sha256"], line.split(' ').next().unwrap());
}

/// A preset written as a checkpoint answers as the preset in memory does.
#[test]
fn synth_writes_what_a_preset_is() {
    let dir = tempfile::tempdir().unwrap();
    let out: PathBuf = dir.path().join("tiny");
    let out = out.display().to_string();
    stdout(&tessera(&["synth", "--preset", "llava-tiny", "--out", &out, "--shard-size", "1MB"]));
    let image = asset("samples/scene1.png");
    let ids = |model: &str| {
        let args =
            ["run", "--model", model, "--image", &image, "--prompt", "x", "--json", "--max-tokens", "8"];
        let object: Value = serde_json::from_str(&stdout(&tessera(&args))).unwrap();
        object["token_ids"].clone()
    };
    assert_eq!(ids(&out), ids("preset:llava-tiny"));
    assert_eq!(ids(&out).as_array().unwrap().len(), 8);
}

#[test]
fn chat_remembers_the_turns_before() {
    use std::io::Write;
    let image = asset("samples/scene1.png");
    let mut child = Command::new(env!("CARGO_BIN_EXE_tessera"))
        .args(["chat", "--quiet"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let script = format!("/image {image}\nWhere is the circle?\nWhat color is the star?\n/quit\n");
    child.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = stdout(&output);
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines.len(), 2, "{text}");
    assert_eq!(lines[0], "The circle is at the top left.");
    assert!(lines[1].contains("blue"), "{text}");
}

#[test]
fn devices_lists_the_processor() {
    let text = stdout(&tessera(&["devices"]));
    assert!(text.starts_with("cpu ") && text.contains("cuda"), "{text}");
    let object: Value = serde_json::from_str(&stdout(&tessera(&["devices", "--json"]))).unwrap();
    assert_eq!(object["devices"][0]["name"], "cpu");
    // Every kind of device is listed, with a reason if it cannot be used.
    let all =
        [&object["devices"], &object["unavailable"]].map(|list| list.as_array().unwrap().clone()).concat();
    for kind in ["cuda", "emu"] {
        let device = all.iter().find(|d| d["name"].as_str().unwrap().starts_with(kind)).expect(kind);
        assert!(device["description"] != "" || device["problem"] != "", "{device}");
    }
}

/// A device that is not there is an error with its reason, whatever the machine.
#[test]
fn a_device_that_is_absent_is_told() {
    let output = tessera(&["run", "--prompt", "x", "--device", "cuda:4096"]);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.starts_with("error: device cuda:4096: "), "{error}");
    assert!(
        error.contains("libcuda") || error.contains("no such GPU") || error.contains("driver"),
        "{error}"
    );
    #[cfg(not(feature = "emu"))]
    {
        let output = tessera(&["run", "--prompt", "x", "--device", "emu"]);
        assert!(String::from_utf8_lossy(&output.stderr).contains("--features emu"));
    }
    assert_eq!(tessera(&["run", "--prompt", "x", "--device", "gpu"]).status.code(), Some(2));
}

/// A reader that goes away, as `| head` does, is no failure.
#[test]
fn a_closed_pipe_is_not_an_error() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_tessera"))
        .args(["inspect", "--tensors"])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
