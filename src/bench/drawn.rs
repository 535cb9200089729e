//! Prompts and pictures that no cache has seen before.

use super::plan::Test;
use crate::input::image::Picture;
use image::codecs::jpeg::JpegEncoder;

/// Side lengths of the pictures that are drawn.
const PICTURE: (u32, u32) = (1024, 768);

/// Makes the n-th picture, from 1, of one that was given: a few levels of its first pixel differ from every other's
/// below 2^24, so a cache takes it for another.
pub fn vary(picture: &mut Picture, n: usize) {
    for (byte, change) in picture.rgb.iter_mut().take(3).zip((n as u32).to_le_bytes()) {
        *byte ^= change;
    }
}

/// Numbers from a seed: splitmix64.
pub struct Random(u64);

impl Random {
    /// A repetition of a test has numbers of its own, the same in every run.
    pub fn of(test: Test, repetition: usize) -> Self {
        let mut random = Random(repetition as u64);
        for byte in test.to_string().bytes() {
            random.0 = random.next() ^ u64::from(byte);
        }
        random
    }

    /// The next word.
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Tokens of a vocabulary.
    pub fn ids(&mut self, n: usize, vocab: u32) -> Vec<u32> {
        (0..n).map(|_| (self.next() % u64::from(vocab)) as u32).collect()
    }

    /// A JPEG with the detail of a photograph: gradients under noise.
    pub fn picture(&mut self) -> Vec<u8> {
        let (width, height) = PICTURE;
        let slopes = [self.next() as u32 % 255, self.next() as u32 % 255, self.next() as u32 % 255];
        let mut rgb = Vec::with_capacity((width * height * 3) as usize);
        for y in 0..height {
            for x in 0..width {
                let noise = self.next();
                for (c, slope) in slopes.iter().enumerate() {
                    let base = (x * slope / width + y * (255 - slope) / height) as u64;
                    rgb.push((base * 7 / 8 + (noise >> (8 * c)) % 32) as u8);
                }
            }
        }
        let mut file = Vec::new();
        let encoded = JpegEncoder::new_with_quality(&mut file, 90).encode(
            &rgb,
            width,
            height,
            image::ExtendedColorType::Rgb8,
        );
        encoded.expect("a picture in memory of valid size");
        file
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_drawn_twice() {
        let test = |images| Test::Image { images };
        let mut drawn = Vec::new();
        for (test, repetition) in [(test(1), 0), (test(1), 1), (test(2), 0)] {
            let mut random = Random::of(test, repetition);
            drawn.push((random.ids(16, 32000), random.picture()));
            let mut again = Random::of(test, repetition);
            assert_eq!(drawn.last(), Some(&(again.ids(16, 32000), again.picture())));
        }
        let given = Picture { width: 1, height: 1, rgb: vec![7, 8, 9] };
        let varied: Vec<Vec<u8>> = (0..300)
            .map(|n| {
                let mut picture = given.clone();
                vary(&mut picture, n);
                picture.rgb
            })
            .collect();
        for i in 0..varied.len() {
            assert!(varied[..i].iter().all(|other| *other != varied[i]), "{i}");
        }
        assert!(drawn[0].0 != drawn[1].0 && drawn[0].0 != drawn[2].0 && drawn[0].1 != drawn[1].1);
    }
}
