//! The shape rules, one arm for each op: what operands must look like, and what comes out.

use super::{MAX_PAIRS, Op, Outs, PAGE, Pair, SAMPLE_PARAMS, Select, WeightType};
use crate::error::{Error, Result};
use crate::tensor::{DType, Rows, TensorType};

/// The operands of one `infer`, so that each rule reads as a sentence.
pub(super) struct Check<'a> {
    pub op: &'a Op,
    pub node: &'a str,
    pub float: DType,
    pub ins: &'a [TensorType],
    pub weights: &'a [WeightType],
}

impl Check<'_> {
    /// The types of the results.
    pub fn infer(&self) -> Result<Outs> {
        match *self.op {
            Op::PatchEmbed { image, patch } => {
                self.count(1, 3)?;
                self.ensure(patch > 0 && image >= patch, "an image at least as large as a patch", || {
                    format!("image {image}, patch {patch}")
                })?;
                let (grid, width) = (image / patch, self.weights[0].rows);
                self.typed(0, TensorType::f32(self.ins[0].rows, 3 * image * image))?;
                self.weight(0, width, 3 * patch * patch)?;
                self.weight(1, 1, width)?;
                self.weight(2, grid * grid + 1, width)?;
                Ok(vec![self.float(Rows::PerImage(grid * grid + 1), width)])
            }
            Op::LayerNorm { .. } => {
                self.count(1, 2)?;
                self.activation(0)?;
                self.weight(0, 1, self.ins[0].cols)?;
                self.weight(1, 1, self.ins[0].cols)?;
                Ok(vec![self.ins[0]])
            }
            Op::RmsNorm { .. } => {
                self.count(1, 1)?;
                self.activation(0)?;
                self.weight(0, 1, self.ins[0].cols)?;
                Ok(vec![self.ins[0]])
            }
            Op::AddRmsNorm { .. } => {
                self.count(2, 1)?;
                self.activation(0)?;
                self.input(1, self.ins[0].rows, self.ins[0].cols)?;
                self.weight(0, 1, self.ins[0].cols)?;
                Ok(vec![self.ins[0], self.ins[0]])
            }
            Op::Linear { bias, residual, wide, ref pairs, .. } => {
                let matrices = self.matrices(bias, 1 + residual as usize, pairs)?;
                let (rows, cols) = (self.ins[0].rows, matrices.iter().map(|w| w.rows).sum());
                if residual {
                    self.input(1, rows, cols)?;
                }
                Ok(vec![if wide { TensorType::f32(rows, cols) } else { self.float(rows, cols) }])
            }
            Op::GatedLinear { bias, ref pairs } => {
                let matrices = self.matrices(bias, 1, pairs)?;
                self.ensure(matrices.len() == 2, "two matrices", || matrices.len().to_string())?;
                self.weight(1, matrices[0].rows, matrices[0].cols)?;
                Ok(vec![self.float(self.ins[0].rows, matrices[0].rows)])
            }
            Op::Attention { heads, head_dim, rows, .. } => {
                self.count(1, 0)?;
                self.head_dim(head_dim)?;
                self.input(0, self.ins[0].rows, 3 * heads * head_dim)?;
                let whole = match self.ins[0].rows {
                    Rows::PerImage(n) | Rows::Fixed(n) => n == rows,
                    Rows::Tokens | Rows::Outputs | Rows::TableEntries | Rows::Pages | Rows::Context => false,
                };
                self.ensure(whole, &format!("{rows} rows an image"), || self.ins[0].to_string())?;
                Ok(vec![self.float(self.ins[0].rows, heads * head_dim)])
            }
            Op::RopeAppend { heads, kv_heads, head_dim } => {
                self.count(6, 0)?;
                self.grouped(heads, kv_heads, head_dim)?;
                let rows = self.ins[0].rows;
                self.input(0, rows, (heads + 2 * kv_heads) * head_dim)?;
                self.typed(1, TensorType::i32(rows, 1))?;
                self.typed(2, TensorType::i32(rows, 1))?;
                self.typed(3, TensorType::f32(Rows::Context, head_dim))?;
                self.pages(4, kv_heads, head_dim)?;
                Ok(vec![self.float(rows, heads * head_dim)])
            }
            Op::PagedAttention { heads, kv_heads, head_dim } => {
                self.count(6, 0)?;
                self.grouped(heads, kv_heads, head_dim)?;
                let rows = self.ins[0].rows;
                self.input(0, rows, heads * head_dim)?;
                self.typed(1, TensorType::i32(rows, 1))?;
                self.typed(2, TensorType::i32(rows, 1))?;
                self.typed(3, TensorType::i32(Rows::TableEntries, 1))?;
                self.pages(4, kv_heads, head_dim)?;
                Ok(vec![self.ins[0]])
            }
            Op::EmbedRows => {
                self.count(3, 1)?;
                let rows = self.ins[0].rows;
                self.typed(0, TensorType::i32(rows, 1))?;
                self.typed(1, TensorType::i32(rows, 1))?;
                self.input(2, self.ins[2].rows, self.weights[0].cols)?;
                Ok(vec![TensorType { rows, ..self.ins[2] }])
            }
            Op::EmbedTokens => {
                self.count(1, 2)?;
                let (positions, cols) = (self.weights[1].rows, self.weights[0].cols);
                let rows = Rows::PerImage(positions);
                self.typed(0, TensorType::i32(rows, 1))?;
                self.weight(1, positions, cols)?;
                Ok(vec![self.float(rows, cols)])
            }
            Op::SelectRows { select } => self.select(select),
            Op::Sample => {
                self.count(3, 0)?;
                let TensorType { rows, cols, .. } = self.ins[0];
                self.typed(0, TensorType::f32(rows, cols))?;
                self.typed(1, TensorType::i32(rows, SAMPLE_PARAMS))?;
                self.typed(2, TensorType::i32(rows, cols.div_ceil(32)))?;
                Ok(vec![TensorType::i32(rows, 1)])
            }
            Op::L2Normalize => {
                self.count(1, 0)?;
                self.activation(0)?;
                Ok(vec![self.ins[0]])
            }
        }
    }

    fn select(&self, select: Select) -> Result<Outs> {
        match select {
            Select::Index => {
                self.count(2, 0)?;
                self.activation(0)?;
                self.typed(1, TensorType::i32(self.ins[1].rows, 1))?;
                Ok(vec![TensorType { rows: self.ins[1].rows, ..self.ins[0] }])
            }
            Select::All | Select::Patches { .. } => {
                self.ensure(!self.ins.is_empty(), "at least one operand", || "none".into())?;
                for i in 0..self.ins.len() {
                    self.input(i, self.ins[0].rows, self.ins[i].cols)?;
                }
                let cols = self.ins.iter().map(|t| t.cols).sum();
                let rows = match select {
                    Select::Patches { rows } => {
                        self.input(0, Rows::PerImage(rows), self.ins[0].cols)?;
                        self.ensure(rows > 1, "a class row and patches", || rows.to_string())?;
                        Rows::PerImage(rows - 1)
                    }
                    Select::All | Select::Index => self.ins[0].rows,
                };
                Ok(vec![TensorType { rows, cols, ..self.ins[0] }])
            }
        }
    }

    /// The matrices of a linear op, after checking them, their biases and their pairs.
    fn matrices(&self, bias: bool, ins: usize, pairs: &[Pair]) -> Result<&[WeightType]> {
        let (n, own) = Op::matrices(self.weights.len(), bias, pairs);
        self.ensure(n > 0, "at least one matrix", || format!("{} weights", self.weights.len()))?;
        self.count(ins, if bias { 2 * n } else { n } + 2 * pairs.len())?;
        self.activation(0)?;
        let matrices = &self.weights[..n];
        for (i, matrix) in matrices.iter().enumerate() {
            self.weight(i, matrix.rows, self.ins[0].cols)?;
            if bias {
                self.weight(n + i, 1, matrix.rows)?;
            }
        }
        self.ensure(pairs.len() <= MAX_PAIRS, &format!("at most {MAX_PAIRS} low-rank pairs"), || {
            pairs.len().to_string()
        })?;
        let ordered = pairs.is_sorted_by_key(|pair| pair.matrix) && pairs.iter().all(|p| p.matrix < n);
        self.ensure(ordered, &format!("pairs in the order of {n} matrices"), || format!("{pairs:?}"))?;
        for (p, pair) in pairs.iter().enumerate() {
            let rank = self.weights[own + 2 * p].rows;
            self.ensure(rank > 0, "a rank of at least 1", || rank.to_string())?;
            self.weight(own + 2 * p, rank, self.ins[0].cols)?;
            self.weight(own + 2 * p + 1, matrices[pair.matrix].rows, rank)?;
        }
        Ok(matrices)
    }

    /// The type of an activation.
    fn float(&self, rows: Rows, cols: usize) -> TensorType {
        TensorType { rows, cols, dtype: self.float }
    }

    fn count(&self, ins: usize, weights: usize) -> Result<()> {
        self.ensure(
            self.ins.len() == ins && self.weights.len() == weights,
            &format!("{ins} operands and {weights} weights"),
            || format!("{} and {}", self.ins.len(), self.weights.len()),
        )
    }

    /// Operand `i` is an activation of any shape.
    fn activation(&self, i: usize) -> Result<()> {
        self.input(i, self.ins[i].rows, self.ins[i].cols)
    }

    /// Operand `i` is an activation of this shape.
    fn input(&self, i: usize, rows: Rows, cols: usize) -> Result<()> {
        self.typed(i, self.float(rows, cols))
    }

    fn typed(&self, i: usize, want: TensorType) -> Result<()> {
        let found = self.ins[i];
        self.ensure(found == want, &format!("operand {i} {want}"), || found.to_string())
    }

    fn pages(&self, i: usize, kv_heads: usize, head_dim: usize) -> Result<()> {
        for i in [i, i + 1] {
            self.input(i, Rows::Pages, kv_heads * head_dim * PAGE)?;
        }
        Ok(())
    }

    fn weight(&self, i: usize, rows: usize, cols: usize) -> Result<()> {
        let found = self.weights[i];
        self.ensure(
            found.rows == rows && found.cols == cols && found.dtype != DType::I32,
            &format!("weight {i} [{rows}, {cols}]"),
            || format!("[{}, {}] {}", found.rows, found.cols, found.dtype),
        )
    }

    fn head_dim(&self, head_dim: usize) -> Result<()> {
        let ok = head_dim > 0 && head_dim <= 128 && head_dim.is_multiple_of(8);
        self.ensure(ok, "a head size that is a multiple of 8 up to 128", || head_dim.to_string())
    }

    fn grouped(&self, heads: usize, kv_heads: usize, head_dim: usize) -> Result<()> {
        self.head_dim(head_dim)?;
        let ok = kv_heads > 0 && heads > 0 && heads.is_multiple_of(kv_heads);
        self.ensure(ok, "query heads that are a multiple of the key heads", || {
            format!("{heads} and {kv_heads}")
        })
    }

    fn ensure(&self, ok: bool, expected: &str, found: impl FnOnce() -> String) -> Result<()> {
        if ok {
            return Ok(());
        }
        Err(Error::Shape {
            op: self.op.name(),
            node: self.node.into(),
            expected: expected.into(),
            found: found(),
        })
    }
}
