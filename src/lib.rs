//! Tessera
pub mod error;
pub mod input;
pub mod tensor;
pub use error::{Error, Result};
