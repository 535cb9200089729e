//! The loop for many rows: a strip of W is unpacked once for all of them, and lanes run along outputs.

use super::super::lanes::{LANES, Lanes};
use super::super::panel::{Matrix, Panel, RowGroup};
use super::super::pool::Worker;
use super::{GROUPS, K_BLOCK, PANEL, Product, ROW_BLOCK, STRIP, Strip, TILE_ROWS};
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
                while let Some(strip) = self.take_strip() {
                    self.multiply(lanes, worker, &strip, &rows);
                }
                worker.barrier();
            }
            if worker.index == 0 {
                // The others look at it after the next barrier.
                self.next.store(0, Relaxed);
            }
        }
    }

    /// Packs this worker's share of `rows` of x: by K-blocks, in them by partial sums, in those by tiles,
    /// `[step][height]` each.
    ///
    /// # Safety
    /// The rows exist, and no worker reads the packed rows.
    #[inline(always)]
    unsafe fn pack<L: Lanes>(&self, lanes: L, worker: Worker<'_>, rows: &Range<usize>) {
        // SAFETY: x has m rows of k elements, and lives as long as the product.
        let x = unsafe { std::slice::from_raw_parts(self.x, self.m * self.k) };
        let x = Matrix::f32(x, self.m, self.k);
        let padded = padded_rows::<L>(rows.len());
        let tiles = rows.len().div_ceil(L::TILE.0);
        for unit in worker.share(tiles * self.k.div_ceil(K_BLOCK)) {
            let (start, tile) = (unit / tiles * K_BLOCK, unit % tiles * L::TILE.0);
            let count = K_BLOCK.min(self.k - start);
            let steps = count.div_ceil(LANES);
            let at = self.workspace.wrapping_add(padded * start + tile * steps);
            let width = tile_height::<L>(rows.len() - tile);
            let panel = Panel { at, width, lane: padded * steps, step: width };
            let group = RowGroup::new(&x, rows.start + tile);
            // SAFETY: the workspace holds `padded` rows of k columns here, and the units are disjoint.
            unsafe { group.unpack(lanes, start, count, steps * LANES, panel) }
        }
    }

    /// One strip for a block of packed rows.
    ///
    /// # Safety
    /// The rows are packed, and the strip was taken.
    #[inline(always)]
    unsafe fn multiply<L: Lanes>(
        &self,
        lanes: L,
        worker: Worker<'_>,
        strip: &Strip<'_>,
        rows: &Range<usize>,
    ) {
        let room = self.m.min(ROW_BLOCK).next_multiple_of(TILE_ROWS);
        let packed = room * self.k.next_multiple_of(LANES);
        let own = packed + worker.index * (GROUPS * PANEL + room * STRIP);
        let panels = self.workspace.wrapping_add(own);
        let sums = panels.wrapping_add(GROUPS * PANEL);
        let padded = padded_rows::<L>(rows.len());
        for start in (0..self.k).step_by(K_BLOCK) {
            let count = K_BLOCK.min(self.k - start);
            let steps = count.div_ceil(LANES);
            for (g, group) in strip.groups.iter().enumerate() {
                let at = panels.wrapping_add(g * PANEL);
                let panel = Panel { at, width: LANES, lane: steps * LANES, step: LANES };
                // SAFETY: the columns exist, and this worker's panels have room for a K-block.
                unsafe { group.unpack(lanes, start, count, steps * LANES, panel) }
            }
            for lane in 0..LANES {
                let packed = self.workspace.wrapping_add(padded * (start + lane * steps));
                let panels = panels.wrapping_add(lane * steps * LANES);
                for tile in (0..rows.len()).step_by(L::TILE.0) {
                    let (packed, sums) = (packed.wrapping_add(tile * steps), sums.wrapping_add(tile * STRIP));
                    let height = tile_height::<L>(rows.len() - tile);
                    // SAFETY: packed rows and panels have `steps` steps for each partial sum, and this
                    // worker's sums a row for each packed row.
                    unsafe { multiply_tile(lanes, height, steps, packed, panels, sums, start + lane == 0) }
                }
            }
        }
        for row in 0..rows.len() {
            // SAFETY: every row of the block has its sums by now.
            unsafe {
                let found = std::array::from_fn(|g| lanes.load(sums.add(row * STRIP + g * LANES)));
                self.finish(lanes, strip, rows.start + row, found);
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

/// Adds `packed[count][height]` times two panels `[count][16]` to `sums[height][32]`, or, for the very
/// first partial sum, begins them.
///
/// # Safety
/// The operands have those extents, and `height` is one of [`tile_height`]'s.
#[inline(always)]
unsafe fn multiply_tile<L: Lanes>(
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
                12 => tile::<L, 12, 2>(lanes, count, packed, panels, sums, first),
                8 => tile::<L, 8, 2>(lanes, count, packed, panels, sums, first),
                _ => tile::<L, 4, 2>(lanes, count, packed, panels, sums, first),
            }
        } else {
            for g in 0..GROUPS {
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
