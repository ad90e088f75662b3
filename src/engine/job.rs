//! What the engine is asked, and what it tells.

use super::{SamplingError, SamplingParams, TokenLogprobs};
use crate::{
    fuser::Gates,
    pipeline::{self, FinishReason, PrefillReport, Prompt},
};
use std::{sync::Arc, time::Duration};

/// Which model's tokens an answer is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Speaker {
    Receiver,
    /// The first of several.
    Sharer,
}

/// One answer to be made.
#[derive(Clone, Debug)]
pub struct Job {
    pub speaker: Speaker,
    /// What the speaker reads. With sharers in it, the answer is the receiver's on a fused cache.
    pub prompt: Prompt,
    /// Of the fuser of each of the prompt's sharers.
    pub gates: Vec<Gates>,
    pub params: SamplingParams,
    /// Requests with different salts never see what of the other's prompt is cached.
    pub cache_salt: String,
    /// Log-probabilities of the prompt's tokens, and of this many most probable ones: only without sharers.
    pub prompt_logprobs: Option<usize>,
    /// Goes on with a question that was let in already: before all others, and never refused for their number.
    pub continues: bool,
}

/// What becomes of a job, in this order: `Read`, `Token`…, `Done`; or `Failed` at any point.
#[derive(Clone, Debug)]
pub enum Event {
    Read(Box<Read>),
    Token(Token),
    Done(Done),
    Failed(Failure),
}

/// The prompt is in the cache.
#[derive(Clone, Debug)]
pub struct Read {
    /// Time until the first piece of it was read.
    pub queued: Duration,
    pub report: PrefillReport,
    /// Tokens of the speaker's, and of all sharers' prompts, that were cached already.
    pub cached_tokens: usize,
    pub cached_sharer_tokens: usize,
    /// From the second token on, where asked for.
    pub prompt_logprobs: Vec<TokenLogprobs>,
}

/// A token of the answer.
#[derive(Clone, Debug)]
pub struct Token {
    pub id: u32,
    /// Text that is now sure to be part of the answer; often that of other tokens, too, or nothing.
    pub text: String,
    pub logprobs: Option<TokenLogprobs>,
}

/// The end of an answer.
#[derive(Clone, Debug)]
pub struct Done {
    /// What was held back.
    pub text: String,
    /// The end token, where one was drawn: no part of the answer.
    pub end: Option<Token>,
    pub finish_reason: FinishReason,
    pub tokens: usize,
    /// From the job's arrival to its first token.
    pub first_token: Duration,
    /// From the first token to the last.
    pub decode: Duration,
}

/// Why a job that was taken on came to nothing.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Failure {
    #[error("the server is shutting down")]
    ShuttingDown,
    #[error(transparent)]
    Pipeline(Arc<pipeline::Error>),
}

impl From<pipeline::Error> for Failure {
    fn from(error: pipeline::Error) -> Failure {
        Failure::Pipeline(Arc::new(error))
    }
}

/// Why a job is not taken on.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    #[error("{0} requests are waiting already: try again later")]
    QueueFull(usize),
    #[error("the server is shutting down")]
    ShuttingDown,
    #[error("there is no {0} model: start the server with one")]
    NoModel(&'static str),
    #[error("the prompt is empty: nothing to continue")]
    EmptyPrompt,
    #[error("the prompt has {tokens} tokens, {model} has room for {limit} and one of the answer: shorten it")]
    TooLong { model: &'static str, tokens: usize, limit: usize },
    #[error("token id {id} is not in the vocabulary of {vocab} tokens")]
    UnknownToken { id: u32, vocab: usize },
    #[error("log-probabilities of a prompt are not there on a fused cache: use one model alone")]
    FusedLogprobs,
    #[error(transparent)]
    Sampling(#[from] SamplingError),
}
