//! Rows of logits with sampling options.

use super::{Case, Data, Random};
use tessera::op::{Op, SAMPLE_PARAMS, SampleParams};
use tessera::tensor::{Bindings, DType, Rows, TensorType};

/// One row's operands.
pub struct Row {
    /// `[V]`.
    pub logits: Vec<f32>,
    /// The options.
    pub params: SampleParams,
    /// A bit for each id.
    pub seen: Vec<u32>,
}

/// Logits of many characters and options from everywhere in their ranges, the ends most of all.
pub fn row(vocab: usize, random: &mut Random) -> Row {
    let spread = [0.0, 0.01, 1.0, 4.0, 30.0][random.below(5)];
    let levels = [0, 2, 7][random.below(3)];
    let offset = [0.0, -50.0, 3.0][random.below(3)];
    let logits = (0..vocab)
        .map(|_| {
            // The sum of three is bell-shaped enough; a few levels make ties.
            let x = random.float() + random.float() + random.float();
            let x = if levels > 0 { (x * levels as f32).round() / levels as f32 } else { x };
            x * spread + offset
        })
        .collect();
    let mut pick = |values: &[f32]| values[random.below(values.len())];
    let params = SampleParams {
        temperature: pick(&[0.0, 0.3, 0.7, 1.0, 1.0, 2.0, 1e-4]),
        top_k: pick(&[0.0, 0.0, 1.0, 2.0, 40.0, vocab as f32 - 1.0, vocab as f32, 1e6]) as u32,
        top_p: pick(&[1.0, 1.0, 0.999, 0.95, 0.5, 0.1, 1e-6]),
        min_p: pick(&[0.0, 0.0, 0.01, 0.3, 1.0]),
        repetition_penalty: pick(&[1.0, 1.3, 0.5]),
        seed_low: random.word() as u32,
        seed_high: random.word() as u32,
        position: random.below(4096) as u32,
    };
    let seen = (0..vocab.div_ceil(32)).map(|_| random.word() as u32).collect();
    Row { logits, params, seen }
}

/// The case of some rows, of one vocabulary, and its data.
pub fn case_of(rows: &[Row]) -> (Case, Data) {
    let cols = rows[0].logits.len();
    let types = vec![
        TensorType::f32(Rows::Outputs, cols),
        TensorType::i32(Rows::Outputs, SAMPLE_PARAMS),
        TensorType::i32(Rows::Outputs, cols.div_ceil(32)),
    ];
    let ins = vec![
        rows.iter().flat_map(|row| row.logits.iter().map(|x| x.to_bits())).collect(),
        rows.iter().flat_map(|row| bytemuck::cast::<_, [u32; SAMPLE_PARAMS]>(row.params)).collect(),
        rows.iter().flat_map(|row| row.seen.iter().copied()).collect(),
    ];
    let bindings = Bindings { outputs: rows.len(), ..Bindings::default() };
    let case = Case { op: Op::Sample, ins: types, weights: vec![], dtype: DType::F32, bindings, past: 0 };
    (case, Data { ins, weights: vec![] })
}
