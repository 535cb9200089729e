//! Attention: one core over keys and values in pages, and two callers. A vision tower packs an image's
//! keys and values into pages of its own first; a language model has them in the KV cache already.
//!
//! **Reduction order.** For one query row and head: a score is a chain of fused multiply-adds over the
//! E dimensions, times E^-1/2. Keys are taken in chunks of [`CHUNK`] at absolute positions. A chunk
//! raises the running maximum, rescales sum and result by one factor, adds its weights (sixteen partial
//! sums, then a tree) and its weighted values (a chain of fused multiply-adds, position ascending).
//! Nothing depends on the other rows of a tile: a chunk that a row does not see at all multiplies by
//! exp(0) = 1 and adds zeros, which changes no bit.

use super::lanes::{LANES, Lanes, Math};
use super::machine::{Machine, Task};
use super::panel::{Matrix, Panel, RowGroup};
use super::pool::Worker;
use crate::op::PAGE;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// Positions between two updates of the running maximum. Part of the reduction order.
pub const CHUNK: usize = 64;
/// The largest head.
const MAX_HEAD: usize = 128;
/// The tallest tile of query rows.
const MAX_ROWS: usize = 12;

// A vector of scores is a page.
const _: () = assert!(PAGE == LANES && CHUNK.is_multiple_of(PAGE));

/// Bytes of workspace that [`dense`] needs for images of `rows` rows.
pub fn dense_workspace(rows: usize, heads: usize, head_dim: usize) -> usize {
    // A vector that begins in the last row of the last page may end behind it.
    (2 * heads * rows.div_ceil(PAGE) * PAGE * head_dim + LANES) * size_of::<f32>()
}

/// The dimensions of an attention op.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    /// Query heads, H.
    pub heads: usize,
    /// Key and value heads, K, a divisor of H.
    pub kv_heads: usize,
    /// Columns of a head, E: a multiple of 8 up to 128.
    pub head_dim: usize,
}

impl Heads {
    fn check(&self) {
        let Heads { heads, kv_heads, head_dim } = *self;
        assert!(kv_heads > 0 && heads.is_multiple_of(kv_heads), "attention: {heads} heads over {kv_heads}");
        assert!(head_dim.is_multiple_of(8) && (8..=MAX_HEAD).contains(&head_dim), "attention: {head_dim}");
    }
}

/// The operands of paged attention.
#[derive(Clone, Copy, Debug)]
pub struct Paged<'a> {
    /// Rotated queries `[T, H*E]`.
    pub q: &'a [f32],
    /// The position of each row; it sees all positions up to its own.
    pub positions: &'a [i32],
    /// Where each row's page table begins in `tables`.
    pub starts: &'a [i32],
    /// Page tables end to end.
    pub tables: &'a [i32],
    /// K pages `[pages, K, E, PAGE]`.
    pub k: &'a [f32],
    /// V pages `[pages, K, PAGE, E]`.
    pub v: &'a [f32],
}

/// `out[t] = softmax(q[t] kᵀ / √E) v` over the pages of each row's sequence, `[T, H*E]`.
///
/// # Panics
/// If shapes, positions or page tables do not fit together.
pub fn paged(machine: &Machine, heads: Heads, operands: Paged<'_>, out: &mut [f32]) {
    heads.check();
    let Paged { q, positions, starts, tables, k, v } = operands;
    let page = heads.kv_heads * heads.head_dim * PAGE;
    let pages = k.len() / page;
    assert!(v.len() == k.len() && k.len() == pages * page, "paged attention: KV pages");
    assert!(q.len() == positions.len() * heads.heads * heads.head_dim && out.len() == q.len());
    assert_eq!(starts.len(), positions.len(), "paged attention: page tables");
    for (&position, &start) in positions.iter().zip(starts) {
        let last = start as usize + position as usize / PAGE;
        assert!(position >= 0 && start >= 0 && last < tables.len(), "paged attention: position {position}");
    }
    assert!(tables.iter().all(|&p| p >= 0 && (p as usize) < pages), "paged attention: a page of {pages}");
    machine.run(&PagedTask { heads, operands, page, out: out.as_mut_ptr(), next: AtomicUsize::new(0) });
}

/// Attention within each image of `rows` rows, over fused `[q | k | v]` rows `[images*rows, 3*H*E]`.
/// With `causal`, a row sees only itself and the rows before it.
///
/// # Panics
/// If shapes or the workspace do not fit.
pub fn dense(
    machine: &Machine,
    heads: Heads,
    qkv: &[f32],
    (rows, causal): (usize, bool),
    out: &mut [f32],
    workspace: &mut [u8],
) {
    heads.check();
    let width = heads.heads * heads.head_dim;
    assert!(heads.heads == heads.kv_heads && rows > 0 && qkv.len() == 3 * out.len());
    assert!(out.len().is_multiple_of(rows * width), "attention: images of {rows} rows");
    assert!(workspace.len() >= dense_workspace(rows, heads.heads, heads.head_dim), "attention: workspace");
    let packed: *mut f32 = workspace.as_mut_ptr().cast();
    assert!(packed.is_aligned(), "attention: workspace");
    for (qkv, out) in qkv.chunks_exact(3 * rows * width).zip(out.chunks_exact_mut(rows * width)) {
        let out = out.as_mut_ptr();
        machine.run(&DenseTask { heads, qkv, rows, causal, out, packed, next: AtomicUsize::new(0) });
    }
}

/// Keys and values of one head.
#[derive(Clone, Copy)]
struct Blocks<'a> {
    /// Of page 0: `[E, PAGE]`.
    k: *const f32,
    /// Of page 0: `[PAGE, E]`.
    v: *const f32,
    /// Floats from one page to the next.
    stride: usize,
    /// Which pages hold the positions in order; in an image they are in order themselves.
    table: Option<&'a [i32]>,
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
struct Tile {
    q: [*const f32; MAX_ROWS],
    out: [*mut f32; MAX_ROWS],
    /// How many positions each row sees, at least one.
    seen: [usize; MAX_ROWS],
    len: usize,
}

impl Tile {
    fn new() -> Self {
        Tile {
            q: [std::ptr::null(); MAX_ROWS],
            out: [std::ptr::null_mut(); MAX_ROWS],
            seen: [0; MAX_ROWS],
            len: 0,
        }
    }

    #[inline(always)]
    fn push(&mut self, q: *const f32, out: *mut f32, seen: usize) {
        (self.q[self.len], self.out[self.len], self.seen[self.len]) = (q, out, seen);
        self.len += 1;
    }

    /// Computes the rows and empties the tile.
    ///
    /// # Safety
    /// Each `q` and `out` has E elements; the pages of `blocks` hold as many positions as any row sees,
    /// and a vector may be read behind the last of them.
    #[inline(always)]
    unsafe fn flush<L: Lanes>(&mut self, lanes: L, blocks: &Blocks<'_>, head_dim: usize) {
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

/// Paged attention, cut into (block of rows, key head).
struct PagedTask<'a> {
    heads: Heads,
    operands: Paged<'a>,
    /// Floats in a page of all heads.
    page: usize,
    out: *mut f32,
    next: AtomicUsize,
}

// SAFETY: workers write the outputs of disjoint (row, head) pairs; all else is only read.
unsafe impl Sync for PagedTask<'_> {}

impl Task for PagedTask<'_> {
    #[inline(always)]
    fn run<L: Lanes>(&self, lanes: L, _: Worker<'_>) {
        let Heads { heads, kv_heads, head_dim } = self.heads;
        let Paged { q, positions, starts, tables, k, v } = self.operands;
        // The query heads that share a key head fill a tile together with neighbouring rows.
        let group = heads / kv_heads;
        let block = (L::TILE.0 / group).max(1);
        let blocks = positions.len().div_ceil(block);
        loop {
            let unit = self.next.fetch_add(1, Relaxed);
            if unit >= blocks * kv_heads {
                return;
            }
            let (kv_head, first) = (unit / blocks, unit % blocks * block);
            let offset = kv_head * head_dim * PAGE;
            let mut tile = Tile::new();
            let mut of = None;
            for row in first..positions.len().min(first + block) {
                let (start, seen) = (starts[row] as usize, positions[row] as usize + 1);
                let pages = Blocks {
                    k: k[offset..].as_ptr(),
                    v: v[offset..].as_ptr(),
                    stride: self.page,
                    table: Some(&tables[start..]),
                };
                for head in kv_head * group..(kv_head + 1) * group {
                    // A tile is of one sequence.
                    if tile.len == L::TILE.0 || of != Some(start) {
                        // SAFETY: `paged` has checked every row's pages; the pool ends in a spare vector.
                        unsafe {
                            tile.flush(
                                lanes,
                                &Blocks { table: of.map(|of| &tables[of..]), ..pages },
                                head_dim,
                            )
                        };
                        of = Some(start);
                    }
                    let at = (row * heads + head) * head_dim;
                    tile.push(q[at..].as_ptr(), self.out.wrapping_add(at), seen);
                }
            }
            let table = of.map(|of| &tables[of..]);
            let pages = Blocks { k: k[offset..].as_ptr(), v: v[offset..].as_ptr(), stride: self.page, table };
            // SAFETY: as above.
            unsafe { tile.flush(lanes, &pages, head_dim) };
        }
    }
}

/// Attention within one image: pack keys and values, then (tile of rows, head).
struct DenseTask<'a> {
    heads: Heads,
    qkv: &'a [f32],
    rows: usize,
    causal: bool,
    out: *mut f32,
    packed: *mut f32,
    next: AtomicUsize,
}

// SAFETY: workers pack disjoint pages, meet at a barrier, then write disjoint (row, head) outputs.
unsafe impl Sync for DenseTask<'_> {}

impl Task for DenseTask<'_> {
    #[inline(always)]
    fn run<L: Lanes>(&self, lanes: L, worker: Worker<'_>) {
        let Heads { heads, head_dim, .. } = self.heads;
        let (width, pages) = (heads * head_dim, self.rows.div_ceil(PAGE));
        let page = head_dim * PAGE;
        for unit in worker.share(heads * pages) {
            self.pack(lanes, unit / pages, unit % pages);
        }
        worker.barrier();
        let tiles = self.rows.div_ceil(L::TILE.0);
        loop {
            let unit = self.next.fetch_add(1, Relaxed);
            if unit >= tiles * heads {
                return;
            }
            let (head, first) = (unit / tiles, unit % tiles * L::TILE.0);
            let k = self.packed.wrapping_add(head * pages * page);
            let blocks = Blocks { k, v: k.wrapping_add(heads * pages * page), stride: page, table: None };
            let mut tile = Tile::new();
            for row in first..self.rows.min(first + L::TILE.0) {
                let seen = if self.causal { row + 1 } else { self.rows };
                let q = self.qkv[row * 3 * width + head * head_dim..].as_ptr();
                tile.push(q, self.out.wrapping_add(row * width + head * head_dim), seen);
            }
            // SAFETY: every page of this head is packed, and the workspace ends in a spare vector.
            unsafe { tile.flush(lanes, &blocks, head_dim) };
        }
    }
}

impl DenseTask<'_> {
    /// Packs one page of one head's keys, transposed, and values.
    #[inline(always)]
    fn pack<L: Lanes>(&self, lanes: L, head: usize, page: usize) {
        let Heads { heads, head_dim, .. } = self.heads;
        let (width, pages) = (heads * head_dim, self.rows.div_ceil(PAGE));
        let (first, size) = (page * PAGE, head_dim * PAGE);
        let k = self.packed.wrapping_add((head * pages + page) * size);
        let v = k.wrapping_add(heads * pages * size);
        let column = width + head * head_dim;
        let rows = RowGroup::new(&Matrix::f32(self.qkv, self.rows, 3 * width), first);
        // SAFETY: the columns are this head's keys, and `k` has room for a page; `v` likewise, in the
        // second half of the workspace.
        unsafe {
            let panel = Panel { at: k, width: PAGE, lane: PAGE, step: PAGE * LANES };
            rows.unpack(lanes, column, head_dim, head_dim, panel);
            for row in first..self.rows.min(first + PAGE) {
                let from = self.qkv[row * 3 * width + width + column..].as_ptr();
                std::ptr::copy_nonoverlapping(from, v.add((row - first) * head_dim), head_dim);
            }
        }
    }
}
