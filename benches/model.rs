//! A whole model against the machine's ceilings: image encode and prefill against the multiply-add rate,
//! decode against the rate at which its own weights are read; each beside its ceiling, in one run.
//!
//! `cargo bench --bench model -- [llava-1.5-7b] [f16|bf16]`; without arguments, the widths of
//! LLaVA-1.5-7B with 4 layers.

mod ceilings;

use ceilings::{fma_rate, read_rate};
use std::sync::Arc;
use std::time::Instant;
use tessera::backend::cpu::machine::Machine;
use tessera::graph::{Control, Executor};
use tessera::model::preset::Preset;
use tessera::op::{Cost, KvExtent, PAGE};
use tessera::runtime::{Advance, LoadOptions, Model, Phase, Sampling, Session, SessionOptions, Source, Want};
use tessera::tensor::{Bindings, DType};

const PROMPT: usize = 640;
const STEPS: usize = 16;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with("--")).collect();
    let name = args.iter().find(|a| Preset::find(a).is_ok()).map_or("llava-1.5-7b-4-layers", String::as_str);
    let dtype = if args.iter().any(|a| a == "bf16") { DType::BF16 } else { DType::F16 };
    let preset = Preset::find(name).expect("a preset");
    let options = LoadOptions { preset_dtype: dtype, ..LoadOptions::default() };
    let model = Arc::new(Model::load(&Source::Preset(preset), &options).expect("the model"));
    let session = SessionOptions { context: Some(1024), max_sequences: 1, ..SessionOptions::default() };
    let mut session = Session::new(model.clone(), session).expect("a session");
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let machine = Machine::new(threads).expect("threads");
    let weights = model.weights().storages().next().expect("weights").clone();
    let weights = &weights.as_bytes()[..weights.as_bytes().len().min(4 << 30)];

    println!("preset:{name} {dtype}, {}", model.backend().describe());
    println!("{:<22} {:>10} {:>18} {:>10} {:>8}", "", "ms", "", "ceiling", "");
    if let (Some(vision), Some(config)) = (session.vision(), &model.config().vision) {
        let one = Bindings { images: 1, ..Bindings::default() };
        let cost = cost(vision, one, KvExtent::default());
        let pixels = (0..3 * config.image_size * config.image_size).map(|i| (i % 509) as f32 / 254.0 - 1.0);
        let pixels: Vec<f32> = pixels.collect();
        let control = Control::default();
        let time = best(3, || {
            session.encode(&pixels, [0; 32], &control).expect("encoded");
        });
        report("image encode", time, cost.flops as f64, fma_rate(&machine), "GFLOP/s");
    }

    let vocab = model.config().text.vocab_size as u32;
    let ids: Vec<u32> = (0..PROMPT as u32).map(|i| (i * 7919 + 13) % vocab).collect();
    let runs = if preset.bytes(dtype).expect("bytes") > 8 << 30 { 1 } else { 3 };
    let kv = KvExtent::of(0, PROMPT);
    let bindings = bindings(&session, PROMPT, PROMPT);
    let flops = cost(session.language(), bindings, kv).flops as f64;
    let time = best(runs, || {
        let mut sequence = session.sequence(&ids, Vec::new(), Sampling::GREEDY).expect("a sequence");
        let advance =
            Advance { sequence: &mut sequence, tokens: PROMPT, want: Want::Next, phase: Phase::Prefill };
        session.step(&mut [advance], &Control::default()).expect("a step");
    });
    report(&format!("prefill {PROMPT}"), time, flops, fma_rate(&machine), "GFLOP/s");

    let mut sequence = session.sequence(&ids, Vec::new(), Sampling::GREEDY).expect("a sequence");
    let advance =
        Advance { sequence: &mut sequence, tokens: PROMPT, want: Want::Next, phase: Phase::Prefill };
    session.step(&mut [advance], &Control::default()).expect("a step");
    let mut times = Vec::new();
    let mut bytes = 0;
    for _ in 0..STEPS {
        let id = session.next(0);
        sequence.push(id);
        let past = sequence.cached();
        bytes = cost(session.language(), self::bindings(&session, 1, past + 1), KvExtent::of(past, 1)).bytes;
        let start = Instant::now();
        let advance = Advance { sequence: &mut sequence, tokens: 1, want: Want::Next, phase: Phase::Decode };
        session.step(&mut [advance], &Control::default()).expect("a step");
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    let time = times[STEPS / 2];
    report(&format!("decode at {PROMPT}"), time, bytes as f64, read_rate(&machine, weights), "GB/s");
    println!("{:<22} {:10.2} tokens/s", "", 1.0 / time);
    let plan = session.memory();
    println!(
        "peak resident memory {:.2} GiB; weights {:.2} + KV {:.2} + activations {:.2} GiB planned",
        peak_resident() as f64 / (1u64 << 30) as f64,
        plan.weights as f64 / (1u64 << 30) as f64,
        plan.kv as f64 / (1u64 << 30) as f64,
        plan.arena as f64 / (1u64 << 30) as f64,
    );
}

/// FLOPs and bytes of all nodes of a graph.
fn cost(executor: &Executor, bindings: Bindings, kv: KvExtent) -> Cost {
    let graph = executor.graph();
    graph.nodes.iter().fold(Cost::default(), |sum, node| {
        let shapes = graph.shapes(node, &bindings);
        let cost = node.op.cost(&shapes.ins, &graph.weight_types(node), &shapes.outs, kv);
        Cost { flops: sum.flops + cost.flops, bytes: sum.bytes + cost.bytes }
    })
}

fn bindings(session: &Session, tokens: usize, len: usize) -> Bindings {
    let max = session.language().plan().max;
    Bindings { tokens, outputs: 1, table_entries: len.div_ceil(PAGE), ..max }
}

/// Seconds of the fastest of `runs` runs.
fn best(runs: usize, mut f: impl FnMut()) -> f64 {
    (0..runs)
        .map(|_| {
            let start = Instant::now();
            f();
            start.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min)
}

fn report(what: &str, time: f64, work: f64, ceiling: f64, unit: &str) {
    let rate = work / time;
    println!(
        "{what:<22} {:10.1} {:10.1} {unit:<7} {:10.1} {:6.1} %",
        time * 1e3,
        rate / 1e9,
        ceiling / 1e9,
        100.0 * rate / ceiling
    );
}

/// Bytes, from the kernel's own account; 0 where there is none.
fn peak_resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) * 1024
}
