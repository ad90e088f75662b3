//! A model as the pipeline holds it: decoder, tokenizer, and what a fuser has to know of it.

use super::Error;
use crate::{
    align::LayerMapping,
    backend::{Backend, Precision},
    fuser::{self, FuserConfig},
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

    /// An untrained fuser's configuration, this model being the receiver: each layer reads the sharer's best one by `mapping`.
    pub fn fuser_config(
        &self,
        sharer: &Model,
        kind: fuser::Kind,
        (hidden, intermediate): (usize, usize),
        mapping: LayerMapping,
    ) -> FuserConfig {
        let (mine, other) = (self.decoder.config.layers, sharer.decoder.config.layers);
        let sources: Vec<usize> = mapping.sources(mine, other).iter().map(|sources| sources[0]).collect();
        let rotations = fuser::Rotations {
            receiver: self.decoder.config.key_form(),
            sharer: sharer.decoder.config.key_form(),
        };
        let (receiver, sharer) = (self.party(), sharer.party());
        let rotations = (kind == fuser::Kind::Ridge).then_some(rotations);
        FuserConfig {
            rotations,
            ..FuserConfig::new(kind, hidden, intermediate, mapping.into(), &sources, receiver, sharer)
        }
    }

    /// # Errors
    /// If there is none beside the model.
    pub fn tokenizer(&self) -> Result<&Tokenizer, Error> {
        self.tokenizer.as_ref().ok_or_else(|| Error::NoTokenizer { model: self.path.display().to_string() })
    }
}
