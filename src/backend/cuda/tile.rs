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
    /// Warps of a block: how many have its rows among them, and how many its columns.
    pub warps: (u32, u32),
}

/// The tiles of Linear and GatedLinear, for operands whose rows begin at 16-byte addresses.
///
/// A multiprocessor holds two blocks of most with four warps: one works while the other fills its pipeline or
/// stores. Some have more shared memory than the 99 KiB that a block may have on sm_86, 89 and 120, which have
/// the others to choose from. On an H200, microseconds for 640 rows of LLaVA-1.5-7B's gate and up, `22016 x 4096`:
/// 256 by 160 x 96 (twice a multiprocessor), 284 by 128 x 224, 300 by 128 x 256.
pub const TILES: [Tile; 8] = [
    Tile { kernel: "linear_16x64", rows: 16, cols: 64, depth: 64, stages: 5, warps: (1, 4) },
    Tile { kernel: "linear_64x64", rows: 64, cols: 64, depth: 64, stages: 4, warps: (2, 2) },
    Tile { kernel: "linear_64x96", rows: 64, cols: 96, depth: 64, stages: 4, warps: (2, 2) },
    Tile { kernel: "linear_64x128", rows: 64, cols: 128, depth: 64, stages: 4, warps: (2, 2) },
    Tile { kernel: "linear_128x128", rows: 128, cols: 128, depth: 64, stages: 4, warps: (2, 4) },
    Tile { kernel: "linear_160x96", rows: 160, cols: 96, depth: 64, stages: 3, warps: (2, 2) },
    Tile { kernel: "linear_128x160", rows: 128, cols: 160, depth: 32, stages: 4, warps: (4, 2) },
    Tile { kernel: "linear_128x256", rows: 128, cols: 256, depth: 64, stages: 3, warps: (2, 4) },
];

/// The tile for rows of x at any address and any number of columns.
pub const ANY: [Tile; 1] =
    [Tile { kernel: "linear_any_64x64", rows: 64, cols: 64, depth: 64, stages: 4, warps: (2, 2) }];

/// The tile of PatchEmbed: 99 tiles for the 577 x 1024 of CLIP ViT-L/14 at 336 pixels.
pub const PATCH: [Tile; 1] =
    [Tile { kernel: "patch_embed_64x96", rows: 64, cols: 96, depth: 64, stages: 4, warps: (2, 2) }];

/// Slices of K begin at multiples of it. `gemm.cuh` has the same number.
const K_UNIT: u64 = 64;
/// Most slices of K.
const MAX_SLICES: u32 = 8;
/// Most columns of a product in several slices. Wider ones have tiles enough for every machine.
const MAX_SLICED_COLS: u32 = 8192;

// The model of a multiprocessor, in its cycles, fitted to an H200: of 72 products of tiles and model shapes there it
// is 6 % off on average, and 14 % at most.

/// Bytes a cycle from shared memory. A warp reads a fragment of 16 x 16 elements for every 16 of its rows and of
/// its columns, so tiles of many small warps wait here before they wait for tensor cores.
const SHARED_BYTES: u64 = 128;
/// Bytes a cycle from L2 when all multiprocessors read.
const L2_BYTES: u64 = 48;
/// Before the first product and after the last: the pipeline fills, results are stored.
const ENDS: u64 = 6000;
/// Bytes of partial sums that are written or read in a cycle, and cycles to learn who is last.
const PARTIAL_BYTES: u64 = 32;
const TICKET: u64 = 4000;

/// FLOP a cycle of `mma.sync` with 16-bit operands and f32 sums: 645 TFLOP/s of an H200 are 2784 for each
/// multiprocessor, an A100's 312 are 2048; those of GeForce and workstations have half of that.
fn flop(limits: Limits) -> u64 {
    match limits.capability {
        (8, 0) => 2048,
        (9 | 10, _) => 2784,
        _ => 1024,
    }
}

/// The machine and the rows that slices are chosen for: one image of 577 rows or a prompt with one, about
/// 640, on the 132 multiprocessors of an H100 or H200.
const TYPICAL_ROWS: u32 = 640;
const TYPICAL: Limits = Limits { multiprocessors: 132, shared_per_block: 227 << 10, capability: (9, 0) };

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
            let (inner, ends) = tile.cycles(shape, slices, limits);
            let cycles = match (tile.pairs(limits), waves) {
                (false, _) => waves * (inner + ends),
                // Four warps alone are too few to hide what each waits for.
                (true, 1) => inner * 6 / 5 + ends,
                // Of two blocks on a multiprocessor one works while the other begins or ends.
                (true, _) => waves * inner + ends,
            };
            fits.then_some(Plan { tile, slices, group: 1, waves, cycles })
        };
        let best = tiles.iter().filter_map(plan).min_by_key(|plan| plan.cycles)?;
        Some(Plan { group: best.tile.group(shape, limits.multiprocessors), ..best })
    }
}

/// The most rows of one launch where a block may have so many bytes of shared memory: the tiles of a product in
/// several slices have a counter each.
pub fn rows_at_once(tiles: &[Tile], cols: u32, slices: u32, shared_per_block: u32) -> u32 {
    let rows = |tile: &Tile| COUNTERS as u32 / cols.div_ceil(tile.cols) * tile.rows;
    let fitting = tiles.iter().filter(|tile| tile.shared() <= shared_per_block);
    if slices == 1 { u32::MAX } else { fitting.map(rows).max().unwrap_or(0) }
}

/// Bytes of the partial sums of up to so many rows, whichever of `tiles` is chosen; never less for more rows.
pub fn partials(tiles: &[Tile], shape: Shape, slices: u32) -> u64 {
    if slices == 1 {
        return 0;
    }
    let rows = shape.rows.min(rows_at_once(tiles, shape.cols, slices, u32::MAX));
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
        self.warps.0 * self.warps.1 * 32
    }

    /// Whether a multiprocessor holds two blocks: its registers do if each has four warps.
    fn pairs(&self, limits: Limits) -> bool {
        self.threads() == 128 && 2 * self.shared() <= limits.shared_per_block
    }

    /// How many cover a result.
    pub fn count(&self, shape: Shape) -> u64 {
        u64::from(shape.rows.div_ceil(self.rows)) * u64::from(shape.cols.div_ceil(self.cols))
    }

    /// Cycles of one slice, and of both its ends. Tensor cores and shared memory take turns half of the time that
    /// either needs; L2 works beside them.
    fn cycles(&self, shape: Shape, slices: u32, limits: Limits) -> (u64, u64) {
        let [rows, cols] = [self.rows, self.cols].map(u64::from);
        let (down, across) = (u64::from(self.warps.0), u64::from(self.warps.1));
        let units = u64::from(shape.depth).div_ceil(K_UNIT).div_ceil(slices.into());
        let products = 2 * rows * cols * K_UNIT / flop(limits);
        // Each row of a tile is written once and read by all warps beside each other, each column likewise.
        let shared = (rows * (across + 1) + cols * (down + 1)) * K_UNIT * 2 / SHARED_BYTES;
        // What lies outside is not read.
        let lines = rows.min(shape.rows.into()) + cols.min(shape.cols.into());
        let reads = lines * K_UNIT * 2 / L2_BYTES;
        // The last block of a tile reads all partial sums, each writes its own.
        let combine =
            if slices == 1 { 0 } else { TICKET + rows * cols * 4 * u64::from(slices) / PARTIAL_BYTES };
        let unit = products.max(shared).max(reads) + products.min(shared) / 2;
        (units * unit * 9 / 10, ENDS + combine)
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
/// depth to share: what gains a fifth there.
pub fn slices(cols: u32, depth: u32) -> u32 {
    let shape = Shape { rows: TYPICAL_ROWS, cols, depth };
    let cycles = |slices| Plan::new(&TILES, shape, slices, TYPICAL).map_or(u64::MAX, |plan| plan.cycles);
    let units = u64::from(depth).div_ceil(K_UNIT).max(1);
    let most = if cols > MAX_SLICED_COLS { 1 } else { units.min(MAX_SLICES.into()) as u32 };
    let best = (1..=most).min_by_key(|&slices| cycles(slices)).unwrap_or(1);
    if cycles(best) < cycles(1) / 5 * 4 { best } else { 1 }
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
        Limits { multiprocessors, shared_per_block: kib << 10, capability: (9, 0) }
    }

    /// The layers of LLaVA-1.5-7B with one image and 64 tokens, of 13B, and the head, on an H200: which tile,
    /// in how many slices and waves, and which share of the modelled time is useful product.
    #[test]
    fn what_the_models_shapes_get() {
        let (h200, mut wrong) = (on(132, 227), 0);
        for ((rows, cols, depth), kernel, slices, waves, useful) in [
            ((577, 3072, 1024), "linear_160x96", 1, 1, 38),
            ((577, 1024, 1024), "linear_64x96", 1, 1, 19),
            ((577, 4096, 1024), "linear_128x160", 1, 1, 44),
            ((577, 1024, 4096), "linear_64x96", 1, 1, 26),
            ((640, 12288, 4096), "linear_160x96", 1, 4, 66),
            ((640, 4096, 4096), "linear_128x160", 1, 1, 57),
            ((640, 22016, 4096), "linear_160x96", 1, 7, 68),
            ((640, 4096, 11008), "linear_128x160", 1, 1, 59),
            ((576, 4096, 1024), "linear_128x160", 1, 1, 44),
            ((640, 15360, 5120), "linear_160x96", 1, 5, 66),
            ((640, 5120, 5120), "linear_128x256", 1, 1, 55),
            ((640, 27648, 5120), "linear_160x96", 1, 9, 67),
            ((640, 5120, 13824), "linear_128x256", 1, 1, 56),
            ((640, 32000, 4096), "linear_128x256", 1, 5, 68),
            ((10, 4096, 4096), "linear_16x64", 1, 1, 4),
            ((1, 32000, 4096), "linear_16x64", 1, 4, 1),
        ] {
            let shape = Shape { rows, cols, depth };
            let plan = plan(shape, h200).unwrap();
            let flop = 2 * u64::from(rows) * u64::from(cols) * u64::from(depth);
            let share = 100 * flop / (plan.cycles * super::flop(h200) * 132);
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
        // An A100 has all tiles to choose from, and every GPU that these kernels run on those for any operands.
        assert!(TILES.iter().all(|tile| tile.shared() <= 163 << 10));
        assert!(ANY.iter().chain(&PATCH).all(|tile| tile.shared() <= 99 << 10));
    }

    /// Slices are no thinner than a unit of K; counters and workspace suffice for any rows.
    #[test]
    fn slices_have_something_to_do_and_room() {
        for tiles in [&TILES[..], &ANY] {
            for cols in [1, 8, 64, 1000, 1024, 4096, 8192, 8193, 32064] {
                for depth in [1, 16, 63, 64, 65, 128, 600, 1024, 4096, 11008] {
                    let slices = slices(cols, depth);
                    assert!(slices >= 1 && slices <= depth.div_ceil(64), "{cols} x {depth}: {slices}");
                    let (most, mut room) = (rows_at_once(tiles, cols, slices, 99 << 10), 0);
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
