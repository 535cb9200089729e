//! The loop for few rows: lanes run along K, and each row of W is read once, in order.

use super::super::lanes::{LANES, Lanes};
use super::super::panel::{Bf16, F16, F32, Format, RowGroup};
use super::super::pool::Worker;
use super::{GROUPS, K_BLOCK, Product, Strip};
use crate::tensor::DType;

/// Columns of several rows of x that stay in the first-level cache while rows of W pass by: 16 KiB of eight
/// rows.
const PIECE: usize = 512;

/// The partial sums of sixteen outputs, one line each.
#[repr(align(64))]
struct Partials([[f32; LANES]; LANES]);

impl Product<'_> {
    /// Computes strips until none is left, `R` rows of x at a time by `A` rows of W.
    ///
    /// # Safety
    /// The product's operands were checked, `A` divides sixteen, `R` is 1 only if m is, and `worker` is one
    /// of those that all call this.
    #[inline(always)]
    pub(super) unsafe fn few<L: Lanes, const R: usize, const A: usize>(&self, lanes: L, worker: Worker<'_>) {
        if R > 1 {
            // SAFETY: the caller's obligations. Behind the barrier the interleaved rows are only read.
            unsafe { self.interleave::<L, R>(lanes, worker) };
            worker.barrier();
        }
        while let Some((_, strip)) = self.take_strip() {
            for first in (0..self.m).step_by(R) {
                // SAFETY: the rows begin inside x, and the strip was taken.
                unsafe { self.multiply_few::<L, R, A>(lanes, &strip, first) }
            }
        }
    }

    /// Lays this worker's share of x, and of u of each pair, down as `[m / R][K / 16][R][16]`. Read in order that
    /// is one stream; the rows themselves, a power of two apart, fall into the same sets of the cache. Eight of
    /// them with weights from cache on two cores of a Zen 4: 179 GFLOP/s of 235, where they lay 90.
    ///
    /// # Safety
    /// No worker reads the interleaved rows.
    #[inline(always)]
    unsafe fn interleave<L: Lanes, const R: usize>(&self, lanes: L, worker: Worker<'_>) {
        let mut to = self.workspace;
        for (x, _) in self.operands() {
            let lines = x.cols.div_ceil(LANES);
            for line in worker.share(lines) {
                let (col, n) = (line * LANES, LANES.min(x.cols - line * LANES));
                for first in (0..self.m).step_by(R) {
                    for row in 0..R {
                        // Rows that do not exist repeat the last.
                        let from = x.row((first + row).min(self.m - 1), col);
                        let at = to.wrapping_add((first * lines + line * R + row) * LANES);
                        // SAFETY: the operand has the columns; the workspace has room for its rows rounded up to R.
                        unsafe {
                            lanes.store(
                                at,
                                if n == LANES { lanes.load(from) } else { lanes.load_first(from, n) },
                            )
                        }
                    }
                }
            }
            to = to.wrapping_add(self.m.next_multiple_of(R) * lines * LANES);
        }
    }

    /// One strip for rows `first..first + R` of x, or what there is of them.
    ///
    /// # Safety
    /// As [`Product::few`]; `first < m`, the strip was taken, and the rows are interleaved if `R > 1`.
    #[inline(always)]
    unsafe fn multiply_few<L: Lanes, const R: usize, const A: usize>(
        &self,
        lanes: L,
        strip: &Strip<'_>,
        first: usize,
    ) {
        let mut sums = [[lanes.splat(0.0); GROUPS]; R];
        for g in (0..GROUPS).filter(|g| strip.widths[*g] > 0) {
            let mut found = [lanes.splat(0.0); R];
            let mut at = self.workspace.cast_const();
            for (x, pair) in self.operands() {
                let cols = x.cols.next_multiple_of(LANES);
                let rows = if R == 1 { x.at } else { at.wrapping_add(first * cols) };
                at = at.wrapping_add(self.m.next_multiple_of(R) * cols);
                // A pair is more columns of the same rows: u stands for x, B for W.
                let group = match pair {
                    None => strip.groups[g],
                    Some((layer, pair)) if layer == strip.indices[g] => RowGroup::new(&pair.b, strip.rows[g]),
                    Some(_) => continue,
                };
                let total = (pair.is_none(), &mut found);
                // SAFETY: the caller's obligations; the dtype of each arm is that of the group.
                unsafe {
                    match group.dtype {
                        DType::F16 => add_sums::<L, F16, R, A>(lanes, (rows, x.cols), &group, total),
                        DType::BF16 => add_sums::<L, Bf16, R, A>(lanes, (rows, x.cols), &group, total),
                        DType::F32 | DType::I32 => {
                            add_sums::<L, F32, R, A>(lanes, (rows, x.cols), &group, total)
                        }
                    }
                }
            }
            for r in 0..R {
                sums[r][g] = found[r];
            }
        }
        for (row, sums) in (first..self.m).zip(sums) {
            // SAFETY: the product has the row, and the strip was taken.
            unsafe { self.finish(lanes, strip, row, sums) }
        }
    }
}

/// Adds x Wᵀ for sixteen rows of W to a total, or begins it.
///
/// # Safety
/// The `R` rows of x lie at the address, interleaved; they and the rows of the group, of dtype `F`, have `cols`
/// columns.
#[inline(always)]
unsafe fn add_sums<L: Lanes, F: Format, const R: usize, const A: usize>(
    lanes: L,
    (x, cols): (*const f32, usize),
    group: &RowGroup,
    (begin, total): (bool, &mut [L::V; R]),
) {
    let mut partials = [const { Partials([[0.0; LANES]; LANES]) }; R];
    let piece = if R <= 2 { K_BLOCK } else { PIECE };
    for start in (0..cols).step_by(K_BLOCK) {
        let end = cols.min(start + K_BLOCK);
        for at in (start..end).step_by(piece) {
            for row in (0..group.rows).step_by(A) {
                let tile = Tile { group, row, at, count: piece.min(end - at) };
                // SAFETY: the rows have those columns.
                unsafe { tile.add::<L, F, R, A>(lanes, x.wrapping_add(at * R), &mut partials, at == start) }
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

/// Some rows of a group, from `row` on, and `count` columns of them, from `at` on.
struct Tile<'a> {
    group: &'a RowGroup,
    row: usize,
    at: usize,
    count: usize,
}

impl Tile<'_> {
    /// Adds the products of `A` rows of W and `R` rows of x to their partial sums, or begins them.
    ///
    /// Several rows of W at once are chains of multiply-adds that hide each other's latency. With one or two rows
    /// of x they are streams that the hardware prefetches: 96 to 103 % of the read ceiling on two cores of a
    /// Zen 4, where one row of W at a time, prefetched by software, got 69 to 87 %. With more rows of x a tile
    /// is over too soon for that, and its successor's rows of W are asked for half a group ahead.
    ///
    /// # Safety
    /// As for [`add_sums`]; x is that of the first of the columns.
    #[inline(always)]
    unsafe fn add<L: Lanes, F: Format, const R: usize, const A: usize>(
        &self,
        lanes: L,
        x: *const f32,
        partials: &mut [Partials; R],
        begin: bool,
    ) {
        let size = F::DTYPE.size();
        let rows = |first: usize, col: usize| -> [*const u8; A] {
            std::array::from_fn(|a| self.group.row(first + a, col * size))
        };
        let w = rows(self.row, self.at);
        let next = self.row + LANES / 2;
        let ahead = if next < LANES { rows(next, self.at) } else { rows(next - LANES, self.at + self.count) };
        let mut sums = [[lanes.splat(0.0); A]; R];
        if !begin {
            for r in 0..R {
                for a in 0..A {
                    // SAFETY: a line has sixteen elements.
                    sums[r][a] = unsafe { lanes.load(partials[r].0[self.row + a].as_ptr()) };
                }
            }
        }
        let whole = self.count / LANES * LANES;
        for at in (0..whole).step_by(LANES) {
            let mut columns = [lanes.splat(0.0); A];
            for a in 0..A {
                if R > 2 && at % (LANES * F::PER_WORD) == 0 {
                    lanes.prefetch(ahead[a].wrapping_add(at * size));
                }
                // SAFETY: columns `at..at + 16` are below `count`.
                columns[a] = unsafe { F::load(lanes, w[a].add(at * size)) };
            }
            for r in 0..R {
                // SAFETY: as above.
                let x = unsafe { lanes.load(x.add(at * R + r * LANES)) };
                for a in 0..A {
                    sums[r][a] = lanes.fma(x, columns[a], sums[r][a]);
                }
            }
        }
        if whole < self.count {
            let n = self.count - whole;
            for a in 0..A {
                let mut padded = [0u8; 64];
                // SAFETY: `n` columns are left, which fit a padded line.
                let column = unsafe {
                    std::ptr::copy_nonoverlapping(w[a].add(whole * size), padded.as_mut_ptr(), n * size);
                    F::load(lanes, padded.as_ptr())
                };
                for r in 0..R {
                    // SAFETY: as above.
                    let x = unsafe { lanes.load_first(x.add(whole * R + r * LANES), n) };
                    sums[r][a] = lanes.fma(x, column, sums[r][a]);
                }
            }
        }
        for r in 0..R {
            for a in 0..A {
                // SAFETY: as above.
                unsafe { lanes.store(partials[r].0[self.row + a].as_mut_ptr(), sums[r][a]) }
            }
        }
    }
}
