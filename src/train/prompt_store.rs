//! Frozen models' caches of a data set's prompts on disk, so that epochs after the first, and later runs, skip the model.
//!
//! One [`Snapshot`] a sample, named after everything its content depends on: the weights' bytes, the tokenizer, how the model
//! computes, and the tokens with their positions. Runs that share a model and a data set share the folder.

use super::{Error, Piece};
use crate::{
    backend::{DType, Precision},
    cache::{Content, Domain, Fingerprint, KeyPositions, Snapshot, SnapshotError},
    durable::WriteError,
    model::{Adapter, ModelConfig},
    pipeline::Model,
};
use sha2::{Digest, Sha256};
use std::{
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

/// The caches of one model.
pub struct PromptStore {
    folder: PathBuf,
    domain: Domain,
    kv: DType,
}

impl PromptStore {
    /// Makes the folder where there is none. Reads the model's files once, to tell models by their bytes.
    pub fn open(folder: &Path, model: &Model, precision: Precision, kv: DType) -> Result<PromptStore, Error> {
        fs::create_dir_all(folder).map_err(WriteError::at(folder))?;
        let config = &model.decoder.config;
        let parts = [
            &config.fingerprint()[..],
            &weights_digest(&model.path)?[..],
            format!("{precision:?}").as_bytes(),
            format!("{kv:?}").as_bytes(),
        ]
        .map(<[u8]>::to_vec);
        let domain = Domain {
            model: Fingerprint::of(parts.iter().map(Vec::as_slice)),
            tokenizer: Fingerprint::of([&model.tokenizer()?.fingerprint(config.vocab)[..]]),
            content: Content::Plain,
            keys: KeyPositions::PostRope,
            salt: String::new(),
        };
        Ok(PromptStore { folder: folder.into(), domain, kv })
    }

    pub fn domain(&self) -> &Domain {
        &self.domain
    }

    /// Of keys and values of all layers.
    pub fn bytes_a_token(&self, config: &ModelConfig) -> usize {
        2 * config.layers * self.kv.row_bytes(config.kv_heads * config.head_dim).unwrap_or_default()
    }

    fn path(&self, piece: Piece) -> PathBuf {
        let bytes = |numbers: &[u32]| numbers.iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<u8>>();
        let (ids, positions) = (bytes(piece.ids), bytes(piece.positions));
        let Domain { model, tokenizer, keys, .. } = &self.domain;
        let whose = format!("{model} {tokenizer} {keys:?}");
        let name = Fingerprint::of([whose.as_bytes(), &ids, &positions]).to_string();
        self.folder.join(format!("{}.safetensors", &name[..32]))
    }

    /// Whether the cache of these tokens is there.
    pub fn has(&self, piece: Piece) -> bool {
        self.path(piece).is_file()
    }

    /// The cache of these tokens, where it is there. A file that cannot be used is said and counts as missing: the cache is
    /// computed again and replaces it.
    pub fn get(&self, piece: Piece) -> Option<Snapshot> {
        let path = self.path(piece);
        match Snapshot::load(&path, &self.domain) {
            Ok(kept)
                if kept.token_ids == piece.ids
                    && kept.position_ids == piece.positions
                    && kept.dtype == self.kv =>
            {
                Some(kept)
            }
            Ok(_) => {
                log::warn!("{}: holds other tokens than its name says: computed again", path.display());
                None
            }
            Err(SnapshotError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                log::warn!("{error}: computed again");
                None
            }
        }
    }

    /// Keeps a cache, whole or not at all.
    pub fn put(&self, piece: Piece, snapshot: &Snapshot) -> Result<(), Error> {
        snapshot.save(&self.path(piece)).map_err(Error::KeepPrompt)
    }
}

/// Of all weight files of a model, in the order of their names; of an adapter's base before its own.
fn weights_digest(path: &Path) -> Result<[u8; 32], Error> {
    let failed = |path: &Path| {
        let path = path.to_path_buf();
        move |source| Error::KeepPrompt(SnapshotError::Io { path, source })
    };
    let mut files = vec![path.to_path_buf()];
    if path.is_dir() {
        let entries = fs::read_dir(path).and_then(|all| all.collect::<io::Result<Vec<_>>>());
        files = entries.map_err(failed(path))?.into_iter().map(|entry| entry.path()).collect();
        files.retain(|file| file.extension().is_some_and(|extension| extension == "safetensors"));
        files.sort();
    }
    let mut hash = Sha256::new();
    if Adapter::is_at(path) {
        hash.update(weights_digest(&Adapter::read(path)?.base_path(path)?)?);
    }
    for path in &files {
        let mut file = File::open(path).map_err(failed(path))?;
        hash.update(file.metadata().map_err(failed(path))?.len().to_le_bytes());
        let mut chunk = vec![0; 1 << 20];
        loop {
            match file.read(&mut chunk).map_err(failed(path))? {
                0 => break,
                read => hash.update(&chunk[..read]),
            }
        }
    }
    Ok(hash.finalize().into())
}
