//! Repetition, presence and frequency penalties.

use super::{Rules, SamplingParams};
use std::collections::HashMap;

#[derive(Clone, Copy, Debug, Default)]
struct Count {
    prompt: u32,
    answer: u32,
}

/// How often each token was seen; grows with the distinct tokens of a sequence, not with the vocabulary.
#[derive(Clone, Debug, Default)]
pub struct TokenCounts(HashMap<u32, Count>);

impl TokenCounts {
    pub fn new(prompt: &[u32]) -> TokenCounts {
        let mut counts = TokenCounts::default();
        for &token in prompt {
            counts.0.entry(token).or_default().prompt += 1;
        }
        counts
    }

    /// Counts a token of the answer.
    pub fn push(&mut self, token: u32) {
        self.0.entry(token).or_default().answer += 1;
    }

    /// Lowers the `logits` (one row, `[vocab]`) of tokens seen, as `params` and its [`Rules`] say.
    pub fn penalise(&self, params: &SamplingParams, logits: &mut [f32]) {
        let repeat = |x: f32| {
            if x > 0.0 { x / params.repetition_penalty } else { x * params.repetition_penalty }
        };
        let (presence, frequency) = (params.presence_penalty, params.frequency_penalty);
        for (&token, count) in &self.0 {
            let Some(x) = logits.get_mut(token as usize) else { continue };
            match params.rules {
                Rules::Standard => {
                    *x = repeat(*x) - count.answer as f32 * frequency;
                    if count.answer > 0 {
                        *x -= presence;
                    }
                }
                Rules::Published => {
                    let seen = (count.prompt + count.answer) as f32;
                    *x = repeat(*x - presence - seen * frequency);
                }
            }
        }
    }
}

impl SamplingParams {
    /// Whether any penalty is on.
    pub fn penalises(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn standard_counts_the_answer_and_published_everything() {
        let mut counts = TokenCounts::new(&[1, 1, 2, 99]);
        counts.push(2);
        counts.push(2);
        counts.push(3);
        let mut params = SamplingParams {
            repetition_penalty: 2.0,
            presence_penalty: 0.5,
            frequency_penalty: 0.25,
            ..Default::default()
        };
        let logits = [1.0, 4.0, -1.0, 3.0];
        let mut standard = logits;
        counts.penalise(&params, &mut standard);
        // 4/2; −1·2 − 2·0.25 − 0.5; 3/2 − 0.25 − 0.5
        assert_eq!(standard, [1.0, 2.0, -3.0, 0.75]);
        params.rules = Rules::Published;
        let mut published = logits;
        counts.penalise(&params, &mut published);
        // (4 − 0.5 − 2·0.25)/2; (−1 − 0.5 − 3·0.25)·2; (3 − 0.5 − 0.25)/2
        assert_eq!(published, [1.0, 1.5, -4.5, 1.125]);
    }
}
