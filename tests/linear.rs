//! Matrix products against a plain loop in f64, and bit for bit against themselves: every instruction
//! set, thread count and row count must give a row the same bits.

#[allow(dead_code, reason = "only erf is wanted")]
mod oracle;

use half::{bf16, f16};
use oracle::erf;
use tessera::backend::cpu::lanes::Isa;
use tessera::backend::cpu::linear::{K_BLOCK, Layer, Residual, gated_linear, linear, linear_workspace};
use tessera::backend::cpu::machine::Machine;
use tessera::backend::cpu::panel::Matrix;
use tessera::op::Activation;
use tessera::tensor::DType;

/// A small generator, so that a failure can be repeated from its case alone.
struct Random(u64);

impl Random {
    /// Uniform in -1..1.
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((self.0 >> 40) as f32) / (1u64 << 23) as f32 - 1.0
    }

    fn vec(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.next()).collect()
    }
}

/// Values as a checkpoint stores them, at an odd address.
struct Stored {
    bytes: Vec<u8>,
    skip: usize,
    dtype: DType,
    rows: usize,
    cols: usize,
    /// What the bytes mean.
    values: Vec<f32>,
}

impl Stored {
    fn new(random: &mut Random, dtype: DType, rows: usize, cols: usize) -> Self {
        let mut values = random.vec(rows * cols);
        let mut bytes = Vec::new();
        for value in &mut values {
            match dtype {
                DType::F32 => bytes.extend(value.to_le_bytes()),
                DType::F16 => {
                    let half = f16::from_f32(*value);
                    *value = half.to_f32();
                    bytes.extend(half.to_le_bytes());
                }
                DType::BF16 => {
                    let half = bf16::from_f32(*value);
                    *value = half.to_f32();
                    bytes.extend(half.to_le_bytes());
                }
                DType::I32 => unreachable!("not a weight"),
            }
        }
        let mut stored = Stored { bytes, skip: 0, dtype, rows, cols, values };
        // A guard of NaN on both sides: a kernel that uses a neighbour's bytes shows it.
        let guard = [0xffu8; 65];
        stored.skip = guard.len() + usize::from(stored.bytes.as_ptr().addr() % 2 == 1);
        let mut guarded = vec![0xff; stored.skip];
        guarded.extend(&stored.bytes);
        guarded.extend(guard);
        stored.bytes = guarded;
        stored
    }

    fn matrix(&self) -> Matrix<'_> {
        let size = self.rows * self.cols * self.dtype.size();
        Matrix {
            bytes: &self.bytes[self.skip..self.skip + size],
            dtype: self.dtype,
            rows: self.rows,
            cols: self.cols,
        }
    }
}

struct Case {
    m: usize,
    k: usize,
    /// Outputs and dtype of each weight.
    layers: &'static [(usize, DType)],
    bias: bool,
    activation: Activation,
    residual: bool,
    gated: bool,
}

const PLAIN: Case = Case {
    m: 1,
    k: 1,
    layers: &[],
    bias: false,
    activation: Activation::None,
    residual: false,
    gated: false,
};

struct Operands {
    x: Vec<f32>,
    weights: Vec<Stored>,
    biases: Vec<Stored>,
    residual: Vec<f32>,
    n: usize,
}

impl Operands {
    fn new(case: &Case) -> Self {
        let mut random = Random(case.m as u64 * 1000 + case.k as u64);
        let n = if case.gated { case.layers[0].0 } else { case.layers.iter().map(|l| l.0).sum() };
        Operands {
            x: random.vec(case.m * case.k),
            weights: case.layers.iter().map(|&(n, d)| Stored::new(&mut random, d, n, case.k)).collect(),
            biases: case.layers.iter().map(|&(n, d)| Stored::new(&mut random, d, 1, n)).collect(),
            residual: random.vec(case.m * n),
            n,
        }
    }

    /// The kernel's result for rows `first..first + m`.
    fn run(&self, case: &Case, machine: &Machine, first: usize, m: usize) -> Vec<f32> {
        let x = &self.x[first * case.k..(first + m) * case.k];
        let layers: Vec<Layer> = (self.weights.iter().zip(&self.biases))
            .map(|(w, b)| Layer::new(w.matrix(), case.bias.then(|| b.matrix())))
            .collect();
        let mut workspace = vec![0xffu8; linear_workspace(m, case.k, std::iter::empty(), machine.threads())];
        let mut out = vec![f32::NAN; m * self.n];
        if case.gated {
            gated_linear(machine, x, layers[0], layers[1], &mut out, &mut workspace);
        } else {
            let rows = &self.residual[first * self.n..(first + m) * self.n];
            let residual = if case.residual { Residual::Add(rows) } else { Residual::None };
            linear(machine, x, &layers, (case.activation, residual), &mut out, &mut workspace);
            if case.residual {
                let mut same = rows.to_vec();
                let in_place = (case.activation, Residual::InPlace);
                linear(machine, x, &layers, in_place, &mut same, &mut workspace);
                assert_same("in place", &out, &same);
            }
        }
        out
    }

    /// x Wᵀ + b in f64 with the sum of magnitudes, for one output of one layer.
    fn dot(&self, case: &Case, layer: usize, row: usize, n: usize) -> (f64, f64) {
        let bias = if case.bias { self.biases[layer].values[n] as f64 } else { 0.0 };
        let mut sums = (bias, bias.abs());
        for k in 0..case.k {
            let term = self.x[row * case.k + k] as f64 * self.weights[layer].values[n * case.k + k] as f64;
            sums = (sums.0 + term, sums.1 + term.abs());
        }
        sums
    }

    /// The expected value of every output, and a bound on the error.
    fn oracle(&self, case: &Case) -> Vec<(f64, f64)> {
        // A chain of a sixteenth of a K-block, the sum of sixteen of them for each block, the bias.
        let steps = case.k.min(K_BLOCK).div_ceil(16) + 16 * case.k.div_ceil(K_BLOCK) + 1;
        let gamma = steps as f64 * f32::EPSILON as f64 / 2.0;
        let mut out = Vec::new();
        for row in 0..case.m {
            if case.gated {
                for n in 0..self.n {
                    let (gate, gate_sum) = self.dot(case, 0, row, n);
                    let (up, up_sum) = self.dot(case, 1, row, n);
                    let silu = gate / (1.0 + (-gate).exp());
                    // |silu'| <= 1.1; the function itself is good to a few units in the last place.
                    let error = 1.1 * gamma * gate_sum * up.abs() + silu.abs() * gamma * up_sum;
                    out.push((silu * up, error + 4.0 * f32::EPSILON as f64 * (silu * up).abs() + 1e-30));
                }
                continue;
            }
            for (layer, weight) in self.weights.iter().enumerate() {
                for n in 0..weight.rows {
                    let (z, sum) = self.dot(case, layer, row, n);
                    let y = match case.activation {
                        Activation::None => z,
                        Activation::QuickGelu => z / (1.0 + (-1.702 * z).exp()),
                        Activation::GeluErf => 0.5 * z * (1.0 + erf(z / 2f64.sqrt())),
                    };
                    let residual = if case.residual { self.residual[out.len()] as f64 } else { 0.0 };
                    // Both activations have a slope of at most 1.13 and err by under 2e-7 of |z|.
                    let function = if case.activation == Activation::None { 0.0 } else { 2e-7 * z.abs() };
                    let error = 1.13 * gamma * sum + function;
                    out.push((y + residual, error + f32::EPSILON as f64 * (y.abs() + residual.abs())));
                }
            }
        }
        out
    }
}

fn assert_same(what: &str, a: &[f32], b: &[f32]) {
    assert_eq!(a.len(), b.len(), "{what}");
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        assert_eq!(a.to_bits(), b.to_bits(), "{what}: element {i}: {a} and {b}");
    }
}

/// Against the oracle on one path; every other path, thread count and row count against that, by bits.
fn check(case: &Case) -> f64 {
    let operands = Operands::new(case);
    let name = format!("m {} k {} layers {:?} gated {}", case.m, case.k, case.layers, case.gated);
    let reference = operands.run(case, &Machine::new(1).unwrap(), 0, case.m);
    let mut worst = 0f64;
    for (i, (&found, (expected, bound))) in reference.iter().zip(operands.oracle(case)).enumerate() {
        let used = (found as f64 - expected).abs() / bound;
        assert!(used <= 1.0, "{name}: element {i}: expected {expected}, found {found}, bound {bound}");
        worst = worst.max(used);
    }
    for isa in Isa::available() {
        // The portable path costs a library call for each product where the build has no fused
        // multiply-add; large cases leave it out.
        if isa == Isa::Portable && case.m * case.k * operands.n > 1 << 21 {
            continue;
        }
        for threads in 1..=3 {
            let machine = Machine::with_isa(isa, threads).unwrap();
            let found = operands.run(case, &machine, 0, case.m);
            assert_same(&format!("{name}, {isa:?}, {threads} threads"), &reference, &found);
        }
        let machine = Machine::with_isa(isa, 1).unwrap();
        for split in [1, 2, 3, 4, 5, 13, 33] {
            for first in (0..case.m.min(46)).step_by(split) {
                let rows = split.min(case.m - first);
                let found = operands.run(case, &machine, first, rows);
                let whole = &reference[first * operands.n..(first + rows) * operands.n];
                assert_same(&format!("{name}, {isa:?}, rows {first}.. by {split}"), whole, &found);
            }
        }
    }
    worst
}

fn check_all(cases: impl IntoIterator<Item = Case>) {
    let worst = cases.into_iter().map(|case| check(&case)).fold(0.0, f64::max);
    println!("worst error: {:.1} % of the bound", 100.0 * worst);
}

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// Leaked, so that a table of cases can be made by loops.
fn layers(list: &[(usize, DType)]) -> &'static [(usize, DType)] {
    Vec::leak(list.to_vec())
}

#[test]
fn shapes_and_dtypes() {
    let mut cases = Vec::new();
    for dtype in DTYPES {
        // Up to 32 rows go through one loop, more through the other.
        for m in [1, 2, 3, 4, 5, 7, 8, 9, 13, 25, 32, 33, 37, 45] {
            for (n, k) in [
                (1, 1),
                (16, 16),
                (17, 31),
                (33, 33),
                (5, 257),
                (47, 300),
                (64, 512),
                (31, 1),
                (18, 2048),
                (20, 4131),
            ] {
                cases.push(Case { m, k, layers: layers(&[(n, dtype)]), ..PLAIN });
            }
        }
    }
    check_all(cases);
}

#[test]
fn epilogues() {
    let mut cases = Vec::new();
    for activation in [Activation::None, Activation::QuickGelu, Activation::GeluErf] {
        for (m, residual) in [(1, false), (1, true), (3, true), (19, false), (41, true)] {
            let layers = layers(&[(37, DType::BF16)]);
            cases.push(Case { m, k: 70, layers, bias: true, activation, residual, gated: false });
        }
    }
    check_all(cases);
}

#[test]
fn layers_side_by_side() {
    let mut cases = Vec::new();
    for m in [1, 4, 9, 34] {
        for bias in [false, true] {
            for list in [
                &[(48, DType::BF16), (16, DType::BF16), (16, DType::BF16)][..],
                &[(33, DType::F16), (7, DType::F32), (40, DType::BF16)],
            ] {
                cases.push(Case { m, k: 96, layers: layers(list), bias, residual: true, ..PLAIN });
            }
        }
    }
    check_all(cases);
}

#[test]
fn gated_pairs() {
    let mut cases = Vec::new();
    for m in [1, 2, 14, 35] {
        for (n, gate, up) in
            [(40, DType::BF16, DType::BF16), (17, DType::F16, DType::F32), (3, DType::F32, DType::F32)]
        {
            let layers = layers(&[(n, gate), (n, up)]);
            cases.push(Case { m, k: 130, layers, bias: m == 2, gated: true, ..PLAIN });
        }
    }
    check_all(cases);
}

#[test]
fn row_counts_of_a_tower_and_past_a_row_block() {
    let cases = [(577, 64, 40), (800, 33, 16), (1601, 17, 5)].map(|(m, k, n)| Case {
        m,
        k,
        layers: layers(&[(n, DType::F16)]),
        ..PLAIN
    });
    check_all(cases);
}

#[test]
fn no_rows_is_nothing_to_do() {
    let case = Case { m: 0, k: 8, layers: &[(3, DType::F32)], ..PLAIN };
    assert!(Operands::new(&case).run(&case, &Machine::new(2).unwrap(), 0, 0).is_empty());
}

#[test]
fn not_a_number_reaches_only_its_own_outputs() {
    let mut random = Random(1);
    let mut weight = Stored::new(&mut random, DType::F32, 20, 40);
    let at = weight.skip + (7 * 40 + 3) * 4;
    weight.bytes[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    let machine = Machine::new(1).unwrap();
    for m in [1, 9] {
        let mut x = random.vec(m * 40);
        x[(m - 1) * 40] = f32::INFINITY;
        let mut out = vec![0.0; m * 20];
        let mut workspace = vec![0; linear_workspace(m, 40, std::iter::empty(), 1)];
        let layer = Layer::new(weight.matrix(), None);
        linear(&machine, &x, &[layer], (Activation::None, Residual::None), &mut out, &mut workspace);
        for (i, y) in out.iter().enumerate() {
            let (row, n) = (i / 20, i % 20);
            assert_eq!(y.is_nan(), n == 7, "row {row} output {n} is {y}");
            assert_eq!(y.is_finite(), n != 7 && row != m - 1, "row {row} output {n} is {y}");
        }
    }
}
