//! Pillow's `Image.resize`, bit for bit, for the part of the result that is kept.
//!
//! Each axis is a weighted sum over the input pixels below a filter kernel, whose support grows with the
//! scale when shrinking. Weights are fixed point with `BITS` fractional bits; sums are i32; the first
//! pass is rounded to u8 before the second reads it. The horizontal pass comes first, except in pictures
//! that lose many more rows than columns: see `vertical_first`. Pillow leaves out a pass whose axis keeps
//! its size; every filter here is then the identity (weights 1 and 0), so there is no such case below.
//!
//! The picture is read once, row by row, and each row is added into the sums of the output rows that have
//! it in their support. No intermediate picture exists, so memory is the sums of the open output rows
//! whatever the shape of the source.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use super::Picture;

/// Fractional bits of a weight: Pillow's `PRECISION_BITS`, 32 - 8 (a pixel) - 2 (headroom for the
/// negative lobes).
const BITS: u32 = 32 - 8 - 2;

/// Half of the last place: what a sum starts from, so that the final shift rounds.
const HALF: i32 = 1 << (BITS - 1);

/// Pixels that the horizontal pass takes at a time: 24 values, three registers of eight lanes.
const BLOCK: usize = 8;

/// The weights of a group of columns are kept in a table of at most about this many entries (4 bytes
/// each); wider windows are made group by group. One group does for any source up to about 4 million
/// columns.
const TABLE: usize = 12 << 20;

/// The fewest output rows that a thread is started for. Neighbouring bands both resample the picture rows that
/// count in both: 9 of 73 when the shorter side shrinks from 768 to 336.
const BAND: usize = 32;

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
            Filter::Hamming if t < 1.0 => sinc(t) * (0.54 + 0.46 * (t * std::f64::consts::PI).cos()),
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
/// The window must lie in `size`, and no side may be zero. Up to `threads` threads work on it, this one and others
/// that end with it; the result does not depend on how many.
pub fn resize_window(
    canvas: &Canvas,
    filter: Filter,
    size: (usize, usize),
    window: (Range<usize>, Range<usize>),
    threads: usize,
) -> Vec<u8> {
    let picture = canvas.picture;
    let across = Axis { canvas: canvas.size.0, at: canvas.at.0, picture: picture.width, out: size.0, filter };
    let down = Axis { canvas: canvas.size.1, at: canvas.at.1, picture: picture.height, out: size.1, filter };
    let (columns, rows) = window;
    let group = (TABLE / (3 * across.most_taps())).max(1);
    let vertical_first = vertical_first(canvas.size, size);
    let width = columns.len() * 3;
    let band = rows.len().div_ceil(threads.max(1)).max(BAND);
    let mut result = vec![0; width * rows.len()];
    for start in columns.clone().step_by(group) {
        let part = start..columns.end.min(start + group);
        let at = (start - columns.start) * 3..(part.end - columns.start) * 3;
        let table = Columns::new(&across, part);
        let bands = Mutex::new(rows.clone().step_by(band).zip(result.chunks_mut(width * band)));
        let next = || bands.lock().unwrap_or_else(PoisonError::into_inner).next();
        let work = || {
            while let Some((first, lines)) = next() {
                let rows = first..rows.end.min(first + band);
                let lines = lines.chunks_exact_mut(width).map(|line| &mut line[at.clone()]);
                resample(canvas, &table, &down, vertical_first, rows, lines);
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..rows.len().div_ceil(band) {
                // If there is no thread to be had, the others do its part.
                let _ = std::thread::Builder::new().spawn_scoped(scope, work);
            }
            work();
        });
    }
    result
}

/// Whether the vertical pass comes first when `from` (width, height) is resized to `to`: if rows are lost,
/// and more than twice as many as columns. So Pillow 13 does it; its older versions never do. (Found by
/// experiment: the two orders differ in 1 level of some pixels, and 5000 random sizes follow this rule.)
/// Resizing the shorter side of a picture to a square's is such a case if it is tall by more than 2:1.
fn vertical_first(from: (usize, usize), to: (usize, usize)) -> bool {
    let [columns, rows] = [(from.0, to.0), (from.1, to.1)].map(|(from, to)| from as i64 - to as i64);
    rows > 0 && 2 * columns < rows
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

impl Taps {
    /// The position after the last that counts.
    fn end(&self) -> usize {
        self.start + self.weights.len()
    }

    /// The sum of all weights: 1 << BITS, but for their rounding.
    fn total(&self) -> i32 {
        self.weights.iter().fold(self.outside, |sum, &weight| sum.wrapping_add(weight))
    }
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
    spans: Vec<Span>,
    /// Weights of all columns, each three times (R, G and B).
    weights: Vec<i32>,
}

/// One output column.
struct Span {
    /// The first byte in a picture row that counts.
    start: usize,
    /// Its place in [`Columns::weights`].
    weights: Range<usize>,
    /// The sum of the weights beside the picture.
    outside: i32,
    /// The sum of all weights.
    total: i32,
}

impl Columns {
    fn new(axis: &Axis, columns: Range<usize>) -> Self {
        let mut table = Columns { spans: vec![], weights: vec![] };
        for taps in columns.map(|column| axis.taps(column)) {
            // Zeros fill the weights up to whole blocks: behind, or before where the row ends.
            let padded = taps.weights.len().next_multiple_of(BLOCK).min(axis.picture);
            let start = taps.start.min(axis.picture - padded);
            let begin = table.weights.len();
            table.weights.resize(begin + (taps.start - start) * 3, 0);
            table.weights.extend(taps.weights.iter().flat_map(|&weight| [weight; 3]));
            table.weights.resize(begin + padded * 3, 0);
            let weights = begin..table.weights.len();
            table.spans.push(Span { start: start * 3, weights, outside: taps.outside, total: taps.total() });
        }
        table
    }

    /// A row of the canvas, resampled: `row` where the picture lies, the colour `beside` elsewhere.
    #[inline(always)]
    fn resample(&self, row: &[u8], beside: [u8; 3], line: &mut [u8]) {
        for (pixel, span) in line.as_chunks_mut::<3>().0.iter_mut().zip(&self.spans) {
            let row = &row[span.start..span.start + span.weights.len()];
            let sum = dot(row, &self.weights[span.weights.clone()]);
            *pixel = std::array::from_fn(|c| round(sum_of(beside[c], span.outside).wrapping_add(sum[c])));
        }
    }

    /// A row of the canvas that is all `colour`, resampled.
    fn resample_plain(&self, colour: [u8; 3]) -> Vec<u8> {
        self.spans.iter().flat_map(|span| colour.map(|c| round(sum_of(c, span.total)))).collect()
    }
}

/// What a sum begins with: the rounding, and `value` as often as `weight` says.
#[inline(always)]
fn sum_of(value: u8, weight: i32) -> i32 {
    HALF.wrapping_add(weight.wrapping_mul(value.into()))
}

/// An output row in the making.
struct Open<'a> {
    taps: Taps,
    sums: Vec<i32>,
    to: &'a mut [u8],
}

/// Fills `lines`, the output rows `rows` of `columns`.
fn resample<'a>(
    canvas: &Canvas,
    columns: &Columns,
    down: &Axis,
    vertical_first: bool,
    rows: Range<usize>,
    lines: impl Iterator<Item = &'a mut [u8]>,
) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the function needs a CPU with AVX2, which the line above asked for.
        return unsafe { resample_avx2(canvas, columns, down, vertical_first, rows, lines) };
    }
    resample_anywhere(canvas, columns, down, vertical_first, rows, lines)
}

/// The same code, compiled for eight lanes (without it x86-64 has no packed 32-bit multiply).
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn resample_avx2<'a>(
    canvas: &Canvas,
    columns: &Columns,
    down: &Axis,
    vertical_first: bool,
    rows: Range<usize>,
    lines: impl Iterator<Item = &'a mut [u8]>,
) {
    resample_anywhere(canvas, columns, down, vertical_first, rows, lines)
}

#[inline(always)]
fn resample_anywhere<'a>(
    canvas: &Canvas,
    columns: &Columns,
    down: &Axis,
    vertical_first: bool,
    rows: Range<usize>,
    lines: impl Iterator<Item = &'a mut [u8]>,
) {
    let Canvas { picture, background, .. } = *canvas;
    // What is summed vertically: picture rows, or rows that went through the horizontal pass. A blank one
    // is a row above or below the picture.
    let blank = match vertical_first {
        true => background.repeat(picture.width),
        false => columns.resample_plain(background),
    };
    let mut across = vec![0; columns.spans.len() * 3];
    let open_row = |(row, to)| {
        let taps = down.taps(row);
        let sums = blank.iter().map(|&value| sum_of(value, taps.outside)).collect();
        Open { taps, sums, to }
    };
    let close_row = |Open { taps, sums, to }: &mut Open| {
        if vertical_first {
            let beside = background.map(|c| round(sum_of(c, taps.total())));
            let line: Vec<u8> = sums.iter().map(|&sum| round(sum)).collect();
            columns.resample(&line, beside, to);
        } else {
            to.iter_mut().zip(sums).for_each(|(to, sum)| *to = round(*sum));
        }
    };

    let mut coming = rows.zip(lines).map(open_row).peekable();
    let mut open: Vec<Open> = vec![];
    for (y, row) in picture.rgb.chunks_exact(picture.width * 3).enumerate() {
        open.extend(std::iter::from_fn(|| coming.next_if(|next| next.taps.start <= y)));
        open.extract_if(.., |row| row.taps.end() <= y).for_each(|mut row| close_row(&mut row));
        if open.is_empty() {
            if coming.peek().is_none() {
                return;
            }
            continue;
        }
        let line = match vertical_first {
            true => row,
            false => {
                columns.resample(row, background, &mut across);
                &across
            }
        };
        for Open { taps, sums, .. } in &mut open {
            add(sums, line, taps.weights[y - taps.start]);
        }
    }
    open.iter_mut().for_each(close_row);
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
    let mut lanes = [0i32; 3 * BLOCK];
    let (blocks, pixels) = pixels.as_chunks::<{ 3 * BLOCK }>();
    let (weight_blocks, weights) = weights.as_chunks::<{ 3 * BLOCK }>();
    for (pixels, weights) in blocks.iter().zip(weight_blocks) {
        add_products(&mut lanes, pixels, weights);
    }
    // Half is added to half, down to one pixel.
    for half in [12, 6, 3] {
        for i in 0..half {
            lanes[i] = lanes[i].wrapping_add(lanes[i + half]);
        }
    }
    let mut sum = [lanes[0], lanes[1], lanes[2]];
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
