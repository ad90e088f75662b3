//! What can be wrong with a fuser.

use super::{contract::ContractError, pickle::PickleError};
use crate::{backend, durable::WriteError, ops::ShapeError};
use std::path::{Path, PathBuf};

#[derive(Debug, thiserror::Error)]
pub enum FuserError {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error(transparent)]
    Write(#[from] WriteError),
    #[error(
        "{}: no fuser here: expected fuser.safetensors (this program's format) or projector_config.json, possibly \
         under final/ (the published layout)", .0.display()
    )]
    NoFuser(PathBuf),
    #[error("{}: {source}", path.display())]
    Json { path: PathBuf, source: serde_json::Error },
    #[error("{}: {source}", path.display())]
    Safetensors { path: PathBuf, source: safetensors::SafeTensorError },
    #[error("{}: {source}", path.display())]
    Pickle { path: PathBuf, source: PickleError },
    #[error("{}: `{field}` {problem}", path.display())]
    Field { path: PathBuf, field: String, problem: String },
    #[error("fuser configuration: `{field}` {problem}")]
    Config { field: &'static str, problem: String },
    #[error("{}: parameter `{name}` is missing", path.display())]
    MissingParameter { path: PathBuf, name: String },
    #[error("{}: parameter `{name}` does not belong to this kind of fuser", path.display())]
    ExtraParameter { path: PathBuf, name: String },
    #[error("{}: parameter `{name}` has shape {found:?}, expected {expected:?}", path.display())]
    ParameterShape { path: PathBuf, name: String, found: Vec<usize>, expected: Vec<usize> },
    #[error("{}: parameter `{name}` is {found}; a fuser's parameters are all F32, all BF16 or all F16, here {expected}", path.display())]
    ParameterType { path: PathBuf, name: String, found: String, expected: String },
    #[error("gates `{text}`: {problem}")]
    Gates { text: String, problem: String },
    #[error(
        "a fuser of kind {kind} is not trained by gradients: a ridge map is solved for ([fuser] kind = \"ridge\"), and an \
         AllInOneProjector is trained where its gate is one number a layer, as in the published recipes"
    )]
    Untrainable { kind: super::Kind },
    #[error(
        "one fuser was trained to fuse {first} of a prompt, another {other}: name the part by --fraction"
    )]
    Fractions { first: String, other: String },
    #[error("a fuser of kind {kind} does not run on {device}: use --device cpu, or a fuser of another kind")]
    Unsupported { kind: super::Kind, device: String },
    #[error("a ridge map {problem}")]
    Ridge { problem: String },
    #[error(transparent)]
    Contract(#[from] ContractError),
    #[error(transparent)]
    Device(#[from] backend::Error),
    #[error(transparent)]
    Shape(#[from] ShapeError),
}

impl FuserError {
    pub(super) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> FuserError + '_ {
        |source| FuserError::Io { path: path.into(), source }
    }

    pub(super) fn json(path: &Path) -> impl FnOnce(serde_json::Error) -> FuserError + '_ {
        |source| FuserError::Json { path: path.into(), source }
    }
}
