//! q/k norm, rotation and the write of K and V into their pages; copies between pages.

use super::{
    Simd,
    pointwise::{norm_in_place, vector},
    simd::vectorized,
    team::{SendPtr, Team},
};
use crate::{
    backend::{DType, Tensor},
    ops::{KvPages, RopeOperands, RopeParams},
};
use half::bf16;

/// Element offset of `slot` of `head` in pages `[blocks, kv_heads, block_size, head_dim]`.
pub(super) fn page_offset(pages: &KvPages, slot: usize, head: usize) -> usize {
    let size = pages.block_size();
    ((slot / size * pages.kv_heads() + head) * size + slot % size) * pages.head_dim()
}

pub(super) fn rope_kv_write(team: &mut Team, simd: Simd, p: RopeParams, o: &RopeOperands) {
    let (heads, kv_heads, dim) = (p.heads as usize, p.kv_heads as usize, p.head_dim as usize);
    let width = (heads + 2 * kv_heads) * dim;
    let norm = |weight: &Option<Tensor>| {
        weight.as_ref().map(|w| vector(w).iter().map(|w| w + p.norm_offset).collect::<Vec<f32>>())
    };
    let (q_norm, k_norm) = (norm(&o.q_norm), norm(&o.k_norm));
    let (cos_sin, slots) = (o.cos_sin.host::<f32>(), o.slots.host::<u32>());
    let keys = PageWriter::new(&o.pages.keys);
    let values = PageWriter::new(&o.pages.values);
    let q_out = o.q_out.as_ref().map(|q_out| SendPtr(q_out.host_mut::<f32>().as_mut_ptr()));
    let per_task = (4096 / width.max(1)).max(1);
    team.chunks_mut(o.qkv.host_mut::<f32>(), per_task * width, |task, rows| {
        let (mut rotated, mut kept) = (vec![0.0f32; dim], vec![0.0f32; dim]);
        for (i, row) in rows.chunks_exact_mut(width).enumerate() {
            let token = task * per_task + i;
            let (cos, sin) = cos_sin[token * dim..(token + 1) * dim].split_at(dim / 2);
            let (qk, v) = row.split_at_mut((heads + kv_heads) * dim);
            let slot = slots[token] as usize;
            for (head, x) in qk.chunks_exact_mut(dim).enumerate() {
                let weight = if head < heads { &q_norm } else { &k_norm };
                // A backward pass wants `qkv` as it was.
                let x = if q_out.is_some() {
                    kept.copy_from_slice(x);
                    &mut kept[..]
                } else {
                    x
                };
                if let Some(weight) = weight {
                    norm_in_place(simd, x, weight, p.norm_eps);
                }
                rotate(simd, p.interleaved != 0, x, cos, sin, &mut rotated);
                match q_out {
                    _ if head >= heads => keys.write(page_offset(&o.pages, slot, head - heads), &rotated),
                    None => x.copy_from_slice(&rotated),
                    Some(q_out) => {
                        let at = (token * heads + head) * dim;
                        // SAFETY: `q_out` is `[tokens, heads · dim]`, checked in ops; each token is one task's.
                        let out = unsafe { std::slice::from_raw_parts_mut(q_out.get().add(at), dim) };
                        out.copy_from_slice(&rotated);
                    }
                }
            }
            for (head, v) in v.chunks_exact(dim).enumerate() {
                values.write(page_offset(&o.pages, slot, head), v);
            }
        }
    });
}

vectorized! {
    /// One head, into Hugging Face's order of pairs.
    fn rotate(interleaved: bool, x: &[f32], cos: &[f32], sin: &[f32], out: &mut [f32]) {
        let half = x.len() / 2;
        let (low, high) = out.split_at_mut(half);
        for i in 0..half {
            let (a, b) = if interleaved { (x[2 * i], x[2 * i + 1]) } else { (x[i], x[i + half]) };
            low[i] = a * cos[i] - b * sin[i];
            high[i] = b * cos[i] + a * sin[i];
        }
    }
}

/// Writes rows into a page tensor from several tasks at once.
///
/// Each slot is written by one task: slots of one op are distinct (a token has its own slot).
#[derive(Clone, Copy)]
pub(super) enum PageWriter {
    F32(SendPtr<f32>, usize),
    Bf16(SendPtr<bf16>, usize),
}

impl PageWriter {
    pub(super) fn new(pages: &Tensor) -> PageWriter {
        let len = pages.elements();
        match pages.dtype() {
            DType::F32 => PageWriter::F32(SendPtr(pages.host_mut::<f32>().as_mut_ptr()), len),
            DType::Bf16 => PageWriter::Bf16(SendPtr(pages.host_mut::<bf16>().as_mut_ptr()), len),
            other => unreachable!("pages are F32 or BF16, checked in ops, not {other}"),
        }
    }

    pub(super) fn write(self, offset: usize, row: &[f32]) {
        let (PageWriter::F32(_, len) | PageWriter::Bf16(_, len)) = self;
        assert!(offset + row.len() <= len, "slot past the end of the pages");
        match self {
            // SAFETY: in bounds (checked above); no other task writes this slot.
            PageWriter::F32(base, _) => unsafe {
                std::slice::from_raw_parts_mut(base.get().add(offset), row.len()).copy_from_slice(row)
            },
            PageWriter::Bf16(base, _) => {
                // SAFETY: as above.
                let out = unsafe { std::slice::from_raw_parts_mut(base.get().add(offset), row.len()) };
                out.iter_mut().zip(row).for_each(|(y, &x)| *y = bf16::from_f32(x));
            }
        }
    }
}

/// Reads `len` elements at `offset` of a page tensor as f32.
pub(super) fn read_page(pages: &Tensor, offset: usize, out: &mut [f32]) {
    match pages.dtype() {
        DType::F32 => out.copy_from_slice(&pages.host::<f32>()[offset..offset + out.len()]),
        DType::Bf16 => {
            let row = &pages.host::<bf16>()[offset..offset + out.len()];
            out.iter_mut().zip(row).for_each(|(y, x)| *y = x.to_f32());
        }
        other => unreachable!("pages are F32 or BF16, checked in ops, not {other}"),
    }
}

pub(super) fn copy_slots(from: &KvPages, from_slots: &Tensor, to: &KvPages, to_slots: &Tensor) {
    let mut row = vec![0.0; from.head_dim()];
    let pairs = from_slots.host::<u32>().iter().zip(to_slots.host::<u32>());
    for (&source, &target) in pairs {
        for head in 0..from.kv_heads() {
            let read = page_offset(from, source as usize, head);
            let write = page_offset(to, target as usize, head);
            // bf16 → f32 → bf16 is exact.
            read_page(&from.keys, read, &mut row);
            PageWriter::new(&to.keys).write(write, &row);
            read_page(&from.values, read, &mut row);
            PageWriter::new(&to.values).write(write, &row);
        }
    }
}
