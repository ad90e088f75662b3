//! This program's own format: `fuser.safetensors` with the published parameter names, and `fuser.json`.
//!
//! The configuration also lies in the weights' metadata, so that one rename replaces a checkpoint: `fuser.json` is its
//! readable copy.

use super::{
    Fuser, FuserError,
    config::{FuserConfig, Kind},
    parameters::{self, KEY_GATE, TEMPERATURE, VALUE_GATE, from_f32},
    state::{StateDict, read_safetensors, read_text, safetensors_dtype},
};
use crate::{
    backend::{Backend, Queue},
    durable::{self, OutgoingTensor, WriteError},
};
use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

const WEIGHTS: &str = "fuser.safetensors";
const CONFIG: &str = "fuser.json";
/// Key of the configuration in the weights' metadata.
const METADATA: &str = "fuser";

/// The weights file of a checkpoint in our own format at `path`: a folder, or either file.
pub(super) fn find(path: &Path) -> Option<PathBuf> {
    let weights = if path.is_dir() {
        path.join(WEIGHTS)
    } else if path.file_name()? == CONFIG {
        path.with_file_name(WEIGHTS)
    } else {
        path.into()
    };
    (weights.is_file() && weights.extension()? == "safetensors").then_some(weights)
}

pub(super) fn load(weights: &Path, backend: &Arc<dyn Backend>) -> Result<Fuser, FuserError> {
    let (mut state, metadata) = read_safetensors(weights)?;
    let config = config(weights, metadata.get(METADATA).map(String::as_str))?;
    let projectors = (0..config.projectors())
        .map(|index| parameters::take(&config, &mut state, &prefix(index), backend))
        .collect::<Result<_, _>>()?;
    refuse_extra(&state)?;
    Ok(Fuser::assemble(config, projectors))
}

fn config(weights: &Path, metadata: Option<&str>) -> Result<FuserConfig, FuserError> {
    let beside = weights.with_file_name(CONFIG);
    let text = read_text(&beside)?;
    let parse =
        |text: &str, path: &Path| serde_json::from_str::<FuserConfig>(text).map_err(FuserError::json(path));
    let config = match (metadata, text) {
        (Some(inside), text) => {
            let config = parse(inside, weights)?;
            if let Some(text) = text
                && parse(&text, &beside).ok().as_ref() != Some(&config)
            {
                log::warn!(
                    "{} is not what {} was saved with; going by the latter",
                    beside.display(),
                    weights.display()
                );
            }
            config
        }
        (None, Some(text)) => parse(&text, &beside)?,
        (None, None) => {
            return Err(FuserError::Field {
                path: weights.into(),
                field: METADATA.into(),
                problem: format!("is missing from its metadata, and there is no {CONFIG} beside it"),
            });
        }
    };
    config.validate()?;
    Ok(config)
}

/// Names of a projector's parameters start with this.
pub(super) fn prefix(projector: usize) -> String {
    format!("projector_{projector}.")
}

/// Every parameter was taken out of `state`.
pub(super) fn refuse_extra(state: &StateDict) -> Result<(), FuserError> {
    match state.entries.keys().next() {
        None => Ok(()),
        Some(name) => Err(FuserError::ExtraParameter { path: state.path.clone(), name: name.clone() }),
    }
}

/// All parameters under their published names.
pub(super) fn outgoing<'a>(fuser: &'a Fuser, queue: &'a Queue) -> Vec<OutgoingTensor<'a, FuserError>> {
    let dtype = fuser.config().dtype;
    let file_dtype = safetensors_dtype(dtype);
    let mut all = Vec::new();
    for (index, projector) in fuser.projectors().iter().enumerate() {
        let prefix = prefix(index);
        for (name, tensor) in projector.tensors() {
            all.push(OutgoingTensor {
                name: format!("{prefix}{name}"),
                dtype: file_dtype,
                shape: tensor.shape().to_vec(),
                bytes: Box::new(move || Ok(queue.download(tensor)?)),
            });
        }
        let kind = fuser.config().kind;
        let [key, value] = projector.gate_logits;
        let scalars = [(TEMPERATURE, projector.temperature), (KEY_GATE, key), (VALUE_GATE, value)];
        // The gates of an AllInOneProjector are among its tensors.
        let count = if kind.has_gates() { 3 } else { usize::from(kind == Kind::AllInOne) };
        for (name, scalar) in scalars.into_iter().take(count) {
            let bytes = move || {
                let mut bytes = Vec::new();
                from_f32(&[scalar], dtype, &mut bytes);
                Ok(bytes)
            };
            let (name, bytes) = (format!("{prefix}{name}"), Box::new(bytes));
            all.push(OutgoingTensor { name, dtype: file_dtype, shape: vec![], bytes });
        }
    }
    all
}

/// Writes `fuser` into the folder `path`, made if need be. A crash at any point leaves the old checkpoint or the new.
pub(super) fn save(fuser: &Fuser, path: &Path, queue: &Queue) -> Result<(), FuserError> {
    fs::create_dir_all(path).map_err(FuserError::io(path))?;
    let json = path.join(CONFIG);
    let text = serde_json::to_string_pretty(fuser.config()).map_err(FuserError::json(&json))?;
    let metadata = [("format", "pt"), (METADATA, &text)];
    durable::write_safetensors(&path.join(WEIGHTS), &metadata, &outgoing(fuser, queue))?;
    write_text(&json, &text)
}

pub(super) fn write_text(path: &Path, text: &str) -> Result<(), FuserError> {
    durable::write(path, |out| Ok(writeln!(out, "{text}").map_err(WriteError::at(path))?))
}
