//! TIFF files: their pixels have more forms than a decoder library makes pictures of, so that their samples are
//! read here and become RGB as in Pillow.

use std::borrow::Cow;
use std::io::Cursor;

use image::metadata::Orientation;
use tiff::decoder::{Decoder, DecodingResult, Limits};
use tiff::tags::Tag;

use super::convert::cmyk_to_rgb;
use super::decode::{HEADROOM, check_size, xmp_orientation};

/// The first page of a file, as it is stored.
pub(super) struct Page {
    pub width: u32,
    pub height: u32,
    pub rgb: Vec<u8>,
    pub orientation: Orientation,
}

/// What samples mean: values of the tag `PhotometricInterpretation`.
const WHITE_IS_ZERO: u16 = 0;
const BLACK_IS_ZERO: u16 = 1;
const RGB: u16 = 2;
const PALETTE: u16 = 3;
const CMYK: u16 = 5;
const YCBCR: u16 = 6;

/// Whether a file is a BigTIFF, which the decoder reads, though it is not known by its first bytes elsewhere.
pub(super) fn is_big(bytes: &[u8]) -> bool {
    bytes.starts_with(b"II+\0") || bytes.starts_with(b"MM\0+")
}

/// Reads the first page.
pub(super) fn read(bytes: &[u8]) -> Result<Page, String> {
    read_page(bytes).map_err(|problem| match problem {
        tiff::TiffError::UnsupportedError(what) => format!("TIFF of this kind is not supported: {what}"),
        other => other.to_string(),
    })?
}

/// Errors of the decoder outside, those found here inside.
fn read_page(bytes: &[u8]) -> tiff::TiffResult<Result<Page, String>> {
    let meaning_at = meaning_at(bytes);
    let meaning = meaning_at.map_or(BLACK_IS_ZERO, |at| number(bytes, at, 2).unwrap_or(0) as u16);
    let mut bytes = Cow::Borrowed(bytes);
    if let (Some(at), WHITE_IS_ZERO | PALETTE) = (meaning_at, meaning) {
        // The decoder hands out neither indices nor what it would invert otherwise than Pillow; as grey it does.
        let grey =
            if bytes.starts_with(b"II") { BLACK_IS_ZERO.to_le_bytes() } else { BLACK_IS_ZERO.to_be_bytes() };
        bytes.to_mut()[at..at + 2].copy_from_slice(&grey);
    }
    let mut decoder = Decoder::new(Cursor::new(&bytes[..]))?;
    let (width, height) = decoder.dimensions()?;
    let pixels = match check_size(width, height) {
        Ok(pixels) => pixels as usize,
        Err(problem) => return Ok(Err(problem)),
    };
    let mut limits = Limits::default();
    limits.decoding_buffer_size = pixels * 16 + HEADROOM as usize;
    limits.intermediate_buffer_size = pixels * 16 + HEADROOM as usize;
    decoder = decoder.with_limits(limits);

    let orientation = match decoder.find_tag_unsigned::<u8>(Tag::Orientation)? {
        Some(turn) => Some(turn),
        None => decoder.get_tag_u8_vec(Tag::Unknown(700)).ok().and_then(|xmp| xmp_orientation(&xmp)),
    };
    let orientation = orientation.and_then(Orientation::from_exif).unwrap_or(Orientation::NoTransforms);
    let extra = decoder.find_tag_unsigned_vec::<u16>(Tag::ExtraSamples)?.unwrap_or_default();
    let palette = decoder.find_tag_unsigned_vec::<u16>(Tag::ColorMap)?.unwrap_or_default();
    let planar = decoder.find_tag_unsigned::<u16>(Tag::PlanarConfiguration)? == Some(2);
    let is_jpeg = decoder.find_tag_unsigned::<u16>(Tag::Compression)? == Some(7);
    let kind = decoder.colortype()?;
    if is_jpeg && kind.num_samples() == 2 {
        // The decoder does not know what two components are.
        return Ok(Err("TIFF of grey with alpha, compressed as JPEG, is not supported".into()));
    }
    let mut samples = DecodingResult::U8(Vec::new());
    decoder.read_image_to_buffer(&mut samples)?;

    let bits = kind.bit_depth();
    let in_a_row = width as usize * if planar { 1 } else { kind.num_samples() as usize };
    let is_grey = matches!(meaning, WHITE_IS_ZERO | BLACK_IS_ZERO);
    let Some(samples) = to_u8(samples, bits, in_a_row, is_grey) else {
        return Ok(Err(format!("TIFF with samples of {bits} bits of this kind is not supported")));
    };
    let channels = samples.len() / pixels;
    let samples = if planar { interleave(&samples, pixels) } else { samples };
    let form = Form { meaning, bits, channels, palette, premultiplied: extra.first() == Some(&1) };
    Ok(form.to_rgb(&samples).map(|rgb| Page { width, height, rgb, orientation }))
}

/// Where in the file the two bytes are that say what samples mean.
fn meaning_at(bytes: &[u8]) -> Option<usize> {
    const MEANING: u64 = 262;
    const SHORT: u64 = 3;
    let (count_at, count_size, entry) = match is_big(bytes) {
        true => (number(bytes, 8, 8)?, 8, 20),
        false => (number(bytes, 4, 4)?, 2, 12),
    };
    let count_at = usize::try_from(count_at).ok()?;
    let count = number(bytes, count_at, count_size)?.min(0xffff) as usize;
    let mut entries = (0..count).map(|i| count_at + count_size + i * entry);
    let at = entries.find(|&at| number(bytes, at, 2) == Some(MEANING))?;
    // The value is the last field, after the tag, its type and a count.
    (number(bytes, at + 2, 2)? == SHORT).then_some(at + entry - if entry == 20 { 8 } else { 4 })
}

/// The number of `size` bytes at `at`, in the file's byte order.
fn number(bytes: &[u8], at: usize, size: usize) -> Option<u64> {
    let field = bytes.get(at..at.checked_add(size)?)?;
    let join = |number, &byte: &u8| number << 8 | u64::from(byte);
    Some(match bytes.starts_with(b"II") {
        true => field.iter().rev().fold(0, join),
        false => field.iter().fold(0, join),
    })
}

/// Samples as Pillow narrows them: deep grey is clipped, deep colours keep their high byte. Those of less than
/// eight bits are unpacked from rows that fill whole bytes.
fn to_u8(samples: DecodingResult, bits: u8, in_a_row: usize, is_grey: bool) -> Option<Vec<u8>> {
    Some(match samples {
        DecodingResult::U8(packed) if bits < 8 => {
            let bits = usize::from(bits);
            let rows = packed.chunks_exact((in_a_row * bits).div_ceil(8));
            let sample = |row: &[u8], i: usize| {
                let (byte, shift) = (row[i * bits / 8], 8 - bits - i * bits % 8);
                byte >> shift & ((1 << bits) - 1)
            };
            rows.flat_map(|row| (0..in_a_row).map(move |i| sample(row, i))).collect()
        }
        DecodingResult::U8(samples) => samples,
        DecodingResult::I8(samples) => samples.into_iter().map(|v| v as u8).collect(),
        DecodingResult::U16(samples) if is_grey => samples.into_iter().map(|v| v.min(255) as u8).collect(),
        DecodingResult::U16(samples) => samples.into_iter().map(|v| (v >> 8) as u8).collect(),
        DecodingResult::I16(samples) => samples.into_iter().map(|v| v.clamp(0, 255) as u8).collect(),
        DecodingResult::U32(samples) => samples.into_iter().map(|v| (v as i32).clamp(0, 255) as u8).collect(),
        DecodingResult::I32(samples) => samples.into_iter().map(|v| v.clamp(0, 255) as u8).collect(),
        // Truncated, and clipped.
        DecodingResult::F32(samples) => samples.into_iter().map(|v| v as u8).collect(),
        DecodingResult::F64(samples) => samples.into_iter().map(|v| v as u8).collect(),
        _ => return None,
    })
}

/// Planes, one after the other, to pixels.
fn interleave(planes: &[u8], pixels: usize) -> Vec<u8> {
    (0..pixels).flat_map(|i| planes.iter().skip(i).step_by(pixels).copied()).collect()
}

/// How samples make pixels.
struct Form {
    meaning: u16,
    bits: u8,
    channels: usize,
    /// Reds, greens and blues of 16 bits.
    palette: Vec<u16>,
    /// Whether colours are multiplied by an alpha.
    premultiplied: bool,
}

impl Form {
    fn to_rgb(&self, samples: &[u8]) -> Result<Vec<u8>, String> {
        let pixels = samples.chunks_exact(self.channels);
        Ok(match (self.meaning, self.channels) {
            (BLACK_IS_ZERO | WHITE_IS_ZERO, _) => {
                let scale = 255 / ((1u32 << self.bits.min(8)) - 1) as u8;
                // Pillow turns no grey of more than eight bits.
                let turn = if self.meaning == WHITE_IS_ZERO && self.bits <= 8 { 255 } else { 0 };
                pixels.flat_map(|pixel| [turn ^ (pixel[0] * scale); 3]).collect()
            }
            (PALETTE, _) => {
                let entries = self.palette.len() / 3;
                let colour = |index: u8| {
                    [0, 1, 2].map(|c| {
                        self.palette.get(c * entries + usize::from(index)).map_or(0, |v| (v >> 8) as u8)
                    })
                };
                pixels.flat_map(|pixel| colour(pixel[0])).collect()
            }
            (RGB, 4) if self.premultiplied => {
                pixels.flat_map(|p| undo_alpha([p[0], p[1], p[2]], p[3])).collect()
            }
            (RGB, 3..) => pixels.flat_map(|p| [p[0], p[1], p[2]]).collect(),
            (CMYK, 4..) => pixels.flat_map(|p| cmyk_to_rgb([p[0], p[1], p[2], p[3]])).collect(),
            (YCBCR, 3..) => pixels.flat_map(|p| ycbcr_to_rgb([p[0], p[1], p[2]])).collect(),
            (meaning, channels) => {
                return Err(format!(
                    "TIFF with {channels} channels and photometric interpretation {meaning} is not supported"
                ));
            }
        })
    }
}

/// Colours that were multiplied by `alpha`, as Pillow's `RGBa` becomes `RGBA`.
fn undo_alpha(colour: [u8; 3], alpha: u8) -> [u8; 3] {
    match alpha {
        0 => [0; 3],
        _ => colour.map(|c| (255 * u32::from(c) / u32::from(alpha)).min(255) as u8),
    }
}

/// JFIF's conversion.
fn ycbcr_to_rgb([y, cb, cr]: [u8; 3]) -> [u8; 3] {
    let (y, cb, cr) = (f32::from(y), f32::from(cb) - 128.0, f32::from(cr) - 128.0);
    [y + 1.402 * cr, y - 0.344_14 * cb - 0.714_14 * cr, y + 1.772 * cb].map(|v| v.round() as u8)
}
