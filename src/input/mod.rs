//! What goes into a model: prompts as token ids.

pub mod prompt;
