//! The GPU driver without a GPU: against a library that has every function and runs on the host, and against
//! libraries that lack something. Each runs in a process of its own, which finds that library before any other.
#![cfg(target_os = "linux")]

mod fake_cuda;
mod schema;

use fake_cuda::{Libraries, WHOLE, inside, with_library};
use schema::{problems, schema};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tessera::backend::cuda::CudaBackend;
use tessera::backend::cuda::device::Launch;
use tessera::backend::cuda::driver::Driver;
use tessera::backend::cuda::gpu::{Gpu, Module, list};
use tessera::bench::profile::Question;
use tessera::bench::subject::Subject;
use tessera::bench::trace;
use tessera::model::checkpoint::LoadMode;
use tessera::runtime::{Engine, LoadOptions, Model, Session, SessionOptions, Source};
use tessera::tensor::DType;

#[test]
fn a_whole_library_is_driven() {
    if inside() {
        return drive();
    }
    let text = with_library(WHOLE, "a_whole_library_is_driven");
    assert!(text.contains("Fake 7, compute capability 8.6, 4 multiprocessors"), "{text}");
    assert!(text.contains(CLOSED), "{text}");
}

/// Nothing is left behind when the device is closed.
const CLOSED: &str = "left: 0 bytes, 0 pinned, 0 streams, 0 events, 0 graphs, 0 modules, 0 contexts";

#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct AddArgs {
    to: usize,
    add: u32,
    unused: u32,
}

fn drive() {
    println!("{:?}", list().unwrap());
    static MODULES: [Module; 1] = [Module { name: "add", image: b"fake image", resources: "" }];
    let gpu = Arc::new(Gpu::open_with(0, &MODULES).unwrap());
    assert!(Gpu::open_with(1, &MODULES).is_err_and(|e| e.to_string().contains("numbered 0 to 0")));

    // More rows than both pinned buffers hold (64 MiB), made in order while others are copied.
    let (rows, row_bytes) = (10_000, 8 << 10);
    let addr = gpu.alloc("rows", rows * row_bytes).unwrap().unwrap();
    let mut next = 0;
    let mut fill = |row: usize, out: &mut [u8]| {
        assert_eq!(row, next, "rows are made in order");
        next += 1;
        out.fill((row % 251) as u8);
        Ok(())
    };
    let mut back = vec![0; rows * row_bytes];
    // SAFETY: the whole of what was just allocated; so for all below.
    unsafe {
        gpu.upload_rows(addr, rows, row_bytes, &mut fill).unwrap();
        gpu.upload_rows(addr, 1, row_bytes, &mut |_, out| {
            out.fill(200);
            Ok(())
        })
        .unwrap();
        gpu.download(addr, &mut back).unwrap();
    }
    assert!(back[..row_bytes].iter().all(|b| *b == 200));
    assert!(
        back.chunks(row_bytes).enumerate().skip(1).all(|(i, row)| row.iter().all(|b| *b == (i % 251) as u8))
    );
    // Uploads of any length, whose bytes are changed at once, and more of them than there are buffers.
    for round in 0..5 {
        let mut bytes = vec![round; 12_345];
        // SAFETY: as above.
        unsafe { gpu.upload(addr + 7 + round as usize * bytes.len(), &bytes).unwrap() };
        bytes.fill(99);
    }
    // SAFETY: as above.
    unsafe { gpu.download(addr, &mut back).unwrap() };
    assert!(back[..7].iter().all(|b| *b == 200));
    assert!(
        back[7..].chunks(12_345).take(5).zip(0..).all(|(bytes, round)| bytes.iter().all(|b| *b == round))
    );
    assert_eq!(gpu.alloc("too much", 2 << 28).unwrap(), None);
    // SAFETY: allocated above, and not used again.
    unsafe { gpu.free(addr) };

    let backend = CudaBackend::new(gpu.clone(), DType::BF16).unwrap();
    let error = backend.device().alloc("the KV cache", 2 << 28).unwrap_err().to_string();
    assert!(error.contains("the KV cache: 536870912 bytes are needed, 268"), "{error}");
    assert!(
        error.contains("on cuda:0; lower --context") && error.ends_with("or use --device cpu"),
        "{error}"
    );
    let number = backend.device().alloc("a number", 4).unwrap();
    let launch = Launch { kernel: "add", grid: [1, 2, 3], block: 32, shared: 64 };
    let args = |add| AddArgs { to: number.addr, add, unused: 0 };
    let add = |n| {
        // SAFETY: the kernel's own arguments, and the number is live.
        unsafe { backend.device().launch(launch, &args(n)) }
    };
    let read = || {
        let mut bytes = [0; 4];
        // SAFETY: as above.
        unsafe { gpu.download(number.addr, &mut bytes).unwrap() };
        u32::from_le_bytes(bytes)
    };
    // SAFETY: as above.
    unsafe { gpu.fill(number.addr, 0, 4).unwrap() };
    add(5).unwrap();
    assert_eq!(read(), 5);
    // What the made-up clock says first.
    let took = gpu.time(&mut || add(0)).unwrap().expect("a GPU's time");
    assert!((took.as_secs_f64() - 1.5e-5).abs() < 1e-8, "{took:?}");
    let recording = backend.device().record(&mut || {
        add(10)?;
        // Another thread's launch is none of this recording's.
        std::thread::scope(|scope| scope.spawn(|| add(100)).join().unwrap())?;
        add(20)
    });
    let recording = recording.unwrap();
    assert_eq!(read(), 105, "what is recorded does not run");
    for round in 1..4 {
        // SAFETY: the number is where it was.
        unsafe { recording.replay().unwrap() };
        assert_eq!(read(), 105 + 30 * round);
    }
    // Threads that record take their turns.
    std::thread::scope(|scope| {
        let recorders: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    backend.device().record(&mut || {
                        std::thread::sleep(std::time::Duration::from_millis(20));
                        add(0)
                    })
                })
            })
            .collect();
        assert!(recorders.into_iter().all(|recorder| recorder.join().unwrap().is_ok()));
    });
    // Marks between launches, of a recording and after it, and of a recording that fails.
    let marked = |fails: bool| {
        backend.device().record(&mut || {
            gpu.mark(0)?;
            add(1)?;
            gpu.mark(1)?;
            add(2)?;
            gpu.mark(2)?;
            if fails { Err(tessera::Error::Cancelled) } else { Ok(()) }
        })
    };
    assert!(matches!(marked(true), Err(tessera::Error::Cancelled)));
    let recording = marked(false).unwrap();
    // SAFETY: as above.
    unsafe { recording.replay().unwrap() };
    assert_eq!(gpu.between_marks(3).unwrap().len(), 2);
    gpu.mark(0).unwrap();
    add(1).unwrap();
    gpu.mark(1).unwrap();
    assert_eq!(gpu.between_marks(2).unwrap().len(), 1);
    assert_eq!(read(), 199);
    let failed = backend.device().record(&mut || Err(tessera::Error::Cancelled));
    assert!(matches!(failed, Err(tessera::Error::Cancelled)));
    add(1).unwrap();
    assert_eq!(read(), 200, "after a recording that failed, launches run");
    let wrong = Launch { kernel: "multiply", ..launch };
    // SAFETY: nothing is launched.
    let error = unsafe { backend.device().launch(wrong, &args(1)) }.unwrap_err().to_string();
    assert!(error.contains("multiply_bf16"), "{error}");
    let wide = Launch { block: 64, ..launch };
    // SAFETY: the library refuses.
    let error = unsafe { backend.device().launch(wide, &args(1)) }.unwrap_err().to_string();
    assert!(error.contains("add [1, 2, 3] x 64, 64 bytes of shared memory: cuLaunchKernel"), "{error}");
}

/// What a library without GPUs, one that is too old, and one that does not start say.
#[test]
fn what_is_missing_is_told() {
    if inside() {
        println!("{}", list().unwrap_err());
        return;
    }
    let told = |source: &str| with_library(source, "what_is_missing_is_told");
    let cases = [
        (
            WHOLE.replace("*n = 1; return OK; }\nint cuDeviceGet(", "*n = 0; return OK; }\nint cuDeviceGet("),
            "finds no GPU",
        ),
        (WHOLE.replace("int cuGraphLaunch(", "int cuGraphStart("), "too old: it has no cuGraphLaunch"),
        (
            WHOLE.replace("return flags ? INVALID : OK; }\nint cuDriver", "return INVALID; }\nint cuDriver"),
            "cuInit: a made-up error",
        ),
    ];
    for (source, expected) in cases {
        assert_ne!(source, WHOLE, "{expected}");
        let text = told(&source);
        assert!(text.contains(expected), "{text}");
    }
}

/// Every function of the library that is called is probed before.
#[test]
fn what_is_called_is_probed() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/backend/cuda");
    let files = ["library.rs", "gpu.rs", "staging.rs", "clock.rs", "marks.rs"];
    let texts = files.map(|file| std::fs::read_to_string(folder.join(file)).unwrap());
    let lists = texts.iter().filter_map(|text| text.split("const FUNCTIONS").nth(1)?.split("];").next());
    let probed: String = lists.collect();
    for (file, text) in files.iter().zip(&texts) {
        for call in text.split("sys::cu").skip(1) {
            let name: String = call.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect();
            // `culib` is the loader's, not the library's.
            let known = probed.contains(&format!("\"cu{name}\"")) || name == "lib";
            assert!(known, "{file} calls cu{name} without having asked for it");
        }
    }
}

/// The demo model on the made-up GPU, whose kernels compute nothing: all it says is token 0.
fn demo() -> Engine {
    static MODULES: [Module; 1] = [Module { name: "every", image: b"fake model", resources: "" }];
    let gpu = Gpu::open_with(0, &MODULES).unwrap();
    let backend = CudaBackend::new(Arc::new(gpu), DType::BF16).unwrap();
    let model = Model::load_on(Arc::new(backend), &Source::Demo, &LoadOptions::default()).unwrap();
    Engine::new(Session::new(Arc::new(model), SessionOptions::default()).unwrap())
}

fn question() -> Question {
    let picture = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/samples/scene1.png");
    Question { picture: Some(std::fs::read(picture).unwrap()), prompt: "Where?".into(), max_tokens: 3 }
}

/// The ranges of an answer to it: tower, projector, prompt, and a step for each token but the last.
const STAGES: [&str; 5] = ["vision", "vision", "prefill", "decode", "decode"];

/// What a profiler is told, as `prove` asks it on a real GPU too.
const PROFILER: &str = include_str!("../scripts/gpu/nvtx.c");

/// What the profiler and the clock wrote down, in the order in which it happened.
#[derive(Default)]
struct Log {
    /// Ranges that are not inside another, and those that they hold.
    stages: Vec<(String, Vec<String>)>,
    /// What the clock read, in microseconds.
    times: Vec<f64>,
    /// Recordings that were replayed.
    replays: usize,
}

impl Log {
    fn read(path: &Path) -> Self {
        let (mut log, mut open) = (Log::default(), Vec::<String>::new());
        for line in std::fs::read_to_string(path).unwrap().lines() {
            match line.split_once(' ') {
                Some(("push", name)) => {
                    match open.len() {
                        0 => log.stages.push((name.into(), Vec::new())),
                        1 => log.stages.last_mut().unwrap().1.push(name.into()),
                        _ => panic!("{name} inside {open:?}"),
                    }
                    open.push(name.into());
                }
                Some(("took", ms)) => log.times.push(1e3 * ms.parse::<f64>().unwrap()),
                Some(("replay", _)) => log.replays += 1,
                _ if line == "pop" => drop(open.pop().expect("no more ranges end than begin")),
                _ => panic!("{line}"),
            }
        }
        assert_eq!(open, [""; 0], "every range ends");
        log
    }

    /// That of [`profile`], without what the clock read for the ceilings after it: as often as for those before it,
    /// which the log beside the trace has.
    fn of_profile(path: &Path, trace: &Path) -> Self {
        let (mut log, before) = (Log::read(path), Log::read(&trace.with_extension("before")));
        assert!(!before.times.is_empty(), "ceilings are timed");
        log.times.truncate(log.times.len() - before.times.len());
        log
    }
}

/// Name, begin and end.
type Span = (String, f64, f64);

/// The events of a trace in one category.
fn spans(trace: &Value, category: &str) -> Vec<Span> {
    let events = trace["traceEvents"].as_array().unwrap().iter();
    let wanted = events.filter(|event| event["cat"] == category && event["args"]["where"].is_null());
    let span = |event: &Value| {
        let (ts, dur) = (event["ts"].as_f64().unwrap(), event["dur"].as_f64().unwrap());
        (event["name"].as_str().unwrap().into(), ts, ts + dur)
    };
    wanted.map(span).collect()
}

/// One follows the other on each level, inside those of the level above.
fn assert_nested(levels: [&[Span]; 3]) {
    for level in levels {
        let ordered = level.windows(2).all(|pair| pair[0].2 <= pair[1].1 + 0.01);
        assert!(level.len() >= 4 && ordered, "{level:?}");
    }
    for [outer, inner] in [[levels[0], levels[1]], [levels[1], levels[2]]] {
        let holds = |a: f64, b: f64| outer.iter().any(|&(_, c, d)| c <= a + 0.01 && b <= d + 0.01);
        assert!(inner.iter().all(|&(_, a, b)| holds(a, b)), "{outer:?} {inner:?}");
    }
}

/// The trace of a profile, into a file.
fn profile(file: &Path) {
    let (mut engine, question) = (demo(), question());
    question.rehearse(&mut engine).unwrap();
    let ceilings = engine.model().ceilings().unwrap();
    std::fs::copy(std::env::var_os("CUDA_LOG").unwrap(), file.with_extension("before")).unwrap();
    let profile = question.profile(&mut engine, ceilings).unwrap();
    let subject = Subject::new(engine.model(), LoadMode::Mmap, engine.session().prefill_chunk());
    let trace = trace::chrome(&subject, profile.clock, &profile.events);
    std::fs::write(file, trace.to_string()).unwrap();
}

/// A profile has the times of the GPU's clock, op by op, and opens a range for every stage and every op: a profiler
/// sees what the trace shows.
#[test]
fn a_profile_is_timed_by_the_gpu_and_seen_by_a_profiler() {
    if inside() {
        return profile(Path::new(&std::env::var_os("TRACE").unwrap()));
    }
    let libraries = Libraries::new(WHOLE);
    let (file, log) = (libraries.path("trace.json"), libraries.path("log"));
    let listens = ("NVTX_INJECTION64_PATH", libraries.compile("profiler", PROFILER));
    let logs = [("NVTX_LOG", log.clone()), ("CUDA_LOG", log.clone())];
    let variables = [&[listens, ("TRACE", file.clone())][..], &logs].concat();
    libraries.run("a_profile_is_timed_by_the_gpu_and_seen_by_a_profiler", &variables);
    let trace: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    assert_eq!(problems(&schema("trace"), &trace), Vec::<String>::new());
    let about = &trace["otherData"];
    assert_eq!([&about["clock"], &about["backends"], &about["gpu_info"]], ["device", "CUDA", "Fake 7"]);
    let (stages, layers, ops) = (spans(&trace, "stages"), spans(&trace, "layers"), spans(&trace, "ops"));
    assert_nested([&stages, &layers, &ops]);

    // The last run is the one that is shown.
    let log = Log::of_profile(&log, &file);
    assert!(log.times.len() > 3 * ops.len(), "other runs were watched too");
    for ((name, begin, end), took) in ops.iter().rev().zip(log.times.iter().rev()) {
        assert!((end - begin - took).abs() < 0.01, "{name} {begin} {end}, {took}");
    }
    let shown = &log.stages[log.stages.len() - STAGES.len()..];
    let (names, nodes): (Vec<_>, Vec<_>) = shown.iter().map(|(name, nodes)| (name.as_str(), nodes)).unzip();
    assert_eq!(names, STAGES, "{stages:?}");
    assert!(nodes.into_iter().flatten().eq(ops.iter().map(|(name, ..)| name)));
    // Replayed steps of the runs that were not watched are one range each.
    assert!(log.stages.iter().any(|(name, nodes)| name == "decode" && nodes.is_empty()));
}

/// Where no profiler listens, steps are replayed while they are watched, and timed op by op all the same.
#[test]
fn a_profile_times_what_is_replayed() {
    if inside() {
        return profile(Path::new(&std::env::var_os("TRACE").unwrap()));
    }
    let libraries = Libraries::new(WHOLE);
    let (file, log) = (libraries.path("trace.json"), libraries.path("log"));
    let output = libraries
        .run("a_profile_times_what_is_replayed", &[("TRACE", file.clone()), ("CUDA_LOG", log.clone())]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains(CLOSED), "{text}");
    let trace: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let (stages, layers, ops) = (spans(&trace, "stages"), spans(&trace, "layers"), spans(&trace, "ops"));
    assert_nested([&stages, &layers, &ops]);
    let log = Log::of_profile(&log, &file);
    for ((name, begin, end), took) in ops.iter().rev().zip(log.times.iter().rev()) {
        assert!((end - begin - took).abs() < 0.01, "{name} {begin} {end}, {took}");
    }
    // Tower, projector and both decode steps of every run, watched or not, but the first of each kind. Were steps not
    // replayed while they are watched, it would be half of that.
    let runs = log.times.len() / ops.len();
    assert!(runs >= 5 && log.replays > 6 * runs, "{runs} runs were watched, {} replays", log.replays);
}

/// Any run is seen, not only a profile; where no profiler listens, or one that cannot, nothing is different.
#[test]
fn without_a_profiler_nothing_is_told() {
    if inside() {
        return question().rehearse(&mut demo()).unwrap();
    }
    let libraries = Libraries::new(WHOLE);
    let (profiler, log) = (libraries.compile("profiler", PROFILER), libraries.path("log"));
    let run = |variables: &[(&str, PathBuf)]| {
        let output = libraries.run("without_a_profiler_nothing_is_told", variables);
        assert!(String::from_utf8_lossy(&output.stdout).contains(CLOSED), "{output:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let listens = |library| ("NVTX_INJECTION64_PATH", library);
    let to = ("NVTX_LOG", log.clone());
    for library in ["missing.so", "libcuda.c", "libcuda.so"] {
        assert_eq!(run(&[listens(libraries.path(library)), to.clone()]), "", "{library}");
    }
    assert_eq!(run(std::slice::from_ref(&to)), "");
    // It refuses, because it does not know where to write.
    assert_eq!(run(&[listens(profiler.clone())]), "");
    assert!(!log.exists());
    // One wants nothing, another fails when it is ready.
    let idle = libraries.compile("idle", "int InitializeInjectionNvtx2(void* table) { return 1; }");
    assert_eq!(run(&[listens(idle)]), "");
    let failing = libraries.compile("failing", &PROFILER.replace("return 1;", "return 0;"));
    assert_eq!(run(&[listens(failing), to.clone()]), "");
    assert_eq!(std::fs::read_to_string(&log).unwrap(), "");
    assert_eq!(run(&[listens(profiler), to]), "");
    let stages: Vec<_> = Log::read(&log).stages.into_iter().map(|(name, _)| name).collect();
    assert_eq!(stages, STAGES);
}
