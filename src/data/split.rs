//! The order of training data, and which part of it is held out.
//!
//! Both are functions of (seed, epoch) alone, so a run that is resumed sees the same data.

use crate::rng::{Purpose, Rng, Stream};

/// The parts of [`Purpose::Shuffle`].
const SPLIT: u32 = 0;
const EPOCH: u32 = 1;

/// The order of `n` examples in an epoch, counted from 0.
pub fn order(n: u32, seed: u64, epoch: u32) -> Vec<u32> {
    shuffled(n, &Rng::new(seed, Stream::new(Purpose::Shuffle, EPOCH), epoch))
}

/// Indices of `n` examples to train on and to hold out, each ascending. To train on are `⌊n · train_ratio⌋`, drawn at
/// random; a ratio outside 0 to 1 counts as the nearer of them.
pub fn split(n: u32, train_ratio: f64, seed: u64) -> (Vec<u32>, Vec<u32>) {
    let mut train = shuffled(n, &Rng::new(seed, Stream::new(Purpose::Shuffle, SPLIT), 0));
    let mut held_out = train.split_off((f64::from(n) * train_ratio.clamp(0.0, 1.0)) as usize);
    train.sort_unstable();
    held_out.sort_unstable();
    (train, held_out)
}

/// Fisher–Yates. One of `i` is chosen by 53 bits, so no order is preferred by more than i / 2⁵³.
fn shuffled(n: u32, rng: &Rng) -> Vec<u32> {
    let mut order: Vec<u32> = (0..n).collect();
    for last in (1..order.len()).rev() {
        let chosen = (rng.uniform_f64(last as u32) * (last + 1) as f64) as usize;
        order.swap(last, chosen);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_has_everything_once_and_depends_on_seed_and_epoch() {
        for n in [0, 1, 2, 7, 1000] {
            let mut sorted = order(n, 3, 0);
            sorted.sort_unstable();
            assert_eq!(sorted, (0..n).collect::<Vec<_>>());
        }
        assert_eq!(order(100, 3, 1), order(100, 3, 1));
        assert_ne!(order(100, 3, 1), order(100, 3, 2));
        assert_ne!(order(100, 3, 1), order(100, 4, 1));
    }

    #[test]
    fn every_order_of_three_is_equally_likely() {
        let mut counts = std::collections::BTreeMap::new();
        for seed in 0..6000 {
            *counts.entry(order(3, seed, 0)).or_insert(0) += 1;
        }
        assert_eq!(counts.len(), 6);
        // 1000 each, with a standard deviation of 29.
        assert!(counts.values().all(|count| (870..1130).contains(count)), "{counts:?}");
    }

    #[test]
    fn a_split_is_disjoint_and_whole() {
        let (train, held_out) = split(1000, 0.99, 42);
        assert_eq!((train.len(), held_out.len()), (990, 10));
        let mut all = [train.clone(), held_out.clone()].concat();
        all.sort_unstable();
        assert_eq!(all, (0..1000).collect::<Vec<_>>());
        assert_ne!(held_out, (990..1000).collect::<Vec<_>>());
        assert_eq!(split(1000, 0.99, 42), (train, held_out));
        assert_eq!(split(3, 1.0, 1).1, [0u32; 0]);
        assert_eq!(split(3, -1.0, 1).0, [0u32; 0]);
    }
}
