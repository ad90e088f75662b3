//! Training: the road of an answer with one lane back.
//!
//! ```text
//! messages ─ sample ─ both prefills ─ fuse ─ answer tokens ─ loss
//!                                      │          │
//!             AdamW ─ fuser backward ──┴─ dK, dV ─┴─ receiver backward
//! ```
//!
//! [`config`] says what is asked for, [`run`] does it; [`events`] and [`report`] are what it leaves to look at.

mod batch_cache;
mod batches;
mod checkpoint;
pub mod config;
mod cut;
pub mod events;
pub mod exam;
mod figures;
mod language_model;
mod lora;
mod pair;
mod parameters;
mod pass;
mod prompt_store;
mod ranks;
pub mod recipe;
pub mod report;
pub mod run;
mod sample;
pub mod schedule;
pub mod standardize;
pub mod tensorboard;
mod trained_all_in_one;
mod trained_fuser;
mod trainee;

pub use batch_cache::{BatchCache, Piece};
pub use batches::Batches;
pub use config::{ConfigError, ConfigLayers, TrainConfig};
pub use events::{Evaluation, Record, RunLog, Update};
pub use language_model::ModelTrainer;
pub use lora::Lora;
pub use pair::{BatchReport, Control, PairTrainer, Phases, Run};
pub use parameters::{Adamw, Entry, Kept, Parameters};
pub use pass::{Labels, Learned, Recompute, TrainingPass, gradient_pages};
pub use prompt_store::PromptStore;
pub use ranks::Ranks;
pub use report::{AccuracyRow, GateStrength, Report};
pub use sample::Sample;
pub use schedule::{Annealing, LearningRate, Schedule};
pub use standardize::{InputMap, Inputs};
pub use trained_fuser::{DrawnNoise, FuseRequest, FusedColumns, Gate, GateNoise, TrainedFuser};
use trainee::Trainee;

use crate::{align, backend, cache, data, durable, engine, fuser, hub, model, ops, pipeline, tokenizer};
use std::path::PathBuf;

/// Why training stopped, or did not begin.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{parameters} trained parameters are more than one run can hold ({})", u32::MAX)]
    TooManyParameters { parameters: usize },
    #[error("{origin} {problem}")]
    Sample { origin: String, problem: String },
    #[error(
        "{origin} has {tokens} tokens, more than length.max_length = {most}: raise it, or set length.too_long to skip or truncate"
    )]
    TooLong { origin: String, tokens: usize, most: usize },
    #[error("no sample is left to learn from")]
    NoSamples,
    #[error("{}: is an adapter; train another one beside its base", path.display())]
    AdapterOfAdapter { path: PathBuf },
    #[error(
        "{}: has no config.json: all weights can only be trained of a Hugging Face folder; of other models adapters can be (what = \"lora\")",
        path.display()
    )]
    NotAFolder { path: PathBuf },
    #[error("several processes: {0}")]
    Ranks(String),
    #[error(
        "include_response lets the sharer read the answer as the receiver's ids, and the vocabulary of {sharer} is another: \
         give a sharer with the receiver's tokenizer, or alignment = \"none\" to let it read those ids whatever they mean to it"
    )]
    ResponseVocabulary { sharer: String },
    #[error("a fuser of kind {kind} cannot be trained with fuser.standardize = true: remove it")]
    Standardize { kind: fuser::Kind },
    #[error("{device} cannot train: use --device cpu")]
    NoTraining { device: String },
    #[error(
        "loss or gradient at update {step} is not a number{}: the state before it was saved to {}; resume from there with a lower learning rate",
        layer.map_or(String::new(), |layer| format!(", first in what layer {layer} of the receiver gives")),
        saved.display()
    )]
    NotFinite { step: u64, layer: Option<usize>, saved: PathBuf },
    #[error("{}: {problem}", path.display())]
    State { path: PathBuf, problem: String },
    #[error("the data is not what the run began with (its SHA-256 differs): begin a new run")]
    OtherData,
    #[error(
        "a prompt's cache cannot be kept: {0}; free space or give another folder as cache_sharer and cache_receiver"
    )]
    KeepPrompt(cache::SnapshotError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Data(#[from] data::LoadError),
    #[error(transparent)]
    Letters(#[from] data::templates::LetterError),
    #[error(transparent)]
    Log(#[from] events::LogError),
    #[error(transparent)]
    Report(#[from] report::ReportError),
    #[error(transparent)]
    Write(#[from] durable::WriteError),
    #[error(transparent)]
    Hub(#[from] hub::Error),
    #[error(transparent)]
    Pipeline(#[from] pipeline::Error),
    #[error(transparent)]
    Sampling(#[from] engine::SamplingError),
    #[error(transparent)]
    Tokenizer(#[from] tokenizer::Error),
    #[error(transparent)]
    Contract(#[from] fuser::ContractError),
    #[error(transparent)]
    Align(#[from] align::Error),
    #[error(transparent)]
    Fuser(#[from] fuser::FuserError),
    #[error(transparent)]
    Model(#[from] model::Error),
    #[error(transparent)]
    Cache(#[from] cache::Error),
    #[error(transparent)]
    Shape(#[from] ops::ShapeError),
    #[error(transparent)]
    Backend(#[from] backend::Error),
}
