//! Tessera is a from-scratch runtime for LLaVA: an image goes through a CLIP vision transformer, a GELU
//! projector turns its patches into token embeddings, and a LLaMA language model with a paged KV cache
//! answers. It runs stock Hugging Face checkpoints, mapped and used in place, on a CPU backend that is
//! part of the library. (A tessera is one tile of a mosaic: image patches, matrix tiles and KV pages
//! are all tiles.)
//!
//! ```
//! use tessera::runtime::{Engine, LoadOptions, Request, SessionOptions, Source};
//!
//! # fn main() -> tessera::Result<()> {
//! let mut engine = Engine::load(&Source::Demo, &LoadOptions::default(), SessionOptions::default())?;
//! # let scene = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/samples/scene1.png");
//! # let bytes = std::fs::read(scene).unwrap();
//! let image = engine.image("scene1.png", &bytes)?;
//! let request = Request::ask("Where is the circle?", &[image])?;
//! let answer = engine.generate(&request, |text| print!("{text}"))?;
//! assert_eq!(answer.text, "The circle is at the top left.");
//! # Ok(())
//! # }
//! ```
//!
//! # A bird's eye view
//!
//! ```text
//! picture ── input::image ──> pixels ──┐
//!                                      │  runtime::vision: vision graph, once a picture and its tiles
//!                                      └─> rows ─────────────┐
//! question ── input::prompt ──> ids, image tokens expanded ──┴─> sequence
//!                                                                   │  runtime::session::step
//!             text <── input::prompt::TextStream <── token ids <────┘  language graph, once a chunk or token
//! ```
//!
//! Everything a request needs is known before its first step: the prompt's length, where each picture's
//! rows stand, how many pages it will take. Nothing is spliced later.
//!
//! # The house
//!
//! Arrows point one way: a module uses only modules above it (`tests/tidy.rs` checks it).
//!
//! | module | holds | does not hold |
//! |---|---|---|
//! | [`error`] | one enum; every variant names a file, tensor, option or op, what was expected and found | |
//! | [`folder`] | where a model's files are: a directory, compiled in, or in memory | parsing |
//! | [`tensor`] | dtypes, shapes with symbolic rows, views of device memory, weights as raw bytes | arithmetic |
//! | [`op`] | the closed list of operations, their shape rules ([`op::Op::infer`]) and costs | how they are computed |
//! | [`backend`] | devices: memory, and one op at a time; `cpu` computes, `cuda` launches kernels on a GPU or an emulated device | models, sequences, files |
//! | [`graph`] | a flat node list, a planner of lifetimes, an executor that is a for-loop and replays what recurs, a comparison of two devices | passes, rewriting |
//! | [`input`] | image bytes to pixels; conversations to ids and ids to text (uses only `error`, `folder`, `tensor`) | models |
//! | [`model`] | configurations, checkpoints, names, presets, adapters; the graphs of towers, projector, LLaMA | memory that changes |
//! | [`runtime`] | pages (integers), KV pool (bytes), sequences, sessions, the engine; CLIP by itself | terminal, arguments |
//! | [`bench`](mod@bench) | stages, ops and starts against the ceilings of the same run; traces, tables, comparisons | terminal, arguments |
//! | [`cli`] | one file a command | anything a library user would miss |
//!
//! An op is found by its name in every room: [`op::Op::RmsNorm`] is computed in `backend/cpu/norm.rs`, and on a
//! GPU by `kernels/norm.cu`, which `backend/cuda/norm.rs` launches.
//!
//! # Invariants
//!
//! - **A row's result has the same bits whatever rows stand beside it**: whatever batch, chunk, pages or
//!   threads. Each sum has one written-down order (`backend/cpu/linear/`, `attention.rs`), which names no
//!   row count; on the CPU it is the same for every instruction set. A device may have one family of kernels
//!   for rows of given text and one for rows of chosen tokens: there a row's [`runtime::Phase`] counts as well.
//! - **A step allocates nothing.** Intermediates lie in one arena, planned from lifetimes for the largest
//!   step; rows are staged in vectors of fixed capacity. A counting allocator checks it.
//! - **On the CPU weights are used where they are.** A checkpoint is mapped; loading parses its header, and a page of
//!   it becomes resident when a kernel first reads it. Nothing is converted or copied; adapters lie beside
//!   the weights as low-rank pairs ([`op::Pair`]) and are not merged into them. To a GPU weights stream through
//!   pinned memory, in the layout and dtype of its kernels.
//! - **[`op::Op::infer`] is the only shape authority.** Backends may assert what it says and decide nothing.
//! - **A new op breaks the build where work is due**: every `match` on ops is exhaustive.
//! - **Full KV pages are immutable**; forks share them, and a shared tail is copied before it is written.
//! - **Bad input is a typed [`Error`]**: never a panic, never an abort, and never another sequence's problem.
//! - **`unsafe` lives in few files**, each block with the obligation it has and who meets it.
//!
//! No two models or sessions share anything that changes, and the library reads no environment variables but, on a
//! GPU, `NVTX_INJECTION64_PATH`, by which a profiler says that it wants to be told of ranges. (The command line finds the
//! cache of Hugging Face by those that Hugging Face has for it: `HF_HUB_CACHE`, `HF_HOME`, `XDG_CACHE_HOME`.)
//!
//! # The life of a request
//!
//! 1. [`runtime::Engine::image`] decodes a picture, resizes it as Pillow would, and runs the vision graph
//!    once, in LLaVA-NeXT on the picture and its tiles together. The rows stay in a buffer of their own; any
//!    number of requests can use them, and a picture that comes again is known by its digest.
//! 2. [`runtime::Engine::generate`] renders the conversation, tokenises it and expands image tokens: a list
//!    of ids, and the ranges in it that are pictures. Too long for the context? An error, before any work.
//! 3. A [`runtime::Sequence`] takes over the pages of the last one as far as the two agree.
//! 4. [`runtime::Session::step`] grows the page table, packs up to a chunk of rows, and runs the language
//!    graph: embedding rows or picture rows, then each layer, which writes keys and values to their slots
//!    and reads them through page tables; then logits and the next token for the rows that want them.
//! 5. The token is appended, its text streamed, and step 4 repeats with one row, until an end-of-text
//!    token, a stop string, a limit, or [`graph::Control::cancel`].

pub mod backend;
pub mod bench;
pub mod cli;
pub mod error;
pub mod folder;
pub mod graph;
pub mod input;
pub mod model;
pub mod op;
pub mod runtime;
pub mod tensor;

pub use error::{Error, Result};

/// The README's example compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
