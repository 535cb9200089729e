//! The core of attention: tiles of query rows against the keys and values of one head, in pages.
//!
//! Registers hold the sums of one tile, [`Lanes::TILE`] rows. Several tiles take their turns at each page of keys
//! and each column of values: those come from the second-level cache once for [`ROWS`] rows, where a tile at a
//! time asked 11 bytes a cycle of it.

use super::super::lanes::{LANES, Lanes, Math};
use super::{CHUNK, MAX_HEAD, ROWS};
use crate::op::PAGE;
use std::ops::Range;

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
    /// Columns of the head, E.
    pub head_dim: usize,
}

impl Blocks<'_> {
    /// The keys and the values of the page that holds position `at`.
    #[inline(always)]
    fn page(&self, at: usize) -> (*const f32, *const f32) {
        let page = at / PAGE;
        let offset = self.stride * self.table.map_or(page, |table| table[page] as usize);
        (self.k.wrapping_add(offset), self.v.wrapping_add(offset))
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
    pub unsafe fn flush<L: Lanes>(&mut self, lanes: L, blocks: &Blocks<'_>) {
        let height = L::TILE.0;
        // SAFETY: the caller's obligations; a row that repeats the last one writes the same result.
        unsafe {
            match (self.len, height) {
                (ROWS, 12) => attend::<L, 12, 2, 2, 2>(lanes, self, 0, blocks),
                (ROWS, _) => attend::<L, 6, 1, 1, 4>(lanes, self, 0, blocks),
                (len, _) => {
                    for first in (0..len).step_by(height) {
                        // The height is a constant: only the arms of one remain.
                        match (height, self.pad(first, height)) {
                            (12, 1) => attend::<L, 1, 4, 8, 1>(lanes, self, first, blocks),
                            (12, 4) => attend::<L, 4, 2, 2, 1>(lanes, self, first, blocks),
                            (12, 8) => attend::<L, 8, 2, 2, 1>(lanes, self, first, blocks),
                            (12, _) => attend::<L, 12, 2, 2, 1>(lanes, self, first, blocks),
                            (_, 1) => attend::<L, 1, 4, 4, 1>(lanes, self, first, blocks),
                            (_, 2) => attend::<L, 2, 2, 2, 1>(lanes, self, first, blocks),
                            (_, 4) => attend::<L, 4, 1, 1, 1>(lanes, self, first, blocks),
                            _ => attend::<L, 6, 1, 1, 1>(lanes, self, first, blocks),
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

/// The core: `T` tiles of `R` query rows, from row `first` on, against the keys and values of one head, `G` pages
/// of keys and `C` vectors of values at a time. More than one of them are chains of multiply-adds that hide each
/// other's latency where rows are too few for that: a single row reads 24 GB/s of keys and values, and read 17 (two
/// cores of a Zen 4, whose memory gives 30).
///
/// # Safety
/// As for [`Queries::flush`]; there are so many rows.
#[inline(always)]
unsafe fn attend<L: Lanes, const R: usize, const G: usize, const C: usize, const T: usize>(
    lanes: L,
    rows: &Queries,
    first: usize,
    blocks: &Blocks<'_>,
) {
    let mut tiles = [const { Tile::<R>::NONE }; T];
    let mut limits = [0; T];
    for tile in 0..T {
        // SAFETY: there are the rows.
        unsafe { tiles[tile].take(rows, first + tile * R, blocks.head_dim) };
        limits[tile] = tiles[tile].limit();
    }
    let limit = limits.into_iter().max().unwrap_or(0);
    // A lone tile reads keys and values from memory, once.
    let ahead = if T == 1 { limit } else { 0 };
    for start in (0..limit).step_by(CHUNK) {
        let count = CHUNK.min(limit - start);
        // SAFETY: positions `start..start + count` are below what some row sees.
        unsafe {
            for at in (0..count).step_by(G * PAGE) {
                let keys = start + at..start + count;
                // 577 rows end in a page of their own.
                let alone = keys.len() <= PAGE;
                for tile in &mut tiles {
                    match alone {
                        true => tile.scores::<L, 1>(lanes, blocks, keys.clone(), ahead),
                        false => tile.scores::<L, G>(lanes, blocks, keys.clone(), ahead),
                    }
                }
            }
            for tile in &mut tiles {
                tile.weights(lanes, count.div_ceil(PAGE));
            }
            for at in (0..blocks.head_dim).step_by(C * LANES) {
                for (tile, limit) in tiles.iter_mut().zip(limits) {
                    // Only positions that some row sees: what lies behind them may be anything, even NaN.
                    let seen = start..limit.clamp(start, start + count);
                    tile.add_values::<L, C>(lanes, blocks, seen, at, ahead);
                }
            }
        }
    }
    for (i, tile) in tiles.iter().enumerate() {
        for row in 0..R {
            // SAFETY: each output has `head_dim` columns.
            unsafe { tile.write(lanes, row, rows.out[first + i * R + row], blocks.head_dim) };
        }
    }
}

/// `R` rows of one head, and what has been found for them.
struct Tile<const R: usize> {
    q: [[f32; MAX_HEAD]; R],
    /// E^-1/2.
    scale: f32,
    /// How many positions each row sees.
    seen: [usize; R],
    /// The scores of a chunk, later its weights.
    p: [[f32; CHUNK]; R],
    max: [f32; R],
    total: [f32; R],
    /// By what sums of earlier chunks must be multiplied.
    factors: [f32; R],
    sums: [[f32; MAX_HEAD]; R],
}

impl<const R: usize> Tile<R> {
    /// No rows yet. All of it is zero, for it is cleared where it lies; what is made elsewhere and moved there costs
    /// a tenth of attention.
    const NONE: Self = Tile {
        q: [[0.0; MAX_HEAD]; R],
        scale: 0.0,
        seen: [0; R],
        p: [[0.0; CHUNK]; R],
        max: [0.0; R],
        total: [0.0; R],
        factors: [0.0; R],
        sums: [[0.0; MAX_HEAD]; R],
    };

    /// Takes the rows from `first` on.
    ///
    /// # Safety
    /// They are there, and each query has `head_dim` elements.
    #[inline(always)]
    unsafe fn take(&mut self, rows: &Queries, first: usize, head_dim: usize) {
        for row in 0..R {
            // SAFETY: the caller's obligation.
            unsafe { std::ptr::copy_nonoverlapping(rows.q[first + row], self.q[row].as_mut_ptr(), head_dim) };
            self.seen[row] = rows.seen[first + row];
            self.max[row] = f32::NEG_INFINITY;
        }
        self.scale = 1.0 / (head_dim as f32).sqrt();
    }

    /// How many positions some row sees.
    #[inline(always)]
    fn limit(&self) -> usize {
        self.seen.into_iter().max().unwrap_or(0)
    }

    /// `p[r][j] = q[r] · k[j] · scale` for positions of a chunk, at most `G` pages of them, and -inf where row r
    /// does not see j. If positions up to `ahead` are to come, asks for the values of these.
    ///
    /// # Safety
    /// The first position begins a page of `blocks`, and all are in pages.
    #[inline(always)]
    unsafe fn scores<L: Lanes, const G: usize>(
        &mut self,
        lanes: L,
        blocks: &Blocks<'_>,
        positions: Range<usize>,
        ahead: usize,
    ) {
        const LANE: [f32; LANES] = [0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.];
        let start = positions.start;
        // A page that is not there repeats the first; nobody reads its scores.
        let there = |g: usize| if start + g * PAGE < positions.end { start + g * PAGE } else { start };
        let pages: [_; G] = std::array::from_fn(|g| blocks.page(there(g)));
        let mut sums = [[lanes.splat(0.0); G]; R];
        let seen_at_all = self.seen.iter().any(|&seen| seen > start);
        for e in 0..if seen_at_all { blocks.head_dim } else { 0 } {
            // SAFETY: a K page has `head_dim` rows of sixteen, a query as many elements. Indexed with checks, all
            // rows are read before the first multiplication, and the tile no longer fits the registers.
            unsafe {
                if ahead > 0 {
                    pages.iter().for_each(|(_, v)| lanes.prefetch(v.wrapping_add(e * PAGE).cast()));
                }
                let k = pages.map(|(k, _)| lanes.load(k.add(e * PAGE)));
                for row in 0..R {
                    let q = lanes.splat(*self.q[row].as_ptr().add(e));
                    for g in 0..G {
                        sums[row][g] = lanes.fma(q, k[g], sums[row][g]);
                    }
                }
            }
        }
        // SAFETY: `LANE` has sixteen elements.
        let lane = unsafe { lanes.load(LANE.as_ptr()) };
        let scale = lanes.splat(self.scale);
        let all_seen = self.seen.iter().all(|&seen| seen >= start + G * PAGE);
        for row in 0..R {
            for g in 0..G {
                let mut score = lanes.mul(sums[row][g], scale);
                if !all_seen {
                    let visible = self.seen[row].saturating_sub(start + g * PAGE).min(PAGE);
                    let visible = lanes.lt(lane, lanes.splat(visible as f32));
                    score = lanes.select(visible, score, lanes.splat(f32::NEG_INFINITY));
                }
                // SAFETY: `G` divides the pages of a chunk, so it has room for that many from here on.
                unsafe { lanes.store(self.p[row].as_mut_ptr().add(start % CHUNK + g * PAGE), score) };
            }
        }
    }

    /// Turns the scores of a chunk into weights, relative to the new running maximum, and adds them to the
    /// running total.
    ///
    /// # Safety
    /// `pages` pages of scores fit a chunk.
    #[inline(always)]
    unsafe fn weights<L: Lanes>(&mut self, lanes: L, pages: usize) {
        // By how much each row's maximum rises: one exponential makes the factors of all.
        let mut fallen = [0f32; LANES];
        for row in 0..R {
            let p = self.p[row].as_ptr();
            // SAFETY: `pages` vectors lie in the row.
            let greatest = unsafe {
                let mut greatest = lanes.load(p);
                for page in 1..pages {
                    greatest = lanes.max(greatest, lanes.load(p.add(page * PAGE)));
                }
                lanes.max_lane(greatest)
            };
            if greatest > self.max[row] {
                fallen[row] = self.max[row] - greatest;
                self.max[row] = greatest;
            }
        }
        let mut factors = [1f32; LANES];
        // SAFETY: both have sixteen elements; e^0 is 1.
        unsafe { lanes.store(factors.as_mut_ptr(), lanes.exp_nonpositive(lanes.load(fallen.as_ptr()))) };
        for row in 0..R {
            let (p, shift) = (self.p[row].as_mut_ptr(), lanes.splat(self.max[row]));
            let mut sum = lanes.splat(0.0);
            for page in 0..pages {
                // SAFETY: as above.
                unsafe {
                    let at = p.add(page * PAGE);
                    let weight = lanes.exp_nonpositive(lanes.sub(lanes.load(at), shift));
                    lanes.store(at, weight);
                    sum = lanes.add(sum, weight);
                }
            }
            self.factors[row] = factors[row];
            self.total[row] = self.total[row] * factors[row] + lanes.sum(sum);
        }
    }

    /// `sums[r] = sums[r] * factors[r] + Σ p[r][j] v[j]` over positions of a chunk, in `C` times sixteen columns
    /// from `at` on. If there are keys of the next chunk before position `ahead`, asks for them.
    ///
    /// # Safety
    /// The positions are in pages of `blocks`, behind which a vector may be read; the first begins the chunk.
    #[inline(always)]
    unsafe fn add_values<L: Lanes, const C: usize>(
        &mut self,
        lanes: L,
        blocks: &Blocks<'_>,
        positions: Range<usize>,
        at: usize,
        ahead: usize,
    ) {
        let mut tile = [[lanes.splat(0.0); C]; R];
        for row in 0..R {
            for c in 0..C {
                // SAFETY: `C` divides the eight vectors of MAX_HEAD sums.
                let before = unsafe { lanes.load(self.sums[row].as_ptr().add(at + c * LANES)) };
                tile[row][c] = lanes.mul(before, lanes.splat(self.factors[row]));
            }
        }
        // Columns that are not there repeat the first; nobody reads their sums.
        let head_dim = blocks.head_dim;
        let there = |c: usize| if at + c * LANES < head_dim { at + c * LANES } else { at };
        for start in positions.clone().step_by(PAGE) {
            let (_, v) = blocks.page(start);
            let next = (start + CHUNK < ahead).then(|| blocks.page(start + CHUNK).0);
            let weights = start - positions.start;
            for j in 0..PAGE.min(positions.end - start) {
                // SAFETY: a V page has sixteen rows of `head_dim`; the last vector may end behind it. There is a
                // weight for each position.
                unsafe {
                    if let Some(k) = next {
                        (0..C).for_each(|c| lanes.prefetch(k.wrapping_add(j * head_dim + there(c)).cast()));
                    }
                    let v: [_; C] = std::array::from_fn(|c| lanes.load(v.add(j * head_dim + there(c))));
                    for row in 0..R {
                        let weight = lanes.splat(*self.p[row].as_ptr().add(weights + j));
                        for c in 0..C {
                            tile[row][c] = lanes.fma(weight, v[c], tile[row][c]);
                        }
                    }
                }
            }
        }
        for row in 0..R {
            for c in 0..C {
                // SAFETY: as above.
                unsafe { lanes.store(self.sums[row].as_mut_ptr().add(at + c * LANES), tile[row][c]) };
            }
        }
    }

    /// Writes a row's result.
    ///
    /// # Safety
    /// `out` has `head_dim` elements.
    #[inline(always)]
    unsafe fn write<L: Lanes>(&self, lanes: L, row: usize, out: *mut f32, head_dim: usize) {
        let total = lanes.splat(self.total[row]);
        for at in (0..head_dim).step_by(LANES) {
            // SAFETY: there are MAX_HEAD sums; the output is the caller's obligation.
            unsafe {
                let y = lanes.div(lanes.load(self.sums[row].as_ptr().add(at)), total);
                // Adding zero makes -0 of a product that underflowed into the 0 that masked positions would
                // have made of it.
                let y = lanes.add(y, lanes.splat(0.0));
                lanes.store_first(out.add(at), y, LANES.min(head_dim - at));
            }
        }
    }
}
