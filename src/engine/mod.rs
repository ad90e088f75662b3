//! Answers, many at a time: requests in, events out; and from logits to text (sampling, penalties, log-probabilities, stop
//! strings), for one answer as for many.

mod ask;
mod job;
mod logprobs;
mod metrics;
mod params;
mod penalties;
mod reuse;
mod room;
mod sampling;
mod scheduler;
mod select;
mod sequence;
mod service;
mod softmax;
mod stop;

pub use ask::{FuseOptions, Prepared};
pub use job::{Done, Event, Failure, Job, Read, Refused, Speaker, Token};
pub use logprobs::TokenLogprobs;
pub use metrics::Metrics;
pub use params::{Rules, SamplingParams};
pub use penalties::TokenCounts;
pub use sampling::{Distribution, Sampled, Sampler};
pub use service::{Engine, EngineOptions, Events};
pub use stop::{StopMatcher, StopStep};

/// Why a token can't be sampled.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SamplingError {
    #[error("sampling parameter `{field}` is {found}: it must be {expected}")]
    Param { field: &'static str, found: String, expected: &'static str },
    #[error("the model gave no usable logits at step {step}: {what}")]
    Logits { step: u32, what: String },
}
