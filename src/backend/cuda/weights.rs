//! How weights lie on a CUDA device.
//!
//! The matrices of a Linear are one matrix `[ΣN, ldw]` of the device's dtype, rows end to end; those of a
//! GatedLinear too, rows g0, u0, g1, u1 and so on, so that gate and up of a feature meet in one thread's
//! accumulators. ldw is K rounded up to 8 (16 bytes), filled with zeros. Biases are f32, in the order of the rows.
//! The convolution of a PatchEmbed is a matrix like those of a Linear, its class row and positions are f32, as are the
//! vectors of norms. An embedding table is `[V, D]` without padding.

use super::device::Device;
use crate::backend::{Buffer, Prepared};
use crate::error::{Error, Result};
use crate::op::{Op, WeightType};
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
    let matrix = |parts, interleaved| Table { parts, interleaved, dtype: device.dtype(), pad: PAD };
    let floats = |parts, interleaved| Table { parts, interleaved, dtype: DType::F32, pad: 1 };
    let tables = match op {
        Op::Linear { bias, .. } => {
            let (matrices, biases) = weights.split_at(if *bias { weights.len() / 2 } else { weights.len() });
            vec![matrix(matrices, false), floats(biases, false)]
        }
        Op::GatedLinear { .. } => {
            let (matrices, biases) = weights.split_at(2);
            vec![matrix(matrices, true), floats(biases, true)]
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

/// Weights that lie together: rows of equal length, end to end or in turn. Vectors `[1, N]` of several parts are
/// N rows of one element, so that they lie as the rows that they belong to.
struct Table<'a> {
    parts: &'a [Weight],
    interleaved: bool,
    dtype: DType,
    pad: usize,
}

impl Table<'_> {
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
            prepared.push(Prepared::new(&part.name, ty, addr, step * row_bytes, Box::new(resident.clone())));
        }
        Ok(prepared)
    }

    /// The rows on the device: those that are there, or a new copy.
    fn resident(&self, device: &Device, tied: &Tied) -> Result<Arc<Resident>> {
        let [only] = self.parts else { return self.upload(device, None).map(Arc::new) };
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
        let row_bytes = self.row_bytes();
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
        self.shape(&self.parts[0]).1.next_multiple_of(self.pad) * self.dtype.size()
    }

    /// Makes one row: converts its part's, and adds zeros.
    fn fill(&self, row: usize, out: &mut [u8], scratch: &mut Vec<f32>) -> Result<()> {
        let (part, row) = self.locate(row);
        let cols = self.shape(part).1;
        let (from, size) = (part.dtype.size(), self.dtype.size());
        let bytes = &part.bytes.as_bytes()[row * cols * from..][..cols * from];
        let (out, padding) = out.split_at_mut(cols * size);
        padding.fill(0);
        if part.dtype == self.dtype {
            out.copy_from_slice(bytes);
            return Ok(());
        }
        scratch.resize(cols, 0.0);
        part.dtype.widen_to(bytes, scratch);
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

    /// The part that a row comes from, and which of its rows it is.
    fn locate(&self, mut row: usize) -> (&Weight, usize) {
        if self.interleaved {
            return (&self.parts[row % self.parts.len()], row / self.parts.len());
        }
        for part in self.parts {
            let rows = self.shape(part).0;
            if row < rows {
                return (part, row);
            }
            row -= rows;
        }
        unreachable!("a row beyond the table")
    }
}
