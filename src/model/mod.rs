//! Decoder-only language models: configuration, weights, file formats.
//!
//! One decoder whose families are data: [`ModelConfig`] says what a Llama, a Qwen or a Gemma is, [`Weights`] holds its
//! tensors as they lie in the mapped file. [`load`] reads both from a Hugging Face folder or a GGUF file.

mod adapter;
mod batch;
mod config;
mod config_gguf;
mod config_hf;
#[cfg(test)]
mod config_tests;
mod decoder;
pub mod gguf;
mod kv;
mod names;
mod parameters;
mod safetensors;
mod weights;

pub use adapter::{Adapter, Factors, LoraTarget};
pub use batch::{Batch, SequenceStep};
pub use config::{Biases, ModelConfig, Rope, RopeScaling};
pub use decoder::{Activations, Decoder, Extent, Goal, Head};
pub use gguf::Gguf;
pub use parameters::{Parameter, Role, parameters};
pub use weights::{LayerWeights, Progress, Weights};

use crate::{
    backend::{self, Backend},
    ops,
};
use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};
use weights::{FileTensor, FileTensors};

/// Why a model was not loaded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read {}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{} is not a model: it {problem}", path.display())]
    NotAModel { path: PathBuf, problem: String },
    #[error("{}: {problem}", path.display())]
    Config { path: PathBuf, problem: String },
    #[error("{}: unknown architecture `{name}` (llama, mistral, qwen2, qwen3 and gemma3 are known)", path.display())]
    UnknownArchitecture { path: PathBuf, name: String },
    #[error("{}: unknown activation `{name}` (silu, gelu and gelu_pytorch_tanh are known)", path.display())]
    UnknownActivation { path: PathBuf, name: String },
    #[error("{}: unknown rope scaling `{name}` (default, linear, llama3 and yarn are known)", path.display())]
    UnknownRopeScaling { path: PathBuf, name: String },
    #[error("{}: {source}", path.display())]
    Gguf { path: PathBuf, source: gguf::Error },
    #[error("{}: not a sound safetensors file (truncated, or its header lies): {source}", path.display())]
    Safetensors { path: PathBuf, source: ::safetensors::SafeTensorError },
    #[error("{}: tensor `{name}` is missing", path.display())]
    MissingTensor { path: PathBuf, name: String },
    #[error("{}: tensor `{name}` has shape {found:?}, the configuration calls for {expected:?}", path.display())]
    TensorShape { path: PathBuf, name: String, found: Vec<usize>, expected: Vec<usize> },
    #[error("{}: tensor `{name}` is stored as {found}; norms and biases are F32, F16 or BF16, matrices that or a GGUF block format", path.display())]
    TensorType { path: PathBuf, name: String, found: String },
    #[error("nothing to run: the batch has no tokens")]
    EmptyBatch,
    #[error(
        "sequences with one new token and with more in one batch: decode and prefill are passes of their own"
    )]
    MixedBatch,
    #[error("token id {id} is not in the model's vocabulary of {vocab}")]
    TokenOutOfRange { id: u32, vocab: usize },
    #[error("{tokens} tokens are more than the model's context of {limit}: shorten the prompt")]
    ContextExceeded { tokens: usize, limit: usize },
    #[error(transparent)]
    Shape(#[from] ops::ShapeError),
    #[error(transparent)]
    Backend(#[from] backend::Error),
}

/// A model ready to run.
pub struct Loaded {
    pub config: ModelConfig,
    pub weights: Weights,
    pub source: Source,
}

/// Where a model came from; its tokenizer is there, too.
pub enum Source {
    /// A Hugging Face folder.
    Folder(PathBuf),
    Gguf(Gguf),
}

/// Loads a Hugging Face folder (`config.json` and safetensors), a GGUF file, or the folder of an [`Adapter`] with its base.
///
/// Weights stay in the mapped file, in the format they have there, where the device can read them there. `progress` is
/// told bytes done and total.
pub fn load(path: &Path, backend: &Arc<dyn Backend>, progress: Progress<'_>) -> Result<Loaded, Error> {
    let kind = fs::metadata(path).map_err(|source| Error::Io { path: path.into(), source })?;
    if kind.is_dir() && Adapter::is_at(path) {
        let adapter = Adapter::read(path)?;
        let base = load(&adapter.base_path(path)?, backend, progress)?;
        let weights = adapter.merge(&base.config, &base.weights, backend)?;
        return Ok(Loaded { weights, ..base });
    }
    if kind.is_dir() {
        let config = ModelConfig::from_folder(path)?;
        let files = safetensors::open(path)?;
        let names = names::hugging_face(config.post_norms);
        let has_embedding = |(prefix, _): &&(&str, &str)| {
            files.tensors.contains_key(&format!("{prefix}{}.weight", names.embed))
        };
        let prefixes = names::HUGGING_FACE_PREFIXES;
        let prefix = *prefixes.iter().find(has_embedding).unwrap_or(&prefixes[0]);
        let weights = Weights::read(&config, files, &names, prefix, backend.as_ref(), progress)?;
        return Ok(Loaded { config, weights, source: Source::Folder(path.into()) });
    }
    if path.extension().is_some_and(|extension| extension == "safetensors") {
        let problem = "is weights alone; give the folder that also has config.json and the tokenizer".into();
        return Err(Error::NotAModel { path: path.into(), problem });
    }
    let gguf = Gguf::open(path)?;
    let config = ModelConfig::from_gguf(&gguf)?;
    let file_path: Arc<Path> = path.into();
    let tensor = |(name, info): (&String, &gguf::TensorInfo)| {
        let (path, file, shape) = (file_path.clone(), gguf.file().clone(), info.shape.clone());
        (name.clone(), FileTensor { path, file, offset: info.bytes.start, dtype: Ok(info.dtype), shape })
    };
    let files = FileTensors { path: path.into(), tensors: gguf.tensors().iter().map(tensor).collect() };
    let weights = Weights::read(&config, files, &names::GGUF, ("", ""), backend.as_ref(), progress)?;
    Ok(Loaded { config, weights, source: Source::Gguf(gguf) })
}

/// Files beside the weights that make a Hugging Face folder.
pub const COMPANIONS: [&str; 7] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
];

/// Standard deviation of a new model's matrices: `initializer_range` of config.json, transformers' 0.02 where it is not said.
pub fn initializer_range(folder: &Path) -> Result<f32, Error> {
    let path = folder.join("config.json");
    let text = read_text(&path)?;
    let bad = |problem: String| Error::Config { path: path.clone(), problem };
    let config: serde_json::Value = serde_json::from_str(&text).map_err(|error| bad(error.to_string()))?;
    let Some(range) = config.get("initializer_range") else { return Ok(0.02) };
    let range = range.as_f64().filter(|range| *range > 0.0 && range.is_finite());
    range.map(|range| range as f32).ok_or_else(|| bad("`initializer_range` is no positive number".into()))
}

/// Whether a Hugging Face folder has weights, not only a configuration.
pub fn has_weights(folder: &Path) -> bool {
    ["model.safetensors", "model.safetensors.index.json"].iter().any(|name| folder.join(name).is_file())
}

fn read_text(path: &Path) -> Result<String, Error> {
    fs::read_to_string(path).map_err(|source| Error::Io { path: path.into(), source })
}
