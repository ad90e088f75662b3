//! Training, apart from its arithmetic: what is asked for ([`config`], [`recipe`]), how rates change over a run
//! ([`schedule`]), and what it leaves to look at ([`events`], [`report`]).

pub mod config;
pub mod events;
mod figures;
pub mod recipe;
pub mod report;
pub mod schedule;
pub mod tensorboard;

pub use config::{ConfigError, ConfigLayers, TrainConfig};
pub use events::{Evaluation, Record, RunLog, Update};
pub use report::{AccuracyRow, GateStrength, Report};
pub use schedule::{Annealing, LearningRate, Schedule};
