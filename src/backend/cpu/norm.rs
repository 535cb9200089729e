//! Norms: LayerNorm, RMSNorm with and without a residual sum, L2. Statistics in f32.
//!
//! **Reduction order.** A sum over a row keeps sixteen partial sums, element i in partial i mod 16, and
//! adds them by a tree: the same on every instruction set.

use super::lanes::{LANES, Lanes};
use super::machine::{Machine, Task};
use super::panel::Matrix;
use super::pool::Worker;

/// What is done to each row.
#[derive(Clone, Copy)]
pub enum Norm<'a> {
    /// `(x - mean) / √(var + eps) * gamma + beta`.
    Layer {
        /// Scale, `[1, D]`.
        gamma: Matrix<'a>,
        /// Shift, `[1, D]`.
        beta: Matrix<'a>,
        /// Added to the variance.
        eps: f32,
    },
    /// `x / √(mean(x²) + eps) * gamma`.
    Rms {
        /// Scale, `[1, D]`.
        gamma: Matrix<'a>,
        /// Added to the mean square.
        eps: f32,
    },
    /// `x / |x|`.
    L2,
}

/// `out[r] = norm(x[r])` for rows of `cols` elements. With `add`, `x + add` is normalised, and written to
/// the second slice beside it.
///
/// # Panics
/// If shapes do not fit.
pub fn norm(
    machine: &Machine,
    norm: Norm<'_>,
    x: &[f32],
    cols: usize,
    add: Option<(&[f32], &mut [f32])>,
    out: &mut [f32],
) {
    assert!(cols > 0 && x.len().is_multiple_of(cols) && out.len() == x.len(), "norm: rows of {cols}");
    for matrix in match &norm {
        Norm::Layer { gamma, beta, .. } => [Some(gamma), Some(beta)],
        Norm::Rms { gamma, .. } => [Some(gamma), None],
        Norm::L2 => [None, None],
    }
    .into_iter()
    .flatten()
    {
        assert_eq!((matrix.rows, matrix.cols), (1, cols), "norm: scale or shift");
        matrix.assert_valid();
    }
    let (add, sum) = match add {
        None => (std::ptr::null(), std::ptr::null_mut()),
        Some((add, sum)) => {
            assert!(add.len() == x.len() && sum.len() == x.len(), "norm: residual");
            (add.as_ptr(), sum.as_mut_ptr())
        }
    };
    let (x, rows, out) = (x.as_ptr(), x.len() / cols, out.as_mut_ptr());
    machine.run(&Rows { norm, x, add, sum, out, rows, cols });
}

struct Rows<'a> {
    norm: Norm<'a>,
    x: *const f32,
    /// As `x`, or null.
    add: *const f32,
    /// As `out`, or null.
    sum: *mut f32,
    out: *mut f32,
    rows: usize,
    cols: usize,
}

// SAFETY: workers write disjoint rows of `out` and `sum`; all else is only read.
unsafe impl Sync for Rows<'_> {}

impl Task for Rows<'_> {
    #[inline(always)]
    fn run<L: Lanes>(&self, lanes: L, worker: Worker<'_>) {
        for row in worker.share(self.rows) {
            // SAFETY: `norm` has checked that every operand has this row.
            unsafe {
                let at = row * self.cols;
                let mut x = self.x.add(at);
                if !self.add.is_null() {
                    let sum = self.sum.add(at);
                    self.add_rows(lanes, x, self.add.add(at), sum);
                    x = sum;
                }
                self.normalise(lanes, x, self.out.add(at));
            }
        }
    }
}

impl Rows<'_> {
    /// # Safety
    /// All three have a row.
    #[inline(always)]
    unsafe fn add_rows<L: Lanes>(&self, lanes: L, x: *const f32, y: *const f32, sum: *mut f32) {
        for at in (0..self.cols).step_by(LANES) {
            let n = LANES.min(self.cols - at);
            // SAFETY: `n` elements are left.
            unsafe {
                let s = lanes.add(lanes.load_first(x.add(at), n), lanes.load_first(y.add(at), n));
                lanes.store_first(sum.add(at), s, n);
            }
        }
    }

    /// # Safety
    /// Both have a row.
    #[inline(always)]
    unsafe fn normalise<L: Lanes>(&self, lanes: L, x: *const f32, out: *mut f32) {
        let n = self.cols as f32;
        // SAFETY: the caller's obligation.
        let (mean, scale) = unsafe {
            match self.norm {
                Norm::Layer { eps, .. } => {
                    let mean = self.sum_of(lanes, x, |x| x) / n;
                    let shift = lanes.splat(mean);
                    let square = |x| {
                        let d = lanes.sub(x, shift);
                        lanes.mul(d, d)
                    };
                    (mean, 1.0 / (self.sum_of(lanes, x, square) / n + eps).sqrt())
                }
                Norm::Rms { eps, .. } => {
                    (0.0, 1.0 / (self.sum_of(lanes, x, |x| lanes.mul(x, x)) / n + eps).sqrt())
                }
                Norm::L2 => (0.0, 1.0 / self.sum_of(lanes, x, |x| lanes.mul(x, x)).sqrt()),
            }
        };
        let (mean, scale) = (lanes.splat(mean), lanes.splat(scale));
        for at in (0..self.cols).step_by(LANES) {
            let n = LANES.min(self.cols - at);
            // SAFETY: `n` elements are left, in the row and in scale and shift.
            unsafe {
                let x = lanes.load_first(x.add(at), n);
                let y = match &self.norm {
                    Norm::Layer { gamma, beta, .. } => {
                        let y = lanes.mul(lanes.sub(x, mean), scale);
                        lanes.add(lanes.mul(y, gamma.load(lanes, 0, at, n)), beta.load(lanes, 0, at, n))
                    }
                    Norm::Rms { gamma, .. } => lanes.mul(lanes.mul(x, scale), gamma.load(lanes, 0, at, n)),
                    Norm::L2 => lanes.mul(x, scale),
                };
                lanes.store_first(out.add(at), y, n);
            }
        }
    }

    /// The sum of `f` over a row.
    ///
    /// # Safety
    /// `x` has a row.
    #[inline(always)]
    unsafe fn sum_of<L: Lanes>(&self, lanes: L, x: *const f32, f: impl Fn(L::V) -> L::V) -> f32 {
        let whole = self.cols / LANES * LANES;
        let mut sum = lanes.splat(0.0);
        for at in (0..whole).step_by(LANES) {
            // SAFETY: sixteen elements are left.
            sum = lanes.add(sum, f(unsafe { lanes.load(x.add(at)) }));
        }
        if whole < self.cols {
            let mut last = [0f32; LANES];
            // SAFETY: the rest of the row; lanes behind it are set to zero after `f`.
            unsafe {
                let y = f(lanes.load_first(x.add(whole), self.cols - whole));
                lanes.store_first(last.as_mut_ptr(), y, self.cols - whole);
                sum = lanes.add(sum, lanes.load(last.as_ptr()));
            }
        }
        lanes.sum(sum)
    }
}
