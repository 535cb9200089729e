//! The closed list of operations.
//!
//! An op is a value: which operation, with its constants. Its operands are activations (`ins`),
//! weights, and results (`outs`). [`Op::infer`] is the only place that knows how their shapes relate;
//! backends may assert what it says and decide nothing. [`Op::cost`] counts floating-point operations
//! and bytes once for every device, so that each roofline rests on the same arithmetic.
//!
//! A new op breaks the build exactly where work is due: every `match` on [`Op`] is exhaustive.

mod infer;

use crate::error::Result;
use crate::tensor::{DType, TensorType, View, Weight};
use infer::Check;
use std::ops::AddAssign;

/// Token positions in one page of the KV cache. Sixteen positions are one vector of scores on every
/// instruction set, and at 16 bits and 128 dims a page of one head is 4 KiB, whole sectors on a GPU.
pub const PAGE: usize = 16;

/// The activation function of a [`Op::Linear`]. LLaVA uses three that differ by up to 0.02; none of
/// them is called just "gelu".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// The identity.
    None,
    /// `x * sigmoid(1.702 x)`: CLIP's MLP.
    QuickGelu,
    /// `x/2 * (1 + erf(x / sqrt 2))`: the projector, and towers whose `hidden_act` is "gelu".
    GeluErf,
}

/// Most low-rank pairs of one op: eight adapters on q, k and v.
pub const MAX_PAIRS: usize = 24;

/// A low-rank pair beside one matrix of a linear op: `x · Wᵀ` becomes `x · Wᵀ + scale (x · Aᵀ) · Bᵀ`, with
/// A `[r, D]` and B `[N_i, r]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pair {
    /// Which of the op's matrices, i.
    pub matrix: usize,
    /// What x · Aᵀ is multiplied by.
    pub scale: f32,
}

/// What [`Op::SelectRows`] keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Select {
    /// The rows that an index operand `[R, 1] i32` names: the rows whose logits are wanted.
    Index,
    /// Every row: several layers of the tower are put side by side, class row included.
    All,
    /// All rows but the first of every image (its class row), of `rows` that an image has.
    Patches {
        /// Rows of one image, the class row included.
        rows: usize,
    },
}

/// One operation. Letters: T packed token rows of a step, R rows whose logits are wanted, D model
/// width, H query heads, K key/value heads, E head size, F feed-forward width, V vocabulary.
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    /// Pixels `[images, 3*S*S]` to patch embeddings `[images*(N+1), D]`: a convolution whose stride is
    /// its kernel, the class row in front, positions added. Weights: conv `[D, 3*P*P]`, class `[1, D]`,
    /// positions `[N+1, D]`.
    PatchEmbed {
        /// Side of the square image, S.
        image: usize,
        /// Side of a patch, P.
        patch: usize,
    },
    /// `(x - mean) / sqrt(var + eps) * gamma + beta` per row, statistics in f32.
    LayerNorm {
        /// Added to the variance.
        eps: f32,
    },
    /// `x / sqrt(mean(x^2) + eps) * gamma` per row, statistics in f32.
    RmsNorm {
        /// Added to the mean square.
        eps: f32,
    },
    /// `s = x + y`, and RmsNorm of `s`: two results.
    AddRmsNorm {
        /// Added to the mean square.
        eps: f32,
    },
    /// `act(x · Wᵀ + b) + residual` over one or more weights side by side (q, k and v).
    /// Weights: all matrices `[N_i, D]`, then, with `bias`, as many vectors `[1, N_i]`, then A and B of each
    /// pair.
    Linear {
        /// Applied before the residual is added.
        act: Activation,
        /// Whether each matrix has a bias.
        bias: bool,
        /// Whether a second operand `[T, ΣN_i]` is added to the result.
        residual: bool,
        /// Whether the result is f32 whatever the activations are: logits, which a sampler compares.
        wide: bool,
        /// What adapters add to the matrices, in the order of the matrices; at most [`MAX_PAIRS`].
        pairs: Vec<Pair>,
    },
    /// `silu(x·Wgᵀ + bg) ⊙ (x·Wuᵀ + bu)`. Weights: gate `[F, D]`, up `[F, D]`, with `bias` two vectors, then
    /// A and B of each pair.
    GatedLinear {
        /// Whether gate and up have a bias.
        bias: bool,
        /// As in [`Op::Linear`]; gate is matrix 0, up is 1.
        pairs: Vec<Pair>,
    },
    /// Attention within each image, over fused `[q | k | v]` rows `[images*rows, 3*H*E]`.
    Attention {
        /// H; there are as many key heads as query heads.
        heads: usize,
        /// E, a multiple of 8 up to 128.
        head_dim: usize,
        /// Rows that attend to each other.
        rows: usize,
        /// Whether a row sees only itself and earlier rows (CLIP's text tower).
        causal: bool,
    },
    /// Rotates q and k by position (half-split pairs), writes k and v to their KV slots, returns q.
    /// Operands: `[q | k | v]` `[T, (H+2K)*E]`, positions `[T, 1] i32`, slots `[T, 1] i32`
    /// (page * [`PAGE`] + offset), the rotation table `[context, E]` (cosines, then sines), K pages, V pages.
    RopeAppend {
        /// H.
        heads: usize,
        /// K.
        kv_heads: usize,
        /// E.
        head_dim: usize,
    },
    /// Causal attention over paged keys and values, for prefill chunks and decode alike.
    /// Operands: q `[T, H*E]`, positions `[T, 1] i32`, where each row's page table begins `[T, 1] i32`,
    /// the page tables of all sequences end to end `[entries, 1] i32`, K pages `[pages, K*E*PAGE]`,
    /// V pages `[pages, K*PAGE*E]`. Consecutive rows of one sequence have consecutive positions.
    PagedAttention {
        /// H.
        heads: usize,
        /// K; query head h reads key head h / (H / K).
        kv_heads: usize,
        /// E, a multiple of 8 up to 128.
        head_dim: usize,
    },
    /// Rows of the embedding table, or rows of encoded images. Operands: token ids `[T, 1] i32`, sources
    /// `[T, 1] i32` (a row of the third operand, or -1 for the token's own embedding), image rows
    /// `[any, D]`. Weight: the table `[V, D]`. LLaVA-NeXT's rows are gathered by it too, from projected
    /// tiles and a table of one row, the newline.
    EmbedRows,
    /// Rows of the embedding table with positions added: the entrance of CLIP's text tower. Operand: token
    /// ids `[texts*P, 1] i32`. Weights: the table `[V, D]`, positions `[P, D]`.
    EmbedTokens,
    /// Rows of one or more operands, put side by side.
    SelectRows {
        /// Which rows.
        select: Select,
    },
    /// The next token of every row. Operands: logits `[R, V]`, parameters `[R, SAMPLE_PARAMS] i32`
    /// (a [`SampleParams`] per row), ids already seen `[R, ⌈V/32⌉] i32` (a bit set). Result `[R, 1] i32`.
    Sample,
    /// `x / |x|` per row.
    L2Normalize,
}

/// How one row of logits becomes a token: the parameter block of [`Op::Sample`], as a device reads it.
/// Steps are applied in Hugging Face's order: repetition penalty, temperature, top-k, top-p, min-p.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct SampleParams {
    /// Divides the logits; 0 means greedy: the largest logit, the lowest id among equals.
    pub temperature: f32,
    /// Keep the k largest (ties with the k-th survive); 0 keeps all.
    pub top_k: u32,
    /// Keep the most probable tokens until their sum reaches this; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens less probable than this fraction of the most probable; 0 keeps all.
    pub min_p: f32,
    /// Positive logits of seen ids are divided by this, negative ones multiplied; 1 changes nothing.
    pub repetition_penalty: f32,
    /// Low half of the seed.
    pub seed_low: u32,
    /// High half of the seed.
    pub seed_high: u32,
    /// The position of the token being chosen: the random number is a function of (seed, position).
    pub position: u32,
}

/// Columns of the parameter operand of [`Op::Sample`].
pub const SAMPLE_PARAMS: usize = std::mem::size_of::<SampleParams>() / 4;

/// The shape of a weight operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WeightType {
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// How elements are stored.
    pub dtype: DType,
}

impl From<&Weight> for WeightType {
    fn from(weight: &Weight) -> Self {
        WeightType { rows: weight.rows, cols: weight.cols, dtype: weight.dtype }
    }
}

impl WeightType {
    /// How many elements.
    #[allow(clippy::len_without_is_empty, reason = "no weight is empty")]
    pub fn len(&self) -> usize {
        self.rows * self.cols
    }

    /// Bytes of the weight.
    pub fn bytes(&self) -> usize {
        self.len() * self.dtype.size()
    }
}

/// What one execution of an op does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Floating-point operations; a multiply-add is two.
    pub flops: u64,
    /// Bytes that must move: weights and operands read once, results written once.
    pub bytes: u64,
    /// Those of them that are weights, keys and values: they are where the last step left them, while the rest
    /// was made just before or is used just after.
    pub stored: u64,
}

impl AddAssign for Cost {
    fn add_assign(&mut self, more: Cost) {
        *self = Cost {
            flops: self.flops + more.flops,
            bytes: self.bytes + more.bytes,
            stored: self.stored + more.stored,
        };
    }
}

/// At most two results.
pub type Outs = Vec<TensorType>;

impl Op {
    /// The op's name, the same in every room of the house.
    pub const fn name(&self) -> &'static str {
        match self {
            Op::PatchEmbed { .. } => "PatchEmbed",
            Op::LayerNorm { .. } => "LayerNorm",
            Op::RmsNorm { .. } => "RmsNorm",
            Op::AddRmsNorm { .. } => "AddRmsNorm",
            Op::Linear { .. } => "Linear",
            Op::GatedLinear { .. } => "GatedLinear",
            Op::Attention { .. } => "Attention",
            Op::RopeAppend { .. } => "RopeAppend",
            Op::PagedAttention { .. } => "PagedAttention",
            Op::EmbedRows => "EmbedRows",
            Op::EmbedTokens => "EmbedTokens",
            Op::SelectRows { .. } => "SelectRows",
            Op::Sample => "Sample",
            Op::L2Normalize => "L2Normalize",
        }
    }

    /// A [`Op::Linear`] without pairs, whose result is an activation.
    pub const fn linear(act: Activation, bias: bool, residual: bool) -> Op {
        Op::Linear { act, bias, residual, wide: false, pairs: Vec::new() }
    }

    /// The low-rank pairs of a linear op; no other op has any.
    pub fn pairs(&self) -> &[Pair] {
        match self {
            Op::Linear { pairs, .. } | Op::GatedLinear { pairs, .. } => pairs,
            Op::PatchEmbed { .. }
            | Op::LayerNorm { .. }
            | Op::RmsNorm { .. }
            | Op::AddRmsNorm { .. }
            | Op::Attention { .. }
            | Op::RopeAppend { .. }
            | Op::PagedAttention { .. }
            | Op::EmbedRows
            | Op::EmbedTokens
            | Op::SelectRows { .. }
            | Op::Sample
            | Op::L2Normalize => &[],
        }
    }

    /// Of the `weights` of a linear op: how many are matrices, and how many come before its first pair.
    pub fn matrices(weights: usize, bias: bool, pairs: &[Pair]) -> (usize, usize) {
        let own = weights.saturating_sub(2 * pairs.len());
        (if bias { own / 2 } else { own }, own)
    }

    /// The types of the results, or why the operands do not fit: the only shape authority. Activations,
    /// KV pages among them, are of dtype `float`, which is the device's. Whatever the device, pixels,
    /// rotation tables and logits are f32, and indices i32.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) naming `node`, what was expected and what was given.
    pub fn infer(
        &self,
        node: &str,
        float: DType,
        ins: &[TensorType],
        weights: &[WeightType],
    ) -> Result<Outs> {
        Check { op: self, node, float, ins, weights }.infer()
    }

    /// FLOPs and bytes of one execution on bound shapes. `kv_rows` is the number of key rows that the
    /// token rows of the step see in total (for a single sequence at position p: p + 1 for each row);
    /// only [`Op::PagedAttention`] reads it, and its bytes assume that a sequence's pages are read once.
    pub fn cost(&self, ins: &[View], weights: &[WeightType], outs: &[View], kv: KvExtent) -> Cost {
        if ins[0].rows == 0 {
            // Of no rows nothing is computed, and no weight is read.
            return Cost::default();
        }
        let flops = match self {
            // The class row of every image is copied, not multiplied.
            Op::PatchEmbed { .. } => 2 * (outs[0].rows - ins[0].rows) * weights[0].len(),
            Op::Linear { bias, pairs, .. } | Op::GatedLinear { bias, pairs } => {
                let (matrices, own) = Op::matrices(weights.len(), *bias, pairs);
                let multiplied = weights[..matrices].iter().chain(&weights[own..]);
                2 * ins[0].rows * multiplied.map(WeightType::len).sum::<usize>()
            }
            Op::Attention { heads, head_dim, rows, causal } => {
                let images = ins[0].rows / rows;
                let pairs = if *causal { rows * (rows + 1) / 2 } else { rows * rows };
                4 * images * heads * head_dim * pairs
            }
            Op::PagedAttention { heads, head_dim, .. } => 4 * heads * head_dim * kv.pairs,
            Op::LayerNorm { .. } => 8 * ins[0].len(),
            Op::RmsNorm { .. } | Op::L2Normalize => 4 * ins[0].len(),
            Op::AddRmsNorm { .. } => 5 * ins[0].len(),
            Op::RopeAppend { heads, kv_heads, head_dim } => 3 * ins[0].rows * (heads + kv_heads) * head_dim,
            Op::EmbedTokens => outs[0].len(),
            Op::EmbedRows | Op::SelectRows { .. } => 0,
            Op::Sample => 4 * ins[0].len(),
        };
        let all = |views: &[View]| views.iter().map(View::bytes).sum::<usize>();
        // What is not an operand: rows of a table, weights, pages of keys and values.
        let table_rows = || ins[0].rows * weights[0].cols * weights[0].dtype.size();
        let (stored, passing) = match self {
            // Only the rows that are looked up move.
            Op::EmbedRows => (table_rows(), outs[0].bytes()),
            Op::EmbedTokens => (table_rows() + weights[1].bytes(), outs[0].bytes()),
            Op::SelectRows { .. } => (0, 2 * outs[0].bytes()),
            // k and v go to their slots; the rotation table is read at one row a position.
            Op::RopeAppend { kv_heads, head_dim, .. } => {
                let row = head_dim * (2 * kv_heads * ins[4].dtype.size() + ins[3].dtype.size());
                (ins[0].rows * row, ins[0].bytes() + outs[0].bytes())
            }
            Op::PagedAttention { kv_heads, head_dim, .. } => {
                (2 * kv.rows * kv_heads * head_dim * ins[4].dtype.size(), ins[0].bytes() + outs[0].bytes())
            }
            Op::PatchEmbed { .. }
            | Op::LayerNorm { .. }
            | Op::RmsNorm { .. }
            | Op::AddRmsNorm { .. }
            | Op::Linear { .. }
            | Op::GatedLinear { .. }
            | Op::Attention { .. }
            | Op::Sample
            | Op::L2Normalize => (weights.iter().map(WeightType::bytes).sum(), all(ins) + all(outs)),
        };
        Cost { flops: flops as u64, bytes: (stored + passing) as u64, stored: stored as u64 }
    }
}

/// How much of the KV cache a step touches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KvExtent {
    /// Query-key pairs: the sum over token rows of the keys each one sees.
    pub pairs: usize,
    /// Cached positions read: the sum over sequences of their length after the step.
    pub rows: usize,
}

impl KvExtent {
    /// One sequence that advances by `tokens` rows from `past` cached positions.
    pub fn of(past: usize, tokens: usize) -> Self {
        KvExtent { pairs: tokens * past + tokens * (tokens + 1) / 2, rows: past + tokens }
    }
}

impl AddAssign for KvExtent {
    /// Another sequence of the same step.
    fn add_assign(&mut self, more: KvExtent) {
        *self = KvExtent { pairs: self.pairs + more.pairs, rows: self.rows + more.rows };
    }
}
