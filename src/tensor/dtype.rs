//! Element types of activations, index buffers and weights, and how one is written as another.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use std::fmt;

/// The type of one element.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE binary32.
    F32,
    /// IEEE binary16, the dtype of the published LLaVA-1.5 weights.
    F16,
    /// The upper half of a binary32.
    BF16,
    /// Indices: token ids, positions, page tables.
    I32,
}

impl DType {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            DType::F32 | DType::I32 => 4,
            DType::F16 | DType::BF16 => 2,
        }
    }

    /// The name, as the command line and the benchmarks spell it.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::BF16 => "bf16",
            DType::I32 => "i32",
        }
    }

    /// The elements in `bytes`, at any alignment, as f32: exact.
    ///
    /// # Panics
    /// For indices, which are no numbers, and bytes that end within an element.
    pub fn widen(self, bytes: &[u8]) -> Vec<f32> {
        let mut out = vec![0f32; bytes.len() / self.size()];
        self.widen_to(bytes, &mut out);
        out
    }

    /// As [`widen`](DType::widen), into memory that is there.
    ///
    /// # Panics
    /// As for `widen`, and if `out` has another number of elements.
    pub fn widen_to(self, bytes: &[u8], out: &mut [f32]) {
        assert_eq!(bytes.len(), out.len() * self.size(), "elements of {self}");
        match self {
            DType::F32 => bytemuck::cast_slice_mut(out).copy_from_slice(bytes),
            DType::F16 => pieces(bytes, out, |from: &[f16], to| from.convert_to_f32_slice(to)),
            DType::BF16 => pieces(bytes, out, |from: &[bf16], to| from.convert_to_f32_slice(to)),
            DType::I32 => panic!("indices are not widened"),
        }
    }

    /// Writes `values` as elements of this type, rounded to nearest, ties to even. What lies beyond the
    /// range of f16 becomes infinite.
    ///
    /// # Panics
    /// For indices, and if `out` has another number of elements.
    pub fn round_to(self, values: &[f32], out: &mut [u8]) {
        assert_eq!(out.len(), values.len() * self.size(), "elements of {self}");
        match self {
            DType::F32 => out.copy_from_slice(bytemuck::cast_slice(values)),
            DType::F16 => pieces_back(values, out, |from, to: &mut [f16]| to.convert_from_f32_slice(from)),
            DType::BF16 => pieces_back(values, out, |from, to: &mut [bf16]| to.convert_from_f32_slice(from)),
            DType::I32 => panic!("numbers are not rounded to indices"),
        }
    }
}

/// Elements converted at once, through aligned memory on the stack: bytes may lie anywhere, and the
/// processor's conversion instructions are used where it has them.
const PIECE: usize = 256;

fn pieces<T: bytemuck::Pod>(bytes: &[u8], out: &mut [f32], convert: impl Fn(&[T], &mut [f32])) {
    let mut aligned = [T::zeroed(); PIECE];
    for (bytes, out) in bytes.chunks(PIECE * size_of::<T>()).zip(out.chunks_mut(PIECE)) {
        let aligned = &mut aligned[..out.len()];
        bytemuck::cast_slice_mut(aligned).copy_from_slice(bytes);
        convert(aligned, out);
    }
}

fn pieces_back<T: bytemuck::Pod>(values: &[f32], out: &mut [u8], convert: impl Fn(&[f32], &mut [T])) {
    let mut aligned = [T::zeroed(); PIECE];
    for (values, out) in values.chunks(PIECE).zip(out.chunks_mut(PIECE * size_of::<T>())) {
        let aligned = &mut aligned[..values.len()];
        convert(values, aligned);
        out.copy_from_slice(bytemuck::cast_slice(aligned));
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All 65536 values of both types survive widening and rounding, at an odd address, and halfway cases
    /// go to even.
    #[test]
    fn round_trips_and_ties() {
        for dtype in [DType::F16, DType::BF16] {
            let all: Vec<u8> = std::iter::once(0).chain((0..=u16::MAX).flat_map(u16::to_le_bytes)).collect();
            let wide = dtype.widen(&all[1..]);
            let mut back = vec![0; all.len() - 1];
            dtype.round_to(&wide, &mut back);
            for (i, (x, bits)) in wide.iter().zip(back.chunks_exact(2)).enumerate() {
                assert!(x.is_nan() || bits == (i as u16).to_le_bytes(), "{dtype} {i:#x} is {x}");
            }
        }
        let step = 2f32.powi(-7);
        let mut bits = [0; 6];
        DType::BF16.round_to(&[1.0 + step / 2.0, 1.0 + 1.5 * step, -f32::MAX], &mut bits);
        assert_eq!(DType::BF16.widen(&bits), [1.0, 1.0 + 2.0 * step, f32::NEG_INFINITY]);
    }
}
