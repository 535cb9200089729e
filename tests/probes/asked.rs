//! The questions: bits at random, and those at which formats change their ways.

use super::Probe;

/// All of them.
pub fn all() -> Vec<Probe> {
    let mut all = matrices();
    for seed in [4, 14] {
        all.push(probe("probe_load_matrices", 32, bits(128, seed)));
        all.push(probe("probe_shuffle", 32, bits(32, seed + 1)));
        // Asynchronous copies bring zeroes from this lane on.
        all.push(probe("probe_memory", if seed == 4 { 20 } else { 32 }, bits(33 * 4, seed + 2)));
    }
    for input in [conversions(&TIES[..3]), conversions(&TIES), (0..=0xffff).collect(), bits(20_000, 5)] {
        for input in input.chunks(if input.len() < 2000 { 1000 } else { 100_000 }) {
            all.push(probe("probe_convert", input.len() as u32, input.to_vec()));
        }
    }
    for count in [2000, 20_000] {
        let input = [&bits(count, 7)[..], &CORNERS].concat();
        all.push(probe("probe_approximate", input.len() as u32, input));
    }
    all
}

fn probe(kernel: &str, n: u32, input: Vec<u32>) -> Probe {
    Probe { kernel: kernel.into(), n, input }
}

/// Pseudo-random bits.
fn bits(n: usize, seed: u64) -> Vec<u32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let step = |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 32) as u32
    };
    (0..n).map(step).collect()
}

/// Mantissas on ties of the 16-bit formats, and beside them; the first three serve for a short list.
const TIES: [u32; 19] = [
    0x1000, 0x8000, 0x1_8000, 0, 1, 0xfff, 0x1001, 0x2fff, 0x3000, 0x3001, 0x7fff, 0x8001, 0x1_7fff,
    0x1_8001, 0x7f_efff, 0x7f_f000, 0x7f_7fff, 0x7f_8000, 0x7f_ffff,
];

/// f32 of every exponent and sign.
fn conversions(mantissas: &[u32]) -> Vec<u32> {
    let every = (0..=0x1ffu32).flat_map(|top| mantissas.iter().map(move |mantissa| top << 23 | mantissa));
    every.collect()
}

/// Zeroes, subnormals, infinities, one, the least that 1/x and 2^x flush.
const CORNERS: [u32; 10] = [
    0,
    1,
    0x7f_ffff,
    0x80_0000,
    0x8000_0001,
    0x7f80_0000,
    0xff80_0000,
    0x3f80_0000,
    0x7e80_0001,
    0xc2fc_0001,
];

/// A 16-bit format: bits of its mantissa, exponent of one.
struct Format {
    kernel: &'static str,
    mantissa: u32,
    one: u32,
}

const FORMATS: [Format; 2] = [
    Format { kernel: "probe_mma_bf16", mantissa: 7, one: 127 },
    Format { kernel: "probe_mma_f16", mantissa: 10, one: 15 },
];

impl Format {
    /// Both halves of a random word with exponents `least + 0..count`.
    fn pair(&self, word: u32, least: u32, count: u32) -> u32 {
        let half = |x: u32, exponent: u32| {
            x & 0x8000 | x & ((1 << self.mantissa) - 1) | (least + exponent % count) << self.mantissa
        };
        half(word, word >> 9) & 0xffff | half(word >> 16, word >> 3) << 16
    }

    /// A question whose words are `a`, `b` and `c` of random words.
    fn mma(&self, seed: u64, a: [u32; 2], b: [u32; 2], c: fn(u32) -> u32) -> Probe {
        let mut words = bits(320, seed);
        for lane in words.chunks_exact_mut(10) {
            lane[..4].iter_mut().for_each(|word| *word = self.pair(*word, a[0], a[1]));
            lane[4..6].iter_mut().for_each(|word| *word = self.pair(*word, b[0], b[1]));
            lane[6..].iter_mut().for_each(|word| *word = c(*word));
        }
        probe(self.kernel, 32, words)
    }
}

/// Products: ordinary numbers, wide ranges, subnormal factors and sums, infinities and no numbers.
fn matrices() -> Vec<Probe> {
    let ordinary = |word: u32| (word as f32 / 1e8 - 20.0).to_bits();
    let none = |_: u32| 0;
    let subnormal = |word: u32| word & 0x807f_ffff;
    let mut all = Vec::new();
    for format in &FORMATS {
        let (one, bf16) = (format.one, format.mantissa == 7);
        let near = [one - 3, 7];
        // As far as products of bf16 do not overflow; all finite f16.
        let (wide, high) = if bf16 { ([one - 60, 120], [one, 100]) } else { ([0, 31], [one, 16]) };
        all.push(format.mma(1, near, near, ordinary));
        all.push(format.mma(2, near, near, none));
        all.push(format.mma(3, wide, wide, ordinary));
        all.push(format.mma(4, wide, wide, none));
        all.push(format.mma(5, [0, 1], high, none));
        if bf16 {
            // Products around the least subnormal f32, and sums of them.
            all.push(format.mma(6, [one - 67, 3], [one - 67, 3], subnormal));
        } else {
            all.push(format.mma(6, [0, 1], [0, 1], ordinary));
        }
        all.push(with_infinities(format, format.mma(7, near, near, ordinary)));
    }
    all
}

/// Lane 4 r holds columns 0 and 1 of row r of A in its word 0, lane 4 c the rows 0 and 1 of column c of B in word 4.
fn with_infinities(format: &Format, mut probe: Probe) -> Probe {
    let infinity = (2 * format.one + 1) << format.mantissa;
    let (minus, none, most) = (infinity | 0x8000, infinity | 1, infinity - 1);
    let mut a = |row: usize, first: u32, second: u32| probe.input[10 * 4 * row] = first | second << 16;
    a(0, infinity, 0);
    a(1, none, 0);
    a(2, infinity, minus);
    a(3, most, most);
    probe.input[4] = 0; // column 0: infinity times zero
    probe.input[10 * 16 + 6] = f32::INFINITY.to_bits(); // row 4, of C
    probe.input[10 * 20 + 6] = f32::NAN.to_bits(); // row 5
    probe.input[10 * 12 + 6] = f32::MAX.to_bits(); // row 3
    probe
}
