//! Functions of one variable, sixteen at a time: the same fused operations in the same order on every
//! instruction set, so they agree bit for bit.

use super::{Lanes, WHOLE};

/// What [`Math::exp`] flushes to zero lies below.
const LEAST: f32 = -86.98;

/// What [`Lanes`] can be taught with their arithmetic alone.
pub trait Math: Lanes {
    /// e^x to within 2 units in the last place. exp(0) is 1, exp(-inf) is 0, NaN stays NaN; results
    /// under 2^-125 are flushed to zero, so that no softmax weight is ever denormal.
    #[inline(always)]
    fn exp(self, x: Self::V) -> Self::V {
        let (y, n) = self.exp_parts(x);
        // 2 y 2^(n - 1), because 2^128 is no f32.
        let y = self.mul(self.add(y, y), self.exp2_whole(self.sub(n, self.splat(1.0))));
        let y = self.select(self.lt(x, self.splat(LEAST)), self.splat(0.0), y);
        self.select(self.lt(self.splat(88.722_83), x), self.splat(f32::INFINITY), y)
    }

    /// [`exp`](Math::exp) of x <= 0, to the same bits: a softmax's, whose every fifth instruction it saves.
    #[inline(always)]
    fn exp_nonpositive(self, x: Self::V) -> Self::V {
        let (y, n) = self.exp_parts(x);
        let y = self.mul(y, self.exp2_whole(n));
        self.select(self.lt(x, self.splat(LEAST)), self.splat(0.0), y)
    }

    /// e^x as y 2^n: y, and n + [`WHOLE`].
    #[inline(always)]
    fn exp_parts(self, x: Self::V) -> (Self::V, Self::V) {
        const LOG2_E: f32 = std::f32::consts::LOG2_E;
        // ln 2 in two parts: the first has enough trailing zeros that n times it is exact.
        const LN_2_HIGH: f32 = 0.693_359_4;
        const LN_2_LOW: f32 = -2.121_944_4e-4;
        // (e^r - 1 - r) / r^2 on |r| <= ln 2 / 2, a minimax fit with error 7.5e-9 in e^r.
        const P: [f32; 5] = [0.5, 0.166_665_76, 0.041_666_374, 0.008_363_197, 0.001_394_114_8];

        let s = |x| self.splat(x);
        let shifted = self.fma(x, s(LOG2_E), s(WHOLE));
        let n = self.sub(shifted, s(WHOLE));
        let r = self.fma(n, s(-LN_2_LOW), self.fma(n, s(-LN_2_HIGH), x));
        let p = self.polynomial(r, &P);
        (self.add(self.fma(self.mul(r, r), p, r), s(1.0)), shifted)
    }

    /// 1 / (1 + e^-x).
    #[inline(always)]
    fn sigmoid(self, x: Self::V) -> Self::V {
        let one = self.splat(1.0);
        self.div(one, self.add(one, self.exp(self.sub(self.splat(0.0), x))))
    }

    /// x sigmoid(x), the gate of a LLaMA feed-forward layer.
    #[inline(always)]
    fn silu(self, x: Self::V) -> Self::V {
        self.div(x, self.add(self.splat(1.0), self.exp(self.sub(self.splat(0.0), x))))
    }

    /// x sigmoid(1.702 x), the activation of OpenAI's CLIP.
    #[inline(always)]
    fn quick_gelu(self, x: Self::V) -> Self::V {
        self.mul(x, self.sigmoid(self.mul(x, self.splat(1.702))))
    }

    /// x (1 + erf(x / sqrt 2)) / 2, the exact GELU: the projector's activation and some towers'.
    #[inline(always)]
    fn gelu_erf(self, x: Self::V) -> Self::V {
        // erf(t) / t in t^2 on 0..=1, minimax, error 1.2e-9.
        #[allow(clippy::approx_constant, reason = "fitted: not quite 2 / sqrt pi")]
        const ERF: [f32; 7] = [
            1.128_379_1,
            -0.376_126_26,
            0.112_836,
            -0.026_854_444,
            0.005_189_535,
            -8.020_841e-4,
            7.889_119e-5,
        ];
        // ln(1 - erf(t)) on 1..=6, minimax, error 1.1e-7.
        const LN_ERFC: [f32; 10] = [
            2.292_663_4e-4,
            -1.129_981_4,
            -0.632_026_26,
            -0.110_151_604,
            0.026_648_292,
            -0.004_929_166_8,
            6.624_471e-4,
            -6.042_484_5e-5,
            3.325_009_3e-6,
            -8.295_345_6e-8,
        ];

        let s = |x| self.splat(x);
        let t = self.mul(x, s(std::f32::consts::FRAC_1_SQRT_2));
        let square = self.mul(t, t);
        let near = self.fma(t, self.polynomial(square, &ERF), s(1.0));
        let positive = self.lt(s(0.0), t);
        let magnitude = self.select(positive, t, self.sub(s(0.0), t));
        let erfc = self.exp_nonpositive(self.polynomial(magnitude, &LN_ERFC));
        // erfc(6) is 2e-17: past it, x or 0.
        let erfc = self.select(self.lt(s(6.0), magnitude), s(0.0), erfc);
        let far = self.select(positive, self.sub(s(2.0), erfc), erfc);
        let twice = self.select(self.lt(s(1.0), magnitude), far, near);
        self.mul(self.mul(x, s(0.5)), twice)
    }

    /// `c[0] + c[1] x + c[2] x^2 + ...`, by Horner's rule.
    #[inline(always)]
    fn polynomial<const N: usize>(self, x: Self::V, c: &[f32; N]) -> Self::V {
        let mut p = self.splat(c[N - 1]);
        for i in (0..N - 1).rev() {
            p = self.fma(p, x, self.splat(c[i]));
        }
        p
    }
}

impl<L: Lanes> Math for L {}
