//! What a checkpoint directory holds and what it means: configurations, weights and the names they
//! go by, and the presets that need no checkpoint at all.

pub mod checkpoint;
pub mod config;
pub mod json;
pub mod names;
pub mod preset;
pub mod random;
pub mod synth;
pub mod weights;
