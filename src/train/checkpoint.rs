//! The state of a run in a file: weights, moments, gates, and where the run is. With it a run goes on bit for bit.

use super::{Error, Gate, Kept, Parameters, TrainConfig, TrainedFuser};
use crate::{
    backend::{Queue, cpu::map_file},
    durable::{OutgoingTensor, write_safetensors},
};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

const FILE: &str = "trainer_state.safetensors";
const METADATA: &str = "c2c.run";
/// Of the state file; another is refused.
const VERSION: u32 = 1;

/// Where a run is. Order of data, noise and rates follow from it and the configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Position {
    pub version: u32,
    /// Updates made.
    pub step: u64,
    /// Spent over all parts of the run.
    pub seconds: f64,
    /// Lowest held-out loss so far, and measurements since.
    pub best_loss: Option<f64>,
    pub since_best: u32,
    pub config: TrainConfig,
    /// What the run was made of: hashes of data and models, versions.
    pub manifest: Value,
}

impl Position {
    pub fn new(config: TrainConfig, manifest: Value) -> Position {
        let (version, step, seconds) = (VERSION, 0, 0.0);
        Position { version, step, seconds, best_loss: None, since_best: 0, config, manifest }
    }
}

/// Something trained, as tensors under a prefix.
pub enum Trained<'a> {
    Fuser(&'a TrainedFuser),
    Model(&'a Parameters),
}

impl Trained<'_> {
    fn parameters(&self) -> &Parameters {
        match self {
            Trained::Fuser(fuser) => &fuser.parameters,
            Trained::Model(parameters) => parameters,
        }
    }
}

const KEPT: [(Kept, &str); 3] = [(Kept::Weights, "weights"), (Kept::M, "m"), (Kept::V, "v")];

fn name(number: usize, what: &str, tensor: &str) -> String {
    format!("{number}.{what}.{tensor}")
}

/// Replaces the state file in `folder`: a crash leaves the old one or the new one.
pub fn save(folder: &Path, position: &Position, all: &[Trained], queue: &Queue) -> Result<(), Error> {
    let mut tensors: Vec<OutgoingTensor<Error>> = Vec::new();
    for (number, trained) in all.iter().enumerate() {
        let parameters = trained.parameters();
        for (kept, what) in KEPT {
            for (index, entry) in parameters.entries().iter().enumerate() {
                tensors.push(OutgoingTensor {
                    name: name(number, what, &entry.name),
                    dtype: Dtype::F32,
                    shape: entry.shape.clone(),
                    bytes: Box::new(move || Ok(queue.download(&parameters.view(kept, index))?)),
                });
            }
        }
        if let Trained::Fuser(fuser) = trained {
            tensors.push(OutgoingTensor {
                name: name(number, "gates", "logit_m_v"),
                dtype: Dtype::F32,
                shape: vec![fuser.gates.len(), 2, 3],
                bytes: Box::new(move || {
                    let numbers = fuser.gates.iter().flatten().flat_map(|gate| [gate.logit, gate.m, gate.v]);
                    Ok(numbers.flat_map(f32::to_le_bytes).collect())
                }),
            });
        }
    }
    let position = serde_json::to_string(position).map_err(|error| Error::State {
        path: folder.join(FILE),
        problem: format!("cannot be described: {error}"),
    })?;
    write_safetensors(&folder.join(FILE), &[(METADATA, &position)], &tensors)
}

/// A state file that was opened.
pub struct State {
    path: PathBuf,
    file: Arc<Mmap>,
    pub position: Position,
}

impl State {
    /// Opens the state in `folder`: a checkpoint, or the folder of a run, whose latest checkpoint is taken.
    pub fn open(folder: &Path) -> Result<State, Error> {
        let folder = if folder.join(FILE).is_file() { folder.into() } else { latest(folder)? };
        let path = folder.join(FILE);
        let bad = |problem: String| Error::State { path: path.clone(), problem };
        // The file is replaced by renaming, never written in place.
        let file = map_file(&path).map_err(|error| bad(error.to_string()))?;
        let (_, header) = SafeTensors::read_metadata(&file).map_err(|error| bad(error.to_string()))?;
        let text = header.metadata().as_ref().and_then(|metadata| metadata.get(METADATA)).cloned();
        let text = text.ok_or_else(|| bad("is no state of a training run".into()))?;
        let position: Position = serde_json::from_str(&text).map_err(|error| bad(error.to_string()))?;
        if position.version != VERSION {
            return Err(bad(format!("has version {}, this program reads {VERSION}", position.version)));
        }
        Ok(State { path, file, position })
    }

    /// Brings weights, moments and gates of number `number` back.
    pub fn restore(&self, number: usize, parameters: &Parameters, queue: &Queue) -> Result<(), Error> {
        for (kept, what) in KEPT {
            for (index, entry) in parameters.entries().iter().enumerate() {
                let values = self.floats(&name(number, what, &entry.name), &entry.shape)?;
                queue.upload(&values, &parameters.view(kept, index));
            }
        }
        Ok(queue.synchronize()?)
    }

    pub fn restore_gates(&self, number: usize, gates: &mut [[Gate; 2]]) -> Result<(), Error> {
        let values = self.floats(&name(number, "gates", "logit_m_v"), &[gates.len(), 2, 3])?;
        for (gate, values) in gates.iter_mut().flatten().zip(values.chunks_exact(3)) {
            *gate = Gate { logit: values[0], grad: 0.0, m: values[1], v: values[2] };
        }
        Ok(())
    }

    fn floats(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, Error> {
        let bad = |problem: String| Error::State { path: self.path.clone(), problem };
        let file = SafeTensors::deserialize(&self.file).map_err(|error| bad(error.to_string()))?;
        let tensor = file.tensor(name).map_err(|_| bad(format!("has no tensor `{name}`")))?;
        if tensor.dtype() != Dtype::F32 || tensor.shape() != shape {
            return Err(bad(format!(
                "tensor `{name}` is {:?}{:?}, expected F32{shape:?}: it is of another model or fuser",
                tensor.dtype(),
                tensor.shape()
            )));
        }
        Ok(tensor.data().as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect())
    }
}

/// Folder of the checkpoint after `step` updates.
pub fn folder(out: &Path, step: u64) -> PathBuf {
    out.join(format!("checkpoint-{step}"))
}

/// Checkpoints of a run by their step, the latest last.
pub fn all(out: &Path) -> Vec<(u64, PathBuf)> {
    let entries = fs::read_dir(out).into_iter().flatten().flatten();
    let mut found: Vec<(u64, PathBuf)> = entries
        .filter_map(|entry| {
            let step = entry.file_name().to_str()?.strip_prefix("checkpoint-")?.parse().ok()?;
            entry.path().join(FILE).is_file().then(|| (step, entry.path()))
        })
        .collect();
    found.sort();
    found
}

fn latest(out: &Path) -> Result<PathBuf, Error> {
    let found = all(out).pop().map(|(_, path)| path);
    found.ok_or_else(|| Error::State { path: out.into(), problem: "has no checkpoint to go on from".into() })
}
