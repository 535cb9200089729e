//! What a PNG decoder does not pass on, whether there is an alpha channel and a transparent colour, and what it
//! does not pass over: an end that is missing.

use std::borrow::Cow;

/// What is found between the signature and the pixels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Facts {
    /// Whether the pixels are stored with alpha (a `tRNS` chunk is not that).
    pub alpha: bool,
    /// The colour that the file declares transparent, as Pillow's `info["transparency"]` of an RGB image.
    pub transparent: Option<[u8; 3]>,
}

/// Reads the chunks before the pixels of a PNG. Damage is for the decoder to find.
pub(super) fn facts(bytes: &[u8]) -> Facts {
    // Signature 8; length and name of the header chunk 8, width and height 8; then these two.
    let Some(&[depth, colour_type]) = bytes.get(24..26) else { return Facts::default() };
    let (mut palette, mut transparency): (&[u8], &[u8]) = (&[], &[]);
    let mut rest = &bytes[8..];
    while let Some((&[a, b, c, d, ref name @ ..], body)) = rest.split_first_chunk::<8>() {
        let length = u32::from_be_bytes([a, b, c, d]) as usize;
        let Some((data, next)) = body.split_at_checked(length) else { break };
        match name {
            b"PLTE" => palette = data,
            b"tRNS" => transparency = data,
            b"IDAT" => break,
            _ => {}
        }
        rest = next.get(4..).unwrap_or_default();
    }
    Facts { alpha: colour_type & 4 != 0, transparent: colour(depth, colour_type, palette, transparency) }
}

/// The file with an end, if it was cut off behind its pixels: Pillow reads those and asks for no more.
pub(super) fn with_end(bytes: &[u8]) -> Cow<'_, [u8]> {
    const END: [u8; 12] = *b"\0\0\0\0IEND\xae\x42\x60\x82";
    let mut at = 8;
    let mut last: &[u8] = b"";
    while let Some(&[a, b, c, d, ref name @ ..]) =
        bytes.get(at..at + 8).filter(|_| bytes.starts_with(b"\x89PNG"))
    {
        let next = at + 12 + u32::from_be_bytes([a, b, c, d]) as usize;
        if next > bytes.len() || name == b"IEND" {
            break;
        }
        (at, last) = (next, name);
    }
    let rest = bytes.get(at..).unwrap_or_default();
    match last == b"IDAT" && END.starts_with(rest) && rest.len() < END.len() {
        true => Cow::Owned([&bytes[..at], &END].concat()),
        false => Cow::Borrowed(bytes),
    }
}

fn colour(depth: u8, colour_type: u8, palette: &[u8], transparency: &[u8]) -> Option<[u8; 3]> {
    // Samples are 16-bit and clipped, and compared with pixels that are scaled to 8 bits.
    let (samples, _) = transparency.as_chunks::<2>();
    let sample = |i: usize| samples.get(i).map(|&bytes| u16::from_be_bytes(bytes).min(255) as u8);
    match (colour_type, depth) {
        // In 1-bit and 16-bit grey Pillow compares red with the sample, green and blue with 0: only black
        // is ever found.
        (0, 1 | 16) => sample(0).filter(|&grey| grey == 0).map(|grey| [grey; 3]),
        (0, _) => sample(0).map(|grey| [grey; 3]),
        (2, _) => Some([sample(0)?, sample(1)?, sample(2)?]),
        // A palette has a transparent colour if one entry is transparent and the others are opaque; with
        // partial transparency it has alpha, which is dropped.
        (3, _) if transparency.iter().all(|&alpha| alpha == 0 || alpha == 255) => {
            let mut clear = (0..transparency.len()).filter(|&i| transparency[i] == 0);
            let index = clear.next().filter(|_| clear.next().is_none())?;
            palette.as_chunks::<3>().0.get(index).copied()
        }
        _ => None,
    }
}
