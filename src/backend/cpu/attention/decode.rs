//! One new token against many keys: bound by reading the pages, each key and value once for all heads that share it.
//!
//! A task takes a stretch of a sequence's keys (split-K, as in FlashDecoding) and leaves a *partial result* per row:
//! `[rows][wide]` (a row a query head of the kv head) weighted sums of values, `[rows]` maxima, `[rows]` sums of exponentials. Elements of a head lie across the
//! lanes of registers; up to four rows are worked on together, with as
//! many keys, or registers of a value, as AVX2 has registers for.

// Blocks of registers are indexed alike, row and column.
#![allow(clippy::needless_range_loop)]

use super::{
    Call, Exponent, Scratch, page_ptr,
    plan::{Reduction, Task},
    vector::{PageElement, Vector, tanh},
    widen_row,
};
use crate::backend::{DType, cpu::Element};
use half::bf16;

/// Keys taken into the running result at a time. A multiple of every register's lanes.
const KEYS: usize = 128;

/// Keys between the one worked on and the one asked for from memory.
const AHEAD: usize = 16;

/// Some keys and values in memory.
struct Stretch<'a, T> {
    keys: *const T,
    values: *const T,
    /// Where each begins, relative to both; padded to a multiple of 4 with a copy of a valid one.
    offsets: &'a [usize],
    count: usize,
}

/// The rows of a task.
struct Rows<'a> {
    call: &'a Call<'a>,
    /// `[rows][wide]`, padded with 0.
    q: *const f32,
    /// `[rows][KEYS]`.
    scores: *mut f32,
    /// The running partial result.
    sums: *mut f32,
    max: *mut f32,
    weight: *mut f32,
    exponent: Exponent,
}

/// # Safety
/// As of [`Vector`]; `partial` is valid for the partial result of the task's sequence.
#[inline(always)]
pub(super) unsafe fn decode<V: Vector>(call: &Call, task: &Task, partial: *mut f32, scratch: &mut Scratch) {
    // SAFETY: the caller's promise.
    unsafe {
        match call.pages.keys.dtype() {
            DType::Bf16 => decode_pages::<V, bf16>(call, task, partial, scratch),
            _ => decode_pages::<V, f32>(call, task, partial, scratch),
        }
    }
}

#[inline(always)]
unsafe fn decode_pages<V: Vector, T: PageElement + Element>(
    call: &Call,
    task: &Task,
    partial: *mut f32,
    scratch: &mut Scratch,
) {
    let sequence = call.sequence(task.sequence);
    let (dim, wide, rows) = (call.dim, call.wide, call.group);
    // Rows that don't fill registers are staged in ones that do.
    let staged = if dim == wide { 0 } else { KEYS * wide };
    let [q, scores, keys, values] = scratch.pieces([rows * wide, rows * KEYS, staged, staged]);
    let exponent = call.exponent();
    for (r, q) in q.chunks_exact_mut(wide).enumerate() {
        let query = call.query(sequence.row, task.kv_head * call.group + r);
        q[dim..].fill(0.0);
        q[..dim].copy_from_slice(query);
    }
    keys.fill(0.0);
    values.fill(0.0);
    // SAFETY: the caller's promise: `partial` has rows · (wide + 2) elements.
    let (max, weight) = unsafe { (partial.add(rows * wide), partial.add(rows * (wide + 1))) };
    for i in 0..rows * wide {
        // SAFETY: as above.
        unsafe { *partial.add(i) = 0.0 }
    }
    for r in 0..rows {
        // Finite, so that nothing minus it is NaN.
        // SAFETY: as above.
        unsafe { (*max.add(r), *weight.add(r)) = (f32::MIN, 0.0) }
    }
    let rows_of =
        Rows { call, q: q.as_ptr(), scores: scores.as_mut_ptr(), sums: partial, max, weight, exponent };

    let mut offsets = [0; KEYS];
    for start in (task.from..task.to).step_by(KEYS) {
        let count = KEYS.min(task.to - start);
        call.page_offsets(&sequence, task.kv_head, start, &mut offsets[..count]);
        let padded = count.next_multiple_of(4);
        let valid = offsets[0];
        offsets[count..padded].fill(valid);
        let (k, v) = (page_ptr::<T>(&call.pages.keys), page_ptr::<T>(&call.pages.values));
        // SAFETY: the caller's promise; `page_offsets` are in bounds, staged rows `wide` long.
        unsafe {
            if dim == wide {
                let stretch = Stretch { keys: k, values: v, offsets: &offsets[..padded], count };
                attend::<V, T>(&rows_of, rows, &stretch);
                continue;
            }
            for (i, offset) in offsets[..padded].iter_mut().enumerate() {
                widen_row::<V, T>(k.add(*offset), dim, keys[i * wide..].as_mut_ptr());
                widen_row::<V, T>(v.add(*offset), dim, values[i * wide..].as_mut_ptr());
                *offset = i * wide;
            }
            let (keys, values) = (keys.as_ptr(), values.as_ptr());
            let stretch = Stretch { keys, values, offsets: &offsets[..padded], count };
            attend::<V, f32>(&rows_of, rows, &stretch);
        }
    }
}

#[inline(always)]
unsafe fn attend<V: Vector, T: PageElement>(rows: &Rows, count: usize, stretch: &Stretch<T>) {
    let mut r = 0;
    while r < count {
        // As even as blocks of up to 4 can be.
        let block = (count - r).div_ceil((count - r).div_ceil(4));
        // SAFETY: the caller's promise.
        unsafe {
            match block {
                1 => attend_block::<V, T, 1, 4, 4>(rows, r, stretch),
                2 => attend_block::<V, T, 2, 4, 4>(rows, r, stretch),
                3 => attend_block::<V, T, 3, 2, 3>(rows, r, stretch),
                _ => attend_block::<V, T, 4, 2, 2>(rows, r, stretch),
            }
        }
        r += block;
    }
}

/// Takes a stretch into the running results of rows `first..first + R`, B keys, then C registers of values at a time.
#[inline(always)]
unsafe fn attend_block<V: Vector, T: PageElement, const R: usize, const B: usize, const C: usize>(
    rows: &Rows,
    first: usize,
    stretch: &Stretch<T>,
) {
    let wide = rows.call.wide;
    // SAFETY: the caller's promise: pointers and offsets of `rows` and `stretch` are valid as their fields say.
    unsafe {
        let q = rows.q.add(first * wide);
        let scores = rows.scores.add(first * KEYS);
        let mut key = 0;
        while key < stretch.count {
            let offsets = stretch.offsets.as_ptr().add(key).cast::<[usize; B]>().read();
            if first == 0 {
                let ahead = (key + AHEAD).min(stretch.offsets.len() - B);
                let later = stretch.offsets.as_ptr().add(ahead).cast::<[usize; B]>().read();
                prefetch::<V, T>(stretch.keys, &later, wide);
                prefetch::<V, T>(stretch.values, &offsets, wide);
            }
            let mut sums = [[V::splat(0.0); B]; R];
            let mut d = 0;
            while d < wide {
                let mut k = [V::splat(0.0); B];
                for i in 0..B {
                    k[i] = T::load(stretch.keys.add(offsets[i] + d));
                }
                for r in 0..R {
                    let q = V::load(q.add(r * wide + d));
                    for i in 0..B {
                        sums[r][i] = q.mul_add(k[i], sums[r][i]);
                    }
                }
                d += V::LANES;
            }
            let mut n = 0;
            while n < R * B {
                let mut four = [V::splat(0.0); 4];
                for (i, x) in four.iter_mut().enumerate().take(R * B - n) {
                    *x = sums[(n + i) / B][(n + i) % B];
                }
                for (i, &s) in V::sums(four).iter().enumerate().take(R * B - n) {
                    *scores.add((n + i) / B * KEYS + key + (n + i) % B) = s;
                }
                n += 4;
            }
            key += B;
        }

        let mut shrink = [0.0; R];
        for r in 0..R {
            let (max, weight) = (rows.max.add(first + r), rows.weight.add(first + r));
            shrink[r] = softmax::<V>(scores.add(r * KEYS), stretch.count, rows.exponent, max, weight);
        }

        let sums = rows.sums.add(first * wide);
        let mut d = 0;
        while d < wide {
            let left = (wide - d) / V::LANES;
            let taken = if left >= C { C } else { left.min(2) };
            if taken == C {
                weigh::<V, T, R, C>(stretch, d, scores, sums.add(d), wide, shrink)
            } else if taken == 2 {
                weigh::<V, T, R, 2>(stretch, d, scores, sums.add(d), wide, shrink)
            } else {
                weigh::<V, T, R, 1>(stretch, d, scores, sums.add(d), wide, shrink)
            }
            d += taken * V::LANES;
        }
    }
}

/// Asks for values while keys are being worked on: memory is what decoding waits for.
#[inline(always)]
unsafe fn prefetch<V: Vector, T>(values: *const T, offsets: &[usize], wide: usize) {
    for offset in offsets {
        let mut d = 0;
        while d < wide {
            // SAFETY: the caller's promise: the value is in bounds.
            unsafe { V::prefetch(values.add(offset + d).cast()) };
            d += 64 / size_of::<T>();
        }
    }
}

/// Turns a row's scores into exponentials under its new maximum; returns what its earlier sums shrink by.
#[inline(always)]
unsafe fn softmax<V: Vector>(
    scores: *mut f32,
    count: usize,
    exponent: Exponent,
    max: *mut f32,
    weight: *mut f32,
) -> f32 {
    // SAFETY: the caller's promise: `scores` has KEYS elements, a multiple of the lanes.
    unsafe {
        let end = count.next_multiple_of(V::LANES);
        if let Some(inner) = exponent.inner {
            let mut i = 0;
            while i < end {
                tanh(V::load(scores.add(i)).mul(V::splat(inner))).store(scores.add(i));
                i += V::LANES;
            }
        }
        for i in count..end {
            *scores.add(i) = f32::NEG_INFINITY;
        }
        let mut top = V::splat(f32::NEG_INFINITY);
        let mut i = 0;
        while i < end {
            top = top.max(V::load(scores.add(i)));
            i += V::LANES;
        }
        let before = *max;
        let outer = V::splat(exponent.outer);
        let top = fold::<V>(top.mul(outer), before, f32::max);
        let mut sum = V::splat(0.0);
        let mut i = 0;
        while i < end {
            let p = V::load(scores.add(i)).mul_add(outer, V::splat(-top)).exp2();
            p.store(scores.add(i));
            sum = sum.add(p);
            i += V::LANES;
        }
        let shrink = first_lane(V::splat(before - top).exp2());
        *max = top;
        *weight = *weight * shrink + fold::<V>(sum, 0.0, |a, b| a + b);
        shrink
    }
}

#[inline(always)]
unsafe fn fold<V: Vector>(x: V, start: f32, f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0.0; 16];
    // SAFETY: no register has more than 16 lanes.
    unsafe { x.store(lanes.as_mut_ptr()) };
    lanes[..V::LANES].iter().fold(start, |a, &b| f(a, b))
}

#[inline(always)]
unsafe fn first_lane<V: Vector>(x: V) -> f32 {
    let mut lanes = [0.0; 16];
    // SAFETY: no register has more than 16 lanes.
    unsafe { x.store(lanes.as_mut_ptr()) };
    lanes[0]
}

/// `sums[r] = sums[r] · shrink[r] + Σ_key scores[r][key] · value[key]` for C registers of each value from element `d`.
#[inline(always)]
unsafe fn weigh<V: Vector, T: PageElement, const R: usize, const C: usize>(
    stretch: &Stretch<T>,
    d: usize,
    scores: *const f32,
    sums: *mut f32,
    wide: usize,
    shrink: [f32; R],
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut acc = [[V::splat(0.0); C]; R];
        let values = stretch.values.add(d);
        for key in 0..stretch.count {
            let at = values.add(*stretch.offsets.as_ptr().add(key));
            let mut v = [V::splat(0.0); C];
            for c in 0..C {
                v[c] = T::load(at.add(c * V::LANES));
            }
            for r in 0..R {
                let p = V::splat(*scores.add(r * KEYS + key));
                for c in 0..C {
                    acc[r][c] = p.mul_add(v[c], acc[r][c]);
                }
            }
        }
        for r in 0..R {
            for c in 0..C {
                let at = sums.add(r * wide + c * V::LANES);
                V::load(at).mul_add(V::splat(shrink[r]), acc[r][c]).store(at);
            }
        }
    }
}

/// Writes the results of a task's sequence and kv head from the partial results of all its splits, in their order.
///
/// # Safety
/// As of [`Vector`]; all splits are done, and nobody else writes these results.
#[inline(always)]
pub(super) unsafe fn combine<V: Vector>(
    call: &Call,
    task: &Task,
    partials: *const f32,
    reduction: &Reduction,
) {
    let sequence = call.sequence(task.sequence);
    let (wide, rows) = (call.wide, call.group);
    for r in 0..rows {
        // SAFETY: the caller's promise: `splits` partial results of `stride` elements each, one result of `dim`.
        unsafe {
            let max_of = |split: usize| *partials.add(split * reduction.stride + rows * wide + r);
            let top = (0..reduction.splits).map(max_of).fold(f32::MIN, f32::max);
            let result = call.result(sequence.row, task.kv_head * call.group + r);
            let result = std::slice::from_raw_parts_mut(result, call.dim);
            result.fill(0.0);
            let mut total = 0.0;
            for split in 0..reduction.splits {
                let partial = partials.add(split * reduction.stride);
                let share = first_lane(V::splat(max_of(split) - top).exp2());
                total += share * *partial.add(rows * (wide + 1) + r);
                let sums = std::slice::from_raw_parts(partial.add(r * wide), call.dim);
                result.iter_mut().zip(sums).for_each(|(y, x)| *y += share * x);
            }
            result.iter_mut().for_each(|y| *y /= total);
        }
    }
}
