//! From the results of `scripts/gpu/prove` to entries of the ledger, and from those to README.

use super::Entries;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::Path;
use tessera::backend::cuda::ledger::{GpuRun, digests};

/// What `prove` leaves, as far as it is needed here.
#[derive(Debug, Deserialize)]
pub struct Results {
    date: String,
    commit: String,
    /// Name, driver and more, with commas.
    gpu_before: String,
    /// The digests of the files that ran.
    pub kernels: BTreeMap<String, String>,
    parts: BTreeMap<String, Part>,
    ops: Vec<Ops>,
    bench: Vec<Bench>,
}

#[derive(Debug, Deserialize)]
struct Part {
    status: i32,
}

/// The ops of one test of `bench ops`.
#[derive(Debug, Deserialize)]
struct Ops {
    test: String,
    ops: Vec<Timed>,
}

#[derive(Debug, Deserialize)]
struct Timed {
    op: String,
    shape: String,
    seconds: f64,
    floor: Option<f64>,
}

/// A row of `bench`.
#[derive(Debug, Deserialize)]
struct Bench {
    model_type: String,
    test: String,
    avg_ns: f64,
    avg_ts: f64,
    floor_ms: Option<f64>,
    percent_of_ceiling: Option<f64>,
}

/// What must have run, and well, before a file of kernels counts as verified.
fn proofs(file: &str) -> impl Iterator<Item = &'static str> {
    // What is right about sampling says nothing of other kernels.
    let of_sampling = (file == "sample.cu").then_some("cuda_sampling");
    ["cuda", "cuda_attention", "device", "probes", "demo"].into_iter().chain(of_sampling)
}

pub fn results(file: &Path) -> Results {
    let text = std::fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

impl Results {
    /// The run, with what it measured of a file's ops.
    pub fn run_of(&self, file: &str, results: &str) -> Result<GpuRun, String> {
        for proof in proofs(file) {
            match self.parts.get(proof) {
                Some(Part { status: 0 }) => {}
                Some(Part { status }) => return Err(format!("{proof} failed ({status})")),
                None => return Err(format!("{proof} did not run")),
            }
        }
        let mut words = self.gpu_before.split(", ");
        let mut word = || words.next().unwrap_or_default().trim().to_string();
        let of_file = |test: &Ops, op: &Timed| file_of(&op.op, test.test.starts_with("tg")) == file;
        let pairs = self.ops.iter().flat_map(|test| test.ops.iter().map(move |op| (test, op)));
        let percent = |(test, op): (&Ops, &Timed)| {
            let floor = op.floor.filter(|floor| *floor > 0.0 && of_file(test, op))?;
            Some((format!("{} {}", op.op, op.shape), (1000.0 * floor / op.seconds).round() / 10.0))
        };
        Ok(GpuRun {
            date: self.date[..10].into(),
            chip: word(),
            driver: word(),
            commit: self.commit.clone(),
            results: results.into(),
            percent_of_floor: pairs.filter_map(percent).collect(),
        })
    }
}

/// Where the kernels of an op are; some have a family for decode rows.
fn file_of(op: &str, decode: bool) -> &'static str {
    match op {
        "PatchEmbed" => "patch.cu",
        "LayerNorm" | "RmsNorm" | "AddRmsNorm" | "L2Normalize" => "norm.cu",
        "Linear" | "GatedLinear" => ["linear.cu", "matvec.cu"][decode as usize],
        "Attention" => "attention.cu",
        "PagedAttention" => ["attention.cu", "paged_decode.cu"][decode as usize],
        "RopeAppend" => "rope.cu",
        "EmbedRows" | "EmbedTokens" | "SelectRows" => "embed.cu",
        "Sample" => "sample.cu",
        _ => panic!("tests/ledger/gpu.rs does not know where the kernels of {op} are"),
    }
}

/// Enters a run for each file that is the one that ran.
pub fn with_run(mut entries: Entries, file: &Path) -> Entries {
    let name = file.file_name().expect("a file name").to_string_lossy();
    assert!(file.parent().is_some_and(|folder| folder.ends_with("benches/results")), "{}", file.display());
    enter(&mut entries, &results(file), &name).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    entries
}

fn enter(entries: &mut Entries, results: &Results, name: &str) -> Result<(), String> {
    for (file, digest) in digests() {
        if results.kernels.get(file) == Some(&digest) {
            let entry = entries.get_mut(file).ok_or_else(|| format!("the ledger does not know {file}"))?;
            entry.gpu = Some(results.run_of(file, name)?);
        } else {
            println!("kernels/{file} is not the one that ran: no entry");
        }
    }
    Ok(())
}

// ---- README ----

const BEGIN: &str = "<!-- From kernels/ledger.json: tests/ledger.rs writes it. -->\n";
const END: &str = "<!-- As far as here. -->\n";

/// The text with other figures of GPUs.
pub fn with_figures(readme: &str, figures: &str) -> String {
    let (before, rest) = readme.split_once(BEGIN).expect("README has a place for figures of GPUs");
    let (_, after) = rest.split_once(END).expect("README's figures of GPUs end");
    format!("{before}{BEGIN}{figures}{END}{after}")
}

/// The figures that hold of the kernels as they stand; of whole models only if none was edited since.
pub fn figures(entries: &Entries) -> String {
    let runs: Vec<_> = entries.iter().filter_map(|(file, entry)| Some((file, entry.gpu.as_ref()?))).collect();
    let Some((_, first)) = runs.first() else {
        return "No kernel, as it stands, has been verified on a GPU.\n".into();
    };
    let mut text = String::from("| kernels | verified on | of the floor, by op and shape |\n|---|---|---|\n");
    for (file, run) in &runs {
        let GpuRun { chip, driver, date, commit, percent_of_floor, .. } = run;
        let all = percent_of_floor.values();
        let (least, most) = all.fold((f64::INFINITY, 0f64), |(least, most), x| (least.min(*x), most.max(*x)));
        let range = match percent_of_floor.len() {
            0 => "-".into(),
            1 => format!("{most:.0} %"),
            shapes => format!("{least:.0} to {most:.0} % ({shapes} shapes)"),
        };
        text += &format!("| `{file}` | {chip}, driver {driver}, {date}, commit {commit} | {range} |\n");
    }
    if runs.len() < entries.len() || runs.iter().any(|(_, run)| run.results != first.results) {
        let run = &first.results;
        return text
            + &format!(
                "\nOther kernels were edited since a GPU ran them, so there are no figures of whole models here; \
                 [the run](benches/results/{run}) has those of its own.\n"
            );
    }
    let results = results(&Path::new("benches/results").join(&first.results));
    text += &format!(
        "\nWhole models on the {} ([all of the run](benches/results/{})):\n\n\
         | model | test | tokens or pictures/s | ms | floor, ms | of the ceiling |\n|---|---|---|---|---|---|\n",
        first.chip, first.results
    );
    for Bench { model_type, test, avg_ns, avg_ts, floor_ms, percent_of_ceiling } in &results.bench {
        let known = |value: &Option<f64>, digits| value.map_or("-".into(), |x| format!("{x:.digits$}"));
        text += &format!(
            "| {model_type} | `{test}` | {avg_ts:.1} | {:.2} | {} | {} % |\n",
            avg_ns / 1e6,
            known(floor_ms, 2),
            known(percent_of_ceiling, 0)
        );
    }
    text
}

mod tests {
    use super::*;
    use serde_json::{Value, json};
    use tessera::backend::cuda::ledger::Entry;

    /// Results as `prove` leaves them: one op of two phases, two models' rows.
    fn made_up() -> Value {
        let passed = proofs("sample.cu").map(|proof| (proof.to_string(), json!({"status": 0, "seconds": 9})));
        let op = |seconds| json!({"op": "Linear", "shape": "1x2 3x2 bf16", "calls": 4, "seconds": seconds, "floor": 1.0});
        json!({
            "date": "2026-01-31T01:02:03Z", "commit": "abc1234", "gpu_before": "NVIDIA X, 570.1, 1980 MHz",
            "kernels": digests(), "parts": Value::Object(passed.collect()),
            "ops": [{"test": "pp640", "ops": [op(2.0)]}, {"test": "tg16 @ d640", "ops": [op(1.25)]}],
            "bench": [],
        })
    }

    fn entered(results: Value) -> Result<Entries, String> {
        let entry = |digest| Entry { digest, emulated: None, gpu: None };
        let mut entries =
            digests().into_iter().map(|(file, digest)| (file.to_string(), entry(digest))).collect();
        enter(&mut entries, &serde_json::from_value(results).unwrap(), "made_up.json")?;
        Ok(entries)
    }

    #[test]
    fn a_run_is_entered_under_the_files_that_ran() {
        let mut results = made_up();
        results["kernels"]["norm.cu"] = "of another norm.cu".into();
        let entries = entered(results).unwrap();
        assert_eq!(entries["norm.cu"].gpu, None);
        for (file, percent) in [("linear.cu", Some(50.0)), ("matvec.cu", Some(80.0)), ("rope.cu", None)] {
            let run = entries[file].gpu.clone().unwrap();
            assert_eq!((run.chip.as_str(), run.driver.as_str()), ("NVIDIA X", "570.1"));
            assert_eq!((run.date.as_str(), run.commit.as_str()), ("2026-01-31", "abc1234"));
            assert_eq!(run.percent_of_floor.get("Linear 1x2 3x2 bf16").copied(), percent, "{file}");
        }
        let text = figures(&entries);
        assert!(
            text.contains("| `matvec.cu` | NVIDIA X, driver 570.1, 2026-01-31, commit abc1234 | 80 % |"),
            "{text}"
        );
        assert!(text.contains("Other kernels were edited") && !text.contains("norm.cu"), "{text}");
    }

    #[test]
    fn a_run_that_failed_or_left_something_out_is_refused() {
        for (part, status, told) in [
            ("cuda", Some(101), "cuda failed (101)"),
            ("cuda_sampling", Some(101), "cuda_sampling failed (101)"),
            ("probes", None, "probes did not run"),
        ] {
            let mut results = made_up();
            match status {
                Some(status) => results["parts"][part]["status"] = status.into(),
                None => drop(results["parts"].as_object_mut().unwrap().remove(part)),
            }
            assert_eq!(entered(results).unwrap_err(), told);
        }
        let mut results = made_up();
        results["parts"]["cuda_sampling"]["status"] = 101.into();
        results["kernels"]["sample.cu"] = "of another sample.cu".into();
        assert!(entered(results).unwrap()["linear.cu"].gpu.is_some(), "sampling is one file's affair");
    }

    #[test]
    fn figures_are_put_in_their_place() {
        let readme = format!("before\n{BEGIN}old\n{END}after\n");
        assert_eq!(with_figures(&readme, "new\n"), format!("before\n{BEGIN}new\n{END}after\n"));
    }
}
