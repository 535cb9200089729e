//! The KV pool: the bytes behind the pages. It knows layers and pages, and nothing of sequences.
//!
//! Layer after layer, first all K pages and then all V pages, in the device's dtype. On the CPU a K page holds
//! `[kv head][E][PAGE]`, so that one vector is the scores of sixteen positions, and a V page `[kv head][PAGE][E]`;
//! on a GPU both hold `[kv head][PAGE][E]`. Only the ops know.

use super::pages::PageCopy;
use crate::backend::{Backend, Buffer};
use crate::error::Result;
use crate::model::config::TextConfig;
use crate::op::PAGE;
use crate::tensor::DType;
use std::sync::Arc;

/// Memory for `pages` pages in every layer.
pub struct KvPool {
    backend: Arc<dyn Backend>,
    buffer: Buffer,
    layers: usize,
    pages: usize,
    /// Bytes of the K half, or the V half, of one page in one layer.
    half_page: usize,
}

impl KvPool {
    /// Allocates the pool. On the CPU its pages take memory when they are first written.
    ///
    /// # Errors
    /// [`Error::Memory`](crate::Error::Memory) when it does not fit.
    pub fn new(backend: Arc<dyn Backend>, config: &TextConfig, pages: usize) -> Result<Self> {
        let page = page_bytes(config, backend.dtype());
        let half_page = page / (2 * config.num_layers);
        let buffer = backend.alloc("the KV cache", pages * page)?;
        Ok(KvPool { backend, buffer, layers: config.num_layers, pages, half_page })
    }

    /// Bytes of the pool.
    pub fn bytes(&self) -> usize {
        self.buffer.bytes
    }

    /// Where the K pages and the V pages of `layer` begin.
    pub fn layer(&self, layer: usize) -> [usize; 2] {
        let k = self.buffer.addr + 2 * layer * self.pages * self.half_page;
        [k, k + self.pages * self.half_page]
    }

    /// Writes `value` everywhere.
    pub fn fill(&mut self, value: f32) -> Result<()> {
        let dtype = self.backend.dtype();
        let mut page = vec![0u8; self.half_page];
        dtype.round_to(&vec![value; self.half_page / dtype.size()], &mut page);
        for at in (0..self.buffer.bytes).step_by(self.half_page) {
            // SAFETY: a whole half page of this pool; `&mut self`: no step runs meanwhile.
            unsafe { self.backend.upload(self.buffer.addr + at, &page)? };
        }
        Ok(())
    }

    /// Copies a page in every layer. `&mut self`: no step runs meanwhile.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) when a copy fails.
    ///
    /// # Panics
    /// If a page is not in the pool.
    pub fn copy_page(&mut self, PageCopy { from, to }: PageCopy) -> Result<()> {
        let (from, to) = (from as usize, to as usize);
        assert!(from != to && from.max(to) < self.pages, "pages {from} and {to} of {}", self.pages);
        for half in (0..self.layers).flat_map(|layer| self.layer(layer)) {
            let (from, to) = (half + from * self.half_page, half + to * self.half_page);
            // SAFETY: both are whole pages of this pool (asserted) and differ, so they do not overlap.
            unsafe { self.backend.copy(from, to, self.half_page)? };
        }
        Ok(())
    }
}

/// Bytes of one page over all layers, in a cache of `dtype`.
pub fn page_bytes(config: &TextConfig, dtype: DType) -> usize {
    2 * config.num_layers * config.num_kv_heads * config.head_dim * PAGE * dtype.size()
}
