//! Rows gathered: token and image embeddings, patches, selections.

use super::lanes::{LANES, Lanes};
use super::linear::{Layer, Residual, linear, linear_workspace};
use super::machine::{Machine, Task};
use super::panel::Matrix;
use super::pool::Worker;
use crate::op::Activation;

/// `out[t]` is row `ids[t]` of `table`, or, where `sources[t]` is not -1, that row of `image_rows`.
///
/// # Panics
/// If shapes do not fit or an index names no row.
pub fn embed_rows(
    machine: &Machine,
    (ids, sources): (&[i32], &[i32]),
    image_rows: &[f32],
    table: Matrix<'_>,
    out: &mut [f32],
) {
    table.assert_valid();
    let (rows, cols) = (table.rows, table.cols);
    assert!(sources.len() == ids.len() && out.len() == ids.len() * cols, "embed: rows");
    let given = image_rows.len() / cols;
    for (&id, &source) in ids.iter().zip(sources) {
        let ok = if source < 0 { id >= 0 && (id as usize) < rows } else { (source as usize) < given };
        assert!(ok, "embed: id {id} of {rows}, image row {source} of {given}");
    }
    machine.run(&Embed { ids, sources, image_rows, table, out: out.as_mut_ptr() });
}

struct Embed<'a> {
    ids: &'a [i32],
    sources: &'a [i32],
    image_rows: &'a [f32],
    table: Matrix<'a>,
    out: *mut f32,
}

// SAFETY: workers write different rows of `out`.
unsafe impl Sync for Embed<'_> {}

impl Task for Embed<'_> {
    #[inline(always)]
    fn run<L: Lanes>(&self, lanes: L, worker: Worker<'_>) {
        let cols = self.table.cols;
        for row in worker.share(self.ids.len()) {
            // SAFETY: `embed_rows` has checked that the rows exist on both sides.
            unsafe {
                let out = self.out.add(row * cols);
                match usize::try_from(self.sources[row]) {
                    Ok(source) => {
                        let from = self.image_rows[source * cols..].as_ptr();
                        std::ptr::copy_nonoverlapping(from, out, cols);
                    }
                    Err(_) => {
                        for at in (0..cols).step_by(LANES) {
                            let n = LANES.min(cols - at);
                            let x = self.table.load(lanes, self.ids[row] as usize, at, n);
                            lanes.store_first(out.add(at), x, n);
                        }
                    }
                }
            }
        }
    }
}

/// `out[t] = table[ids[t]] + positions[t % P]` for the P rows of `positions`.
///
/// # Panics
/// If shapes do not fit or an index names no row.
pub fn embed_tokens(
    machine: &Machine,
    ids: &[i32],
    table: Matrix<'_>,
    positions: Matrix<'_>,
    out: &mut [f32],
) {
    table.assert_valid();
    positions.assert_valid();
    assert!(positions.cols == table.cols && out.len() == ids.len() * table.cols, "embed: rows");
    for &id in ids {
        assert!(id >= 0 && (id as usize) < table.rows, "embed: id {id} of {}", table.rows);
    }
    machine.run(&EmbedTokens { ids, table, positions, out: out.as_mut_ptr() });
}

struct EmbedTokens<'a> {
    ids: &'a [i32],
    table: Matrix<'a>,
    positions: Matrix<'a>,
    out: *mut f32,
}

// SAFETY: workers write different rows of `out`.
unsafe impl Sync for EmbedTokens<'_> {}

impl Task for EmbedTokens<'_> {
    #[inline(always)]
    fn run<L: Lanes>(&self, lanes: L, worker: Worker<'_>) {
        let cols = self.table.cols;
        for row in worker.share(self.ids.len()) {
            for at in (0..cols).step_by(LANES) {
                let n = LANES.min(cols - at);
                // SAFETY: `embed_tokens` has checked that the rows exist on both sides.
                unsafe {
                    let token = self.table.load(lanes, self.ids[row] as usize, at, n);
                    let position = self.positions.load(lanes, row % self.positions.rows, at, n);
                    lanes.store_first(self.out.add(row * cols + at), lanes.add(token, position), n);
                }
            }
        }
    }
}

/// Bytes of workspace that [`patch_embed`] needs for images of `patches` patches of `inputs` pixels.
pub fn patch_workspace(patches: usize, inputs: usize, threads: usize) -> usize {
    (patches * inputs * size_of::<f32>()).next_multiple_of(64)
        + linear_workspace(patches, inputs, std::iter::empty(), threads)
}

/// The weights of a patch embedding.
#[derive(Clone, Copy)]
pub struct PatchWeights<'a> {
    /// The convolution, `[D, 3*P*P]`.
    pub conv: Matrix<'a>,
    /// The class row, `[1, D]`.
    pub class: Matrix<'a>,
    /// A row for the class row and one for each patch, `[N + 1, D]`.
    pub positions: Matrix<'a>,
}

/// `out[0] = class + positions[0]`, `out[1 + i] = patch i · convᵀ + positions[1 + i]` for every image of
/// `pixels` `[images, 3*S*S]`. A convolution whose stride is its kernel is a gather and a product.
///
/// # Panics
/// If shapes or the workspace do not fit.
pub fn patch_embed(
    machine: &Machine,
    (side, patch): (usize, usize),
    pixels: &[f32],
    weights: PatchWeights<'_>,
    out: &mut [f32],
    workspace: &mut [u8],
) {
    let PatchWeights { conv, class, positions } = weights;
    let (width, inputs, grid) = (conv.rows, conv.cols, side / patch);
    let patches = grid * grid;
    assert!(inputs == 3 * patch * patch && positions.rows == patches + 1, "patch embedding: weights");
    let (gathered, workspace) =
        workspace.split_at_mut((patches * inputs * size_of::<f32>()).next_multiple_of(64));
    let gathered = &mut bytemuck::cast_slice_mut::<u8, f32>(gathered)[..patches * inputs];
    for (pixels, out) in pixels.chunks_exact(3 * side * side).zip(out.chunks_exact_mut((patches + 1) * width))
    {
        let to = gathered.as_mut_ptr();
        machine.run(&Gather { pixels, side, patch, grid, to });
        // The class row's product is nothing: positions and class are written first, as the residual.
        machine.run(&Positions { class, positions, out: out.as_mut_ptr() });
        let layer = Layer::new(conv, None);
        let epilogue = (Activation::None, Residual::InPlace);
        linear(machine, gathered, &[layer], epilogue, &mut out[width..], workspace);
    }
}

/// Pixels to rows of patches.
struct Gather<'a> {
    pixels: &'a [f32],
    side: usize,
    patch: usize,
    grid: usize,
    to: *mut f32,
}

// SAFETY: workers write different patches.
unsafe impl Sync for Gather<'_> {}

impl Task for Gather<'_> {
    #[inline(always)]
    fn run<L: Lanes>(&self, _: L, worker: Worker<'_>) {
        let Gather { side, patch, grid, .. } = *self;
        for i in worker.share(grid * grid) {
            let corner = i / grid * patch * side + i % grid * patch;
            for line in 0..3 * patch {
                let (channel, y) = (line / patch, line % patch);
                let from = &self.pixels[(channel * side + y) * side + corner..][..patch];
                // SAFETY: patch `i` has `3 * patch` lines of `patch` pixels.
                unsafe {
                    let to = self.to.add((i * 3 * patch + line) * patch);
                    std::ptr::copy_nonoverlapping(from.as_ptr(), to, patch);
                }
            }
        }
    }
}

/// Positions, with the class row added to the first.
struct Positions<'a> {
    class: Matrix<'a>,
    positions: Matrix<'a>,
    out: *mut f32,
}

// SAFETY: workers write different rows.
unsafe impl Sync for Positions<'_> {}

impl Task for Positions<'_> {
    #[inline(always)]
    fn run<L: Lanes>(&self, lanes: L, worker: Worker<'_>) {
        let cols = self.positions.cols;
        for row in worker.share(self.positions.rows) {
            for at in (0..cols).step_by(LANES) {
                let n = LANES.min(cols - at);
                // SAFETY: the weights were checked by `Op::infer`, and `out` has a row for each position.
                unsafe {
                    let mut x = self.positions.load(lanes, row, at, n);
                    if row == 0 {
                        x = lanes.add(self.class.load(lanes, 0, at, n), x);
                    }
                    lanes.store_first(self.out.add(row * cols + at), x, n);
                }
            }
        }
    }
}
