//! The vision half of a session: normalised pixels to the rows that stand for a picture in a prompt.
//!
//! A picture is one square, or in LLaVA-NeXT several: the whole and its tiles. Squares go through tower and
//! projector in batches; a row's bits do not depend on how many squares a batch has.

use super::model::Model;
use super::sequence::EncodedImage;
use super::session::non_finite;
use super::size::SessionOptions;
use crate::backend::Buffer;
use crate::error::{Error, Result};
use crate::graph::{Control, Executor, Plan, Timing};
use crate::input::image::NEWLINE;
use crate::model::llava::{Assembly, Vision};
use crate::tensor::Bindings;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A picture as the tower reads it.
#[derive(Clone, Copy, Debug)]
pub struct Pixels<'a> {
    /// Normalised values `[squares, 3*S*S]`.
    pub values: &'a [f32],
    /// Which projected row each of the picture's rows is:
    /// [`Tiles::order`](crate::input::image::Tiles::order). Nothing in a model without tiles, where the
    /// projected rows are the picture's.
    pub order: Option<&'a [i32]>,
    /// The picture's identity.
    pub digest: [u8; 32],
    /// Whether [`Encoded::hidden`] is wanted.
    pub keep_hidden: bool,
}

/// What became of a picture.
#[derive(Debug)]
pub struct Encoded {
    /// Its rows.
    pub image: EncodedImage,
    /// How long patch embedding and transformer blocks took.
    pub tower: Duration,
    /// How long the projector took, and the gathering of tiles.
    pub projector: Duration,
    /// The selected hidden states of all squares `[squares*rows, D]`, class rows included, if wanted.
    pub hidden: Vec<f32>,
}

/// Tower, projector and the gathering of tiles, over the session's arena.
pub(super) struct Encoder {
    model: Arc<Model>,
    vision: Vision,
    executor: Executor,
    /// The projected squares of a picture, where pictures have several.
    squares: Option<Buffer>,
}

/// The plan of the vision graph: as many squares at a time as a picture can have, up to the option's limit.
pub(super) fn plan(model: &Model, vision: &Vision, options: &SessionOptions) -> Result<Plan> {
    if options.vision_batch == 0 {
        return Err(Error::option("vision_batch", "at least 1", 0));
    }
    let tiling = model.config().tiling.as_ref();
    let max = Bindings {
        images: tiling.map_or(1, |tiling| tiling.max_squares()).min(options.vision_batch),
        tokens: tiling.map_or(0, |tiling| tiling.max_tokens()),
        ..Bindings::default()
    };
    Ok(Plan::new(&vision.graph, &**model.backend(), max))
}

/// Bytes of the projected squares of a picture, 0 where it has but one.
pub(super) fn squares_bytes(vision: &Vision) -> usize {
    let bytes = |a: &Assembly| vision.graph.ty(a.squares).bytes(&Bindings::default());
    vision.assembly.as_ref().map_or(0, bytes)
}

impl Encoder {
    /// An encoder over `arena`, which the language graph may share.
    pub fn new(model: Arc<Model>, vision: Vision, plan: Plan, arena: Arc<Buffer>) -> Result<Self> {
        let squares = match squares_bytes(&vision) {
            0 => None,
            bytes => Some(model.backend().alloc("the projected tiles of a picture", bytes)?),
        };
        let states: Vec<_> = squares.iter().map(|buffer| buffer.addr).collect();
        let executor = Executor::new(vision.graph.clone(), model.backend().clone(), plan, arena, &states);
        Ok(Encoder { model, vision, executor, squares })
    }

    /// The executor, for inspection.
    pub fn executor(&self) -> &Executor {
        &self.executor
    }

    /// Whether runs that come again are recorded; see [`Executor::record`].
    pub fn record(&mut self, yes: bool) {
        self.executor.record(yes);
    }

    /// Writes down when nodes run; see [`Executor::trace`].
    pub fn trace(&mut self, capacity: usize, timing: Timing) {
        self.executor.trace(capacity, timing);
    }

    /// Nodes that run for a picture of so many squares.
    pub fn nodes(&self, squares: usize) -> usize {
        let nodes = self.vision.graph.nodes.len();
        let assembly = usize::from(self.vision.assembly.is_some());
        squares.div_ceil(self.executor.plan().max.images) * (nodes - assembly) + assembly
    }

    /// Runs the graph on a picture.
    ///
    /// # Errors
    /// [`Error::Cancelled`]; [`Error::NonFinite`]; [`Error::Device`].
    ///
    /// # Panics
    /// If the values are no whole squares, or `order` does not fit them.
    pub fn encode(&mut self, pixels: Pixels<'_>, control: &Control) -> Result<Encoded> {
        let one = Bindings { images: 1, ..Bindings::default() };
        let square = self.executor.view(self.vision.pixels, &one).len();
        assert_eq!(pixels.values.len() % square, 0, "pixels");
        let squares = pixels.values.len() / square;
        assert_eq!(pixels.order.is_some(), self.vision.assembly.is_some(), "an order, where there are tiles");
        assert!(pixels.order.is_some() || squares == 1, "{squares} squares of one picture without tiles");

        let mut times = [Duration::ZERO; 2];
        let mut hidden = Vec::new();
        let batch = self.executor.plan().max.images;
        for (i, values) in pixels.values.chunks(batch * square).enumerate() {
            let bindings = Bindings { images: values.len() / square, ..Bindings::default() };
            self.run(values, &bindings, control, &mut times)?;
            if pixels.keep_hidden {
                hidden.extend(self.executor.read_floats(self.vision.hidden, &bindings)?);
            }
            self.keep_squares(i * batch, &bindings)?;
        }
        let start = Instant::now();
        let image = match pixels.order {
            Some(order) => self.assemble(order, squares, pixels.digest, control)?,
            None => self.rows(self.vision.features, &one, pixels.digest)?,
        };
        let [tower, projector] = times;
        Ok(Encoded { image, tower, projector: projector + start.elapsed(), hidden })
    }

    /// Tower and projector on one batch of squares, whose projected rows must be finite.
    fn run(
        &mut self,
        values: &[f32],
        bindings: &Bindings,
        control: &Control,
        times: &mut [Duration; 2],
    ) -> Result<()> {
        let nodes = self.vision.graph.nodes.len();
        let end = self.vision.assembly.as_ref().map_or(nodes, |assembly| assembly.node);
        let parts: [Range<usize>; 2] = [0..self.vision.projector, self.vision.projector..end];
        self.executor.write(self.vision.pixels, values)?;
        for (part, time) in parts.into_iter().zip(times) {
            let start = Instant::now();
            // SAFETY: these nodes have no index inputs and no states; `&mut self`, which the session's
            // `&mut self` gave, keeps the arena ours.
            unsafe { self.executor.run_nodes(part, bindings, control)? };
            self.model.backend().synchronize()?;
            *time += start.elapsed();
        }
        if self.executor.is_finite(self.vision.features, bindings)? {
            return Ok(());
        }
        // SAFETY: as above; the assembly, which runs as well, has no rows under these bindings.
        let node = unsafe { self.executor.first_non_finite(bindings)? };
        Err(non_finite(0, node))
    }

    /// Puts the projected rows of a batch that begins with square `first` beside those of the others.
    fn keep_squares(&mut self, first: usize, bindings: &Bindings) -> Result<()> {
        let Some(squares) = &self.squares else { return Ok(()) };
        let view = self.executor.view(self.vision.features, bindings);
        let offset = first * (view.bytes() / bindings.images);
        assert!(offset + view.bytes() <= squares.bytes, "more squares than any picture has");
        // SAFETY: the batch's rows lie in the arena, the target in a buffer of its own that nobody else
        // writes; both lengths were checked.
        unsafe { self.model.backend().copy(view.addr, squares.addr + offset, view.bytes()) }
    }

    /// Gathers a picture's rows from its projected squares.
    fn assemble(
        &mut self,
        order: &[i32],
        squares: usize,
        digest: [u8; 32],
        control: &Control,
    ) -> Result<EncodedImage> {
        let Assembly { node, sources, ids, rows, .. } =
            self.vision.assembly.clone().expect("`encode` asked for it");
        let there = 0..(squares * self.model.config().square_rows()) as i32;
        let newline = ids.is_some();
        let exists = |row: &i32| there.contains(row) || (newline && *row == NEWLINE);
        assert!(order.iter().all(exists), "an order of rows that are not there");
        let bindings = Bindings { tokens: order.len(), ..Bindings::default() };
        self.executor.write(sources, order)?;
        if let Some(ids) = ids {
            self.executor.write(ids, &vec![0i32; order.len()])?;
        }
        // SAFETY: every source names a row of the squares (asserted) or the newline, whose table has the
        // row 0; the squares are a buffer of our own; `&mut self` keeps the arena ours.
        unsafe { self.executor.run_nodes(node..node + 1, &bindings, control)? };
        self.rows(rows, &bindings, digest)
    }

    /// A picture's rows in a buffer of their own.
    fn rows(
        &self,
        value: crate::graph::ValueId,
        bindings: &Bindings,
        digest: [u8; 32],
    ) -> Result<EncodedImage> {
        let view = self.executor.view(value, bindings);
        let rows = self.model.backend().alloc("an image's rows", view.bytes())?;
        // SAFETY: `rows` was just allocated with the size of `view`, which lies in the arena.
        unsafe { self.model.backend().copy(view.addr, rows.addr, view.bytes())? };
        Ok(EncodedImage { rows, len: view.rows, digest, model: Arc::downgrade(&self.model) })
    }
}
