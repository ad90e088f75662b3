//! Training: the road of an answer with one lane back.
//!
//! ```text
//! messages ─ sample ─ both prefills ─ fuse ─ answer tokens ─ loss
//!                                      │          │
//!             AdamW ─ fuser backward ──┴─ dK, dV ─┴─ receiver backward
//! ```

mod batch_cache;
mod checkpoint;
pub mod config;
pub mod events;
pub mod exam;
mod language_model;
mod pair;
mod parameters;
mod pass;
pub mod recipe;
pub mod run;
mod sample;
pub mod schedule;
pub mod tensorboard;
mod trained_fuser;

pub use batch_cache::{BatchCache, Piece};
pub use config::{ConfigError, ConfigLayers, TrainConfig};
pub use events::{Evaluation, Record, RunLog, Update};
pub use language_model::ModelTrainer;
pub use pair::{BatchReport, PairTrainer, Phases, Run};
pub use parameters::{Adamw, Entry, Kept, Parameters};
pub use pass::{Labels, Recompute, TrainingPass, gradient_pages};
pub use sample::Sample;
pub use schedule::{Annealing, LearningRate, Schedule};
pub use trained_fuser::{DrawnNoise, FuseRequest, FusedColumns, Gate, GateNoise, TrainedFuser};

use crate::{align, backend, cache, fuser, model, ops};

/// Why training stopped, or did not begin.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{parameters} trained parameters are more than one run can hold ({})", u32::MAX)]
    TooManyParameters { parameters: usize },
    #[error("{origin} {problem}")]
    Sample { origin: String, problem: String },
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
