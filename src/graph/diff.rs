//! Two devices, node by node: which node is the first to differ by more than it may.

use super::{Executor, Node};
use crate::error::Result;
use crate::tensor::{Bindings, DType};
use std::fmt;

/// A node whose result strays.
#[derive(Clone, Debug, PartialEq)]
pub struct Stray {
    /// The node, as the model's author called it.
    pub node: String,
    /// Its op.
    pub op: &'static str,
    /// Which of its results.
    pub result: usize,
    /// The root mean square of the difference, as a share of that of the reference.
    pub deviation: f64,
    /// What it may be.
    pub bound: f64,
}

impl fmt::Display for Stray {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Stray { node, op, result, deviation, bound } = self;
        write!(
            f,
            "node `{node}` ({op}), result {result}: deviates by {deviation:.1e}, at most {bound:.1e} is sound"
        )
    }
}

/// The largest deviation that is sound for a node of a device that keeps activations in `dtype`: four units of
/// rounding. A result is rounded once, which makes less than half a unit on average, and its op may round what
/// it multiplies; wrong indices, lost terms and stale operands make hundreds.
pub fn sound(dtype: DType) -> f64 {
    let unit = match dtype {
        DType::F32 | DType::I32 => 2f64.powi(-24) * 64.0,
        DType::F16 => 2f64.powi(-11),
        DType::BF16 => 2f64.powi(-8),
    };
    4.0 * unit
}

/// Runs the same graph, built for two devices, node by node on the same inputs, and names the first node of
/// `device` whose result differs by more than `bound` says. After every node the reference goes on from what the
/// device made, so that each is judged by itself. Tokens that are chosen are not compared: equal logits are rare.
///
/// # Errors
/// What a node or a copy says.
///
/// # Safety
/// As for [`Executor::run`], on both. The reference keeps activations in f32.
///
/// # Panics
/// If the graphs differ.
pub unsafe fn first_stray(
    device: &mut Executor,
    reference: &mut Executor,
    bindings: &Bindings,
    bound: impl Fn(&Node) -> f64,
) -> Result<Option<Stray>> {
    device.begin(bindings)?;
    reference.begin(bindings)?;
    assert_eq!(device.graph().nodes.len(), reference.graph().nodes.len(), "two different graphs");
    for n in 0..device.graph().nodes.len() {
        // SAFETY: passed on from the caller, for both.
        unsafe {
            device.run_node(n, bindings)?;
            reference.run_node(n, bindings)?;
        }
        let outs = device.graph().nodes[n].outs.clone();
        for (result, &out) in outs.iter().enumerate() {
            if device.graph().ty(out).dtype == DType::I32 {
                continue;
            }
            let ours = device.read_floats(out, bindings)?;
            let deviation = deviation(&ours, &reference.read_floats(out, bindings)?);
            let node = &device.graph().nodes[n];
            let bound = bound(node);
            // A NaN is no deviation that a bound allows.
            if deviation > bound || deviation.is_nan() {
                let (node, op) = (node.name.clone(), node.op.name());
                return Ok(Some(Stray { node, op, result, deviation, bound }));
            }
            reference.overwrite(out, bindings, &ours)?;
        }
    }
    Ok(None)
}

/// The root mean square of the difference as a share of that of `exact`.
fn deviation(ours: &[f32], exact: &[f32]) -> f64 {
    assert_eq!(ours.len(), exact.len());
    let square = |x: f64| x * x;
    let difference: f64 = ours.iter().zip(exact).map(|(a, b)| square(*a as f64 - *b as f64)).sum();
    let size: f64 = exact.iter().map(|x| square(*x as f64)).sum();
    if difference == 0.0 { 0.0 } else { (difference / size).sqrt() }
}
