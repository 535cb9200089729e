//! Two reports side by side: what changed, and whether it is more than chance.

use super::stats::{Ratio, ratio};
use crate::error::{Error, Result};
use serde::Deserialize;
use std::path::Path;

/// What is read of a row; reports of llama-bench have the same fields but for `test`.
#[derive(Clone, Debug, Deserialize)]
struct Entry {
    #[serde(default)]
    test: String,
    #[serde(default)]
    model_type: String,
    #[serde(default)]
    backends: String,
    #[serde(default)]
    n_threads: usize,
    #[serde(default)]
    n_prompt: usize,
    #[serde(default)]
    n_gen: usize,
    #[serde(default)]
    n_depth: usize,
    #[serde(default)]
    samples_ns: Vec<u64>,
}

impl Entry {
    /// What two reports must share to be compared.
    fn key(&self) -> (String, usize) {
        let test = match (self.test.as_str(), self.n_prompt, self.n_gen) {
            ("", prompt, 0) => format!("pp{prompt}"),
            ("", 0, gen_) => format!("tg{gen_}"),
            ("", prompt, gen_) => format!("pp{prompt}+tg{gen_}"),
            (test, _, _) => return (test.into(), self.n_threads),
        };
        let depth = if self.n_depth > 0 { format!(" @ d{}", self.n_depth) } else { String::new() };
        (test + &depth, self.n_threads)
    }
}

/// A test that both reports have.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// The test, and the threads it ran on.
    pub test: String,
    /// How many times as fast the second report is.
    pub speed: Ratio,
    /// Whether it is slower than `1 - bound` and the interval excludes that nothing changed.
    pub regression: bool,
}

/// A comparison of two reports.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Comparison {
    /// Tests that both have, in the order of the first.
    pub changes: Vec<Change>,
    /// What could not be compared, and why.
    pub notes: Vec<String>,
}

/// Compares the reports (`json` or `jsonl`) in two files. A test is a regression if it is slower by more
/// than `bound` (0.05: 5 %) and the 95 % interval of its speed lies below 1.
///
/// # Errors
/// A file that cannot be read or is no report; two reports without a common test.
pub fn compare(a: &Path, b: &Path, bound: f64) -> Result<Comparison> {
    let (first, second) = (entries(a)?, entries(b)?);
    let mut found = Comparison::default();
    for entry in &first {
        let (test, threads) = entry.key();
        let name = format!("{test}, {threads} threads");
        let Some(other) = second.iter().find(|other| other.key() == entry.key()) else {
            found.notes.push(format!("{name}: only in {}", a.display()));
            continue;
        };
        if entry.samples_ns.is_empty() || other.samples_ns.is_empty() {
            found.notes.push(format!("{name}: not timed"));
            continue;
        }
        if (&entry.model_type, &entry.backends) != (&other.model_type, &other.backends) {
            found.notes.push(format!(
                "{name}: {} on {} beside {} on {}",
                entry.model_type, entry.backends, other.model_type, other.backends
            ));
        }
        let seconds = |e: &Entry| -> Vec<f64> { e.samples_ns.iter().map(|ns| (*ns).max(1) as f64).collect() };
        // Speed is one over time, so the second report's time stands below.
        let speed = ratio(&seconds(other), &seconds(entry));
        let regression = speed.ratio < 1.0 - bound && speed.high < 1.0;
        found.changes.push(Change { test: name, speed, regression });
    }
    for entry in second.iter().filter(|e| first.iter().all(|other| other.key() != e.key())) {
        found.notes.push(format!("{}, {} threads: only in {}", entry.key().0, entry.n_threads, b.display()));
    }
    if found.changes.is_empty() {
        return Err(Error::checkpoint(b, format!("has no timed test in common with {}", a.display())));
    }
    Ok(found)
}

/// The rows of a report: a JSON list, or an object a line.
fn entries(path: &Path) -> Result<Vec<Entry>> {
    let text = std::fs::read_to_string(path).map_err(|source| Error::io(path, source))?;
    let wrong = |error: serde_json::Error| {
        Error::checkpoint(path, format!("is no report of `tessera bench -o json` or `-o jsonl`: {error}"))
    };
    match text.trim_start().starts_with('[') {
        true => serde_json::from_str(&text).map_err(wrong),
        false => text
            .lines()
            .filter(|line| !line.trim().is_empty())
            .map(|line| serde_json::from_str(line).map_err(wrong))
            .collect(),
    }
}

impl Comparison {
    /// Whether any test is a regression.
    pub fn regressed(&self) -> bool {
        self.changes.iter().any(|change| change.regression)
    }

    /// A table for people.
    pub fn table(&self) -> String {
        let mut text = String::from("| test | speed B / A | 95 % interval | |\n| --- | ---: | --- | --- |\n");
        for Change { test, speed, regression } in &self.changes {
            let verdict = match (regression, speed) {
                (true, _) => "regression",
                (_, Ratio { low, .. }) if *low > 1.0 => "faster",
                (_, Ratio { high, .. }) if *high < 1.0 => "slower, within the bound",
                _ => "no difference shown",
            };
            text += &format!(
                "| {test} | {:.3} | {:.3} to {:.3} | {verdict} |\n",
                speed.ratio, speed.low, speed.high
            );
        }
        self.notes.iter().for_each(|note| text += &format!("note: {note}\n"));
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(name: &str, rows: &[(&str, &[u64])]) -> tempfile::NamedTempFile {
        use std::io::Write;
        let mut file = tempfile::Builder::new().prefix(name).tempfile().unwrap();
        for (test, samples) in rows {
            writeln!(file, "{}", serde_json::json!({"test": test, "n_threads": 2, "samples_ns": samples}))
                .unwrap();
        }
        file
    }

    #[test]
    fn regressions_need_size_and_certainty() {
        let a = report(
            "a",
            &[
                ("pp640", &[100, 101, 99]),
                ("tg16", &[100, 101, 99]),
                ("noise", &[100, 60, 160]),
                ("gone", &[1, 1]),
            ],
        );
        let b = report(
            "b",
            &[
                ("pp640", &[120, 121, 119]),
                ("tg16", &[102, 103, 101]),
                ("noise", &[120, 70, 200]),
                ("new", &[1, 1]),
            ],
        );
        let found = compare(a.path(), b.path(), 0.05).unwrap();
        let verdicts: Vec<_> = found.changes.iter().map(|c| c.regression).collect();
        assert_eq!(verdicts, [true, false, false]);
        assert!((found.changes[0].speed.ratio - 100.0 / 120.0).abs() < 1e-3);
        assert_eq!(found.notes.len(), 2, "{:?}", found.notes);
        assert!(found.regressed() && found.table().contains("regression"));
        assert!(!compare(a.path(), a.path(), 0.0).unwrap().regressed());
    }

    #[test]
    fn what_is_no_report_is_said() {
        let rubbish = report("c", &[]);
        std::fs::write(rubbish.path(), "not json").unwrap();
        assert!(compare(rubbish.path(), rubbish.path(), 0.1).unwrap_err().to_string().contains("no report"));
        let (a, b) = (report("a", &[("x", &[1])]), report("b", &[("y", &[1])]));
        assert!(compare(a.path(), b.path(), 0.1).unwrap_err().to_string().contains("in common"));
    }
}
