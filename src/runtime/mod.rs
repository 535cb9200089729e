//! From a request to tokens: pages and the KV pool, sequences, sessions that advance them in batches,
//! and the engine that turns pictures and questions into text.
//!
//! [`Model`] is shared and read-only: configuration, tokenizer, graphs, weights. [`Session`] owns what a
//! running model writes to: one arena and the KV cache. [`Engine`] is a session with a front desk. [`Clip`] is
//! CLIP by itself.

pub mod batch;
pub mod clip;
pub mod device;
pub mod engine;
pub mod kv;
pub mod model;
pub mod pages;
pub mod pictures;
pub mod request;
pub mod rules;
pub mod sampling;
pub mod sequence;
pub mod session;
pub mod size;
pub mod vision;

pub use batch::{Advance, Phase, Want};
pub use clip::{Clip, Embedding, softmax};
pub use device::{Device, DeviceOptions};
pub use engine::{Engine, ImageHandle};
pub use model::{LoadOptions, Model, Source};
pub use request::{Completion, FinishReason, Input, Request};
pub use rules::Rules;
pub use sampling::Sampling;
pub use sequence::{EncodedImage, Sequence};
pub use session::Session;
pub use size::{MemoryPlan, SessionOptions, SessionPlan};
pub use vision::{Encoded, Pixels};
