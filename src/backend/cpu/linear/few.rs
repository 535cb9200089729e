//! The loop for few rows: lanes run along K, and each row of W is read once, in order.

use super::super::lanes::{LANES, Lanes};
use super::super::panel::{Bf16, F16, F32, Format, RowGroup};
use super::{GROUPS, K_BLOCK, Product};
use crate::tensor::DType;

/// The partial sums of sixteen outputs, one line each.
#[repr(align(64))]
struct Partials([[f32; LANES]; LANES]);

impl Product<'_> {
    /// Computes strips until none is left.
    ///
    /// # Safety
    /// The product has `R` rows, at most four.
    #[inline(always)]
    pub(super) unsafe fn few<L: Lanes, const R: usize>(&self, lanes: L) {
        // One strip is taken ahead, so that its first lines can be asked for in time.
        let mut taken = self.take_strip();
        while let Some(strip) = taken {
            taken = self.take_strip();
            let after = taken.as_ref().map_or(&strip.groups[0], |strip| &strip.groups[0]);
            let mut sums = [[lanes.splat(0.0); GROUPS]; R];
            for (g, group) in strip.groups.iter().enumerate().filter(|(g, _)| strip.widths[*g] > 0) {
                let next = strip.groups.get(g + 1).unwrap_or(after);
                // SAFETY: the caller's obligation; the dtype of each arm is that of the group.
                let found: [L::V; R] = unsafe {
                    match group.dtype {
                        DType::F16 => self.sums_of::<L, F16, R>(lanes, group, next),
                        DType::BF16 => self.sums_of::<L, Bf16, R>(lanes, group, next),
                        DType::F32 | DType::I32 => self.sums_of::<L, F32, R>(lanes, group, next),
                    }
                };
                for (sums, found) in sums.iter_mut().zip(found) {
                    sums[g] = found;
                }
            }
            for (row, sums) in sums.into_iter().enumerate() {
                // SAFETY: the product has `R` rows, and the strip was taken.
                unsafe { self.finish(lanes, &strip, row, sums) }
            }
        }
    }

    /// x Wᵀ for sixteen rows of W. So many rows of W advance together that their sums hide the latency
    /// of a multiply-add and fit the registers.
    ///
    /// # Safety
    /// The product has `R` rows, the group is of its layers and has dtype `F`.
    #[inline(always)]
    unsafe fn sums_of<L: Lanes, F: Format, const R: usize>(
        &self,
        lanes: L,
        group: &RowGroup,
        next: &RowGroup,
    ) -> [L::V; R] {
        // SAFETY: the caller's obligations.
        unsafe {
            match (L::TILE.0, R) {
                (12, _) | (_, 1) => self.sums_by::<L, F, R, 4>(lanes, group, next),
                (_, 2 | 3) => self.sums_by::<L, F, R, 2>(lanes, group, next),
                _ => self.sums_by::<L, F, R, 1>(lanes, group, next),
            }
        }
    }

    /// [`Product::sums_of`], `Q` rows of W at a time.
    ///
    /// # Safety
    /// As there.
    #[inline(always)]
    unsafe fn sums_by<L: Lanes, F: Format, const R: usize, const Q: usize>(
        &self,
        lanes: L,
        group: &RowGroup,
        next: &RowGroup,
    ) -> [L::V; R] {
        let size = F::DTYPE.size();
        let mut total = [lanes.splat(0.0); R];
        let mut partials = [const { Partials([[0.0; LANES]; LANES]) }; R];
        for start in (0..self.k).step_by(K_BLOCK) {
            let count = K_BLOCK.min(self.k - start);
            for first in (0..group.rows).step_by(Q) {
                let rows: [*const u8; Q] = std::array::from_fn(|q| group.row(first + q, start * size));
                // What is read next is asked for meanwhile: the next rows, or the next columns of the
                // first ones, or the next group.
                let ahead = std::array::from_fn(|q| match first + Q < group.rows {
                    true => group.row(first + Q + q, start * size),
                    false if start + K_BLOCK < self.k => group.row(q, (start + K_BLOCK) * size),
                    false => next.row(q, 0),
                });
                // SAFETY: the rows have columns `start..start + count`, and so has x.
                let sums = unsafe { self.advance::<L, F, R, Q>(lanes, rows, ahead, start, count) };
                for (q, sums) in sums.into_iter().enumerate() {
                    for (partials, sum) in partials.iter_mut().zip(sums) {
                        // SAFETY: a line has sixteen elements. `first + q < 16`, for `Q` divides sixteen.
                        unsafe { lanes.store(partials.0[first + q].as_mut_ptr(), sum) }
                    }
                }
            }
            for (total, partials) in total.iter_mut().zip(&partials) {
                let lines = std::array::from_fn(|row| partials.0[row].as_ptr().cast());
                // SAFETY: each line has 64 bytes.
                let partials = unsafe { lanes.transpose_lines(&lines) };
                for (l, words) in partials.into_iter().enumerate() {
                    let partial = lanes.words_f32(words);
                    *total = if start + l == 0 { partial } else { lanes.add(*total, partial) };
                }
            }
        }
        total
    }

    /// The sixteen partial sums of `Q` rows of W and each row of x over one K-block.
    ///
    /// # Safety
    /// `rows` have `count` elements of dtype `F`, x has columns `start..start + count` of `R` rows.
    #[inline(always)]
    unsafe fn advance<L: Lanes, F: Format, const R: usize, const Q: usize>(
        &self,
        lanes: L,
        rows: [*const u8; Q],
        ahead: [*const u8; Q],
        start: usize,
        count: usize,
    ) -> [[L::V; R]; Q] {
        let size = F::DTYPE.size();
        let x: [*const f32; R] = std::array::from_fn(|row| self.x.wrapping_add(row * self.k + start));
        let mut sums = [[lanes.splat(0.0); R]; Q];
        let mut add = |x: [L::V; R], q: usize, w: L::V| {
            for row in 0..R {
                sums[q][row] = lanes.fma(x[row], w, sums[q][row]);
            }
        };
        let line = LANES * F::PER_WORD;
        let mut at = 0;
        while at + line <= count {
            for line in ahead {
                lanes.prefetch(line.wrapping_add(at * size));
            }
            for _ in 0..F::PER_WORD {
                // SAFETY: columns `at..at + 16` are below `count`.
                unsafe {
                    let x = x.map(|x| lanes.load(x.add(at)));
                    for (q, row) in rows.iter().enumerate() {
                        add(x, q, F::load(lanes, row.add(at * size)));
                    }
                }
                at += LANES;
            }
        }
        while at < count {
            let n = LANES.min(count - at);
            // SAFETY: `n` columns are left, which fit a padded line.
            unsafe {
                let x = x.map(|x| lanes.load_first(x.add(at), n));
                for (q, row) in rows.iter().enumerate() {
                    let mut padded = [0u8; 64];
                    std::ptr::copy_nonoverlapping(row.add(at * size), padded.as_mut_ptr(), n * size);
                    add(x, q, F::load(lanes, padded.as_ptr()));
                }
            }
            at += LANES;
        }
        sums
    }
}
