//! The core of attention: a tile of query rows against the keys and values of one head, in pages.

use super::super::lanes::{LANES, Lanes, Math};
use super::{CHUNK, MAX_HEAD, MAX_ROWS};
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

/// Query rows of one key head that are computed together.
pub(super) struct Tile {
    q: [*const f32; MAX_ROWS],
    out: [*mut f32; MAX_ROWS],
    /// How many positions each row sees, at least one.
    seen: [usize; MAX_ROWS],
    pub len: usize,
}

impl Tile {
    pub fn new() -> Self {
        Tile {
            q: [std::ptr::null(); MAX_ROWS],
            out: [std::ptr::null_mut(); MAX_ROWS],
            seen: [0; MAX_ROWS],
            len: 0,
        }
    }

    #[inline(always)]
    pub fn push(&mut self, q: *const f32, out: *mut f32, seen: usize) {
        (self.q[self.len], self.out[self.len], self.seen[self.len]) = (q, out, seen);
        self.len += 1;
    }

    /// Computes the rows and empties the tile.
    ///
    /// # Safety
    /// Each `q` and `out` has E elements; the pages of `blocks` hold as many positions as any row sees,
    /// and a vector may be read behind the last of them.
    #[inline(always)]
    pub unsafe fn flush<L: Lanes>(&mut self, lanes: L, blocks: &Blocks<'_>, head_dim: usize) {
        // SAFETY: the caller's obligations; a row that repeats the last one writes the same result.
        unsafe {
            match self.pad(L::TILE.0 / 3) {
                0 => {}
                1 => attend::<L, 1>(lanes, self, blocks, head_dim),
                2 => attend::<L, 2>(lanes, self, blocks, head_dim),
                4 => attend::<L, 4>(lanes, self, blocks, head_dim),
                6 => attend::<L, 6>(lanes, self, blocks, head_dim),
                8 => attend::<L, 8>(lanes, self, blocks, head_dim),
                _ => attend::<L, 12>(lanes, self, blocks, head_dim),
            }
        }
        self.len = 0;
    }

    /// Repeats the last row until there is a multiple of `step` (a single row stays alone), so that few
    /// heights need code. Returns the height.
    #[inline(always)]
    fn pad(&mut self, step: usize) -> usize {
        if self.len <= 1 {
            return self.len;
        }
        let last = self.len - 1;
        while !self.len.is_multiple_of(step) {
            self.push(self.q[last], self.out[last], self.seen[last]);
        }
        self.len
    }
}

/// The core: `R` query rows against the keys and values of one head.
///
/// # Safety
/// As for [`Tile::flush`], with `R` rows in the tile.
#[inline(always)]
unsafe fn attend<L: Lanes, const R: usize>(lanes: L, tile: &Tile, blocks: &Blocks<'_>, head_dim: usize) {
    let scale = lanes.splat(1.0 / (head_dim as f32).sqrt());
    let limit = tile.seen[..R].iter().copied().max().unwrap_or(0);
    let mut q = [[0f32; MAX_HEAD]; R];
    for (row, q) in q.iter_mut().enumerate() {
        // SAFETY: each query has `head_dim` elements.
        unsafe { std::ptr::copy_nonoverlapping(tile.q[row], q.as_mut_ptr(), head_dim) };
    }
    let mut p = [[0f32; CHUNK]; R];
    let mut sums = [[0f32; MAX_HEAD]; R];
    let mut max = [f32::NEG_INFINITY; R];
    let mut total = [0f32; R];
    for start in (0..limit).step_by(CHUNK) {
        let count = CHUNK.min(limit - start);
        // SAFETY: positions `start..start + count` are below what some row sees.
        unsafe {
            scores(lanes, &q, blocks, start..start + count, head_dim, scale, &tile.seen, &mut p);
            let factors = weights(lanes, &mut p, count.div_ceil(PAGE), &mut max, &mut total);
            add_values(lanes, &p, blocks, start..start + count, head_dim, &factors, &mut sums);
        }
    }
    for row in 0..R {
        let total = lanes.splat(total[row]);
        for at in (0..head_dim).step_by(LANES) {
            // SAFETY: `sums` has MAX_HEAD columns, and the output `head_dim`.
            unsafe {
                let y = lanes.div(lanes.load(sums[row].as_ptr().add(at)), total);
                // Adding zero makes -0 of a product that underflowed into the 0 that masked positions
                // would have made of it.
                let y = lanes.add(y, lanes.splat(0.0));
                lanes.store_first(tile.out[row].add(at), y, LANES.min(head_dim - at));
            }
        }
    }
}

/// `p[r][j] = q[r] · k[j] · scale` for a chunk of positions, and -inf where row r does not see j.
///
/// # Safety
/// The positions are in pages of `blocks`.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "the registers of one loop nest")]
unsafe fn scores<L: Lanes, const R: usize>(
    lanes: L,
    q: &[[f32; MAX_HEAD]; R],
    blocks: &Blocks<'_>,
    positions: std::ops::Range<usize>,
    head_dim: usize,
    scale: L::V,
    seen: &[usize; MAX_ROWS],
    p: &mut [[f32; CHUNK]; R],
) {
    const LANE: [f32; LANES] = [0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.];
    for start in positions.clone().step_by(PAGE) {
        let k = blocks.k.wrapping_add(blocks.offset(start));
        let mut sums = [lanes.splat(0.0); R];
        for e in 0..head_dim {
            // SAFETY: a K page has `head_dim` rows of sixteen.
            let k = unsafe { lanes.load(k.add(e * PAGE)) };
            for row in 0..R {
                sums[row] = lanes.fma(lanes.splat(q[row][e]), k, sums[row]);
            }
        }
        // SAFETY: `LANE` has sixteen elements.
        let lane = unsafe { lanes.load(LANE.as_ptr()) };
        for row in 0..R {
            let visible = lanes.splat(seen[row].saturating_sub(start).min(PAGE) as f32);
            let score = lanes.mul(sums[row], scale);
            let score = lanes.select(lanes.lt(lane, visible), score, lanes.splat(f32::NEG_INFINITY));
            // SAFETY: `start` is less than a chunk behind the chunk's first position.
            unsafe { lanes.store(p[row].as_mut_ptr().add(start - positions.start), score) };
        }
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

/// `sums[r] = sums[r] * factors[r] + Σ p[r][j] v[j]` over a chunk of positions.
///
/// # Safety
/// The positions are in pages of `blocks`, behind which a vector may be read.
#[inline(always)]
unsafe fn add_values<L: Lanes, const R: usize>(
    lanes: L,
    p: &[[f32; CHUNK]; R],
    blocks: &Blocks<'_>,
    positions: std::ops::Range<usize>,
    head_dim: usize,
    factors: &[f32; R],
    sums: &mut [[f32; MAX_HEAD]; R],
) {
    for at in (0..head_dim).step_by(LANES) {
        let mut tile = [lanes.splat(0.0); R];
        for row in 0..R {
            // SAFETY: `sums` has MAX_HEAD columns.
            let before = unsafe { lanes.load(sums[row].as_ptr().add(at)) };
            tile[row] = lanes.mul(before, lanes.splat(factors[row]));
        }
        for start in positions.clone().step_by(PAGE) {
            let v = blocks.v.wrapping_add(blocks.offset(start) + at);
            let weights = start - positions.start;
            // Only positions that some row sees: what lies behind them may be anything, even NaN.
            for j in 0..PAGE.min(positions.end - start) {
                // SAFETY: a V page has sixteen rows of `head_dim`; the last vector may end behind it.
                let v = unsafe { lanes.load(v.add(j * head_dim)) };
                for row in 0..R {
                    tile[row] = lanes.fma(lanes.splat(p[row][weights + j]), v, tile[row]);
                }
            }
        }
        for row in 0..R {
            // SAFETY: as above.
            unsafe { lanes.store(sums[row].as_mut_ptr().add(at), tile[row]) };
        }
    }
}
