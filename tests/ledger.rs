//! The ledger of kernels is true: it knows every file, every entry is of the file as it stands, a figure of a GPU is
//! what the results of a run say, and README prints no other.
//!
//! After an edit, and after the emulated suite has passed on it, `UPDATE_LEDGER=1 cargo test --features emu --test
//! ledger` writes it anew; what a GPU once showed of a file stays only if the file is the same. With the results of a
//! run on a GPU, which `scripts/gpu/record` puts in place, `UPDATE_LEDGER=FILE` enters them.

#[path = "ledger/gpu.rs"]
mod gpu;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use tessera::backend::cuda::ledger::{Entry, SOURCES, State, digests, entries, states};
use tessera::bench::environment::utc;

type Entries = BTreeMap<String, Entry>;

const LEDGER: &str = "kernels/ledger.json";
const README: &str = "README.md";

/// The ceiling of a GPU is measured, not used: an emulated device has no use for it.
const NOT_EMULATED: [&str; 1] = ["ceiling.cu"];

fn text(file: &str) -> String {
    fs::read_to_string(file).unwrap_or_else(|error| panic!("{file}: {error}"))
}

#[test]
fn every_kernel_and_header_is_known() {
    let mut found: Vec<_> = fs::read_dir("kernels")
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
    if let Some(update) = std::env::var_os("UPDATE_LEDGER") {
        let results = PathBuf::from(&update);
        let entries = if update == "1" { anew(entries()) } else { gpu::with_run(anew(entries()), &results) };
        fs::write(LEDGER, serde_json::to_string_pretty(&entries).unwrap() + "\n").unwrap();
        fs::write(README, gpu::with_figures(&text(README), &gpu::figures(&entries))).unwrap();
        return;
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

/// An entry for every file: of one that was edited, what is known is that the emulated suite has passed today.
fn anew(before: Entries) -> Entries {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let entry = |(name, digest): (&str, String)| {
        let same = before.get(name).filter(|entry| entry.digest == digest).cloned();
        let emulated = (!NOT_EMULATED.contains(&name)).then(|| utc(now)[..10].to_string());
        (name.to_string(), same.unwrap_or(Entry { digest, emulated, gpu: None }))
    };
    digests().into_iter().map(entry).collect()
}

/// What the ledger says of a GPU is what entering that run's results says.
#[test]
fn gpu_runs_are_those_of_their_results() {
    for (file, entry) in entries() {
        let Some(run) = entry.gpu else { continue };
        let results = gpu::results(&PathBuf::from("benches/results").join(&run.results));
        assert_eq!(results.kernels.get(&file), Some(&entry.digest), "{file}: another was run");
        assert_eq!(results.run_of(&file, &run.results), Ok(run), "{file}");
    }
}

#[test]
fn readme_prints_figures_of_a_gpu_from_the_ledger_alone() {
    let readme = text(README);
    let right = gpu::with_figures(&readme, &gpu::figures(&entries()));
    assert!(
        readme == right,
        "README: UPDATE_LEDGER=1 cargo test --test ledger writes its figures of GPUs anew"
    );
}
