//! AdamW in one pass over weights, gradient and moments; the norm of a gradient. Both are bound by memory.

use super::{
    Simd,
    simd::vectorized,
    team::{SendPtr, Team},
};
use crate::{backend::Tensor, ops::AdamwParams};

/// Elements of a task. The sum of squares adds up the sums of so many, in order.
const CHUNK: usize = 1 << 14;

pub(super) fn adamw(
    team: &mut Team,
    simd: Simd,
    p: AdamwParams,
    weights: &Tensor,
    grad: &Tensor,
    m: &Tensor,
    v: &Tensor,
) {
    let [grad, m, v] = [grad, m, v].map(|tensor| SendPtr(tensor.host_mut::<f32>().as_mut_ptr()));
    team.chunks_mut(weights.host_mut::<f32>(), CHUNK, |task, weights| {
        // SAFETY: the four tensors have the same length and share no memory, checked in ops; a chunk is one task's.
        let part = |of: SendPtr<f32>| unsafe {
            std::slice::from_raw_parts_mut(of.get().add(task * CHUNK), weights.len())
        };
        update(simd, p, part(grad), part(m), part(v), weights);
    });
}

vectorized! {
    fn update(p: AdamwParams, grad: &mut [f32], m: &mut [f32], v: &mut [f32], weights: &mut [f32]) {
        let decay = p.learning_rate * p.weight_decay;
        let (new1, new2) = (1.0 - p.beta1, 1.0 - p.beta2);
        let step = p.learning_rate / p.correction1;
        let inverse2 = 1.0 / p.correction2;
        for (((w, grad), m), v) in weights.iter_mut().zip(grad).zip(m).zip(v) {
            let g = p.grad_scale * *grad;
            *grad = 0.0;
            *m = p.beta1 * *m + new1 * g;
            *v = p.beta2 * *v + new2 * (g * g);
            // One rounding: 1 − decay is hardly told from 1 in f32.
            *w -= decay * *w + step * *m / ((*v * inverse2).sqrt() + p.eps);
        }
    }
}

pub(super) fn sum_of_squares(team: &mut Team, simd: Simd, x: &Tensor, out: &Tensor) {
    let x = x.host::<f32>();
    let mut sums = vec![0.0f64; x.len().div_ceil(CHUNK)];
    team.chunks_mut(&mut sums, 1, |task, sum| {
        let from = task * CHUNK;
        squares(simd, &x[from..(from + CHUNK).min(x.len())], &mut sum[0]);
    });
    out.host_mut::<f32>()[0] = sums.iter().sum::<f64>() as f32;
}

vectorized! {
    /// In f64, of which a square of f32 loses nothing.
    fn squares(x: &[f32], sum: &mut f64) {
        let mut lanes = [0.0f64; 16];
        for chunk in x.chunks(16) {
            lanes.iter_mut().zip(chunk).for_each(|(lane, &x)| *lane += f64::from(x) * f64::from(x));
        }
        *sum = lanes.iter().sum();
    }
}

#[cfg(test)]
mod tests;
