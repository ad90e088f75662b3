//! The largest entries of a row of logits, without sorting the row.

use std::cmp::Ordering;

/// Larger logits first, then lower ids.
fn by_rank(a: &(u32, f32), b: &(u32, f32)) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// The largest value; −∞ for an empty row. NaN is never larger.
pub(super) fn max(row: &[f32]) -> f32 {
    // Lanes, because the compiler may not reorder one chain of comparisons.
    let mut lanes = [f32::NEG_INFINITY; 16];
    let chunks = row.chunks_exact(lanes.len());
    let rest = chunks.remainder();
    for chunk in chunks {
        lanes.iter_mut().zip(chunk).for_each(|(lane, &x)| *lane = if x > *lane { x } else { *lane });
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |max, &x| if x > max { x } else { max })
}

/// Index of the first NaN.
pub(super) fn find_nan(row: &[f32]) -> Option<usize> {
    // A fold over a chunk vectorises; a search that may end at any element does not.
    let any = row.chunks(256).any(|chunk| chunk.iter().fold(false, |any, x| any | x.is_nan()));
    if any { row.iter().position(|x| x.is_nan()) } else { None }
}

/// Index of the first `value`.
pub(super) fn position(row: &[f32], value: f32) -> Option<u32> {
    row.iter().position(|&x| x == value).map(|i| i as u32)
}

/// The `k` largest (index, value) of `row`, largest first and lower indices before higher ones of the same value.
/// Entries of −∞ are left out.
pub(super) fn top(row: &[f32], k: usize) -> Vec<(u32, f32)> {
    let k = k.min(row.len());
    if k == 0 {
        return Vec::new();
    }
    // One comparison a value for nearly all of the row: candidates are those above the k-th best so far, weeded out
    // whenever as many again have gathered.
    let full = (2 * k).max(256);
    let mut best: Vec<(u32, f32)> = Vec::with_capacity(full.min(row.len()));
    let mut threshold = f32::NEG_INFINITY;
    for (i, &x) in row.iter().enumerate() {
        if x > threshold {
            best.push((i as u32, x));
            if best.len() == full {
                best.select_nth_unstable_by(k - 1, by_rank);
                best.truncate(k);
                threshold = best[k - 1].1;
            }
        }
    }
    if best.len() > k {
        best.select_nth_unstable_by(k - 1, by_rank);
        best.truncate(k);
    }
    best.sort_unstable_by(by_rank);
    best
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Purpose, Rng, Stream};

    /// As greedy sampling does it: the first of the largest; `None` if nothing is above −∞.
    fn argmax(row: &[f32]) -> Option<u32> {
        let max = max(row);
        if max > f32::NEG_INFINITY { position(row, max) } else { None }
    }

    #[test]
    fn top_is_the_head_of_a_sort() {
        let rng = Rng::new(1, Stream::new(Purpose::Init, 0), 0);
        for len in [1, 7, 54, 97, 1000, 5003] {
            // Coarse values, so that many are equal.
            let mut row: Vec<f32> = (0..len).map(|i| (rng.uniform(i) * 40.0).floor() - 20.0).collect();
            row[len as usize / 2] = f32::NEG_INFINITY;
            let mut sorted: Vec<(u32, f32)> = row.iter().enumerate().map(|(i, &x)| (i as u32, x)).collect();
            sorted.sort_by(by_rank);
            sorted.retain(|x| x.1 > f32::NEG_INFINITY);
            for k in [0, 1, 2, 50, 300, 10_000] {
                assert_eq!(top(&row, k), sorted[..k.min(sorted.len())], "len {len} k {k}");
            }
            assert_eq!(argmax(&row), sorted.first().map(|x| x.0));
        }
    }

    #[test]
    fn argmax_takes_the_lowest_of_equals() {
        let mut row = vec![0.0; 100];
        row[37] = 2.0;
        row[91] = 2.0;
        assert_eq!(argmax(&row), Some(37));
        assert_eq!(find_nan(&row), None);
        row[97] = f32::NAN;
        assert_eq!((find_nan(&row), argmax(&row)), (Some(97), Some(37)));
        assert_eq!(argmax(&[]), None);
        assert_eq!(argmax(&[f32::NEG_INFINITY]), None);
    }
}
