//! The paged KV-cache: one vocabulary of pages for sharer, receiver and fused caches.
//!
//! [`BlockPool`] hands out blocks and remembers which hold the cache of which prefix; a [`BlockTable`] strings the
//! blocks of one sequence together; [`PagedKv`] is the memory itself, layer by layer; a [`Domain`] says what a cached
//! block is valid for; a [`Snapshot`] is a sequence's cache on disk.

mod paged;
mod pool;
mod prefix;
mod snapshot;
mod table;

pub use paged::{CacheShape, KeyForm, KvColumns, PagedKv, Rotation};
pub use pool::{Block, BlockPool};
pub use prefix::{BlockHash, Content, Domain, Fingerprint, KeyPositions, PrefixChain, longest_prefix};
pub use snapshot::{Snapshot, SnapshotError};
pub use table::BlockTable;

use crate::{backend, ops};

/// What can go wrong with pages and blocks.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "out of KV-cache blocks: {wanted} wanted, {free} of {total} free; end a sequence or make the cache larger"
    )]
    OutOfBlocks { wanted: usize, free: usize, total: usize },
    #[error("block {block} of this sequence is shared: make positions {from}.. writable before appending")]
    Shared { block: u32, from: usize },
    #[error("positions {start}..{end} lie outside a sequence of {len} tokens")]
    Range { start: usize, end: usize, len: usize },
    #[error("slot {slot} lies outside a cache of {slots} slots")]
    Slot { slot: u32, slots: usize },
    #[error("slot {0} is named twice in one write")]
    SlotTwice(u32),
    #[error("layer {layer} of a cache of {layers} layers")]
    Layer { layer: usize, layers: usize },
    #[error("{what} is {found}, expected {expected}")]
    Mismatch { what: &'static str, found: String, expected: String },
    #[error("a KV-cache of {0} is too large to address")]
    TooLarge(String),
    #[error(transparent)]
    Device(#[from] backend::Error),
    #[error(transparent)]
    Operand(#[from] ops::ShapeError),
}
