//! Training, apart from its arithmetic: what is asked for ([`config`], [`recipe`]), how rates change over a run

pub mod config;
pub mod events;
pub mod recipe;
pub mod schedule;
pub mod tensorboard;

pub use config::{ConfigError, ConfigLayers, TrainConfig};
pub use events::{Evaluation, Record, RunLog, Update};
pub use schedule::{Annealing, LearningRate, Schedule};
