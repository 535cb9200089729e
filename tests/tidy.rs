//! The house rules that a compiler does not check.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The modules in the order in which they may depend on each other. `input` stands beside `graph`: it
/// knows errors, folders and tensors only, and what comes after `graph` may know it (a configuration says
/// how pictures are cut into tiles).
const ORDER: [&str; 11] =
    ["error", "folder", "tensor", "op", "backend", "graph", "model", "runtime", "bench", "cli", "main"];

fn sources(dir: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut todo = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join(dir)];
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(&dir).into_iter().flatten() {
            let path = entry.unwrap().path();
            match path.extension() {
                _ if path.is_dir() => todo.push(path),
                Some(ext) if ext == "rs" => found.push(path),
                _ => {}
            }
        }
    }
    assert!(!found.is_empty(), "no sources in {dir}");
    found.sort();
    found
}

fn relative(path: &Path) -> String {
    path.strip_prefix(env!("CARGO_MANIFEST_DIR")).unwrap().to_string_lossy().replace('\\', "/")
}

/// The top-level module a file under src/ belongs to.
fn module(path: &str) -> &str {
    path.strip_prefix("src/").unwrap().split(['/', '.']).next().unwrap()
}

/// The part of a file before its unit tests, without comments.
fn code(text: &str) -> String {
    let text = text.split("#[cfg(test)]\nmod tests").next().unwrap();
    text.lines().filter(|l| !l.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
}

/// The top-level modules that `use crate::…` or `crate::…` paths name.
fn uses(code: &str) -> BTreeSet<String> {
    let names =
        |text: &str| -> String { text.chars().take_while(|c| c.is_ascii_lowercase() || *c == '_').collect() };
    let mut found = BTreeSet::new();
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at + "crate::".len()..];
        match rest.strip_prefix('{') {
            Some(list) => {
                let list = &list[..list.find("};").unwrap_or(list.len())];
                found.extend(list.split(',').map(|item| names(item.trim())));
            }
            None => {
                found.insert(names(rest));
            }
        }
    }
    found.remove("");
    found
}

#[test]
fn arrows_point_one_way() {
    let place = |m: &str| ORDER.iter().position(|o| *o == m);
    let mut seen = BTreeSet::new();
    for path in sources("src") {
        let path = relative(&path);
        let from = module(&path);
        if from == "lib" {
            continue;
        }
        let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(&path)).unwrap();
        for to in uses(&code(&text)) {
            if to == from {
                continue;
            }
            seen.insert((from.to_string(), to.clone()));
            let ok = match (from, to.as_str()) {
                ("input", to) => ["error", "folder", "tensor"].contains(&to),
                (from, "input") => place(from) > place("graph"),
                (from, to) => place(to).is_some() && place(from) > place(to),
            };
            assert!(ok, "{path} uses crate::{to}: arrows point from right to left in {ORDER:?}");
        }
    }
    // The scan sees something: the arrow that every backend needs.
    assert!(seen.contains(&("backend".into(), "op".into())), "{seen:?}");
}

#[test]
fn the_scan_finds_a_planted_arrow() {
    let planted = code("use crate::{Error, runtime::Engine};\n// crate::cli\nlet x = crate::graph::Plan;");
    assert_eq!(uses(&planted), BTreeSet::from(["runtime".to_string(), "graph".to_string()]));
}

/// Long files are split before they are too long to hold in the head.
#[test]
fn files_fit_the_head() {
    for path in sources("src").into_iter().chain(sources("tests")).chain(sources("benches")) {
        let lines = fs::read_to_string(&path).unwrap().lines().count();
        assert!(lines <= 560, "{}: {lines} lines; would two rooms be clearer?", relative(&path));
    }
}

/// An op is found by its name: every variant of `Op` has a row in the table of DESIGN, which is the doc
/// comment above it, and every backend answers it without a wildcard.
#[test]
fn ops_are_matched_without_wildcards() {
    for file in ["src/op.rs", "src/backend/cpu/mod.rs", "src/backend/cuda/mod.rs"] {
        let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap();
        let names = ["PatchEmbed", "LayerNorm", "RmsNorm", "AddRmsNorm", "Linear", "GatedLinear"];
        let more = ["Attention", "RopeAppend", "PagedAttention", "EmbedRows", "SelectRows", "Sample"];
        let texts = ["EmbedTokens", "L2Normalize"];
        for name in names.iter().chain(&more).chain(&texts) {
            assert!(text.contains(&format!("Op::{name}")), "{file} does not name Op::{name}");
        }
    }
}

/// `unsafe` lives in few files, so that each can be read with its obligations.
#[test]
fn unsafe_lives_in_few_files() {
    for path in sources("src") {
        let path_text = relative(&path);
        let allowed = [
            "src/backend/",
            "src/bench/ops.rs",
            "src/bench/startup.rs",
            "src/input/image/resize.rs",
            "src/graph/exec.rs",
            "src/graph/diff.rs",
            "src/runtime/batch.rs",
            "src/runtime/clip.rs",
            "src/runtime/session.rs",
            "src/runtime/vision.rs",
            "src/runtime/kv.rs",
            "src/model/checkpoint",
            "src/model/preset",
            "src/tensor/",
        ];
        let text = code(&fs::read_to_string(&path).unwrap());
        let has = text.contains("unsafe {") || text.contains("unsafe fn") || text.contains("unsafe impl");
        assert!(!has || allowed.iter().any(|a| path_text.starts_with(a)), "unsafe in {path_text}");
    }
}

/// What a kernel cannot say in plain C++ is a primitive of `kernels/ptx.cuh`, which has a meaning on the emulated
/// device as well; so no other kernel file holds PTX, asks for an architecture or names a compiler's own function.
#[test]
fn kernels_are_plain_outside_of_ptx() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let files: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    let kernels = |path: &&PathBuf| path.extension().is_some_and(|ext| ext == "cu" || ext == "cuh");
    for path in files.iter().filter(kernels) {
        let text = code(&fs::read_to_string(path).unwrap());
        let plain = !text.contains("asm") && !text.contains("__");
        assert_eq!(plain, !path.ends_with("ptx.cuh"), "{}", relative(path));
    }
}

/// The project speaks of itself alone.
#[test]
fn no_paths_of_one_machine() {
    let banned = [["/", "work/"].concat(), ["/", "root/"].concat(), ["..", "/shared"].concat()];
    for path in sources("src").into_iter().chain(sources("tests")).chain(sources("benches")) {
        let text = fs::read_to_string(&path).unwrap();
        for word in &banned {
            assert!(!text.contains(word.as_str()), "{} mentions {word}", relative(&path));
        }
    }
}
