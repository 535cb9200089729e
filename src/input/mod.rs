//! What goes into a model: image bytes to pixels, conversations to token ids. Knows nothing of models,
//! devices or graphs.

pub mod image;
pub mod prompt;
