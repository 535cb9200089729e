//! How large a session is, and where its bytes go.

use super::kv::page_bytes;
use super::model::Model;
use super::vision;
use crate::error::{Error, Result};
use crate::graph::Plan;
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
    /// Most squares, pictures or tiles of one, that pass through the vision tower together. More go in
    /// several runs, to the same bits.
    pub vision_batch: usize,
    /// Makes room for the logits of every row of a step; without it, for as many rows as sequences.
    pub all_logits: bool,
    /// Replays recorded steps on a device that can; without it, every kernel is launched anew. The bits are the same.
    pub replay: bool,
}

impl Default for SessionOptions {
    fn default() -> Self {
        SessionOptions {
            context: None,
            kv_memory: None,
            prefill_chunk: 1024,
            max_sequences: 8,
            vision_batch: 8,
            all_logits: false,
            replay: true,
        }
    }
}

/// Where the bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Weights, mapped or in memory, with the padding that a device's kernels want.
    pub weights: u64,
    /// The KV pool.
    pub kv: u64,
    /// Inputs, intermediates and workspace of the larger of the two graphs.
    pub arena: u64,
    /// What the vision graph needs of the arena, for as many squares as it reads together.
    pub vision_arena: u64,
    /// The projected squares of a picture, in a model that sees tiles.
    pub squares: u64,
    /// Memory of this machine, not the device's, that copies pass through.
    pub pinned: u64,
    /// Pages in the pool.
    pub pages: usize,
    /// Most positions of one sequence.
    pub context: usize,
}

impl MemoryPlan {
    /// All of it that is on the device.
    pub fn total(&self) -> u64 {
        self.weights + self.kv + self.arena + self.squares
    }

    /// Refuses a plan for more than `available` bytes of memory; 0 stands for not known. Weights count although
    /// they are mapped: every step reads all of them, from the disk if they do not stay in memory.
    ///
    /// # Errors
    /// [`Error::Memory`] with the numbers.
    pub fn check(&self, available: u64) -> Result<()> {
        let needed = self.total();
        if available == 0 || needed <= available {
            return Ok(());
        }
        let MemoryPlan { weights, kv, arena, context, .. } = self;
        let remedy = match *weights > available {
            true => "; take a machine with more, or a smaller model",
            false => "; lower --context, --kv-memory or --prefill-chunk",
        };
        Err(Error::Memory {
            what: format!(
                "{weights} bytes of weights, the KV cache of {kv} bytes (context {context}) and {arena} of activations"
            ),
            needed,
            available,
            remedy: remedy.into(),
        })
    }
}

/// A session before anything is allocated for it.
#[derive(Clone, Debug)]
pub struct SessionPlan {
    /// Where the language graph's values lie.
    pub language: Plan,
    /// Where the vision graph's values lie, unless this is a text model.
    pub vision: Option<Plan>,
    /// Where the bytes go.
    pub memory: MemoryPlan,
}

impl SessionPlan {
    /// Plans a session for `model`.
    ///
    /// # Errors
    /// [`Error::Option`] for an option out of range.
    pub fn new(model: &Model, options: &SessionOptions) -> Result<Self> {
        let config = &model.config().text;
        let backend = &**model.backend();
        let max = limits(config, options, backend.dtype())?;
        let language = Plan::new(model.language(), backend, max);
        let vision = model.vision().map(|v| vision::plan(model, v, options)).transpose()?;
        let vision_arena = vision.as_ref().map_or(0, |plan| plan.bytes);
        let memory = MemoryPlan {
            weights: model.weight_bytes(),
            kv: (max.pages * page_bytes(config, backend.dtype())) as u64,
            arena: language.bytes.max(vision_arena) as u64,
            vision_arena: vision_arena as u64,
            squares: model.vision().map_or(0, vision::squares_bytes) as u64,
            pinned: backend.pinned() as u64,
            pages: max.pages,
            context: max.context,
        };
        Ok(SessionPlan { language, vision, memory })
    }
}

/// The largest step of a session whose KV cache is of `dtype`.
fn limits(config: &TextConfig, options: &SessionOptions, dtype: DType) -> Result<Bindings> {
    let page_bytes = page_bytes(config, dtype);
    let context = options.context.unwrap_or(config.max_positions.min(DEFAULT_CONTEXT));
    if context == 0 || context > config.max_positions {
        let most = match config.sliding_window {
            Some(_) => "the model's sliding window, beyond which it is not supported",
            None => "the positions the model was made for",
        };
        let expected = format!("1 to {}, {most}", config.max_positions);
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
    // One sequence has no more rows than the context, but several are packed into a step.
    let tokens = options.prefill_chunk.min(context * options.max_sequences).max(options.max_sequences);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_that_does_not_fit_is_refused_with_its_numbers() {
        // LLaVA-1.5-13B with a cache of f32 and a context of 4096.
        let plan = MemoryPlan {
            vision_arena: 0,
            squares: 0,
            pinned: 0,
            weights: 26_677_602_304,
            kv: 6_710_886_400,
            arena: 300 << 20,
            pages: 256,
            context: 4096,
        };
        assert!(plan.check(plan.total()).is_ok() && plan.check(0).is_ok());
        for (available, remedy) in [(plan.total() - 1, "lower --context"), (24 << 30, "a smaller model")] {
            let error = plan.check(available).unwrap_err().to_string();
            let needed = plan.total().to_string();
            for part in ["26677602304", "6710886400", "context 4096", &needed, &available.to_string(), remedy]
            {
                assert!(error.contains(part), "{part}: {error}");
            }
        }
    }
}
