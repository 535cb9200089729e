//! The loop for few rows: lanes run along K, and each row of W is read once, in order.

use super::super::lanes::{LANES, Lanes};
use super::super::panel::{Bf16, F16, F32, Format, RowGroup};
use super::{GROUPS, K_BLOCK, Operand, Product};
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
                // A pair is more columns of the same rows: u stands for x, B for W.
                let pairs = self.pairs(&strip, g);
                let pairs = pairs.map(|(pair, inner)| (inner, RowGroup::new(&pair.b, strip.rows[g])));
                let mut found = [lanes.splat(0.0); R];
                for (i, (x, group)) in std::iter::once((self.x, *group)).chain(pairs).enumerate() {
                    let total = (i == 0, &mut found);
                    // SAFETY: the caller's obligation; the dtype of each arm is that of the group.
                    unsafe {
                        match group.dtype {
                            DType::F16 => add_sums::<L, F16, R, B>(lanes, &x, &group, total),
                            DType::BF16 => add_sums::<L, Bf16, R, B>(lanes, &x, &group, total),
                            DType::F32 | DType::I32 => add_sums::<L, F32, R, B>(lanes, &x, &group, total),
                        }
                    }
                }
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
}

/// Adds x Wᵀ for sixteen rows of W to a total, or begins it.
///
/// `B` K-blocks of a row of W are read before its next row. For one row of x that is the whole row
/// ([`SPAN`]): each thread reads one straight stream, as the read ceiling itself is measured, and gets
/// 81 to 90 % of it, where four rows of W abreast, 4 KiB of each at a time, got 67 to 86 %. For more
/// rows of x it is one block, so that x stays in the first-level cache.
///
/// # Safety
/// x has `R` rows, and as many columns as the rows of the group, which have dtype `F`.
#[inline(always)]
unsafe fn add_sums<L: Lanes, F: Format, const R: usize, const B: usize>(
    lanes: L,
    x: &Operand,
    group: &RowGroup,
    (begin, total): (bool, &mut [L::V; R]),
) {
    let size = F::DTYPE.size();
    let ahead = if B > 1 { AHEAD } else { x.cols * size };
    let mut partials = [const { [const { Partials([[0.0; LANES]; LANES]) }; B] }; R];
    for span in (0..x.cols).step_by(B * K_BLOCK) {
        let end = x.cols.min(span + B * K_BLOCK);
        for row in 0..group.rows {
            for (block, start) in (span..end).step_by(K_BLOCK).enumerate() {
                let count = K_BLOCK.min(end - start);
                let w = group.row(row, start * size);
                // SAFETY: the row has columns `start..start + count`, and so has x.
                let sums = unsafe { advance::<L, F, R>(lanes, (w, ahead), x, start, count) };
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
                    *total = if begin && start + l == 0 { partial } else { lanes.add(*total, partial) };
                }
            }
        }
    }
}

/// The sixteen partial sums of a row of W and each row of x over one K-block. Lines of W are asked for
/// `ahead` bytes before their turn.
///
/// # Safety
/// `w` has `count` elements of dtype `F`, x has columns `start..start + count` of `R` rows.
#[inline(always)]
unsafe fn advance<L: Lanes, F: Format, const R: usize>(
    lanes: L,
    (w, ahead): (*const u8, usize),
    x: &Operand,
    start: usize,
    count: usize,
) -> [L::V; R] {
    let size = F::DTYPE.size();
    let x: [*const f32; R] = std::array::from_fn(|row| x.row(row, start));
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
