//! Image bytes to pixels, as Pillow and Hugging Face's CLIP image processor make them.
//!
//! [`decode`] turns a file into an upright RGB [`Picture`], [`Preprocess`] turns a picture into what the
//! vision tower reads, for LLaVA-NeXT in several tiles ([`Tiling`]). Every step is integer exact until the
//! last one, which looks f32 values up in a table: for a losslessly stored picture the result has the
//! reference's bits. (JPEG and lossy WebP decoders are free to differ by a few levels, and do.)
//!
//! The reference is the PIL backend of transformers; its torchvision backend resizes with coarser weights
//! and differs by a level, seldom two, in up to 1 % of the values.

mod convert;
mod decode;
mod png;
mod preprocess;
pub mod resize;
mod tiff;
mod tiling;

pub use decode::{DecodeOptions, MAX_PIXELS, decode};
pub use preprocess::{ImageMode, Preprocess, pixels_sha256};
pub use tiling::{Merge, NEWLINE, Tiles, Tiling};

/// A decoded picture: 8-bit RGB, upright, rows from the top without gaps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    /// Pixels in a row; not zero.
    pub width: usize,
    /// Rows; not zero.
    pub height: usize,
    /// `height * width * 3` bytes.
    pub rgb: Vec<u8>,
}
