//! The lanes as two 256-bit registers: lanes 0 to 7, lanes 8 to 15.

use super::{Kernel, LANES, Lanes};
use std::arch::x86_64::*;

/// Proof that the machine has AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub struct Avx2(());

/// Runs `kernel` with AVX2.
///
/// # Safety
/// The machine has the features named in the attribute.
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn enter<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx2(()))
}

/// One intrinsic that touches no memory, or only what the caller of the method vouches for.
macro_rules! op {
    ($e:expr) => {
        // SAFETY: an `Avx2` is made only by `enter`, whose caller vouches for the features.
        unsafe { $e }
    };
}

/// The same intrinsic on both halves.
macro_rules! both {
    ($f:expr; $($v:ident),+) => { op!([$f($($v[0]),+), $f($($v[1]),+)]) };
}

/// An expression for each of two. Not a closure: that has not the features of the function around it, and where the
/// compiler does not inline it, every intrinsic in it is a call through memory (with one such in `exp2_whole`, a GELU
/// took 14 % of its product, and takes 3).
macro_rules! each {
    ($x:ident in $two:expr => $e:expr) => {{
        let [first, second] = $two;
        op!([
            {
                let $x = first;
                $e
            },
            {
                let $x = second;
                $e
            }
        ])
    }};
}

type V = [__m256; 2];

impl Lanes for Avx2 {
    type V = V;
    type Words = [__m256i; 2];
    type Mask = V;
    // 12 accumulators, 2 weights and a broadcast of 16 registers.
    const TILE: (usize, usize) = (6, 1);

    #[inline(always)]
    fn splat(self, x: f32) -> V {
        op!([_mm256_set1_ps(x); 2])
    }
    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        both!(_mm256_add_ps; a, b)
    }
    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        both!(_mm256_sub_ps; a, b)
    }
    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        both!(_mm256_mul_ps; a, b)
    }
    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        both!(_mm256_div_ps; a, b)
    }
    #[inline(always)]
    fn fma(self, a: V, b: V, c: V) -> V {
        both!(_mm256_fmadd_ps; a, b, c)
    }
    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        both!(_mm256_max_ps; a, b)
    }
    #[inline(always)]
    fn lt(self, a: V, b: V) -> V {
        both!(_mm256_cmp_ps::<_CMP_LT_OQ>; a, b)
    }
    #[inline(always)]
    fn select(self, mask: V, a: V, b: V) -> V {
        both!(_mm256_blendv_ps; b, a, mask)
    }
    #[inline(always)]
    fn exp2_whole(self, n: V) -> V {
        each!(n in n => {
            let exponent = _mm256_slli_epi32::<23>(_mm256_castps_si256(n));
            _mm256_castsi256_ps(_mm256_add_epi32(exponent, _mm256_set1_epi32(0x3f80_0000)))
        })
    }
    #[inline(always)]
    fn sum(self, v: V) -> f32 {
        op!({
            let v = _mm256_add_ps(v[0], v[1]);
            let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
        })
    }
    #[inline(always)]
    fn max_lane(self, v: V) -> f32 {
        op!({
            let v = _mm256_max_ps(v[0], v[1]);
            let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)))
        })
    }
    #[inline(always)]
    unsafe fn load(self, src: *const f32) -> V {
        // SAFETY: the caller vouches for sixteen elements.
        unsafe { [_mm256_loadu_ps(src), _mm256_loadu_ps(src.add(8))] }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, src: *const u8) -> V {
        // The caller vouches for sixteen elements of two bytes.
        each!(at in [0, 16] => {
            let halves = _mm256_cvtepu16_epi32(_mm_loadu_si128(src.add(at).cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(halves))
        })
    }
    #[inline(always)]
    unsafe fn load_f16(self, src: *const u8) -> V {
        // The caller vouches for sixteen elements of two bytes.
        each!(at in [0, 16] => _mm256_cvtph_ps(_mm_loadu_si128(src.add(at).cast())))
    }
    #[inline(always)]
    fn prefetch(self, address: *const u8) {
        // SAFETY: a prefetch reads nothing, and never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
    }
    #[inline(always)]
    unsafe fn store(self, dst: *mut f32, v: V) {
        // SAFETY: the caller vouches for sixteen elements.
        unsafe {
            _mm256_storeu_ps(dst, v[0]);
            _mm256_storeu_ps(dst.add(8), v[1]);
        }
    }
    /// Halves of what is left, eight to one: rows of activations are packed by sixes, for which a call that copies
    /// bytes takes longer than their transposition.
    #[inline(always)]
    unsafe fn store_first(self, dst: *mut f32, v: V, n: usize) {
        // SAFETY: the caller vouches for `n` elements, and no more are written.
        unsafe {
            if n >= LANES {
                return self.store(dst, v);
            }
            let (mut at, mut eight) = (dst, v[0]);
            if n & 8 != 0 {
                _mm256_storeu_ps(at, eight);
                (at, eight) = (at.add(8), v[1]);
            }
            let mut four = _mm256_castps256_ps128(eight);
            if n & 4 != 0 {
                _mm_storeu_ps(at, four);
                (at, four) = (at.add(4), _mm256_extractf128_ps::<1>(eight));
            }
            if n & 2 != 0 {
                _mm_storel_pd(at.cast(), _mm_castps_pd(four));
                (at, four) = (at.add(2), _mm_movehl_ps(four, four));
            }
            if n & 1 != 0 {
                _mm_store_ss(at, four);
            }
        }
    }

    /// Four 8x8 transpositions.
    #[inline(always)]
    unsafe fn transpose_lines(self, lines: &[*const u8; LANES]) -> [[__m256i; 2]; LANES] {
        // SAFETY: the caller vouches for 64 bytes at each address; the rest is arithmetic.
        unsafe {
            let mut words = [[_mm256_setzero_si256(); 2]; LANES];
            for half in 0..2 {
                for block in 0..2 {
                    let columns = transpose_8x8(&lines[8 * block..], 32 * half);
                    for (w, column) in columns.into_iter().enumerate() {
                        words[8 * half + w][block] = column;
                    }
                }
            }
            words
        }
    }
    #[inline(always)]
    fn words_f32(self, words: [__m256i; 2]) -> V {
        both!(_mm256_castsi256_ps; words)
    }
    #[inline(always)]
    fn words_bf16(self, words: [__m256i; 2]) -> [V; 2] {
        let mask = op!(_mm256_set1_epi32(0xffff_0000_u32 as i32));
        [
            each!(w in words => _mm256_castsi256_ps(_mm256_slli_epi32::<16>(w))),
            each!(w in words => _mm256_castsi256_ps(_mm256_and_si256(w, mask))),
        ]
    }
    #[inline(always)]
    fn words_f16(self, words: [__m256i; 2]) -> [V; 2] {
        let mask = op!(_mm256_set1_epi32(0xffff));
        let low = each!(w in words => _mm256_and_si256(w, mask));
        let high = each!(w in words => _mm256_srli_epi32::<16>(w));
        each!(words in [low, high] => {
            // Packing interleaves the 128-bit halves of both; the permutation puts them in order.
            let halves = _mm256_permute4x64_epi64::<0xd8>(_mm256_packus_epi32(words[0], words[1]));
            let upper = _mm256_extracti128_si256::<1>(halves);
            [_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), _mm256_cvtph_ps(upper)]
        })
    }
}

/// Reads 32 bytes at `offset` of each of eight lines and transposes the words.
///
/// # Safety
/// The bytes are readable, and the machine has AVX2.
#[inline(always)]
unsafe fn transpose_8x8(lines: &[*const u8], offset: usize) -> [__m256i; 8] {
    // SAFETY: the caller vouches for the bytes and the features.
    unsafe {
        // Line r in the low half, line r + 4 in the high half: the crossing is done by the loads.
        let load = |r: usize, half: usize| {
            let at = |r: usize| _mm_loadu_si128(lines[r].add(offset + 16 * half).cast());
            _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(at(r)), at(r + 4))
        };
        let mut out = [_mm256_setzero_si256(); 8];
        for half in 0..2 {
            let (r0, r1, r2, r3) = (load(0, half), load(1, half), load(2, half), load(3, half));
            let low = _mm256_unpacklo_epi32(r0, r1);
            let high = _mm256_unpackhi_epi32(r0, r1);
            let low2 = _mm256_unpacklo_epi32(r2, r3);
            let high2 = _mm256_unpackhi_epi32(r2, r3);
            out[4 * half] = _mm256_unpacklo_epi64(low, low2);
            out[4 * half + 1] = _mm256_unpackhi_epi64(low, low2);
            out[4 * half + 2] = _mm256_unpacklo_epi64(high, high2);
            out[4 * half + 3] = _mm256_unpackhi_epi64(high, high2);
        }
        out
    }
}
