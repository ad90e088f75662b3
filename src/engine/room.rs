//! A model as the engine holds it: its pages, which all requests share, and how much of them is spoken for.

use super::reuse;
use crate::{
    backend::Queue,
    cache::{BlockHash, Content, Domain, Fingerprint},
    model::ModelConfig,
    pipeline::{ComputeType, Error, Lane, Model, Prompt},
};

/// Tokens of a cache block.
pub(super) const BLOCK_SIZE: usize = 16;
/// Memory of a model's pages where nothing else is said.
const BYTES: usize = 1 << 30;

/// One model's pages.
pub(super) struct Room {
    /// For metrics and errors.
    pub name: &'static str,
    /// Never used itself: requests' lanes are [others](Lane::another) of it.
    home: Lane,
    /// Most tokens of a sequence: the model's context, or what the pages hold.
    pub limit: usize,
    pub total: usize,
    /// Blocks that running requests may come to need.
    pub reserved: usize,
    /// Of this model alone.
    domain: Domain,
}

impl Room {
    /// `blocks`: of the cache; else as many as a gibibyte holds, but no more than `sequences` whole contexts.
    pub fn new(
        name: &'static str,
        model: &Model,
        queue: Queue,
        dtype: ComputeType,
        blocks: Option<usize>,
        sequences: usize,
    ) -> Result<Room, Error> {
        let config = &model.decoder.config;
        let total = blocks.unwrap_or_else(|| default_blocks(config, dtype, sequences)).max(1);
        let kv = config.paged_kv(queue.backend(), total, BLOCK_SIZE, dtype.kv())?;
        log::info!(
            "{name}: cache of {total} blocks of {BLOCK_SIZE} tokens, {:.0} MiB",
            kv.bytes() as f64 / f64::from(1 << 20)
        );
        let limit = config.context_length.min(total * BLOCK_SIZE);
        let keys = kv.keys().positions();
        let home = Lane::for_several(model.decoder.clone(), queue, kv, limit, sequences)?;
        let print = |bytes: &[u8]| Fingerprint::of([bytes]);
        let tokenizer = model.tokenizer.as_ref().map(|tokenizer| tokenizer.fingerprint(config.vocab));
        let domain = Domain {
            // The pages are this process's own: its file is what a model is known by.
            model: Fingerprint::of([&config.fingerprint()[..], model.path.as_os_str().as_encoded_bytes()]),
            tokenizer: print(&tokenizer.unwrap_or_default()),
            content: Content::Plain,
            keys,
            salt: String::new(),
        };
        Ok(Room { name, home, limit, total, reserved: 0, domain })
    }

    pub fn vocab(&self) -> usize {
        self.home.decoder.config.vocab
    }

    pub fn lane(&self) -> Lane {
        self.home.another()
    }

    pub fn queue(&self) -> &Queue {
        &self.home.queue
    }

    /// Blocks that somebody holds.
    pub fn used(&self) -> usize {
        self.home.kv.pool().used()
    }

    pub fn fingerprint(&self) -> Fingerprint {
        self.domain.model
    }

    /// Hashes of a prompt that this model reads alone.
    pub fn plain(&self, salt: &str, ids: &[u32], positions: &[u32]) -> Vec<BlockHash> {
        let domain = Domain { salt: salt.into(), ..self.domain.clone() };
        reuse::plain(&domain, ids, positions, BLOCK_SIZE)
    }

    /// Hashes of a prompt on which a fuser adds.
    pub fn fused(&self, salt: &str, content: Content, prompt: &Prompt) -> Vec<BlockHash> {
        let domain = Domain { salt: salt.into(), content, ..self.domain.clone() };
        reuse::fused(&domain, prompt, BLOCK_SIZE)
    }
}

fn default_blocks(config: &ModelConfig, dtype: ComputeType, sequences: usize) -> usize {
    let width = config.kv_heads * config.head_dim;
    let bytes = dtype.kv().row_bytes(width).unwrap_or(usize::MAX).saturating_mul(2 * config.layers);
    let whole = config.context_length.div_ceil(BLOCK_SIZE).saturating_mul(sequences);
    (BYTES / bytes.saturating_mul(BLOCK_SIZE).max(1)).clamp(1, whole.max(1))
}
