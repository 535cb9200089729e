//! The planner: lays every input and every intermediate of a graph into one arena by lifetime.
//!
//! A value lives from the node that makes it to the last node that reads it; kept values live to the
//! end. Index inputs, which differ from step to step, come first, side by side, so that one copy brings them all;
//! then values are placed largest first, each at the lowest offset that is free for its whole life.
//! One more block, as large as the hungriest op asks for, is the workspace of all.

use super::{Graph, Source, ValueId};
use crate::backend::Backend;
use crate::tensor::{Bindings, DType};
use std::cmp::Reverse;

/// Alignment of every block: what a GPU's allocator promises and its widest copies ask for; four cache lines.
const ALIGN: usize = 256;

/// Where everything lies. Offsets are for the largest step; smaller steps use a prefix of each block.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The offset of each value in the arena; `None` for states, which live elsewhere.
    pub offsets: Vec<Option<usize>>,
    /// Bytes at the beginning of the arena that hold index inputs, in the graph's order, and nothing else.
    pub indices: usize,
    /// The offset of the workspace.
    pub workspace: usize,
    /// Bytes of the arena.
    pub bytes: usize,
    /// The largest step that fits.
    pub max: Bindings,
}

/// A block to be placed: when it lives (first and last node, inclusive) and how long it is.
struct Block {
    value: usize,
    first: usize,
    last: usize,
    bytes: usize,
}

impl Plan {
    /// Plans `graph` for steps up to `max`.
    pub fn new(graph: &Graph, backend: &dyn Backend, max: Bindings) -> Plan {
        let mut blocks = lifetimes(graph, &max);
        let index = |b: &Block| {
            let value = &graph.values[b.value];
            value.source == Source::Input && value.ty.dtype == DType::I32
        };
        let indices = blocks.iter().filter(|b| index(b)).map(|b| b.bytes).sum();
        blocks.sort_by_key(|b| match index(b) {
            true => (false, Reverse(0), b.value),
            false => (true, Reverse(b.bytes), b.value),
        });

        let mut offsets = vec![None; graph.values.len()];
        let mut placed: Vec<(usize, &Block)> = Vec::with_capacity(blocks.len());
        let mut end = 0;
        for block in &blocks {
            let offset = lowest_free(&placed, block);
            offsets[block.value] = Some(offset);
            end = end.max(offset + block.bytes);
            let at = placed.partition_point(|(o, _)| *o <= offset);
            placed.insert(at, (offset, block));
        }

        let workspace = graph
            .nodes
            .iter()
            .map(|node| {
                let shape = graph.shapes(node, &max);
                backend.workspace(&node.op, &shape.ins, &graph.weight_types(node), &shape.outs)
            })
            .max()
            .unwrap_or(0);
        Plan { offsets, indices, workspace: end, bytes: end + workspace.next_multiple_of(ALIGN), max }
    }
}

impl Plan {
    /// The offset of a value in the arena; `None` for a state.
    pub fn offset(&self, value: ValueId) -> Option<usize> {
        self.offsets[value.0]
    }
}

fn lifetimes(graph: &Graph, max: &Bindings) -> Vec<Block> {
    let end = graph.nodes.len();
    let mut blocks = Vec::new();
    for (value, info) in graph.values.iter().enumerate() {
        let first = match info.source {
            Source::State => continue,
            Source::Input => 0,
            Source::Node(node) => node,
        };
        let bytes = info.ty.bytes(max).next_multiple_of(ALIGN);
        let last = if info.kept { end } else { first };
        blocks.push(Block { value, first, last, bytes });
    }
    let mut at = vec![usize::MAX; graph.values.len()];
    for (i, block) in blocks.iter().enumerate() {
        at[block.value] = i;
    }
    for (n, node) in graph.nodes.iter().enumerate() {
        for value in &node.ins {
            if let Some(block) = blocks.get_mut(at[value.0]) {
                block.last = block.last.max(n);
            }
        }
    }
    blocks
}

/// The lowest offset at which `block` meets no placed block that lives at the same time.
/// `placed` is ordered by offset.
fn lowest_free(placed: &[(usize, &Block)], block: &Block) -> usize {
    let mut offset = 0;
    for (start, other) in placed {
        if other.first > block.last || other.last < block.first {
            continue;
        }
        if offset + block.bytes <= *start {
            break;
        }
        offset = offset.max(start + other.bytes);
    }
    offset
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::CpuBackend;
    use crate::graph::GraphBuilder;
    use crate::op::Op;
    use crate::tensor::{Rows, TensorType};
    use proptest::prelude::*;

    /// A graph of sums of random earlier values, some of them kept.
    fn random_graph(backend: &CpuBackend, choices: &[(usize, usize, bool)]) -> Graph {
        let mut b = GraphBuilder::new(backend);
        let ty = TensorType::f32(Rows::Tokens, 24);
        let mut values = vec![b.input("a", ty), b.input("b", ty)];
        for &(x, y, keep) in choices {
            let select = Op::SelectRows { select: crate::op::Select::All };
            let ins = [values[x % values.len()], values[y % values.len()]];
            // Widths differ from node to node, so that blocks of different sizes must be fitted.
            let op = if x % 3 == 0 { Op::L2Normalize } else { select };
            let ins = if op == Op::L2Normalize { &ins[..1] } else { &ins[..] };
            let out = b.push("node", op, ins, &[]).unwrap();
            if keep {
                b.keep(out);
            }
            if b.ty(out).cols < 2000 {
                values.push(out);
            }
        }
        b.finish()
    }

    /// Values that live at the same time lie apart, and the arena is no larger than all of them.
    #[test]
    fn what_lives_together_lies_apart() {
        let backend = CpuBackend::new(Some(1)).unwrap();
        let choice = (0..64usize, 0..64usize, prop::bool::weighted(0.1));
        proptest!(|(choices in prop::collection::vec(choice, 1..40), tokens in 1..9usize)| {
            let graph = random_graph(&backend, &choices);
            let max = Bindings { tokens, ..Bindings::default() };
            let plan = Plan::new(&graph, &backend, max);
            let blocks = lifetimes(&graph, &max);
            let mut sum = 0;
            for (i, a) in blocks.iter().enumerate() {
                let start = plan.offsets[a.value].unwrap();
                sum += a.bytes;
                prop_assert!(start.is_multiple_of(ALIGN) && start + a.bytes <= plan.workspace);
                for b in &blocks[..i] {
                    let other = plan.offsets[b.value].unwrap();
                    let apart_in_time = a.first > b.last || b.first > a.last;
                    let apart = start + a.bytes <= other || other + b.bytes <= start;
                    prop_assert!(apart_in_time || apart, "values {} and {}", a.value, b.value);
                }
            }
            prop_assert!(plan.workspace <= sum);
        });
    }

    /// A long chain needs two blocks, not one for each node.
    #[test]
    fn memory_is_used_again() {
        let backend = CpuBackend::new(Some(1)).unwrap();
        let mut b = GraphBuilder::new(&backend);
        let mut x = b.input("x", TensorType::f32(Rows::Tokens, 16));
        for _ in 0..50 {
            x = b.push("node", Op::L2Normalize, &[x], &[]).unwrap();
        }
        let max = Bindings { tokens: 4, ..Bindings::default() };
        let plan = Plan::new(&b.finish(), &backend, max);
        assert_eq!(plan.workspace, 3 * 4 * 16 * 4, "the input, which is kept, and two in turn");
    }
}
