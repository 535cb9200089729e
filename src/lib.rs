//! Tessera
pub mod error;
pub mod model;
pub mod tensor;
pub use error::{Error, Result};
