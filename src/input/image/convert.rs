//! Pillow's `convert("RGB")` for every pixel layout the decoders yield.
//!
//! Palettes and greys of 1, 2 and 4 bits come expanded to 8 bits from the decoders. Alpha is dropped, not
//! composited: the colour under transparent pixels shows, as in Hugging Face's `load_image`.

use image::DynamicImage;

/// How 16-bit grey with alpha becomes 8-bit.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Grey16 {
    /// Pillow's mode `I;16`: values above 255 are 255, nothing is scaled. Grey without alpha is always so.
    Clip,
    /// The high byte, as in colours.
    HighByte,
}

/// The RGB bytes of `image`, or the name of a layout that Pillow does not convert either.
pub(super) fn to_rgb(image: DynamicImage, deep_alpha: Grey16) -> Result<Vec<u8>, String> {
    Ok(match image {
        DynamicImage::ImageRgb8(image) => image.into_raw(),
        DynamicImage::ImageRgba8(image) => drop_alpha(image.into_raw()),
        DynamicImage::ImageLuma8(image) => spread(image.as_raw(), 1, |v| v),
        DynamicImage::ImageLumaA8(image) => spread(image.as_raw(), 2, |v| v),
        DynamicImage::ImageLuma16(image) => spread(image.as_raw(), 1, clip),
        DynamicImage::ImageLumaA16(image) if deep_alpha == Grey16::Clip => spread(image.as_raw(), 2, clip),
        DynamicImage::ImageLumaA16(image) => spread(image.as_raw(), 2, high_byte),
        DynamicImage::ImageRgb16(image) => colours(image.as_raw(), 3, high_byte),
        DynamicImage::ImageRgba16(image) => colours(image.as_raw(), 4, high_byte),
        // Truncated and clipped, as Pillow's mode `F`.
        DynamicImage::ImageRgb32F(image) => colours(image.as_raw(), 3, |v| v as u8),
        DynamicImage::ImageRgba32F(image) => colours(image.as_raw(), 4, |v| v as u8),
        other => return Err(format!("pixels of type {:?} are not supported", other.color())),
    })
}

/// Pillow's CMYK (0 is no ink) to RGB: n = 255 - K, channel = n - round(ink * n / 255).
pub(super) fn cmyk_to_rgb([c, m, y, k]: [u8; 4]) -> [u8; 3] {
    let n = 255 - k;
    [c, m, y].map(|ink| {
        // Pillow's MULDIV255, the rounded division by 255; never above n.
        let t = u32::from(ink) * u32::from(n) + 128;
        n - (((t >> 8) + t) >> 8) as u8
    })
}

fn clip(value: u16) -> u8 {
    value.min(255) as u8
}

fn high_byte(value: u16) -> u8 {
    (value >> 8) as u8
}

/// The first of every `channels` samples, three times.
fn spread<T: Copy>(samples: &[T], channels: usize, to_u8: impl Fn(T) -> u8) -> Vec<u8> {
    samples.chunks_exact(channels).flat_map(|pixel| [to_u8(pixel[0]); 3]).collect()
}

/// The first three of every `channels` samples.
fn colours<T: Copy>(samples: &[T], channels: usize, to_u8: impl Fn(T) -> u8) -> Vec<u8> {
    samples.chunks_exact(channels).flat_map(|pixel| [0, 1, 2].map(|c| to_u8(pixel[c]))).collect()
}

/// RGBA to RGB in place: a picture of many megapixels is not held twice.
fn drop_alpha(mut bytes: Vec<u8>) -> Vec<u8> {
    let pixels = bytes.len() / 4;
    for i in 1..pixels {
        bytes.copy_within(i * 4..i * 4 + 3, i * 3);
    }
    bytes.truncate(pixels * 3);
    bytes
}
