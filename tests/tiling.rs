//! LLaVA-NeXT's geometry and pixels against transformers and the original formulas, and what must hold for
//! pictures of any size.

use proptest::prelude::*;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::path::Path;
use tessera::Error;
use tessera::input::image::resize::{Canvas, Filter, resize_window};
use tessera::input::image::{Merge, NEWLINE, Picture, Preprocess, Tiling, pixels_sha256};
use tessera::model::config::{ModelConfig, original_tiling};
use tessera::model::json::Section;

const HUGGING_FACE: Merge = Merge::SpatialUnpad { rounded: true };
const ORIGINAL: Merge = Merge::SpatialUnpad { rounded: false };

/// What transformers and the original make of them: see `tests/data/tiling/make.py`.
fn expected() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/tiling/expected.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn number(value: &Value) -> usize {
    value.as_u64().unwrap() as usize
}

/// A tiling of the file: pinpoints are (height, width) to transformers, (width, height) to the original.
fn tiling(expected: &Value, name: &Value, merge: Merge) -> Tiling {
    let tiling = &expected["tilings"][name.as_str().unwrap()];
    let pair = |pair: &Value| match merge {
        HUGGING_FACE => (number(&pair[1]), number(&pair[0])),
        _ => (number(&pair[0]), number(&pair[1])),
    };
    let pinpoints = tiling["pinpoints"].as_array().unwrap().iter().map(pair).collect();
    Tiling::new(pinpoints, number(&tiling["side"]), number(&tiling["grid"]), merge).unwrap()
}

/// LLaVA-1.6's, as its `config.json` has it.
fn llava_16() -> Tiling {
    let sizes = [(672, 336), (336, 672), (672, 672), (336, 1008), (1008, 336)];
    Tiling::new(sizes.into(), 336, 24, HUGGING_FACE).unwrap()
}

#[test]
fn prompts_have_the_lengths_of_hugging_face() {
    for (width, height, canvas, tokens) in [
        (640, 480, (672, 672), 2340),
        (480, 640, (672, 672), 2352),
        (1024, 899, (672, 672), 2634),
        (336, 336, (672, 336), 1176),
        (672, 672, (672, 672), 2928),
        (1000, 300, (1008, 336), 2182),
        (300, 1000, (336, 1008), 2232),
        (1920, 1080, (672, 672), 1948),
        (1080, 1920, (672, 672), 1968),
        (333, 777, (336, 1008), 1976),
        (2000, 200, (1008, 336), 1160),
        (672, 336, (672, 336), 1752),
        (1008, 336, (1008, 336), 2328),
        // The two readings of the pinpoints part here; the original has 876.
        (200, 100, (672, 336), 1752),
    ] {
        let tiles = llava_16().tiles(width, height);
        assert_eq!((tiles.columns * 336, tiles.rows * 336), canvas, "{width}x{height}");
        assert_eq!(tiles.tokens(), tokens, "{width}x{height}");
    }
}

#[test]
fn rows_are_those_of_transformers_and_of_the_original() {
    let expected = expected();
    let mut compared = 0;
    for entry in expected["sizes"].as_array().unwrap() {
        let (width, height) = (number(&entry["size"][0]), number(&entry["size"][1]));
        let merges = [
            ("hugging_face", HUGGING_FACE),
            ("original", ORIGINAL),
            ("flat", Merge::Flat),
            ("spatial", Merge::Spatial),
        ];
        for (key, merge) in merges {
            let Some(want) = entry.get(key) else { continue };
            let tiles = tiling(&expected, &entry["tiling"], merge).tiles(width, height);
            let order = tiles.order();
            let bytes: Vec<u8> = order.iter().flat_map(|row| row.to_le_bytes()).collect();
            let digest: String = Sha256::digest(bytes)[..8].iter().map(|b| format!("{b:02x}")).collect();
            assert_eq!(&json!([tiles.columns, tiles.rows, order.len(), digest]), want, "{key}: {entry}");
            assert_eq!(tiles.tokens(), order.len(), "{key}: {entry}");
            compared += 1;
        }
    }
    assert_eq!(compared, 4 * 97 * 2 + 2 * 97 * 2);
}

/// Both sides at most 336: another canvas. (799, 376): the rounding. Elsewhere the two agree.
#[test]
fn the_readings_differ_where_they_are_known_to() {
    let expected = expected();
    for (size, counts) in [((200, 100), (1752, 876)), ((799, 376), (1848, 1800)), ((640, 480), (2340, 2340))]
    {
        let tokens = |merge| tiling(&expected, &json!("llava-1.6"), merge).tiles(size.0, size.1).tokens();
        assert_eq!((tokens(HUGGING_FACE), tokens(ORIGINAL)), counts, "{size:?}");
    }
}

/// The picture whose byte i is ((i * 7919) >> 3) & 255.
fn noise(width: usize, height: usize) -> Picture {
    Picture { width, height, rgb: (0..width * height * 3).map(|i| ((i * 7919) >> 3) as u8).collect() }
}

fn with_tiles(mut preprocess: Preprocess, tiling: Tiling) -> Preprocess {
    preprocess.tiling = Some(tiling);
    preprocess
}

#[test]
fn pixels_are_those_of_the_processor() {
    let expected = expected();
    for case in expected["pixels"].as_array().unwrap() {
        let tiling = tiling(&expected, &case["tiling"], HUGGING_FACE);
        let side = number(&expected["tilings"][case["tiling"].as_str().unwrap()]["side"]);
        let (width, height) = (number(&case["width"]), number(&case["height"]));
        let preprocess = with_tiles(Preprocess::clip(side), tiling);
        let pixels = preprocess.pixels(&noise(width, height)).unwrap();
        assert_eq!(preprocess.squares(width, height), number(&case["squares"]), "{case}");
        assert_eq!(pixels.len(), number(&case["squares"]) * 3 * side * side, "{case}");
        assert_eq!(case["sha256"], pixels_sha256(&pixels), "{case}");
    }
}

/// Any tiling of small numbers.
fn any_tiling() -> impl Strategy<Value = Tiling> {
    let merge = prop_oneof![Just(HUGGING_FACE), Just(ORIGINAL), Just(Merge::Flat), Just(Merge::Spatial)];
    let canvases = prop::collection::vec((1usize..5, 1usize..5), 1..6);
    (1usize..8, 1usize..30, canvases, merge).prop_map(|(side, grid, canvases, merge)| {
        let canvases = canvases.into_iter().map(|(w, h)| (w * side, h * side)).collect();
        Tiling::new(canvases, side, grid, merge).unwrap()
    })
}

/// Sides from 1 to 30000, small ones as often as large ones.
fn any_side() -> impl Strategy<Value = usize> {
    (0.0..30000f64.ln()).prop_map(|x| x.exp().round() as usize)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    /// The count that a prompt is expanded by is that of the rows that are gathered, all of them exist, and
    /// none is there twice.
    #[test]
    fn rows_exist_and_are_as_many_as_counted(
        tiling in prop_oneof![any_tiling(), Just(llava_16())], width in any_side(), height in any_side(),
    ) {
        let tiles = tiling.tiles(width, height);
        let order = tiles.order();
        prop_assert_eq!(order.len(), tiles.tokens());
        prop_assert!(order.len() <= tiling.max_tokens() && tiles.squares() <= tiling.max_squares());
        let there = (tiles.squares() * tiles.grid * tiles.grid) as i32;
        let mut rows: Vec<_> = order.into_iter().filter(|&row| row != NEWLINE).collect();
        prop_assert!(rows.iter().all(|row| (0..there).contains(row)));
        let count = rows.len();
        rows.sort();
        rows.dedup();
        prop_assert_eq!(rows.len(), count);
        let (resized, margin) = (tiles.resized, tiles.margin());
        prop_assert!(resized.0 >= 1 && resized.1 >= 1);
        prop_assert!(2 * margin.0 + resized.0 <= tiles.columns * tiles.side);
        prop_assert!(2 * margin.1 + resized.1 <= tiles.rows * tiles.side);
    }

    /// Python's `int(round(length * (patches / pixels), 7))` is the exact quotient.
    #[test]
    fn rounded_lengths_are_exact_quotients(width in any_side(), height in any_side(), cells in 1usize..200) {
        let product = height as f64 * (cells as f64 / width as f64);
        let rounded: f64 = format!("{product:.7}").parse().unwrap();
        prop_assert_eq!(rounded as usize, height * cells / width);
    }

    /// Tiles against a canvas that is made: every pixel of it is in one tile, at its place.
    #[test]
    fn tiles_are_the_canvas_cut(tiling in any_tiling(), width in 1usize..60, height in 1usize..60) {
        let tiles = tiling.tiles(width, height);
        let (side, columns, picture) = (tiles.side, tiles.columns, noise(width, height));
        let resize = |(w, h)| resize_window(&Canvas::of(&picture), Filter::Bicubic, (w, h), (0..w, 0..h), 1);
        let mut canvas = vec![0u8; columns * side * tiles.rows * side * 3];
        let (resized, margin) = (resize(tiles.resized), tiles.margin());
        for (y, line) in resized.chunks(tiles.resized.0 * 3).enumerate() {
            let at = ((margin.1 + y) * columns * side + margin.0) * 3;
            canvas[at..at + line.len()].copy_from_slice(line);
        }
        let plain = json!({"crop_size": side, "size": side, "do_rescale": false, "do_normalize": false});
        let plain = Preprocess::from_json(Path::new("p.json"), &plain).unwrap();
        let pixels = with_tiles(plain, tiling).pixels(&picture).unwrap();
        let mut squares = pixels.chunks(3 * side * side);
        let at = |square: &[f32], c: usize, y: usize, x: usize| square[(c * side + y) * side + x] as u8;
        let whole = squares.next().unwrap();
        for (i, &level) in resize((side, side)).iter().enumerate() {
            prop_assert_eq!(at(whole, i % 3, i / 3 / side, i / 3 % side), level);
        }
        let squares: Vec<_> = squares.collect();
        prop_assert_eq!(squares.len() * side * side * 3, canvas.len());
        for (i, &level) in canvas.iter().enumerate() {
            let (c, x, y) = (i % 3, i / 3 % (columns * side), i / 3 / (columns * side));
            let square = squares[y / side * columns + x / side];
            prop_assert_eq!(at(square, c, y % side, x % side), level, "pixel {} {} of channel {}", x, y, c);
        }
    }
}

#[test]
fn extreme_shapes_cost_nothing_strange() {
    let preprocess = with_tiles(Preprocess::clip(336), llava_16());
    for (width, height) in [(1, 1), (1, 30000), (30000, 1), (2_000_000, 1), (1, 2_000_000)] {
        let pixels = preprocess.pixels(&noise(width, height)).unwrap();
        assert_eq!(pixels.len(), preprocess.squares(width, height) * 3 * 336 * 336);
        assert!(preprocess.squares(width, height) <= 5);
        // A line thinner than half a patch is seen in the whole picture alone; a column leaves newlines.
        let tokens = llava_16().tiles(width, height).tokens();
        let margins = [576, 576 + 24];
        assert!(width * height == 1 || margins.contains(&tokens), "{width}x{height}: {tokens}");
    }
    // Sizes that no decoder lets through are numbers too.
    for (width, height) in [(usize::MAX, 1), (1, usize::MAX), (usize::MAX, usize::MAX)] {
        assert!(llava_16().tiles(width, height).tokens() <= llava_16().max_tokens());
    }
}

fn hugging_face(changes: Value) -> Result<ModelConfig, Error> {
    let mut config =
        json!({"model_type": "llava_next", "architectures": ["LlavaNextForConditionalGeneration"]});
    config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    ModelConfig::from_json(config.as_object().unwrap(), Path::new("config.json"))
}

#[test]
fn configurations_of_either_kind_are_read() {
    let config = hugging_face(json!({})).unwrap();
    assert_eq!(config.tiling, Some(llava_16()), "the class's default");
    assert_eq!((config.image_tokens(640, 480), config.square_rows()), (2340, 576));
    let pinpoints = json!([[336, 672], [1008, 336]]);
    let config = hugging_face(json!({"image_grid_pinpoints": pinpoints})).unwrap();
    assert_eq!(config.tiling.unwrap().resolutions(), [(672, 336), (336, 1008)], "(height, width)");

    let vision = hugging_face(json!({})).unwrap().vision.unwrap();
    let original =
        |json: Value| original_tiling(&Section::root(Path::new("c"), json.as_object().unwrap()), &vision);
    let text = "[(336, 672), (1008, 336)]";
    for (merge, expected) in [("flat", Merge::Flat), ("spatial", Merge::Spatial), ("spatial_unpad", ORIGINAL)]
    {
        for pinpoints in [&pinpoints, &json!(text), &json!(text.replace('(', "[").replace(')', "]"))] {
            let tiling = original(json!({"image_aspect_ratio": "anyres", "image_grid_pinpoints": pinpoints,
                                         "mm_patch_merge_type": merge}));
            let tiling = tiling.unwrap().unwrap();
            assert_eq!(tiling.resolutions(), [(336, 672), (1008, 336)], "(width, height)");
            assert_eq!(tiling.merge(), expected);
        }
    }
    for json in [json!({}), json!({"image_aspect_ratio": "pad", "image_grid_pinpoints": 7})] {
        assert_eq!(original(json).unwrap(), None);
    }
    for (json, key) in [
        (json!({"image_aspect_ratio": "anyres"}), "image_grid_pinpoints"),
        (
            json!({"image_aspect_ratio": "anyres", "image_grid_pinpoints": "(1x1),...,(6x6)"}),
            "image_grid_pinpoints",
        ),
        (
            json!({"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_maxpool2x2"}),
            "mm_patch_merge_type",
        ),
    ] {
        let text = original(json.clone()).unwrap_err().to_string();
        assert!(text.contains(&format!("`{key}` is ")), "{json}: {text}");
    }
}

#[test]
fn lying_configurations_are_errors_that_name_the_key() {
    let huge: Vec<_> = (0..65).map(|_| [336, 336]).collect();
    for pinpoints in [
        json!([]),
        json!([[0, 336]]),
        json!([[336, 0]]),
        json!([[336, -336]]),
        json!([[336, 337]]),
        json!([[336, 336.0]]),
        json!([[336, 336.5]]),
        json!([[336, 336_000]]),
        json!([[336, u64::MAX]]),
        json!([[4032, 4032]]),
        json!([[336]]),
        json!([[336, 336, 336]]),
        json!([336, 672]),
        json!([["336", "672"]]),
        json!([null]),
        json!({}),
        json!(336),
        json!(true),
        json!("[[336, 672]"),
        json!("import os"),
        json!("[".repeat(100_000)),
        json!(huge),
    ] {
        let error =
            hugging_face(json!({"image_grid_pinpoints": pinpoints})).expect_err(&pinpoints.to_string());
        let text = error.to_string();
        assert!(text.contains("config.json: `image_grid_pinpoints` is "), "{pinpoints}: {text}");
        assert!(text.len() < 500, "{text}");
    }
    // The default has no tiles of 224.
    let small = json!({"vision_config": {"image_size": 224, "patch_size": 14}});
    assert!(hugging_face(small).unwrap_err().to_string().contains("multiples of the tile, 224"));
    let full = hugging_face(json!({"vision_feature_select_strategy": "full"})).unwrap_err();
    assert!(full.to_string().contains("`vision_feature_select_strategy` is \"full\""), "{full}");
    let other = json!({"architectures": ["LlavaForConditionalGeneration"]});
    assert!(hugging_face(other).unwrap_err().to_string().contains("`architectures`"));
    // A processor that would cut other tiles than the tower reads.
    let processor = json!({"image_processor_type": "LlavaNextImageProcessor", "size": 400, "crop_size": 336});
    let error = Preprocess::from_json(Path::new("p.json"), &processor).unwrap_err().to_string();
    assert!(error.contains("`size` is 400"), "{error}");
}
