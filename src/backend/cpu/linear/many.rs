//! The loop for many rows: a strip of W is unpacked once for all of them, and lanes run along outputs.

use super::super::lanes::{LANES, Lanes};
use super::super::panel::{LINE, Panel, RowGroup};
use super::super::pool::Worker;
use super::{GROUPS, K_BLOCK, Operand, PANEL, Product, ROW_BLOCK, STRIP, Strip, TILE_ROWS};
use std::ops::Range;
use std::sync::atomic::Ordering::Relaxed;

/// How many steps ahead of their use packed rows are asked for: they stream from an outer cache.
const PACKED_AHEAD: usize = 256;

impl Product<'_> {
    /// Computes strips until none is left.
    ///
    /// # Safety
    /// The product's operands were checked, and `worker` is one of those that all call this.
    #[inline(always)]
    pub(super) unsafe fn many<L: Lanes>(&self, lanes: L, worker: Worker<'_>) {
        let blocks = self.m.div_ceil(ROW_BLOCK);
        let rows = self.m.div_ceil(blocks).next_multiple_of(TILE_ROWS);
        for first in (0..self.m).step_by(rows) {
            let rows = first..self.m.min(first + rows);
            // SAFETY: the rows exist. Between the barriers the packed rows are only read.
            unsafe {
                self.pack(lanes, worker, &rows);
                worker.barrier();
                while let Some((index, strip)) = self.take_strip() {
                    // Threads that keep pace take strips by turns.
                    let next = index + worker.count;
                    let next = self.strip(if next < self.strips { next } else { index });
                    self.multiply(lanes, worker, &strip, &next, &rows);
                }
                worker.barrier();
            }
            if worker.index == 0 {
                // The others look at it after the next barrier.
                self.next.store(0, Relaxed);
            }
        }
    }

    /// Packs this worker's share of `rows` of x, then of u of each pair.
    ///
    /// # Safety
    /// The rows exist, and no worker reads the packed rows.
    #[inline(always)]
    unsafe fn pack<L: Lanes>(&self, lanes: L, worker: Worker<'_>, rows: &Range<usize>) {
        let mut at = self.workspace;
        for (x, _) in self.operands() {
            // SAFETY: the caller's obligations; the workspace has room for each operand behind the others.
            unsafe { self.pack_operand(lanes, worker, &x, rows, at) };
            at = at.wrapping_add(self.room(x.cols));
        }
    }

    /// Packs this worker's share of `rows` of one operand: by K-blocks, in them by partial sums, in those by
    /// tiles, `[step][height]` each.
    ///
    /// # Safety
    /// The rows exist, no worker reads the packed rows, and `to` has [`Product::room`] for the columns.
    #[inline(always)]
    unsafe fn pack_operand<L: Lanes>(
        &self,
        lanes: L,
        worker: Worker<'_>,
        x: &Operand,
        rows: &Range<usize>,
        to: *mut f32,
    ) {
        let padded = padded_rows::<L>(rows.len());
        let tiles = rows.len().div_ceil(L::TILE.0);
        for unit in worker.share(tiles * x.cols.div_ceil(K_BLOCK)) {
            let (start, tile) = (unit / tiles * K_BLOCK, unit % tiles * L::TILE.0);
            let count = K_BLOCK.min(x.cols - start);
            let steps = count.div_ceil(LANES);
            let at = to.wrapping_add(padded * start + tile * steps);
            let width = tile_height::<L>(rows.len() - tile);
            let panel = Panel { at, width, lane: padded * steps, step: width };
            let group = RowGroup::f32(x.row(rows.start + tile, 0), x.stride, self.m - rows.start - tile);
            // SAFETY: there are `padded` rows of room for the columns, and the units are disjoint.
            unsafe { group.unpack(lanes, start, count, steps * LANES, panel) }
        }
    }

    /// Rows of packed operands and of sums that there is room for.
    #[inline(always)]
    fn room_rows(&self) -> usize {
        self.m.min(ROW_BLOCK).next_multiple_of(TILE_ROWS)
    }

    /// Floats that an operand of so many columns takes up when packed.
    #[inline(always)]
    fn room(&self, cols: usize) -> usize {
        self.room_rows() * cols.next_multiple_of(LANES)
    }

    /// One strip for a block of packed rows. Asks for the one that this worker probably takes next.
    ///
    /// # Safety
    /// The rows are packed, and the strip was taken.
    #[inline(always)]
    unsafe fn multiply<L: Lanes>(
        &self,
        lanes: L,
        worker: Worker<'_>,
        strip: &Strip<'_>,
        next: &Strip<'_>,
        rows: &Range<usize>,
    ) {
        let packed = self.operands().map(|(x, _)| self.room(x.cols)).sum::<usize>();
        let own = packed + worker.index * (GROUPS * PANEL + self.room_rows() * STRIP);
        let panels = self.workspace.wrapping_add(own);
        let sums = panels.wrapping_add(GROUPS * PANEL);
        let mut at = self.workspace.cast_const();
        for (x, pair) in self.operands() {
            // SAFETY: the caller's obligations. `pack` has put the operands one behind the other.
            unsafe {
                match pair {
                    None => {
                        let groups = (&strip.groups, &next.groups);
                        self.add_block::<L, GROUPS>(lanes, groups, x.cols, rows, (at, panels, sums), true)
                    }
                    Some((layer, pair)) => {
                        for g in (0..GROUPS).filter(|g| strip.indices[*g] == layer && strip.widths[*g] > 0) {
                            let group = [RowGroup::new(&pair.b, strip.rows[g])];
                            let at = (at, panels, sums.wrapping_add(g * LANES));
                            self.add_block::<L, 1>(lanes, (&group, &group), x.cols, rows, at, false);
                        }
                    }
                }
            }
            at = at.wrapping_add(self.room(x.cols));
        }
        for row in 0..rows.len() {
            // SAFETY: every row of the block has its sums by now.
            unsafe {
                let found = std::array::from_fn(|g| lanes.load(sums.add(row * STRIP + g * LANES)));
                self.finish(lanes, strip, rows.start + row, found);
            }
        }
    }

    /// Adds the products of packed rows with one or two groups of `cols` columns to their sums, or begins
    /// them. The addresses are those of the packed rows, of this worker's panels and of its sums. The next groups are
    /// asked for meanwhile, a few lines with each tile: nothing hides that they come from memory when they are unpacked
    /// (with 577 rows and 1024 inputs that is 1 % on two cores of a Zen 4).
    ///
    /// # Safety
    /// The rows are packed there, the groups have the columns, and panels and sums have room.
    #[inline(always)]
    unsafe fn add_block<L: Lanes, const G: usize>(
        &self,
        lanes: L,
        (groups, next): (&[RowGroup; G], &[RowGroup; G]),
        cols: usize,
        rows: &Range<usize>,
        (packed, panels, sums): (*const f32, *mut f32, *mut f32),
        begin: bool,
    ) {
        let padded = padded_rows::<L>(rows.len());
        for start in (0..cols).step_by(K_BLOCK) {
            let count = K_BLOCK.min(cols - start);
            let steps = count.div_ceil(LANES);
            for (g, group) in groups.iter().enumerate() {
                let at = panels.wrapping_add(g * PANEL);
                let panel = Panel { at, width: LANES, lane: steps * LANES, step: LANES };
                // SAFETY: the columns exist, and this worker's panels have room for a K-block.
                unsafe { group.unpack(lanes, start, count, steps * LANES, panel) }
            }
            // What is unpacked after this: the next K-block, or the first of the next strip.
            let (ahead, at) = if start + K_BLOCK < cols { (groups, start + K_BLOCK) } else { (next, 0) };
            let (size, tiles) = (ahead[0].dtype.size(), rows.len().div_ceil(L::TILE.0));
            let lines = (K_BLOCK.min(cols - at) * size).div_ceil(LINE);
            let part = |tile: usize| lines * (tile / L::TILE.0) / tiles;
            for lane in 0..LANES {
                let packed = packed.wrapping_add(padded * (start + lane * steps));
                let panels = panels.wrapping_add(lane * steps * LANES);
                for tile in (0..rows.len()).step_by(L::TILE.0) {
                    let (packed, sums) = (packed.wrapping_add(tile * steps), sums.wrapping_add(tile * STRIP));
                    for group in ahead {
                        group.prefetch(lanes, (lane, at * size), part(tile)..part(tile + L::TILE.0));
                    }
                    let height = tile_height::<L>(rows.len() - tile);
                    let first = begin && start + lane == 0;
                    // SAFETY: packed rows and panels have `steps` steps for each partial sum, and this
                    // worker's sums a row for each packed row.
                    unsafe { multiply_tile::<L, G>(lanes, height, steps, packed, panels, sums, first) }
                }
            }
        }
    }
}

/// The height of the next tile when so many rows are left: full, or rounded up to a third.
#[inline(always)]
fn tile_height<L: Lanes>(rows: usize) -> usize {
    rows.next_multiple_of(L::TILE.0 / 3).min(L::TILE.0)
}

/// The rows that `rows` take up when packed.
#[inline(always)]
fn padded_rows<L: Lanes>(rows: usize) -> usize {
    let whole = rows / L::TILE.0 * L::TILE.0;
    whole + tile_height::<L>(rows - whole)
}

/// Adds `packed[count][height]` times `G` panels `[count][16]` to as many sixteens of `sums[height][32]`,
/// or, for the very first partial sum, begins them.
///
/// # Safety
/// The operands have those extents, and `height` is one of [`tile_height`]'s.
#[inline(always)]
unsafe fn multiply_tile<L: Lanes, const G: usize>(
    lanes: L,
    height: usize,
    count: usize,
    packed: *const f32,
    panels: *const f32,
    sums: *mut f32,
    first: bool,
) {
    // SAFETY: the caller's obligations; each tile is `height` rows by one or two groups.
    unsafe {
        if L::TILE == (12, 2) {
            match height {
                12 => tile::<L, 12, G>(lanes, count, packed, panels, sums, first),
                8 => tile::<L, 8, G>(lanes, count, packed, panels, sums, first),
                _ => tile::<L, 4, G>(lanes, count, packed, panels, sums, first),
            }
        } else {
            for g in 0..G {
                let (panel, sums) = (panels.add(g * PANEL), sums.add(g * LANES));
                match height {
                    6 => tile::<L, 6, 1>(lanes, count, packed, panel, sums, first),
                    4 => tile::<L, 4, 1>(lanes, count, packed, panel, sums, first),
                    _ => tile::<L, 2, 1>(lanes, count, packed, panel, sums, first),
                }
            }
        }
    }
}

/// The register tile: `R` rows by `G` groups of sums.
///
/// # Safety
/// As [`multiply_tile`], with `R` rows and `G` groups.
#[inline(always)]
unsafe fn tile<L: Lanes, const R: usize, const G: usize>(
    lanes: L,
    count: usize,
    packed: *const f32,
    panels: *const f32,
    sums: *mut f32,
    first: bool,
) {
    let mut tile = [[lanes.splat(0.0); G]; R];
    for k in 0..count {
        // SAFETY: `k < count`; the caller vouches for the extents.
        unsafe {
            let w: [L::V; G] = std::array::from_fn(|g| lanes.load(panels.add(g * PANEL + k * LANES)));
            lanes.prefetch(packed.wrapping_add((k + PACKED_AHEAD) * R).cast());
            for row in 0..R {
                let x = lanes.splat(*packed.add(k * R + row));
                for g in 0..G {
                    tile[row][g] = lanes.fma(x, w[g], tile[row][g]);
                }
            }
        }
    }
    for row in 0..R {
        for g in 0..G {
            // SAFETY: `sums` has a row of 32 for each of the `R` rows.
            unsafe {
                let at = sums.add(row * STRIP + g * LANES);
                let sum = if first { tile[row][g] } else { lanes.add(lanes.load(at), tile[row][g]) };
                lanes.store(at, sum);
            }
        }
    }
}
