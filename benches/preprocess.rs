//! A 12-megapixel JPEG to the tower's input: its decode beside everything after it. The decode should
//! dominate.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use image::codecs::jpeg::JpegEncoder;
use tessera::input::image::{DecodeOptions, ImageMode, Picture, Preprocess, decode};

/// Waves with a little noise: about as many bytes in a JPEG as a photograph has.
fn photograph(width: u32, height: u32) -> image::RgbImage {
    image::RgbImage::from_fn(width, height, |x, y| {
        let noise = (x.wrapping_mul(7919) ^ y.wrapping_mul(104729)).wrapping_mul(2654435761) >> 29;
        let wave = |scale: f32| 120.0 + 100.0 * ((x as f32 * scale).sin() * (y as f32 * scale * 0.7).cos());
        image::Rgb([0.01, 0.023, 0.047].map(|scale| wave(scale) as u8 + noise as u8))
    })
}

fn benches(criterion: &mut Criterion) {
    let mut jpeg = vec![];
    JpegEncoder::new_with_quality(&mut jpeg, 90).encode_image(&photograph(4000, 3000)).unwrap();
    println!("4000x3000 pixels, {} bytes", jpeg.len());
    let read = |bytes: &[u8]| decode("photograph", bytes, &DecodeOptions::default()).unwrap();
    let wide = read(&jpeg);
    let tall = Picture { width: 2000, height: 6000, rgb: wide.rgb.clone() };
    let crop = Preprocess::clip(336);
    let mut pad = crop.clone();
    pad.mode = ImageMode::Pad;

    let mut group = criterion.benchmark_group("12-megapixel JPEG");
    group.sample_size(20);
    group.bench_function("decode", |bencher| bencher.iter(|| read(black_box(&jpeg))));
    for (name, preprocess, picture) in
        [("crop", &crop, &wide), ("pad", &pad, &wide), ("crop, rows first (1:3)", &crop, &tall)]
    {
        group.bench_function(name, |bencher| bencher.iter(|| preprocess.pixels(black_box(picture)).unwrap()));
    }
    group.bench_function("digest", |bencher| bencher.iter(|| crop.digest(black_box(&wide))));
    group.finish();
}

criterion_group!(all, benches);
criterion_main!(all);
