//! A sequence: the ids of a prompt and of the answer so far, the pictures among them, and the pages
//! that hold the keys and values of those already processed.

use super::model::Model;
use super::pages::{PageAllocator, PageTable};
use super::sampling::Sampling;
use crate::backend::Buffer;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, Weak};

/// A picture after vision tower and projector: rows that take the place of token embeddings.
pub struct EncodedImage {
    /// `[rows, D]` of the device's dtype, on the device.
    pub rows: Buffer,
    /// How many rows.
    pub len: usize,
    /// SHA-256 of the decoded pixels, their geometry and the preprocessing: the picture's identity.
    pub digest: [u8; 32],
    /// The model that made the rows: another, or the same with another adapter, would make others.
    pub(super) model: Weak<Model>,
}

impl fmt::Debug for EncodedImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "EncodedImage({} rows)", self.len)
    }
}

/// The page allocator of a session, shared with the sequences that must give their pages back.
#[derive(Clone, Debug)]
pub struct SharedPages(Arc<Mutex<PageAllocator>>);

impl SharedPages {
    /// Shares `pages`.
    pub fn new(pages: PageAllocator) -> Self {
        SharedPages(Arc::new(Mutex::new(pages)))
    }

    /// Pages in the pool.
    pub fn total(&self) -> usize {
        self.lock().total()
    }

    /// Pages that nobody holds.
    pub fn free(&self) -> usize {
        self.lock().free()
    }

    /// Checks the bookkeeping; see [`PageAllocator::check_integrity`].
    ///
    /// # Errors
    /// The first contradiction, in words.
    pub fn check_integrity<'a>(
        &self,
        tables: impl IntoIterator<Item = &'a PageTable>,
    ) -> std::result::Result<(), String> {
        self.lock().check_integrity(tables)
    }

    /// The allocator. A panic elsewhere while it was held cannot leave it half changed: every method
    /// of it checks before it changes anything.
    pub(super) fn lock(&self) -> MutexGuard<'_, PageAllocator> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Whether two handles share one allocator.
    pub fn same(&self, other: &SharedPages) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// One conversation or completion in progress. Made by [`Session::sequence`](super::Session::sequence);
/// dropping it gives its pages back.
#[derive(Debug)]
pub struct Sequence {
    pub(super) ids: Vec<u32>,
    pub(super) images: Vec<(Range<usize>, Arc<EncodedImage>)>,
    pub(super) table: PageTable,
    pub(super) pages: SharedPages,
    /// A bit for every id of the vocabulary that stands in `ids`.
    pub(super) seen: Vec<i32>,
    pub(super) vocab_size: usize,
    /// How its tokens are chosen.
    pub sampling: Sampling,
}

impl Sequence {
    /// All ids, processed or not.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Positions whose keys and values are in the cache.
    pub fn cached(&self) -> usize {
        self.table.len()
    }

    /// Ids that wait to be processed.
    pub fn pending(&self) -> usize {
        self.ids.len() - self.table.len()
    }

    /// The pages that hold the cached positions.
    pub fn page_table(&self) -> &PageTable {
        &self.table
    }

    /// Appends a token: one that was sampled, or a given one to score.
    ///
    /// # Panics
    /// If `id` is outside the model's vocabulary: a step would read beyond the embedding.
    pub fn push(&mut self, id: u32) {
        assert!((id as usize) < self.vocab_size, "token {id} of a vocabulary of {}", self.vocab_size);
        self.ids.push(id);
        self.seen[id as usize / 32] |= 1 << (id % 32);
    }

    /// Forgets what was cached beyond the first `len` positions; the ids stay and become pending.
    pub fn forget(&mut self, len: usize) {
        self.table.truncate(len, &mut self.pages.lock());
    }

    /// Takes over what `last` has cached, as far as its ids and pictures are the same; at least one id
    /// stays pending, because only a step makes logits.
    pub(super) fn adopt(&mut self, mut last: Sequence) {
        let mut same = self.ids.iter().zip(&last.ids).take_while(|(a, b)| a == b).count();
        same = same.min(last.table.len()).min(self.ids.len() - 1);
        let images = self.images.iter().zip(&last.images);
        let agree = images.take_while(|(a, b)| a.0 == b.0 && a.1.digest == b.1.digest).count();
        // Placeholder ids are all alike: beyond the first picture that differs nothing is the same.
        for list in [&self.images, &last.images] {
            same = same.min(list.get(agree).map_or(same, |(range, _)| range.start));
        }
        last.forget(same);
        std::mem::swap(&mut self.table, &mut last.table);
    }

    /// The picture that covers `position`, and which of its rows stands there.
    pub(super) fn image_at(&self, position: usize) -> Option<(&Range<usize>, &Arc<EncodedImage>)> {
        let after = self.images.partition_point(|(range, _)| range.end <= position);
        let (range, image) = self.images.get(after)?;
        range.contains(&position).then_some((range, image))
    }
}

impl Drop for Sequence {
    fn drop(&mut self) {
        self.forget(0);
    }
}
