//! Many queries at a time, as in FlashAttention: for each tile of keys, products, softmax and sums of all rows of the
//! task, with a running maximum and sum per row; the full score matrix never exists.
//!
//! A *row* is one head's query of one new token; the rows of all heads that share the kv head stack up, token by
//! token. Rows lie across the lanes of registers, so that maximum, exponential and sum need no shuffles, and keys and
//! values are read as they are, one element for all lanes:
//!
//! ```text
//! Sᵀ[key][row] = Σ_d K[key][d] · Qᵀ[d][row]        Oᵀ[d][row] = Σ_key V[key][d] · Pᵀ[key][row]
//! ```
//!
//! One or two registers of rows make a *panel*; a 6 × 2 block of sums fills the register file of AVX2, with no spill. A
//! row's numbers don't depend on the rows beside it: a key that it doesn't see adds exactly 0.

// Blocks of registers are indexed alike, row and column.
#![allow(clippy::needless_range_loop)]

use super::{
    Call, Exponent, Scratch, Sequence, page_ptr,
    plan::Task,
    vector::{PageElement, Vector, tanh},
    widen_row,
};
use crate::backend::{DType, cpu::Element};
use half::bf16;

/// Keys in a tile. Tiles begin at multiples of it.
pub(super) const KEYS: usize = 48;

/// Keys whose scores are held in registers together. Divides [`KEYS`].
pub(super) const BLOCK: usize = 6;

/// Registers of rows in a panel, at most.
pub(super) const PANEL: usize = 2;

/// The working memory of a task.
pub(super) struct Tile<'a> {
    pub call: &'a Call<'a>,
    /// Of a key or value in `keys`, `values`: `dim` rounded up to a multiple of 4.
    pub stride: usize,
    /// `[KEYS][stride]`.
    pub keys: &'a mut [f32],
    pub values: &'a mut [f32],
    /// One panel's `[KEYS][rows]`: scores, then their exponentials.
    pub scores: &'a mut [f32],
}

/// One panel's part of the task's memory.
pub(super) struct Panel {
    /// `[dim][rows]`.
    pub q: *const f32,
    /// `[rows]` each.
    pub max: *mut f32,
    pub sum: *mut f32,
}

/// Which keys of a tile a panel sees: `from..to`, and the first and last for each row where they differ.
pub(super) struct Sight {
    pub from: usize,
    pub to: usize,
    pub bounds: Option<[[f32; PANEL * 16]; 2]>,
}

/// # Safety
/// As of [`Vector`]; no other task writes the results of this one's tokens and heads.
#[inline(always)]
pub(super) unsafe fn prefill<V: Vector>(call: &Call, task: &Task, scratch: &mut Scratch) {
    let sequence = call.sequence(task.sequence);
    let rows = (task.to - task.from) * call.group;
    let registers = rows.div_ceil(V::LANES);
    let padded = registers * V::LANES;
    let stride = call.dim.next_multiple_of(4);
    let lens = [
        KEYS * stride,
        KEYS * stride,
        KEYS * PANEL * V::LANES,
        padded * call.dim,
        padded * stride,
        padded,
        padded,
    ];
    let [keys, values, scores, q, out, max, sum] = scratch.pieces(lens);
    let exponent = call.exponent();
    out.fill(0.0);
    // Finite, so that nothing minus it is NaN.
    max.fill(f32::MIN);
    sum.fill(0.0);
    let query = |r: usize| {
        let (token, head) = row_of(call, task, &sequence, r);
        call.query(token, head).as_ptr()
    };
    // SAFETY: a query has dim elements.
    unsafe { pack::<V>(call.dim, rows, query, q) };

    let mut tile = Tile { call, stride, keys, values, scores };
    let first = call.first_key(sequence.at + task.from);
    let end = sequence.at + task.to;
    for start in (first / KEYS * KEYS..end).step_by(KEYS) {
        let seen = [start.max(first), (start + KEYS).min(end)];
        match call.pages.keys.dtype() {
            // SAFETY: the caller's promise.
            DType::Bf16 => unsafe { tile.stage::<V, bf16>(&sequence, task.kv_head, start, seen) },
            // SAFETY: the caller's promise.
            _ => unsafe { tile.stage::<V, f32>(&sequence, task.kv_head, start, seen) },
        }
        let mut at = 0;
        while at < registers {
            let count = PANEL.min(registers - at);
            let lane = at * V::LANES;
            let panel = Panel {
                q: q[lane * call.dim..].as_ptr(),
                max: max[lane..].as_mut_ptr(),
                sum: sum[lane..].as_mut_ptr(),
            };
            let token = |r: usize| sequence.at + task.from + r.min(rows - 1) / call.group;
            if let Some(sight) = Sight::new(call, start, lane, count * V::LANES, token) {
                let out = out[lane * stride..].as_mut_ptr();
                // SAFETY: the caller's promise; the panel's pieces have the lengths its fields name, out `[stride][rows]`.
                unsafe {
                    match count {
                        1 => tile.attend::<V, 1>(&panel, &sight, exponent, out),
                        _ => tile.attend::<V, PANEL>(&panel, &sight, exponent, out),
                    }
                }
            }
            at += count;
        }
    }

    for r in 0..rows {
        let lane = r / (PANEL * V::LANES) * PANEL * V::LANES;
        let width = (PANEL * V::LANES).min(padded - lane);
        let (token, head) = row_of(call, task, &sequence, r);
        let scale = 1.0 / sum[r];
        let result = call.result(token, head);
        for (d, step) in out[lane * stride + r - lane..].chunks(width).take(call.dim).enumerate() {
            // + 0 so that no sum is −0 for one way of tiling and +0 for another.
            // SAFETY: the result has dim elements, which are this task's alone.
            unsafe { *result.add(d) = step[0] * scale + 0.0 }
        }
    }
}

/// Row of q and out, and head, of a row of the task.
fn row_of(call: &Call, task: &Task, sequence: &Sequence, r: usize) -> (usize, usize) {
    (sequence.row + task.from + r / call.group, task.kv_head * call.group + r % call.group)
}

/// Vectors of the task's rows, panel after panel `[dim][rows]`. Lanes without a row of their own repeat the last one.
///
/// # Safety
/// `row` gives where a row's vector of dim elements lies.
#[inline(always)]
pub(super) unsafe fn pack<V: Vector>(
    dim: usize,
    rows: usize,
    row: impl Fn(usize) -> *const f32,
    packed: &mut [f32],
) {
    for (p, panel) in packed.chunks_mut(PANEL * V::LANES * dim).enumerate() {
        let width = panel.len() / dim;
        for register in (0..width).step_by(V::LANES) {
            let mut lanes = [std::ptr::null(); 16];
            for (lane, from) in lanes.iter_mut().enumerate().take(V::LANES) {
                *from = row((p * PANEL * V::LANES + register + lane).min(rows - 1));
            }
            for (d, step) in panel.chunks_exact_mut(width).enumerate() {
                let to = &mut step[register..][..V::LANES];
                for lane in 0..V::LANES {
                    // SAFETY: the caller's promise.
                    to[lane] = unsafe { *lanes[lane].add(d) };
                }
            }
        }
    }
}

impl Sight {
    /// `None` if the panel of `width` rows from `lane` sees nothing of the tile at `start`. `at` = a row's own key.
    #[inline(always)]
    pub fn new(
        call: &Call,
        start: usize,
        lane: usize,
        width: usize,
        at: impl Fn(usize) -> usize,
    ) -> Option<Sight> {
        let (first, last) = (at(lane), at(lane + width - 1));
        let (seen_from, seen_to) = (call.first_key(first).max(start), (last + 1).min(start + KEYS));
        if seen_from >= seen_to {
            return None;
        }
        let from = (seen_from - start) / BLOCK * BLOCK;
        let to = (seen_to - start).next_multiple_of(BLOCK);
        let mut sight = Sight { from, to, bounds: None };
        if first + 1 < start + to || call.first_key(last) > start + from {
            let [mut from, mut to] = [[0.0; PANEL * 16]; 2];
            let relative = |key: usize| (key as isize - start as isize) as f32;
            for r in 0..width {
                from[r] = relative(call.first_key(at(lane + r)));
                to[r] = relative(at(lane + r));
            }
            sight.bounds = Some([from, to]);
        }
        Some(sight)
    }
}

impl Tile<'_> {
    /// Reads keys and values `from..to` of a sequence, the tile beginning at `start`. The rest of the tile becomes 0:
    /// slots not yet written may hold anything, NaN included.
    #[inline(always)]
    pub unsafe fn stage<V: Vector, T: PageElement + Element>(
        &mut self,
        sequence: &Sequence,
        kv_head: usize,
        start: usize,
        [from, to]: [usize; 2],
    ) {
        let mut offsets = [0; KEYS];
        let offsets = &mut offsets[..to - from];
        self.call.page_offsets(sequence, kv_head, from, offsets);
        for (pages, staged) in
            [(&self.call.pages.keys, &mut *self.keys), (&self.call.pages.values, &mut *self.values)]
        {
            let base = page_ptr::<T>(pages);
            let (before, after) = ((from - start) * self.stride, (to - start) * self.stride);
            staged[..before].fill(0.0);
            staged[after..].fill(0.0);
            for (&offset, row) in offsets.iter().zip(staged[before..after].chunks_exact_mut(self.stride)) {
                if self.call.dim < self.stride {
                    row[self.call.dim..].fill(0.0);
                }
                // SAFETY: the caller's promise; `page_offsets` are in bounds; the row has at least dim elements.
                unsafe { widen_row::<V, T>(base.add(offset), self.call.dim, row.as_mut_ptr()) }
            }
        }
    }

    /// Takes the tile's keys and values into the panel's running results.
    #[inline(always)]
    unsafe fn attend<V: Vector, const N: usize>(
        &mut self,
        panel: &Panel,
        sight: &Sight,
        exponent: Exponent,
        out: *mut f32,
    ) {
        let (stride, width) = (self.stride, N * V::LANES);
        // SAFETY: the caller's promise.
        unsafe {
            let shrink = self.soften::<V, N>(panel, sight, exponent);
            let values = self.values.as_ptr().add(sight.from * stride);
            let scores = self.scores.as_ptr().add(sight.from * width);
            weigh::<V, N>(values, stride, scores, width, sight.to - sight.from, shrink, out);
        }
    }

    /// Scores of the tile's keys and their exponentials, and the panel's running maximum and sum; returns what earlier
    /// exponentials are to be multiplied by.
    #[inline(always)]
    pub unsafe fn soften<V: Vector, const N: usize>(
        &mut self,
        panel: &Panel,
        sight: &Sight,
        exponent: Exponent,
    ) -> [V; N] {
        let (dim, stride, width) = (self.call.dim, self.stride, N * V::LANES);
        let (keys, scores) = (self.keys.as_ptr(), self.scores.as_mut_ptr());
        // SAFETY: the caller's promise; `scores` holds KEYS × PANEL registers, keys KEYS × stride.
        unsafe {
            let mut largest = [V::splat(f32::NEG_INFINITY); N];
            let mut key = sight.from;
            while key < sight.to {
                let mut s = product::<V, BLOCK, N>(keys.add(key * stride), stride, 1, panel.q, width, dim);
                if let Some(inner) = exponent.inner {
                    for row in &mut s {
                        for x in row {
                            *x = tanh(x.mul(V::splat(inner)));
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
                        largest[j] = largest[j].max(s[i][j]);
                        s[i][j].store(scores.add((key + i) * width + j * V::LANES));
                    }
                }
                key += BLOCK;
            }

            let outer = V::splat(exponent.outer);
            let mut shrink = [V::splat(0.0); N];
            let mut minus_max = [V::splat(0.0); N];
            let mut sum = [V::splat(0.0); N];
            load::<V, N>(panel.sum, &mut sum);
            for j in 0..N {
                let at = panel.max.add(j * V::LANES);
                let before = V::load(at);
                let max = largest[j].mul(outer).max(before);
                max.store(at);
                minus_max[j] = max.mul(V::splat(-1.0));
                shrink[j] = before.add(minus_max[j]).exp2();
                sum[j] = sum[j].mul(shrink[j]);
            }
            let mut key = sight.from;
            while key < sight.to {
                for j in 0..N {
                    let at = scores.add(key * width + j * V::LANES);
                    let p = V::load(at).mul_add(outer, minus_max[j]).exp2();
                    p.store(at);
                    sum[j] = sum[j].add(p);
                }
                key += 1;
            }
            for j in 0..N {
                sum[j].store(panel.sum.add(j * V::LANES));
            }
            shrink
        }
    }
}

/// `out[d] = out[d] · shrink + Σ_key values[key][d] · scores[key]` for the `stride` elements of each value; `step` elements lie between
/// the scores of two keys.
///
/// # Safety
/// As of [`Vector`]; `values` is valid for `count` rows, `scores` for `count` and `out` for `stride` times N registers.
#[inline(always)]
pub(super) unsafe fn weigh<V: Vector, const N: usize>(
    values: *const f32,
    stride: usize,
    scores: *const f32,
    step: usize,
    count: usize,
    shrink: [V; N],
    out: *mut f32,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut d = 0;
        while d < stride {
            let (values, out) = (values.add(d), out.add(d * N * V::LANES));
            // A multiple of 4 is a sum of sixes and at most two fours.
            if stride - d == 4 || stride - d == 8 {
                weigh_some::<V, 4, N>(values, stride, scores, step, count, shrink, out);
                d += 4;
            } else {
                weigh_some::<V, 6, N>(values, stride, scores, step, count, shrink, out);
                d += 6;
            }
        }
    }
}

/// [`weigh`] for M elements of each value.
///
/// # Safety
/// As of [`weigh`].
#[inline(always)]
unsafe fn weigh_some<V: Vector, const M: usize, const N: usize>(
    values: *const f32,
    stride: usize,
    scores: *const f32,
    step: usize,
    count: usize,
    shrink: [V; N],
    out: *mut f32,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let sums = product::<V, M, N>(values, 1, stride, scores, step, count);
        for i in 0..M {
            for j in 0..N {
                let at = out.add((i * N + j) * V::LANES);
                V::load(at).mul_add(shrink[j], sums[i][j]).store(at);
            }
        }
    }
}

/// # Safety
/// As of [`Vector`]; `from` is valid for N registers.
#[inline(always)]
pub(super) unsafe fn load<V: Vector, const N: usize>(from: *const f32, to: &mut [V; N]) {
    for (j, x) in to.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        *x = unsafe { V::load(from.add(j * V::LANES)) };
    }
}

/// `out[i][lane] = Σ_k a[i · row + k · step] · b[k · across + lane]`, the sum in order of k.
///
/// # Safety
/// As of [`Vector`]; `a` is valid for those indices, `b` for N registers at each of `steps`.
#[inline(always)]
pub(super) unsafe fn product<V: Vector, const M: usize, const N: usize>(
    a: *const f32,
    row: usize,
    step: usize,
    b: *const f32,
    across: usize,
    steps: usize,
) -> [[V; N]; M] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [[V::splat(0.0); N]; M];
        for k in 0..steps {
            let mut lanes = [V::splat(0.0); N];
            load::<V, N>(b.add(k * across), &mut lanes);
            for i in 0..M {
                let x = V::splat(*a.add(i * row + k * step));
                for j in 0..N {
                    sums[i][j] = x.mul_add(lanes[j], sums[i][j]);
                }
            }
        }
        sums
    }
}
