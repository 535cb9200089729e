//! How large a session is, and where its bytes go.

use super::kv::page_bytes;
use crate::error::{Error, Result};
use crate::model::config::TextConfig;
use crate::op::PAGE;
use crate::tensor::{Bindings, DType};

/// How large a session is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionOptions {
    /// Most positions of one sequence; `None` takes what the model was made for.
    pub context: Option<usize>,
    /// Bytes of the KV cache; `None` makes room for one sequence of `context` positions.
    pub kv_memory: Option<u64>,
    /// Most token rows of one step.
    pub prefill_chunk: usize,
    /// Most sequences of one step.
    pub max_sequences: usize,
    /// Makes room for the logits of every row of a step; without it, for as many rows as sequences.
    pub all_logits: bool,
}

impl Default for SessionOptions {
    fn default() -> Self {
        SessionOptions {
            context: None,
            kv_memory: None,
            prefill_chunk: 1024,
            max_sequences: 8,
            all_logits: false,
        }
    }
}

/// Where the bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Weights, mapped or in memory.
    pub weights: u64,
    /// The KV pool.
    pub kv: u64,
    /// Inputs, intermediates and workspace of the larger of the two graphs.
    pub arena: u64,
    /// Pages in the pool.
    pub pages: usize,
    /// Most positions of one sequence.
    pub context: usize,
}

impl MemoryPlan {
    /// All of it.
    pub fn total(&self) -> u64 {
        self.weights + self.kv + self.arena
    }
}

/// The largest step of a session whose KV cache is of `dtype`.
pub(super) fn limits(config: &TextConfig, options: &SessionOptions, dtype: DType) -> Result<Bindings> {
    let page_bytes = page_bytes(config, dtype);
    let context = options.context.unwrap_or(config.max_positions.min(DEFAULT_CONTEXT));
    if context == 0 || context > config.max_positions {
        let expected = format!("1 to {}, the positions the model was made for", config.max_positions);
        return Err(Error::option("--context", expected, context));
    }
    if options.prefill_chunk == 0 {
        return Err(Error::option("--prefill-chunk", "at least 1", 0));
    }
    if !(1..=MAX_SEQUENCES).contains(&options.max_sequences) {
        let expected = format!("1 to {MAX_SEQUENCES}");
        return Err(Error::option("max_sequences", expected, options.max_sequences));
    }
    let pages = match options.kv_memory {
        None => context.div_ceil(PAGE),
        Some(bytes) => usize::try_from(bytes).unwrap_or(usize::MAX) / page_bytes,
    };
    if pages == 0 {
        let expected = format!("at least one page of {PAGE} positions, {page_bytes} bytes");
        return Err(Error::option("--kv-memory", expected, options.kv_memory.unwrap_or(0)));
    }
    let pages = pages.min(MAX_PAGES);
    let tokens = options.prefill_chunk.min(context).max(options.max_sequences);
    Ok(Bindings {
        tokens,
        decode: 0,
        outputs: if options.all_logits { tokens } else { options.max_sequences },
        decode_outputs: 0,
        images: 0,
        // No sequence is longer than the context, however large the pool is.
        table_entries: options.max_sequences * context.div_ceil(PAGE),
        pages,
        context,
    })
}

/// The context of a session that asks for none: what LLaVA-1.5 was made for. Models that could hold
/// a hundred thousand positions would take tens of gigabytes of cache for it.
const DEFAULT_CONTEXT: usize = 4096;

/// More than any machine steps at once; staging vectors and page tables stay of sane size.
const MAX_SEQUENCES: usize = 4096;

/// Slots are i32.
const MAX_PAGES: usize = i32::MAX as usize / PAGE;
