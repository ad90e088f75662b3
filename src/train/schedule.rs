//! How the learning rate and the temperature of the gates change from update to update.

use serde::{Deserialize, Serialize};

/// The shape of the learning rate, by the names of Hugging Face's `get_scheduler`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Warm-up, then a straight line to 0.
    #[default]
    Linear,
    /// Warm-up, then half a cosine to 0.
    Cosine,
    /// The same rate from the first update on; warm-up does not apply.
    Constant,
    ConstantWithWarmup,
}

impl Schedule {
    pub fn name(self) -> &'static str {
        match self {
            Schedule::Linear => "linear",
            Schedule::Cosine => "cosine",
            Schedule::Constant => "constant",
            Schedule::ConstantWithWarmup => "constant_with_warmup",
        }
    }
}

/// The learning rate of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LearningRate {
    pub schedule: Schedule,
    /// The highest rate.
    pub base: f64,
    /// Updates of warm-up.
    pub warmup: u64,
    /// Updates of the run.
    pub total: u64,
    /// The part of `base` that a falling schedule ends with.
    pub final_ratio: f64,
}

impl LearningRate {
    /// The rate of an update, counted from 0. With a warm-up the first update has rate 0, as published.
    pub fn at(&self, update: u64) -> f64 {
        let Self { schedule, base, warmup, total, final_ratio } = *self;
        if schedule != Schedule::Constant && update < warmup {
            return base * (update as f64 / warmup as f64);
        }
        // 0 after the warm-up, 1 at the end and beyond it.
        let span = total.saturating_sub(warmup).max(1) as f64;
        let progress = (update.saturating_sub(warmup) as f64 / span).min(1.0);
        let falling = match schedule {
            Schedule::Linear => 1.0 - progress,
            Schedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
            Schedule::Constant | Schedule::ConstantWithWarmup => 1.0,
        };
        base * (final_ratio + (1.0 - final_ratio) * falling)
    }
}

/// The temperature of the gates: geometric from `initial` to `final_` in `steps` updates, then constant.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Annealing {
    pub initial: f64,
    pub final_: f64,
    pub steps: u64,
}

impl Annealing {
    /// The temperature after so many updates: the first update is made at `after(0)`.
    pub fn after(&self, updates: u64) -> f32 {
        let progress = if updates >= self.steps { 1.0 } else { updates as f64 / self.steps as f64 };
        (self.initial * (self.final_ / self.initial).powf(progress)) as f32
    }
}

/// Updates of an epoch: one for every `accumulate` batches, and one for what is left over.
pub fn updates_per_epoch(batches: u64, accumulate: u64) -> u64 {
    batches.div_ceil(accumulate.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_without_warmup_begins_at_the_base_rate() {
        for schedule in [Schedule::Linear, Schedule::Cosine, Schedule::ConstantWithWarmup] {
            let rate = LearningRate { schedule, base: 0.5, warmup: 0, total: 10, final_ratio: 0.0 };
            assert_eq!(rate.at(0), 0.5);
        }
    }

    #[test]
    fn rates_stay_within_bounds_whatever_the_lengths() {
        for schedule in [Schedule::Linear, Schedule::Cosine, Schedule::Constant, Schedule::ConstantWithWarmup]
        {
            for (warmup, total) in [(0, 0), (5, 5), (9, 3), (0, 1), (1, 1)] {
                let rate = LearningRate { schedule, base: 2.0, warmup, total, final_ratio: 0.0 };
                assert!((0..20).all(|update| (0.0..=2.0).contains(&rate.at(update))), "{rate:?}");
            }
        }
    }

    #[test]
    fn annealing_without_steps_is_at_its_end() {
        let annealing = Annealing { initial: 1.0, final_: 0.25, steps: 0 };
        assert_eq!((annealing.after(0), annealing.after(9)), (0.25, 0.25));
    }

    #[test]
    fn what_is_left_over_makes_an_update() {
        assert_eq!([(9, 2), (8, 2), (1, 8), (0, 8)].map(|(b, a)| updates_per_epoch(b, a)), [5, 4, 1, 0]);
    }
}
