//! Pillow's `Image.resize`, bit for bit, for the part of the result that is kept.
//!
//! Each axis is a weighted sum over the input pixels below a filter kernel, whose support grows with the
//! scale when shrinking. Weights are fixed point with [`BITS`] fractional bits; sums are i32; the
//! horizontal pass comes first and is rounded to u8 before the vertical pass reads it. Pillow leaves out a
//! pass whose axis keeps its size; every filter here is then the identity (weights 1 and 0), so there is no
//! such case below.
//!
//! The picture is read once, row by row: a row is resampled horizontally into a line, and the line is added
//! into the sums of the output rows that have it in their support. No intermediate picture exists, so
//! memory is the window's sums and one line whatever the shape of the source.

use std::ops::Range;

use super::Picture;

/// Fractional bits of a weight: Pillow's `PRECISION_BITS`, 32 - 8 (a pixel) - 2 (headroom for the
/// negative lobes).
const BITS: u32 = 32 - 8 - 2;

/// Half of the last place: what a sum starts from, so that the final shift rounds.
const HALF: i32 = 1 << (BITS - 1);

/// The weights of a group of columns are kept in a table of at most about this many entries (4 bytes
/// each); wider windows are made group by group. One group does for any source up to about 4 million
/// columns.
const TABLE: usize = 12 << 20;

/// A resampling kernel of Pillow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    /// `Image.Resampling.LANCZOS` (1), three lobes.
    Lanczos,
    /// `Image.Resampling.BILINEAR` (2).
    Bilinear,
    /// `Image.Resampling.BICUBIC` (3), a = -0.5.
    Bicubic,
    /// `Image.Resampling.BOX` (4).
    Box,
    /// `Image.Resampling.HAMMING` (5).
    Hamming,
}

impl Filter {
    /// The filter that Pillow numbers `resample`. Nearest (0) is none: it takes another path there.
    pub fn from_pillow(resample: u64) -> Option<Filter> {
        Some(match resample {
            1 => Filter::Lanczos,
            2 => Filter::Bilinear,
            3 => Filter::Bicubic,
            4 => Filter::Box,
            5 => Filter::Hamming,
            _ => return None,
        })
    }

    /// Pillow's number for the filter.
    pub fn to_pillow(self) -> u8 {
        match self {
            Filter::Lanczos => 1,
            Filter::Bilinear => 2,
            Filter::Bicubic => 3,
            Filter::Box => 4,
            Filter::Hamming => 5,
        }
    }

    /// Half the width of the kernel, in pixels of the coarser side.
    fn support(self) -> f64 {
        match self {
            Filter::Box => 0.5,
            Filter::Bilinear | Filter::Hamming => 1.0,
            Filter::Bicubic => 2.0,
            Filter::Lanczos => 3.0,
        }
    }

    /// The kernel at `x`, in Pillow's order of operations (`Resample.c`).
    fn at(self, x: f64) -> f64 {
        const A: f64 = -0.5;
        let t = x.abs();
        match self {
            // Half open, so that a pixel on the border between two outputs counts once.
            Filter::Box if x > -0.5 && x <= 0.5 => 1.0,
            Filter::Bilinear if t < 1.0 => 1.0 - t,
            Filter::Hamming if t < 1.0 => {
                sinc(t) * (0.54 + 0.46 * (t * std::f64::consts::PI).cos())
            }
            Filter::Bicubic if t < 1.0 => ((A + 2.0) * t - (A + 3.0)) * t * t + 1.0,
            Filter::Bicubic if t < 2.0 => (((t - 5.0) * t + 8.0) * t - 4.0) * A,
            Filter::Lanczos if t < 3.0 => sinc(t) * sinc(t / 3.0),
            _ => 0.0,
        }
    }
}

/// sin(pi x) / (pi x).
fn sinc(x: f64) -> f64 {
    if x == 0.0 {
        return 1.0;
    }
    let x = x * std::f64::consts::PI;
    x.sin() / x
}

/// What is resized: a picture, lying on a canvas of one colour that may be larger than it. The canvas is
/// never in memory: what it adds to a sum is a weight times the colour.
#[derive(Clone, Copy, Debug)]
pub struct Canvas<'a> {
    picture: &'a Picture,
    /// Width and height of the canvas.
    size: (usize, usize),
    /// Where the picture's left upper pixel lies.
    at: (usize, usize),
    background: [u8; 3],
}

impl<'a> Canvas<'a> {
    /// The picture alone.
    pub fn of(picture: &'a Picture) -> Self {
        Canvas { picture, size: (picture.width, picture.height), at: (0, 0), background: [0; 3] }
    }

    /// The picture in the middle of a square of its longer side (`expand2square` of the original LLaVA:
    /// an odd margin is the smaller one on the left or upper side).
    pub fn squared(picture: &'a Picture, background: [u8; 3]) -> Self {
        let (width, height) = (picture.width, picture.height);
        let side = width.max(height);
        Canvas { picture, size: (side, side), at: ((side - width) / 2, (side - height) / 2), background }
    }

    /// Width and height of the canvas.
    pub fn size(&self) -> (usize, usize) {
        self.size
    }
}

/// Columns and rows `window` of `canvas` resized to `size` (width, height): RGB, rows from the top.
///
/// The window must lie in `size`, and no side may be zero.
pub fn resize_window(
    canvas: &Canvas,
    filter: Filter,
    size: (usize, usize),
    window: (Range<usize>, Range<usize>),
) -> Vec<u8> {
    let picture = canvas.picture;
    let across =
        Axis { canvas: canvas.size.0, at: canvas.at.0, picture: picture.width, out: size.0, filter };
    let down =
        Axis { canvas: canvas.size.1, at: canvas.at.1, picture: picture.height, out: size.1, filter };
    let (columns, rows) = window;
    let group = (TABLE / (3 * across.most_taps())).max(1);
    let mut result = vec![0; columns.len() * rows.len() * 3];
    for start in columns.clone().step_by(group) {
        let part = start..columns.end.min(start + group);
        let at = (start - columns.start) * 3..(part.end - columns.start) * 3;
        let table = Columns::new(&across, part, canvas.background);
        let sums = resample(picture, &table, &down, rows.clone());
        let lines = result.chunks_exact_mut(columns.len() * 3).zip(sums.chunks_exact(at.len()));
        for (line, sums) in lines {
            line[at.clone()].iter_mut().zip(sums).for_each(|(to, &sum)| *to = round(sum));
        }
    }
    result
}

/// The pixel that a sum stands for.
#[inline(always)]
fn round(sum: i32) -> u8 {
    (sum >> BITS).clamp(0, 255) as u8
}

/// One axis of a resize.
struct Axis {
    /// Length of the canvas.
    canvas: usize,
    /// Where the picture begins on it, and its length.
    at: usize,
    picture: usize,
    /// Length of the result.
    out: usize,
    filter: Filter,
}

/// The weights of one output position.
struct Taps {
    /// The first picture position that counts; 0 if none does.
    start: usize,
    /// The weights from there.
    weights: Vec<i32>,
    /// The sum of the weights of canvas positions that the picture does not cover.
    outside: i32,
}

impl Axis {
    /// Canvas positions per output position.
    fn scale(&self) -> f64 {
        self.canvas as f64 / self.out as f64
    }

    /// A bound on the number of weights of an output position.
    fn most_taps(&self) -> usize {
        (self.filter.support() * self.scale().max(1.0)).ceil() as usize * 2 + 1
    }

    /// The weights of output position `out`: `precompute_coeffs` and `normalize_coeffs_8bpc` of Pillow.
    fn taps(&self, out: usize) -> Taps {
        let stretch = self.scale().max(1.0);
        let support = self.filter.support() * stretch;
        let centre = (out as f64 + 0.5) * self.scale();
        // Rust's casts saturate, so a negative start is 0.
        let start = (centre - support + 0.5) as usize;
        let end = ((centre + support + 0.5) as usize).min(self.canvas);
        let shrink = 1.0 / stretch;
        let exact: Vec<f64> =
            (start..end).map(|i| self.filter.at((i as f64 - centre + 0.5) * shrink)).collect();
        let total: f64 = exact.iter().sum();
        let fixed = |weight: f64| {
            let weight = if total != 0.0 { weight / total } else { weight };
            (weight * f64::from(1 << BITS) + 0.5f64.copysign(weight)) as i32
        };
        let covered = self.at.clamp(start, end)..(self.at + self.picture).clamp(start, end);
        let (inside, mut outside) = (covered.start - start..covered.end - start, 0i32);
        for &weight in exact[..inside.start].iter().chain(&exact[inside.end..]) {
            outside = outside.wrapping_add(fixed(weight));
        }
        Taps {
            start: if inside.is_empty() { 0 } else { covered.start - self.at },
            weights: exact[inside].iter().map(|&weight| fixed(weight)).collect(),
            outside,
        }
    }
}

/// The weights of a run of output columns, laid out for the inner loop.
struct Columns {
    /// Per column: its first byte in a picture row, and its place in `weights`.
    spans: Vec<(usize, Range<usize>)>,
    /// Weights of all columns, each three times (R, G and B).
    weights: Vec<i32>,
    /// Per column and channel: what a sum starts from, rounding and background.
    base: Vec<[i32; 3]>,
    /// A line of canvas that the picture does not reach.
    blank: Vec<u8>,
}

impl Columns {
    fn new(axis: &Axis, columns: Range<usize>, background: [u8; 3]) -> Self {
        let mut table = Columns { spans: vec![], weights: vec![], base: vec![], blank: vec![] };
        for column in columns {
            let taps = axis.taps(column);
            let begin = table.weights.len();
            table.weights.extend(taps.weights.iter().flat_map(|&weight| [weight; 3]));
            table.spans.push((taps.start * 3, begin..table.weights.len()));
            table.base.push(background.map(|c| HALF.wrapping_add(taps.outside.wrapping_mul(c.into()))));
            let all = taps.weights.iter().fold(taps.outside, |sum, &weight| sum.wrapping_add(weight));
            let blank = background.map(|c| round(HALF.wrapping_add(all.wrapping_mul(c.into()))));
            table.blank.extend(blank);
        }
        table
    }

    /// One picture row, resampled.
    #[inline(always)]
    fn resample(&self, row: &[u8], line: &mut [u8]) {
        let (line, _) = line.as_chunks_mut::<3>();
        for ((pixel, base), (start, span)) in line.iter_mut().zip(&self.base).zip(&self.spans) {
            let sum = dot(&row[*start..*start + span.len()], &self.weights[span.clone()]);
            *pixel = std::array::from_fn(|c| round(base[c].wrapping_add(sum[c])));
        }
    }
}

/// The sums of `rows`, before the final shift: [rows, columns, 3].
fn resample(picture: &Picture, columns: &Columns, down: &Axis, rows: Range<usize>) -> Vec<i32> {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the function needs a CPU with AVX2, which the line above asked for.
        return unsafe { resample_avx2(picture, columns, down, rows) };
    }
    resample_anywhere(picture, columns, down, rows)
}

/// The same code, compiled for eight lanes (without it x86-64 has no packed 32-bit multiply).
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn resample_avx2(picture: &Picture, columns: &Columns, down: &Axis, rows: Range<usize>) -> Vec<i32> {
    resample_anywhere(picture, columns, down, rows)
}

#[inline(always)]
fn resample_anywhere(picture: &Picture, columns: &Columns, down: &Axis, rows: Range<usize>) -> Vec<i32> {
    let width = columns.blank.len();
    let mut sums = vec![HALF; rows.len() * width];
    let mut line = vec![0; width];
    // Output rows in order; `open` are those whose support the current picture row may lie in.
    let mut coming = rows.enumerate().map(|(index, row)| (index * width, down.taps(row))).peekable();
    let mut open: Vec<(usize, Taps)> = vec![];
    for (y, row) in picture.rgb.chunks_exact(picture.width * 3).enumerate() {
        while let Some((at, taps)) = coming.next_if(|(_, taps)| taps.start <= y) {
            add(&mut sums[at..at + width], &columns.blank, taps.outside);
            open.push((at, taps));
        }
        open.retain(|(_, taps)| y < taps.start + taps.weights.len());
        if open.is_empty() {
            if coming.peek().is_none() {
                break;
            }
            continue;
        }
        columns.resample(row, &mut line);
        for (at, taps) in &open {
            add(&mut sums[*at..*at + width], &line, taps.weights[y - taps.start]);
        }
    }
    sums
}

/// sums += weight * line.
#[inline(always)]
fn add(sums: &mut [i32], line: &[u8], weight: i32) {
    for (sum, &value) in sums.iter_mut().zip(line) {
        *sum = sum.wrapping_add(weight.wrapping_mul(value.into()));
    }
}

/// The sum over pixels of weight * pixel, per channel. Both slices hold RGB triples. Integers: the order
/// of the sum does not matter, so eight pixels are 24 independent lanes.
#[inline(always)]
fn dot(pixels: &[u8], weights: &[i32]) -> [i32; 3] {
    let mut lanes = [0i32; 24];
    let (blocks, pixels) = pixels.as_chunks::<24>();
    let (weight_blocks, weights) = weights.as_chunks::<24>();
    for (pixels, weights) in blocks.iter().zip(weight_blocks) {
        add_products(&mut lanes, pixels, weights);
    }
    let mut sum = [0i32; 3];
    for triple in lanes.as_chunks::<3>().0 {
        sum = std::array::from_fn(|c| sum[c].wrapping_add(triple[c]));
    }
    for (pixel, weight) in pixels.as_chunks::<3>().0.iter().zip(weights.as_chunks::<3>().0) {
        add_products(&mut sum, pixel, weight);
    }
    sum
}

#[inline(always)]
fn add_products<const N: usize>(sums: &mut [i32; N], pixels: &[u8; N], weights: &[i32; N]) {
    for i in 0..N {
        sums[i] = sums[i].wrapping_add(weights[i].wrapping_mul(pixels[i].into()));
    }
}
