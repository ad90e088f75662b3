//! Training: the road of an answer with one lane back.
//!
//! ```text
//! messages ─ sample ─ both prefills ─ fuse ─ answer tokens ─ loss
//!                                      │          │
//!             AdamW ─ fuser backward ──┴─ dK, dV ─┴─ receiver backward
//! ```

mod batch_cache;
mod pair;
mod parameters;
mod pass;
mod sample;
mod trained_fuser;

pub use batch_cache::{BatchCache, Piece};
pub use pair::{BatchReport, PairTrainer, Phases, Run};
pub use parameters::{Adamw, Entry, Kept, Parameters};
pub use pass::{Labels, Recompute, TrainingPass, gradient_pages};
pub use sample::Sample;
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
