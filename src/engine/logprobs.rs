//! Log-probabilities as OpenAI's API and vLLM report them: of the raw logits, before penalties and temperature.

use super::{select, softmax};

/// Natural logarithms of probabilities under the model itself.
#[derive(serde::Serialize, Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    pub token: u32,
    pub logprob: f32,
    /// The most probable tokens, most probable first.
    pub top: Vec<(u32, f32)>,
}

impl TokenLogprobs {
    /// `log_softmax(logits)` (`[vocab]`) of `token`, and of the `n` most probable tokens. A token past the vocabulary
    /// has −∞.
    pub fn new(logits: &[f32], token: u32, n: usize) -> TokenLogprobs {
        let max = select::max(logits);
        let log_sum = f64::from(max) + softmax::sum_exp(logits, max, 1.0).ln();
        let logprob = |x: f32| (f64::from(x) - log_sum) as f32;
        TokenLogprobs {
            token,
            logprob: logits.get(token as usize).map_or(f32::NEG_INFINITY, |&x| logprob(x)),
            top: select::top(logits, n).into_iter().map(|(id, x)| (id, logprob(x))).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_log_softmax() {
        let logits = [1.0f32, -2.0, 700.0, 699.0, f32::NEG_INFINITY];
        let found = TokenLogprobs::new(&logits, 3, 2);
        let log_sum = 700.0 + (-1f64).exp().ln_1p();
        assert!((f64::from(found.logprob) - (699.0 - log_sum)).abs() < 1e-6);
        assert_eq!(found.top.iter().map(|t| t.0).collect::<Vec<_>>(), [2, 3]);
        assert_eq!(found.top[1].1, found.logprob);
        assert_eq!(TokenLogprobs::new(&logits, 4, 0).logprob, f32::NEG_INFINITY);
        assert_eq!(TokenLogprobs::new(&logits, 9, 0).logprob, f32::NEG_INFINITY);
    }
}
