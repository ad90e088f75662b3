//! Prefill ‖ prefill → fuse → decode: the road from aligned token ids to the receiver's first logits.
//!
//! This is the one module to edit for a new way of letting models talk through their caches.

mod answer;
mod decode;
mod generate;
mod include_response;
mod lane;
mod link;
mod model;
mod observe;
mod prefill;
mod replay;
mod session;
pub(crate) mod t2t;

pub use answer::{Answer, TimingsMs, TokensPerSecond, peak_rss_bytes};
pub use decode::{Decoded, decode};
pub use generate::{Decode, FinishReason, Generation, Stream, Taken, Turn, generate};
pub use include_response::{Conversation, ResponseLink};
pub use lane::Lane;
pub use link::{Link, Overlap, Prompt, SharerPrompt};
pub use model::Model;
pub use observe::{Observation, WeightMap};
pub use prefill::{Prefill, PrefillReport, WantedLogits};
pub use replay::{Dump, ReplayInput, replay};
pub use session::{ComputeType, FuserChoice, Mode, Question, Session, SessionOptions};

use crate::{align, backend, cache, durable, engine, fuser, ops, tokenizer};

/// What can go wrong on the road.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Model(#[from] crate::model::Error),
    #[error(transparent)]
    Cache(#[from] cache::Error),
    #[error(transparent)]
    Fuser(#[from] fuser::FuserError),
    #[error(transparent)]
    Shape(#[from] ops::ShapeError),
    #[error(transparent)]
    Device(#[from] backend::Error),
    #[error(transparent)]
    Tokenizer(#[from] tokenizer::Error),
    #[error(transparent)]
    Align(#[from] align::Error),
    #[error(transparent)]
    Contract(#[from] fuser::ContractError),
    #[error(transparent)]
    Sampling(#[from] engine::SamplingError),
    #[error("the prompt is empty: nothing to continue")]
    EmptyPrompt,
    #[error("{model}: {tokens} tokens are more than its context of {limit}: shorten the prompt")]
    ContextExceeded { model: String, tokens: usize, limit: usize },
    #[error("sections cover {sections} tokens, the prompt has {tokens}")]
    SectionLength { sections: usize, tokens: usize },
    #[error("section {section} selects sharers {mask:#b}, but there are only {sharers}")]
    UnknownSharer { section: usize, mask: u32, sharers: usize },
    #[error(
        "receiver token {token} is aligned with column {column} of sharer {sharer}, which read {tokens} tokens"
    )]
    ColumnOutOfRange { token: usize, column: usize, sharer: usize, tokens: usize },
    #[error("mode {mode:?} needs {what}")]
    MissingModel { mode: Mode, what: &'static str },
    #[error(
        "each of the {sharers} sharers needs a fuser, {fusers} were given: --fuser PATH, or --fuser init for an untrained one"
    )]
    FuserCount { sharers: usize, fusers: usize },
    #[error("{model} has no tokenizer: only token ids (--input FILE.safetensors) can be run through it")]
    NoTokenizer { model: String },
    #[error("text-to-text needs a conversation with a user message: it is not there with --raw")]
    T2tNeedsChat,
    #[error(
        "mode {0:?} cannot replay token ids, it starts from text; --mode c2c and --mode receiver can (a sharer alone: \
         --mode receiver --receiver SHARER)"
    )]
    ReplayMode(Mode),
    #[error("--include-response fuses tokens of the answer: it goes with --mode c2c, not with mode {0:?}")]
    ResponseMode(Mode),
    #[error(
        "--include-response lets the sharer read the answer token by token as the receiver's ids, and the vocabulary of \
         {sharer} is another: give a sharer with the receiver's tokenizer (or --alignment none, to let it read those ids \
         whatever they mean to it)"
    )]
    ResponseVocabulary { sharer: String },
    #[error(transparent)]
    Write(#[from] durable::WriteError),
    #[error("{path}: {reason}")]
    Replay { path: String, reason: String },
}
