//! The reference: one query and head at a time, in plain Rust.

use crate::{
    backend::cpu::{
        rope::{page_offset, read_page},
        team::Team,
    },
    ops::{AttentionOperands, AttentionParams},
};

pub(super) fn paged_attention(team: &mut Team, p: AttentionParams, o: &AttentionOperands) {
    let (heads, dim) = (p.heads as usize, p.head_dim as usize);
    let group = (p.heads / p.kv_heads) as usize;
    let (q, cu_q, context) = (o.q.host::<f32>(), o.cu_q.host::<u32>(), o.context.host::<u32>());
    let tables = o.block_tables.host::<u32>();
    let size = o.pages.block_size();
    team.chunks_mut(o.out.host_mut::<f32>(), heads * dim, |t, out| {
        let s = cu_q.partition_point(|&start| start as usize <= t) - 1;
        let (start, end) = (cu_q[s] as usize, cu_q[s + 1] as usize);
        let at = context[s] as usize - (end - start) + (t - start);
        let first = if p.window > 0 { (at + 1).saturating_sub(p.window as usize) } else { 0 };
        let table = &tables[s * p.max_blocks as usize..];
        let mut row = vec![0.0; dim];
        for h in 0..heads {
            let q = &q[t * p.q_stride as usize + h * dim..][..dim];
            let slot = |i: usize| table[i / size] as usize * size + i % size;
            let mut scores: Vec<f32> = (first..=at)
                .map(|i| {
                    read_page(&o.pages.keys, page_offset(&o.pages, slot(i), h / group), &mut row);
                    let s = p.scale * q.iter().zip(&row).map(|(a, b)| a * b).sum::<f32>();
                    if p.soft_cap > 0.0 { p.soft_cap * (s / p.soft_cap).tanh() } else { s }
                })
                .collect();
            let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            scores.iter_mut().for_each(|s| *s = (*s - max).exp());
            let sum: f32 = scores.iter().sum();
            let out = &mut out[h * dim..(h + 1) * dim];
            out.fill(0.0);
            for (i, s) in (first..=at).zip(&scores) {
                read_page(&o.pages.values, page_offset(&o.pages, slot(i), h / group), &mut row);
                out.iter_mut().zip(&row).for_each(|(y, v)| *y += s / sum * v);
            }
        }
    });
}
