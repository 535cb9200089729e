//! A session: one arena, one KV cache, and the step that advances sequences through the model.
//!
//! A step takes any mixture of sequences, each with a chunk of its pending ids, packs their rows, and
//! runs the language graph once. It allocates nothing: rows are staged in vectors of fixed capacity.

use super::batch::{Advance, Staging};
use super::kv::KvPool;
use super::model::Model;
use super::pages::PageAllocator;
use super::sampling::Sampling;
use super::sequence::{EncodedImage, Sequence, SharedPages};
use super::size::{MemoryPlan, SessionOptions, SessionPlan};
use super::vision::{Encoded, Encoder, Pixels};
use crate::backend::Buffer;
use crate::backend::cpu::usable_memory;
use crate::error::{Error, Result};
use crate::graph::{Control, Executor, Timing};
use crate::model::llama::Llama;
use crate::op::{KvExtent, PAGE};
use crate::tensor::Bindings;
use std::ops::Range;
use std::sync::Arc;

/// What a running model writes to.
pub struct Session {
    model: Arc<Model>,
    language: Executor,
    vision: Option<Encoder>,
    kv: KvPool,
    pages: SharedPages,
    plan: MemoryPlan,
    options: SessionOptions,
    staging: Staging,
    /// The language graph reads it by address.
    _rope: Buffer,
}

impl Session {
    /// Plans and allocates a session for `model`.
    ///
    /// # Errors
    /// An option out of range, or [`Error::Memory`] with the plan's numbers when it does not fit.
    pub fn new(model: Arc<Model>, options: SessionOptions) -> Result<Self> {
        let SessionPlan { language: language_plan, vision: vision_plan, memory } =
            SessionPlan::new(&model, &options)?;
        let (config, backend, max) = (&model.config().text, model.backend(), language_plan.max);
        match backend.available()? {
            None => memory.check(usable_memory())?,
            // Its weights are there already.
            Some(free) => MemoryPlan { weights: 0, ..memory }.check(free)?,
        }
        let arena = Arc::new(backend.alloc("activations", memory.arena as usize)?);
        let kv = KvPool::new(backend.clone(), config, max.pages)?;
        let rope = rope_table(&model, max.context)?;
        let mut states = vec![rope.addr];
        states.extend((0..config.num_layers).flat_map(|layer| kv.layer(layer)));
        let mut language =
            Executor::new(model.language().clone(), backend.clone(), language_plan, arena.clone(), &states);
        language.record(options.replay);
        let mut vision = model
            .vision()
            .zip(vision_plan)
            .map(|(v, plan)| Encoder::new(model.clone(), v.clone(), plan, arena.clone()))
            .transpose()?;
        if let Some(vision) = &mut vision {
            vision.record(options.replay);
        }
        let pages = SharedPages::new(PageAllocator::new(max.pages));
        let staging = Staging::with_capacity(&max, options.max_sequences);
        Ok(Session { model, language, vision, kv, pages, plan: memory, options, staging, _rope: rope })
    }

    /// The model.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// Where the bytes go.
    pub fn memory(&self) -> &MemoryPlan {
        &self.plan
    }

    /// Most positions of one sequence.
    pub fn context(&self) -> usize {
        self.plan.context
    }

    /// Most positions that one sequence can have when it has the KV cache for itself.
    pub fn longest(&self) -> usize {
        self.plan.context.min(self.plan.pages.saturating_mul(PAGE))
    }

    /// Most token rows of one step.
    pub fn prefill_chunk(&self) -> usize {
        self.language.plan().max.tokens
    }

    /// Most rows of logits of one step.
    pub fn max_outputs(&self) -> usize {
        self.language.plan().max.outputs
    }

    /// The page allocator.
    pub fn pages(&self) -> &SharedPages {
        &self.pages
    }

    /// The executor of the language graph, for inspection.
    pub fn language(&self) -> &Executor {
        &self.language
    }

    /// The executor of the vision graph, for inspection.
    pub fn vision(&self) -> Option<&Executor> {
        self.vision.as_ref().map(Encoder::executor)
    }

    /// A new sequence of `ids`, in which each of `images` takes the place of a range of placeholders.
    ///
    /// # Errors
    /// No ids, ids outside the vocabulary, more ids than the context holds, or images that do not fit
    /// their ranges.
    pub fn sequence(
        &self,
        ids: &[u32],
        images: Vec<(Range<usize>, Arc<EncodedImage>)>,
        sampling: Sampling,
    ) -> Result<Sequence> {
        sampling.validate()?;
        let vocab = self.model.config().text.vocab_size;
        if ids.is_empty() {
            return Err(Error::Prompt(
                "it has no tokens; write something, or let the tokenizer add BOS".into(),
            ));
        }
        if ids.len() > self.context() {
            let context = self.context();
            return Err(Error::Context { needed: ids.len(), prompt: ids.len(), new: 0, context });
        }
        if let Some((at, id)) = ids.iter().enumerate().find(|(_, id)| **id as usize >= vocab) {
            return Err(Error::Prompt(format!(
                "token {id} at position {at} is outside the model's vocabulary of {vocab}"
            )));
        }
        let mut end = 0;
        for (range, image) in &images {
            if !std::ptr::eq(image.model.as_ptr(), Arc::as_ptr(&self.model)) {
                return Err(Error::Prompt(
                    "an image was encoded by another model, or with other adapters; encode it with this one"
                        .into(),
                ));
            }
            if range.start < end || range.end > ids.len() || range.len() != image.len {
                return Err(Error::Prompt(format!(
                    "an image of {} rows cannot stand at positions {range:?} of {}",
                    image.len,
                    ids.len()
                )));
            }
            end = range.end;
        }
        let mut sequence = Sequence {
            ids: Vec::with_capacity(self.context() + 1),
            images,
            table: super::pages::PageTable::with_context(self.context()),
            pages: self.pages.clone(),
            seen: vec![0; vocab.div_ceil(32)],
            vocab_size: vocab,
            sampling,
        };
        for &id in ids {
            sequence.push(id);
        }
        if !self.model.rules().penalises_prompt() {
            sequence.seen.fill(0);
        }
        Ok(sequence)
    }

    /// A second sequence that continues from the same ids. Full pages are shared; the last, partly
    /// filled one is copied when either of the two writes to it.
    ///
    /// # Panics
    /// If the sequence belongs to another session, whose pages are not these.
    pub fn fork(&self, of: &Sequence) -> Sequence {
        assert!(of.pages.same(&self.pages), "a sequence of another session");
        let mut ids = Vec::with_capacity(self.context() + 1);
        ids.extend_from_slice(&of.ids);
        Sequence {
            ids,
            images: of.images.clone(),
            table: of.table.fork(&mut self.pages.lock()),
            pages: self.pages.clone(),
            seen: of.seen.clone(),
            vocab_size: of.vocab_size,
            sampling: of.sampling,
        }
    }

    /// Runs the vision tower and the projector on a picture.
    ///
    /// # Errors
    /// [`Error::Cancelled`]; [`Error::NonFinite`]; [`Error::Prompt`] if the model has no vision tower.
    ///
    /// # Panics
    /// If the pixels are not as many as the tower reads, or their order does not fit them.
    pub fn encode(&mut self, pixels: Pixels<'_>, control: &Control) -> Result<Encoded> {
        match &mut self.vision {
            Some(vision) => vision.encode(pixels, control),
            None => Err(Error::Prompt(format!("{} is a text model; it takes no images", self.model.name()))),
        }
    }

    /// Nodes that run for a picture of so many squares, for progress.
    pub fn vision_nodes(&self, squares: usize) -> usize {
        self.vision.as_ref().map_or(0, |vision| vision.nodes(squares))
    }

    /// The rows of an encoded image, for dumps.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub fn image_rows(&self, image: &EncodedImage) -> Result<Vec<f32>> {
        let backend = self.model.backend();
        let mut bytes = vec![0u8; image.rows.bytes];
        // SAFETY: the buffer is the image's own and nobody writes to it after `encode`.
        unsafe { backend.download(image.rows.addr, &mut bytes)? };
        Ok(backend.dtype().widen(&bytes))
    }

    /// Advances every sequence of `batch`. On success the processed ids are in the cache, and
    /// [`next`](Session::next) and [`logits`](Session::logits) tell the results; on an error no sequence has changed.
    ///
    /// # Errors
    /// [`Error::KvExhausted`], [`Error::Cancelled`], [`Error::NonFinite`], [`Error::Context`], [`Error::Device`].
    ///
    /// # Panics
    /// If the batch is larger than the session was made for, or a sequence belongs to another session:
    /// a scheduler's bug, not a user's.
    pub fn step(&mut self, batch: &mut [Advance<'_>], control: &Control) -> Result<()> {
        self.admit(batch)?;
        self.grow(batch)?;
        let staged = self.staging.stage(batch, &mut self.language, self.model.llama());
        let done = staged.and_then(|()| self.run(batch, control));
        if done.is_err() {
            for a in batch {
                let before = a.sequence.table.len() - a.tokens;
                a.sequence.forget(before);
            }
        }
        done
    }

    /// The token chosen for the i-th sequence of the last step.
    ///
    /// # Panics
    /// If nothing was wanted of it.
    pub fn next(&self, i: usize) -> u32 {
        let rows = &self.staging.outputs[i];
        assert!(!rows.is_empty(), "sequence {i} of the step wanted nothing");
        self.staging.next[rows.end - 1] as u32
    }

    /// Rows of logits of the i-th sequence of the last step.
    pub fn output_rows(&self, i: usize) -> usize {
        self.staging.outputs[i].len()
    }

    /// Copies the logits of output row `row` of the i-th sequence of the last step. With
    /// [`Want::Next`](super::Want::Next) there is one row, with [`Want::All`](super::Want::All) one for each
    /// token. To be read before the next step or [`encode`](Session::encode), which use the same memory.
    ///
    /// # Errors
    /// [`Error::Device`].
    ///
    /// # Panics
    /// If there is no such row or `logits` is not as long as the vocabulary.
    pub fn logits(&self, i: usize, row: usize, logits: &mut [f32]) -> Result<()> {
        let rows = &self.staging.outputs[i];
        assert!(row < rows.len(), "row {row} of {}", rows.len());
        let view = self.language.view(self.llama().logits, &self.staging.bindings);
        assert_eq!(logits.len(), view.cols);
        let addr = view.addr + (rows.start + row) * view.cols * 4;
        // SAFETY: the row lies inside the kept logits of the last step; no step runs (`&self`).
        unsafe { self.model.backend().download(addr, bytemuck::cast_slice_mut(logits)) }
    }

    /// Fills the whole KV cache with `value`, for tests of what must not be read.
    #[doc(hidden)]
    pub fn fill_kv(&mut self, value: f32) -> Result<()> {
        self.kv.fill(value)
    }

    /// The row counts of the last step, and what it touched of the KV cache: its work is
    /// [`Graph::cost`](crate::graph::Graph::cost) of these.
    pub fn last_step(&self) -> (Bindings, KvExtent) {
        (self.staging.bindings, self.language.kv_extent())
    }

    /// Why steps and pictures are not recorded and replayed, on a device that tried and failed.
    pub fn unrecorded(&self) -> Option<&Error> {
        self.language.unrecorded().or_else(|| self.vision()?.unrecorded())
    }

    /// Writes down when nodes run, so many of each graph; 0 stops it. See [`Executor::spans`]. On a GPU only one session
    /// at a time may be watched while it runs ([`Timing::Running`]).
    pub fn trace(&mut self, capacity: usize, timing: Timing) {
        self.language.trace(capacity, timing);
        if let Some(vision) = &mut self.vision {
            vision.trace(capacity, timing);
        }
    }

    fn llama(&self) -> &Llama {
        self.model.llama()
    }

    /// Checks a batch before anything changes.
    fn admit(&self, batch: &[Advance<'_>]) -> Result<()> {
        let max = &self.language.plan().max;
        let tokens: usize = batch.iter().map(|a| a.tokens).sum();
        assert!(!batch.is_empty() && batch.len() <= self.options.max_sequences, "{} sequences", batch.len());
        assert!(tokens <= max.tokens, "{tokens} rows, {} planned", max.tokens);
        let outputs: usize = batch.iter().map(Advance::outputs).sum();
        assert!(outputs <= max.outputs, "{outputs} rows of logits, {} planned", max.outputs);
        for a in batch {
            let sequence = &a.sequence;
            assert!(a.tokens > 0 && a.tokens <= sequence.pending(), "{} of {}", a.tokens, sequence.pending());
            assert!(sequence.pages.same(&self.pages), "a sequence of another session");
            let needed = sequence.table.len() + a.tokens;
            if needed > max.context {
                return Err(Error::Context {
                    needed,
                    prompt: sequence.table.len(),
                    new: a.tokens,
                    context: max.context,
                });
            }
        }
        Ok(())
    }

    /// Makes room for every sequence's new positions, or for none.
    fn grow(&mut self, batch: &mut [Advance<'_>]) -> Result<()> {
        let mut pages = self.pages.lock();
        for i in 0..batch.len() {
            let Advance { sequence, tokens, .. } = &mut batch[i];
            let before = sequence.table.len();
            let grown = sequence.table.grow(*tokens, &mut pages);
            let ready = grown.and_then(|copy| copy.map_or(Ok(()), |copy| self.kv.copy_page(copy)));
            if ready.is_err() {
                sequence.table.truncate(before, &mut pages);
                for Advance { sequence, tokens, .. } in &mut batch[..i] {
                    let before = sequence.table.len() - *tokens;
                    sequence.table.truncate(before, &mut pages);
                }
                return ready;
            }
        }
        Ok(())
    }

    fn run(&mut self, batch: &[Advance<'_>], control: &Control) -> Result<()> {
        let bindings = self.staging.bindings;
        let llama = self.model.llama().clone();
        let mut kv = KvExtent::default();
        for a in batch {
            kv += KvExtent::of(a.sequence.table.len() - a.tokens, a.tokens);
        }
        self.language.set_kv_extent(kv);
        // SAFETY: ids are inside the vocabulary (`Sequence::push` asserts it), sources and
        // selections are rows of this step, slots and tables come from the allocator of this KV pool and
        // positions are inside the context (`admit`); `&mut self` keeps arena and pool ours.
        unsafe { self.language.run(&bindings, control)? };
        let next = &mut self.staging.next[..bindings.outputs];
        self.language.read(llama.next, &bindings, next)?;
        if next.iter().any(|&id| id < 0) {
            // SAFETY: as above.
            let node = unsafe { self.language.first_non_finite(&bindings)? };
            let position = batch.iter().map(|a| a.sequence.table.len() - a.tokens).max().unwrap_or(0);
            return Err(non_finite(position, node));
        }
        Ok(())
    }
}

/// An error about a step that made NaN or infinity, first in `node`.
pub(super) fn non_finite(position: usize, node: Option<String>) -> Error {
    let node = node.unwrap_or_else(|| "unknown: it did not happen again".into());
    let hint = "; the checkpoint may hold NaN or infinite weights".to_string();
    Error::NonFinite { position, node, hint }
}

/// Cosines and sines of every position of the context `[context, E]`: the first half of a row are the
/// cosines of its E/2 angles, the second half their sines. Angles are products in f32, as Hugging Face
/// computes them.
fn rope_table(model: &Model, context: usize) -> Result<Buffer> {
    let inv_freq = model.config().text.inv_freq();
    let width = 2 * inv_freq.len();
    // The backend is asked first: it refuses what does not fit, where a vector would end the process.
    let buffer = model.backend().alloc("the rotation table", context * width * size_of::<f32>())?;
    let mut table = vec![0f32; context * width];
    for (position, row) in table.chunks_exact_mut(width).enumerate() {
        let (cos, sin) = row.split_at_mut(inv_freq.len());
        for ((cos, sin), &frequency) in cos.iter_mut().zip(sin).zip(&inv_freq) {
            let angle = position as f32 * frequency;
            (*cos, *sin) = (angle.cos(), angle.sin());
        }
    }
    // SAFETY: the buffer was just allocated with this size.
    unsafe { model.backend().upload(buffer.addr, bytemuck::cast_slice(&table))? };
    Ok(buffer)
}
