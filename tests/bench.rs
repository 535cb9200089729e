//! The instrument: the arithmetic of its figures against numbers worked out by hand, and what it runs. Nothing here
//! asserts how long anything takes. `bench_cli.rs` has the forms of what it prints.

mod schema;

use schema::{problems, schema};
use serde_json::{Value, json};
use std::fs::File;
use std::io::Write;
use tessera::backend::cpu::CpuBackend;
use tessera::backend::{Backend, CACHED, Ceilings, WorkingSet};
use tessera::bench::clip;
use tessera::bench::environment::Watch;
use tessera::bench::measure::{Measured, Step, measure};
use tessera::bench::plan::Test;
use tessera::bench::report::{Latency, Row};
use tessera::bench::subject::Subject;
use tessera::model::checkpoint::LoadMode;
use tessera::model::llava;
use tessera::model::names;
use tessera::model::preset::Preset;
use tessera::model::weights::Weights;
use tessera::op::{Cost, KvExtent, PAGE};
use tessera::runtime::{Clip, Engine, LoadOptions, Model, Session, SessionOptions, Source};
use tessera::tensor::{Bindings, DType};

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

/// The floors of LLaVA-1.5-7B on a machine of 500 GFLOP/s and 50 GB/s.
#[test]
fn floors_of_the_7b_model_are_what_a_person_works_out() {
    let ceilings = Ceilings { flops_per_s: 5e11, bytes_per_s: 5e10, ..Ceilings::default() };
    let set = WorkingSet { stored: 14_100_000_000, passing: 14 << 20 };
    // Decode: 6,607,339,520 weights of two bytes, 13.214 GB, at 50 GB/s.
    let params: u64 = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008) + 4096 * 32064;
    assert_eq!(params, 6_607_339_520);
    let decode = Cost { flops: 2 * params, bytes: 2 * params, stored: 2 * params };
    assert!((ceilings.floor(decode, set) - 0.264_293_6).abs() < 1e-6, "{}", ceilings.floor(decode, set));
    assert_eq!(ceilings.bound(decode, set), "bytes");
    // One picture: 23 blocks of 15,884,357,632 operations and the patches, 366,033,858,560 in all, at 500 GFLOP/s.
    let block: u64 = 2 * 577 * 12 * 1024 * 1024 + 4 * 577 * 577 * 1024;
    assert_eq!(block, 15_884_357_632);
    let tower = Cost { flops: 23 * block + 2 * 576 * 588 * 1024, bytes: 600_000_000, stored: 580_000_000 };
    assert!((ceilings.floor(tower, set) - 0.732_067_7).abs() < 1e-6, "{}", ceilings.floor(tower, set));
    assert_eq!(ceilings.bound(tower, set), "flops");
}

/// What a cache holds is not held against memory: a percentage stays one.
#[test]
fn small_working_sets_are_held_against_caches() {
    let mut ceilings = Ceilings { flops_per_s: 1e15, bytes_per_s: 1e10, ..Ceilings::default() };
    // 256 KiB to 2 MiB at ten times memory's rate, up to 16 MiB at three times, with one level that was disturbed.
    ceilings.cached_per_s = [1e11, 9e10, 1e11, 1e11, 3e10, 2e10, 3e10, 1e10, 1e10, 1e10, 1e10];
    let cases = [
        (1, 1e11),
        (300 << 10, 1e11),
        (3 << 20, 1e11),
        (5 << 20, 3e10),
        (10 << 20, 3e10),
        (16 << 20, 3e10),
        (40 << 20, 1e10),
        (1 << 40, 1e10),
    ];
    for (bytes, rate) in cases {
        assert_eq!(ceilings.read_rate(bytes), rate, "{bytes} bytes");
    }
    assert_eq!(CACHED[0] << 10, CACHED[10]);
    let cost = Cost { flops: 0, bytes: 3_000_000, stored: 2_000_000 };
    // 2 MB of a set of 8 MiB and 1 MB of 1 MB: 2e6 / 3e10 + 1e6 / 1e11.
    let set = WorkingSet { stored: 8 << 20, passing: 1_000_000 };
    assert!((ceilings.floor(cost, set) - (2e6 / 3e10 + 1e6 / 1e11)).abs() < 1e-12);
    assert_eq!(ceilings.bound(cost, set), "cache");
    // Of a GPU memory's rate alone is known.
    let gpu = Ceilings { cached_per_s: [0.0; 11], ..ceilings };
    assert_eq!((gpu.read_rate(1), gpu.bound(cost, set)), (1e10, "bytes"));
}

#[test]
fn the_machine_has_ceilings_for_every_working_set() {
    let ceilings = CpuBackend::new(Some(2)).unwrap().ceilings(&[]).unwrap().unwrap();
    for (bytes, rate) in CACHED.into_iter().zip(ceilings.cached_per_s) {
        assert!(rate.is_finite() && rate > 0.0 && ceilings.read_rate(bytes) >= rate, "{bytes}: {ceilings:?}");
    }
}

#[test]
fn percentiles_are_those_of_numpy() {
    // numpy.percentile([1, 2, 3, 4, 10], [50, 90, 99]) is 3, 7.6 and 9.76; their standard deviation is sqrt(50/4).
    let seconds = [0.004, 0.001, 0.010, 0.003, 0.002];
    let l = Latency::new("ITL", &seconds);
    for (found, by_hand) in
        [(l.mean_ms, 4.0), (l.p50_ms, 3.0), (l.p90_ms, 7.6), (l.p99_ms, 9.76), (l.stddev_ms, 12.5f64.sqrt())]
    {
        assert!((found - by_hand).abs() < 1e-9, "{found}, by hand {by_hand}");
    }
}

/// An engine over the demo model with steps of 12 rows.
fn demo_engine() -> Engine {
    let model =
        Model::load(&Source::Demo, &LoadOptions { threads: Some(1), ..LoadOptions::default() }).unwrap();
    let options = SessionOptions {
        context: Some(1024),
        kv_memory: Some(64 << 20),
        prefill_chunk: 12,
        max_sequences: 4,
        ..SessionOptions::default()
    };
    Engine::new(Session::new(std::sync::Arc::new(model), options).unwrap())
}

/// Four prompts of ten are 40 rows: four steps of twelve and less, in each of which all four advance by three.
#[test]
fn a_batch_of_prompts_advances_together() {
    let mut engine = demo_engine();
    let test = Test::Text { prompt: 10, generate: 2, depth: 0, batch: 4 };
    let measured = measure(&mut engine, test, (0, 2), None).unwrap();
    let rows: Vec<u64> = measured.steps.iter().map(|step| step.cost.flops).collect();
    // 3, 3, 3 and 1 of each, then one decode step: the first of two tokens comes from the prompt.
    assert_eq!(rows.len(), 5, "{rows:?}");
    assert!(rows[0] < rows[1] && rows[1] < rows[2], "later rows see more: {rows:?}");
    let count = |what| measured.latencies.iter().find(|l| l.0 == what).unwrap().1.len();
    assert_eq!((count("TTFT"), count("ITL"), count("TPOT")), (8, 8, 8), "of each sequence and repetition");
    assert_eq!((measured.units, measured.cache_hits), (48, 0));
}

/// The same file twice in a repetition, and in three repetitions: it is looked at six times.
#[test]
fn a_given_picture_is_never_served_from_the_cache() {
    let mut engine = demo_engine();
    let file = std::fs::read(format!("{}/assets/samples/scene1.png", env!("CARGO_MANIFEST_DIR"))).unwrap();
    for test in [Test::Image { images: 2 }, Test::FirstToken { images: 2, prompt: 4 }] {
        let measured = measure(&mut engine, test, (1, 2), Some(&file)).unwrap();
        assert_eq!(measured.cache_hits, 0, "{test}");
        let vision = &measured.latencies.iter().find(|l| l.0 == "vision").unwrap().1;
        assert!(vision.len() == 4 && vision.iter().all(|seconds| *seconds > 0.0), "{test}: {vision:?}");
    }
}

#[test]
fn a_row_says_what_its_samples_say() {
    let model =
        Model::load(&Source::Demo, &LoadOptions { threads: Some(1), ..LoadOptions::default() }).unwrap();
    let subject = Subject::new(&model, LoadMode::Mmap, 64);
    assert_eq!(subject.weights_sha256_sampled.len(), 64);
    let test = Test::Text { prompt: 0, generate: 4, depth: 8, batch: 2 };
    // Weights of a gigabyte, which no cache holds.
    let step = Step {
        cost: Cost { flops: 1_000_000, bytes: 40_000_000, stored: 40_000_000 },
        set: WorkingSet { stored: 1 << 30, passing: 0 },
    };
    let measured = Measured {
        samples: vec![0.010, 0.014],
        units: 8,
        latencies: vec![("ITL", vec![0.002, 0.004, 0.003])],
        steps: vec![step; 4],
        launches: 80,
        replays: 0,
        counts: None,
        cache_hits: 0,
    };
    // A step's bytes take 2 ms at 20 GB/s, its FLOPs 0.01 ms at 100 GFLOP/s: the floor of four is 8 ms.
    let ceilings = Ceilings { flops_per_s: 1e11, bytes_per_s: 2e10, ..Ceilings::default() };
    let row = Row::new(&subject, test, &measured, 1, Some(ceilings), Watch::begin(None).end(), 0);
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
    assert_eq!((row.launches_per_step, row.steps, row.latencies[0].p50_ms), (20.0, 4, 3.0));
    assert_eq!((row.graph_replay, row.working_set), (false, 1 << 30));
    let replayed = Measured { replays: 4, cache_hits: 2, ..measured.clone() };
    let row = Row::new(&subject, test, &replayed, 1, Some(ceilings), Watch::begin(None).end(), 0);
    assert!(
        row.graph_replay && row.graph_replays == 4 && row.doubts.join(" ").contains("2 pictures or tokens")
    );

    // Where nothing is timed there are counts, and no figure that could be taken for a measurement.
    let counts = Row::new(&subject, test, &measured, 0, None, Watch::begin(None).end(), 0);
    assert_eq!((counts.avg_ns, counts.samples_ns.len(), counts.latencies.len()), (0, 0, 0));
    assert_eq!((counts.floor_ms, counts.gbps, counts.spread), (None, None, None));
    assert_eq!(counts.bytes, 160_000_000);
}

/// Both towers of a CLIP: pictures, and texts of any length, which run at 16 rows or at all positions.
#[test]
fn a_clip_is_measured_tower_by_tower() {
    let source = Source::parse("preset:clip-tiny").unwrap();
    let mut clip = Clip::load(&source, &LoadOptions::default()).unwrap();
    let subject = Subject::of_clip(&clip, LoadMode::Mmap);
    assert!(subject.model_type.starts_with("clip "), "{}", subject.model_type);
    let ceilings = Ceilings { flops_per_s: 1e15, bytes_per_s: 1e15, ..Ceilings::default() };
    let mut row = |test: Test| {
        let measured = clip::measure(&mut clip, test, (0, 2), None).unwrap();
        let row = Row::new(&subject, test, &measured, 0, Some(ceilings), Watch::begin(None).end(), 0);
        assert_eq!(problems(&schema("bench"), &json!(row)), Vec::<String>::new());
        assert!(row.embeddings && row.cache_hits == 0 && row.samples_ns.len() == 2, "{test}");
        row
    };
    let picture = row(Test::Image { images: 2 });
    assert_eq!((picture.test.as_str(), picture.unit, picture.steps), ("img2", "images", 2));
    let events: Vec<_> = picture.latencies.iter().map(|event| (event.what.as_str(), event.count)).collect();
    assert_eq!(events, [("decode", 4), ("encode", 4)]);
    let [two, sixteen, all] = [2, 16, 77].map(|tokens| row(Test::Caption { tokens }));
    assert_eq!((all.test.as_str(), all.unit, all.n_prompt), ("txt77", "tokens", 77));
    assert!(two.flops == sixteen.flops && sixteen.flops < all.flops);
    let text = Test::Text { prompt: 4, generate: 0, depth: 0, batch: 1 };
    assert!(clip::measure(&mut clip, text, (0, 1), None).is_err());
}
