//! Models: what a checkpoint directory holds and means (configurations, weights, the names they go by,
//! and presets that need no checkpoint at all), and the graphs that its parts become: [`clip`],
//! [`projector`], [`llama`], put together by [`llava`].

pub mod checkpoint;
pub mod clip;
pub mod config;
pub mod json;
pub mod linear;
pub mod llama;
pub mod llava;
pub mod lora;
pub mod names;
pub mod parts;
pub mod preset;
pub mod projector;
pub mod random;
pub mod synth;
pub mod weights;
