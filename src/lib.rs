//! Tessera
pub mod backend;
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
