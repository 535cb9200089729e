//! The lanes as one 512-bit register.

use super::{Kernel, LANES, Lanes};
use std::arch::x86_64::*;

/// Proof that the machine has AVX-512 F, BW, DQ and VL.
#[derive(Clone, Copy)]
pub struct Avx512(());

/// Runs `kernel` with AVX-512.
///
/// # Safety
/// The machine has the features named in the attribute.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub unsafe fn enter<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx512(()))
}

/// One intrinsic that touches no memory.
macro_rules! op {
    ($e:expr) => {
        // SAFETY: an `Avx512` is made only by `enter`, whose caller vouches for the features.
        unsafe { $e }
    };
}

impl Lanes for Avx512 {
    type V = __m512;
    type Words = __m512i;
    type Mask = __mmask16;
    // 24 accumulators, 2 weights and a broadcast of 32 registers.
    const TILE: (usize, usize) = (12, 2);

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        op!(_mm512_set1_ps(x))
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_div_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        op!(_mm512_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_max_ps(a, b))
    }
    #[inline(always)]
    fn lt(self, a: __m512, b: __m512) -> __mmask16 {
        op!(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b))
    }
    #[inline(always)]
    fn select(self, mask: __mmask16, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_mask_blend_ps(mask, b, a))
    }
    #[inline(always)]
    fn exp2_whole(self, n: __m512) -> __m512 {
        op!({
            let exponent = _mm512_slli_epi32::<23>(_mm512_castps_si512(n));
            _mm512_castsi512_ps(_mm512_add_epi32(exponent, _mm512_set1_epi32(0x3f80_0000)))
        })
    }
    #[inline(always)]
    fn sum(self, v: __m512) -> f32 {
        op!({
            let v = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
            let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
        })
    }
    #[inline(always)]
    fn max_lane(self, v: __m512) -> f32 {
        op!({
            let v = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
            let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)))
        })
    }
    #[inline(always)]
    unsafe fn load(self, src: *const f32) -> __m512 {
        // SAFETY: the caller vouches for sixteen elements.
        unsafe { _mm512_loadu_ps(src) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, src: *const u8) -> __m512 {
        // SAFETY: the caller vouches for sixteen elements of two bytes.
        unsafe {
            let halves = _mm512_cvtepu16_epi32(_mm256_loadu_si256(src.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(halves))
        }
    }
    #[inline(always)]
    unsafe fn load_f16(self, src: *const u8) -> __m512 {
        // SAFETY: the caller vouches for sixteen elements of two bytes.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(src.cast())) }
    }
    #[inline(always)]
    fn prefetch(self, address: *const u8) {
        // SAFETY: a prefetch reads nothing, and never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
    }
    #[inline(always)]
    unsafe fn store(self, dst: *mut f32, v: __m512) {
        // SAFETY: the caller vouches for sixteen elements.
        unsafe { _mm512_storeu_ps(dst, v) }
    }
    #[inline(always)]
    unsafe fn load_first(self, src: *const f32, n: usize) -> __m512 {
        // SAFETY: the caller vouches for `n` elements; masked lanes are not read.
        unsafe { _mm512_maskz_loadu_ps(first(n), src) }
    }
    #[inline(always)]
    unsafe fn store_first(self, dst: *mut f32, v: __m512, n: usize) {
        // SAFETY: the caller vouches for `n` elements; masked lanes are not written.
        unsafe { _mm512_mask_storeu_ps(dst, first(n), v) }
    }

    /// Four rounds of sixteen shuffles: pairs of words, pairs of pairs, then 128-bit quarters twice.
    #[inline(always)]
    unsafe fn transpose_lines(self, lines: &[*const u8; LANES]) -> [__m512i; LANES] {
        // SAFETY: the caller vouches for 64 bytes at each address; the rest is arithmetic.
        unsafe {
            let mut rows = [_mm512_setzero_si512(); LANES];
            for (row, line) in rows.iter_mut().zip(lines) {
                *row = _mm512_loadu_si512(line.cast());
            }
            // quads[4 i + j]: word j of each quarter, of lines 4 i .. 4 i + 4.
            let mut quads = rows;
            for i in 0..4 {
                let low = _mm512_unpacklo_epi32(rows[4 * i], rows[4 * i + 1]);
                let high = _mm512_unpackhi_epi32(rows[4 * i], rows[4 * i + 1]);
                let low2 = _mm512_unpacklo_epi32(rows[4 * i + 2], rows[4 * i + 3]);
                let high2 = _mm512_unpackhi_epi32(rows[4 * i + 2], rows[4 * i + 3]);
                quads[4 * i] = _mm512_unpacklo_epi64(low, low2);
                quads[4 * i + 1] = _mm512_unpackhi_epi64(low, low2);
                quads[4 * i + 2] = _mm512_unpacklo_epi64(high, high2);
                quads[4 * i + 3] = _mm512_unpackhi_epi64(high, high2);
            }
            // Word 4 q + j is quarter q of quads[j], quads[4 + j], quads[8 + j], quads[12 + j].
            let mut words = rows;
            for j in 0..4 {
                let even = _mm512_shuffle_i32x4::<0x88>(quads[j], quads[4 + j]);
                let odd = _mm512_shuffle_i32x4::<0xdd>(quads[j], quads[4 + j]);
                let even2 = _mm512_shuffle_i32x4::<0x88>(quads[8 + j], quads[12 + j]);
                let odd2 = _mm512_shuffle_i32x4::<0xdd>(quads[8 + j], quads[12 + j]);
                words[j] = _mm512_shuffle_i32x4::<0x88>(even, even2);
                words[4 + j] = _mm512_shuffle_i32x4::<0x88>(odd, odd2);
                words[8 + j] = _mm512_shuffle_i32x4::<0xdd>(even, even2);
                words[12 + j] = _mm512_shuffle_i32x4::<0xdd>(odd, odd2);
            }
            words
        }
    }
    #[inline(always)]
    fn words_f32(self, words: __m512i) -> __m512 {
        op!(_mm512_castsi512_ps(words))
    }
    #[inline(always)]
    fn words_bf16(self, words: __m512i) -> [__m512; 2] {
        op!({
            let low = _mm512_slli_epi32::<16>(words);
            let high = _mm512_and_si512(words, _mm512_set1_epi32(0xffff_0000_u32 as i32));
            [_mm512_castsi512_ps(low), _mm512_castsi512_ps(high)]
        })
    }
    #[inline(always)]
    fn words_f16(self, words: __m512i) -> [__m512; 2] {
        op!({
            let low = _mm512_cvtepi32_epi16(words);
            let high = _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(words));
            [_mm512_cvtph_ps(low), _mm512_cvtph_ps(high)]
        })
    }
}

/// A mask of the first `n` lanes.
#[inline(always)]
fn first(n: usize) -> __mmask16 {
    ((1u32 << n.min(LANES)) - 1) as __mmask16
}
