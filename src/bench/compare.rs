//! Two reports side by side: what changed, and whether it is more than chance.

use super::stats::{Ratio, ratio};
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::Path;

/// What is read of a row; reports of llama-bench have the same fields but for `test`.
#[derive(Clone, Debug, Deserialize)]
struct Entry {
    #[serde(default)]
    test: String,
    #[serde(default)]
    model_type: String,
    #[serde(default)]
    model_filename: String,
    #[serde(default)]
    backends: String,
    #[serde(default)]
    n_threads: usize,
    #[serde(default)]
    n_ubatch: usize,
    #[serde(default)]
    n_prompt: usize,
    #[serde(default)]
    n_gen: usize,
    #[serde(default)]
    n_depth: usize,
    #[serde(default)]
    samples_ns: Vec<u64>,
}

/// What two rows must share to be compared.
#[derive(Clone, Debug, PartialEq)]
struct Key {
    test: String,
    threads: usize,
    rows: usize,
    /// Only where a report has several models.
    model: Option<String>,
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {} threads", self.test, self.threads)?;
        if self.rows > 0 {
            write!(f, ", {} rows a step", self.rows)?;
        }
        self.model.iter().try_for_each(|model| write!(f, ", {model}"))
    }
}

impl Entry {
    fn key(&self, models: bool) -> Key {
        let depth = if self.n_depth > 0 { format!(" @ d{}", self.n_depth) } else { String::new() };
        let test = match (self.test.as_str(), self.n_prompt, self.n_gen) {
            ("", prompt, 0) => format!("pp{prompt}{depth}"),
            ("", 0, gen_) => format!("tg{gen_}{depth}"),
            ("", prompt, gen_) => format!("pp{prompt}+tg{gen_}{depth}"),
            (test, _, _) => test.into(),
        };
        let model = models.then(|| format!("{} {}", self.model_type, self.model_filename));
        Key { test, threads: self.n_threads, rows: self.n_ubatch, model }
    }
}

/// Fewest samples of a side that are judged: of fewer, the spread is not known.
const ENOUGH: usize = 5;

/// What a comparison says of a test.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The whole interval lies below `1 - bound`.
    Regression,
    /// The whole interval lies below 1, but not below the bound.
    Slower,
    /// The interval holds 1.
    NoDifference,
    /// The whole interval lies above 1.
    Faster,
    /// A side has fewer than five samples.
    TooFewSamples,
}

impl Verdict {
    fn of(speed: Ratio, samples: usize, bound: f64) -> Self {
        match speed {
            _ if samples < ENOUGH => Verdict::TooFewSamples,
            Ratio { high, .. } if high < 1.0 - bound => Verdict::Regression,
            Ratio { high, .. } if high < 1.0 => Verdict::Slower,
            Ratio { low, .. } if low > 1.0 => Verdict::Faster,
            _ => Verdict::NoDifference,
        }
    }

    /// In words.
    pub const fn words(self) -> &'static str {
        match self {
            Verdict::Regression => "regression",
            Verdict::Slower => "slower; the bound is not excluded",
            Verdict::NoDifference => "no difference shown",
            Verdict::Faster => "faster",
            Verdict::TooFewSamples => "not judged: fewer than 5 samples (-r 5)",
        }
    }
}

/// A test that both reports have.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Change {
    /// The test and its parameters.
    pub test: String,
    /// How many times as fast B is: the time of A over that of B, for rates and latencies alike.
    pub speed: Ratio,
    /// The fewer of both sides' samples.
    pub samples: usize,
    /// What that says.
    pub verdict: Verdict,
}

/// A comparison of two reports.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Comparison {
    /// Tests that both have, in the order of A.
    pub changes: Vec<Change>,
    /// What could not be compared, and why; what differs besides.
    pub notes: Vec<String>,
}

/// Compares report B with report A (`json` or `jsonl`): how many times as fast B is, by its rows of the same test,
/// threads and rows of a step, and of the same model if there are several. A test is a regression if the 95 %
/// interval of that excludes everything down to `1 - bound` (0.05: 5 % slower).
///
/// # Errors
/// A file that cannot be read or is no report; two reports without a common test.
pub fn compare(a: &Path, b: &Path, bound: f64) -> Result<Comparison> {
    let (first, second) = (entries(a)?, entries(b)?);
    let several = |entries: &[Entry]| {
        entries.iter().any(|e| {
            (&e.model_type, &e.model_filename) != (&entries[0].model_type, &entries[0].model_filename)
        })
    };
    let models = several(&first) || several(&second);
    let mut found = Comparison::default();
    for entry in &first {
        let key = entry.key(models);
        match second.iter().find(|other| other.key(models) == key) {
            None => found.notes.push(format!("{key}: only in A, {}", a.display())),
            Some(other) if entry.samples_ns.is_empty() || other.samples_ns.is_empty() => {
                found.notes.push(format!("{key}: not timed"));
            }
            Some(other) => {
                if (&entry.model_type, &entry.backends) != (&other.model_type, &other.backends) {
                    found.notes.push(format!(
                        "{key}: {} on {} beside {} on {}",
                        entry.model_type, entry.backends, other.model_type, other.backends
                    ));
                }
                found.changes.push(change(key, entry, other, bound));
            }
        }
    }
    for entry in &second {
        let key = entry.key(models);
        if first.iter().all(|other| other.key(models) != key) {
            found.notes.push(format!("{key}: only in B, {}", b.display()));
        }
    }
    if found.changes.is_empty() {
        let notes = found.notes.join("; ");
        return Err(Error::checkpoint(
            b,
            format!("has no timed test in common with {}: {notes}", a.display()),
        ));
    }
    Ok(found)
}

fn change(key: Key, a: &Entry, b: &Entry, bound: f64) -> Change {
    let seconds = |e: &Entry| -> Vec<f64> { e.samples_ns.iter().map(|ns| (*ns).max(1) as f64).collect() };
    // Speed is one over time, so B's time stands below.
    let speed = ratio(&seconds(b), &seconds(a));
    let samples = a.samples_ns.len().min(b.samples_ns.len());
    Change { test: key.to_string(), speed, samples, verdict: Verdict::of(speed, samples, bound) }
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
        self.changes.iter().any(|change| change.verdict == Verdict::Regression)
    }

    /// A table for people.
    pub fn table(&self) -> String {
        let mut text = String::from(
            "| test | speed of B / A | 95 % interval | samples | |\n| --- | ---: | --- | ---: | --- |\n",
        );
        for Change { test, speed, samples, verdict } in &self.changes {
            text += &format!(
                "| {test} | {:.3} | {:.3} to {:.3} | {samples} | {} |\n",
                speed.ratio,
                speed.low,
                speed.high,
                verdict.words()
            );
        }
        self.notes.iter().for_each(|note| text += &format!("note: {note}\n"));
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    type Row<'a> = (&'a str, usize, &'a [u64]);

    fn report(rows: &[Row<'_>]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        for (test, threads, samples) in rows {
            let row = serde_json::json!({"test": test, "n_threads": threads, "samples_ns": samples});
            writeln!(file, "{row}").unwrap();
        }
        file
    }

    /// A is always 98 to 102; the words say how B stands to it with a bound of 5 %.
    #[test]
    fn a_verdict_needs_size_certainty_and_samples() {
        let steady = [100, 101, 99, 102, 98];
        let cases: [(&[u64], Verdict); 7] = [
            (&[120, 121, 119, 122, 118], Verdict::Regression),
            // 6 % slower, but with an interval that reaches to 3 %.
            (&[106, 109, 103, 108, 104], Verdict::Slower),
            (&[103, 104, 102, 103, 103], Verdict::Slower),
            (&[100, 60, 160, 110, 90], Verdict::NoDifference),
            (&[80, 81, 79, 82, 78], Verdict::Faster),
            (&[200, 201, 202, 203], Verdict::TooFewSamples),
            (&steady, Verdict::NoDifference),
        ];
        for (samples, verdict) in cases {
            let (a, b) = (report(&[("tg16", 2, &steady)]), report(&[("tg16", 2, samples)]));
            let found = compare(a.path(), b.path(), 0.05).unwrap();
            assert_eq!(found.changes[0].verdict, verdict, "{samples:?}: {found:?}");
            assert_eq!(found.regressed(), verdict == Verdict::Regression);
            assert!(found.table().contains(verdict.words()));
            // Of the two orders at most one is a regression: the direction is that of speed.
            let swapped = compare(b.path(), a.path(), 0.05).unwrap();
            assert!(!(found.regressed() && swapped.regressed()));
            assert!((found.changes[0].speed.ratio * swapped.changes[0].speed.ratio - 1.0).abs() < 1e-9);
        }
    }

    #[test]
    fn rows_are_matched_by_what_they_share_and_others_named() {
        let five = [5; 5];
        let a = report(&[("pp8", 1, &five), ("pp8", 2, &[4; 5]), ("gone", 2, &five)]);
        let b = report(&[("pp8", 2, &[8; 5]), ("pp8", 1, &five), ("new", 2, &five)]);
        let found = compare(a.path(), b.path(), 0.05).unwrap();
        let speeds: Vec<_> = found.changes.iter().map(|c| (c.speed.ratio * 1e6).round() / 1e6).collect();
        assert_eq!(speeds, [1.0, 0.5]);
        let notes = found.notes.join("\n");
        assert!(notes.contains("gone, 2 threads: only in A") && notes.contains("new, 2 threads: only in B"));
    }

    #[test]
    fn reports_of_llama_bench_are_read() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let row =
            r#"{"n_threads": 2, "n_prompt": 0, "n_gen": 16, "n_depth": 64, "samples_ns": [5, 5, 5, 5, 5]}"#;
        writeln!(file, "[{row}]").unwrap();
        let ours = report(&[("tg16 @ d64", 2, &[5; 5])]);
        let found = compare(file.path(), ours.path(), 0.05).unwrap();
        assert_eq!(found.changes[0].speed.ratio, 1.0);
    }

    #[test]
    fn what_is_no_report_is_said() {
        let rubbish = report(&[]);
        std::fs::write(rubbish.path(), "not json").unwrap();
        assert!(compare(rubbish.path(), rubbish.path(), 0.1).unwrap_err().to_string().contains("no report"));
        let (a, b) = (report(&[("x", 1, &[1])]), report(&[("y", 1, &[1])]));
        let error = compare(a.path(), b.path(), 0.1).unwrap_err().to_string();
        assert!(error.contains("in common") && error.contains("x, 1 threads"), "{error}");
    }
}
