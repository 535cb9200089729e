//! The instrument: the arithmetic of its figures against numbers worked out by hand, and the forms of what
//! it prints. Nothing here asserts how long anything takes.

use serde_json::{Value, json};
use std::fs::File;
use std::io::Write;
use std::process::{Command, Output};
use tessera::backend::Ceilings;
use tessera::backend::cpu::CpuBackend;
use tessera::bench::environment::Watch;
use tessera::bench::measure::Measured;
use tessera::bench::plan::Test;
use tessera::bench::report::{Row, Subject};
use tessera::model::checkpoint::LoadMode;
use tessera::model::llava;
use tessera::model::names;
use tessera::model::preset::Preset;
use tessera::model::weights::Weights;
use tessera::op::{Cost, KvExtent, PAGE};
use tessera::runtime::{LoadOptions, Model, Source};
use tessera::tensor::{Bindings, DType};

fn tessera(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tessera")).args(args).current_dir(std::env::temp_dir()).output().unwrap()
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// LLaVA-1.5-7B as a header over a hole: shapes without data.
fn seven_billion() -> (tempfile::TempDir, Weights, tessera::model::config::ModelConfig) {
    let preset = Preset::find("llava-1.5-7b").unwrap();
    let config = preset.config(DType::F16).unwrap();
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for spec in names::tensors(&config) {
        let begin = end;
        end += spec.elements() * 2;
        let entry = json!({"dtype": "F16", "shape": spec.shape, "data_offsets": [begin, end]});
        header.insert(preset.layout().spell(&spec.name), entry);
    }
    let header = Value::Object(header).to_string();
    let dir = tempfile::tempdir().unwrap();
    let mut file = File::create(dir.path().join("model.safetensors")).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len((8 + header.len() + end) as u64).unwrap();
    let weights = Weights::open(&dir.path().into(), LoadMode::Mmap).unwrap();
    (dir, weights, config)
}

/// Within a share of what was worked out by hand; norms, rotations and activations are what is left over.
fn close(what: &str, found: u64, by_hand: f64, share: f64) {
    let off = found as f64 / by_hand - 1.0;
    println!("{what}: {found} is {:.3} % over {by_hand:e}", off * 100.0);
    assert!((0.0..share).contains(&off), "{what}: {found}, by hand {by_hand:e}");
}

#[test]
fn work_of_the_7b_model_is_what_a_person_counts() {
    let (_dir, weights, config) = seven_billion();
    let backend = CpuBackend::new(Some(1)).unwrap();
    let vision = llava::vision(&backend, &config, &weights).unwrap().unwrap();
    let one = Bindings { images: 1, ..Bindings::default() };
    let none = KvExtent::default();

    // 23 layers of 2*577*12*1024^2 + 4*577^2*1024, and 576 patches of 588 to 1024.
    let layer = 2.0 * 577.0 * 12.0 * 1024f64.powi(2) + 4.0 * 577f64.powi(2) * 1024.0;
    let tower = vision.graph.cost(0..vision.projector, &one, none);
    close("tower FLOPs", tower.flops, 23.0 * layer + 2.0 * 576.0 * 588.0 * 1024.0, 2e-3);
    let projector = vision.graph.cost(vision.projector..vision.graph.nodes.len(), &one, none);
    close("projector FLOPs", projector.flops, 2.0 * 576.0 * (1024.0 * 4096.0 + 4096f64.powi(2)), 1e-9 + 2e-3);

    let language = llava::language(&backend, &config, &weights).unwrap();
    let nodes = 0..language.graph.nodes.len();
    let step = |tokens: usize, past: usize| {
        let entries = (past + tokens).div_ceil(PAGE);
        let bindings = Bindings {
            tokens,
            outputs: 1,
            table_entries: entries,
            pages: entries,
            context: 4096,
            ..Bindings::default()
        };
        language.graph.cost(nodes.clone(), &bindings, KvExtent::of(past, tokens))
    };
    // 32 layers of 4 d^2 + 3 d f, the head for one row, and causal attention 4 d per pair; the last layer
    // goes on for one row after its keys and values are cached.
    let (d, f, v) = (4096.0, 11008.0, 32064.0);
    let body = 32.0 * (4.0 * d * d + 3.0 * d * f);
    let unwanted = 639.0 * (d * d + 3.0 * d * f);
    let prefill = 2.0 * (640.0 * body - unwanted) + 2.0 * d * v + 32.0 * 4.0 * d * (640.0 * 641.0 / 2.0);
    close("prefill FLOPs", step(640, 0).flops, prefill, 2e-3);
    // Every weight once in two bytes, and 1024 positions of keys and values in four.
    let decode = 2.0 * (body + d * v) + 1024.0 * 2.0 * 32.0 * d * 4.0;
    close("decode bytes", step(1, 1023).bytes, decode, 2e-3);
}

#[test]
fn a_row_says_what_its_samples_say() {
    let model =
        Model::load(&Source::Demo, &LoadOptions { threads: Some(1), ..LoadOptions::default() }).unwrap();
    let subject = Subject::new(&model, LoadMode::Mmap, 64);
    assert_eq!(subject.weights_sha256_sampled.len(), 64);
    let test = Test::Text { prompt: 0, generate: 4, depth: 8, batch: 2 };
    let step = Cost { flops: 1_000_000, bytes: 40_000_000 };
    let measured = Measured {
        samples: vec![0.010, 0.014],
        units: 8,
        latencies: vec![("ITL", vec![0.002, 0.004, 0.003])],
        steps: vec![step; 4],
        launches: 80,
        replayed: false,
    };
    // A step's bytes take 2 ms at 20 GB/s, its FLOPs 0.01 ms at 100 GFLOP/s: the floor of four is 8 ms.
    let ceilings = Ceilings { flops_per_s: 1e11, bytes_per_s: 2e10 };
    let row = Row::new(&subject, test, &measured, 1, Some(ceilings), Watch::begin().end(), 0);
    assert_eq!((row.test.as_str(), row.n_sequences, row.bound_by), ("tg4 b2 @ d8", 2, Some("bytes")));
    assert_eq!((row.avg_ns, row.samples_ns.clone()), (12_000_000, vec![10_000_000, 14_000_000]));
    let near = |found: Option<f64>, by_hand: f64| {
        assert!((found.unwrap() - by_hand).abs() < 1e-6, "{found:?}, by hand {by_hand}")
    };
    near(row.floor_ms, 8.0);
    near(row.percent_of_ceiling, 100.0 * 8.0 / 12.0);
    near(row.gbps, 0.160 / 0.012);
    near(row.tflops, 4e6 / 0.012 / 1e12);
    near(Some(row.avg_ts), (800.0 + 8.0 / 0.014) / 2.0);
    near(row.spread, (2.0f64 * 0.002f64.powi(2)).sqrt() / 0.012);
    assert_eq!((row.launches_per_step, row.latencies[0].p50_ms), (20.0, 3.0));

    // Where nothing is timed there are counts, and no figure that could be taken for a measurement.
    let counts = Row::new(&subject, test, &measured, 0, None, Watch::begin().end(), 0);
    assert_eq!((counts.avg_ns, counts.samples_ns.len(), counts.latencies.len()), (0, 0, 0));
    assert_eq!((counts.floor_ms, counts.gbps, counts.spread), (None, None, None));
    assert_eq!(counts.bytes, 160_000_000);
}

/// What llama-bench writes of these names, with the same meaning.
const LLAMA_BENCH: [&str; 23] = [
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
    let args = "bench -p 8,16 -n 3 --pg 4,2 -d 0,5 -b 1,2 --images 1 --ttft 6 -r 2 --prefill-chunk 7 -o jsonl --oe md";
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
    let row = |ns: [u64; 3]| json!({"test": "pp8", "n_threads": 1, "samples_ns": ns}).to_string();
    let write = |name: &str, text: String| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let (fast, slow) = (write("a", row([100, 101, 102])), write("b", row([150, 151, 152])));
    let same = tessera(&["bench", "compare", &fast, &fast]);
    assert!(stdout(&same).contains("no difference shown"));
    let worse = tessera(&["bench", "compare", &fast, &slow]);
    assert_eq!(worse.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&worse.stdout).contains("regression"));
    assert!(stdout(&tessera(&["bench", "compare", &slow, &fast])).contains("faster"));
    for args in [
        &["bench", "-p", "x"][..],
        &["bench", "-p", "4-1"],
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
        "-o",
        &trace,
        "--svg",
        &svg,
        "--summary",
    ]);
    assert!(stdout(&output).contains("| Linear |"));
    assert!(String::from_utf8_lossy(&output.stderr).contains("spans at"));
    let svg = std::fs::read_to_string(svg).unwrap();
    assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>") && svg.contains("<circle"));

    let trace: Value = serde_json::from_slice(&std::fs::read(trace).unwrap()).unwrap();
    assert_eq!(trace["displayTimeUnit"], "ms");
    let events = trace["traceEvents"].as_array().unwrap();
    let mut tracks: [Vec<(f64, f64)>; 4] = Default::default();
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
    let [_, stages, layers, ops] = tracks;
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
        serde_json::from_str(&stdout(&tessera(&["bench", "startup", "-r", "1", "--json"]))).unwrap();
    for kind in starts.as_array().unwrap() {
        let start = &kind["starts"][0];
        assert!(start["first_token_ms"].as_f64().unwrap() > start["ready_ms"].as_f64().unwrap(), "{kind}");
    }
}
