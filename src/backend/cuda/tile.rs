//! How a product y `[M, N]` = x `[M, K]` · Wᵀ is cut into tiles, slices and waves, and the one function that
//! decides it. `kernels/gemm.cuh` computes what is decided here.
//!
//! A wave is one tile on every multiprocessor. With a few tiles for each, the last wave is mostly empty: the
//! fc1 layer of CLIP ViT-L, 577 x 4096 x 1024, has 160 tiles of 128 x 128, two waves on 132 multiprocessors,
//! but 130 tiles of 128 x 160, one wave. So there are widths between the powers of two, and [`Plan::new`]
//! compares all.
//!
//! A row's bits must not depend on how many rows there are. They depend on the slices of K alone, and
//! [`slices`] looks at N and K only; everything else here is scheduling.

use super::device::COUNTERS;
use super::driver::Limits;

/// A shape of tiles: one kernel. `kernels/linear.cu` has the same table.
#[derive(Debug, PartialEq, Eq)]
pub struct Tile {
    /// The kernel's name without its dtype.
    pub kernel: &'static str,
    /// Rows of y.
    pub rows: u32,
    /// Columns of y.
    pub cols: u32,
    /// Columns of the operands that come to shared memory at a time.
    pub depth: u32,
    /// Slots in shared memory.
    pub stages: u32,
    /// Warps of a block.
    pub warps: u32,
}

/// The tiles of Linear and GatedLinear, for operands whose rows begin at 16-byte addresses.
///
/// 64 columns at a time halve the barriers of the smaller ones; the wider ones have 32, so that four slots
/// fit into the 99 KiB that a block may have on sm_86, 89 and 120. More slots gain nothing where they would
/// fit: three blocks of columns under way are at least 1500 cycles of work, and memory answers in half of
/// that.
pub const TILES: [Tile; 9] = [
    Tile { kernel: "linear_16x64", rows: 16, cols: 64, depth: 64, stages: 5, warps: 4 },
    Tile { kernel: "linear_64x64", rows: 64, cols: 64, depth: 64, stages: 4, warps: 4 },
    Tile { kernel: "linear_64x96", rows: 64, cols: 96, depth: 64, stages: 4, warps: 4 },
    Tile { kernel: "linear_64x128", rows: 64, cols: 128, depth: 64, stages: 4, warps: 4 },
    Tile { kernel: "linear_128x128", rows: 128, cols: 128, depth: 32, stages: 4, warps: 4 },
    Tile { kernel: "linear_128x160", rows: 128, cols: 160, depth: 32, stages: 4, warps: 8 },
    Tile { kernel: "linear_128x192", rows: 128, cols: 192, depth: 32, stages: 4, warps: 8 },
    Tile { kernel: "linear_128x224", rows: 128, cols: 224, depth: 32, stages: 4, warps: 8 },
    Tile { kernel: "linear_128x256", rows: 128, cols: 256, depth: 32, stages: 4, warps: 8 },
];

/// The tile for rows of x at any address.
pub const ANY: [Tile; 1] =
    [Tile { kernel: "linear_any_64x64", rows: 64, cols: 64, depth: 64, stages: 4, warps: 4 }];

/// The tile of PatchEmbed: 99 tiles for the 577 x 1024 of CLIP ViT-L/14 at 336 pixels.
pub const PATCH: [Tile; 1] =
    [Tile { kernel: "patch_embed_64x96", rows: 64, cols: 96, depth: 64, stages: 4, warps: 4 }];

/// Slices of K begin at multiples of it. `gemm.cuh` has the same number.
const K_UNIT: u64 = 64;
/// Most slices of K.
const MAX_SLICES: u32 = 8;
/// Most columns of a product in several slices. Wider ones have tiles enough for every machine.
const MAX_SLICED_COLS: u32 = 8192;

// The model of a multiprocessor, in its cycles. Estimates that rank tiles, not measurements.

/// FLOP a cycle in `mma.sync` with 16-bit operands: 2048 on sm_80; more on sm_90 and fewer on sm_86, which
/// scales all tiles alike as long as they do not wait for L2.
const FLOP: u64 = 2048;
/// Bytes a cycle from L2 when all multiprocessors read: an A100's gives 5120, 47 for each of 108, at most; this
/// is two thirds.
const L2_BYTES: u64 = 32;
/// Before the first product and after the last: the pipeline fills, results are stored.
const ENDS: u64 = 1500;
/// Bytes of partial sums that are written or read in a cycle, and cycles to learn who is last.
const PARTIAL_BYTES: u64 = 64;
const TICKET: u64 = 1000;

/// The machine and the rows that slices are chosen for: one image of 577 rows or a prompt with one, about
/// 640, on the 132 multiprocessors of an H100 or H200.
const TYPICAL_ROWS: u32 = 640;
const TYPICAL: Limits = Limits { multiprocessors: 132, shared_per_block: 99 << 10, capability: (9, 0) };

/// M, N and K.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Rows of x and y, M.
    pub rows: u32,
    /// Columns of y, N: of all matrices side by side.
    pub cols: u32,
    /// Columns of x, K.
    pub depth: u32,
}

/// How a product is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The kernel.
    pub tile: &'static Tile,
    /// Slices of K.
    pub slices: u32,
    /// Rows of tiles that are walked together.
    pub group: u32,
    /// Tiles, times slices, for each multiprocessor: the last wave counts whole.
    pub waves: u64,
    /// Modelled cycles.
    pub cycles: u64,
}

impl Plan {
    /// The quickest of `tiles` for a product on a device, as modelled: waves times what a tile takes. The
    /// first among equals; `None` if the device has too little shared memory for any.
    pub fn new(tiles: &'static [Tile], shape: Shape, slices: u32, limits: Limits) -> Option<Plan> {
        let plan = |tile: &'static Tile| {
            let tiles = tile.count(shape);
            let fits = tile.shared() <= limits.shared_per_block && (slices == 1 || tiles <= COUNTERS as u64);
            let waves = (tiles * u64::from(slices)).div_ceil(limits.multiprocessors.max(1).into());
            fits.then(|| Plan { tile, slices, group: 1, waves, cycles: waves * tile.cycles(shape, slices) })
        };
        let best = tiles.iter().filter_map(plan).min_by_key(|plan| plan.cycles)?;
        Some(Plan { group: best.tile.group(shape, limits.multiprocessors), ..best })
    }
}

/// The most rows of one launch: the tiles of a product in several slices have a counter each.
pub fn rows_at_once(tiles: &[Tile], cols: u32, slices: u32) -> u32 {
    let rows = |tile: &Tile| COUNTERS as u32 / cols.div_ceil(tile.cols) * tile.rows;
    if slices == 1 { u32::MAX } else { tiles.iter().map(rows).max().unwrap_or(0) }
}

/// Bytes of the partial sums of up to so many rows, whichever of `tiles` is chosen; never less for more rows.
pub fn partials(tiles: &[Tile], shape: Shape, slices: u32) -> u64 {
    if slices == 1 {
        return 0;
    }
    let rows = shape.rows.min(rows_at_once(tiles, shape.cols, slices));
    // What each tile adds to the result, it adds less than one tile of.
    let bytes = |tile: &Tile| u64::from(rows + tile.rows - 1) * u64::from(shape.cols + tile.cols - 1) * 4;
    u64::from(slices) * tiles.iter().map(bytes).max().unwrap_or(0)
}

impl Tile {
    /// Bytes of shared memory of a block.
    pub const fn shared(&self) -> u32 {
        self.stages * (self.rows + self.cols) * self.depth * 2
    }

    /// Threads of a block.
    pub const fn threads(&self) -> u32 {
        self.warps * 32
    }

    /// How many cover a result.
    pub fn count(&self, shape: Shape) -> u64 {
        u64::from(shape.rows.div_ceil(self.rows)) * u64::from(shape.cols.div_ceil(self.cols))
    }

    /// Cycles of one slice: tensor cores or L2, whoever takes longer, and both ends.
    fn cycles(&self, shape: Shape, slices: u32) -> u64 {
        let units = u64::from(shape.depth).div_ceil(K_UNIT).div_ceil(slices.into());
        let products = 2 * u64::from(self.rows) * u64::from(self.cols) * K_UNIT / FLOP;
        // What lies outside is not read.
        let lines = u64::from(self.rows.min(shape.rows)) + u64::from(self.cols.min(shape.cols));
        let reads = lines * K_UNIT * 2 / L2_BYTES;
        // The last block of a tile reads all partial sums, each writes its own.
        let sums = u64::from(self.rows * self.cols) * 4;
        let combine = if slices == 1 { 0 } else { TICKET + sums * (u64::from(slices) + 1) / PARTIAL_BYTES };
        units * products.max(reads) + ENDS + combine
    }

    /// How many rows of tiles to walk column by column, so that the tiles of a wave read as few rows of both
    /// operands as they can: a block of tiles about as high as it is wide in elements. Groups are of one
    /// height, but the last.
    fn group(&self, shape: Shape, multiprocessors: u32) -> u32 {
        let tile_rows = shape.rows.div_ceil(self.rows).max(1);
        let read = |group: u32| group * self.rows + multiprocessors.div_ceil(group) * self.cols;
        let best = (1..=tile_rows.min(64)).min_by_key(|&group| read(group)).unwrap_or(1);
        tile_rows.div_ceil(tile_rows.div_ceil(best))
    }
}

/// Into how many slices K is cut: part of the reduction order, so a function of N and K alone. For a layer
/// that has too few tiles to fill a large machine at the row counts of an image and its prompt, and enough
/// depth to share: what gains a tenth there.
pub fn slices(cols: u32, depth: u32) -> u32 {
    let shape = Shape { rows: TYPICAL_ROWS, cols, depth };
    let cycles = |slices| Plan::new(&TILES, shape, slices, TYPICAL).map_or(u64::MAX, |plan| plan.cycles);
    let units = u64::from(depth).div_ceil(K_UNIT).max(1);
    let most = if cols > MAX_SLICED_COLS { 1 } else { units.min(MAX_SLICES.into()) as u32 };
    let best = (1..=most).min_by_key(|&slices| cycles(slices)).unwrap_or(1);
    if cycles(best) < cycles(1) / 10 * 9 { best } else { 1 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    /// As `place` in gemm.cuh.
    fn place(at: u32, tile_rows: u32, tile_cols: u32, group: u32) -> (u32, u32) {
        let first = at / (group * tile_cols) * group;
        let height = (tile_rows - first).min(group);
        let within = at % (group * tile_cols);
        (first + within % height, within / height)
    }

    fn plan(shape: Shape, limits: Limits) -> Option<Plan> {
        Plan::new(&TILES, shape, slices(shape.cols, shape.depth), limits)
    }

    fn on(multiprocessors: u32, kib: u32) -> Limits {
        Limits { multiprocessors, shared_per_block: kib << 10, capability: (8, 0) }
    }

    /// The layers of LLaVA-1.5-7B with one image and 64 tokens, of 13B, and the head, on an H200: which tile,
    /// in how many slices and waves, and which share of the modelled time is useful product.
    #[test]
    fn what_the_models_shapes_get() {
        let (h200, mut wrong) = (on(132, 227), 0);
        for ((rows, cols, depth), kernel, slices, waves, useful) in [
            ((577, 3072, 1024), "linear_128x128", 1, 1, 75),
            ((577, 1024, 1024), "linear_64x96", 1, 1, 38),
            ((577, 4096, 1024), "linear_128x160", 1, 1, 81),
            ((577, 1024, 4096), "linear_128x128", 3, 1, 61),
            ((640, 12288, 4096), "linear_128x160", 1, 3, 95),
            ((640, 4096, 4096), "linear_128x160", 1, 1, 95),
            ((640, 22016, 4096), "linear_128x224", 1, 4, 91),
            ((640, 4096, 11008), "linear_128x160", 1, 1, 96),
            ((576, 4096, 1024), "linear_128x160", 1, 1, 81),
            ((640, 15360, 5120), "linear_128x160", 1, 4, 89),
            ((640, 5120, 5120), "linear_128x224", 1, 1, 85),
            ((640, 27648, 5120), "linear_128x224", 1, 5, 92),
            ((640, 5120, 13824), "linear_128x224", 1, 1, 86),
            ((640, 32000, 4096), "linear_128x256", 1, 5, 93),
            ((10, 4096, 4096), "linear_16x64", 1, 1, 6),
            ((1, 32000, 4096), "linear_64x128", 1, 2, 1),
        ] {
            let shape = Shape { rows, cols, depth };
            let plan = plan(shape, h200).unwrap();
            let flop = 2 * u64::from(rows) * u64::from(cols) * u64::from(depth);
            let share = 100 * flop / (plan.cycles * FLOP * 132);
            let got = (plan.tile.kernel, plan.slices, plan.waves, share);
            println!("{rows} x {cols} x {depth}: {got:?}, groups of {}", plan.group);
            wrong += u32::from(got != (kernel, slices, waves, useful));
        }
        assert_eq!(wrong, 0, "shapes that got something else than the table says");
    }

    /// Every tile of a result is computed once, whatever the rows, the device and the group.
    #[test]
    fn no_tile_is_lost_and_none_is_computed_twice() {
        for limits in [on(1, 99), on(6, 163), on(108, 163), on(132, 227), on(188, 99)] {
            for cols in [1, 17, 96, 1000, 1024, 4096] {
                for rows in 1..=700 {
                    let shape = Shape { rows, cols, depth: 256 };
                    let plan = plan(shape, limits).unwrap();
                    let (down, across) = (rows.div_ceil(plan.tile.rows), cols.div_ceil(plan.tile.cols));
                    let tiles = plan.tile.count(shape);
                    assert_eq!(tiles, u64::from(down) * u64::from(across));
                    assert!(plan.waves * u64::from(limits.multiprocessors) >= tiles * u64::from(plan.slices));
                    let places: HashSet<_> =
                        (0..tiles as u32).map(|at| place(at, down, across, plan.group)).collect();
                    assert_eq!(places.len() as u64, tiles, "{shape:?} {plan:?}");
                    assert!(
                        places.iter().all(|&(row, col)| row < down && col < across),
                        "{shape:?} {plan:?}"
                    );
                }
            }
        }
    }

    /// A wave's tiles share rows: never more than a tenth above what a square of tiles would read.
    #[test]
    fn a_wave_reads_a_compact_block() {
        let (limits, shape) = (on(132, 227), Shape { rows: 4616, cols: 4096, depth: 1024 });
        let plan = plan(shape, limits).unwrap();
        let (down, across) = (shape.rows.div_ceil(plan.tile.rows), shape.cols.div_ceil(plan.tile.cols));
        let wave: Vec<_> = (0..132).map(|at| place(at, down, across, plan.group)).collect();
        let distinct = |values: Vec<u32>| values.into_iter().collect::<HashSet<_>>().len() as u32;
        let rows = distinct(wave.iter().map(|p| p.0).collect()) * plan.tile.rows;
        let cols = distinct(wave.iter().map(|p| p.1).collect()) * plan.tile.cols;
        let square = 2.0 * (132.0 * f64::from(plan.tile.rows * plan.tile.cols)).sqrt();
        assert!(f64::from(rows + cols) < 1.1 * square, "{rows} + {cols} of {square} for {plan:?}");
    }

    #[test]
    fn the_limit_of_shared_memory_holds() {
        let shape = Shape { rows: 640, cols: 4096, depth: 4096 };
        for kib in [48, 64, 99, 227] {
            let plan = plan(shape, on(132, kib));
            assert!(plan.is_none_or(|plan| plan.tile.shared() <= kib << 10), "{kib}");
        }
        assert!(plan(shape, on(132, 99)).is_some());
        assert!(plan(shape, on(132, 8)).is_none());
        // A block of any GPU that these kernels run on has all tiles to choose from.
        assert!(TILES.iter().chain(&ANY).chain(&PATCH).all(|tile| tile.shared() <= 99 << 10));
    }

    /// Slices are no thinner than a unit of K; counters and workspace suffice for any rows.
    #[test]
    fn slices_have_something_to_do_and_room() {
        for tiles in [&TILES[..], &ANY] {
            for cols in [1, 8, 64, 1000, 1024, 4096, 8192, 8193, 32064] {
                for depth in [1, 16, 63, 64, 65, 128, 600, 1024, 4096, 11008] {
                    let slices = slices(cols, depth);
                    assert!(slices >= 1 && slices <= depth.div_ceil(64), "{cols} x {depth}: {slices}");
                    let (most, mut room) = (rows_at_once(tiles, cols, slices), 0);
                    assert!(most >= 2048, "{cols} x {depth} in {slices}: {most} rows");
                    for rows in [1, 16, 17, 100, 577, 2000, 4096, 100_000].map(|rows: u32| rows.min(most)) {
                        let shape = Shape { rows, cols, depth };
                        let plan = Plan::new(tiles, shape, slices, on(132, 99)).expect("a plan");
                        let sums = u64::from(plan.tile.rows * plan.tile.cols) * plan.tile.count(shape);
                        let needed = if slices == 1 { 0 } else { u64::from(slices) * sums * 4 };
                        let bytes = partials(tiles, shape, slices);
                        assert!(bytes >= needed.max(room), "{shape:?}: {bytes} for {needed}");
                        room = bytes;
                    }
                }
            }
        }
        assert!((1..=8192).step_by(64).any(|cols| slices(cols, 11008) > 1), "some products are cut");
    }
}
