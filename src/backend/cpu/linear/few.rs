//! The loop for few rows: lanes run along K, and each row of W is read once, in order.

use super::super::lanes::{LANES, Lanes};
use super::super::panel::{Bf16, F16, F32, Format, RowGroup};
use super::{GROUPS, K_BLOCK, Product};
use crate::tensor::DType;

/// Bytes between a line that is used and the line that is asked for, with one row: at 20 GB/s a thread it
/// is under way for 400 ns. 4 to 16 KiB do nearly as well.
const AHEAD: usize = 8 << 10;
/// K-blocks of a row of W that are read in one go, with one row of x; six hold the 11,008 columns of
/// LLaMA-7B's widest layer.
pub(super) const SPAN: usize = 6;

/// The partial sums of sixteen outputs, one line each.
#[repr(align(64))]
struct Partials([[f32; LANES]; LANES]);

impl Product<'_> {
    /// Computes strips until none is left, reading `B` K-blocks of a row of W at a time.
    ///
    /// # Safety
    /// The product has `R` rows, at most four.
    #[inline(always)]
    pub(super) unsafe fn few<L: Lanes, const R: usize, const B: usize>(&self, lanes: L) {
        while let Some(strip) = self.take_strip() {
            let mut sums = [[lanes.splat(0.0); GROUPS]; R];
            for (g, group) in strip.groups.iter().enumerate().filter(|(g, _)| strip.widths[*g] > 0) {
                // SAFETY: the caller's obligation; the dtype of each arm is that of the group.
                let found: [L::V; R] = unsafe {
                    match group.dtype {
                        DType::F16 => self.sums_of::<L, F16, R, B>(lanes, group),
                        DType::BF16 => self.sums_of::<L, Bf16, R, B>(lanes, group),
                        DType::F32 | DType::I32 => self.sums_of::<L, F32, R, B>(lanes, group),
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

    /// x Wᵀ for sixteen rows of W.
    ///
    /// `B` K-blocks of a row of W are read before its next row. For one row of x that is the whole row
    /// ([`SPAN`]): each thread reads one straight stream, as the read ceiling itself is measured, and gets
    /// 81 to 90 % of it, where four rows of W abreast, 4 KiB of each at a time, got 67 to 86 %. For more
    /// rows of x it is one block, so that x stays in the first-level cache.
    ///
    /// # Safety
    /// The product has `R` rows, the group is of its layers and has dtype `F`.
    #[inline(always)]
    unsafe fn sums_of<L: Lanes, F: Format, const R: usize, const B: usize>(
        &self,
        lanes: L,
        group: &RowGroup,
    ) -> [L::V; R] {
        let size = F::DTYPE.size();
        let ahead = if B > 1 { AHEAD } else { self.k * size };
        let mut total = [lanes.splat(0.0); R];
        let mut partials = [const { [const { Partials([[0.0; LANES]; LANES]) }; B] }; R];
        for span in (0..self.k).step_by(B * K_BLOCK) {
            let end = self.k.min(span + B * K_BLOCK);
            for row in 0..group.rows {
                for (block, start) in (span..end).step_by(K_BLOCK).enumerate() {
                    let count = K_BLOCK.min(end - start);
                    let w = group.row(row, start * size);
                    // SAFETY: the row has columns `start..start + count`, and so has x.
                    let sums = unsafe { self.advance::<L, F, R>(lanes, (w, ahead), start, count) };
                    for (partials, sum) in partials.iter_mut().zip(sums) {
                        // SAFETY: a line has sixteen elements.
                        unsafe { lanes.store(partials[block].0[row].as_mut_ptr(), sum) }
                    }
                }
            }
            for (total, partials) in total.iter_mut().zip(&partials) {
                for (block, start) in (span..end).step_by(K_BLOCK).enumerate() {
                    let lines = std::array::from_fn(|row| partials[block].0[row].as_ptr().cast());
                    // SAFETY: each line has 64 bytes.
                    let partials = unsafe { lanes.transpose_lines(&lines) };
                    for (l, words) in partials.into_iter().enumerate() {
                        let partial = lanes.words_f32(words);
                        *total = if start + l == 0 { partial } else { lanes.add(*total, partial) };
                    }
                }
            }
        }
        total
    }

    /// The sixteen partial sums of a row of W and each row of x over one K-block. Lines of W are asked for
    /// `ahead` bytes before their turn.
    ///
    /// # Safety
    /// `w` has `count` elements of dtype `F`, x has columns `start..start + count` of `R` rows.
    #[inline(always)]
    unsafe fn advance<L: Lanes, F: Format, const R: usize>(
        &self,
        lanes: L,
        (w, ahead): (*const u8, usize),
        start: usize,
        count: usize,
    ) -> [L::V; R] {
        let size = F::DTYPE.size();
        let x: [*const f32; R] = std::array::from_fn(|row| self.x.wrapping_add(row * self.k + start));
        let mut sums = [lanes.splat(0.0); R];
        let mut add = |x: [L::V; R], w: L::V| {
            for row in 0..R {
                sums[row] = lanes.fma(x[row], w, sums[row]);
            }
        };
        let line = LANES * F::PER_WORD;
        let mut at = 0;
        while at + line <= count {
            lanes.prefetch(w.wrapping_add(at * size + ahead));
            for _ in 0..F::PER_WORD {
                // SAFETY: columns `at..at + 16` are below `count`.
                unsafe { add(x.map(|x| lanes.load(x.add(at))), F::load(lanes, w.add(at * size))) };
                at += LANES;
            }
        }
        while at < count {
            let n = LANES.min(count - at);
            // SAFETY: `n` columns are left, which fit a padded line.
            unsafe {
                let mut padded = [0u8; 64];
                std::ptr::copy_nonoverlapping(w.add(at * size), padded.as_mut_ptr(), n * size);
                add(x.map(|x| lanes.load_first(x.add(at), n)), F::load(lanes, padded.as_ptr()));
            }
            at += LANES;
        }
        sums
    }
}
