//! A file's bytes to an upright RGB picture.
//!
//! The bytes are untrusted. The size is checked from the header before anything is allocated for pixels,
//! the decoders run with a memory limit, and a decoder that panics is an error like any other.

use std::io::Cursor;

use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits};

use super::convert::{Grey16, to_rgb};
use super::{Picture, png, tiff};
use crate::error::{Error, Result, guarded};

/// The largest picture that is decoded, in pixels: where Pillow raises `DecompressionBombError`.
pub const MAX_PIXELS: u64 = 178_956_970;

/// What a decoder may allocate beside the pixels: tables, text chunks, profiles.
pub(super) const HEADROOM: u64 = 64 << 20;

/// How a file is read.
#[derive(Clone, Copy, Debug)]
pub struct DecodeOptions {
    /// Turn the picture as its EXIF orientation says. Hugging Face's loader does; the original LLaVA did
    /// not. (TIFF is turned either way, as by Pillow.)
    pub exif_orientation: bool,
    /// Make a single transparent colour white, as transformers 5 does; the original LLaVA shows the colour.
    pub whiten_transparent: bool,
}

impl Default for DecodeOptions {
    fn default() -> Self {
        DecodeOptions { exif_orientation: true, whiten_transparent: true }
    }
}

/// The first frame of a PNG, JPEG, WebP, GIF, BMP or TIFF file. The format is told by the bytes, not by
/// `name`, which is for error messages.
pub fn decode(name: &str, bytes: &[u8], options: &DecodeOptions) -> Result<Picture> {
    guarded(|| read(bytes, options))
        .unwrap_or_else(|| Err("the decoder gave up on it; the file is damaged".into()))
        .map_err(|problem| Error::image(name, problem))
}

fn read(bytes: &[u8], options: &DecodeOptions) -> Result<Picture, String> {
    let mut limits = Limits::default();
    limits.max_alloc = Some(HEADROOM);
    let bytes = &*png::with_end(bytes);
    let mut reader = ImageReader::new(Cursor::new(bytes));
    reader.limits(limits.clone());
    let reader = reader.with_guessed_format().map_err(|error| error.to_string())?;
    if tiff::is_big(bytes) || reader.format() == Some(ImageFormat::Tiff) {
        let page = tiff::read(bytes)?;
        return upright(page.width, page.height, page.rgb, page.orientation);
    }
    let format = reader.format().ok_or_else(|| unknown_format(bytes))?;
    if format == ImageFormat::Gif {
        return read_gif(bytes, options).map_err(|error| error.to_string());
    }
    let mut decoder = reader.into_decoder().map_err(|error| error.to_string())?;

    let (width, height) = decoder.dimensions();
    let pixels = check_size(width, height)?;
    limits.max_alloc = Some(HEADROOM + pixels * 16);
    decoder.set_limits(limits).map_err(|error| error.to_string())?;
    if format == ImageFormat::Jpeg && !jpeg_has_end(bytes) {
        return Err("the file is cut off: the JPEG end marker is missing".into());
    }

    let orientation = match options.exif_orientation {
        true => orientation(&mut decoder),
        false => Orientation::NoTransforms,
    };
    let facts = match format {
        ImageFormat::Png => png::facts(bytes),
        _ => png::Facts::default(),
    };
    // 16-bit grey with a transparent value, which the decoder turns into alpha, stays mode I;16 in Pillow.
    let deep_alpha = if facts.alpha { Grey16::HighByte } else { Grey16::Clip };
    let decoded = DynamicImage::from_decoder(decoder).map_err(|error| error.to_string())?;
    let mut rgb = to_rgb(decoded, deep_alpha)?;
    if let Some(colour) = facts.transparent.filter(|_| options.whiten_transparent) {
        whiten(&mut rgb, colour);
    }
    upright(width, height, rgb, orientation)
}

/// Makes `colour` white. A single transparent colour survives Pillow's conversion to RGB as a note, and
/// transformers 5 then puts the picture on white; an alpha channel does not, and is dropped.
fn whiten(rgb: &mut [u8], colour: [u8; 3]) {
    for pixel in rgb.as_chunks_mut::<3>().0 {
        if *pixel == colour {
            *pixel = [255; 3];
        }
    }
}

/// The number of pixels, if there may be so many.
pub(super) fn check_size(width: u32, height: u32) -> Result<u64, String> {
    let pixels = u64::from(width) * u64::from(height);
    if pixels == 0 {
        return Err(format!("the header says {width}x{height} pixels, expected at least 1x1"));
    }
    if pixels > MAX_PIXELS {
        return Err(format!(
            "the header says {width}x{height} pixels, at most {MAX_PIXELS} are decoded; make the picture smaller"
        ));
    }
    Ok(pixels)
}

fn unknown_format(bytes: &[u8]) -> String {
    let found = match bytes {
        [] => "an empty file".into(),
        _ => format!("a file that begins with {:02x?}", &bytes[..bytes.len().min(8)]),
    };
    format!("expected PNG, JPEG, WebP, GIF, BMP or TIFF, found {found}")
}

/// The first frame of a GIF. It is read as palette indices, since its margin on the screen has one too: the
/// transparent index, else 0. The screen grows where the frame passes it.
fn read_gif(bytes: &[u8], reading: &DecodeOptions) -> Result<Picture, Box<dyn std::error::Error>> {
    let mut options = gif::DecodeOptions::new();
    options.set_color_output(gif::ColorOutput::Indexed);
    options.set_memory_limit(gif::MemoryLimit::Bytes((HEADROOM + MAX_PIXELS).try_into()?));
    let mut decoder = options.read_info(bytes)?;
    let screen = [u32::from(decoder.width()), u32::from(decoder.height())];
    let frame = decoder.next_frame_info()?.ok_or("there is no picture in it")?;
    let transparent = frame.transparent;
    let at = [frame.left, frame.top].map(usize::from);
    let size = [frame.width, frame.height].map(usize::from);
    let [width, height] = [0, 1].map(|i| screen[i].max((at[i] + size[i]) as u32));
    check_size(frame.width.into(), frame.height.into())?;
    check_size(width, height)?;
    let [width, height] = [width as usize, height as usize];

    let mut indices = vec![0; size[0] * size[1]];
    decoder.read_into_buffer(&mut indices)?;
    let palette = decoder.palette()?.as_chunks::<3>().0;
    let colour = |index: u8| palette.get(usize::from(index)).copied().unwrap_or([0; 3]);
    let mut rgb = colour(transparent.unwrap_or(0)).repeat(width * height);
    for (y, line) in indices.chunks_exact(size[0]).enumerate() {
        let start = ((at[1] + y) * width + at[0]) * 3;
        for (to, &index) in rgb[start..].as_chunks_mut::<3>().0.iter_mut().zip(line) {
            *to = colour(index);
        }
    }
    if let Some(index) = transparent.filter(|_| reading.whiten_transparent) {
        whiten(&mut rgb, colour(index));
    }
    Ok(Picture { width, height, rgb })
}

/// The picture of `rgb` as stored, turned upright.
fn upright(width: u32, height: u32, rgb: Vec<u8>, orientation: Orientation) -> Result<Picture, String> {
    let stored =
        image::RgbImage::from_raw(width, height, rgb).ok_or("the decoder returned too few pixels")?;
    let mut turned = DynamicImage::ImageRgb8(stored);
    turned.apply_orientation(orientation);
    let (width, height) = (turned.width() as usize, turned.height() as usize);
    Ok(Picture { width, height, rgb: turned.into_rgb8().into_raw() })
}

/// The orientation in EXIF or, without one, in XMP; upright where metadata are damaged.
fn orientation(decoder: &mut impl ImageDecoder) -> Orientation {
    match decoder.orientation() {
        Ok(Orientation::NoTransforms) | Err(_) => {}
        Ok(found) => return found,
    }
    let xmp = decoder.xmp_metadata().ok().flatten().unwrap_or_default();
    xmp_orientation(&xmp).and_then(Orientation::from_exif).unwrap_or(Orientation::NoTransforms)
}

/// The digit that Pillow's `tiff:Orientation(="|>)([0-9])` finds.
pub(super) fn xmp_orientation(xmp: &[u8]) -> Option<u8> {
    const KEY: &[u8] = b"tiff:Orientation";
    let after = xmp.windows(KEY.len()).position(|window| window == KEY)? + KEY.len();
    let value = xmp[after..].strip_prefix(b"=\"").or_else(|| xmp[after..].strip_prefix(b">"))?;
    value.first().filter(|digit| digit.is_ascii_digit()).map(|digit| digit - b'0')
}

/// Whether the end marker of a JPEG is there. The decoder fills what is cut off with grey; Pillow refuses.
fn jpeg_has_end(bytes: &[u8]) -> bool {
    const START_OF_SCAN: u8 = 0xda;
    // Segments before the first scan are skipped whole: a thumbnail in them has an end marker of its own.
    let mut at = 2;
    while let Some(&[0xff, marker, high, low]) = bytes.get(at..at + 4) {
        if marker == START_OF_SCAN {
            break;
        }
        // A fill byte before a marker is followed by another 0xff.
        at += if marker == 0xff { 1 } else { 2 + usize::from(u16::from_be_bytes([high, low])) };
    }
    bytes.get(at..).is_some_and(|scans| scans.windows(2).rev().any(|pair| pair == [0xff, 0xd9]))
}
