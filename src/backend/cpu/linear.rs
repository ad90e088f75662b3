//! Linear maps.

use super::{Simd, blocks, team::Team};
use crate::{
    backend::{Precision, Tensor},
    ops::{LinearParams, Weight},
};

pub(super) fn linear(
    team: &mut Team,
    simd: Simd,
    p: LinearParams,
    x: &Tensor,
    weight: &Weight,
    out: &Tensor,
) {
    let tokens = p.tokens as usize;
    matmul(team, simd, p.precision, p.accumulate, tokens, x.host::<f32>(), weight, out.host_mut::<f32>());
}

/// `y = x · Wᵀ + bias`, or added to `y`: `x` `[tokens, cols]`, `y` `[tokens, rows]`.
#[allow(clippy::too_many_arguments)]
pub(super) fn matmul(
    team: &mut Team,
    _simd: Simd,
    _precision: Precision,
    accumulate: bool,
    tokens: usize,
    x: &[f32],
    weight: &Weight,
    y: &mut [f32],
) {
    let (cols, rows) = (weight.cols(), weight.rows());
    team.chunks_mut(&mut y[..tokens * rows], rows, |t, y| {
        let mut w = vec![0.0; cols];
        let mut n = 0;
        for part in &weight.parts {
            let bias = part.bias.as_ref().map(super::pointwise::vector);
            for row in 0..part.matrix.rows() {
                blocks::row_to_f32(&part.matrix, row, &mut w);
                let mut sum: f32 = w.iter().zip(&x[t * cols..]).map(|(a, b)| a * b).sum();
                sum += bias.as_ref().map_or(0.0, |b| b[row]);
                if accumulate {
                    y[n] += sum
                } else {
                    y[n] = sum
                }
                n += 1;
            }
        }
    });
}
