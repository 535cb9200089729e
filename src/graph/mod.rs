//! Graphs: a flat list of nodes in execution order, built once per model part.
//!
//! There are no passes and no rewriting: fusion is a choice of op that the model's author made, and
//! it can be read in `model/`. Row counts are symbols bound at run time ([`Bindings`]), so the same
//! nodes at the same arena offsets serve a prefill chunk and a decode step, and a step allocates nothing.

mod control;
pub mod diff;
mod exec;
mod plan;
mod watch;

pub use control::Control;
pub use exec::Executor;
pub use plan::Plan;
pub use watch::{Span, Timing};

use crate::backend::{Backend, Prepared};
use crate::error::Result;
use crate::op::{Cost, KvExtent, Op, WeightType};
use crate::tensor::{Bindings, Rows, TensorType, Weight};
use std::collections::HashSet;
use std::fmt;
use std::ops::Range;

/// A value of a graph: an input, a state or a node's result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ValueId(pub(crate) usize);

/// Where a value comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Written by the host before a step.
    Input,
    /// Memory that outlives the step, bound when the executor is made: KV pages, rotation tables.
    State,
    /// The result of a node, by its position in the list.
    Node(usize),
}

/// What is known of a value when the graph is built.
#[derive(Clone, Debug)]
pub struct Value {
    /// A name for listings: the input's, or the node's.
    pub name: String,
    /// Rows, columns, element type.
    pub ty: TensorType,
    /// Where it comes from.
    pub source: Source,
    /// Whether it is still wanted when the graph has run.
    pub kept: bool,
}

/// One op with its operands.
#[derive(Debug)]
pub struct Node {
    /// What the model's author called it, as `layers.3.attention.qkv`.
    pub name: String,
    /// The operation.
    pub op: Op,
    /// Activations, in the op's order.
    pub ins: Vec<ValueId>,
    /// Weights, as positions in [`Graph::weights`].
    pub weights: Vec<usize>,
    /// Results, in the op's order.
    pub outs: Vec<ValueId>,
}

/// A model part, ready to be planned and run. Immutable and shared once built.
#[derive(Debug, Default)]
pub struct Graph {
    /// In execution order.
    pub nodes: Vec<Node>,
    /// Inputs, states and results.
    pub values: Vec<Value>,
    /// Weights as the device holds them.
    pub weights: Vec<Prepared>,
}

impl Graph {
    /// The types of a node's weights.
    pub fn weight_types(&self, node: &Node) -> Vec<WeightType> {
        node.weights.iter().map(|&w| self.weights[w].ty).collect()
    }

    /// Bytes that all weights take on the device, one that serves two ops once.
    pub fn weight_bytes(&self) -> u64 {
        let mut seen = HashSet::new();
        self.weights.iter().filter(|w| seen.insert(w.addr)).map(|w| w.bytes as u64).sum()
    }

    /// The type of a value.
    pub fn ty(&self, value: ValueId) -> TensorType {
        self.values[value.0].ty
    }

    /// The value itself.
    pub fn value(&self, value: ValueId) -> &Value {
        &self.values[value.0]
    }

    /// Keeps a value's memory from being reused, so that it can be read when the graph has run.
    pub fn keep(&mut self, value: ValueId) {
        self.values[value.0].kept = true;
    }
}

/// Builds a [`Graph`] node by node; every node's shapes are checked as it is added.
pub struct GraphBuilder<'a> {
    backend: &'a dyn Backend,
    graph: Graph,
    scope: String,
}

impl<'a> GraphBuilder<'a> {
    /// An empty graph whose weights will live on `backend`.
    pub fn new(backend: &'a dyn Backend) -> Self {
        GraphBuilder { backend, graph: Graph::default(), scope: String::new() }
    }

    /// The prefix of the names of the nodes that follow, as `layers.3.`.
    pub fn scope(&mut self, scope: impl fmt::Display) {
        self.scope = scope.to_string();
    }

    /// The type of an activation `[rows, cols]` on this backend.
    pub fn float(&self, rows: Rows, cols: usize) -> TensorType {
        TensorType { rows, cols, dtype: self.backend.dtype() }
    }

    /// A value that the host writes before each step.
    pub fn input(&mut self, name: &str, ty: TensorType) -> ValueId {
        self.value(name.into(), ty, Source::Input)
    }

    /// A value in memory that outlives the step.
    pub fn state(&mut self, name: String, ty: TensorType) -> ValueId {
        self.value(name, ty, Source::State)
    }

    /// Adds a node with one result.
    ///
    /// # Errors
    /// What [`Op::infer`] or the backend say.
    pub fn push(&mut self, name: &str, op: Op, ins: &[ValueId], weights: &[Weight]) -> Result<ValueId> {
        Ok(self.push_all(name, op, ins, weights)?[0])
    }

    /// Adds a node and returns all its results.
    ///
    /// # Errors
    /// What [`Op::infer`] or the backend say.
    pub fn push_all(
        &mut self,
        name: &str,
        op: Op,
        ins: &[ValueId],
        weights: &[Weight],
    ) -> Result<Vec<ValueId>> {
        let name = format!("{}{name}", self.scope);
        let in_types: Vec<_> = ins.iter().map(|&v| self.graph.ty(v)).collect();
        let weight_types: Vec<_> = weights.iter().map(WeightType::from).collect();
        let types = op.infer(&name, self.backend.dtype(), &in_types, &weight_types)?;

        let first = self.graph.weights.len();
        self.graph.weights.extend(self.backend.prepare(&op, weights)?);
        let node = self.graph.nodes.len();
        let outs: Vec<_> =
            types.into_iter().map(|ty| self.value(name.clone(), ty, Source::Node(node))).collect();
        let weights = (first..self.graph.weights.len()).collect();
        self.graph.nodes.push(Node { name, op, ins: ins.to_vec(), weights, outs: outs.clone() });
        Ok(outs)
    }

    /// Marks a value as wanted after the graph has run.
    pub fn keep(&mut self, value: ValueId) {
        self.graph.keep(value);
    }

    /// The type of a value.
    pub fn ty(&self, value: ValueId) -> TensorType {
        self.graph.ty(value)
    }

    /// Nodes so far.
    #[allow(clippy::len_without_is_empty, reason = "a position in the list, not a container's size")]
    pub fn len(&self) -> usize {
        self.graph.nodes.len()
    }

    /// The finished graph.
    pub fn finish(self) -> Graph {
        self.graph
    }

    fn value(&mut self, name: String, ty: TensorType, source: Source) -> ValueId {
        // Inputs are kept: the host may write them long before, or once for many steps.
        let kept = source == Source::Input;
        self.graph.values.push(Value { name, ty, source, kept });
        ValueId(self.graph.values.len() - 1)
    }
}

/// What a node does under given row counts, for listings and rooflines.
pub struct NodeShape {
    /// Bound shapes of the activations.
    pub ins: Vec<crate::tensor::View>,
    /// Bound shapes of the results.
    pub outs: Vec<crate::tensor::View>,
}

impl Graph {
    /// The bound shapes of a node's operands; addresses are zero.
    pub fn shapes(&self, node: &Node, bindings: &Bindings) -> NodeShape {
        let bind = |&v: &ValueId| {
            let ty = self.ty(v);
            crate::tensor::View { addr: 0, rows: ty.rows.bind(bindings), cols: ty.cols, dtype: ty.dtype }
        };
        NodeShape { ins: node.ins.iter().map(bind).collect(), outs: node.outs.iter().map(bind).collect() }
    }

    /// What some of the nodes do on bound shapes.
    pub fn cost(&self, nodes: Range<usize>, bindings: &Bindings, kv: KvExtent) -> Cost {
        let mut sum = Cost::default();
        for node in &self.nodes[nodes] {
            let shapes = self.shapes(node, bindings);
            sum += node.op.cost(&shapes.ins, &self.weight_types(node), &shapes.outs, kv);
        }
        sum
    }
}
