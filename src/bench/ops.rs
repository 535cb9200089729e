//! Ops one by one: each op of a model at the shapes it has there, timed where it stands in whole steps,
//! so that weights come from where they come from in a run; or one product of given shape.

use super::measure::measure;
use super::plan::Test;
use super::trace::{OpTime, summary};
use crate::backend::{Backend, Ceilings};
use crate::error::Result;
use crate::graph::{Control, Executor, GraphBuilder, Plan, Timing};
use crate::op::{Activation, Op};
use crate::runtime::Engine;
use crate::tensor::{Bindings, DType, Rows, Storage, TensorType, Weight, WeightBytes};
use std::sync::Arc;

/// Ops by kind and shape, and the ceilings they are held against, where anything is timed.
pub type Timed = (Vec<OpTime>, Option<Ceilings>);

/// Times every op of a test's steps over some repetitions: of the vision graph for a picture, of the language
/// graph otherwise.
///
/// # Errors
/// As for [`measure`].
pub fn time_ops(engine: &mut Engine, test: Test, repetitions: (usize, usize)) -> Result<Timed> {
    let (warmups, timed) = repetitions;
    let before = engine.model().ceilings()?;
    measure(engine, test, (0, warmups.max(1)), None)?;
    // Every node of every step that is not filling the cache beforehand; those are left out below.
    let (steps, depth) = match test {
        Test::Text { prompt, generate, depth, .. } => (prompt + generate, depth),
        Test::Image { .. } | Test::FirstToken { .. } | Test::Caption { .. } => (1, 0),
    };
    let session = engine.session();
    let nodes =
        session.language().graph().nodes.len() + session.vision().map_or(0, |v| v.graph().nodes.len());
    let filling = depth.div_ceil(session.prefill_chunk());
    engine.session_mut().trace(nodes * (steps + filling) * timed.max(1), Timing::Alone);
    let done = measure(engine, test, (0, timed.max(1)), None);
    let timed = done.and_then(|_| engine.model().ceilings()).map(|after| {
        let (session, ceilings) = (engine.session(), Ceilings::around(before, after));
        let generates = matches!(test, Test::Text { prompt: 0, .. });
        let ops = match (test, session.vision()) {
            (Test::Image { .. }, Some(vision)) => summary(vision, ceilings, |_| true),
            _ => summary(session.language(), ceilings, |span| generates == (span.bindings.decode > 0)),
        };
        (ops, ceilings)
    });
    engine.session_mut().trace(0, Timing::Alone);
    timed
}

/// Bytes of weights that a product of given shape goes through before it comes back to the first: more
/// than a cache holds.
const ROTATION: usize = 512 << 20;

/// Times `[m, k] x [n, k]ᵀ` on weights of `dtype` that no cache holds.
///
/// # Errors
/// [`Error::Memory`](crate::Error::Memory), [`Error::Device`](crate::Error::Device).
pub fn time_linear(
    backend: &Arc<dyn Backend>,
    (m, n, k): (usize, usize, usize),
    dtype: DType,
    repetitions: (usize, usize),
) -> Result<Timed> {
    let before = backend.ceilings(&[])?;
    let bytes = n * k * dtype.size();
    let copies = ROTATION.div_ceil(bytes.max(1)).clamp(1, 256);
    // 16-bit patterns near 1 in every format: no denormals, no infinities.
    let pattern = |i: usize| (0x3c00u16 | (i as u16).wrapping_mul(40503) & 0x80ff).to_le_bytes()[i % 2];
    let storage = Arc::new(Storage::Owned((0..bytes * copies).map(pattern).collect()));
    let mut b = GraphBuilder::new(&**backend);
    let x = b.input("x", TensorType { rows: Rows::Tokens, cols: k, dtype: backend.dtype() });
    for copy in 0..copies {
        let bytes =
            WeightBytes::new(storage.clone(), copy * bytes, bytes).expect("a copy inside the storage");
        let weight = Weight { name: format!("w{copy}"), dtype, rows: n, cols: k, bytes };
        let op = Op::linear(Activation::None, false, false);
        b.push(&format!("linear{copy}"), op, &[x], &[weight])?;
    }
    let graph = Arc::new(b.finish());
    let bindings = Bindings { tokens: m, decode: if m == 1 { 1 } else { 0 }, ..Bindings::default() };
    let plan = Plan::new(&graph, &**backend, bindings);
    let arena = Arc::new(backend.alloc("activations", plan.bytes)?);
    let mut executor = Executor::new(graph.clone(), backend.clone(), plan, arena, &[]);
    let zeros = vec![0u8; m * k * backend.dtype().size()];
    executor.write(x, &zeros)?;
    let control = Control::default();
    for (runs, timed) in [(repetitions.0.max(1), false), (repetitions.1.max(1), true)] {
        executor.trace(if timed { copies * runs } else { 0 }, Timing::Alone);
        for _ in 0..runs {
            // SAFETY: the graph has no index inputs and no states, and nobody else has its arena.
            unsafe { executor.run(&bindings, &control)? };
        }
    }
    let ceilings = Ceilings::around(before, backend.ceilings(&[])?);
    Ok((summary(&executor, ceilings, |_| true), ceilings))
}
