//! The functions of one variable against f64.

#[allow(dead_code, reason = "only erf is wanted")]
mod oracle;

use oracle::erf;
use tessera::backend::cpu::lanes::{Isa, Kernel, LANES, Lanes, Math};

#[derive(Clone, Copy, Debug)]
enum Function {
    Exp,
    ExpNonpositive,
    Sigmoid,
    Silu,
    QuickGelu,
    GeluErf,
}
use Function::*;

struct Apply<'a>(Function, &'a mut [f32]);

impl Kernel for Apply<'_> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        for chunk in self.1.chunks_exact_mut(LANES) {
            // SAFETY: the chunk has sixteen elements.
            unsafe {
                let x = lanes.load(chunk.as_ptr());
                let y = match self.0 {
                    Exp => lanes.exp(x),
                    ExpNonpositive => lanes.exp_nonpositive(x),
                    Sigmoid => lanes.sigmoid(x),
                    Silu => lanes.silu(x),
                    QuickGelu => lanes.quick_gelu(x),
                    GeluErf => lanes.gelu_erf(x),
                };
                lanes.store(chunk.as_mut_ptr(), y);
            }
        }
    }
}

fn apply(isa: Isa, function: Function, xs: &[f32]) -> Vec<f32> {
    let mut values = xs.to_vec();
    values.resize(xs.len().next_multiple_of(LANES), 0.0);
    isa.run(Apply(function, &mut values));
    values.truncate(xs.len());
    values
}

/// The function in f64, and the error allowed.
fn oracle(function: Function, x: f64) -> (f64, f64) {
    let unit = f32::EPSILON as f64;
    match function {
        // Results under 2^-125 are flushed.
        Exp | ExpNonpositive => (x.exp(), 2.0 * unit * x.exp() + 2f64.powi(-125)),
        Sigmoid => (1.0 / (1.0 + (-x).exp()), 3.0 * unit / (1.0 + (-x).exp()) + 2f64.powi(-125)),
        Silu => (x / (1.0 + (-x).exp()), 3.0 * unit * (x / (1.0 + (-x).exp())).abs() + 1e-36),
        QuickGelu => {
            let y = x / (1.0 + (-1.702 * x).exp());
            // The rounded product 1.702 x moves the exponent by up to two units in its last place.
            (y, (4.0 + 3.0 * x.abs()) * unit * y.abs() + 1e-36)
        }
        // erf to 2e-7.
        GeluErf => {
            let y = 0.5 * x * (1.0 + erf(x / 2f64.sqrt()));
            (y, 0.5 * x.abs() * 2e-7 + unit * y.abs() + 1e-16)
        }
    }
}

#[test]
fn functions_agree_with_f64_and_between_instruction_sets() {
    let mut xs: Vec<f32> = (-4000..4000).map(|i| i as f32 * 0.0251).collect();
    xs.extend((-2000..2000).map(|i| i as f32 * 0.000731));
    for function in [Exp, Sigmoid, Silu, QuickGelu, GeluErf] {
        let reference = apply(Isa::detect(), function, &xs);
        let mut worst = 0f64;
        for (&x, &y) in xs.iter().zip(&reference) {
            let (expected, bound) = oracle(function, x as f64);
            if expected > f32::MAX as f64 {
                assert_eq!(y, f32::INFINITY, "{function:?}({x})");
                continue;
            }
            let used = (y as f64 - expected).abs() / bound;
            assert!(used <= 1.0, "{function:?}({x}): expected {expected}, found {y}, bound {bound}");
            worst = worst.max(used);
        }
        println!("{function:?}: worst error {:.0} % of the bound", 100.0 * worst);
        for isa in Isa::available() {
            for ((x, a), b) in xs.iter().zip(&reference).zip(apply(isa, function, &xs)) {
                assert_eq!(a.to_bits(), b.to_bits(), "{function:?}({x}) on {isa:?}: {a} and {b}");
            }
        }
    }
}

#[test]
fn exp_at_its_edges() {
    for isa in Isa::available() {
        let cases = [
            (0.0, 1.0),
            (-0.0, 1.0),
            (f32::NEG_INFINITY, 0.0),
            (f32::INFINITY, f32::INFINITY),
            (-1e30, 0.0),
            (89.0, f32::INFINITY),
        ];
        for (x, expected) in cases {
            assert_eq!(apply(isa, Exp, &[x])[0].to_bits(), f32::to_bits(expected), "{isa:?}: exp({x})");
        }
        for function in [Exp, ExpNonpositive, Sigmoid, Silu, QuickGelu, GeluErf] {
            assert!(apply(isa, function, &[f32::NAN])[0].is_nan(), "{isa:?}: {function:?}(NaN)");
        }
    }
}

/// A softmax may use either: every bit is the same, from 0 to what is flushed and beyond.
#[test]
fn exp_of_what_is_not_positive_is_exp() {
    let mut xs: Vec<f32> = (0..200_000).map(|i| i as f32 * -0.000_451).collect();
    xs.extend([-0.0, f32::MIN, f32::NEG_INFINITY, -f32::MIN_POSITIVE, -86.979_996, -86.98, -86.980_01]);
    for isa in Isa::available() {
        for ((x, a), b) in xs.iter().zip(apply(isa, Exp, &xs)).zip(apply(isa, ExpNonpositive, &xs)) {
            assert_eq!(a.to_bits(), b.to_bits(), "{isa:?}: {x}: {a} and {b}");
        }
    }
}
