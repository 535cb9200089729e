//! The core of attention: tiles of query rows against the keys and values of one head, in pages.
//!
//! Registers hold the sums of one tile, [`Lanes::TILE`] rows. Several tiles take their turns at each page of keys
//! and each column of values: those come from the second-level cache once for [`ROWS`] rows, where a tile at a
//! time asked 11 bytes a cycle of it.

use super::super::lanes::{LANES, Lanes, Math};
use super::{CHUNK, MAX_HEAD, ROWS};
use crate::op::PAGE;

/// Keys and values of one head.
#[derive(Clone, Copy)]
pub(super) struct Blocks<'a> {
    /// Of page 0: `[E, PAGE]`.
    pub k: *const f32,
    /// Of page 0: `[PAGE, E]`.
    pub v: *const f32,
    /// Floats from one page to the next.
    pub stride: usize,
    /// Which pages hold the positions in order; in an image they are in order themselves.
    pub table: Option<&'a [i32]>,
}

impl Blocks<'_> {
    /// How many floats lie before the page that holds position `at`.
    #[inline(always)]
    fn offset(&self, at: usize) -> usize {
        let page = at / PAGE;
        self.stride * self.table.map_or(page, |table| table[page] as usize)
    }
}

/// Query rows of one key head that are computed together, up to [`ROWS`].
pub(super) struct Queries {
    q: [*const f32; ROWS],
    out: [*mut f32; ROWS],
    /// How many positions each row sees, at least one.
    seen: [usize; ROWS],
    pub len: usize,
}

impl Queries {
    pub fn new() -> Self {
        Queries { q: [std::ptr::null(); ROWS], out: [std::ptr::null_mut(); ROWS], seen: [0; ROWS], len: 0 }
    }

    #[inline(always)]
    pub fn push(&mut self, q: *const f32, out: *mut f32, seen: usize) {
        (self.q[self.len], self.out[self.len], self.seen[self.len]) = (q, out, seen);
        self.len += 1;
    }

    /// Computes the rows and forgets them.
    ///
    /// # Safety
    /// Each `q` and `out` has E elements; the pages of `blocks` hold as many positions as any row sees,
    /// and a vector may be read behind the last of them.
    #[inline(always)]
    pub unsafe fn flush<L: Lanes>(&mut self, lanes: L, blocks: &Blocks<'_>, head_dim: usize) {
        let height = L::TILE.0;
        // SAFETY: the caller's obligations; a row that repeats the last one writes the same result.
        unsafe {
            match (self.len, height) {
                (ROWS, 12) => attend::<L, 12, 2>(lanes, self, 0, blocks, head_dim),
                (ROWS, _) => attend::<L, 6, 4>(lanes, self, 0, blocks, head_dim),
                (len, _) => {
                    for first in (0..len).step_by(height) {
                        // The height is a constant: only the arms of one remain.
                        match (height, self.pad(first, height)) {
                            (_, 1) => attend::<L, 1, 1>(lanes, self, first, blocks, head_dim),
                            (12, 4) => attend::<L, 4, 1>(lanes, self, first, blocks, head_dim),
                            (12, 8) => attend::<L, 8, 1>(lanes, self, first, blocks, head_dim),
                            (12, _) => attend::<L, 12, 1>(lanes, self, first, blocks, head_dim),
                            (_, 2) => attend::<L, 2, 1>(lanes, self, first, blocks, head_dim),
                            (_, 4) => attend::<L, 4, 1>(lanes, self, first, blocks, head_dim),
                            _ => attend::<L, 6, 1>(lanes, self, first, blocks, head_dim),
                        }
                    }
                }
            }
        }
        self.len = 0;
    }

    /// Repeats the last row until the tile that begins at row `first` has a third, two thirds or all of its
    /// height (a single row stays alone), so that few heights need code. Returns how many rows it has.
    #[inline(always)]
    fn pad(&mut self, first: usize, height: usize) -> usize {
        let rows = height.min(self.len - first);
        if rows == 1 {
            return 1;
        }
        let last = self.len - 1;
        while !(self.len - first).min(height).is_multiple_of(height / 3) {
            self.push(self.q[last], self.out[last], self.seen[last]);
        }
        height.min(self.len - first)
    }
}

/// The core: `T` tiles of `R` query rows, from row `first` on, against the keys and values of one head.
///
/// # Safety
/// As for [`Queries::flush`]; there are so many rows.
#[inline(always)]
unsafe fn attend<L: Lanes, const R: usize, const T: usize>(
    lanes: L,
    rows: &Queries,
    first: usize,
    blocks: &Blocks<'_>,
    head_dim: usize,
) {
    let scale = lanes.splat(1.0 / (head_dim as f32).sqrt());
    let of = |tile: usize, row: usize| first + tile * R + row;
    let mut q = [[[0f32; MAX_HEAD]; R]; T];
    let mut seen = [[0; R]; T];
    for tile in 0..T {
        for row in 0..R {
            let from = rows.q[of(tile, row)];
            // SAFETY: each query has `head_dim` elements.
            unsafe { std::ptr::copy_nonoverlapping(from, q[tile][row].as_mut_ptr(), head_dim) };
            seen[tile][row] = rows.seen[of(tile, row)];
        }
    }
    let limits = seen.map(|seen| seen.into_iter().max().unwrap_or(0));
    let limit = limits.into_iter().max().unwrap_or(0);
    let mut p = [[[0f32; CHUNK]; R]; T];
    let mut sums = [[[0f32; MAX_HEAD]; R]; T];
    let mut max = [[f32::NEG_INFINITY; R]; T];
    let mut total = [[0f32; R]; T];
    for start in (0..limit).step_by(CHUNK) {
        let count = CHUNK.min(limit - start);
        // SAFETY: positions `start..start + count` are below what some row sees.
        unsafe {
            for page in (0..count).step_by(PAGE) {
                for tile in 0..T {
                    scores(
                        lanes,
                        &q[tile],
                        blocks,
                        start + page,
                        head_dim,
                        scale,
                        &seen[tile],
                        &mut p[tile],
                        page,
                    );
                }
            }
            let mut factors = [[1f32; R]; T];
            for tile in 0..T {
                let pages = count.div_ceil(PAGE);
                factors[tile] = weights(lanes, &mut p[tile], pages, &mut max[tile], &mut total[tile]);
            }
            for at in (0..head_dim).step_by(LANES) {
                for tile in 0..T {
                    // Only positions that some row sees: what lies behind them may be anything, even NaN.
                    let seen = start..limits[tile].clamp(start, start + count);
                    add_values(
                        lanes,
                        &p[tile],
                        blocks,
                        seen,
                        (head_dim, at),
                        &factors[tile],
                        &mut sums[tile],
                    );
                }
            }
        }
    }
    for tile in 0..T {
        for row in 0..R {
            let (out, sums) = (rows.out[of(tile, row)], sums[tile][row].as_ptr());
            let total = lanes.splat(total[tile][row]);
            for at in (0..head_dim).step_by(LANES) {
                // SAFETY: there are MAX_HEAD sums, and the output has `head_dim` columns.
                unsafe {
                    let y = lanes.div(lanes.load(sums.add(at)), total);
                    // Adding zero makes -0 of a product that underflowed into the 0 that masked positions
                    // would have made of it.
                    let y = lanes.add(y, lanes.splat(0.0));
                    lanes.store_first(out.add(at), y, LANES.min(head_dim - at));
                }
            }
        }
    }
}

/// `p[r][at + j] = q[r] · k[j] · scale` for the page that begins at position `start`, and -inf where row r does
/// not see j.
///
/// # Safety
/// The position is in a page of `blocks`; `at` is where a page of a chunk begins.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "the registers of one loop nest")]
unsafe fn scores<L: Lanes, const R: usize>(
    lanes: L,
    q: &[[f32; MAX_HEAD]; R],
    blocks: &Blocks<'_>,
    start: usize,
    head_dim: usize,
    scale: L::V,
    seen: &[usize; R],
    p: &mut [[f32; CHUNK]; R],
    at: usize,
) {
    const LANE: [f32; LANES] = [0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.];
    let k = blocks.k.wrapping_add(blocks.offset(start));
    let mut sums = [lanes.splat(0.0); R];
    let seen_at_all = seen.iter().any(|&seen| seen > start);
    for e in 0..if seen_at_all { head_dim } else { 0 } {
        // SAFETY: a K page has `head_dim` rows of sixteen, a query as many elements. Indexed with checks, all
        // rows are read before the first multiplication, and the tile no longer fits the registers.
        unsafe {
            let k = lanes.load(k.add(e * PAGE));
            for row in 0..R {
                sums[row] = lanes.fma(lanes.splat(*q[row].as_ptr().add(e)), k, sums[row]);
            }
        }
    }
    // SAFETY: `LANE` has sixteen elements.
    let lane = unsafe { lanes.load(LANE.as_ptr()) };
    for row in 0..R {
        let visible = lanes.splat(seen[row].saturating_sub(start).min(PAGE) as f32);
        let score = lanes.mul(sums[row], scale);
        let score = lanes.select(lanes.lt(lane, visible), score, lanes.splat(f32::NEG_INFINITY));
        // SAFETY: a chunk of scores has room for a page from `at` on.
        unsafe { lanes.store(p[row].as_mut_ptr().add(at), score) };
    }
}

/// Turns the scores of a chunk into weights, relative to the new running maximum, and adds them to the
/// running total. Returns the factor by which what was summed before must be rescaled.
///
/// # Safety
/// `pages` pages of scores fit a chunk.
#[inline(always)]
unsafe fn weights<L: Lanes, const R: usize>(
    lanes: L,
    p: &mut [[f32; CHUNK]; R],
    pages: usize,
    max: &mut [f32; R],
    total: &mut [f32; R],
) -> [f32; R] {
    let mut factors = [1f32; R];
    for row in 0..R {
        let p = p[row].as_mut_ptr();
        // SAFETY: `pages` vectors lie in the row.
        unsafe {
            let mut greatest = lanes.load(p);
            for page in 1..pages {
                greatest = lanes.max(greatest, lanes.load(p.add(page * PAGE)));
            }
            let greatest = lanes.max_lane(greatest);
            let new = if greatest > max[row] { greatest } else { max[row] };
            let shift = lanes.splat(new);
            let mut sum = lanes.splat(0.0);
            for page in 0..pages {
                let at = p.add(page * PAGE);
                let weight = lanes.exp(lanes.sub(lanes.load(at), shift));
                lanes.store(at, weight);
                sum = lanes.add(sum, weight);
            }
            if new > max[row] {
                let mut factor = [0f32; LANES];
                lanes.store(factor.as_mut_ptr(), lanes.exp(lanes.splat(max[row] - new)));
                factors[row] = factor[0];
            }
            total[row] = total[row] * factors[row] + lanes.sum(sum);
            max[row] = new;
        }
    }
    factors
}

/// `sums[r] = sums[r] * factors[r] + Σ p[r][j] v[j]` over positions of a chunk, in sixteen columns from `at` on.
///
/// # Safety
/// The positions are in pages of `blocks`, behind which a vector may be read; the first begins the chunk.
#[inline(always)]
unsafe fn add_values<L: Lanes, const R: usize>(
    lanes: L,
    p: &[[f32; CHUNK]; R],
    blocks: &Blocks<'_>,
    positions: std::ops::Range<usize>,
    (head_dim, at): (usize, usize),
    factors: &[f32; R],
    sums: &mut [[f32; MAX_HEAD]; R],
) {
    let mut tile = [lanes.splat(0.0); R];
    for row in 0..R {
        // SAFETY: there are MAX_HEAD sums.
        let before = unsafe { lanes.load(sums[row].as_ptr().add(at)) };
        tile[row] = lanes.mul(before, lanes.splat(factors[row]));
    }
    for start in positions.clone().step_by(PAGE) {
        let v = blocks.v.wrapping_add(blocks.offset(start) + at);
        let weights = start - positions.start;
        for j in 0..PAGE.min(positions.end - start) {
            // SAFETY: a V page has sixteen rows of `head_dim`; the last vector may end behind it. There is a
            // weight for each position.
            unsafe {
                let v = lanes.load(v.add(j * head_dim));
                for row in 0..R {
                    let weight = lanes.splat(*p[row].as_ptr().add(weights + j));
                    tile[row] = lanes.fma(weight, v, tile[row]);
                }
            }
        }
    }
    for row in 0..R {
        // SAFETY: as above.
        unsafe { lanes.store(sums[row].as_mut_ptr().add(at), tile[row]) };
    }
}
