//! What data looks like, and nothing about what is done with it: element types, the shapes of
//! activations, views of device memory, and weights as raw bytes. No arithmetic lives
//! here, only the writing of one float type as another.
//!
//! Activations are two-dimensional everywhere: rows (tokens, patches, sequences) by columns
//! (features). A dimension that looks like a third (heads, images) is a fact of the op that reads it.

mod dtype;
mod shape;
mod weight;

pub use dtype::DType;
pub use shape::{Bindings, Rows, TensorType, View};
pub use weight::{Storage, Weight, WeightBytes};
