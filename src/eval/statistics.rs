//! How sure an accuracy is, and a difference of two.

use crate::rng::{Purpose, Rng, Stream};

/// The interval in which the true rate lies with a confidence of 95 %, by Wilson's score (1927). It keeps within 0 to 1
/// and means something for few questions and for none right. All of it where nothing was asked.
pub fn wilson(correct: u64, asked: u64) -> (f64, f64) {
    if asked == 0 {
        return (0.0, 1.0);
    }
    // The 97.5 % quantile of the normal distribution.
    const Z: f64 = 1.959_963_984_540_054;
    let (n, rate) = (asked as f64, correct as f64 / asked as f64);
    let centre = rate + Z * Z / (2.0 * n);
    let half = Z * (rate * (1.0 - rate) / n + Z * Z / (4.0 * n * n)).sqrt();
    let scale = 1.0 + Z * Z / n;
    (((centre - half) / scale).max(0.0), ((centre + half) / scale).min(1.0))
}

/// Resamples of a bootstrap.
const RESAMPLES: u32 = 5000;

/// The 95 % interval of the mean of `differences` (one for each question: −1, 0 or 1) by the paired bootstrap, percentile method. The
/// same seed, the same interval.
pub fn paired_bootstrap(differences: &[i8], seed: u64) -> (f64, f64) {
    let n = differences.len();
    if n == 0 {
        return (-1.0, 1.0);
    }
    let mut means: Vec<f64> = (0..RESAMPLES)
        .map(|resample| {
            let rng = Rng::new(seed, Stream::new(Purpose::Shuffle, BOOTSTRAP), resample);
            let draw = |index: u32| differences[(rng.uniform_f64(index) * n as f64) as usize];
            (0..n as u32).map(|index| i64::from(draw(index))).sum::<i64>() as f64 / n as f64
        })
        .collect();
    means.sort_by(f64::total_cmp);
    let at = |quantile: f64| means[(quantile * f64::from(RESAMPLES - 1)).round() as usize];
    (at(0.025), at(0.975))
}

/// A part of [`Purpose::Shuffle`] that no order of data uses.
const BOOTSTRAP: u32 = 0x0b00_7357;

/// McNemar's exact test, two-sided: how probable a split of the discordant questions at least as uneven as (`better`, `worse`) is if
/// both modes are equally good.
pub fn mcnemar(better: u64, worse: u64) -> f64 {
    let n = better + worse;
    let fewer = better.min(worse);
    // Sum of the binomial's lower tail in logarithms: 2⁻ⁿ alone would vanish for n > 1074.
    let (mut log_choose, mut tail) = (0.0f64, 0.0f64);
    for k in 0..=fewer {
        if k > 0 {
            log_choose += ((n - k + 1) as f64).ln() - (k as f64).ln();
        }
        tail += (log_choose - n as f64 * std::f64::consts::LN_2).exp();
    }
    (2.0 * tail).min(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Published values of the interval.
    #[test]
    fn wilson_intervals() {
        for (correct, asked, low, high) in [
            (8, 10, 0.490162, 0.943318),
            (0, 10, 0.0, 0.277533),
            (10, 10, 0.722467, 1.0),
            (50, 100, 0.403832, 0.596168),
        ] {
            let ours = wilson(correct, asked);
            assert!(
                (ours.0 - low).abs() < 1e-5 && (ours.1 - high).abs() < 1e-5,
                "{correct}/{asked}: {ours:?}"
            );
        }
        assert_eq!(wilson(0, 0), (0.0, 1.0));
    }

    /// Binomial tails by hand.
    #[test]
    fn mcnemar_is_exact() {
        assert_eq!(mcnemar(0, 0), 1.0);
        assert!((mcnemar(10, 0) - 2.0 / 1024.0).abs() < 1e-12);
        assert!((mcnemar(1, 5) - 2.0 * 7.0 / 64.0).abs() < 1e-12);
        assert_eq!(mcnemar(3, 3), 1.0);
        assert!(mcnemar(1100, 1400) < 1e-8 && mcnemar(1100, 1400) > 0.0);
    }

    #[test]
    fn the_bootstrap_has_the_width_of_the_normal_interval() {
        // 60 better, 20 worse of 400: mean 0.1, deviation of a question 0.436.
        let differences: Vec<i8> = (0..400).map(|i| if i < 60 { 1 } else { -i8::from(i < 80) }).collect();
        let (low, high) = paired_bootstrap(&differences, 1);
        let half = 1.96 * (0.2f64 - 0.01).sqrt() / 20.0;
        assert!((low - (0.1 - half)).abs() < 0.006 && (high - (0.1 + half)).abs() < 0.006, "{low} {high}");
        assert_eq!(paired_bootstrap(&differences, 1), (low, high));
        assert_eq!(paired_bootstrap(&[0, 0], 1), (0.0, 0.0));
        assert_eq!(paired_bootstrap(&[], 1), (-1.0, 1.0));
    }
}
