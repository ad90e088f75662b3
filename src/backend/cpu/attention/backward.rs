//! Backward of attention over pages, without the scores ever in memory as a whole: as in FlashAttention-2, each tile's are
//! computed again from the row's maximum and sum. Derivation in docs/math.md ("Backward").
//!
//! Every sum has one order: an element of dq goes through the tiles of keys in order, one of dK and dV through the tiles of
//! queries. So one task may take all of a sequence and kv head, or, where that leaves threads idle, some tasks a tile of
//! queries each for dq and others some tiles of keys each for dK and dV, who compute each tile twice: the bits are the same.

mod kernels;
mod portable;
#[cfg(test)]
mod tests;

pub(super) use kernels::{differentiate, measure};

use super::{
    super::{
        Simd,
        team::{SendPtr, Team},
    },
    Call, Kernels, SCRATCH, Scratch, Sequence, WORTH_SHARING,
    prefill::KEYS,
};
use crate::ops::{AttentionGrads, AttentionOperands, AttentionParams};
use std::{cmp::Reverse, collections::HashSet, ops::Range};

/// Rows of a tile of queries, at most, unless one token has more.
const ROWS: usize = 96;

pub(in crate::backend::cpu) fn attention_backward(
    team: &mut Team,
    simd: Simd,
    p: AttentionParams,
    forward: &AttentionOperands,
    grads: &AttentionGrads,
) {
    if p.heads == 0 || p.kv_heads == 0 || p.head_dim == 0 || forward.pages.block_size() == 0 {
        return;
    }
    match Kernels::of(simd) {
        Some(kernels) => run(team, kernels, p, forward, grads),
        None => portable::attention_backward(team, p, forward, grads),
    }
}

/// What the forward pass knew of a row, and `dout · out`.
#[derive(Clone, Copy, Default)]
pub(super) struct Softmax {
    /// Of the exponents of 2.
    minus_max: f32,
    inverse_sum: f32,
    delta: f32,
}

/// What the tasks of one call share.
pub(super) struct Backward<'a> {
    /// Its result is dq.
    call: Call<'a>,
    /// `[tokens, heads · dim]`.
    out: &'a [f32],
    dout: &'a [f32],
    /// `[tokens, heads]`.
    rows: SendPtr<Softmax>,
    /// The gradient pages.
    dkeys: SendPtr<f32>,
    dvalues: SendPtr<f32>,
}

impl Backward<'_> {
    /// # Safety
    /// No other task reads or writes the row meanwhile, unless all of them read.
    unsafe fn softmax(&self, row: usize, head: usize) -> *mut Softmax {
        debug_assert!(row < self.call.p.tokens as usize && head < self.call.p.heads as usize);
        // SAFETY: `[tokens, heads]`, and `Call::sequence` checked the rows.
        unsafe { self.rows.get().add(row * self.call.p.heads as usize + head) }
    }

    /// New tokens of a tile of queries.
    fn step(&self) -> usize {
        (ROWS / self.call.group).max(1)
    }
}

/// A part of the call that one thread computes, for one sequence and kv head.
#[derive(Clone)]
pub(super) struct Part {
    sequence: usize,
    kv_head: usize,
    /// Of the sequence's new tokens; begins at a tile of queries.
    tokens: Range<usize>,
    /// Of the sequence's keys; begins at a tile of keys.
    keys: Range<usize>,
    dq: bool,
    dkv: bool,
    multiplications: usize,
}

/// Products of a token and a key that it sees.
fn pairs(call: &Call, sequence: &Sequence, tokens: Range<usize>, keys: &Range<usize>) -> usize {
    let seen = |token: usize| {
        let at = sequence.at + token;
        (at + 1).min(keys.end).saturating_sub(call.first_key(at).max(keys.start))
    };
    tokens.map(seen).sum()
}

fn run(
    team: &mut Team,
    kernels: Kernels,
    p: AttentionParams,
    forward: &AttentionOperands,
    grads: &AttentionGrads,
) {
    let dim = p.head_dim as usize;
    let call = Call {
        p,
        dim,
        group: (p.heads / p.kv_heads) as usize,
        wide: dim.next_multiple_of(kernels.lanes),
        q: forward.q.host(),
        cu_q: forward.cu_q.host(),
        context: forward.context.host(),
        tables: forward.block_tables.host(),
        pages: &forward.pages,
        out: SendPtr(grads.dq.host_mut::<f32>().as_mut_ptr()),
    };
    let mut rows = vec![Softmax::default(); (p.tokens * p.heads) as usize];
    let backward = Backward {
        call,
        out: forward.out.host(),
        dout: grads.dout.host(),
        rows: SendPtr(rows.as_mut_ptr()),
        dkeys: SendPtr(grads.dkv.keys.host_mut::<f32>().as_mut_ptr()),
        dvalues: SendPtr(grads.dkv.values.host_mut::<f32>().as_mut_ptr()),
    };
    let least = WORTH_SHARING * kernels.lanes;
    let all = 0..p.sequences as usize;
    let measured = all.clone().flat_map(|s| tiles_of_queries(&backward, s, 1)).collect();
    // SAFETY: `Kernels::of` was asked for a level this CPU has; tasks have rows of their own.
    work_off(team, measured, least, |part, scratch| unsafe { (kernels.measure)(&backward, part, scratch) });
    for wave in waves(&backward.call, all) {
        let parts = cut(&backward, wave, team.threads());
        // SAFETY: as above; tasks have elements of dq, dK and dV of their own: sequences of a wave share no block.
        work_off(team, parts, least, |part, scratch| unsafe {
            (kernels.differentiate)(&backward, part, scratch)
        });
    }
}

fn work_off(team: &mut Team, mut parts: Vec<Part>, least: usize, job: impl Fn(&Part, &mut Scratch) + Sync) {
    parts.sort_by_key(|part| Reverse(part.multiplications));
    let job = |index: usize| SCRATCH.with_borrow_mut(|scratch| job(&parts[index], scratch));
    if parts.iter().map(|part| part.multiplications).sum::<usize>() < least {
        (0..parts.len()).for_each(job);
    } else {
        team.run(parts.len(), &job);
    }
}

/// Sequences in runs that have no block in common: prompts may share their beginning, whose gradients are then added
/// one sequence after the other.
fn waves(call: &Call, all: Range<usize>) -> Vec<Range<usize>> {
    let (mut waves, mut start, mut taken) = (Vec::new(), all.start, HashSet::<u32>::new());
    for s in all.clone() {
        let sequence = call.sequence(s);
        if sequence.tokens == 0 {
            continue;
        }
        let (size, last) = (call.pages.block_size(), sequence.at + sequence.tokens - 1);
        let blocks = &sequence.table[call.first_key(sequence.at) / size..=last / size];
        if blocks.iter().any(|block| taken.contains(block)) {
            waves.push(start..s);
            (start, taken) = (s, HashSet::new());
        }
        taken.extend(blocks);
    }
    waves.push(start..all.end);
    waves
}

/// Tasks for dq, or for the rows' softmax: `products` per pair of row and key.
fn tiles_of_queries(backward: &Backward, s: usize, products: usize) -> Vec<Part> {
    let call = &backward.call;
    let sequence = call.sequence(s);
    let end = sequence.at + sequence.tokens;
    let mut parts = Vec::new();
    for from in (0..sequence.tokens).step_by(backward.step()) {
        let tokens = from..(from + backward.step()).min(sequence.tokens);
        let multiplications =
            products * pairs(call, &sequence, tokens.clone(), &(0..end)) * call.group * call.dim;
        for kv_head in 0..call.p.kv_heads as usize {
            let (tokens, keys) = (tokens.clone(), 0..end);
            parts.push(Part { sequence: s, kv_head, tokens, keys, dq: true, dkv: false, multiplications });
        }
    }
    parts
}

/// Tasks for all gradients of a wave of sequences.
fn cut(backward: &Backward, wave: Range<usize>, threads: usize) -> Vec<Part> {
    let call = &backward.call;
    let kv_heads = call.p.kv_heads as usize;
    let mut whole = Vec::new();
    for s in wave.clone() {
        let sequence = call.sequence(s);
        let end = sequence.at + sequence.tokens;
        let multiplications =
            5 * pairs(call, &sequence, 0..sequence.tokens, &(0..end)) * call.group * call.dim;
        for kv_head in 0..kv_heads {
            let (tokens, keys) = (0..sequence.tokens, 0..end);
            whole.push(Part { sequence: s, kv_head, tokens, keys, dq: true, dkv: true, multiplications });
        }
    }
    // In two passes there are seven products (and two scores) in place of five: a third more.
    let total: usize = whole.iter().map(|part| part.multiplications).sum();
    let longest = whole.iter().map(|part| part.multiplications).max().unwrap_or(0);
    if longest * threads <= total / 3 * 4 {
        return whole;
    }
    let tiles: usize = whole.iter().map(|part| part.keys.end.div_ceil(KEYS)).sum();
    let step = (tiles / (4 * threads)).clamp(1, 8) * KEYS;
    let mut parts = Vec::new();
    for s in wave {
        parts.extend(tiles_of_queries(backward, s, 3));
        let sequence = call.sequence(s);
        let end = sequence.at + sequence.tokens;
        for from in (0..end).step_by(step) {
            let (tokens, keys) = (0..sequence.tokens, from..(from + step).min(end));
            let multiplications = 4 * pairs(call, &sequence, tokens.clone(), &keys) * call.group * call.dim;
            if multiplications == 0 {
                continue;
            }
            for kv_head in 0..kv_heads {
                let (tokens, keys) = (tokens.clone(), keys.clone());
                parts.push(Part {
                    sequence: s,
                    kv_head,
                    tokens,
                    keys,
                    dq: false,
                    dkv: true,
                    multiplications,
                });
            }
        }
    }
    parts
}
