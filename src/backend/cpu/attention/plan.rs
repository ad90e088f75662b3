//! How a call is cut into tasks.

use super::Call;
use std::{cmp::Reverse, sync::atomic::AtomicU32};

/// A part of the call that one thread computes, for one sequence and kv head.
pub(super) struct Task {
    pub sequence: usize,
    pub kv_head: usize,
    /// Of the sequence: new tokens (prefill) or keys (decode).
    pub from: usize,
    pub to: usize,
    pub work: Work,
    multiplications: usize,
}

pub(super) enum Work {
    Prefill,
    Decode { reduction: usize, split: usize },
}

/// The partial results of one sequence and kv head, which the last of its tasks combines.
pub(super) struct Reduction {
    /// Splits not yet done.
    pub left: AtomicU32,
    pub splits: usize,
    /// Where they lie in [`Plan::partials`]: the first, and the distance between two.
    pub partials: usize,
    pub stride: usize,
}

/// Kept between calls: once grown, planning allocates nothing.
#[derive(Default)]
pub(super) struct Plan {
    /// The long ones first.
    pub tasks: Vec<Task>,
    pub reductions: Vec<Reduction>,
    pub partials: Vec<f32>,
    /// Of all tasks.
    pub multiplications: usize,
}

impl Plan {
    pub fn make(&mut self, call: &Call, lanes: usize, threads: usize) {
        self.tasks.clear();
        self.reductions.clear();
        let kv_heads = call.p.kv_heads as usize;
        let (mut partials, mut prefill_rows) = (0, 0);
        for s in 0..call.p.sequences as usize {
            let sequence = call.sequence(s);
            if sequence.tokens == 0 {
                continue;
            }
            // By this alone, so that a prompt's bits do not depend on the pieces it is read in.
            if sequence.tokens > 1 {
                prefill_rows += sequence.tokens * call.group * kv_heads;
                continue;
            }
            let rows = call.group;
            let (first, end) = (call.first_key(sequence.at), sequence.at + 1);
            let split_len = split_len(end - first);
            let splits = (end - first).div_ceil(split_len);
            let stride = rows * (call.wide + 2);
            for kv_head in 0..kv_heads {
                for split in 0..splits {
                    let from = first + split * split_len;
                    let to = (from + split_len).min(end);
                    let work = Work::Decode { reduction: self.reductions.len(), split };
                    let multiplications = 2 * (to - from) * rows * call.dim;
                    self.tasks.push(Task { sequence: s, kv_head, from, to, work, multiplications });
                }
                let left = AtomicU32::new(splits as u32);
                self.reductions.push(Reduction { left, splits, partials, stride });
                partials += splits * stride;
            }
        }
        if self.partials.len() < partials {
            self.partials.resize(partials, 0.0);
        }
        if prefill_rows > 0 {
            let step = tile_tokens(call, lanes, prefill_rows, threads);
            for s in 0..call.p.sequences as usize {
                let sequence = call.sequence(s);
                if sequence.tokens <= 1 {
                    continue;
                }
                for from in (0..sequence.tokens).step_by(step) {
                    let to = (from + step).min(sequence.tokens);
                    let keys = sequence.at + (from + to).div_ceil(2) - call.first_key(sequence.at + from);
                    let multiplications = 2 * keys * (to - from) * call.group * call.dim;
                    for kv_head in 0..kv_heads {
                        let work = Work::Prefill;
                        self.tasks.push(Task { sequence: s, kv_head, from, to, work, multiplications });
                    }
                }
            }
            self.tasks.sort_unstable_by_key(|task| Reverse(task.multiplications));
        }
        self.multiplications = self.tasks.iter().map(|task| task.multiplications).sum();
    }
}

/// Keys of one decode task, from the number of keys alone: enough tasks for many cores, few enough that their partial
/// results stay small beside the keys and values.
fn split_len(keys: usize) -> usize {
    (keys / 16).next_power_of_two().clamp(128, 1024)
}

/// New tokens of one prefill task: at most what keeps its queries and results in a core's own cache, at least what
/// makes good use of each key read; in between, enough tasks to keep all threads busy. No result depends on it.
fn tile_tokens(call: &Call, lanes: usize, rows: usize, threads: usize) -> usize {
    let least = 96;
    let most = (24576 / call.dim).max(least);
    let rows = (rows / (8 * threads)).clamp(least, most);
    (rows / call.group).max(1).next_multiple_of(lanes)
}
