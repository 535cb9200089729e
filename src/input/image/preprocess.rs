//! A picture to the vision tower's input: resize, centre crop, rescale, normalise.
//!
//! The reference is `CLIPImageProcessor` (and `LlavaImageProcessor`, which can pad) of transformers with
//! the PIL backend, configured by a `preprocessor_config.json`.

use std::ops::Range;
use std::path::Path;

use serde_json::Value;
use sha2::{Digest, Sha256};

use super::resize::{Canvas, Filter, resize_window};
use super::{Picture, Tiles, Tiling};
use crate::error::{Error, Result};

/// CLIP's mean per channel, of values in 0..1.
const CLIP_MEAN: [f64; 3] = [0.48145466, 0.4578275, 0.40821073];

/// CLIP's standard deviation per channel.
const CLIP_STD: [f64; 3] = [0.26862954, 0.26130258, 0.27577711];

/// `rescale_factor` as Hugging Face writes 1 / 255.
const RESCALE: f64 = 0.00392156862745098;

/// The largest side a configuration may ask for. CLIP towers read 224 to 448; the bound is there so that
/// a lying file cannot ask for terabytes.
const MAX_SIDE: usize = 4096;

/// What happens to the part of a picture that does not fit a square.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageMode {
    /// The shorter side is resized to the square, the rest of the longer one is cut off on both ends.
    Crop,
    /// The picture is put on a square of the mean colour, so that all of it is seen.
    Pad,
}

/// How big the picture is made before the crop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Resize {
    /// It stays as it is.
    No,
    /// The shorter side becomes this, the longer one follows, truncated.
    ShortestEdge(usize),
    /// Width and height, whatever the aspect ratio.
    Exact(usize, usize),
}

/// Everything that decides which pixels the vision tower sees.
#[derive(Clone, Debug, PartialEq)]
pub struct Preprocess {
    /// Crop, or pad to a square first. Free to be changed.
    pub mode: ImageMode,
    /// Whether pictures are seen in tiles, and how; then `mode` has no say. Free to be changed.
    pub tiling: Option<Tiling>,
    /// Threads that resize a picture, one at first. Free to be changed; no pixel depends on it.
    pub threads: usize,
    resize: Resize,
    filter: Filter,
    /// Side of the square that the tower reads.
    side: usize,
    /// Whether the resized picture is cropped; else it must have the side already.
    crop: bool,
    /// What 8-bit values are multiplied by; `None` leaves them 0 to 255.
    rescale: Option<f64>,
    /// Whether mean and standard deviation are applied. The mean also colours the padding.
    normalise: bool,
    mean: [f64; 3],
    std: [f64; 3],
}

impl Preprocess {
    /// CLIP's preprocessing at `side`, for a checkpoint without a `preprocessor_config.json`.
    pub fn clip(side: usize) -> Self {
        Preprocess {
            mode: ImageMode::Crop,
            tiling: None,
            threads: 1,
            resize: Resize::ShortestEdge(side),
            filter: Filter::Bicubic,
            side,
            crop: true,
            rescale: Some(RESCALE),
            normalise: true,
            mean: CLIP_MEAN,
            std: CLIP_STD,
        }
    }

    /// The configuration in `json`, which was read from `file`. Keys that are absent or null have
    /// `CLIPImageProcessor`'s defaults. `do_convert_rgb` is not read: a [`Picture`] is RGB.
    pub fn from_json(file: &Path, json: &Value) -> Result<Self> {
        if !json.is_object() {
            return Err(Error::checkpoint(file, "expected a JSON object of preprocessing parameters"));
        }
        let fields = Fields { file, json };
        let kind = json["image_processor_type"].as_str().unwrap_or_default();
        // In LlavaNextImageProcessor and others `do_pad` is about the batch, not the picture.
        let pads = kind.starts_with("LlavaImageProcessor") && fields.flag("do_pad", false)?;
        let resize = match fields.flag("do_resize", true)? {
            true => fields.resize()?,
            false => Resize::No,
        };
        let crop = fields.flag("do_center_crop", true)?;
        let side = match (crop, resize) {
            (true, _) => fields.crop_size()?,
            (false, Resize::Exact(width, height)) if width == height => width,
            (false, Resize::ShortestEdge(side)) if pads => side,
            (false, _) => {
                return Err(fields.wrong(
                    "do_center_crop",
                    "true, since the vision tower reads squares and `size` does not make them",
                ));
            }
        };
        // Tiles have the tower's side already; with another size each would be resized and cropped again.
        let as_they_are = resize == Resize::ShortestEdge(side) || resize == Resize::Exact(side, side);
        if kind.starts_with("LlavaNextImageProcessor") && !as_they_are {
            return Err(fields.wrong("size", "the same side as `crop_size`, as tiles are cut for it"));
        }
        let rescale = match fields.flag("do_rescale", true)? {
            true => Some(fields.number("rescale_factor", RESCALE)?),
            false => None,
        };
        let filter = match json.get("resample").filter(|value| !value.is_null()) {
            None => Filter::Bicubic,
            Some(value) => value.as_u64().and_then(Filter::from_pillow).ok_or_else(|| {
                fields.wrong("resample", "1 (lanczos), 2 (bilinear), 3 (bicubic), 4 (box) or 5 (hamming)")
            })?,
        };
        Ok(Preprocess {
            mode: if pads { ImageMode::Pad } else { ImageMode::Crop },
            tiling: None,
            threads: 1,
            resize,
            filter,
            side,
            crop,
            rescale,
            normalise: fields.flag("do_normalize", true)?,
            mean: fields.per_channel("image_mean", CLIP_MEAN, |_| true, "3 numbers")?,
            std: fields.per_channel("image_std", CLIP_STD, |std| std as f32 > 0.0, "3 numbers above 0")?,
        })
    }

    /// Side of the square that comes out, in pixels.
    pub fn side(&self) -> usize {
        self.side
    }

    /// Squares that a picture of this size is seen in: 1 without tiles.
    pub fn squares(&self, width: usize, height: usize) -> usize {
        self.tiling.as_ref().map_or(1, |tiling| tiling.tiles(width, height).squares())
    }

    /// The squares of a picture that is seen in tiles, still 8-bit: the whole picture, whatever its aspect
    /// ratio, then the tiles.
    fn tiles_u8(&self, picture: &Picture, tiles: &Tiles) -> Vec<Vec<u8>> {
        let side = self.side;
        let resize = |(width, height)| {
            resize_window(
                &Canvas::of(picture),
                self.filter,
                (width, height),
                (0..width, 0..height),
                self.threads,
            )
        };
        let mut squares = vec![vec![0; side * side * 3]; tiles.squares()];
        squares[0] = resize((side, side));
        let (width, (left, top)) = (tiles.resized.0, tiles.margin());
        for (y, line) in resize(tiles.resized).chunks_exact(width * 3).enumerate() {
            let y = top + y;
            for column in 0..tiles.columns {
                let tile = column * side;
                // The part of the line that lies in this column of tiles.
                let part = left.max(tile)..(left + width).min(tile + side);
                if !part.is_empty() {
                    let line = &line[(part.start - left) * 3..(part.end - left) * 3];
                    let at = (y % side * side + part.start - tile) * 3;
                    let square = &mut squares[1 + y / side * tiles.columns + column];
                    square[at..at + line.len()].copy_from_slice(line);
                }
            }
        }
        squares
    }

    /// The one square that the tower reads when there are no tiles, still 8-bit: [side, side, 3].
    pub fn crop_u8(&self, picture: &Picture) -> Result<Vec<u8>> {
        let canvas = match self.mode {
            ImageMode::Crop => Canvas::of(picture),
            ImageMode::Pad => Canvas::squared(picture, self.mean.map(|mean| (mean * 255.0) as u8)),
        };
        let size = self.resized(canvas.size());
        if !self.crop && size != (self.side, self.side) {
            return Err(Error::image(
                format!("of {}x{} pixels", picture.width, picture.height),
                format!(
                    "resized to {}x{} without a crop, expected {side}x{side}",
                    size.0,
                    size.1,
                    side = self.side
                ),
            ));
        }
        let (columns, left) = self.kept(size.0);
        let (rows, top) = self.kept(size.1);
        let width = columns.len() * 3;
        let kept = resize_window(&canvas, self.filter, size, (columns, rows), self.threads);
        if kept.len() == self.side * self.side * 3 {
            return Ok(kept);
        }
        let mut square = vec![0; self.side * self.side * 3];
        for (row, line) in kept.chunks_exact(width).enumerate() {
            let start = ((top + row) * self.side + left) * 3;
            square[start..start + width].copy_from_slice(line);
        }
        Ok(square)
    }

    /// 8-bit pixels [side, side, 3] as the tower's input [3, side, side], written to `out`.
    ///
    /// A value is (f32(f64(u8) * rescale) - f32(mean)) / f32(std), looked up in a table of 3 x 256.
    pub fn normalise(&self, pixels: &[u8], out: &mut [f32]) {
        let table: [[f32; 256]; 3] =
            std::array::from_fn(|channel| std::array::from_fn(|level| self.value(channel, level as u8)));
        let plane = pixels.len() / 3;
        for (channel, (out, table)) in out.chunks_exact_mut(plane).zip(&table).enumerate() {
            for (out, pixel) in out.iter_mut().zip(pixels.as_chunks::<3>().0) {
                *out = table[usize::from(pixel[channel])];
            }
        }
    }

    /// The tower's input for `picture`: [[`squares`](Preprocess::squares), 3, side, side].
    pub fn pixels(&self, picture: &Picture) -> Result<Vec<f32>> {
        let squares = match &self.tiling {
            None => vec![self.crop_u8(picture)?],
            Some(tiling) => self.tiles_u8(picture, &tiling.tiles(picture.width, picture.height)),
        };
        let mut pixels = vec![0f32; squares.len() * 3 * self.side * self.side];
        for (square, out) in squares.iter().zip(pixels.chunks_exact_mut(3 * self.side * self.side)) {
            self.normalise(square, out);
        }
        Ok(pixels)
    }

    /// The identity of a preprocessed picture: SHA-256 over its pixels, its size and every parameter.
    /// Equal digests mean equal [`Preprocess::pixels`].
    pub fn digest(&self, picture: &Picture) -> [u8; 32] {
        let (resize, a, b) = match self.resize {
            Resize::No => (0, 0, 0),
            Resize::ShortestEdge(side) => (1, side, 0),
            Resize::Exact(width, height) => (2, width, height),
        };
        let pad = self.mode == ImageMode::Pad;
        let flags = [pad, self.crop, self.normalise, self.rescale.is_some()].map(u8::from);
        let mut hash = Sha256::new();
        hash.update(b"tessera preprocessed image\0");
        hash.update(flags);
        hash.update([self.filter.to_pillow(), resize]);
        for length in [a, b, self.side, picture.width, picture.height] {
            hash.update((length as u64).to_le_bytes());
        }
        for number in [self.rescale.unwrap_or(1.0)].iter().chain(&self.mean).chain(&self.std) {
            hash.update(number.to_le_bytes());
        }
        if let Some(tiling) = &self.tiling {
            for number in tiling.tiles(picture.width, picture.height).numbers() {
                hash.update((number as u64).to_le_bytes());
            }
        }
        hash.update(&picture.rgb);
        hash.finalize().into()
    }

    /// One entry of the table of [`Preprocess::normalise`].
    fn value(&self, channel: usize, level: u8) -> f32 {
        let value = match self.rescale {
            Some(factor) => (f64::from(level) * factor) as f32,
            None => f32::from(level),
        };
        match self.normalise {
            true => (value - self.mean[channel] as f32) / self.std[channel] as f32,
            false => value,
        }
    }

    /// Width and height after the resize.
    fn resized(&self, (width, height): (usize, usize)) -> (usize, usize) {
        match self.resize {
            Resize::No => (width, height),
            Resize::Exact(width, height) => (width, height),
            Resize::ShortestEdge(side) => {
                // Python's int(side * long / short): an exact product, a rounded quotient, truncated.
                let long = |long: usize, short: usize| ((side * long) as f64 / short as f64) as usize;
                if width <= height { (side, long(height, width)) } else { (long(width, height), side) }
            }
        }
    }

    /// The part of an axis of `length` that the crop keeps, and where in the crop it goes: zeros lie
    /// around a picture that is smaller than the crop.
    fn kept(&self, length: usize) -> (Range<usize>, usize) {
        if length >= self.side {
            let start = (length - self.side) / 2;
            (start..start + self.side, 0)
        } else {
            (0..length, (self.side - length).div_ceil(2))
        }
    }
}

/// SHA-256 of a tensor's little-endian bytes, in hexadecimal.
pub fn pixels_sha256(pixels: &[f32]) -> String {
    let hash = Sha256::digest(bytemuck::cast_slice::<f32, u8>(pixels));
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The fields of a `preprocessor_config.json`, with errors that name them.
struct Fields<'a> {
    file: &'a Path,
    json: &'a Value,
}

impl Fields<'_> {
    /// The value of `key` (`a` or `a.b`), unless it is absent or null.
    fn get(&self, key: &str) -> Option<&Value> {
        let value = key.split('.').try_fold(self.json, |value, part| value.get(part))?;
        (!value.is_null()).then_some(value)
    }

    fn wrong(&self, key: &str, expected: &str) -> Error {
        let found = self.get(key).map_or("absent".into(), |value| {
            let text = value.to_string();
            if text.chars().count() > 80 {
                text.chars().take(80).chain("...".chars()).collect()
            } else {
                text
            }
        });
        Error::Config { file: self.file.into(), key: key.into(), expected: expected.into(), found }
    }

    fn flag(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| self.wrong(key, "true or false")),
        }
    }

    fn number(&self, key: &str, default: f64) -> Result<f64> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => value.as_f64().ok_or_else(|| self.wrong(key, "a number")),
        }
    }

    fn per_channel(
        &self,
        key: &str,
        default: [f64; 3],
        allowed: impl Fn(f64) -> bool,
        expected: &str,
    ) -> Result<[f64; 3]> {
        let Some(value) = self.get(key) else { return Ok(default) };
        let numbers =
            value.as_array().map(|array| array.iter().filter_map(Value::as_f64).collect::<Vec<_>>());
        numbers
            .and_then(|numbers| <[f64; 3]>::try_from(numbers).ok())
            .filter(|numbers| numbers.iter().all(|&number| allowed(number)))
            .ok_or_else(|| self.wrong(key, expected))
    }

    fn side(&self, key: &str) -> Result<usize> {
        let side =
            self.get(key).and_then(Value::as_u64).filter(|&side| (1..=MAX_SIDE as u64).contains(&side));
        side.map(|side| side as usize).ok_or_else(|| self.wrong(key, "a whole number from 1 to 4096"))
    }

    /// `size`: a number (the shorter side), `{shortest_edge}` or `{height, width}`.
    fn resize(&self) -> Result<Resize> {
        Ok(match self.get("size") {
            None => Resize::ShortestEdge(224),
            Some(Value::Number(_)) => Resize::ShortestEdge(self.side("size")?),
            Some(_) if self.get("size.longest_edge").is_some() => {
                return Err(self.wrong("size", "`shortest_edge` alone, or `height` and `width`"));
            }
            Some(_) if self.get("size.shortest_edge").is_some() => {
                Resize::ShortestEdge(self.side("size.shortest_edge")?)
            }
            Some(Value::Object(_)) => Resize::Exact(self.side("size.width")?, self.side("size.height")?),
            Some(_) => return Err(self.wrong("size", "a number, `shortest_edge`, or `height` and `width`")),
        })
    }

    /// `crop_size`: a number or `{height, width}`, square.
    fn crop_size(&self) -> Result<usize> {
        match self.get("crop_size") {
            None => Ok(224),
            Some(Value::Number(_)) => self.side("crop_size"),
            Some(_) => {
                let (height, width) = (self.side("crop_size.height")?, self.side("crop_size.width")?);
                if height != width {
                    return Err(self.wrong("crop_size", "a square: the vision tower reads no other"));
                }
                Ok(height)
            }
        }
    }
}
