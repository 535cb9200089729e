//! The lanes as four 128-bit registers.

use super::{Kernel, LANES, Lanes};
use std::arch::aarch64::*;

/// Proof that the machine has NEON.
#[derive(Clone, Copy)]
pub struct Neon(());

/// Runs `kernel` with NEON.
///
/// # Safety
/// The machine has NEON.
#[target_feature(enable = "neon")]
pub unsafe fn enter<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Neon(()))
}

/// One intrinsic that touches no memory.
macro_rules! op {
    ($e:expr) => {
        // SAFETY: a `Neon` is made only by `enter`, whose caller vouches for the features.
        unsafe { $e }
    };
}

/// The same intrinsic on the four quarters.
macro_rules! each {
    ($q:ident => $e:expr) => {
        op!([0, 1, 2, 3].map(|$q| $e))
    };
}

type V = [float32x4_t; 4];

impl Lanes for Neon {
    type V = V;
    type Words = [uint32x4_t; 4];
    type Mask = [uint32x4_t; 4];
    // 24 accumulators, 4 weights and a broadcast of 32 registers.
    const TILE: (usize, usize) = (6, 1);

    #[inline(always)]
    fn splat(self, x: f32) -> V {
        op!([vdupq_n_f32(x); 4])
    }
    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        each!(q => vaddq_f32(a[q], b[q]))
    }
    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        each!(q => vsubq_f32(a[q], b[q]))
    }
    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        each!(q => vmulq_f32(a[q], b[q]))
    }
    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        each!(q => vdivq_f32(a[q], b[q]))
    }
    #[inline(always)]
    fn fma(self, a: V, b: V, c: V) -> V {
        each!(q => vfmaq_f32(c[q], a[q], b[q]))
    }
    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        [0, 1, 2, 3].map(|q| greater(a[q], b[q]))
    }
    #[inline(always)]
    fn lt(self, a: V, b: V) -> [uint32x4_t; 4] {
        each!(q => vcltq_f32(a[q], b[q]))
    }
    #[inline(always)]
    fn select(self, mask: [uint32x4_t; 4], a: V, b: V) -> V {
        each!(q => vbslq_f32(mask[q], a[q], b[q]))
    }
    #[inline(always)]
    fn exp2_whole(self, n: V) -> V {
        each!(q => {
            let exponent = vshlq_n_u32::<23>(vreinterpretq_u32_f32(n[q]));
            vreinterpretq_f32_u32(vaddq_u32(exponent, vdupq_n_u32(0x3f80_0000)))
        })
    }
    #[inline(always)]
    fn sum(self, v: V) -> f32 {
        op!({
            let v = vaddq_f32(vaddq_f32(v[0], v[2]), vaddq_f32(v[1], v[3]));
            let v = vadd_f32(vget_low_f32(v), vget_high_f32(v));
            vget_lane_f32::<0>(v) + vget_lane_f32::<1>(v)
        })
    }
    #[inline(always)]
    fn max_lane(self, v: V) -> f32 {
        op!({
            let v = greater(greater(v[0], v[2]), greater(v[1], v[3]));
            let v = greater(v, vextq_f32::<2>(v, v));
            let v = greater(v, vextq_f32::<1>(v, v));
            vgetq_lane_f32::<0>(v)
        })
    }
    #[inline(always)]
    unsafe fn load(self, src: *const f32) -> V {
        // SAFETY: the caller vouches for sixteen elements.
        unsafe { [0, 4, 8, 12].map(|at| vld1q_f32(src.add(at))) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, src: *const u8) -> V {
        // SAFETY: the caller vouches for sixteen elements of two bytes.
        unsafe { widen(src).map(|bits| vreinterpretq_f32_u32(bits)) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, src: *const u8) -> V {
        // SAFETY: the caller vouches for sixteen elements of two bytes.
        unsafe { widen(src).map(half_to_f32) }
    }
    #[inline(always)]
    unsafe fn store(self, dst: *mut f32, v: V) {
        for (q, quarter) in v.into_iter().enumerate() {
            // SAFETY: the caller vouches for sixteen elements.
            unsafe { vst1q_f32(dst.add(4 * q), quarter) }
        }
    }

    /// Sixteen 4x4 transpositions.
    #[inline(always)]
    unsafe fn transpose_lines(self, lines: &[*const u8; LANES]) -> [[uint32x4_t; 4]; LANES] {
        // SAFETY: the caller vouches for 64 bytes at each address; the rest is arithmetic.
        unsafe {
            let mut words = [[vdupq_n_u32(0); 4]; LANES];
            for block in 0..4 {
                for quarter in 0..4 {
                    let load =
                        |r: usize| vreinterpretq_u32_u8(vld1q_u8(lines[4 * block + r].add(16 * quarter)));
                    let (r0, r1, r2, r3) = (load(0), load(1), load(2), load(3));
                    let wide = |v| vreinterpretq_u64_u32(v);
                    let even = (wide(vtrn1q_u32(r0, r1)), wide(vtrn1q_u32(r2, r3)));
                    let odd = (wide(vtrn2q_u32(r0, r1)), wide(vtrn2q_u32(r2, r3)));
                    words[4 * quarter][block] = vreinterpretq_u32_u64(vtrn1q_u64(even.0, even.1));
                    words[4 * quarter + 1][block] = vreinterpretq_u32_u64(vtrn1q_u64(odd.0, odd.1));
                    words[4 * quarter + 2][block] = vreinterpretq_u32_u64(vtrn2q_u64(even.0, even.1));
                    words[4 * quarter + 3][block] = vreinterpretq_u32_u64(vtrn2q_u64(odd.0, odd.1));
                }
            }
            words
        }
    }
    #[inline(always)]
    fn words_f32(self, words: [uint32x4_t; 4]) -> V {
        each!(q => vreinterpretq_f32_u32(words[q]))
    }
    #[inline(always)]
    fn words_bf16(self, words: [uint32x4_t; 4]) -> [V; 2] {
        [
            each!(q => vreinterpretq_f32_u32(vshlq_n_u32::<16>(words[q]))),
            each!(q => vreinterpretq_f32_u32(vandq_u32(words[q], vdupq_n_u32(0xffff_0000)))),
        ]
    }
    #[inline(always)]
    fn words_f16(self, words: [uint32x4_t; 4]) -> [V; 2] {
        [
            each!(q => half_to_f32(vshlq_n_u32::<16>(words[q]))),
            each!(q => half_to_f32(vandq_u32(words[q], vdupq_n_u32(0xffff_0000)))),
        ]
    }
}

#[inline(always)]
fn greater(a: float32x4_t, b: float32x4_t) -> float32x4_t {
    op!(vbslq_f32(vcgtq_f32(a, b), a, b))
}

/// Sixteen 16-bit elements, each in the upper half of a word.
///
/// # Safety
/// 32 bytes are readable at `src`.
#[inline(always)]
unsafe fn widen(src: *const u8) -> [uint32x4_t; 4] {
    // SAFETY: the caller vouches for the bytes.
    unsafe { [0, 8, 16, 24].map(|at| vshll_n_u16::<16>(vreinterpret_u16_u8(vld1_u8(src.add(at))))) }
}

/// f16 in the upper halves of the words. The conversion instruction's types are not in stable Rust:
/// moved to their places the bits mean 2^-112 times the value, but for infinity and NaN, whose
/// exponent is set by hand.
#[inline(always)]
fn half_to_f32(bits: uint32x4_t) -> float32x4_t {
    op!({
        let sign = vandq_u32(bits, vdupq_n_u32(0x8000_0000));
        let magnitude = vshrq_n_u32::<3>(vandq_u32(bits, vdupq_n_u32(0x7fff_0000)));
        let scaled = vmulq_f32(vreinterpretq_f32_u32(magnitude), vdupq_n_f32(f32::from_bits(0x7780_0000)));
        let special = vcgeq_u32(magnitude, vdupq_n_u32(0x0f80_0000));
        let infinite = vandq_u32(special, vdupq_n_u32(0x7f80_0000));
        let value = vorrq_u32(vreinterpretq_u32_f32(scaled), infinite);
        vreinterpretq_f32_u32(vorrq_u32(value, sign))
    })
}
