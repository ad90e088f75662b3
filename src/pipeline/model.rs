//! A model as the pipeline holds it: decoder, tokenizer, and what a fuser has to know of it.

use super::Error;
use crate::{
    backend::{Backend, Precision},
    fuser,
    model::{self, Decoder, Source},
    tokenizer::Tokenizer,
};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

/// A loaded model and its tokenizer, where it has one.
pub struct Model {
    pub path: PathBuf,
    pub decoder: Arc<Decoder>,
    pub tokenizer: Option<Tokenizer>,
}

impl Model {
    /// Loads a Hugging Face folder or a GGUF file.
    pub fn load(
        path: &Path,
        backend: &Arc<dyn Backend>,
        precision: Precision,
        progress: &dyn Fn(u64, u64),
    ) -> Result<Model, Error> {
        let loaded = model::load(path, backend, progress)?;
        let tokenizer = match &loaded.source {
            Source::Folder(folder) if !folder.join("tokenizer.json").exists() => None,
            Source::Folder(folder) => Some(Tokenizer::from_folder(folder)?),
            Source::Gguf(gguf) => Some(Tokenizer::from_gguf(
                &gguf.vocab().map_err(|source| model::Error::Gguf { path: path.into(), source })?,
            )?),
        };
        Ok(Model { path: path.into(), decoder: Arc::new(Decoder::new(loaded, precision)), tokenizer })
    }

    /// What a fuser made for this model expects.
    pub fn party(&self) -> fuser::Party {
        let config = &self.decoder.config;
        fuser::Party {
            name: self.path.file_stem().map(|name| name.to_string_lossy().into_owned()),
            config: Some(fuser::Digest(config.fingerprint())),
            tokenizer: self
                .tokenizer
                .as_ref()
                .map(|tokenizer| fuser::Digest(tokenizer.fingerprint(config.vocab))),
            rope: Some(config.rope_in_words()),
            norm: Some(if config.qk_norm { "rms" } else { "none" }.into()),
            ..fuser::Party::new(config.layers, config.kv_heads, config.head_dim)
        }
    }

    pub(super) fn tokenizer(&self) -> Result<&Tokenizer, Error> {
        self.tokenizer.as_ref().ok_or_else(|| Error::NoTokenizer { model: self.path.display().to_string() })
    }
}
