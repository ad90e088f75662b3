//! Linear maps.

use super::{Simd, blocks, team::Team};
use crate::{
    backend::Tensor,
    ops::{LinearParams, Weight},
};

pub(super) fn linear(
    team: &mut Team,
    _simd: Simd,
    p: LinearParams,
    x: &Tensor,
    weight: &Weight,
    out: &Tensor,
) {
    let (cols, rows) = (weight.cols(), weight.rows());
    let x = x.host::<f32>();
    team.chunks_mut(out.host_mut::<f32>(), rows, |t, y| {
        let mut w = vec![0.0; cols];
        let mut n = 0;
        for part in &weight.parts {
            let bias = part.bias.as_ref().map(super::pointwise::vector);
            for row in 0..part.matrix.rows() {
                blocks::row_to_f32(&part.matrix, row, &mut w);
                let mut sum: f32 = w.iter().zip(&x[t * cols..]).map(|(a, b)| a * b).sum();
                sum += bias.as_ref().map_or(0.0, |b| b[row]);
                if p.accumulate {
                    y[n] += sum
                } else {
                    y[n] = sum
                }
                n += 1;
            }
        }
    });
}
