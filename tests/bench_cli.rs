//! `tessera bench` and `tessera profile`: what they print, by the schemas of `docs/schema`, and what they refuse.

mod schema;

use schema::{problems, schema};
use serde_json::{Value, json};
use std::process::{Command, Output};

fn tessera(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tessera")).args(args).current_dir(std::env::temp_dir()).output().unwrap()
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// What llama-bench writes of these names, with the same meaning.
const LLAMA_BENCH: [&str; 42] = [
    "fit_min_ctx",
    "build_number",
    "n_ubatch",
    "n_gpu_layers",
    "cpu_mask",
    "cpu_strict",
    "poll",
    "n_cpu_moe",
    "split_mode",
    "main_gpu",
    "no_kv_offload",
    "flash_attn",
    "devices",
    "tensor_split",
    "tensor_buft_overrides",
    "load_mode",
    "embeddings",
    "no_op_offload",
    "fit_target",
    "build_commit",
    "cpu_info",
    "gpu_info",
    "backends",
    "model_filename",
    "model_type",
    "model_size",
    "model_n_params",
    "n_batch",
    "n_threads",
    "type_k",
    "type_v",
    "use_mmap",
    "n_prompt",
    "n_gen",
    "n_depth",
    "test_time",
    "avg_ns",
    "stddev_ns",
    "avg_ts",
    "stddev_ts",
    "samples_ns",
    "samples_ts",
];

#[test]
fn bench_runs_every_combination_on_the_demo_model() {
    let args =
        "bench -p 8,16 -n 3 -pg 4,2 -d 0,5 -b 1,2 --images 1 --ttft 6 -r 2 --prefill-chunk 7 -o jsonl -oe md";
    let output = tessera(&args.split(' ').collect::<Vec<_>>());
    let rows: Vec<Value> = stdout(&output).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let tests: Vec<_> = rows.iter().map(|row| row["test"].as_str().unwrap()).collect();
    assert_eq!(tests.len(), 1 + 4 * 4 + 1, "{tests:?}");
    for name in ["img1", "pp8", "pp16 b2 @ d5", "tg3", "pp4+tg2 b2", "ttft img1+pp6"] {
        assert!(tests.contains(&name), "{name} of {tests:?}");
    }
    for row in &rows {
        for key in LLAMA_BENCH {
            assert!(!row[key].is_null(), "{key} of {row}");
        }
        assert_eq!(problems(&schema("bench"), row), Vec::<String>::new());
        assert_eq!(row["samples_ns"].as_array().unwrap().len(), 2, "{row}");
        for key in ["floor_ms", "percent_of_ceiling", "tflops", "gbps", "spread", "avg_ts"] {
            assert!(row[key].as_f64().is_some_and(|x| x.is_finite() && x >= 0.0), "{key} of {row}");
        }
    }
    let events = |test: &str| -> Vec<String> {
        let row = rows.iter().find(|row| row["test"] == test).unwrap();
        row["latencies"].as_array().unwrap().iter().map(|l| l["what"].as_str().unwrap().into()).collect()
    };
    assert_eq!(events("img1"), ["decode", "resize", "vision", "projector"]);
    assert_eq!(events("tg3"), ["ITL", "TPOT"]);
    assert_eq!(events("pp4+tg2"), ["TTFT", "ITL", "TPOT"]);
    let table = String::from_utf8_lossy(&output.stderr);
    assert!(table.contains("| model | size | params | backend | threads | test | t/s |"), "{table}");
    assert!(table.contains("ceilings of this run"), "{table}");
}

#[test]
fn csv_has_a_cell_for_every_column() {
    let csv = stdout(&tessera(&["bench", "-p", "4", "-n", "0", "--images", "0", "-r", "1", "-o", "csv"]));
    let mut reader = csv.lines();
    let columns = reader.next().unwrap().split(',').count();
    let row = reader.next().unwrap();
    assert!(columns > LLAMA_BENCH.len() && reader.next().is_none());
    // A comma outside quotes separates; quotes inside a cell are doubled.
    let mut quoted = false;
    let separators = row.chars().filter(|&c| {
        quoted ^= c == '"';
        c == ',' && !quoted
    });
    assert_eq!(separators.count() + 1, columns, "{row}");
}

#[test]
fn an_unsteady_run_fails_and_says_which_row() {
    let output = tessera(&"bench -p 4 -n 0 --images 0 -r 3 --max-spread 0".split(' ').collect::<Vec<_>>());
    assert_eq!(output.status.code(), Some(1));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("too unsteady") && stderr.contains("pp4"), "{stderr}");
}

#[test]
fn reports_are_compared_and_misuse_is_explained() {
    let dir = tempfile::tempdir().unwrap();
    let row = |ns: [u64; 5]| json!({"test": "pp8", "n_threads": 1, "samples_ns": ns}).to_string();
    let write = |name: &str, text: String| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let (fast, slow) =
        (write("a", row([100, 101, 102, 100, 101])), write("b", row([150, 151, 152, 150, 151])));
    let same = tessera(&["bench", "compare", &fast, &fast]);
    assert!(stdout(&same).contains("no difference shown"));
    let worse = tessera(&["bench", "compare", &fast, &slow]);
    assert_eq!(worse.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&worse.stdout).contains("regression"));
    assert!(stdout(&tessera(&["bench", "compare", &slow, &fast])).contains("faster"));
    let json = stdout(&tessera(&["bench", "compare", &slow, &fast, "--json"]));
    assert_eq!(problems(&schema("compare"), &serde_json::from_str(&json).unwrap()), Vec::<String>::new());
    for args in [
        &["bench", "-p", "x"][..],
        &["bench", "-p", "4-1"],
        &["bench", "-b", "0"],
        &["bench", "-b", "1,4097"],
        &["bench", "-t", "0"],
        &["bench", "-t", "1,4096"],
        &["bench", "-t", "1", "--threads", "1"],
        &["bench", "-r", "0"],
        &["bench", "--max-spread", "-1"],
        &["bench", "ops", "-p", "99999999"],
        &["bench", "compare", &fast, &fast, "--bound", "2"],
        &["bench", "ops", "--shape", "1,2"],
    ] {
        assert_eq!(tessera(args).status.code(), Some(2), "{args:?}");
    }
    assert_eq!(tessera(&["bench", "compare", &fast, "no-such-file"]).status.code(), Some(1));
}

#[test]
fn ops_are_timed_where_they_stand() {
    let parts: Value =
        serde_json::from_str(&stdout(&tessera(&["bench", "ops", "-p", "9", "-d", "4", "-r", "2", "--json"])))
            .unwrap();
    let parts = parts.as_array().unwrap();
    assert_eq!(parts.len(), 3);
    for part in parts {
        let ops = part["ops"].as_array().unwrap();
        let linear = ops.iter().find(|op| op["op"] == "Linear").unwrap_or_else(|| panic!("{part}"));
        assert!(
            linear["calls"].as_u64().unwrap() % 2 == 0 && linear["flops"].as_u64().unwrap() > 0,
            "{linear}"
        );
    }
    let filtered =
        stdout(&tessera(&["bench", "ops", "-p", "4", "-d", "0", "-r", "1", "--filter", "rmsnorm"]));
    assert!(filtered.contains("RmsNorm") && !filtered.contains("| Linear"), "{filtered}");
    let one: Value = serde_json::from_str(&stdout(&tessera(&[
        "bench",
        "ops",
        "--shape",
        "3,64,1024",
        "-r",
        "1",
        "--json",
    ])))
    .unwrap();
    assert_eq!(one[0]["ops"][0]["shape"], "3x1024 64x1024 f16");
}

#[test]
fn ops_are_lines_with_a_baseline_and_their_own_steps() {
    let args = ["bench", "ops", "-p", "0", "-d", "40", "-r", "1", "-o", "jsonl"];
    let text = stdout(&tessera(&args));
    let dir = tempfile::tempdir().unwrap();
    let earlier = dir.path().join("earlier.jsonl").display().to_string();
    std::fs::write(&earlier, &text).unwrap();
    let again = stdout(&tessera(&[&args[..], &["--baseline", &earlier]].concat()));
    let lines = |text: &str| text.lines().map(|l| serde_json::from_str(l).unwrap()).collect::<Vec<Value>>();
    for line in lines(&text).iter().chain(&lines(&again)) {
        assert_eq!(problems(&schema("ops"), line), Vec::<String>::new());
        // The 40 positions beforehand are a prefill, whose ops are not those of a decode step.
        assert!(line["test"] != "tg16 @ d40" || line["shape"].as_str().unwrap().starts_with("1x"), "{line}");
    }
    assert!(lines(&again).iter().all(|line| line["speed_of_baseline"].as_f64().unwrap() > 0.0), "{again}");
    assert!(
        stdout(&tessera(&["bench", "ops", "-p", "4", "-d", "0", "-r", "1", "--baseline", &earlier]))
            .contains("speed of")
    );
}

#[test]
fn threads_are_a_list() {
    let text = stdout(&tessera(&[
        "bench", "-t", "1,2", "-p", "4", "-n", "0", "--images", "0", "-r", "1", "-o", "jsonl",
    ]));
    let threads: Vec<Value> =
        text.lines().map(|l| serde_json::from_str::<Value>(l).unwrap()["n_threads"].clone()).collect();
    assert_eq!(threads, [1, 2]);
}

/// The trace against the format's rules, and against itself: ops lie in layers, layers in stages.
#[test]
fn the_trace_nests() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let image = format!("{}/assets/samples/scene1.png", env!("CARGO_MANIFEST_DIR"));
    let (trace, svg) = (path("trace.json"), path("roofline.svg"));
    let output = tessera(&[
        "profile",
        "--image",
        &image,
        "--max-tokens",
        "3",
        "--threads",
        "2",
        "-o",
        &trace,
        "--svg",
        &svg,
        "--summary",
    ]);
    assert!(stdout(&output).contains("| Linear |"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("watching costs") && said.contains("by turns"), "{said}");
    let svg = std::fs::read_to_string(svg).unwrap();
    assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>") && svg.contains("<circle"));

    let trace: Value = serde_json::from_slice(&std::fs::read(trace).unwrap()).unwrap();
    assert_eq!(problems(&schema("trace"), &trace), Vec::<String>::new());
    let events = trace["traceEvents"].as_array().unwrap();
    let mut tracks: [Vec<(f64, f64)>; 7] = Default::default();
    for event in events {
        let tid = event["tid"].as_u64().unwrap() as usize;
        assert!(event["name"].is_string() && event["pid"].is_u64(), "{event}");
        match event["ph"].as_str().unwrap() {
            "M" => assert!(event["args"].is_object(), "{event}"),
            "X" => {
                let (ts, dur) = (event["ts"].as_f64().unwrap(), event["dur"].as_f64().unwrap());
                assert!(ts >= 0.0 && dur >= 0.0, "{event}");
                tracks[tid].push((ts, ts + dur));
            }
            other => panic!("{other}"),
        }
    }
    let [_, _, stages, layers, ops, first, second] = tracks;
    assert!(first.len() > ops.len() / 2 && first.len() == second.len(), "every part has two threads");
    assert!(first.windows(2).all(|pair| pair[0].1 <= pair[1].0 + 0.01), "parts of a thread do not overlap");
    assert!(!stages.is_empty() && !layers.is_empty() && ops.len() > layers.len());
    let inside =
        |outer: &[(f64, f64)], (a, b): (f64, f64)| outer.iter().any(|&(c, d)| c <= a + 0.01 && b <= d + 0.01);
    assert!(ops.iter().all(|&op| inside(&layers, op)), "an op outside every layer");
    assert!(layers.iter().all(|&layer| inside(&stages, layer)), "a layer outside every stage");
    let stages: Vec<_> =
        events.iter().filter(|e| e["cat"] == "stages").map(|e| e["name"].as_str().unwrap()).collect();
    assert!(
        stages.contains(&"decode") && stages.contains(&"resize") && stages.contains(&"decode 1"),
        "{stages:?}"
    );
    assert!(
        stages.iter().any(|s| s.starts_with("prefill")) && stages.iter().any(|s| s.starts_with("vision")),
        "{stages:?}"
    );
    let op = events.iter().find(|e| e["cat"] == "ops" && e["args"]["op"] == "Linear").unwrap();
    assert!(op["args"]["flops"].as_u64().unwrap() > 0 && op["args"]["shape"].is_string(), "{op}");
}

#[test]
fn startup_is_timed_from_outside() {
    let starts: Value =
        serde_json::from_str(&stdout(&tessera(&["bench", "startup", "-r", "1", "--json", "--threads", "1"])))
            .unwrap();
    assert_eq!(problems(&schema("startup"), &starts), Vec::<String>::new());
    for kind in starts.as_array().unwrap() {
        assert!(kind["args"].to_string().contains(r#""--threads","1""#), "{kind}");
        let start = &kind["starts"][0];
        assert!(start["first_token_ms"].as_f64().unwrap() > start["ready_ms"].as_f64().unwrap(), "{kind}");
    }
}

/// What a start is given reaches it, and files that stay cached are not called cold.
#[test]
fn a_start_loads_as_asked() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = dir.path().join("tiny").display().to_string();
    stdout(&tessera(&["synth", "--preset", "llava-tiny", "--out", &checkpoint]));
    let output =
        tessera(&["bench", "startup", "--model", &checkpoint, "-r", "1", "--load-mode", "read", "--json"]);
    let kinds: Value = serde_json::from_str(&stdout(&output)).unwrap();
    let kinds = kinds.as_array().unwrap();
    assert!(kinds.iter().all(|kind| kind["load_mode"] == "read"), "{kinds:?}");
    let cold = kinds.iter().any(|kind| kind["page_cache"] == "cold");
    assert!(cold || String::from_utf8_lossy(&output.stderr).contains("no cold starts"), "{kinds:?}");
    let broken =
        tessera(&["bench", "startup", "--model", &checkpoint, "-r", "1", "--template", "no-such-style"]);
    assert_ne!(broken.status.code(), Some(0), "an option that cannot be met fails");
}

#[test]
fn a_profile_too_long_for_the_context_is_refused() {
    for tokens in ["5000", "18446744073709551615"] {
        let output = tessera(&["profile", "--max-tokens", tokens, "--prompt", "x"]);
        assert_eq!(output.status.code(), Some(1), "{tokens}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("context"), "{output:?}");
    }
}

#[cfg(feature = "emu")]
#[test]
fn nothing_is_timed_on_the_emulated_device() {
    let emu = |args: &str| stdout(&tessera(&args.split(' ').collect::<Vec<_>>()));
    let dir = tempfile::tempdir().unwrap();
    let trace = dir.path().join("trace.json").display().to_string();
    let summary = emu(&format!("profile --device emu --prompt x --max-tokens 2 --summary -o {trace}"));
    assert!(summary.contains("counts only") && !summary.contains("NaN"), "{summary}");
    let ops = emu("bench ops --device emu -p 3 -d 0 -r 1 -o jsonl");
    for line in ops.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()) {
        assert_eq!(problems(&schema("ops"), &line), Vec::<String>::new());
        assert!(line["seconds"].is_null() && line["percent_of_ceiling"].is_null(), "{line}");
    }
    let rows = emu("bench --device emu -p 3 -n 4 --images 0 -o jsonl");
    for row in rows.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()) {
        assert_eq!(problems(&schema("bench"), &row), Vec::<String>::new());
        assert_eq!(row["samples_ns"], json!([]), "{row}");
        let counted = |what| row["device_counts"][what].as_u64().unwrap();
        assert!(counted("launches") > 0 && counted("barriers") > 0 && counted("accesses") > 0, "{row}");
        // The first decode step runs op by op, the second is recorded and replayed; a prompt never is.
        assert_eq!(row["graph_replay"], row["test"] == "tg4", "{row}");
    }
}
