//! How samples become batches and updates.

use super::{Sample, TrainConfig, schedule::updates_per_epoch};
use crate::data::split;

/// The batches of one epoch after the other: a function of (seed, epoch).
pub struct Batches {
    samples: usize,
    tokens: usize,
    accumulate: usize,
    seed: u64,
    per_epoch: u64,
    /// The epoch at hand and its batches, as indices of samples.
    epoch: u64,
    batches: Vec<Vec<u32>>,
}

impl Batches {
    pub fn new(config: &TrainConfig, samples: &[Sample]) -> Batches {
        let given = &config.batch;
        let most = given.samples.unwrap_or(if given.tokens.is_none() { 4 } else { usize::MAX });
        let mut batches = Batches {
            samples: most,
            tokens: given.tokens.unwrap_or(usize::MAX),
            accumulate: given.accumulate,
            seed: config.seed,
            per_epoch: 1,
            epoch: 0,
            batches: Vec::new(),
        };
        batches.begin(samples, 0);
        batches.per_epoch = updates_per_epoch(batches.batches.len() as u64, given.accumulate as u64).max(1);
        batches
    }

    fn begin(&mut self, samples: &[Sample], epoch: u64) {
        let order = split::order(samples.len() as u32, self.seed, epoch as u32);
        (self.epoch, self.batches) = (epoch, self.cut(samples, &order));
    }

    /// The samples of `order` in batches of at most as many samples and tokens as were asked for.
    pub fn cut(&self, samples: &[Sample], order: &[u32]) -> Vec<Vec<u32>> {
        let mut batches: Vec<Vec<u32>> = Vec::new();
        let mut room = 0;
        for &index in order {
            let tokens = samples[index as usize].tokens();
            match batches.last_mut() {
                Some(batch) if batch.len() < self.samples && tokens <= room => {
                    room -= tokens;
                    batch.push(index);
                }
                _ => {
                    room = self.tokens.saturating_sub(tokens);
                    batches.push(vec![index]);
                }
            }
        }
        batches
    }

    /// Updates of an epoch, by its first one. Cut by tokens, others may have a batch more or less: their last is left out, or
    /// their first comes again.
    pub fn per_epoch(&self) -> u64 {
        self.per_epoch
    }

    /// Tokens of the largest batch of the epoch at hand.
    pub fn largest(&self, samples: &[Sample]) -> usize {
        let tokens = |batch: &Vec<u32>| batch.iter().map(|&i| samples[i as usize].tokens()).sum();
        self.batches.iter().map(tokens).max().unwrap_or(0)
    }

    /// The batches of update number `step`, counted from 0.
    pub fn update(&mut self, samples: &[Sample], step: u64) -> &[Vec<u32>] {
        let epoch = step / self.per_epoch;
        if epoch != self.epoch {
            self.begin(samples, epoch);
        }
        let first = (step % self.per_epoch) as usize * self.accumulate;
        let first = if first < self.batches.len() { first } else { 0 };
        &self.batches[first..self.batches.len().min(first + self.accumulate)]
    }
}
