//! The ledger: what is known of each file of kernels. An entry of `kernels/ledger.json` is keyed by a digest of
//! the file and of the headers it includes, so that an edit of either voids it. `tessera devices --kernels` prints
//! it, and figures of a GPU are printed from nowhere else.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// The ledger, as it was when this was built.
const LEDGER: &str = include_str!("../../../kernels/ledger.json");

macro_rules! sources {
    ($($name:literal),* $(,)?) => {
        /// The kernels and their headers, as they were when this was built.
        pub const SOURCES: &[(&str, &str)] =
            &[$(($name, include_str!(concat!("../../../kernels/", $name)))),*];
    };
}
sources![
    "attention.cu",
    "attention.cuh",
    "ceiling.cu",
    "common.cuh",
    "embed.cu",
    "finite.cu",
    "gemm.cuh",
    "linear.cu",
    "matvec.cu",
    "norm.cu",
    "paged_decode.cu",
    "patch.cu",
    "ptx.cuh",
    "rope.cu",
    "sample.cu",
];

/// What was once found out about a file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// The digest of the file and its headers then.
    pub digest: String,
    /// When its ops passed on the emulated device; `None` for a kernel that it has no use for.
    pub emulated: Option<String>,
    /// When they passed on a GPU.
    pub gpu: Option<GpuRun>,
}

/// A run on a GPU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GpuRun {
    /// The day.
    pub date: String,
    /// The GPU.
    pub chip: String,
    /// Its driver.
    pub driver: String,
    /// The commit that ran.
    pub commit: String,
    /// The file of `benches/results/` with the numbers.
    pub results: String,
    /// What was measured, in percent of the floor, by op and shape.
    pub percent_of_floor: BTreeMap<String, f64>,
}

/// How far a file is trusted.
#[derive(Clone, Debug, PartialEq)]
pub enum State {
    /// It compiles; it was edited since anything else was shown.
    Compiles,
    /// Its ops pass on the emulated device.
    Emulated,
    /// They passed on a GPU too.
    Gpu(GpuRun),
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            State::Compiles => f.write_str("compiles; edited since it was last verified"),
            State::Emulated => f.write_str("verified on the emulated device; not run on a GPU"),
            State::Gpu(run) => {
                write!(
                    f,
                    "verified on {} (driver {}, {}, commit {})",
                    run.chip, run.driver, run.date, run.commit
                )?;
                run.percent_of_floor.iter().try_for_each(|(op, percent)| write!(f, "; {op} {percent:.0} %"))
            }
        }
    }
}

/// The ledger's entries by file.
///
/// # Panics
/// If the ledger is malformed, which a test sees first.
pub fn entries() -> BTreeMap<String, Entry> {
    serde_json::from_str(LEDGER).expect("kernels/ledger.json is well-formed")
}

/// The digest of every file of kernels in this build.
pub fn digests() -> BTreeMap<&'static str, String> {
    let files = SOURCES.iter().map(|(file, _)| *file).filter(|file| file.ends_with(".cu"));
    files.map(|file| (file, digest(file, SOURCES))).collect()
}

/// Every file of kernels with its state.
pub fn states() -> Vec<(&'static str, State)> {
    let entries = entries();
    digests().into_iter().map(|(file, digest)| (file, state(entries.get(file), &digest))).collect()
}

/// Whether every file of kernels, as it stands, has passed on a GPU.
pub fn verified_on_gpu() -> bool {
    states().iter().all(|(_, state)| matches!(state, State::Gpu(_)))
}

fn state(entry: Option<&Entry>, digest: &str) -> State {
    match entry.filter(|entry| entry.digest == digest) {
        Some(Entry { gpu: Some(run), .. }) => State::Gpu(run.clone()),
        Some(Entry { emulated: Some(_), .. }) => State::Emulated,
        _ => State::Compiles,
    }
}

/// SHA-256 over a file and the headers it includes, directly or not, in the order of their names.
fn digest(file: &str, sources: &[(&str, &str)]) -> String {
    let mut wanted = BTreeSet::from([file]);
    let mut todo = vec![file];
    while let Some(name) = todo.pop() {
        let Some((_, text)) = sources.iter().find(|(known, _)| *known == name) else { continue };
        let included = text.lines().filter_map(|line| line.strip_prefix("#include \"")?.split('"').next());
        for header in included.filter(|header| sources.iter().any(|(known, _)| known == header)) {
            if wanted.insert(header) {
                todo.push(header);
            }
        }
    }
    let mut hash = Sha256::new();
    for (name, text) in sources.iter().filter(|(name, _)| wanted.contains(name)) {
        hash.update(format!("{name}\0{}\0", text.len()));
        hash.update(text);
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_edit_of_a_file_or_of_its_headers_voids_its_entry() {
        let sources = [
            ("a.cu", "#include \"b.cuh\"\n"),
            ("b.cuh", "#include \"c.cuh\"\n"),
            ("c.cuh", "one\n"),
            ("d.cu", "alone\n"),
        ];
        let entry = |file: &str| Entry {
            digest: digest(file, &sources),
            emulated: Some("2026-01-31".into()),
            gpu: None,
        };
        let (a, d) = (entry("a.cu"), entry("d.cu"));
        let mut edited = sources;
        edited[2].1 = "two\n";
        assert_eq!(state(Some(&a), &digest("a.cu", &sources)), State::Emulated);
        assert_eq!(state(Some(&a), &digest("a.cu", &edited)), State::Compiles);
        assert_eq!(state(Some(&d), &digest("d.cu", &edited)), State::Emulated);
        assert_eq!(state(None, "any"), State::Compiles);
    }
}
