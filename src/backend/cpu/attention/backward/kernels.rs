//! The tiles of the backward pass, on the layouts and the block of registers of [`super::super::prefill`]:
//!
//! ```text
//! Sᵀ[key][row]  = Σ_d K[key][d] · Qᵀ[d][row]          dPᵀ[key][row] = Σ_d V[key][d] · dOᵀ[d][row]
//! dqᵀ[d][row]  += Σ_key K[key][d] · dSᵀ[key][row]
//! dK[key][d]   += Σ_row dSᵀ[key][row] · Q[row][d]     dV[key][d]    += Σ_row Pᵀ[key][row] · dO[row][d]
//! ```
//!
//! In the last line the elements of a vector lie across the lanes, in the others the rows.

// Blocks of registers are indexed alike, row and column.
#![allow(clippy::needless_range_loop)]

use super::{
    super::{
        super::pointwise_backward::sum_of,
        Call, Exponent, Scratch, Sequence,
        prefill::{BLOCK, KEYS, PANEL, Panel, Sight, Tile, pack, product, weigh},
        vector::{Vector, tanh},
    },
    Backward, Part, Softmax,
};
use crate::backend::DType;
use half::bf16;
use std::ops::Range;

/// The rows of some new tokens: one head's query of one token each, token by token.
struct Rows<'a> {
    call: &'a Call<'a>,
    sequence: Sequence<'a>,
    kv_head: usize,
    tokens: Range<usize>,
}

impl Rows<'_> {
    fn len(&self) -> usize {
        self.tokens.len() * self.call.group
    }

    /// Row of q and out, and head.
    fn row_of(&self, r: usize) -> (usize, usize) {
        let group = self.call.group;
        (self.sequence.row + self.tokens.start + r / group, self.kv_head * group + r % group)
    }

    /// Index of its own key; lanes without a row repeat the last one.
    fn key_of(&self, r: usize) -> usize {
        self.sequence.at + self.tokens.start + r.min(self.len() - 1) / self.call.group
    }

    fn query(&self, r: usize) -> &[f32] {
        let (row, head) = self.row_of(r);
        self.call.query(row, head)
    }

    /// Of a tensor `[tokens, heads · dim]`.
    fn of<'t>(&self, tensor: &'t [f32], r: usize) -> &'t [f32] {
        let ((row, head), call) = (self.row_of(r), self.call);
        &tensor[(row * call.p.heads as usize + head) * call.dim..][..call.dim]
    }

    /// Keys that any row sees.
    fn seen(&self) -> Range<usize> {
        let at = self.sequence.at;
        self.call.first_key(at + self.tokens.start)..at + self.tokens.end
    }

    /// Rows that see any of `keys`.
    fn seeing(&self, keys: Range<usize>) -> Range<usize> {
        let own = |key: usize| key.saturating_sub(self.sequence.at);
        let from = own(keys.start).max(self.tokens.start);
        let to = match self.call.p.window as usize {
            0 => self.tokens.end,
            // The last token to see the last key.
            window => (keys.end - 1 + window).saturating_sub(self.sequence.at).min(self.tokens.end),
        };
        let row = |token: usize| (token - self.tokens.start) * self.call.group;
        if from < to { row(from)..row(to) } else { 0..0 }
    }
}

impl Tile<'_> {
    /// [`Tile::stage`] of either dtype.
    ///
    /// # Safety
    /// As of [`Vector`].
    #[inline(always)]
    unsafe fn read<V: Vector>(&mut self, rows: &Rows, start: usize, seen: [usize; 2]) {
        match self.call.pages.keys.dtype() {
            // SAFETY: the caller's promise.
            DType::Bf16 => unsafe { self.stage::<V, bf16>(&rows.sequence, rows.kv_head, start, seen) },
            // SAFETY: the caller's promise.
            _ => unsafe { self.stage::<V, f32>(&rows.sequence, rows.kv_head, start, seen) },
        }
    }
}

/// Maximum and sum of the softmax of each row, and `dout · out`.
///
/// # Safety
/// As of [`Vector`]; no other task has the rows of this one's tokens and heads.
#[inline(always)]
pub(in super::super) unsafe fn measure<V: Vector>(backward: &Backward, part: &Part, scratch: &mut Scratch) {
    let call = &backward.call;
    let sequence = call.sequence(part.sequence);
    let rows = Rows { call, sequence, kv_head: part.kv_head, tokens: part.tokens.clone() };
    let registers = rows.len().div_ceil(V::LANES);
    let padded = registers * V::LANES;
    let stride = call.dim.next_multiple_of(4);
    let tile = KEYS * stride;
    let [keys, values, scores, q, max, sum] =
        scratch.pieces([tile, tile, KEYS * PANEL * V::LANES, padded * call.dim, padded, padded]);
    let exponent = call.exponent();
    // Finite, so that nothing minus it is NaN.
    max.fill(f32::MIN);
    sum.fill(0.0);
    // SAFETY: a query has dim elements.
    unsafe { pack::<V>(call.dim, rows.len(), |r| rows.query(r).as_ptr(), q) };
    let mut tile = Tile { call, stride, keys, values, scores };
    let seen = rows.seen();
    for start in (seen.start / KEYS * KEYS..seen.end).step_by(KEYS) {
        // SAFETY: the caller's promise.
        unsafe { tile.read::<V>(&rows, start, [start.max(seen.start), (start + KEYS).min(seen.end)]) };
        for at in (0..registers).step_by(PANEL) {
            let (count, lane) = (PANEL.min(registers - at), at * V::LANES);
            let panel = Panel {
                q: q[lane * call.dim..].as_ptr(),
                max: max[lane..].as_mut_ptr(),
                sum: sum[lane..].as_mut_ptr(),
            };
            let sight = Sight::new(call, start, lane, count * V::LANES, |r| rows.key_of(r));
            let Some(sight) = sight else { continue };
            // SAFETY: the caller's promise; the panel's pieces have the lengths its fields name.
            unsafe {
                match count {
                    1 => {
                        tile.soften::<V, 1>(&panel, &sight, exponent);
                    }
                    _ => {
                        tile.soften::<V, PANEL>(&panel, &sight, exponent);
                    }
                }
            }
        }
    }
    for r in 0..rows.len() {
        let (row, head) = rows.row_of(r);
        let delta = sum_of(rows.of(backward.dout, r), rows.of(backward.out, r), |a, b| a * b);
        // SAFETY: the row is this task's.
        unsafe {
            *backward.softmax(row, head) = Softmax { minus_max: -max[r], inverse_sum: 1.0 / sum[r], delta };
        }
    }
}

/// A tile of queries and what belongs to it.
struct Queries<'a> {
    rows: &'a Rows<'a>,
    /// Rows rounded up to whole registers.
    padded: usize,
    /// `[dim][rows]`, panel after panel.
    q: &'a mut [f32],
    dout: &'a mut [f32],
    /// `[rows][wide]`, where dK and dV are wanted.
    q_rows: &'a mut [f32],
    dout_rows: &'a mut [f32],
    /// `[stride][rows]`, panel after panel.
    dq: &'a mut [f32],
    /// `[rows]` each.
    minus_max: &'a mut [f32],
    inverse_sum: &'a mut [f32],
    minus_delta: &'a mut [f32],
    /// `[KEYS][rows]`: the weights, and the gradients of the products of query and key.
    p: &'a mut [f32],
    ds: &'a mut [f32],
}

/// The gradients that a part asks for.
///
/// # Safety
/// As of [`Vector`]; no other task has the dq of this one's tokens and heads, or dK and dV of its keys, if it asks for those.
#[inline(always)]
pub(in super::super) unsafe fn differentiate<V: Vector>(
    backward: &Backward,
    part: &Part,
    scratch: &mut Scratch,
) {
    let call = &backward.call;
    let (dim, wide, stride) = (call.dim, call.wide, call.dim.next_multiple_of(4));
    let exponent = call.exponent();
    let step = backward.step();
    for from in part.tokens.clone().step_by(step) {
        let sequence = call.sequence(part.sequence);
        let tokens = from..(from + step).min(part.tokens.end);
        let rows = &Rows { call, sequence, kv_head: part.kv_head, tokens };
        let seen = rows.seen();
        let seen = seen.start.max(part.keys.start)..seen.end.min(part.keys.end);
        if seen.is_empty() {
            continue;
        }
        let registers = rows.len().div_ceil(V::LANES);
        let padded = registers * V::LANES;
        let by_rows = if part.dkv { rows.len() * wide } else { 0 };
        let [keys, values, q, dout, q_rows, dout_rows, dq, minus_max, inverse_sum, minus_delta, p, ds] =
            scratch.pieces([
                KEYS * stride,
                KEYS * stride,
                padded * dim,
                padded * dim,
                by_rows,
                by_rows,
                padded * stride,
                padded,
                padded,
                padded,
                KEYS * padded,
                KEYS * padded,
            ]);
        let mut queries = Queries {
            rows,
            padded,
            q,
            dout,
            q_rows,
            dout_rows,
            dq,
            minus_max,
            inverse_sum,
            minus_delta,
            p,
            ds,
        };
        queries.fill::<V>(backward, part.dkv);
        let mut tile = Tile { call, stride, keys, values, scores: &mut [] };
        for start in (seen.start / KEYS * KEYS..seen.end).step_by(KEYS) {
            let now = start.max(seen.start)..(start + KEYS).min(seen.end);
            // SAFETY: the caller's promise.
            unsafe { tile.read::<V>(rows, start, [now.start, now.end]) };
            for at in (0..registers).step_by(PANEL) {
                let (count, lane) = (PANEL.min(registers - at), at * V::LANES);
                let sight = Sight::new(call, start, lane, count * V::LANES, |r| rows.key_of(r));
                let Some(sight) = sight else { continue };
                // SAFETY: the caller's promise.
                unsafe {
                    match count {
                        1 => queries.panel::<V, 1>(&tile, lane, &sight, exponent, part.dq),
                        _ => queries.panel::<V, PANEL>(&tile, lane, &sight, exponent, part.dq),
                    }
                }
            }
            if part.dkv {
                // SAFETY: the caller's promise.
                unsafe { queries.add_keys::<V>(backward, start, now) };
            }
        }
        if part.dq {
            queries.write::<V>(stride);
        }
    }
}

impl Queries<'_> {
    #[inline(always)]
    fn fill<V: Vector>(&mut self, backward: &Backward, by_rows: bool) {
        let (rows, dim, wide) = (self.rows, self.rows.call.dim, self.rows.call.wide);
        // SAFETY: both have dim elements per row.
        unsafe {
            pack::<V>(dim, rows.len(), |r| rows.query(r).as_ptr(), self.q);
            pack::<V>(dim, rows.len(), |r| rows.of(backward.dout, r).as_ptr(), self.dout);
        }
        self.dq.fill(0.0);
        for r in 0..self.padded {
            let (row, head) = rows.row_of(r.min(rows.len() - 1));
            // SAFETY: measured before, and only read now.
            let softmax = unsafe { *backward.softmax(row, head) };
            self.minus_max[r] = softmax.minus_max;
            self.inverse_sum[r] = softmax.inverse_sum;
            self.minus_delta[r] = -softmax.delta;
        }
        if by_rows {
            for r in 0..rows.len() {
                for (to, from) in
                    [(&mut *self.q_rows, rows.query(r)), (&mut *self.dout_rows, rows.of(backward.dout, r))]
                {
                    let to = &mut to[r * wide..(r + 1) * wide];
                    to[..dim].copy_from_slice(from);
                    to[dim..].fill(0.0);
                }
            }
        }
    }

    /// Weights and their gradients for a panel of rows from `lane` and the keys it sees, and what they add to dq.
    ///
    /// # Safety
    /// As of [`Vector`].
    #[inline(always)]
    unsafe fn panel<V: Vector, const N: usize>(
        &mut self,
        tile: &Tile,
        lane: usize,
        sight: &Sight,
        exponent: Exponent,
        with_dq: bool,
    ) {
        let (call, stride, padded, width) = (self.rows.call, tile.stride, self.padded, N * V::LANES);
        let (keys, values) = (tile.keys.as_ptr(), tile.values.as_ptr());
        let (q, dout) = (self.q[lane * call.dim..].as_ptr(), self.dout[lane * call.dim..].as_ptr());
        let (p, ds) = (self.p[lane..].as_mut_ptr(), self.ds[lane..].as_mut_ptr());
        let (minus_max, inverse_sum) = (self.minus_max[lane..].as_ptr(), self.inverse_sum[lane..].as_ptr());
        let minus_delta = self.minus_delta[lane..].as_ptr();
        // SAFETY: the caller's promise; the pieces have the lengths their fields name.
        unsafe {
            let outer = V::splat(exponent.outer);
            let mut key = sight.from;
            while key < sight.to {
                let mut s = product::<V, BLOCK, N>(keys.add(key * stride), stride, 1, q, width, call.dim);
                if let Some(inner) = exponent.inner {
                    for i in 0..BLOCK {
                        for j in 0..N {
                            s[i][j] = tanh(s[i][j].mul(V::splat(inner)));
                            // The derivative of the cap waits where it will be used.
                            let square = s[i][j].mul(V::splat(-1.0)).mul_add(s[i][j], V::splat(1.0));
                            square.store(ds.add((key + i) * padded + j * V::LANES));
                        }
                    }
                }
                if let Some([from, to]) = &sight.bounds {
                    for i in 0..BLOCK {
                        for j in 0..N {
                            let from = V::load(from.as_ptr().add(j * V::LANES));
                            let to = V::load(to.as_ptr().add(j * V::LANES));
                            s[i][j] = s[i][j].keep_within(V::splat((key + i) as f32), from, to);
                        }
                    }
                }
                for i in 0..BLOCK {
                    for j in 0..N {
                        let at = j * V::LANES;
                        let weight = s[i][j].mul_add(outer, V::load(minus_max.add(at))).exp2();
                        weight.mul(V::load(inverse_sum.add(at))).store(p.add((key + i) * padded + at));
                    }
                }
                let dp = product::<V, BLOCK, N>(values.add(key * stride), stride, 1, dout, width, call.dim);
                for i in 0..BLOCK {
                    for j in 0..N {
                        let at = (key + i) * padded + j * V::LANES;
                        let mut slope = V::splat(call.p.scale);
                        if exponent.inner.is_some() {
                            slope = slope.mul(V::load(ds.add(at)));
                        }
                        let difference = dp[i][j].add(V::load(minus_delta.add(j * V::LANES)));
                        V::load(p.add(at)).mul(difference).mul(slope).store(ds.add(at));
                    }
                }
                key += BLOCK;
            }
            if with_dq {
                let (keys, ds) = (keys.add(sight.from * stride), ds.add(sight.from * padded));
                let dq = self.dq[lane * stride..].as_mut_ptr();
                weigh::<V, N>(keys, stride, ds, padded, sight.to - sight.from, [V::splat(1.0); N], dq);
            }
        }
    }

    /// Adds to dK and dV of the keys `now`, which lie in the tile at `start`.
    ///
    /// # Safety
    /// As of [`Vector`]; no other task has these keys.
    #[inline(always)]
    unsafe fn add_keys<V: Vector>(&self, backward: &Backward, start: usize, now: Range<usize>) {
        let (rows, wide) = (self.rows, self.rows.call.wide);
        let mut all = [0; KEYS];
        let offsets = &mut all[now.start - start..now.end - start];
        rows.call.page_offsets(&rows.sequence, rows.kv_head, now.start, offsets);
        for block in (0..KEYS).step_by(BLOCK) {
            let keys = (start + block).max(now.start)..(start + block + BLOCK).min(now.end);
            if keys.is_empty() {
                continue;
            }
            let seeing = rows.seeing(keys.clone());
            let (first, count) = (keys.start - start - block, keys.len());
            let mut offsets = [None; BLOCK];
            for (i, offset) in offsets.iter_mut().enumerate().skip(first).take(count) {
                *offset = Some(all[block + i]);
            }
            let at = block * self.padded + seeing.start;
            for (weights, vectors, grads) in [
                (&self.ds[at..], &self.q_rows, backward.dkeys),
                (&self.p[at..], &self.dout_rows, backward.dvalues),
            ] {
                let vectors = vectors[seeing.start * wide..].as_ptr();
                let mut d = 0;
                // SAFETY: the caller's promise; `page_offsets` are in bounds of the gradient's pages too, which are as many.
                unsafe {
                    while d + PANEL * V::LANES <= wide {
                        let (weights, vectors) = (weights.as_ptr(), vectors.add(d));
                        self.add_elements::<V, PANEL>(
                            weights,
                            vectors,
                            seeing.len(),
                            &offsets,
                            grads.get(),
                            d,
                        );
                        d += PANEL * V::LANES;
                    }
                    while d < wide {
                        let (weights, vectors) = (weights.as_ptr(), vectors.add(d));
                        self.add_elements::<V, 1>(weights, vectors, seeing.len(), &offsets, grads.get(), d);
                        d += V::LANES;
                    }
                }
            }
        }
    }

    /// N registers of the vectors of a block of keys, from element `d`.
    ///
    /// # Safety
    /// As of [`Queries::add_keys`].
    #[inline(always)]
    unsafe fn add_elements<V: Vector, const N: usize>(
        &self,
        weights: *const f32,
        vectors: *const f32,
        count: usize,
        offsets: &[Option<usize>; BLOCK],
        grads: *mut f32,
        d: usize,
    ) {
        let (dim, wide) = (self.rows.call.dim, self.rows.call.wide);
        // SAFETY: the caller's promise; `d` is an element of the vectors.
        unsafe {
            let sums = product::<V, BLOCK, N>(weights, self.padded, 1, vectors, wide, count);
            for i in 0..BLOCK {
                let Some(offset) = offsets[i] else { continue };
                for j in 0..N {
                    let d = d + j * V::LANES;
                    let to = grads.add(offset + d);
                    if d + V::LANES <= dim {
                        V::load(to).add(sums[i][j]).store(to);
                    } else {
                        let mut lanes = [0.0; 16];
                        sums[i][j].store(lanes.as_mut_ptr());
                        for (k, lane) in lanes.iter().enumerate().take(dim - d) {
                            *to.add(k) += lane;
                        }
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn write<V: Vector>(&self, stride: usize) {
        let rows = self.rows;
        for r in 0..rows.len() {
            let lane = r / (PANEL * V::LANES) * PANEL * V::LANES;
            let width = (PANEL * V::LANES).min(self.padded - lane);
            let (row, head) = rows.row_of(r);
            let to = rows.call.result(row, head);
            let steps = self.dq[lane * stride + r - lane..].chunks(width);
            for (d, step) in steps.take(rows.call.dim).enumerate() {
                // SAFETY: dq has dim elements per row and head, which are this task's alone.
                unsafe { *to.add(d) = step[0] }
            }
        }
    }
}
