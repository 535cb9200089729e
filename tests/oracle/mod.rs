//! The oracle: every op as plain loops in f64 over rows and columns, sharing no arithmetic with the
//! backends it judges. Results are rounded to f32 once, at the end of an op.
//!
//! It is a backend, so whole graphs run on it as well as single ops.

use std::slice::{from_raw_parts, from_raw_parts_mut};
use tessera::Result;
use tessera::backend::{Backend, Buffer, Call, Prepared};
use tessera::op::{Activation, Op, PAGE, Pair, SampleParams, Select, WeightType};
use tessera::tensor::{DType, View, Weight};

/// Plain loops.
pub struct Oracle;

impl Backend for Oracle {
    fn describe(&self) -> String {
        "oracle".into()
    }

    fn dtype(&self) -> DType {
        DType::F32
    }

    fn alloc(&self, _: &str, bytes: usize) -> Result<Buffer> {
        let memory = vec![0u128; bytes.div_ceil(16) + 4];
        let addr = (memory.as_ptr() as usize).next_multiple_of(64);
        Ok(Buffer::new(addr, bytes, Box::new(memory)))
    }

    fn prepare(&self, _: &Op, weights: &[Weight]) -> Result<Vec<Prepared>> {
        let in_place = |weight: &Weight| {
            let (addr, owner) = (weight.bytes.as_bytes().as_ptr() as usize, Box::new(weight.bytes.clone()));
            Prepared::new(&weight.name, weight.into(), addr, weight.row_stride(), owner)
        };
        Ok(weights.iter().map(in_place).collect())
    }

    fn workspace(&self, _: &Op, _: &[View], _: &[WeightType], _: &[View]) -> usize {
        0
    }

    unsafe fn run(&self, call: &Call<'_>) -> Result<()> {
        let ins: Vec<In> = call.ins.iter().map(In).collect();
        let weights: Vec<Matrix> = call.weights.iter().map(|w| Matrix::of(w)).collect();
        let outs = compute(call.op, &ins, &weights, call.outs);
        for (out, values) in call.outs.iter().zip(outs) {
            assert_eq!(values.len(), out.len(), "{}", call.op.name());
            for (i, value) in values.into_iter().enumerate() {
                // SAFETY: `i` is inside the result's view, which the caller vouches for.
                unsafe {
                    match out.dtype {
                        DType::I32 => *(out.addr as *mut i32).add(i) = value as i32,
                        _ => *(out.addr as *mut f32).add(i) = value as f32,
                    }
                }
            }
        }
        Ok(())
    }

    unsafe fn upload(&self, addr: usize, bytes: &[u8]) -> Result<()> {
        // SAFETY: the caller's obligation.
        unsafe { from_raw_parts_mut(addr as *mut u8, bytes.len()) }.copy_from_slice(bytes);
        Ok(())
    }

    unsafe fn download(&self, addr: usize, bytes: &mut [u8]) -> Result<()> {
        // SAFETY: the caller's obligation.
        bytes.copy_from_slice(unsafe { from_raw_parts(addr as *const u8, bytes.len()) });
        Ok(())
    }

    unsafe fn copy(&self, from: usize, to: usize, bytes: usize) -> Result<()> {
        // SAFETY: the caller's obligation.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, bytes) };
        Ok(())
    }
}

/// An operand.
struct In<'a>(&'a View);

impl In<'_> {
    fn at(&self, row: usize, col: usize) -> f64 {
        assert!(row < self.0.rows && col < self.0.cols, "{row},{col} of {:?}", self.0);
        // SAFETY: inside the view (asserted), which the caller of `run` vouches for.
        unsafe { *(self.0.addr as *const f32).add(row * self.0.cols + col) as f64 }
    }

    fn index(&self, row: usize, col: usize) -> i32 {
        assert!(row < self.0.rows && col < self.0.cols, "{row},{col} of {:?}", self.0);
        // SAFETY: as above.
        unsafe { *(self.0.addr as *const i32).add(row * self.0.cols + col) }
    }

    fn set(&self, row: usize, col: usize, value: f64) {
        assert!(row < self.0.rows && col < self.0.cols, "{row},{col} of {:?}", self.0);
        // SAFETY: as above; KV pages are operands that an op writes.
        unsafe { *(self.0.addr as *mut f32).add(row * self.0.cols + col) = value as f32 }
    }

    fn row(&self, row: usize) -> Vec<f64> {
        (0..self.0.cols).map(|col| self.at(row, col)).collect()
    }
}

/// A weight, widened.
struct Matrix {
    rows: usize,
    cols: usize,
    values: Vec<f64>,
}

impl Matrix {
    fn of(weight: &Prepared) -> Self {
        let WeightType { rows, cols, dtype } = weight.ty;
        // SAFETY: `prepare` pointed at the weight's own bytes.
        let bytes = unsafe { from_raw_parts(weight.addr as *const u8, rows * cols * dtype.size()) };
        Matrix { rows, cols, values: widen(bytes, dtype) }
    }

    fn at(&self, row: usize, col: usize) -> f64 {
        self.values[row * self.cols + col]
    }
}

/// The elements of raw bytes.
pub fn widen(bytes: &[u8], dtype: DType) -> Vec<f64> {
    bytes
        .chunks_exact(dtype.size())
        .map(|b| match dtype {
            DType::F32 => f32::from_le_bytes(b.try_into().unwrap()) as f64,
            DType::F16 => half::f16::from_le_bytes(b.try_into().unwrap()).to_f64(),
            DType::BF16 => half::bf16::from_le_bytes(b.try_into().unwrap()).to_f64(),
            DType::I32 => panic!("a weight of indices"),
        })
        .collect()
}

fn compute(op: &Op, ins: &[In], weights: &[Matrix], outs: &[View]) -> Vec<Vec<f64>> {
    match *op {
        Op::PatchEmbed { image, patch } => vec![patch_embed(&ins[0], weights, image, patch)],
        Op::LayerNorm { eps } => vec![rows(&ins[0], |x| {
            let mean = x.iter().sum::<f64>() / x.len() as f64;
            let var = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / x.len() as f64;
            let scale = 1.0 / (var + eps as f64).sqrt();
            let affine =
                |(i, x): (usize, &f64)| (x - mean) * scale * weights[0].values[i] + weights[1].values[i];
            x.iter().enumerate().map(affine).collect()
        })],
        Op::RmsNorm { eps } => vec![rows(&ins[0], |x| rms_norm(x, &weights[0].values, eps))],
        Op::AddRmsNorm { eps } => {
            let sum: Vec<Vec<f64>> = (0..ins[0].0.rows)
                .map(|r| ins[0].row(r).iter().zip(ins[1].row(r)).map(|(a, b)| a + b).collect())
                .collect();
            let norm = sum.iter().flat_map(|x| rms_norm(x, &weights[0].values, eps)).collect();
            vec![sum.concat(), norm]
        }
        Op::Linear { act, bias, residual, ref pairs, wide: _ } => {
            let (n, _) = Op::matrices(weights.len(), bias, pairs);
            let mut out = Vec::new();
            for r in 0..ins[0].0.rows {
                let x = ins[0].row(r);
                for i in 0..n {
                    for y in adapted(&x, weights, bias, pairs, i) {
                        let col = out.len() % outs[0].cols;
                        out.push(activate(y, act) + if residual { ins[1].at(r, col) } else { 0.0 });
                    }
                }
            }
            vec![out]
        }
        Op::GatedLinear { bias, ref pairs } => vec![rows(&ins[0], |x| {
            let gate = adapted(x, weights, bias, pairs, 0);
            let up = adapted(x, weights, bias, pairs, 1);
            gate.into_iter().zip(up).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect()
        })],
        Op::Attention { heads, head_dim, rows, causal } => {
            vec![attention(&ins[0], heads, head_dim, rows, causal)]
        }
        Op::RopeAppend { heads, kv_heads, head_dim } => {
            vec![rope_append(ins, heads, kv_heads, head_dim)]
        }
        Op::PagedAttention { heads, kv_heads, head_dim } => {
            vec![paged_attention(ins, heads, kv_heads, head_dim)]
        }
        Op::EmbedRows => vec![
            (0..ins[0].0.rows)
                .flat_map(|r| match ins[1].index(r, 0) {
                    -1 => {
                        let id = ins[0].index(r, 0) as usize;
                        (0..weights[0].cols).map(|c| weights[0].at(id, c)).collect()
                    }
                    source => ins[2].row(source as usize),
                })
                .collect(),
        ],
        Op::EmbedTokens => vec![
            (0..ins[0].0.rows)
                .flat_map(|r| {
                    let (id, position) = (ins[0].index(r, 0) as usize, r % weights[1].rows);
                    (0..weights[0].cols).map(move |c| weights[0].at(id, c) + weights[1].at(position, c))
                })
                .collect(),
        ],
        Op::SelectRows { select } => {
            let from = |r: usize| match select {
                Select::Index => ins[1].index(r, 0) as usize,
                Select::All => r,
                Select::Patches { rows } => r / (rows - 1) * rows + 1 + r % (rows - 1),
            };
            let values = if select == Select::Index { &ins[..1] } else { ins };
            vec![(0..outs[0].rows).flat_map(|r| values.iter().flat_map(move |v| v.row(from(r)))).collect()]
        }
        Op::Sample => vec![(0..ins[0].0.rows).map(|r| greedy(ins, r)).collect()],
        Op::L2Normalize => vec![rows(&ins[0], |x| {
            let norm = x.iter().map(|x| x * x).sum::<f64>().sqrt();
            x.iter().map(|x| x / norm).collect()
        })],
    }
}

fn rows(x: &In, f: impl Fn(&[f64]) -> Vec<f64>) -> Vec<f64> {
    (0..x.0.rows).flat_map(|r| f(&x.row(r))).collect()
}

fn dot(x: &[f64], w: &Matrix, row: usize) -> f64 {
    x.iter().enumerate().map(|(k, x)| x * w.at(row, k)).sum()
}

/// x W^T + b + the sum of scale B (A x) for matrix `i` of a linear op.
fn adapted(x: &[f64], weights: &[Matrix], bias: bool, pairs: &[Pair], i: usize) -> Vec<f64> {
    let (n, own) = Op::matrices(weights.len(), bias, pairs);
    let mut y: Vec<f64> = (0..weights[i].rows).map(|row| dot(x, &weights[i], row)).collect();
    for (row, y) in y.iter_mut().enumerate().filter(|_| bias) {
        *y += weights[n + i].values[row];
    }
    for (p, pair) in pairs.iter().enumerate().filter(|(_, pair)| pair.matrix == i) {
        let (a, b) = (&weights[own + 2 * p], &weights[own + 2 * p + 1]);
        let inner: Vec<f64> = (0..a.rows).map(|row| dot(x, a, row)).collect();
        y.iter_mut().enumerate().for_each(|(row, y)| *y += pair.scale as f64 * dot(&inner, b, row));
    }
    y
}

fn rms_norm(x: &[f64], gamma: &[f64], eps: f32) -> Vec<f64> {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    let scale = 1.0 / (mean + eps as f64).sqrt();
    x.iter().zip(gamma).map(|(x, g)| x * scale * g).collect()
}

fn activate(x: f64, act: Activation) -> f64 {
    match act {
        Activation::None => x,
        Activation::QuickGelu => x / (1.0 + (-1.702 * x).exp()),
        Activation::GeluErf => x / 2.0 * (1.0 + erf(x / 2f64.sqrt())),
    }
}

/// erf by its Maclaurin series, or by the continued fraction of erfc (Abramowitz and Stegun 7.1.6 and
/// 7.1.14), each where it converges fast.
pub fn erf(x: f64) -> f64 {
    let a = x.abs();
    let value = if a < 3.0 {
        let (mut term, mut sum) = (a, a);
        for n in 1..80 {
            term *= 2.0 * a * a / (2 * n + 1) as f64;
            sum += term;
        }
        2.0 / std::f64::consts::PI.sqrt() * (-a * a).exp() * sum
    } else {
        let fraction = (1..60).rev().fold(a, |f, n| a + n as f64 / 2.0 / f);
        1.0 - (-a * a).exp() / (std::f64::consts::PI.sqrt() * fraction)
    };
    value.copysign(x)
}

fn patch_embed(pixels: &In, weights: &[Matrix], image: usize, patch: usize) -> Vec<f64> {
    let grid = image / patch;
    let (conv, class, positions) = (&weights[0], &weights[1], &weights[2]);
    let mut out = Vec::new();
    for i in 0..pixels.0.rows {
        out.extend((0..conv.rows).map(|d| class.at(0, d) + positions.at(0, d)));
        for p in 0..grid * grid {
            let (py, px) = (p / grid * patch, p % grid * patch);
            for d in 0..conv.rows {
                let mut sum = positions.at(p + 1, d);
                for c in 0..3 {
                    for y in 0..patch {
                        for x in 0..patch {
                            let pixel = pixels.at(i, (c * image + py + y) * image + px + x);
                            sum += pixel * conv.at(d, (c * patch + y) * patch + x);
                        }
                    }
                }
                out.push(sum);
            }
        }
    }
    out
}

fn softmax_sum(scores: &[f64], value: impl Fn(usize) -> f64) -> f64 {
    let max = scores.iter().fold(f64::NEG_INFINITY, |m, s| m.max(*s));
    let (mut sum, mut total) = (0.0, 0.0);
    for (j, score) in scores.iter().enumerate() {
        let p = (score - max).exp();
        sum += p * value(j);
        total += p;
    }
    sum / total
}

fn attention(qkv: &In, heads: usize, e: usize, rows: usize, causal: bool) -> Vec<f64> {
    let width = heads * e;
    let mut out = Vec::new();
    for r in 0..qkv.0.rows {
        let first = r / rows * rows;
        let seen = if causal { r - first + 1 } else { rows };
        for h in 0..heads {
            let scores: Vec<f64> = (0..seen)
                .map(|j| {
                    let dot = |d: usize| qkv.at(r, h * e + d) * qkv.at(first + j, width + h * e + d);
                    (0..e).map(dot).sum::<f64>() / (e as f64).sqrt()
                })
                .collect();
            for d in 0..e {
                out.push(softmax_sum(&scores, |j| qkv.at(first + j, 2 * width + h * e + d)));
            }
        }
    }
    out
}

/// Where position `slot` of a page pool holds dimension `d` of a key and of a value.
fn page_cols(slot: usize, head: usize, d: usize, e: usize) -> (usize, usize) {
    (head * e * PAGE + d * PAGE + slot % PAGE, head * e * PAGE + slot % PAGE * e + d)
}

fn rope_append(ins: &[In], heads: usize, kv_heads: usize, e: usize) -> Vec<f64> {
    let (qkv, positions, slots, table, k, v) = (&ins[0], &ins[1], &ins[2], &ins[3], &ins[4], &ins[5]);
    let mut out = Vec::new();
    for r in 0..qkv.0.rows {
        let position = positions.index(r, 0) as usize;
        let rotated = |head: usize, d: usize| {
            let half = e / 2;
            let (cos, sin) = (table.at(position, d % half), table.at(position, half + d % half));
            let (x, other) = (qkv.at(r, head * e + d), qkv.at(r, head * e + (d + half) % e));
            if d < half { x * cos - other * sin } else { x * cos + other * sin }
        };
        for h in 0..heads {
            out.extend((0..e).map(|d| rotated(h, d)));
        }
        let slot = slots.index(r, 0) as usize;
        for h in 0..kv_heads {
            for d in 0..e {
                let (k_col, v_col) = page_cols(slot, h, d, e);
                k.set(slot / PAGE, k_col, rotated(heads + h, d));
                v.set(slot / PAGE, v_col, qkv.at(r, (heads + kv_heads + h) * e + d));
            }
        }
    }
    out
}

fn paged_attention(ins: &[In], heads: usize, kv_heads: usize, e: usize) -> Vec<f64> {
    let (q, positions, starts, tables, k, v) = (&ins[0], &ins[1], &ins[2], &ins[3], &ins[4], &ins[5]);
    let mut out = Vec::new();
    for r in 0..q.0.rows {
        let seen = positions.index(r, 0) as usize + 1;
        let start = starts.index(r, 0) as usize;
        let page = |j: usize| tables.index(start + j / PAGE, 0) as usize;
        for h in 0..heads {
            let kv = h / (heads / kv_heads);
            let scores: Vec<f64> = (0..seen)
                .map(|j| {
                    let dot = |d: usize| q.at(r, h * e + d) * k.at(page(j), page_cols(j, kv, d, e).0);
                    (0..e).map(dot).sum::<f64>() / (e as f64).sqrt()
                })
                .collect();
            for d in 0..e {
                out.push(softmax_sum(&scores, |j| v.at(page(j), page_cols(j, kv, d, e).1)));
            }
        }
    }
    out
}

/// The largest logit after the repetition penalty; -1 for logits that are not finite. (Drawing is
/// tested against Hugging Face's probabilities, not here.)
fn greedy(ins: &[In], row: usize) -> f64 {
    let mut words = [0i32; std::mem::size_of::<SampleParams>() / 4];
    for (i, word) in words.iter_mut().enumerate() {
        *word = ins[1].index(row, i);
    }
    let params: SampleParams = bytemuck::cast(words);
    assert_eq!(params.temperature, 0.0, "the oracle is greedy");
    let penalty = params.repetition_penalty as f64;
    let mut best = (f64::NEG_INFINITY, -1.0);
    for id in 0..ins[0].0.cols {
        let logit = ins[0].at(row, id);
        if !logit.is_finite() {
            return -1.0;
        }
        let seen = ins[2].index(row, id / 32) >> (id % 32) & 1 == 1;
        let logit = match seen {
            true if logit < 0.0 => logit * penalty,
            true => logit / penalty,
            false => logit,
        };
        if logit > best.0 {
            best = (logit, id as f64);
        }
    }
    best.1
}
