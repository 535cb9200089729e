//! Weights: raw bytes with an encoding, apart from activations.
//!
//! A weight is never a typed slice. Nothing promises that a tensor inside a safetensors file is
//! aligned to its element, and a quantised block or a tensor-parallel shard has no element to be
//! aligned to; so kernels read bytes, and only they know what the bytes mean.

use super::DType;
use std::fmt;
use std::sync::Arc;

/// What owns the bytes of one or many weights. Dropping the last reference unmaps or frees them.
#[derive(Debug)]
pub enum Storage {
    /// A memory-mapped file, shared with every process that maps it.
    Mapped(memmap2::Mmap),
    /// Bytes that are part of the program.
    BuiltIn(&'static [u8]),
    /// Bytes read or made in memory.
    Owned(Box<[u8]>),
    /// Anonymous pages, for weights too large to be zeroed twice.
    Anonymous(memmap2::MmapMut),
}

impl Storage {
    /// All bytes of the storage.
    pub fn as_bytes(&self) -> &[u8] {
        match self {
            Storage::Mapped(map) => map,
            Storage::BuiltIn(bytes) => bytes,
            Storage::Owned(bytes) => bytes,
            Storage::Anonymous(map) => map,
        }
    }
}

/// A range of a [`Storage`] that keeps it alive.
#[derive(Clone)]
pub struct WeightBytes {
    storage: Arc<Storage>,
    offset: usize,
    len: usize,
}

impl WeightBytes {
    /// The range `offset..offset + len`, or `None` if the storage ends before it does.
    pub fn new(storage: Arc<Storage>, offset: usize, len: usize) -> Option<Self> {
        let end = offset.checked_add(len)?;
        (end <= storage.as_bytes().len()).then_some(WeightBytes { storage, offset, len })
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.storage.as_bytes()[self.offset..self.offset + self.len]
    }
}

impl fmt::Debug for WeightBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.len)
    }
}

/// A matrix `[rows, cols]` as it lies in a checkpoint, row-major; a vector has one row.
/// For a linear layer the rows are output features.
#[derive(Clone, Debug)]
pub struct Weight {
    /// The name in the checkpoint, for errors and listings.
    pub name: String,
    /// How an element is stored: F32, F16 or BF16.
    pub dtype: DType,
    /// Rows: output features.
    pub rows: usize,
    /// Columns: input features.
    pub cols: usize,
    /// The bytes, at any alignment, row after row.
    pub bytes: WeightBytes,
}

impl Weight {
    /// Bytes from one row to the next.
    pub fn row_stride(&self) -> usize {
        self.cols * self.dtype.size()
    }
}
