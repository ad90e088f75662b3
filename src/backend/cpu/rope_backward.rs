//! Backward of the rotation and of the q/k norm, and the gradients of K and V out of their pages.

use super::{
    Simd,
    pointwise::vector,
    pointwise_backward::{add_parts, norm_row},
    rope::{page_offset, read_page},
    simd::vectorized,
    team::{SendPtr, Team},
};
use crate::{
    backend::Tensor,
    ops::{NormOutput, RopeBackwardOperands, RopeParams},
};

/// Tokens whose part of the norms' gradients is summed up at once, see `pointwise_backward`.
const TOKENS: usize = 8;

pub(super) fn rope_backward(team: &mut Team, simd: Simd, p: RopeParams, o: &RopeBackwardOperands) {
    let (heads, kv_heads, dim) = (p.heads as usize, p.kv_heads as usize, p.head_dim as usize);
    let width = (heads + 2 * kv_heads) * dim;
    let norm = |weight: &Option<Tensor>| {
        weight.as_ref().map(|w| vector(w).iter().map(|w| w + p.norm_offset).collect::<Vec<f32>>())
    };
    let norms = [norm(&o.q_norm), norm(&o.k_norm)];
    let (cos_sin, slots) = (o.cos_sin.host::<f32>(), o.slots.host::<u32>());
    let (qkv, dq) = (o.qkv.host::<f32>(), o.dq.host::<f32>());
    // Parts of the gradients of both norms, `[2, parts, dim]`, where they are wanted.
    let wanted = [&o.dq_norm, &o.dk_norm].map(Option::is_some);
    let count = (p.tokens as usize).div_ceil(TOKENS);
    let mut parts = vec![0.0f32; 2 * count * dim];
    let parts_ptr = SendPtr(parts.as_mut_ptr());
    team.chunks_mut(o.dqkv.host_mut::<f32>(), TOKENS * width, |task, rows| {
        // SAFETY: one part of each norm is this task's own.
        let [mut dq_norm, mut dk_norm] = [0, 1].map(|which| unsafe {
            let len = if wanted[which] { dim } else { 0 };
            std::slice::from_raw_parts_mut(parts_ptr.get().add((which * count + task) * dim), len)
        });
        let (mut rotated, mut plain) = (vec![0.0f32; dim], vec![0.0f32; dim]);
        for (i, row) in rows.chunks_exact_mut(width).enumerate() {
            let token = task * TOKENS + i;
            let (cos, sin) = cos_sin[token * dim..(token + 1) * dim].split_at(dim / 2);
            let slot = slots[token] as usize;
            let (dqk, dv) = row.split_at_mut((heads + kv_heads) * dim);
            for (head, dx) in dqk.chunks_exact_mut(dim).enumerate() {
                if head < heads {
                    rotated.copy_from_slice(&dq[(token * heads + head) * dim..][..dim]);
                } else {
                    read_page(&o.dkv.keys, page_offset(&o.dkv, slot, head - heads), &mut rotated);
                }
                let (weight, dweight) =
                    if head < heads { (&norms[0], &mut dq_norm) } else { (&norms[1], &mut dk_norm) };
                match weight {
                    None => rotate_back(simd, p.interleaved != 0, &rotated, cos, sin, dx),
                    Some(weight) => {
                        rotate_back(simd, p.interleaved != 0, &rotated, cos, sin, &mut plain);
                        let x = &qkv[token * width + head * dim..][..dim];
                        norm_row(simd, x, weight, p.norm_eps, &plain, NormOutput::Assign, dx, dweight);
                    }
                }
            }
            for (head, dv) in dv.chunks_exact_mut(dim).enumerate() {
                read_page(&o.dkv.values, page_offset(&o.dkv, slot, head), dv);
            }
        }
    });
    for (grad, parts) in [&o.dq_norm, &o.dk_norm].into_iter().zip(parts.chunks_exact((count * dim).max(1))) {
        if let Some(grad) = grad {
            add_parts(parts, grad);
        }
    }
}

vectorized! {
    /// One head, from Hugging Face's order of pairs: a rotation's transpose is the rotation back.
    fn rotate_back(interleaved: bool, rotated: &[f32], cos: &[f32], sin: &[f32], out: &mut [f32]) {
        let half = out.len() / 2;
        let (low, high) = rotated.split_at(half);
        for i in 0..half {
            let a = low[i] * cos[i] + high[i] * sin[i];
            let b = high[i] * cos[i] - low[i] * sin[i];
            let (at_a, at_b) = if interleaved { (2 * i, 2 * i + 1) } else { (i, i + half) };
            (out[at_a], out[at_b]) = (a, b);
        }
    }
}

#[cfg(test)]
mod tests;
