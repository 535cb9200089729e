//! The embedded CPU backend.
pub mod lanes;
pub mod linear;
pub mod machine;
pub mod panel;
pub mod pool;
