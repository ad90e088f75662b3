//! From logits to text: sampling, penalties, log-probabilities, stop strings.

mod logprobs;
mod params;
mod penalties;
mod sampling;
mod select;
mod softmax;
mod stop;

pub use logprobs::TokenLogprobs;
pub use params::{Rules, SamplingParams};
pub use penalties::TokenCounts;
pub use sampling::{Distribution, Sampled, Sampler};
pub use stop::{StopMatcher, StopStep};

/// Why a token can't be sampled.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SamplingError {
    #[error("sampling parameter `{field}` is {found}: it must be {expected}")]
    Param { field: &'static str, found: String, expected: &'static str },
    #[error("the model gave no usable logits at step {step}: {what}")]
    Logits { step: u32, what: String },
}
