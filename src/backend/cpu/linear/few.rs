//! The loop for few rows: lanes run along K, and each row of W is read once, in order.

use super::super::lanes::{LANES, Lanes};
use super::super::panel::{Bf16, F16, F32, Format, RowGroup};
use super::{GROUPS, K_BLOCK, Operand, Product};
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
                // A pair is more columns of the same rows: u stands for x, B for W.
                let pairs = self.pairs(&strip, g);
                let pairs = pairs.map(|(pair, inner)| (inner, RowGroup::new(&pair.b, strip.rows[g])));
                let mut found = [lanes.splat(0.0); R];
                for (i, (x, group)) in std::iter::once((self.x, *group)).chain(pairs).enumerate() {
                    // SAFETY: the caller's obligation; the dtype of each arm is that of the group.
                    unsafe {
                        match group.dtype {
                            DType::F16 => add_sums::<L, F16, R>(lanes, &x, &group, next, i == 0, &mut found),
                            DType::BF16 => {
                                add_sums::<L, Bf16, R>(lanes, &x, &group, next, i == 0, &mut found)
                            }
                            DType::F32 | DType::I32 => {
                                add_sums::<L, F32, R>(lanes, &x, &group, next, i == 0, &mut found)
                            }
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

/// Adds x Wᵀ for sixteen rows of W to `total`, or begins it. So many rows of W advance together that their
/// sums hide the latency of a multiply-add and fit the registers. `next` is what will be read then.
///
/// # Safety
/// x has `R` rows, and as many columns as the rows of the group, which have dtype `F`.
#[inline(always)]
unsafe fn add_sums<L: Lanes, F: Format, const R: usize>(
    lanes: L,
    x: &Operand,
    group: &RowGroup,
    next: &RowGroup,
    begin: bool,
    total: &mut [L::V; R],
) {
    // SAFETY: the caller's obligations.
    unsafe {
        match (L::TILE.0, R) {
            (12, _) | (_, 1) => add_sums_by::<L, F, R, 4>(lanes, x, group, next, begin, total),
            (_, 2 | 3) => add_sums_by::<L, F, R, 2>(lanes, x, group, next, begin, total),
            _ => add_sums_by::<L, F, R, 1>(lanes, x, group, next, begin, total),
        }
    }
}

/// [`add_sums`], `Q` rows of W at a time.
///
/// # Safety
/// As there.
#[inline(always)]
unsafe fn add_sums_by<L: Lanes, F: Format, const R: usize, const Q: usize>(
    lanes: L,
    x: &Operand,
    group: &RowGroup,
    next: &RowGroup,
    begin: bool,
    total: &mut [L::V; R],
) {
    let size = F::DTYPE.size();
    let mut partials = [const { Partials([[0.0; LANES]; LANES]) }; R];
    for start in (0..x.cols).step_by(K_BLOCK) {
        let count = K_BLOCK.min(x.cols - start);
        for first in (0..group.rows).step_by(Q) {
            let rows: [*const u8; Q] = std::array::from_fn(|q| group.row(first + q, start * size));
            // What is read next is asked for meanwhile: the next rows, or the next columns of the
            // first ones, or the next group.
            let ahead = std::array::from_fn(|q| match first + Q < group.rows {
                true => group.row(first + Q + q, start * size),
                false if start + K_BLOCK < x.cols => group.row(q, (start + K_BLOCK) * size),
                false => next.row(q, 0),
            });
            // SAFETY: the rows have columns `start..start + count`, and so has x.
            let sums = unsafe { advance::<L, F, R, Q>(lanes, rows, ahead, x, start, count) };
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
                *total = if begin && start + l == 0 { partial } else { lanes.add(*total, partial) };
            }
        }
    }
}

/// The sixteen partial sums of `Q` rows of W and each row of x over one K-block.
///
/// # Safety
/// `rows` have `count` elements of dtype `F`, x has columns `start..start + count` of `R` rows.
#[inline(always)]
unsafe fn advance<L: Lanes, F: Format, const R: usize, const Q: usize>(
    lanes: L,
    rows: [*const u8; Q],
    ahead: [*const u8; Q],
    x: &Operand,
    start: usize,
    count: usize,
) -> [[L::V; R]; Q] {
    let size = F::DTYPE.size();
    let x: [*const f32; R] = std::array::from_fn(|row| x.row(row, start));
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
