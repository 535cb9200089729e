//! Image files to pixels: every pixel layout against what Pillow makes of it (tests/data/images/make.py),
//! and damaged or lying files, which must be errors and never panics or unbounded memory.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::path::{Path, PathBuf};

use base64::prelude::{BASE64_STANDARD, Engine};
use proptest::prelude::*;
use serde_json::Value;
use tessera::input::image::{DecodeOptions, MAX_PIXELS, Picture, decode};

/// Counts what the calling thread holds, so that a test can bound what a decoder allocates.
struct Counting;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

// SAFETY: every request goes to the system allocator unchanged; the counters are plain thread-local cells,
// which neither allocate nor unwind.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller keeps `alloc`'s contract, which is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: as for `alloc`. Passed on as it is, since zeroed pages cost nothing until they are touched.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: `pointer` came from `alloc` above with this layout, by the caller's contract.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn count(bytes: isize) {
    // A thread that is ending has no cells any more; what it frees is of no interest.
    let _ = HELD.try_with(|held| {
        held.set(held.get() + bytes);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(held.get())));
    });
}

/// The result of `decode` and the most bytes that it held at a time.
fn measured(bytes: &[u8]) -> (tessera::Result<Picture>, usize) {
    let before = HELD.get();
    PEAK.set(before);
    let result = decode("a file", bytes, &DecodeOptions::default());
    (result, (PEAK.get() - before) as usize)
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/images")
}

fn expected() -> Vec<Value> {
    let json: Value =
        serde_json::from_slice(&std::fs::read(folder().join("expected.json")).unwrap()).unwrap();
    json["decode"].as_array().unwrap().clone()
}

#[test]
fn every_pixel_layout_is_converted_as_pillow_does() {
    let mut failures = vec![];
    for case in expected() {
        let file = case["file"].as_str().unwrap();
        let bytes = std::fs::read(folder().join(file)).unwrap();
        let size = (case["width"].as_u64().unwrap() as usize, case["height"].as_u64().unwrap() as usize);
        let levels = case["levels"].as_u64().unwrap() as u8;
        let mut check = |exif_orientation, size, key: &str| {
            let want = BASE64_STANDARD.decode(case[key].as_str().unwrap()).unwrap();
            match decode(file, &bytes, &DecodeOptions { exif_orientation, ..Default::default() }) {
                Ok(picture) if (picture.width, picture.height) == size => {
                    let worst = worst(&picture.rgb, &want);
                    if levels > 0 {
                        println!("{file}: {worst} levels off, {levels} allowed");
                    }
                    if worst > levels {
                        failures.push(format!("{file} ({key}): {worst} levels off"));
                    }
                }
                other => failures.push(format!("{file} ({key}): {other:?}")),
            }
        };
        check(true, size, "rgb");
        if case.get("stored").is_some() {
            let turned =
                matches!(file.as_bytes()[4], b'5'..=b'8') || file == "xmp8.png" || file == "xmp6.jpg";
            check(false, if turned { (size.1, size.0) } else { size }, "stored");
        } else {
            check(false, size, "rgb");
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

fn worst(a: &[u8], b: &[u8]) -> u8 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a.abs_diff(*b)).max().unwrap()
}

/// A PNG header that declares `width` x `height` pixels of 8-bit RGB, and nothing after it.
fn png_header(width: u32, height: u32) -> Vec<u8> {
    let file = std::fs::read(folder().join("rgb8.png")).unwrap();
    let mut bytes = file[..33].to_vec();
    bytes[16..20].copy_from_slice(&width.to_be_bytes());
    bytes[20..24].copy_from_slice(&height.to_be_bytes());
    let crc = crc32(&bytes[12..29]);
    bytes[29..33].copy_from_slice(&crc.to_be_bytes());
    bytes.extend_from_slice(&file[33..]);
    bytes
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| (crc >> 1) ^ (0xedb88320 & (crc & 1).wrapping_neg()))
    })
}

#[test]
fn lying_headers_are_refused_before_anything_is_allocated() {
    let patch = |file: &str, at: usize, value: &[u8]| {
        let mut bytes = std::fs::read(folder().join(file)).unwrap();
        bytes[at..at + value.len()].copy_from_slice(value);
        bytes
    };
    let frame_header = std::fs::read(folder().join("grey.jpg"))
        .unwrap()
        .windows(2)
        .position(|pair| pair == [0xff, 0xc0])
        .unwrap();
    let side = 60000u16;
    let cases = [
        ("60000x60000 PNG", png_header(60000, 60000), "at most"),
        ("PNG of 2^31 columns", png_header(1 << 30, 1 << 30), ""),
        ("PNG without rows", png_header(13, 0), ""),
        (
            "60000x60000 JPEG",
            patch("grey.jpg", frame_header + 5, &[side.to_be_bytes(); 2].concat()),
            "at most",
        ),
        ("60000x60000 GIF", patch("opaque.gif", 6, &[side.to_le_bytes(); 2].concat()), "at most"),
        ("60000x60000 BMP", patch("rgb.bmp", 18, &[u32::from(side).to_le_bytes(); 2].concat()), "at most"),
        ("BMP without rows", patch("rgb.bmp", 22, &[0; 4]), ""),
        ("an empty file", vec![], "empty"),
        ("text", b"this is no picture".to_vec(), "74, 68, 69"),
        ("a JPEG signature", vec![0xff, 0xd8, 0xff], ""),
    ];
    for (name, bytes, says) in cases {
        let (result, peak) = measured(&bytes);
        let error = result.expect_err(name).to_string();
        println!("{name}: {error} ({peak} bytes at most)");
        assert!(error.contains(says), "{name}: {error}");
        assert!(peak < 1 << 20, "{name}: {peak} bytes were allocated");
    }
}

#[test]
fn a_cut_file_is_an_error() {
    for case in expected() {
        let file = case["file"].as_str().unwrap();
        let bytes = std::fs::read(folder().join(file)).unwrap();
        let (result, _) = measured(&bytes[..bytes.len() / 2]);
        match result {
            // The first frame may be whole.
            Ok(picture) if file.starts_with("animated") => {
                assert_eq!(BASE64_STANDARD.encode(picture.rgb), case["rgb"], "half of {file}");
            }
            other => assert!(other.is_err(), "half of {file} was decoded"),
        }
    }
    let jpeg = std::fs::read(folder().join("exif1.jpg")).unwrap();
    let (result, _) = measured(&jpeg[..jpeg.len() - 2]);
    assert!(result.unwrap_err().to_string().contains("cut off"));
}

/// What a decode may hold: the file, 16 bytes a pixel, and 64 MiB of tables.
fn allowed(bytes: &[u8], result: &tessera::Result<Picture>) -> usize {
    let pixels = result.as_ref().map_or(MAX_PIXELS as usize, |picture| picture.width * picture.height);
    4 * bytes.len() + pixels * 16 + (64 << 20)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Bytes changed, cut out and repeated anywhere in a file of any format.
    #[test]
    fn damaged_files_never_panic(
        which in any::<prop::sample::Index>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        cut in prop::option::of((any::<prop::sample::Index>(), any::<prop::sample::Index>())),
    ) {
        let cases = expected();
        let file = which.get(&cases)["file"].as_str().unwrap().to_owned();
        let mut bytes = std::fs::read(folder().join(&file)).unwrap();
        for (at, value) in changes {
            *at.get_mut(&mut bytes) = value;
        }
        if let Some((a, b)) = cut {
            let (a, b) = (a.index(bytes.len()), b.index(bytes.len()));
            bytes.drain(a.min(b)..a.max(b));
        }
        let (result, peak) = measured(&bytes);
        prop_assert!(peak <= allowed(&bytes, &result), "{file}: {peak} bytes");
        if let Ok(picture) = result {
            prop_assert_eq!(picture.rgb.len(), picture.width * picture.height * 3);
        }
    }
}
