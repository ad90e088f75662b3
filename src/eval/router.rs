//! Query-level routing: a classifier picks the model that answers, question by question.
//!
//! The simple one: logistic regression on what is known once the Receiver has read the question (how sure it is, how long the question
//! is). It learns from training questions on which the two models disagree in being right.

use serde::{Deserialize, Serialize};

/// Features of a question; the first is constant.
pub const FEATURES: usize = 5;

/// What is cheaply known of a question.
///
/// `scores`: the Receiver's logits of the letters, or of the whole vocabulary; `tokens`: of its prompt.
pub fn features(scores: &[f32], tokens: usize) -> [f64; FEATURES] {
    let top = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exponents: Vec<f64> = scores.iter().map(|score| f64::from(score - top).exp()).collect();
    let sum: f64 = exponents.iter().sum();
    let (mut first, mut second, mut entropy) = (0.0f64, 0.0f64, 0.0);
    for probability in exponents.iter().map(|exponent| exponent / sum) {
        if probability > first {
            (first, second) = (probability, first);
        } else {
            second = second.max(probability);
        }
        if probability > 0.0 {
            entropy -= probability * probability.ln();
        }
    }
    [1.0, first, first - second, entropy, (tokens.max(1) as f64).ln()]
}

/// A trained router.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Router {
    pub weights: [f64; FEATURES],
    /// Questions it was trained on, and those among them that teach something: one model right, the other wrong.
    pub asked: usize,
    pub disagreed: usize,
    /// The answers of both models, and the fit itself.
    pub training_ms: f64,
}

/// Steps of the fit, and its ridge.
const STEPS: usize = 400;
const RIDGE: f64 = 1e-3;

impl Router {
    /// `questions`: features, and whether Receiver and Sharer were right.
    pub fn fit(questions: &[([f64; FEATURES], bool, bool)], training_ms: f64) -> Router {
        let lessons: Vec<(&[f64; FEATURES], f64)> = questions
            .iter()
            .filter(|(_, receiver, sharer)| receiver != sharer)
            .map(|(features, _, sharer)| (features, f64::from(u8::from(*sharer))))
            .collect();
        let mut weights = [0.0; FEATURES];
        for _ in 0..STEPS {
            let mut gradient = weights.map(|weight| RIDGE * weight);
            for (features, label) in &lessons {
                let error = (probability(&weights, features) - label) / lessons.len() as f64;
                gradient.iter_mut().zip(*features).for_each(|(sum, feature)| *sum += error * feature);
            }
            weights.iter_mut().zip(gradient).for_each(|(weight, slope)| *weight -= slope);
        }
        Router { weights, asked: questions.len(), disagreed: lessons.len(), training_ms }
    }

    /// Whether the Sharer should answer. Without a lesson the Receiver does, which is cheaper.
    pub fn picks_sharer(&self, features: &[f64; FEATURES]) -> bool {
        probability(&self.weights, features) > 0.5
    }
}

fn probability(weights: &[f64; FEATURES], features: &[f64; FEATURES]) -> f64 {
    let score: f64 = weights.iter().zip(features).map(|(weight, feature)| weight * feature).sum();
    1.0 / (1.0 + (-score).exp())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sure_receivers_answer_themselves() {
        let sure = features(&[9.0, 0.0, 0.0, 0.0], 30);
        let unsure = features(&[0.1, 0.0, 0.0, 0.0], 30);
        assert!(sure[1] > 0.99 && unsure[1] < 0.3 && sure[3] < unsure[3]);
        let questions: Vec<_> =
            (0..40).map(|i| if i % 2 == 0 { (sure, true, false) } else { (unsure, false, true) }).collect();
        let router = Router::fit(&questions, 0.0);
        assert!(!router.picks_sharer(&sure) && router.picks_sharer(&unsure), "{router:?}");
        assert_eq!((router.asked, router.disagreed), (40, 40));
        let nothing = Router::fit(&[(sure, true, true)], 0.0);
        assert!(!nothing.picks_sharer(&unsure));
    }
}
