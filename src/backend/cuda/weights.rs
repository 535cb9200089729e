//! How weights lie on a CUDA device.
//!
//! The matrices of a Linear are one matrix `[ΣN, ldw]` of the device's dtype, rows end to end; those of a
//! GatedLinear too, rows g0, u0, g1, u1 and so on, so that gate and up of a feature meet in one thread's
//! accumulators. ldw is K rounded up to 8 (16 bytes), filled with zeros. Biases are f32, in the order of the rows.
//! Low-rank pairs are more columns: behind the K of W stand those of scale · B, zeros in the rows of matrices that a
//! pair does not belong to; A of all pairs are one matrix, rows end to end up to a multiple of 8 ([`pairs`]).
//! The convolution of a PatchEmbed is a matrix like those of a Linear, its class row and positions are f32, as are the
//! vectors of norms. An embedding table is `[V, D]` without padding.

use super::device::Device;
use super::pairs;
use crate::backend::{Buffer, Prepared};
use crate::error::{Error, Result};
use crate::op::{Op, Pair, WeightType};
use crate::tensor::{DType, Weight, WeightBytes};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// Elements to which rows of matrices are padded: 16 bytes, which kernels move as one.
const PAD: usize = 8;

/// Matrices that are on the device, so that one that serves two ops (a tied embedding and head) is there once.
#[derive(Default)]
pub(super) struct Tied(Mutex<HashMap<Key, Weak<Resident>>>);

/// Where a matrix lies on the host, and bytes of its rows on the device.
type Key = (usize, usize);

/// Bytes on the device, and those of the host whose address names them.
struct Resident {
    buffer: Buffer,
    _bytes: Option<WeightBytes>,
}

/// Puts the weights of an op on the device; see [`Backend::prepare`](crate::backend::Backend::prepare).
pub(super) fn prepare(device: &Device, tied: &Tied, op: &Op, weights: &[Weight]) -> Result<Vec<Prepared>> {
    let matrix =
        |parts, interleaved| Table { interleaved, dtype: device.dtype(), pad: PAD, ..Table::of(parts) };
    let floats = |parts, interleaved| Table { interleaved, ..Table::of(parts) };
    let tables = match op {
        Op::Linear { bias, pairs, .. } | Op::GatedLinear { bias, pairs } => {
            let (matrices, own) = Op::matrices(weights.len(), *bias, pairs);
            let interleaved = matches!(op, Op::GatedLinear { .. });
            let columns = LowRank::columns(pairs, &weights[own..]);
            let product = Table { columns, ..matrix(&weights[..matrices], interleaved) };
            return linear(
                device,
                tied,
                product,
                floats(&weights[matrices..own], interleaved),
                &weights[own..],
            );
        }
        Op::PatchEmbed { .. } => {
            vec![matrix(&weights[..1], false), floats(&weights[1..2], false), floats(&weights[2..], false)]
        }
        Op::EmbedRows => vec![Table { pad: 1, ..matrix(weights, false) }],
        Op::EmbedTokens => {
            vec![Table { pad: 1, ..matrix(&weights[..1], false) }, floats(&weights[1..], false)]
        }
        Op::LayerNorm { .. } | Op::RmsNorm { .. } | Op::AddRmsNorm { .. } => {
            weights.chunks(1).map(|vector| floats(vector, false)).collect()
        }
        Op::Attention { .. }
        | Op::RopeAppend { .. }
        | Op::PagedAttention { .. }
        | Op::SelectRows { .. }
        | Op::Sample
        | Op::L2Normalize => Vec::new(),
    };
    let mut prepared = Vec::with_capacity(weights.len());
    for table in tables.iter().filter(|table| !table.parts.is_empty()) {
        prepared.extend(table.prepare(device, tied)?);
    }
    Ok(prepared)
}

/// The weights of a linear op, in its order: matrices, biases, A and B of each pair.
fn linear(
    device: &Device,
    tied: &Tied,
    product: Table<'_>,
    biases: Table<'_>,
    pairs: &[Weight],
) -> Result<Vec<Prepared>> {
    let mut prepared = product.prepare(device, tied)?;
    if !biases.parts.is_empty() {
        prepared.extend(biases.prepare(device, tied)?);
    }
    if pairs.is_empty() {
        return Ok(prepared);
    }
    let a: Vec<_> = pairs.iter().step_by(2).cloned().collect();
    let a = Table { dtype: device.dtype(), pad: PAD, pad_rows: pairs::PAD, ..Table::of(&a) };
    for (a, low_rank) in a.prepare(device, tied)?.into_iter().zip(&product.columns) {
        let beside = &prepared[low_rank.matrix];
        let (addr, row_stride) = (beside.addr + low_rank.column * product.dtype.size(), beside.row_stride);
        let ty = WeightType { dtype: product.dtype, ..low_rank.b.into() };
        // The product's own matrices keep the memory.
        let b = Prepared::new(&low_rank.b.name, ty, addr, row_stride, Box::new(()));
        let b = Prepared { bytes: 0, ..b };
        prepared.extend([a, b]);
    }
    Ok(prepared)
}

/// B of a low-rank pair, as columns of the product that it is added to.
struct LowRank<'a> {
    /// Which of the product's matrices.
    matrix: usize,
    scale: f32,
    b: &'a Weight,
    /// Its first column.
    column: usize,
}

impl<'a> LowRank<'a> {
    /// Those of all `pairs`, whose A and B are `weights`.
    fn columns(pairs: &[Pair], weights: &'a [Weight]) -> Vec<Self> {
        let mut column = weights.first().map_or(0, |a| a.cols);
        let place = |(pair, ab): (&Pair, &'a [Weight])| {
            let low_rank = LowRank { matrix: pair.matrix, scale: pair.scale, b: &ab[1], column };
            column += ab[1].cols;
            low_rank
        };
        pairs.iter().zip(weights.chunks_exact(2)).map(place).collect()
    }
}

/// Weights that lie together: rows of equal length, end to end or in turn. Vectors `[1, N]` of several parts are
/// N rows of one element, so that they lie as the rows that they belong to.
struct Table<'a> {
    parts: &'a [Weight],
    interleaved: bool,
    dtype: DType,
    /// What the lengths of rows, and their number, are multiples of; zeros fill them up.
    pad: usize,
    pad_rows: usize,
    /// What stands behind the columns of the parts.
    columns: Vec<LowRank<'a>>,
}

impl<'a> Table<'a> {
    /// Rows of f32 end to end.
    fn of(parts: &'a [Weight]) -> Self {
        Table { parts, interleaved: false, dtype: DType::F32, pad: 1, pad_rows: 1, columns: Vec::new() }
    }

    fn prepare(&self, device: &Device, tied: &Tied) -> Result<Vec<Prepared>> {
        let resident = self.resident(device, tied)?;
        let row_bytes = self.row_bytes();
        let step = if self.interleaved { self.parts.len() } else { 1 };
        let mut first = 0;
        let mut prepared = Vec::with_capacity(self.parts.len());
        for (i, part) in self.parts.iter().enumerate() {
            let row = if self.interleaved { i } else { first };
            first += self.shape(part).0;
            let ty = WeightType { dtype: self.dtype, ..part.into() };
            let addr = resident.buffer.addr + row * row_bytes;
            let bytes = if i == 0 { resident.buffer.bytes } else { 0 };
            let placed = Prepared::new(&part.name, ty, addr, step * row_bytes, Box::new(resident.clone()));
            prepared.push(Prepared { bytes, ..placed });
        }
        Ok(prepared)
    }

    /// The rows on the device: those that are there, or a new copy.
    fn resident(&self, device: &Device, tied: &Tied) -> Result<Arc<Resident>> {
        let ([only], []) = (self.parts, &self.columns[..]) else {
            return self.upload(device, None).map(Arc::new);
        };
        let key = (only.bytes.as_bytes().as_ptr() as usize, self.row_bytes());
        let mut known = tied.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(resident) = known.get(&key).and_then(Weak::upgrade) {
            return Ok(resident);
        }
        let resident = Arc::new(self.upload(device, Some(only.bytes.clone()))?);
        known.insert(key, Arc::downgrade(&resident));
        Ok(resident)
    }

    fn upload(&self, device: &Device, bytes: Option<WeightBytes>) -> Result<Resident> {
        let rows: usize = self.parts.iter().map(|part| self.shape(part).0).sum();
        let (rows, row_bytes) = (rows.next_multiple_of(self.pad_rows), self.row_bytes());
        let buffer = device.alloc(&self.parts[0].name, rows * row_bytes)?;
        let mut scratch = Vec::new();
        let mut fill = |row, out: &mut [u8]| self.fill(row, out, &mut scratch);
        // SAFETY: the whole of a buffer that was just allocated.
        unsafe { device.driver().upload_rows(buffer.addr, rows, row_bytes, &mut fill)? };
        Ok(Resident { buffer, _bytes: bytes })
    }

    /// Rows and columns of a part as this table sees them.
    fn shape(&self, part: &Weight) -> (usize, usize) {
        if part.rows == 1 && self.dtype == DType::F32 { (part.cols, 1) } else { (part.rows, part.cols) }
    }

    fn row_bytes(&self) -> usize {
        let ranks: usize = self.columns.iter().map(|low_rank| low_rank.b.cols).sum();
        let cols = self.shape(&self.parts[0]).1 + ranks.next_multiple_of(pairs::PAD);
        cols.next_multiple_of(self.pad) * self.dtype.size()
    }

    /// Makes one row: converts its part's, and those of B beside it; the rest are zeros.
    fn fill(&self, row: usize, out: &mut [u8], scratch: &mut Vec<f32>) -> Result<()> {
        let Some((part, row)) = self.locate(row) else {
            out.fill(0);
            return Ok(());
        };
        let own = self.shape(&self.parts[part]).1 * self.dtype.size();
        out[own..].fill(0);
        self.convert(&self.parts[part], row, 1.0, out, scratch)?;
        for low_rank in self.columns.iter().filter(|low_rank| low_rank.matrix == part) {
            let out = &mut out[low_rank.column * self.dtype.size()..];
            self.convert(low_rank.b, row, low_rank.scale, out, scratch)?;
        }
        Ok(())
    }

    /// Writes a row of a weight, times `scale`, to the beginning of `out`.
    fn convert(
        &self,
        part: &Weight,
        row: usize,
        scale: f32,
        out: &mut [u8],
        scratch: &mut Vec<f32>,
    ) -> Result<()> {
        let cols = self.shape(part).1;
        let from = part.dtype.size();
        let bytes = &part.bytes.as_bytes()[row * cols * from..][..cols * from];
        let out = &mut out[..cols * self.dtype.size()];
        if part.dtype == self.dtype && scale == 1.0 {
            out.copy_from_slice(bytes);
            return Ok(());
        }
        scratch.resize(cols, 0.0);
        part.dtype.widen_to(bytes, scratch);
        scratch.iter_mut().for_each(|x| *x *= scale);
        // The smallest magnitude that f16 rounds to infinity.
        let too_large = |x: &f32| x.is_finite() && x.abs() >= 65520.0;
        if self.dtype == DType::F16 && scratch.iter().any(too_large) {
            return Err(Error::Tensor {
                name: part.name.clone(),
                expected: "values within 65504, as f16 has".into(),
                found: format!("{} beyond it; use --dtype bf16", part.dtype),
            });
        }
        self.dtype.round_to(scratch, out);
        Ok(())
    }

    /// The part that a row comes from, and which of its rows it is; `None` behind the last.
    fn locate(&self, mut row: usize) -> Option<(usize, usize)> {
        if self.interleaved {
            return Some((row % self.parts.len(), row / self.parts.len()));
        }
        for (i, part) in self.parts.iter().enumerate() {
            let rows = self.shape(part).0;
            if row < rows {
                return Some((i, row));
            }
            row -= rows;
        }
        None
    }
}
