//! The ledger of kernels is true: it knows every file, and every entry is of the file as it stands.
//!
//! After an edit, and after the emulated suite has passed on it, `UPDATE_LEDGER=1 cargo test --features emu --test
//! ledger` writes it anew; what a GPU once showed of a file stays only if the file is the same.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use tessera::backend::cuda::ledger::{Entry, SOURCES, State, digest, entries, states};
use tessera::bench::environment::utc;

fn kernels() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels")
}

/// The ceiling of a GPU is measured, not used: an emulated device has no use for it.
const NOT_EMULATED: [&str; 1] = ["ceiling.cu"];

#[test]
fn every_kernel_and_header_is_known() {
    let mut found: Vec<_> = fs::read_dir(kernels())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.ends_with(".cu") || name.ends_with(".cuh"))
        .collect();
    found.sort();
    let known: Vec<_> = SOURCES.iter().map(|(name, _)| *name).collect();
    assert_eq!(found, known, "backend/cuda/ledger.rs lists the files of kernels/");
}

#[test]
fn every_entry_is_of_the_file_as_it_stands() {
    if std::env::var_os("UPDATE_LEDGER").is_some() {
        return write();
    }
    for (file, state) in states() {
        println!("{file}: {state}");
        assert!(
            state != State::Compiles || NOT_EMULATED.contains(&file),
            "kernels/{file} or a header of it was edited: run the emulated suite (cargo test --features emu), then \
             UPDATE_LEDGER=1 cargo test --features emu --test ledger"
        );
    }
}

/// A figure of a GPU has a file behind it that says the same.
#[test]
fn gpu_runs_have_results() {
    for (file, entry) in entries() {
        let Some(run) = entry.gpu else { continue };
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/results").join(&run.results);
        let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{file}: {}: {e}", path.display()));
        assert!(text.contains(&run.commit) && text.contains(&run.chip), "{file}: {}", path.display());
    }
}

fn write() {
    let before = entries();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let today = utc(now)[..10].to_string();
    let after: BTreeMap<_, _> = SOURCES
        .iter()
        .filter(|(name, _)| name.ends_with(".cu"))
        .map(|(name, _)| {
            let digest = digest(name, SOURCES);
            let same = before.get(*name).filter(|entry| entry.digest == digest);
            let emulated = (!NOT_EMULATED.contains(name)).then(|| today.clone());
            let entry = same.cloned().unwrap_or(Entry { digest, emulated, gpu: None });
            (name.to_string(), entry)
        })
        .collect();
    fs::write(kernels().join("ledger.json"), serde_json::to_string_pretty(&after).unwrap() + "\n").unwrap();
}
