//! Every case of the op table on the CPU, for regression work: `cargo bench --bench ops -- cpu/linear`. Operands
//! stay the same from run to run, so what fits a cache is read from it; `bench --bench linear` and `tessera bench ops`
//! go through weights that none holds.

#[allow(dead_code, reason = "a benchmark looks at no results")]
#[path = "../tests/cases/mod.rs"]
mod cases;

use cases::Case;
use criterion::{Criterion, Throughput};
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;
use tessera::backend::Backend;
use tessera::backend::cpu::CpuBackend;
use tessera::op::Cost;

/// `linear/640x4096x4096/bf16`: rows, output and input features, dtype of the weights; for an op without
/// matrices rows and columns; what is cached before the rows, if anything.
fn id(case: &Case) -> String {
    let mut name = String::new();
    for c in case.op.name().chars() {
        if c.is_uppercase() && !name.is_empty() {
            name.push('_');
        }
        name.extend(c.to_lowercase());
    }
    let (rows, cols) = (case.ins[0].rows.bind(&case.bindings), case.ins[0].cols);
    let matrices: Vec<_> = case.weights.iter().filter(|[n, _]| *n > 1).collect();
    let shape = match matrices.first() {
        Some([_, k]) => {
            format!("{rows}x{}x{k}/{}", matrices.iter().map(|[n, _]| n).sum::<usize>(), case.dtype)
        }
        None => format!("{rows}x{cols}"),
    };
    let past = if case.past > 0 { format!("@{}", case.past) } else { String::new() };
    format!("{name}/{shape}{past}")
}

/// What a rate is of: operations where there are many to a byte, else bytes.
fn throughput(cost: Cost) -> Throughput {
    if cost.flops > 10 * cost.bytes {
        Throughput::Elements(cost.flops)
    } else {
        Throughput::Bytes(cost.bytes)
    }
}

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_millis(500))
        .configure_from_args();
    let backend: Arc<dyn Backend> = Arc::new(CpuBackend::new(None).expect("threads"));
    println!("{}; elem/s are operations", backend.describe());
    let mut seen = HashSet::new();
    for case in cases::all() {
        let id = id(&case);
        // Cases that differ in activation or bias alone have the same work; the first stands for them.
        if !seen.insert(id.clone()) {
            continue;
        }
        let data = case.data(0, backend.dtype());
        let mut prepared = case.prepare(backend.clone(), &data);
        let mut group = criterion.benchmark_group("cpu");
        group.throughput(throughput(prepared.cost()));
        group.bench_function(id, |b| b.iter(|| prepared.run()));
        group.finish();
    }
    criterion.final_summary();
}
