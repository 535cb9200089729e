//! Shapes of activations. A graph is built once and its row counts are bound at run time, so a row
//! count is a symbol times a factor; columns are always known when the graph is built.

use super::DType;
use std::fmt;

/// A row count that may be known only at run time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rows {
    /// The same in every step.
    Fixed(usize),
    /// One row for each packed token of the step, T.
    Tokens,
    /// One row for each token whose logits are wanted, R.
    Outputs,
    /// So many rows for each image of the step.
    PerImage(usize),
    /// One row for each page-table entry of the step's sequences, end to end.
    TableEntries,
    /// One row for each page of the KV pool.
    Pages,
    /// One row for each position of the context.
    Context,
}

/// What the symbols of [`Rows`] stand for in one step, or at most in any step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bindings {
    /// T, packed token rows.
    pub tokens: usize,
    /// How many of them, the leading ones, are decode rows: see [`Rows::decode`].
    pub decode: usize,
    /// R, rows whose logits are computed.
    pub outputs: usize,
    /// How many of them, the leading ones, are decode rows.
    pub decode_outputs: usize,
    /// Images that pass through the vision graph together.
    pub images: usize,
    /// Page-table entries of all sequences of the step.
    pub table_entries: usize,
    /// Pages in the KV pool; the same in every step of a session.
    pub pages: usize,
    /// Positions of the context; the same in every step of a session.
    pub context: usize,
}

impl Rows {
    /// The row count under `bindings`.
    pub fn bind(self, bindings: &Bindings) -> usize {
        match self {
            Rows::Fixed(n) => n,
            Rows::Tokens => bindings.tokens,
            Rows::Outputs => bindings.outputs,
            Rows::PerImage(n) => n * bindings.images,
            Rows::TableEntries => bindings.table_entries,
            Rows::Pages => bindings.pages,
            Rows::Context => bindings.context,
        }
    }
}

impl Rows {
    /// How many of the rows, the leading ones, are decode rows. A device may have one family of kernels for
    /// them and another for prefill rows; then a row's bits depend on which it is, and on nothing else.
    pub fn decode(self, bindings: &Bindings) -> usize {
        match self {
            Rows::Tokens => bindings.decode,
            Rows::Outputs => bindings.decode_outputs,
            Rows::Fixed(_) | Rows::PerImage(_) | Rows::TableEntries | Rows::Pages | Rows::Context => 0,
        }
    }
}

impl fmt::Display for Rows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Rows::Fixed(n) => write!(f, "{n}"),
            Rows::Tokens => f.write_str("T"),
            Rows::Outputs => f.write_str("R"),
            Rows::PerImage(n) => write!(f, "{n}/image"),
            Rows::TableEntries => f.write_str("table entries"),
            Rows::Pages => f.write_str("pages"),
            Rows::Context => f.write_str("context"),
        }
    }
}

/// The type of an activation: `[rows, cols]` of `dtype`, row-major and dense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorType {
    /// How many rows.
    pub rows: Rows,
    /// How many columns.
    pub cols: usize,
    /// The element type.
    pub dtype: DType,
}

impl TensorType {
    /// `[rows, cols]` of f32: activations on the CPU; pixels, rotation tables and logits everywhere.
    pub const fn f32(rows: Rows, cols: usize) -> Self {
        TensorType { rows, cols, dtype: DType::F32 }
    }

    /// `[rows, cols]` of i32, the type of every index buffer.
    pub const fn i32(rows: Rows, cols: usize) -> Self {
        TensorType { rows, cols, dtype: DType::I32 }
    }

    /// Bytes under `bindings`.
    pub fn bytes(&self, bindings: &Bindings) -> usize {
        self.rows.bind(bindings) * self.cols * self.dtype.size()
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}, {}] {}", self.rows, self.cols, self.dtype)
    }
}

/// A dense `[rows, cols]` block of device memory. On the CPU the address is a host pointer; on a GPU
/// it is a device pointer that only kernels may follow.
#[derive(Clone, Copy, Debug)]
pub struct View {
    /// Where the block begins.
    pub addr: usize,
    /// Rows, bound.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// The element type.
    pub dtype: DType,
}

impl View {
    /// A view of nothing, to fill fixed arrays.
    pub const EMPTY: View = View { addr: 0, rows: 0, cols: 0, dtype: DType::F32 };

    /// How many elements.
    pub fn len(&self) -> usize {
        self.rows * self.cols
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many bytes.
    pub fn bytes(&self) -> usize {
        self.len() * self.dtype.size()
    }
}
