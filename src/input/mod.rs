//! What a person hands in, turned into what the graphs read: pictures into pixels.
pub mod image;
