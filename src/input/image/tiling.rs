//! LLaVA-NeXT's "any resolution": a large picture is seen as a whole and in tiles.
//!
//! This is the geometry alone, pure arithmetic on sizes: which canvas a picture is put on, how large it
//! lies there, into which tiles the canvas is cut, and which rows of the projected tiles become the
//! picture's rows in the prompt. So a prompt's length is known before a pixel is touched. The formulas are
//! those of `select_best_resolution`, `get_patch_output_size` and `pack_image_features` in transformers,
//! and of the functions in LLaVA's `mm_utils.py` and `llava_arch.py` that they were made from.
//!
//! Both compute in f64 and truncate. In f32, (1279, 639) would get another canvas and (703, 296) another
//! number of patches.

use std::ops::Range;

/// In [`Tiles::order`]: the learned row that ends each line of patches.
pub const NEWLINE: i32 = -1;

/// Most tiles of a canvas. The largest published grid (LLaVA-OneVision's) has 36.
const MAX_TILES: usize = 64;

/// The longest side of a canvas in pixels, so that a lying file cannot ask for gigabytes.
const MAX_SIDE: usize = 4096;

/// Most canvases to choose from. OneVision has 36.
const MAX_RESOLUTIONS: usize = 64;

/// Which rows of the projected tiles become the picture's rows: `mm_patch_merge_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Merge {
    /// All rows of the whole picture, then of each tile.
    Flat,
    /// The whole picture's rows, then the tiles' patches line by line of the canvas.
    Spatial,
    /// As `Spatial`, without the lines or columns of patches that lie on the canvas's margin, and with a
    /// newline behind every line.
    SpatialUnpad {
        /// Whether the length of the picture on the grid is rounded to 7 decimals before it is truncated.
        /// transformers does so, which once it did not; the original code does not, and sees two columns
        /// of patches less of a picture of (799, 376).
        rounded: bool,
    },
}

/// How a model sees pictures in tiles.
#[derive(Clone, Debug, PartialEq)]
pub struct Tiling {
    /// The canvases to choose from, (width, height), in the order in which equals win.
    resolutions: Vec<(usize, usize)>,
    /// Pixels along either side of a tile.
    side: usize,
    /// Patches along either side of a tile.
    grid: usize,
    merge: Merge,
}

impl Tiling {
    /// Tiles of `side` pixels and `grid` patches along either side, on canvases of `resolutions`
    /// (width, height).
    ///
    /// # Errors
    /// What is expected of the resolutions, in words.
    pub fn new(
        resolutions: Vec<(usize, usize)>,
        side: usize,
        grid: usize,
        merge: Merge,
    ) -> Result<Self, String> {
        let whole = |length: usize| length > 0 && length <= MAX_SIDE && length.is_multiple_of(side);
        let fits = |&(width, height): &(usize, usize)| {
            whole(width) && whole(height) && width / side * (height / side) <= MAX_TILES
        };
        let number = 1..=MAX_RESOLUTIONS;
        if side == 0 || !number.contains(&resolutions.len()) || !resolutions.iter().all(fits) {
            return Err(format!(
                "1 to {MAX_RESOLUTIONS} pairs of sides that are multiples of the tile, {side}, up to \
                 {MAX_SIDE}, of at most {MAX_TILES} tiles"
            ));
        }
        Ok(Tiling { resolutions, side, grid, merge })
    }

    /// The same file as it is read by the other code, transformers or the original: the sides of each canvas change
    /// places, and only `transformers` rounds the margin.
    pub fn read_by_other(&self, transformers: bool) -> Self {
        let merge = match self.merge {
            Merge::SpatialUnpad { .. } => Merge::SpatialUnpad { rounded: transformers },
            merge => merge,
        };
        let resolutions = self.resolutions.iter().map(|&(width, height)| (height, width)).collect();
        Tiling { resolutions, merge, ..*self }
    }

    /// How a picture of `width` x `height` pixels, neither of them 0, is seen.
    pub fn tiles(&self, width: usize, height: usize) -> Tiles {
        let canvas = self.best_resolution(width, height);
        let resized = resized(canvas, (width, height));
        let (columns, rows) = (canvas.0 / self.side, canvas.1 / self.side);
        let (across, down) = (columns * self.grid, rows * self.grid);
        let kept = match self.merge {
            Merge::SpatialUnpad { rounded } => unpadded((across, down), (width, height), rounded),
            Merge::Flat | Merge::Spatial => (0..across, 0..down),
        };
        Tiles { side: self.side, grid: self.grid, columns, rows, resized, kept, merge: self.merge }
    }

    /// Whether lines of patches end with a newline, a row that the checkpoint holds.
    pub fn has_newline(&self) -> bool {
        matches!(self.merge, Merge::SpatialUnpad { .. })
    }

    /// The canvases, (width, height) in pixels.
    pub fn resolutions(&self) -> &[(usize, usize)] {
        &self.resolutions
    }

    /// Which rows become the picture's.
    pub fn merge(&self) -> Merge {
        self.merge
    }

    /// Most squares that any picture is seen in, the whole picture included.
    pub fn max_squares(&self) -> usize {
        self.resolutions.iter().map(|(w, h)| 1 + w / self.side * (h / self.side)).max().unwrap_or(1)
    }

    /// Most rows that any picture has in a prompt.
    pub fn max_tokens(&self) -> usize {
        let newline = usize::from(self.has_newline());
        let lines = |length: usize| length / self.side * self.grid;
        let tokens = self.resolutions.iter().map(|&(w, h)| lines(h) * (lines(w) + newline)).max();
        self.grid * self.grid + tokens.unwrap_or(0)
    }

    /// The canvas on which most of the picture's pixels survive; among equals the one that wastes least,
    /// among those the first.
    fn best_resolution(&self, width: usize, height: usize) -> (usize, usize) {
        let pixels = width.saturating_mul(height);
        let (mut best, mut most, mut least) = ((0, 0), 0, usize::MAX);
        for &(w, h) in &self.resolutions {
            let scale = (w as f64 / width as f64).min(h as f64 / height as f64);
            let (scaled_width, scaled_height) =
                ((width as f64 * scale) as usize, (height as f64 * scale) as usize);
            let effective = (scaled_width * scaled_height).min(pixels);
            let wasted = (w * h).saturating_sub(effective);
            if effective > most || (effective == most && wasted < least) {
                (best, most, least) = ((w, h), effective, wasted);
            }
        }
        best
    }
}

/// How one picture is seen: as a whole in a square, and in `rows` x `columns` tiles of a canvas.
#[derive(Clone, Debug, PartialEq)]
pub struct Tiles {
    /// Pixels along either side of a tile.
    pub side: usize,
    /// Patches along either side of a tile.
    pub grid: usize,
    /// Tiles side by side.
    pub columns: usize,
    /// Tiles one below the other.
    pub rows: usize,
    /// Width and height of the picture on the canvas, whose margin is black.
    pub resized: (usize, usize),
    /// The columns and the lines of the canvas's patches that become rows of the prompt.
    kept: (Range<usize>, Range<usize>),
    merge: Merge,
}

impl Tiles {
    /// The squares that go through the tower: the whole picture, then the tiles line by line.
    pub fn squares(&self) -> usize {
        1 + self.rows * self.columns
    }

    /// Where the resized picture's left upper pixel lies on the canvas: an odd margin is the smaller one
    /// on the left and upper side.
    pub fn margin(&self) -> (usize, usize) {
        let (width, height) = (self.columns * self.side, self.rows * self.side);
        ((width - self.resized.0) / 2, (height - self.resized.1) / 2)
    }

    /// Rows that the picture has in a prompt.
    pub fn tokens(&self) -> usize {
        let newline = usize::from(matches!(self.merge, Merge::SpatialUnpad { .. }));
        self.grid * self.grid + self.kept.1.len() * (self.kept.0.len() + newline)
    }

    /// The rows of the prompt: each is a row of the projected squares, which are `grid * grid` rows each
    /// and stand one after the other, or [`NEWLINE`].
    pub fn order(&self) -> Vec<i32> {
        let mut order = Vec::with_capacity(self.tokens());
        let patches = self.grid * self.grid;
        if self.merge == Merge::Flat {
            order.extend((0..self.squares() * patches).map(|row| row as i32));
            return order;
        }
        order.extend((0..patches).map(|row| row as i32));
        for y in self.kept.1.clone() {
            for x in self.kept.0.clone() {
                let tile = 1 + y / self.grid * self.columns + x / self.grid;
                order.push((tile * patches + y % self.grid * self.grid + x % self.grid) as i32);
            }
            if self.merge != Merge::Spatial {
                order.push(NEWLINE);
            }
        }
        order
    }

    /// All of it as numbers, for an image's identity.
    pub(super) fn numbers(&self) -> [usize; 11] {
        let Tiles { side, grid, columns, rows, resized, ref kept, merge } = *self;
        let merge = match merge {
            Merge::Flat => 0,
            Merge::Spatial => 1,
            Merge::SpatialUnpad { .. } => 2,
        };
        let (x, y) = kept;
        [side, grid, columns, rows, resized.0, resized.1, x.start, x.end, y.start, y.end, merge]
    }
}

/// Width and height of a picture of `size` that fills `canvas` in one direction and fits in the other.
fn resized(canvas: (usize, usize), size: (usize, usize)) -> (usize, usize) {
    let (across, down) = (canvas.0 as f64 / size.0 as f64, canvas.1 as f64 / size.1 as f64);
    if across < down {
        (canvas.0, ((size.1 as f64 * across).ceil() as usize).min(canvas.1))
    } else {
        (((size.0 as f64 * down).ceil() as usize).min(canvas.0), canvas.1)
    }
}

/// The columns and lines of a grid of patches, `across` x `down`, that a picture of `width` x `height`
/// pixels covers in the grid's middle.
fn unpadded(
    (across, down): (usize, usize),
    (width, height): (usize, usize),
    rounded: bool,
) -> (Range<usize>, Range<usize>) {
    // `length` pixels, scaled as `patches` to `pixels`. Rounded to 7 decimals the product is the exact
    // quotient: it is either whole, or at least 1 / pixels away from a whole number, and pixels have less
    // than 7 digits wherever the quotient is not far below 1.
    let scaled = |length: usize, patches: usize, pixels: usize| match rounded {
        true => (length as u128 * patches as u128 / pixels as u128) as usize,
        false => (length as f64 * (patches as f64 / pixels as f64)) as usize,
    };
    let middle = |of: usize, length: usize| {
        let margin = of.saturating_sub(length) / 2;
        margin..of - margin
    };
    if width as f64 / height as f64 > across as f64 / down as f64 {
        (0..across, middle(down, scaled(height, across, width)))
    } else {
        (middle(across, scaled(width, down, height)), 0..down)
    }
}
