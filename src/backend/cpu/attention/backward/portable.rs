//! The reference: one query and head at a time, in plain Rust.

use crate::{
    backend::cpu::{
        rope::{page_offset, read_page},
        team::{SendPtr, Team},
    },
    ops::{AttentionGrads, AttentionOperands, AttentionParams},
};

/// A kv head is one task's.
pub(super) fn attention_backward(
    team: &mut Team,
    p: AttentionParams,
    o: &AttentionOperands,
    grads: &AttentionGrads,
) {
    let (heads, dim) = (p.heads as usize, p.head_dim as usize);
    let group = (p.heads / p.kv_heads) as usize;
    let (q, cu_q, context) = (o.q.host::<f32>(), o.cu_q.host::<u32>(), o.context.host::<u32>());
    let (out, dout, tables) = (o.out.host::<f32>(), grads.dout.host::<f32>(), o.block_tables.host::<u32>());
    let size = o.pages.block_size();
    let dq = SendPtr(grads.dq.host_mut::<f32>().as_mut_ptr());
    let pages = [&grads.dkv.keys, &grads.dkv.values];
    let page_len = pages[0].elements();
    let pages = pages.map(|pages| SendPtr(pages.host_mut::<f32>().as_mut_ptr()));
    team.run(p.kv_heads as usize, &|kv_head| {
        let (mut key, mut value) = (vec![0.0; dim], vec![0.0; dim]);
        for t in 0..p.tokens as usize {
            let s = cu_q.partition_point(|&start| start as usize <= t) - 1;
            let (start, end) = (cu_q[s] as usize, cu_q[s + 1] as usize);
            let at = context[s] as usize - (end - start) + (t - start);
            let first = if p.window > 0 { (at + 1).saturating_sub(p.window as usize) } else { 0 };
            let table = &tables[s * p.max_blocks as usize..];
            let offset = |i: usize| {
                let slot = table[i / size] as usize * size + i % size;
                let offset = page_offset(&o.pages, slot, kv_head);
                assert!(offset + dim <= page_len, "slot past the end of the pages");
                offset
            };
            for head in kv_head * group..(kv_head + 1) * group {
                let row = (t * heads + head) * dim..(t * heads + head + 1) * dim;
                let q = &q[t * p.q_stride as usize + head * dim..][..dim];
                let (out, dout) = (&out[row.clone()], &dout[row.clone()]);
                let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
                let mut scores: Vec<f32> = (first..=at)
                    .map(|i| {
                        read_page(&o.pages.keys, offset(i), &mut key);
                        let s = p.scale * dot(q, &key);
                        if p.soft_cap > 0.0 { p.soft_cap * (s / p.soft_cap).tanh() } else { s }
                    })
                    .collect();
                let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let sum: f32 = scores.iter().map(|s| (s - max).exp()).sum();
                let delta = dot(dout, out);
                // SAFETY: dq is as long as out, and this head is this task's.
                let dq = unsafe { std::slice::from_raw_parts_mut(dq.get().add(row.start), dim) };
                dq.fill(0.0);
                for (i, s) in (first..=at).zip(&mut scores) {
                    let weight = (*s - max).exp() / sum;
                    read_page(&o.pages.keys, offset(i), &mut key);
                    read_page(&o.pages.values, offset(i), &mut value);
                    let slope = if p.soft_cap > 0.0 { 1.0 - (*s / p.soft_cap).powi(2) } else { 1.0 };
                    let ds = weight * (dot(dout, &value) - delta) * slope * p.scale;
                    // SAFETY: in bounds, as `offset` checked; this kv head is this task's.
                    let [dkey, dvalue] = pages.map(|pages| unsafe {
                        std::slice::from_raw_parts_mut(pages.get().add(offset(i)), dim)
                    });
                    for d in 0..dim {
                        dq[d] += ds * key[d];
                        dkey[d] += ds * q[d];
                        dvalue[d] += weight * dout[d];
                    }
                }
            }
        }
    });
}
