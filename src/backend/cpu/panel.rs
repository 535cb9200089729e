//! Matrices as they lie in a checkpoint, read sixteen rows at a time: the one primitive under every
//! matrix product here.
//!
//! Sixteen rows are read a 64-byte line each, widened to f32 and transposed in registers, so that what
//! comes out is one vector per column with the rows in its lanes. `linear` multiplies it at once when
//! there are few activation rows, and stores it as a panel that many rows share when there are many.
//! Activations are packed by the same code: they are an f32 matrix like any other.

use super::lanes::{LANES, Lanes};
use crate::tensor::{DType, Weight};
use std::ops::Range;

/// Bytes in a cache line.
pub(super) const LINE: usize = 64;
/// How many bytes ahead of their use weights are asked for when they are unpacked.
const AHEAD: usize = 256;

/// A matrix `[rows, cols]` of raw elements, row-major and dense, at any alignment; a vector has one
/// row.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    /// `rows * cols` elements, or more.
    pub bytes: &'a [u8],
    /// How an element is stored: F32, F16 or BF16.
    pub dtype: DType,
    /// Output features of a linear layer, entries of a table.
    pub rows: usize,
    /// Input features of a linear layer.
    pub cols: usize,
}

impl<'a> From<&'a Weight> for Matrix<'a> {
    fn from(weight: &'a Weight) -> Self {
        Matrix { bytes: weight.bytes.as_bytes(), dtype: weight.dtype, rows: weight.rows, cols: weight.cols }
    }
}

impl<'a> Matrix<'a> {
    /// An f32 matrix over activations.
    pub fn f32(values: &'a [f32], rows: usize, cols: usize) -> Self {
        Matrix { bytes: bytemuck::cast_slice(values), dtype: DType::F32, rows, cols }
    }

    /// Checks that the bytes are there, once, so that kernels need not.
    ///
    /// # Panics
    /// If there are too few, or the elements are indices.
    pub(super) fn assert_valid(&self) {
        assert!(self.dtype != DType::I32, "a weight of indices");
        let needed = self.rows * self.cols * self.dtype.size();
        assert!(self.bytes.len() >= needed, "a weight of {} bytes, not {needed}", self.bytes.len());
    }

    /// Elements `at..at + n` of row `row`, `n <= 16`, as f32, the other lanes zero.
    ///
    /// # Safety
    /// [`Matrix::assert_valid`] has passed, and the elements exist.
    #[inline(always)]
    pub(super) unsafe fn load<L: Lanes>(&self, lanes: L, row: usize, at: usize, n: usize) -> L::V {
        let size = self.dtype.size();
        let mut line = [0u8; 64];
        // SAFETY: the caller vouches for the elements; short reads go through `line`.
        unsafe {
            let mut src = self.bytes.as_ptr().add((row * self.cols + at) * size);
            if n < LANES {
                std::ptr::copy_nonoverlapping(src, line.as_mut_ptr(), n * size);
                src = line.as_ptr();
            }
            match self.dtype {
                DType::F16 => lanes.load_f16(src),
                DType::BF16 => lanes.load_bf16(src),
                DType::F32 | DType::I32 => lanes.load(src.cast()),
            }
        }
    }
}

/// How elements lie in the 32-bit words of a line.
pub(super) trait Format {
    const DTYPE: DType;
    /// Elements in a word; the first lies in the low bits.
    const PER_WORD: usize;
    /// The elements of sixteen words; the second is meant only if there are two to a word.
    fn split<L: Lanes>(lanes: L, words: L::Words) -> [L::V; 2];
    /// Sixteen elements in order.
    ///
    /// # Safety
    /// They are readable at `src`. No alignment is needed.
    unsafe fn load<L: Lanes>(lanes: L, src: *const u8) -> L::V;
}

pub(super) struct F32;
pub(super) struct F16;
pub(super) struct Bf16;

impl Format for F32 {
    const DTYPE: DType = DType::F32;
    const PER_WORD: usize = 1;
    #[inline(always)]
    fn split<L: Lanes>(lanes: L, words: L::Words) -> [L::V; 2] {
        [lanes.words_f32(words); 2]
    }
    #[inline(always)]
    unsafe fn load<L: Lanes>(lanes: L, src: *const u8) -> L::V {
        // SAFETY: the caller's obligation.
        unsafe { lanes.load(src.cast()) }
    }
}

impl Format for F16 {
    const DTYPE: DType = DType::F16;
    const PER_WORD: usize = 2;
    #[inline(always)]
    fn split<L: Lanes>(lanes: L, words: L::Words) -> [L::V; 2] {
        lanes.words_f16(words)
    }
    #[inline(always)]
    unsafe fn load<L: Lanes>(lanes: L, src: *const u8) -> L::V {
        // SAFETY: the caller's obligation.
        unsafe { lanes.load_f16(src) }
    }
}

impl Format for Bf16 {
    const DTYPE: DType = DType::BF16;
    const PER_WORD: usize = 2;
    #[inline(always)]
    fn split<L: Lanes>(lanes: L, words: L::Words) -> [L::V; 2] {
        lanes.words_bf16(words)
    }
    #[inline(always)]
    unsafe fn load<L: Lanes>(lanes: L, src: *const u8) -> L::V {
        // SAFETY: the caller's obligation.
        unsafe { lanes.load_bf16(src) }
    }
}

/// Sixteen rows of a matrix, or what is left of them at its end.
#[derive(Clone, Copy)]
pub(super) struct RowGroup {
    first: *const u8,
    stride: usize,
    /// How many of the sixteen exist, at least one; the others repeat the last.
    pub rows: usize,
    pub dtype: DType,
}

impl RowGroup {
    /// Rows `row..row + 16` of `matrix`, of which at least the first exists.
    #[inline(always)]
    pub fn new(matrix: &Matrix<'_>, row: usize) -> Self {
        let stride = matrix.cols * matrix.dtype.size();
        let first = matrix.bytes[row * stride..].as_ptr();
        RowGroup { first, stride, rows: LANES.min(matrix.rows - row), dtype: matrix.dtype }
    }

    /// Rows of f32 from `first` on that lie `stride` floats apart, of which `rows`, at least one, are left.
    #[inline(always)]
    pub fn f32(first: *const f32, stride: usize, rows: usize) -> Self {
        let (first, stride) = (first.cast(), stride * size_of::<f32>());
        RowGroup { first, stride, rows: LANES.min(rows), dtype: DType::F32 }
    }

    /// The address of byte `offset` of a row, of the last for rows that do not exist.
    #[inline(always)]
    pub fn row(&self, row: usize, offset: usize) -> *const u8 {
        self.first.wrapping_add(row.min(self.rows - 1) * self.stride + offset)
    }

    /// Asks for some of the lines behind byte `offset` of a row.
    #[inline(always)]
    pub fn prefetch<L: Lanes>(&self, lanes: L, (row, offset): (usize, usize), lines: Range<usize>) {
        let at = self.row(row, offset);
        lines.for_each(|line| lanes.prefetch(at.wrapping_add(line * LINE)));
    }

    /// The address of byte `offset` of each row.
    #[inline(always)]
    fn lines(&self, offset: usize) -> [*const u8; LANES] {
        std::array::from_fn(|r| self.row(r, offset))
    }

    /// The line that begins at column `k`, transposed. Also asks for a line further on in each row.
    ///
    /// # Safety
    /// The group's matrix is valid, has dtype `F`, and all columns of that line.
    #[inline(always)]
    pub unsafe fn columns<L: Lanes, F: Format>(&self, lanes: L, k: usize) -> [L::Words; LANES] {
        let lines = self.lines(k * F::DTYPE.size());
        for line in lines {
            lanes.prefetch(line.wrapping_add(AHEAD));
        }
        // SAFETY: each row has the columns of the line, 64 bytes.
        unsafe { lanes.transpose_lines(&lines) }
    }

    /// The line that begins at column `k` where a row has only `count` columns left, the others zero.
    ///
    /// # Safety
    /// As [`RowGroup::columns`], but for `count` columns, fewer than fill a line.
    #[inline(always)]
    pub unsafe fn last_columns<L: Lanes, F: Format>(
        &self,
        lanes: L,
        k: usize,
        count: usize,
    ) -> [L::Words; LANES] {
        let lines = self.lines(k * F::DTYPE.size());
        let mut padded = [[0u8; 64]; LANES];
        for (line, row) in lines.iter().zip(&mut padded) {
            // SAFETY: each row has `count` columns from `k` on; they fit in a line.
            unsafe { std::ptr::copy_nonoverlapping(*line, row.as_mut_ptr(), count * F::DTYPE.size()) }
        }
        let lines = std::array::from_fn(|r| padded[r].as_ptr());
        // SAFETY: each padded line has 64 bytes.
        unsafe { lanes.transpose_lines(&lines) }
    }

    /// Writes columns `k..k + count` as f32, and zeros for columns up to `padded`, a multiple of sixteen
    /// if it is more than `count`.
    ///
    /// # Safety
    /// The group's matrix is valid and has the columns; `panel` has room for `padded` of them.
    #[inline(always)]
    pub unsafe fn unpack<L: Lanes>(&self, lanes: L, k: usize, count: usize, padded: usize, panel: Panel) {
        // SAFETY: the caller's obligations, and the dtype of each arm is the group's.
        unsafe {
            match self.dtype {
                DType::F16 => self.unpack_as::<L, F16>(lanes, k, count, padded, panel),
                DType::BF16 => self.unpack_as::<L, Bf16>(lanes, k, count, padded, panel),
                DType::F32 | DType::I32 => self.unpack_as::<L, F32>(lanes, k, count, padded, panel),
            }
        }
    }

    /// # Safety
    /// As [`RowGroup::unpack`], and the dtype is `F`.
    #[inline(always)]
    unsafe fn unpack_as<L: Lanes, F: Format>(
        &self,
        lanes: L,
        k: usize,
        count: usize,
        padded: usize,
        panel: Panel,
    ) {
        let line = LANES * F::PER_WORD;
        let whole = count / line * line;
        for at in (0..whole).step_by(line) {
            // SAFETY: columns `k + at..k + at + line` exist, and `panel` has room for them.
            unsafe {
                let words = self.columns::<L, F>(lanes, k + at);
                for (w, words) in words.into_iter().enumerate() {
                    let columns = F::split(lanes, words);
                    for (half, column) in columns.into_iter().take(F::PER_WORD).enumerate() {
                        panel.store(lanes, at, F::PER_WORD * w + half, column);
                    }
                }
            }
        }
        if whole < padded {
            // SAFETY: columns `k + whole..k + count` exist, and `panel` has room up to `padded`.
            unsafe {
                let words = self.last_columns::<L, F>(lanes, k + whole, count - whole);
                for i in 0..padded - whole {
                    let columns = F::split(lanes, words[i / F::PER_WORD]);
                    panel.store(lanes, whole, i, columns[i % F::PER_WORD]);
                }
            }
        }
    }
}

/// Where unpacked columns go: column i to `i % 16 * lane + i / 16 * step`, `width <= 16` rows of it.
#[derive(Clone, Copy)]
pub(super) struct Panel {
    pub at: *mut f32,
    pub width: usize,
    pub lane: usize,
    pub step: usize,
}

impl Panel {
    /// Stores column `first + i`, where `first` is a multiple of sixteen.
    ///
    /// # Safety
    /// There is room for it.
    #[inline(always)]
    unsafe fn store<L: Lanes>(&self, lanes: L, first: usize, i: usize, column: L::V) {
        let offset = i % LANES * self.lane + (first / LANES + i / LANES) * self.step;
        // SAFETY: the caller vouches for the room.
        unsafe {
            let at = self.at.add(offset);
            if self.width == LANES {
                lanes.store(at, column)
            } else {
                lanes.store_first(at, column, self.width)
            }
        }
    }
}
