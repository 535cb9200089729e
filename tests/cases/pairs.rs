//! Linear ops with low-rank pairs: a table of its own, for devices that have kernels for them.

use super::Case;
use super::table::{gated, linear};
use tessera::op::{Activation, Op, Pair};
use tessera::tensor::DType;

/// A linear op with low-rank pairs of these ranks beside its matrices: (matrix, rank, scale).
fn adapted(mut case: Case, ranks: &[(usize, usize, f32)]) -> Case {
    let (Op::Linear { pairs, .. } | Op::GatedLinear { pairs, .. }) = &mut case.op else { panic!("{case}") };
    pairs.extend(ranks.iter().map(|&(matrix, _, scale)| Pair { matrix, scale }));
    for &(matrix, rank, _) in ranks {
        let [n, k] = case.weights[matrix];
        case.weights.extend([[rank, k], [n, rank]]);
    }
    case
}

/// Ranks below, at and above a vector, several on one matrix, none on the next.
pub fn pairs() -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for m in [1, 3, 4, 5, 13, 25, 34] {
            let plain =
                |ns: &[usize], k, bias, residual| linear(m, ns, k, dtype, Activation::None, bias, residual);
            cases.push(adapted(plain(&[33], 40, false, false), &[(0, 8, 2.0)]));
            cases.push(adapted(plain(&[17], 65, true, true), &[(0, 1, -0.7), (0, 17, 1.7)]));
            let qkv = [(0, 4, 2.0), (2, 16, 0.5), (2, 3, 1.0), (2, 33, 0.25)];
            cases.push(adapted(plain(&[48, 16, 19], 40, true, false), &qkv));
            let quick = linear(m, &[37], 70, dtype, Activation::QuickGelu, true, false);
            cases.push(adapted(quick, &[(0, 5, 3.0)]));
            cases.push(adapted(gated(m, 21, 77, dtype, false), &[(0, 8, 2.0), (1, 12, 0.3)]));
            cases.push(adapted(gated(m, 40, 64, dtype, true), &[(1, 20, 1.0)]));
        }
    }
    // A rank past a block of the reduction order.
    cases.push(adapted(linear(6, &[20], 30, DType::BF16, Activation::None, false, false), &[(0, 2070, 0.1)]));
    cases
}
