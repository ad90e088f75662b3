//! The log of a run: `log.jsonl`, a record a line, and the same numbers for TensorBoard.

use super::tensorboard::EventFile;
use crate::durable::{self, WriteError};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufRead, BufReader, Write},
    path::{Path, PathBuf},
};

/// One line of `log.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "snake_case")]
pub enum Record {
    /// A run begins, or goes on after `step` updates.
    Start {
        step: u64,
        manifest: Value,
    },
    Update(Update),
    Evaluation(Evaluation),
    Checkpoint {
        step: u64,
        path: PathBuf,
    },
    /// The run ends after `step` updates, for a reason: `finished`, `stopped early`, `interrupted`, ….
    End {
        step: u64,
        reason: String,
    },
}

/// One update of the weights.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Update {
    /// Updates made, this one included.
    pub step: u64,
    /// Passes over the data, in fractions.
    pub epoch: f64,
    /// Mean cross-entropy in nats a token.
    #[serde(deserialize_with = "null_is_nan")]
    pub loss: f64,
    pub learning_rate: f64,
    /// L2 norm of all gradients before clipping.
    #[serde(deserialize_with = "null_is_nan")]
    pub gradient_norm: f64,
    /// Of the gates; there is none where the fuser is not trained.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub temperature: Option<f64>,
    /// The part of gates with a positive logit, 0 to 1.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub gates_open: Option<f64>,
    /// Tokens of this update.
    pub tokens: u64,
    pub tokens_per_second: f64,
    /// Since the run began, without the time between a stop and a resumption.
    pub seconds: f64,
}

/// The model as it was after `step` updates, on held-out data.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    pub step: u64,
    /// Mean cross-entropy in nats a token.
    #[serde(deserialize_with = "null_is_nan")]
    pub loss: f64,
    /// The part of multiple choice questions that are answered right, where there are any.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub accuracy: Option<f64>,
    pub seconds: f64,
}

/// JSON has no number for the loss of a run that has gone wrong.
fn null_is_nan<'de, D: Deserializer<'de>>(number: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(number)?.unwrap_or(f64::NAN))
}

impl Record {
    pub fn step(&self) -> u64 {
        match self {
            Record::Start { step, .. } | Record::Checkpoint { step, .. } | Record::End { step, .. } => *step,
            Record::Update(update) => update.step,
            Record::Evaluation(evaluation) => evaluation.step,
        }
    }

    /// What TensorBoard shows of it.
    fn scalars(&self) -> Vec<(&'static str, f64)> {
        match self {
            Record::Update(update) => {
                let always = [
                    ("train/loss", update.loss),
                    ("train/learning_rate", update.learning_rate),
                    ("train/gradient_norm", update.gradient_norm),
                    ("train/epoch", update.epoch),
                    ("speed/tokens_per_second", update.tokens_per_second),
                ];
                let gates = [
                    update.temperature.map(|temperature| ("gates/temperature", temperature)),
                    update.gates_open.map(|open| ("gates/open", open)),
                ];
                always.into_iter().chain(gates.into_iter().flatten()).collect()
            }
            Record::Evaluation(evaluation) => {
                let accuracy = evaluation.accuracy.map(|accuracy| ("held_out/accuracy", accuracy));
                [("held_out/loss", evaluation.loss)].into_iter().chain(accuracy).collect()
            }
            _ => Vec::new(),
        }
    }
}

/// A log that cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error(transparent)]
    Write(#[from] WriteError),
    #[error("{}: cannot be read: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{}:{line}: no record of a run: {problem}", path.display())]
    Malformed { path: PathBuf, line: usize, problem: String },
}

/// The log of a run in its folder. What was added is in the files when a call returns.
#[derive(Debug)]
pub struct RunLog {
    lines: File,
    path: PathBuf,
    events: EventFile,
}

impl RunLog {
    pub const FILE: &str = "log.jsonl";

    /// A new log in an existing folder; an older one there is replaced.
    pub fn create(folder: &Path) -> Result<RunLog, LogError> {
        let path = folder.join(Self::FILE);
        let lines = File::create(&path).map_err(WriteError::at(&path))?;
        Ok(RunLog { lines, path, events: EventFile::create(folder, None)? })
    }

    /// Goes on with the log in `folder` after `step` updates. Later records are from a run that was cut off after its
    /// last checkpoint: they are removed, and come again.
    pub fn resume(folder: &Path, step: u64) -> Result<RunLog, LogError> {
        let path = folder.join(Self::FILE);
        if path.exists() {
            let mut kept = Vec::new();
            for record in read(folder)?.into_iter().filter(|record| record.step() <= step) {
                serde_json::to_writer(&mut kept, &record)
                    .map_err(io::Error::from)
                    .map_err(WriteError::at(&path))?;
                kept.push(b'\n');
            }
            durable::write(&path, |out| out.write_all(&kept).map_err(WriteError::at(&path)))?;
        }
        let lines =
            OpenOptions::new().append(true).create(true).open(&path).map_err(WriteError::at(&path))?;
        Ok(RunLog { lines, path, events: EventFile::create(folder, Some(step))? })
    }

    pub fn add(&mut self, record: &Record) -> Result<(), LogError> {
        let failed = WriteError::at(&self.path);
        let written = serde_json::to_vec(record).map_err(io::Error::from).and_then(|mut line| {
            line.push(b'\n');
            self.lines.write_all(&line)
        });
        written.map_err(failed)?;
        let scalars = record.scalars();
        if !scalars.is_empty() {
            self.events.scalars(record.step(), &scalars)?;
        }
        Ok(())
    }
}

/// The records of a run's log. A last line that a crash cut off is left out.
pub fn read(folder: &Path) -> Result<Vec<Record>, LogError> {
    let path = folder.join(RunLog::FILE);
    let failed = |source| LogError::Read { path: path.clone(), source };
    let mut reader = BufReader::new(fs::File::open(&path).map_err(failed)?);
    let (mut records, mut line) = (Vec::new(), Vec::new());
    while reader.read_until(b'\n', &mut line).map_err(failed)? > 0 {
        match serde_json::from_slice(&line) {
            Ok(record) => records.push(record),
            Err(_) if !line.ends_with(b"\n") => break,
            Err(error) => {
                let (line, problem) = (records.len() + 1, error.to_string());
                return Err(LogError::Malformed { path, line, problem });
            }
        }
        line.clear();
    }
    Ok(records)
}
