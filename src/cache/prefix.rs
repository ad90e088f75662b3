//! What a cached block is valid for: a SHA-256 chain from a [`Domain`] over the tokens of full blocks.
//!
//! Two blocks have the same hash only if everything that their content depends on is the same: models, tokenizer,
//! fuser and its settings, the isolation salt, whether keys are rotated, every earlier token, and its own.

use super::{Block, BlockPool};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fmt;

/// SHA-256 of whatever identifies a model, a tokenizer or a fuser. Written as 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Fingerprint([u8; 32]);

impl Fingerprint {
    /// Of a sequence of parts; where one ends counts.
    pub fn of<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> Fingerprint {
        let mut hash = Sha256::new();
        for part in parts {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        Fingerprint(hash.finalize().into())
    }
}

impl Fingerprint {
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl From<Fingerprint> for String {
    fn from(fingerprint: Fingerprint) -> String {
        fingerprint.to_string()
    }
}

impl TryFrom<String> for Fingerprint {
    type Error = String;

    fn try_from(text: String) -> Result<Fingerprint, String> {
        let wrong = || format!("fingerprint `{text}` is not 64 hexadecimal digits");
        if text.len() != 64 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(wrong());
        }
        let mut bytes = [0; 32];
        for (byte, i) in bytes.iter_mut().zip((0..).step_by(2)) {
            *byte = u8::from_str_radix(&text[i..i + 2], 16).map_err(|_| wrong())?;
        }
        Ok(Fingerprint(bytes))
    }
}

/// Whether the keys in a cache carry their positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KeyPositions {
    PreRope,
    PostRope,
}

/// What produced a cache.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Content {
    /// The model alone.
    Plain,
    /// The model's cache after a fuser.
    Fused {
        fuser: Fingerprint,
        /// The sharers' models, in the fuser's order.
        sharers: Vec<Fingerprint>,
        /// Everything else that changes what the fuser writes (alignment, mapping, gate overrides, fraction, order of
        /// several sharers), in one fixed spelling.
        settings: String,
    },
}

/// What a cached block depends on besides its tokens.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Domain {
    pub model: Fingerprint,
    pub tokenizer: Fingerprint,
    /// The mode: a fused block is never taken for a plain one, nor for one of another fuser.
    pub content: Content,
    pub keys: KeyPositions,
    /// Requests with different salts never see that the other's prefix is cached.
    #[serde(default)]
    pub salt: String,
}

/// Identity of a block's content.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockHash(pub(super) [u8; 32]);

impl fmt::Debug for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", Fingerprint(self.0))
    }
}

impl Domain {
    /// Root of the chain. Each field is tagged or length-prefixed, so that no two domains spell the same bytes.
    fn root(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        hash.update(b"c2c prefix 1\0");
        hash.update(self.model.0);
        hash.update(self.tokenizer.0);
        let mut text = |bytes: &[u8]| {
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        };
        text(self.salt.as_bytes());
        match &self.content {
            Content::Plain => text(b"plain"),
            Content::Fused { fuser, sharers, settings } => {
                text(b"fused");
                text(&fuser.0);
                text(settings.as_bytes());
                text(&sharers.iter().flat_map(|sharer| sharer.0).collect::<Vec<u8>>());
            }
        }
        hash.update(match self.keys {
            KeyPositions::PreRope => b"pre-rope ",
            KeyPositions::PostRope => b"post-rope",
        });
        hash.finalize().into()
    }
}

/// Hashes one sequence block by block.
#[derive(Clone, Debug)]
pub struct PrefixChain([u8; 32]);

impl PrefixChain {
    pub fn new(domain: &Domain) -> PrefixChain {
        PrefixChain(domain.root())
    }

    /// The hash of the next full block, which holds `tokens`.
    ///
    /// `companions` is what else the block's columns were made from: for a fused block the sharers' token ids up to
    /// the last column used and the mask of fused positions; for a plain block nothing.
    pub fn push(&mut self, tokens: &[u32], companions: &[u32]) -> BlockHash {
        let mut hash = Sha256::new();
        hash.update(self.0);
        for ids in [tokens, companions] {
            hash.update((ids.len() as u64).to_le_bytes());
            hash.update(ids.iter().flat_map(|id| id.to_le_bytes()).collect::<Vec<u8>>());
        }
        self.0 = hash.finalize().into();
        BlockHash(self.0)
    }

    /// Hashes of the full blocks of a plain sequence.
    pub fn hashes(domain: &Domain, tokens: &[u32], block_size: usize) -> Vec<BlockHash> {
        let mut chain = PrefixChain::new(domain);
        tokens.chunks_exact(block_size).map(|block| chain.push(block, &[])).collect()
    }
}

/// The cached blocks that `hashes` starts with, held for the caller.
///
/// Whoever wants logits must leave the last token out of what it hashes: they come from running it.
pub fn longest_prefix(pool: &BlockPool, hashes: &[BlockHash]) -> Vec<Block> {
    hashes.iter().map_while(|hash| pool.lookup(hash)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::BlockTable;
    use std::collections::HashSet;

    fn print(text: &str) -> Fingerprint {
        Fingerprint::of([text.as_bytes()])
    }

    fn plain() -> Domain {
        Domain {
            model: print("model"),
            tokenizer: print("tokenizer"),
            content: Content::Plain,
            keys: KeyPositions::PostRope,
            salt: String::new(),
        }
    }

    fn fused(fuser: &str, sharers: &[&str], settings: &str) -> Domain {
        let sharers = sharers.iter().map(|s| print(s)).collect();
        let content = Content::Fused { fuser: print(fuser), sharers, settings: settings.into() };
        Domain { content, ..plain() }
    }

    #[test]
    fn every_part_of_a_domain_counts() {
        let domains = [
            plain(),
            Domain { model: print("other"), ..plain() },
            Domain { tokenizer: print("other"), ..plain() },
            Domain { model: print("tokenizer"), tokenizer: print("model"), ..plain() },
            Domain { salt: "user 7".into(), ..plain() },
            Domain { keys: KeyPositions::PreRope, ..plain() },
            fused("f", &["a"], ""),
            fused("g", &["a"], ""),
            fused("f", &["a", "b"], ""),
            fused("f", &["b", "a"], ""),
            fused("f", &["a"], "fraction=0.5"),
        ];
        let tokens: Vec<u32> = (0..8).collect();
        let hashes: HashSet<BlockHash> =
            domains.iter().flat_map(|domain| PrefixChain::hashes(domain, &tokens, 4)).collect();
        assert_eq!(hashes.len(), 2 * domains.len());
    }

    #[test]
    fn earlier_tokens_and_companions_count() {
        let hashes = |tokens: &[u32]| PrefixChain::hashes(&plain(), tokens, 2);
        let (a, b) = (hashes(&[1, 2, 3, 4, 5]), hashes(&[1, 9, 3, 4]));
        assert_eq!((a.len(), b.len()), (2, 2));
        assert!(a[0] != b[0] && a[1] != b[1]);
        assert_eq!(a[..], hashes(&[1, 2, 3, 4])[..]);
        let push = |tokens: &[u32], companions: &[u32]| PrefixChain::new(&plain()).push(tokens, companions);
        assert_ne!(push(&[1, 2], &[]), push(&[1, 2], &[3]));
        assert_ne!(push(&[1, 2], &[3]), push(&[1], &[2, 3]));
    }

    #[test]
    fn the_longest_cached_prefix_is_found_and_its_end_evicted_first() {
        let pool = BlockPool::new(4, 2).unwrap();
        let tokens = [5, 6, 7, 8, 9, 10, 11];
        let hashes = PrefixChain::hashes(&plain(), &tokens, 2);
        let mut table = BlockTable::new(&pool);
        table.append(tokens.len()).unwrap();
        for (&hash, block) in hashes.iter().zip(table.blocks()) {
            assert!(pool.publish(hash, block));
        }
        let ids = table.block_ids();
        drop(table);
        assert_eq!((pool.used(), pool.cached()), (0, 3));
        let found = BlockTable::with_prefix(&pool, longest_prefix(&pool, &hashes));
        assert_eq!((found.len(), found.block_ids()), (6, ids[..3].to_vec()));
        drop(found);
        let other = PrefixChain::hashes(&plain(), &[5, 6, 7, 0], 2);
        assert_eq!(longest_prefix(&pool, &other).len(), 1);
        assert!(longest_prefix(&pool, &PrefixChain::hashes(&fused("f", &["a"], ""), &tokens, 2)).is_empty());
        // Two new blocks: the free one, and the last of the prefix.
        let taken = pool.allocate(2).unwrap();
        assert_eq!(longest_prefix(&pool, &hashes).len(), 2);
        drop(taken);
    }

    #[test]
    fn fingerprints_in_text() {
        let all: String = print("x").into();
        assert_eq!(Fingerprint::try_from(all.clone()), Ok(print("x")));
        for bad in ["", "12", &all[1..], &all.replace(&all[..2], "+1"), &"é".repeat(32)] {
            assert!(Fingerprint::try_from(bad.to_string()).is_err(), "{bad}");
        }
        assert_ne!(Fingerprint::of([&b"ab"[..], b"c"]), Fingerprint::of([&b"a"[..], b"bc"]));
    }
}
