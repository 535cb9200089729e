//! The lanes as an array: the definition that the other instruction sets must match bit for bit.

use super::{LANES, Lanes};

/// An array of sixteen.
#[derive(Clone, Copy)]
pub struct Portable(());

/// Sixteen f32, aligned so that a vectorising compiler may use whole registers.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub struct Array([f32; LANES]);

impl Portable {
    /// Plain arrays need no proof.
    pub fn new() -> Self {
        Portable(())
    }
}

#[inline(always)]
fn map(f: impl Fn(usize) -> f32) -> Array {
    Array(std::array::from_fn(f))
}

#[inline(always)]
fn tree(v: Array, f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut v = v.0;
    for half in [8, 4, 2, 1] {
        for l in 0..half {
            v[l] = f(v[l], v[l + half]);
        }
    }
    v[0]
}

#[inline(always)]
fn greater(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

impl Lanes for Portable {
    type V = Array;
    type Words = [u32; LANES];
    type Mask = [bool; LANES];
    const TILE: (usize, usize) = (6, 1);

    #[inline(always)]
    fn splat(self, x: f32) -> Array {
        Array([x; LANES])
    }
    #[inline(always)]
    fn add(self, a: Array, b: Array) -> Array {
        map(|l| a.0[l] + b.0[l])
    }
    #[inline(always)]
    fn sub(self, a: Array, b: Array) -> Array {
        map(|l| a.0[l] - b.0[l])
    }
    #[inline(always)]
    fn mul(self, a: Array, b: Array) -> Array {
        map(|l| a.0[l] * b.0[l])
    }
    #[inline(always)]
    fn div(self, a: Array, b: Array) -> Array {
        map(|l| a.0[l] / b.0[l])
    }
    #[inline(always)]
    fn fma(self, a: Array, b: Array, c: Array) -> Array {
        map(|l| a.0[l].mul_add(b.0[l], c.0[l]))
    }
    #[inline(always)]
    fn max(self, a: Array, b: Array) -> Array {
        map(|l| greater(a.0[l], b.0[l]))
    }
    #[inline(always)]
    fn lt(self, a: Array, b: Array) -> [bool; LANES] {
        std::array::from_fn(|l| a.0[l] < b.0[l])
    }
    #[inline(always)]
    fn select(self, mask: [bool; LANES], a: Array, b: Array) -> Array {
        map(|l| if mask[l] { a.0[l] } else { b.0[l] })
    }
    #[inline(always)]
    fn exp2_whole(self, n: Array) -> Array {
        map(|l| f32::from_bits((n.0[l].to_bits() << 23).wrapping_add(0x3f80_0000)))
    }
    #[inline(always)]
    fn sum(self, v: Array) -> f32 {
        tree(v, |a, b| a + b)
    }
    #[inline(always)]
    fn max_lane(self, v: Array) -> f32 {
        tree(v, greater)
    }
    #[inline(always)]
    unsafe fn load(self, src: *const f32) -> Array {
        // SAFETY: the caller vouches for sixteen elements.
        Array(unsafe { src.cast::<[f32; LANES]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn load_bf16(self, src: *const u8) -> Array {
        // SAFETY: the caller vouches for sixteen elements of two bytes.
        let halves = unsafe { src.cast::<[[u8; 2]; LANES]>().read_unaligned() };
        map(|l| half::bf16::from_le_bytes(halves[l]).to_f32())
    }
    #[inline(always)]
    unsafe fn load_f16(self, src: *const u8) -> Array {
        // SAFETY: the caller vouches for sixteen elements of two bytes.
        let halves = unsafe { src.cast::<[[u8; 2]; LANES]>().read_unaligned() };
        map(|l| half::f16::from_le_bytes(halves[l]).to_f32())
    }
    #[inline(always)]
    unsafe fn store(self, dst: *mut f32, v: Array) {
        // SAFETY: the caller vouches for sixteen elements.
        unsafe { dst.cast::<[f32; LANES]>().write_unaligned(v.0) }
    }
    #[inline(always)]
    unsafe fn transpose_lines(self, lines: &[*const u8; LANES]) -> [[u32; LANES]; LANES] {
        // SAFETY: the caller vouches for 64 bytes at each address.
        let rows = lines.map(|line| unsafe { line.cast::<[[u8; 4]; LANES]>().read_unaligned() });
        std::array::from_fn(|w| std::array::from_fn(|r| u32::from_le_bytes(rows[r][w])))
    }
    #[inline(always)]
    fn words_f32(self, words: [u32; LANES]) -> Array {
        map(|l| f32::from_bits(words[l]))
    }
    #[inline(always)]
    fn words_bf16(self, words: [u32; LANES]) -> [Array; 2] {
        [map(|l| f32::from_bits(words[l] << 16)), map(|l| f32::from_bits(words[l] & 0xffff_0000))]
    }
    #[inline(always)]
    fn words_f16(self, words: [u32; LANES]) -> [Array; 2] {
        [0, 16].map(|shift| map(|l| half::f16::from_bits((words[l] >> shift) as u16).to_f32()))
    }
}
