//! What the answers must be, by sources that neither the kernels nor the emulated device were written from: the
//! layouts of CUTLASS's CuTe, the crate `half`, arithmetic in f64.

use super::{Probe, Who};
use half::{bf16, f16};

/// By value; all that is no number is one.
fn same(found: f32, expected: f32) -> bool {
    found == expected || (found.is_nan() && expected.is_nan())
}

/// Fragments are laid out by CuTe's layouts of the instruction (CUTLASS, `mma_traits_sm80.hpp`), which give for
/// thread t and value v an index into the matrix by columns: A `((4,8),(2,2,2)):((32,1),(16,8,128))` of 16x16,
/// B `((4,8),(2,2)):((16,1),(8,64))` of 8x16, C `((4,8),(2,2)):((32,1),(16,8))` of 16x8.
mod layout {
    pub fn a(t: usize, v: usize) -> usize {
        t % 4 * 32 + t / 4 + v % 2 * 16 + v / 2 % 2 * 8 + v / 4 * 128
    }
    pub fn b(t: usize, v: usize) -> usize {
        t % 4 * 16 + t / 4 + v % 2 * 8 + v / 2 * 64
    }
    pub fn c(t: usize, v: usize) -> usize {
        t % 4 * 32 + t / 4 + v % 2 * 16 + v / 2 * 8
    }
}

/// For each word of the answer, the 17 terms of its sum: 16 products, which f64 holds exactly, and c.
fn terms(probe: &Probe) -> Vec<[f64; 17]> {
    let widen = match probe.kernel.as_str() {
        "probe_mma_bf16" => (|x| bf16::from_bits(x).to_f64()) as fn(u16) -> f64,
        _ => |x| f16::from_bits(x).to_f64(),
    };
    let (mut a, mut b) = ([0.0; 256], [0.0; 128]);
    for (t, lane) in probe.input.chunks_exact(10).enumerate() {
        let half = |v: usize| widen((lane[v / 2] >> (16 * (v % 2))) as u16);
        (0..8).for_each(|v| a[layout::a(t, v)] = half(v));
        (0..4).for_each(|v| b[layout::b(t, v)] = half(8 + v));
    }
    let sum = |i: usize| {
        let (m, n) = (layout::c(i / 4, i % 4) % 16, layout::c(i / 4, i % 4) / 16);
        let c = f64::from(f32::from_bits(probe.input[i / 4 * 10 + 6 + i % 4]));
        std::array::from_fn(|k| if k < 16 { a[m + 16 * k] * b[n + 8 * k] } else { c })
    };
    (0..128).map(sum).collect()
}

/// How far a chip may be from the exact sum. It aligns the terms to the largest and cuts each off where that one's
/// last place is, then cuts the sum off at its own last place; older chips do so in two halves.
fn cut_off(terms: &[f64; 17]) -> f64 {
    let largest = terms.iter().fold(0.0, |largest: f64, term| largest.max(term.abs()));
    let all: f64 = terms.iter().map(|term| term.abs()).sum();
    (18.0 * largest.max(f64::from(f32::MIN_POSITIVE)) + 2.0 * all) * f64::from(f32::EPSILON)
}

pub fn mma(probe: &Probe, answer: &[u32], who: Who) {
    let mut worst: f64 = 0.0;
    for (i, (terms, found)) in terms(probe).iter().zip(answer).enumerate() {
        let (exact, found) = (terms.iter().sum::<f64>(), f32::from_bits(*found));
        let near = same(found, exact as f32);
        let comparable = who == Who::Chip && exact.is_finite() && found.is_finite();
        if !near && comparable {
            worst = worst.max((f64::from(found) - exact).abs() / cut_off(terms));
        }
        let ok = near || (comparable && worst <= 1.0);
        let Probe { kernel, .. } = probe;
        assert!(ok, "{kernel}: thread {}, value {}: {found:e}, exactly {exact:e} of {terms:?}", i / 4, i % 4);
    }
    println!("{}: {:.0} % of the bound at worst", probe.kernel, 100.0 * worst);
}

/// By CuTe's traits (`copy_traits_sm75.hpp`): thread t reads bits `32 t + 1024 i` on of the four matrices' rows laid
/// end to end; transposed, half h is at bit `256 (t % 4) + 16 (t / 4) + 128 h + 1024 i`.
fn loaded(input: &[u32]) -> Vec<u32> {
    let half = |at: usize| input[at / 2] >> (16 * (at % 2)) & 0xffff;
    let pair = |low: usize, high: usize| half(low) | half(high) << 16;
    let plain = (0..128).map(|i| pair(2 * (i / 4) + 64 * (i % 4), 2 * (i / 4) + 64 * (i % 4) + 1));
    let transposed = (0..128).map(|i| {
        let (t, matrix) = (i / 4, i % 4);
        let at = (256 * (t % 4) + 16 * (t / 4) + 1024 * matrix) / 16;
        pair(at, at + 8)
    });
    plain.chain(transposed).collect()
}

pub fn load_matrices(probe: &Probe, answer: &[u32], _: Who) {
    assert_eq!(answer, loaded(&probe.input), "[plain, transposed][thread][matrix]");
}

fn shuffled(x: &[u32]) -> Vec<u32> {
    let odd = (0..32).filter(|l| x[*l] % 2 == 1).fold(0u32, |odd, l| odd | 1 << l);
    (0..32).flat_map(|l| [x[(7 * l + 3) % 32], x[l ^ 5], x[l ^ 16], odd]).collect()
}

pub fn shuffle(probe: &Probe, answer: &[u32], _: Who) {
    assert_eq!(answer, shuffled(&probe.input), "[lane][from lane 7 l + 3, l ^ 5, l ^ 16, odd lanes]");
}

fn moved(probe: &Probe) -> Vec<u32> {
    let word = |i: usize| {
        let copied = if i / 4 < probe.n as usize { probe.input[i] } else { 0 };
        let (next, mine) = (probe.input[i + 4].wrapping_mul(2), probe.input[i].wrapping_mul(3));
        copied.wrapping_add(next).wrapping_add(mine).wrapping_add(32)
    };
    (0..128).map(word).collect()
}

pub fn memory(probe: &Probe, answer: &[u32], _: Who) {
    assert_eq!(answer, moved(probe), "[lane][word]");
}

fn converted(x: u32) -> [u32; 4] {
    let value = f32::from_bits(x);
    let [b, h] = if value.is_nan() {
        [0x7fff; 2] // the canonical one
    } else {
        [bf16::from_f32(value).to_bits(), f16::from_f32(value).to_bits()]
    };
    let widened = [f16::from_bits(x as u16).to_f32(), bf16::from_bits(x as u16).to_f32()];
    [u32::from(b) | 0x3f80_0000, u32::from(h) | 0x3c00_0000, widened[0].to_bits(), widened[1].to_bits()]
}

/// Rounding is to nearest, ties to even; what is no number is one, whatever its bits.
pub fn convert(probe: &Probe, answer: &[u32], _: Who) {
    for (x, found) in probe.input.iter().zip(answer.chunks_exact(4)) {
        let expected = converted(*x);
        assert_eq!(found[..2], expected[..2], "{x:08x} as bf16, f16; the high half is 1");
        for (found, expected) in found[2..].iter().zip(&expected[2..]) {
            let widened = same(f32::from_bits(*found), f32::from_bits(*expected));
            assert!(widened, "{x:08x}, its low half widened: {found:08x}, not {expected:08x}");
        }
    }
}

/// 2^x and 1/x; subnormals are zeroes of their sign.
fn approximated(x: u32) -> [f32; 2] {
    let flush = |x: f32| if x.is_subnormal() { 0f32.copysign(x) } else { x };
    let x = f64::from(flush(f32::from_bits(x)));
    [x.exp2(), 1.0 / x].map(|exact| flush(exact as f32))
}

/// Within two units in the last place, as the PTX ISA promises of the chip.
pub fn approximate(probe: &Probe, answer: &[u32], _: Who) {
    for (x, found) in probe.input.iter().zip(answer.chunks_exact(2)) {
        for (name, found, exact) in [("2^", found[0], 0), ("1/", found[1], 1)]
            .map(|(name, found, i)| (name, f32::from_bits(found), approximated(*x)[i]))
        {
            let units = i64::from(found.to_bits() as i32) - i64::from(exact.to_bits() as i32);
            let near = units.abs() <= 2 || (found.is_nan() && exact.is_nan());
            assert!(near, "{name}{:e}: {found:e}, exactly {exact:e}", f32::from_bits(*x));
        }
    }
}

/// What one who rounds once would say.
pub fn right_answer(probe: &Probe) -> Vec<u32> {
    let input = &probe.input;
    match probe.kernel.as_str() {
        "probe_load_matrices" => loaded(input),
        "probe_shuffle" => shuffled(input),
        "probe_memory" => moved(probe),
        "probe_convert" => input.iter().flat_map(|x| converted(*x)).collect(),
        "probe_approximate" => input.iter().flat_map(|x| approximated(*x).map(f32::to_bits)).collect(),
        _ => terms(probe).iter().map(|terms| (terms.iter().sum::<f64>() as f32).to_bits()).collect(),
    }
}
