//! The folders that make an original LLaVA: where its tower is found, what its name tells, and what LLaVA's training
//! leaves over a bare language model.

mod spoilt;

use spoilt::Checkpoint;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;
use tessera::input::image::ImageMode;
use tessera::model::lora::Lora;
use tessera::model::parts::TowerSearch;
use tessera::runtime::{Engine, LoadOptions, Model, Request, Session, SessionOptions, Source};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data")
}

/// A copy of a case's model and tower, each where it is told.
fn placed(case: &str, model: &str, tower: Option<&str>) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let from = folder().join(case);
    let copy = |from: &Path, to: &Path| {
        fs::create_dir_all(to).unwrap();
        for entry in fs::read_dir(from).unwrap() {
            let from = entry.unwrap().path();
            fs::write(to.join(from.file_name().unwrap()), fs::read(&from).unwrap()).unwrap();
        }
    };
    let to = dir.path().join(model);
    copy(&from.join("llava-v1.5-tiny"), &to);
    if let Some(tower) = tower {
        copy(&from.join("vision_tower"), &dir.path().join(tower));
    }
    (dir, to)
}

const LINEAR: &str = "e1_original_linear";
/// A revision, as a cache names it.
const REVISION: &str = "89abcdef0123456789abcdef0123456789abcdef";

#[test]
fn a_tower_is_found_where_people_keep_it() {
    let load = |model: &Path, tower: TowerSearch| {
        let options = LoadOptions { threads: Some(1), tower, ..LoadOptions::default() };
        Model::load(&Source::Directory(model.into()), &options)
    };
    let cached = format!("cache/models--openai--clip-vit-tiny-patch7/snapshots/{REVISION}");
    let model_in_cache = format!("cache/models--me--llava-v1.5-tiny/snapshots/{REVISION}");
    for (model, tower) in [
        ("m", "m/openai/clip-vit-tiny-patch7"),
        ("m", "m/clip-vit-tiny-patch7"),
        ("m", "m/vision_tower"),
        ("m", "clip-vit-tiny-patch7"),
        ("m", "vision_tower"),
        ("cache/m", &cached),
        (&model_in_cache, &cached),
    ] {
        let (dir, path) = placed(LINEAR, model, Some(tower));
        let found = load(&path, TowerSearch::default()).unwrap_or_else(|e| panic!("{model} {tower}: {e}"));
        let folder = found.tower_folder().unwrap().path("");
        let expected = dir.path().join(tower).canonicalize().unwrap();
        assert_eq!(folder.canonicalize().unwrap(), expected, "{model}");
        let style = if model.contains("v1.5") { "llava_v1" } else { "llava_v0" };
        assert_eq!(found.prompter().template().name(), style, "{model}");
    }
    // Where it is said to be, a cached repository included; and a cache that is said.
    let (dir, path) = placed(LINEAR, "m", Some(&cached.replace("cache", "far/cache")));
    let repository = dir.path().join("far/cache/models--openai--clip-vit-tiny-patch7");
    for search in [
        TowerSearch { given: Some(repository.join("snapshots").join(REVISION)), hub_cache: None },
        TowerSearch { given: Some(repository.clone()), hub_cache: None },
        TowerSearch { given: None, hub_cache: Some(dir.path().join("far/cache")) },
    ] {
        load(&path, search.clone()).unwrap_or_else(|e| panic!("{search:?}: {e}"));
    }
    // Two revisions: the one that refs/main names.
    fs::create_dir(repository.join("snapshots/0000")).unwrap();
    let search = TowerSearch { given: Some(repository.clone()), hub_cache: None };
    assert!(load(&path, search.clone()).is_err());
    fs::create_dir(repository.join("refs")).unwrap();
    fs::write(repository.join("refs/main"), format!("{REVISION}\n")).unwrap();
    load(&path, search.clone()).unwrap();
    fs::write(repository.join("refs/main"), "../../elsewhere").unwrap();
    assert!(load(&path, search).is_err());

    let error = load(&path, TowerSearch::default()).err().unwrap().to_string();
    assert!(error.contains("clip-vit-tiny-patch7") && error.contains("--vision-tower"), "{error}");
    let nowhere = TowerSearch { given: Some(dir.path().into()), hub_cache: None };
    let error = load(&path, nowhere.clone()).err().unwrap().to_string();
    assert!(error.contains("--vision-tower") && error.contains("CLIP"), "{error}");
    let hub = Checkpoint::copy();
    let options = LoadOptions { tower: nowhere, ..LoadOptions::default() };
    let error = Model::load(&hub.source(), &options).err().unwrap().to_string();
    assert!(error.contains("not in the original LLaVA layout"), "{error}");
}

/// Without the tower's own folder its dimensions are known only if OpenAI published it; its weights must be
/// somewhere.
#[test]
fn a_tower_that_is_nowhere_is_told_with_the_places() {
    let (_dir, path) = placed(LINEAR, "m", None);
    let config = fs::read_to_string(path.join("config.json")).unwrap();
    let config = config.replace("openai/clip-vit-tiny-patch7", "openai/clip-vit-large-patch14-336");
    fs::write(path.join("config.json"), config.replace("\"mm_hidden_size\": 16", "\"mm_hidden_size\": 1024"))
        .unwrap();
    let error = Model::load(&Source::Directory(path), &LoadOptions::default()).err().unwrap().to_string();
    for part in ["names `openai/clip-vit-large-patch14-336`", "vision_tower", "snapshots", "--vision-tower"] {
        assert!(error.contains(part), "{part}: {error}");
    }
}

/// A folder may be given by a symbolic link, and may be one: the name as given tells the style, or else the name of
/// what it leads to.
#[cfg(unix)]
#[test]
fn a_link_tells_the_style_and_the_tower() {
    use std::os::unix::fs::symlink;
    for (real, link, style) in [
        ("blobs/0123", "llava-v1.5-7b", "llava_v1"),
        ("llava-v1.5-7b", "current", "llava_v1"),
        ("llava-v1.5-7b", "my-mistral", "mistral_instruct"),
        ("blobs/0123", "current", "llava_v0"),
    ] {
        for tower in ["real", "link"] {
            // The tower stands beside what is given, or beside where that leads.
            let (dir, path) = placed(LINEAR, &format!("real/{real}"), None);
            let beside = if tower == "real" { path.parent().unwrap() } else { &dir.path().join("link") };
            fs::create_dir_all(dir.path().join("link")).unwrap();
            symlink(&path, dir.path().join("link").join(link)).unwrap();
            symlink(folder().join(LINEAR).join("vision_tower"), beside.join("vision_tower")).unwrap();
            let source = Source::Directory(dir.path().join("link").join(link));
            let model =
                Model::load(&source, &LoadOptions { threads: Some(1), ..LoadOptions::default() }).unwrap();
            assert_eq!(model.prompter().template().name(), style, "{real} by {link}");
            assert!(model.tower_folder().unwrap().path("").ends_with("vision_tower"), "{tower}");
        }
    }
}

/// The tower of `tower_folder` is the one whose weights run: none, if the checkpoint has its own.
#[test]
fn a_tower_inside_is_told_from_one_beside() {
    for (case, model, beside) in
        [(LINEAR, "llava-v1.5-tiny", true), ("e3_original_inside", "llava-mistral-tiny", false)]
    {
        assert!(folder().join(case).join("vision_tower").is_dir());
        let source = Source::Directory(folder().join(case).join(model));
        let model =
            Model::load(&source, &LoadOptions { threads: Some(1), ..LoadOptions::default() }).unwrap();
        assert_eq!(model.tower_folder().is_some(), beside, "{case}");
    }
}

/// What LLaVA's LoRA training leaves, over the bare language model, given either way round; that its numbers are right
/// is told in `golden.rs`.
#[test]
fn an_adapter_makes_a_llava_of_a_bare_language_model() {
    let case = folder().join("e5_original_lora");
    let (bare, adapter) = (case.join("vicuna-tiny"), case.join("llava-v1.5-tiny-lora"));
    let lora = |scale| Lora { dir: adapter.clone(), scale };
    let load = |model: &Path, options: LoadOptions| {
        let options = LoadOptions { threads: Some(1), ..options };
        Model::load(&Source::Directory(model.into()), &options)
    };
    let answer = |model: Model| {
        let mut engine = Engine::new(Session::new(model.into(), SessionOptions::default()).unwrap());
        let image = engine.image("wide.png", &fs::read(case.join("images/wide.png")).unwrap()).unwrap();
        let request = Request {
            max_tokens: Some(12),
            logprobs: Some(0),
            ..Request::ask("What is it?", &[image]).unwrap()
        };
        let answer = engine.generate(&request, |_| {}).unwrap();
        answer.logprobs.iter().map(|token| (token.id, token.logprob.to_bits())).collect::<Vec<_>>()
    };
    let from_adapter =
        load(&adapter, LoadOptions { base: Some(bare.clone()), ..LoadOptions::default() }).unwrap();
    let from_base = load(&bare, LoadOptions { lora: vec![lora(1.0)], ..LoadOptions::default() }).unwrap();
    for model in [&from_adapter, &from_base] {
        assert_eq!(model.prompter().template().name(), "llava_v1");
        assert_eq!(model.preprocess().unwrap().mode, ImageMode::Pad);
        assert_eq!(model.weights().adapters().len(), 1);
    }
    let expected = answer(from_adapter);
    assert_eq!(answer(from_base), expected);
    let none = load(&bare, LoadOptions { lora: vec![lora(0.0)], ..LoadOptions::default() }).unwrap();
    assert_ne!(answer(none), expected, "the pairs do something");
    // A projector alone, as the first stage of training leaves it.
    let stage = tempfile::tempdir().unwrap();
    fs::copy(adapter.join("config.json"), stage.path().join("config.json")).unwrap();
    fs::copy(adapter.join("non_lora_trainables.bin"), stage.path().join("mm_projector.bin")).unwrap();
    let tower = TowerSearch { given: Some(case.join("vision_tower")), hub_cache: None };
    let over =
        |base: &Path| LoadOptions { base: Some(base.into()), tower: tower.clone(), ..LoadOptions::default() };
    let projector = load(stage.path(), over(&bare)).unwrap();
    let lora_0 = load(&bare, LoadOptions { lora: vec![lora(0.0)], ..LoadOptions::default() }).unwrap();
    assert_eq!(
        projector.weights().tensor("projector.linear_2.bias", &[32]).unwrap().bytes.as_bytes(),
        lora_0.weights().tensor("projector.linear_2.bias", &[32]).unwrap().bytes.as_bytes()
    );
    let error = |model: &Path, options| load(model, options).err().unwrap().to_string();
    for (found, parts) in [
        (error(&adapter, LoadOptions::default()), &["lmsys/vicuna-7b-v1.5", "--base"][..]),
        (error(&bare, over(&bare)), &["--base", "weights of its own", "--lora"]),
        (error(&case.join("images"), over(&bare)), &["adapter_config.json", "mm_projector.bin"]),
        (error(&adapter, over(&case.join("nowhere"))), &["nowhere"]),
    ] {
        assert!(parts.iter().all(|part| found.contains(part)), "{found}");
    }
}
