//! Sixteen f32 lanes, the only vector the CPU kernels know.
//!
//! A kernel is written once, over [`Lanes`], and runs on AVX-512 (one register), AVX2 with FMA
//! (two), NEON (four) or plain arrays. Sixteen is the same on all of them, every operation is
//! correctly rounded IEEE arithmetic, `max` and comparisons treat NaN alike, and the reductions use
//! one tree; so **every path gives the same bits**, and the plain arrays are a test of the others.
//!
//! A `Lanes` value is proof that the machine has the instructions: only [`Isa::run`] makes one, after
//! asking the machine. That is why arithmetic is safe to call, and only memory access is not.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod math;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;

pub use math::Math;

/// How many lanes a vector has.
pub const LANES: usize = 16;
/// 1.5 * 2^23: a number of less than 2^22 that is added to it is rounded to a whole one, and lies in the low bits of
/// the sum.
pub const WHOLE: f32 = 12_582_912.0;

/// Sixteen f32 lanes on one instruction set.
///
/// The methods are `#[inline(always)]` and carry no target feature of their own: they become single
/// instructions inside the function that [`Isa::run`] enters, which has the features.
pub trait Lanes: Copy {
    /// Sixteen f32.
    type V: Copy;
    /// Sixteen 32-bit words, as they lie in memory.
    type Words: Copy;
    /// A choice for each lane.
    type Mask: Copy;

    /// Rows and 16-column groups of a matrix tile whose accumulators fill the register file and no
    /// more; one of the shapes that `linear` instantiates.
    const TILE: (usize, usize);

    /// `x` in every lane.
    fn splat(self, x: f32) -> Self::V;
    /// `a + b`.
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a - b`.
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b`.
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a / b`.
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `if a > b { a } else { b }`: a NaN in either gives `b`.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a < b`, false for NaN.
    fn lt(self, a: Self::V, b: Self::V) -> Self::Mask;
    /// `a` where the mask holds, `b` elsewhere.
    fn select(self, mask: Self::Mask, a: Self::V, b: Self::V) -> Self::V;
    /// 2^n of n + [`WHOLE`] for a whole n in -126..=127; an unspecified value, never a fault, for anything else.
    fn exp2_whole(self, n: Self::V) -> Self::V;

    /// The sum of the lanes: l and l + 8, then l + 4, l + 2, l + 1.
    fn sum(self, v: Self::V) -> f32;
    /// The greatest lane, by [`Lanes::max`] over the same tree.
    fn max_lane(self, v: Self::V) -> f32;

    /// Sixteen f32 from `src`.
    ///
    /// # Safety
    /// `src..src + 16` is readable. No alignment is needed.
    unsafe fn load(self, src: *const f32) -> Self::V;
    /// Writes sixteen f32 to `dst`.
    ///
    /// # Safety
    /// `dst..dst + 16` is writable. No alignment is needed.
    unsafe fn store(self, dst: *mut f32, v: Self::V);

    /// Sixteen bf16 from `src`.
    ///
    /// # Safety
    /// 32 bytes are readable at `src`. No alignment is needed.
    unsafe fn load_bf16(self, src: *const u8) -> Self::V;
    /// Sixteen f16 from `src`.
    ///
    /// # Safety
    /// 32 bytes are readable at `src`. No alignment is needed.
    unsafe fn load_f16(self, src: *const u8) -> Self::V;

    /// Reads one 64-byte line at each of sixteen addresses as a 16x16 matrix of words, and transposes
    /// it: lane `r` of result `w` is word `w` of line `r`.
    ///
    /// # Safety
    /// 64 bytes are readable at every address. No alignment is needed.
    unsafe fn transpose_lines(self, lines: &[*const u8; LANES]) -> [Self::Words; LANES];
    /// Words as f32.
    fn words_f32(self, words: Self::Words) -> Self::V;
    /// Words as pairs of bf16: the low halves, the high halves.
    fn words_bf16(self, words: Self::Words) -> [Self::V; 2];
    /// Words as pairs of f16: the low halves, the high halves.
    fn words_f16(self, words: Self::Words) -> [Self::V; 2];

    /// Asks for the line at `address` to be brought near. Any address will do.
    #[inline(always)]
    fn prefetch(self, address: *const u8) {
        let _ = address;
    }

    /// The first `n <= 16` lanes from `src`, the rest zero.
    ///
    /// # Safety
    /// `src..src + n` is readable.
    #[inline(always)]
    unsafe fn load_first(self, src: *const f32, n: usize) -> Self::V {
        if n >= LANES {
            // SAFETY: the caller vouches for sixteen elements.
            return unsafe { self.load(src) };
        }
        let mut line = [0.0f32; LANES];
        // SAFETY: the caller vouches for `n` elements at `src`, and `line` has room for them.
        unsafe {
            std::ptr::copy_nonoverlapping(src, line.as_mut_ptr(), n);
            self.load(line.as_ptr())
        }
    }

    /// Writes the first `n <= 16` lanes to `dst`.
    ///
    /// # Safety
    /// `dst..dst + n` is writable.
    #[inline(always)]
    unsafe fn store_first(self, dst: *mut f32, v: Self::V, n: usize) {
        if n >= LANES {
            // SAFETY: the caller vouches for sixteen elements.
            return unsafe { self.store(dst, v) };
        }
        let mut line = [0.0f32; LANES];
        // SAFETY: `line` holds sixteen lanes, and the caller vouches for `n` elements at `dst`.
        unsafe {
            self.store(line.as_mut_ptr(), v);
            std::ptr::copy_nonoverlapping(line.as_ptr(), dst, n);
        }
    }
}

/// A computation written over [`Lanes`]; [`Isa::run`] gives it the lanes of one instruction set.
pub trait Kernel {
    /// What it returns.
    type Output;
    /// Runs on `lanes`. Implementations are `#[inline(always)]`, and so is what they call in loops.
    fn run<L: Lanes>(self, lanes: L) -> Self::Output;
}

/// An instruction set that the kernels can run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Isa {
    /// Arrays and `f32::mul_add`: right everywhere, slow where the target has no fused multiply-add.
    Portable,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ and VL.
    Avx512,
    /// AArch64.
    Neon,
}

impl Isa {
    const ALL: [Isa; 4] = [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Neon];

    /// The fastest set this machine has.
    pub fn detect() -> Isa {
        *Isa::available().last().unwrap_or(&Isa::Portable)
    }

    /// Every set this machine has, slowest first.
    pub fn available() -> Vec<Isa> {
        Isa::ALL.into_iter().filter(|isa| isa.is_available()).collect()
    }

    /// The name, as `tessera devices` spells it.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Neon => "neon",
        }
    }

    fn is_available(self) -> bool {
        match self {
            Isa::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                Isa::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx2 | Isa::Avx512 => false,
            Isa::Neon => cfg!(target_arch = "aarch64"),
        }
    }

    /// Runs `kernel` on this instruction set.
    ///
    /// # Panics
    /// If the machine does not have it.
    #[inline]
    pub fn run<K: Kernel>(self, kernel: K) -> K::Output {
        assert!(self.is_available(), "this machine has no {}", self.name());
        match self {
            Isa::Portable => kernel.run(portable::Portable::new()),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the machine was just asked for these features.
            Isa::Avx2 => unsafe { avx2::enter(kernel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the machine was just asked for these features.
            Isa::Avx512 => unsafe { avx512::enter(kernel) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: NEON is part of every AArch64 target.
            Isa::Neon => unsafe { neon::enter(kernel) },
            #[allow(unreachable_patterns)]
            _ => unreachable!("asserted available above"),
        }
    }
}
