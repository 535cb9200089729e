//! Pictures to the vision tower's input: bit-equal to Pillow and Hugging Face's PIL-backend processor for
//! losslessly stored pictures, to a few levels for JPEG, whose decoders differ.

use std::ops::Range;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tessera::input::image::resize::{Canvas, Filter, resize_window};
use tessera::input::image::{DecodeOptions, ImageMode, Picture, Preprocess, decode, pixels_sha256};

fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(path)
}

fn json_file(path: &str) -> Value {
    serde_json::from_slice(&std::fs::read(data(path)).unwrap()).unwrap()
}

fn picture(path: &str) -> Picture {
    decode(path, &std::fs::read(data(path)).unwrap(), &DecodeOptions::default()).unwrap()
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The picture of the resize vectors: byte i is ((i * 7919) >> 3) & 255.
fn noise(width: usize, height: usize) -> Picture {
    Picture { width, height, rgb: (0..width * height * 3).map(|i| ((i * 7919) >> 3) as u8).collect() }
}

fn pixels(preprocess: &Preprocess, picture: &Picture) -> Vec<f32> {
    preprocess.pixels(picture).unwrap()
}

fn with_padding(mut preprocess: Preprocess) -> Preprocess {
    preprocess.mode = ImageMode::Pad;
    preprocess
}

/// JPEG decoders are not the same to the bit: the inverse DCT may round otherwise (1 level a channel before
/// the colour transform, whose largest coefficient is 1.77), subsampled chroma is interpolated in other
/// steps, and on a picture's border out of other neighbours. So a few levels are allowed, more to 1 value
/// in 10,000, and half a level in the mean.
fn check_jpeg(file: &str, got: &[u8], libjpeg: &[u8]) {
    assert_eq!(got.len(), libjpeg.len());
    let off = || got.iter().zip(libjpeg).map(|(a, b)| a.abs_diff(*b));
    let (worst, far) = (off().max().unwrap(), off().filter(|&levels| levels > 4).count());
    let mean = off().map(f64::from).sum::<f64>() / got.len() as f64;
    println!(
        "{file}: {worst} levels off (12 allowed), {far} of {} above 4, {mean:.3} in the mean",
        got.len()
    );
    assert!(worst <= 12 && far * 10_000 <= got.len() && mean <= 0.5, "{file}");
}

#[test]
fn awkward_pictures_equal_hugging_face() {
    let expected = json_file("i_preprocess/expected.json");
    let images = expected["images"].as_array().unwrap();
    assert_eq!(images.len(), 20);
    for case in images {
        let file = case["file"].as_str().unwrap();
        let path = format!("i_preprocess/images/{file}");
        let mut exact = picture(&path);
        let size = [case["width"].as_u64().unwrap(), case["height"].as_u64().unwrap()];
        assert_eq!([exact.width as u64, exact.height as u64], size, "{file}");

        let decoded = path.replace(".jpg", ".decoded.png");
        if path.ends_with("p20_big.jpg") {
            // Too big to keep decoded: the crop at 112 stands for it.
            let want = picture("i_preprocess/images/p20_big.u8_112.png").rgb;
            check_jpeg(file, &Preprocess::clip(112).crop_u8(&exact).unwrap(), &want);
            continue;
        } else if decoded != path {
            let reference = picture(&decoded);
            check_jpeg(file, &exact.rgb, &reference.rgb);
            exact = reference;
        }

        for (key, side) in [("u8_336", 336), ("u8_112", 112)] {
            let crop = Preprocess::clip(side).crop_u8(&exact).unwrap();
            assert_eq!(sha256(&crop), case[key], "{file} at {side}");
        }
        if let Some(want) = case.get("pixel_values_112") {
            assert_eq!(&pixels_sha256(&pixels(&Preprocess::clip(112), &exact)), want, "{file}");
        }
    }
}

/// The requests of the model cases: the configuration is the checkpoint's own.
#[test]
fn pixel_values_of_the_model_cases_are_bit_equal() {
    let expected = json_file("i_preprocess/expected.json");
    for request in expected["requests"].as_array().unwrap() {
        let (case, model) = (request["case"].as_str().unwrap(), request["model"].as_str().unwrap());
        let config = format!("{model}/model/preprocessor_config.json");
        let preprocess = Preprocess::from_json(Path::new(&config), &json_file(&config)).unwrap();
        let mut got = vec![];
        for image in request["images"].as_array().unwrap() {
            let path = format!("{case}/images/{}", image.as_str().unwrap());
            got.extend(pixels(&preprocess, &picture(&path.replace(".jpg", ".decoded.png"))));
        }
        assert_eq!(pixels_sha256(&got), request["pixel_values"], "{request}");
    }
}

#[test]
fn resizes_equal_pillow() {
    for case in json_file("images/expected.json")["resize"].as_array().unwrap() {
        let number = |value: &Value| value.as_u64().unwrap() as usize;
        let source = noise(number(&case["width"]), number(&case["height"]));
        let canvas = match case["pad"].as_bool().unwrap() {
            true => Canvas::squared(&source, [122, 116, 104]),
            false => Canvas::of(&source),
        };
        let filter = Filter::from_pillow(case["filter"].as_u64().unwrap()).unwrap();
        let (width, height) = (number(&case["to"][0]), number(&case["to"][1]));
        for threads in [1, 2, 5] {
            let result = resize_window(&canvas, filter, (width, height), (0..width, 0..height), threads);
            assert_eq!(sha256(&result), case["sha256"], "{case}, {threads} threads");
        }
    }
}

/// Pillow's two passes as plainly as they can be written: f64 weights to 22-bit fixed point, a whole
/// picture between the passes.
fn plain_resize(source: &Picture, width: usize, height: usize) -> Vec<u8> {
    let wide = |picture: &Picture| plain_pass(picture, width);
    let flat = |picture: &Picture| transposed(&plain_pass(&transposed(picture), height));
    let (columns, rows) = (source.width as i64 - width as i64, source.height as i64 - height as i64);
    if rows > 0 && 2 * columns < rows { wide(&flat(source)).rgb } else { flat(&wide(source)).rgb }
}

fn plain_pass(source: &Picture, width: usize) -> Picture {
    let cubic = |x: f64| match x.abs() {
        t if t < 1.0 => (1.5 * t - 2.5) * t * t + 1.0,
        t if t < 2.0 => (((t - 5.0) * t + 8.0) * t - 4.0) * -0.5,
        _ => 0.0,
    };
    let scale = source.width as f64 / width as f64;
    let stretch = scale.max(1.0);
    let mut result = Picture { width, height: source.height, rgb: vec![0; width * source.height * 3] };
    for x in 0..width {
        let centre = (x as f64 + 0.5) * scale;
        let (low, high) = (centre - 2.0 * stretch + 0.5, centre + 2.0 * stretch + 0.5);
        let taps: Vec<usize> =
            (0..source.width).filter(|&i| i as i64 >= low as i64 && (i as i64) < high as i64).collect();
        let weights: Vec<f64> =
            taps.iter().map(|&i| cubic((i as f64 - centre + 0.5) * (1.0 / stretch))).collect();
        let total: f64 = weights.iter().sum();
        for at in (0..source.height).flat_map(|y| [0, 1, 2].map(|c| (y, c))) {
            let mut sum = 1 << 21;
            for (&i, weight) in taps.iter().zip(&weights) {
                let fixed = weight / total * 4194304.0;
                let pixel: i64 = source.rgb[(at.0 * source.width + i) * 3 + at.1].into();
                sum += pixel * (fixed + if fixed < 0.0 { -0.5 } else { 0.5 }) as i64;
            }
            result.rgb[(at.0 * width + x) * 3 + at.1] = (sum >> 22).clamp(0, 255) as u8;
        }
    }
    result
}

fn transposed(source: &Picture) -> Picture {
    let pixel = |x: usize, y: usize| &source.rgb[(y * source.width + x) * 3..][..3];
    let rgb = (0..source.width).flat_map(|x| (0..source.height).flat_map(move |y| pixel(x, y))).copied();
    Picture { width: source.height, height: source.width, rgb: rgb.collect() }
}

/// The window of whole RGB rows.
fn cut(whole: &[u8], width: usize, columns: Range<usize>, rows: Range<usize>) -> Vec<u8> {
    rows.flat_map(|y| &whole[(y * width + columns.start) * 3..(y * width + columns.end) * 3])
        .copied()
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_window_is_that_part_of_the_plain_resize(
        source in (1usize..60, 1usize..60), to in (1usize..50, 1usize..50),
        ends in [0.0..1.0f64, 0.0..1.0, 0.0..1.0, 0.0..1.0], seed in any::<u32>(),
        threads in 1usize..4,
    ) {
        let mut state = seed;
        let rgb = (0..source.0 * source.1 * 3).map(|_| {
            state = state.wrapping_mul(1664525).wrapping_add(1013904223);
            // Mostly black and white, which overshoots and clips.
            [0, 255, (state >> 8) as u8, 255][(state >> 30) as usize]
        }).collect();
        let source = Picture { width: source.0, height: source.1, rgb };
        let range = |a: f64, b: f64, length: usize| {
            let (a, b) = ((a * length as f64) as usize, (b * length as f64) as usize);
            a.min(b)..a.max(b) + 1
        };
        let (columns, rows) = (range(ends[0], ends[1], to.0), range(ends[2], ends[3], to.1));
        let got = resize_window(&Canvas::of(&source), Filter::Bicubic, to, (columns.clone(), rows.clone()), threads);
        prop_assert_eq!(got, cut(&plain_resize(&source, to.0, to.1), to.0, columns, rows));
    }

    /// A canvas that is never made, against one that is.
    #[test]
    fn padding_is_as_if_the_square_had_been_made(width in 1usize..40, height in 1usize..40, side in 1usize..40) {
        let source = noise(width, height);
        let square = width.max(height);
        let mut rgb = [122, 116, 104].repeat(square * square);
        for (y, line) in source.rgb.chunks(width * 3).enumerate() {
            let at = ((y + (square - height) / 2) * square + (square - width) / 2) * 3;
            rgb[at..at + width * 3].copy_from_slice(line);
        }
        let made = plain_resize(&Picture { width: square, height: square, rgb }, side, side);
        prop_assert_eq!(with_padding(Preprocess::clip(side)).crop_u8(&source).unwrap(), made);
    }
}

#[test]
fn extreme_shapes_cost_nothing_strange() {
    for preprocess in [Preprocess::clip(336), with_padding(Preprocess::clip(336))] {
        for (width, height) in [(1, 30000), (30000, 1), (2_000_000, 1), (1, 2_000_000), (1, 1)] {
            let crop = preprocess.crop_u8(&noise(width, height)).unwrap();
            assert_eq!(crop.len(), 336 * 336 * 3);
        }
    }
    // A column of one colour stays that colour, and on its padding leaves a trace no wider than the filter.
    let column = Picture { width: 1, height: 30000, rgb: [10, 200, 30].repeat(30000) };
    let crop = Preprocess::clip(336).crop_u8(&column).unwrap();
    assert!(crop.as_chunks::<3>().0.iter().all(|pixel| *pixel == [10, 200, 30]));
}

#[test]
fn a_crop_larger_than_the_picture_is_zero_padded() {
    // Hugging Face's center_crop: an odd margin is the larger one on the left and upper side.
    let config = json!({"do_resize": false, "crop_size": 4});
    let preprocess = Preprocess::from_json(Path::new("p.json"), &config).unwrap();
    let crop = preprocess.crop_u8(&Picture { width: 1, height: 6, rgb: (1..=18).collect() }).unwrap();
    let mut want = vec![0; 48];
    for row in 0..4 {
        want[(row * 4 + 2) * 3..][..3].copy_from_slice(&[4, 5, 6].map(|v| v + 3 * row as u8));
    }
    assert_eq!(crop, want);
}

#[test]
fn every_generation_of_configuration_is_read() {
    let read = |json: &Value| Preprocess::from_json(Path::new("preprocessor_config.json"), json);
    let clip = Preprocess::clip(336);
    for same in [
        json!({"size": 336, "crop_size": 336}),
        json!({"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}, "do_pad": null}),
        json!({"size": {"shortest_edge": 336, "longest_edge": null}, "crop_size": 336, "resample": 3,
               "rescale_factor": 0.00392156862745098, "do_convert_rgb": true, "do_rescale": true,
               "image_processor_type": "CLIPImageProcessor", "do_pad": true}),
    ] {
        assert_eq!(read(&same).unwrap(), clip, "{same}");
    }
    assert_eq!(read(&json!({})).unwrap(), Preprocess::clip(224));

    let padded = read(&json!({"image_processor_type": "LlavaImageProcessor", "do_pad": true,
                              "size": {"shortest_edge": 336}, "crop_size": 336}));
    assert_eq!(padded.unwrap(), with_padding(clip));

    // Width and height apart from the aspect ratio, and no crop: plain rescaled values.
    let squash = json!({"size": {"height": 8, "width": 8}, "do_center_crop": false, "do_normalize": false});
    let squash = read(&squash).unwrap();
    let source = noise(31, 5);
    let values = pixels(&squash, &source);
    let bytes = plain_resize(&source, 8, 8);
    assert_eq!(values[64 + 9], (f64::from(bytes[9 * 3 + 1]) * 0.00392156862745098) as f32);
}

#[test]
fn lying_configurations_are_errors_that_name_the_key() {
    for (json, key) in [
        (json!({"size": 0}), "size"),
        (json!({"size": -336}), "size"),
        (json!({"size": 1_000_000_000}), "size"),
        (json!({"size": 336.5}), "size"),
        (json!({"size": "336"}), "size"),
        (json!({"size": {}}), "size.width"),
        (json!({"size": {"height": 336}}), "size.width"),
        (json!({"size": {"shortest_edge": 336, "longest_edge": 400}}), "size"),
        (json!({"crop_size": {"height": 336, "width": 224}}), "crop_size"),
        (json!({"crop_size": {"shortest_edge": 336}}), "crop_size.height"),
        (json!({"crop_size": [336, 336]}), "crop_size.height"),
        (json!({"do_center_crop": false}), "do_center_crop"),
        (json!({"do_center_crop": "yes"}), "do_center_crop"),
        (json!({"do_resize": 1}), "do_resize"),
        (json!({"resample": 0}), "resample"),
        (json!({"resample": 6}), "resample"),
        (json!({"resample": "bicubic"}), "resample"),
        (json!({"rescale_factor": "1/255"}), "rescale_factor"),
        (json!({"image_mean": [0.5, 0.5]}), "image_mean"),
        (json!({"image_mean": [0.5, 0.5, null]}), "image_mean"),
        (json!({"image_std": [0.5, 0.0, 0.5]}), "image_std"),
        (json!({"image_std": [0.5, 1e-300, 0.5]}), "image_std"),
        (json!({"image_std": 0.5}), "image_std"),
    ] {
        let error = Preprocess::from_json(Path::new("lies.json"), &json).expect_err(&json.to_string());
        let text = error.to_string();
        assert!(text.contains("lies.json") && text.contains(&format!("`{key}` is ")), "{json}: {text}");
    }
}

#[test]
fn the_digest_depends_on_everything() {
    let source = noise(20, 10);
    let clip = Preprocess::clip(8);
    let mut changed = source.clone();
    changed.rgb[77] ^= 1;
    let turned = Picture { width: 10, height: 20, ..source.clone() };
    let read = |json: Value| Preprocess::from_json(Path::new("p.json"), &json).unwrap();
    let mut digests = vec![
        clip.digest(&source),
        clip.digest(&changed),
        clip.digest(&turned),
        Preprocess::clip(9).digest(&source),
        with_padding(clip.clone()).digest(&source),
    ];
    for json in [
        json!({"size": 9, "crop_size": 8}),
        json!({"size": {"height": 8, "width": 8}, "crop_size": 8}),
        json!({"do_resize": false, "crop_size": 8}),
        json!({"size": 8, "crop_size": 8, "resample": 2}),
        json!({"size": 8, "crop_size": 8, "do_rescale": false}),
        json!({"size": 8, "crop_size": 8, "rescale_factor": 0.5}),
        json!({"size": 8, "crop_size": 8, "do_normalize": false}),
        json!({"size": 8, "crop_size": 8, "image_mean": [0, 0, 0]}),
        json!({"size": 8, "crop_size": 8, "image_std": [1, 1, 1]}),
        json!({"size": {"height": 8, "width": 8}, "do_center_crop": false}),
    ] {
        digests.push(read(json).digest(&source));
    }
    let count = digests.len();
    digests.sort();
    digests.dedup();
    assert_eq!(digests.len(), count);
    assert_eq!(clip.digest(&source), read(json!({"size": 8, "crop_size": 8})).digest(&source.clone()));
}

#[test]
fn the_pixel_hash_is_of_little_endian_bytes() {
    // printf '\x00\x00\x80\x3f\x00\x00\x00\xc0' | sha256sum
    assert_eq!(pixels_sha256(&[1.0, -2.0]), sha256(&[0, 0, 0x80, 0x3f, 0, 0, 0, 0xc0]));
}
