//! Blocks: who holds them, which are free, and which still hold a prefix somebody may ask for again.
//!
//! A block is in one of three places:
//!
//! - *held*: one or more [`Block`] handles exist (clone = share, drop = give back);
//! - *cached*: nobody holds it, but it was published under the hash of its prefix. A lookup revives it; if the free
//!   list is empty, the one given back longest ago is evicted;
//! - *free*.

use super::{BlockHash, Error};
use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

#[derive(Default)]
struct Entry {
    holders: u32,
    /// The prefix it was published under.
    hash: Option<BlockHash>,
    /// When it was given back: its key in `Inner::cached`.
    returned: u64,
}

struct Inner {
    entries: Vec<Entry>,
    free: Vec<u32>,
    /// By the time they were given back, oldest first.
    cached: BTreeMap<u64, u32>,
    by_hash: HashMap<BlockHash, u32>,
    clock: u64,
    block_size: usize,
}

impl Inner {
    fn available(&self) -> usize {
        self.free.len() + self.cached.len()
    }

    fn take(&mut self) -> Option<u32> {
        let id = match self.free.pop() {
            Some(id) => id,
            None => {
                let (_, id) = self.cached.pop_first()?;
                self.forget(id);
                id
            }
        };
        self.entries[id as usize].holders = 1;
        Some(id)
    }

    fn forget(&mut self, id: u32) {
        if let Some(hash) = self.entries[id as usize].hash.take() {
            self.by_hash.remove(&hash);
        }
    }

    fn give_back(&mut self, id: u32) {
        let entry = &mut self.entries[id as usize];
        entry.holders -= 1;
        if entry.holders > 0 {
            return;
        }
        if entry.hash.is_none() {
            self.free.push(id);
        } else {
            self.clock += 1;
            entry.returned = self.clock;
            self.cached.insert(self.clock, id);
        }
    }
}

/// The blocks of one cache. Cloning names the same pool.
#[derive(Clone)]
pub struct BlockPool(Arc<Mutex<Inner>>);

impl BlockPool {
    /// `blocks` blocks of `block_size` tokens each; a slot must fit in 32 bits.
    pub fn new(blocks: usize, block_size: usize) -> Result<BlockPool, Error> {
        let slots = blocks.checked_mul(block_size).filter(|&slots| slots <= u32::MAX as usize);
        if slots.is_none() {
            return Err(Error::TooLarge(format!("{blocks} blocks of {block_size} tokens")));
        }
        if block_size == 0 {
            return Err(Error::Mismatch { what: "block_size", found: "0".into(), expected: "≥ 1".into() });
        }
        Ok(BlockPool(Arc::new(Mutex::new(Inner {
            entries: (0..blocks).map(|_| Entry::default()).collect(),
            // Popped from the end: low blocks first.
            free: (0..blocks as u32).rev().collect(),
            cached: BTreeMap::new(),
            by_hash: HashMap::new(),
            clock: 0,
            block_size,
        }))))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // No code of ours panics between two states that belong together.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `n` blocks of unknown content, evicting cached prefixes if need be; all or none.
    pub fn allocate(&self, n: usize) -> Result<Vec<Block>, Error> {
        let mut inner = self.lock();
        if inner.available() < n {
            let (free, total) = (inner.available(), inner.entries.len());
            return Err(Error::OutOfBlocks { wanted: n, free, total });
        }
        let ids: Vec<u32> = (0..n).map_while(|_| inner.take()).collect();
        Ok(ids.into_iter().map(|id| Block { id, pool: self.clone() }).collect())
    }

    /// Makes the content of a full `block` findable under `hash`. Where another block is already, that one stays and
    /// the answer is `false`.
    ///
    /// The content must be final and, for whoever looks it up, complete: publish after the work that writes it was
    /// issued on a queue that readers are ordered behind.
    pub fn publish(&self, hash: BlockHash, block: &Block) -> bool {
        debug_assert!(Arc::ptr_eq(&self.0, &block.pool.0), "a block of another pool");
        let mut inner = self.lock();
        if inner.by_hash.contains_key(&hash) {
            return false;
        }
        inner.forget(block.id);
        inner.by_hash.insert(hash, block.id);
        inner.entries[block.id as usize].hash = Some(hash);
        true
    }

    /// Shares the block that holds the prefix `hash`.
    pub fn lookup(&self, hash: &BlockHash) -> Option<Block> {
        let mut inner = self.lock();
        let id = *inner.by_hash.get(hash)?;
        let entry = &mut inner.entries[id as usize];
        entry.holders += 1;
        let (revived, returned) = (entry.holders == 1, entry.returned);
        if revived {
            inner.cached.remove(&returned);
        }
        Some(Block { id, pool: self.clone() })
    }

    /// Forgets every published prefix; held blocks stay with their holders.
    pub fn clear_cached(&self) {
        let mut inner = self.lock();
        inner.by_hash.clear();
        inner.entries.iter_mut().for_each(|entry| entry.hash = None);
        let cached = std::mem::take(&mut inner.cached);
        inner.free.extend(cached.into_values());
    }

    pub fn block_size(&self) -> usize {
        self.lock().block_size
    }

    /// Blocks in all.
    pub fn total(&self) -> usize {
        self.lock().entries.len()
    }

    /// Blocks that somebody holds.
    pub fn used(&self) -> usize {
        let inner = self.lock();
        inner.entries.len() - inner.available()
    }

    /// Blocks that nobody holds but that a prefix lookup can still find.
    pub fn cached(&self) -> usize {
        self.lock().cached.len()
    }

    /// Blocks that [`BlockPool::allocate`] can hand out, cached ones included.
    pub fn available(&self) -> usize {
        self.lock().available()
    }
}

impl fmt::Debug for BlockPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlockPool({} of {} used, {} cached)", self.used(), self.total(), self.cached())
    }
}

/// A share in one block: clones share it, the last one dropped gives it back.
pub struct Block {
    id: u32,
    pool: BlockPool,
}

impl Block {
    /// Index of its page in every layer.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Whether another handle exists.
    pub fn is_shared(&self) -> bool {
        self.pool.lock().entries[self.id as usize].holders > 1
    }

    /// Before its content changes: no prefix lookup may find it any more.
    pub(super) fn unpublish(&self) {
        self.pool.lock().forget(self.id);
    }
}

impl Clone for Block {
    fn clone(&self) -> Block {
        self.pool.lock().entries[self.id as usize].holders += 1;
        Block { id: self.id, pool: self.pool.clone() }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.pool.lock().give_back(self.id);
    }
}

impl fmt::Debug for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Block({})", self.id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(n: u8) -> BlockHash {
        BlockHash([n; 32])
    }

    fn one(pool: &BlockPool) -> Block {
        pool.allocate(1).unwrap().remove(0)
    }

    #[test]
    fn all_or_none() {
        let pool = BlockPool::new(4, 16).unwrap();
        let held = pool.allocate(3).unwrap();
        assert!(matches!(pool.allocate(2), Err(Error::OutOfBlocks { wanted: 2, free: 1, total: 4 })));
        assert_eq!((pool.used(), pool.available()), (3, 1));
        let copy = held[0].clone();
        drop(held);
        assert_eq!(pool.used(), 1);
        assert!(!copy.is_shared());
        drop(copy);
        assert_eq!((pool.used(), pool.cached(), pool.available()), (0, 0, 4));
    }

    #[test]
    fn cached_blocks_are_revived_or_evicted_oldest_first() {
        let pool = BlockPool::new(3, 16).unwrap();
        for n in 0..3 {
            let held = pool.allocate(3).unwrap();
            assert!(pool.publish(hash(n), &held[0]));
            drop(held);
        }
        // Each round took the free blocks and evicted the one cached before.
        assert_eq!(pool.cached(), 1);
        assert!(pool.lookup(&hash(0)).is_none() && pool.lookup(&hash(1)).is_none());

        pool.clear_cached();
        let blocks = pool.allocate(3).unwrap();
        for (n, block) in (0..3).zip(&blocks) {
            pool.publish(hash(n), block);
        }
        drop(blocks);
        // Using 0 again makes 1 the oldest.
        let revived = pool.lookup(&hash(0)).unwrap();
        assert_eq!((pool.used(), pool.cached()), (1, 2));
        drop(revived);
        let taken = one(&pool);
        assert!(pool.lookup(&hash(1)).is_none());
        assert!(pool.lookup(&hash(0)).is_some() && pool.lookup(&hash(2)).is_some());
        drop(taken);
        assert_eq!(pool.used(), 0);
    }

    #[test]
    fn the_first_published_stays() {
        let pool = BlockPool::new(2, 16).unwrap();
        let (a, b) = (one(&pool), one(&pool));
        assert!(pool.publish(hash(1), &a));
        assert!(!pool.publish(hash(1), &b));
        assert_eq!(pool.lookup(&hash(1)).unwrap().id(), a.id());
        // Published again under another name, it is no longer found under the first.
        assert!(pool.publish(hash(2), &a));
        assert!(pool.lookup(&hash(1)).is_none());
        a.unpublish();
        assert!(pool.lookup(&hash(2)).is_none());
        drop((a, b));
        assert_eq!((pool.used(), pool.cached()), (0, 0));
    }

    #[test]
    fn slots_must_fit() {
        assert!(matches!(BlockPool::new(1 << 28, 16), Err(Error::TooLarge(_))));
        assert!(matches!(BlockPool::new(usize::MAX, 2), Err(Error::TooLarge(_))));
        assert!(BlockPool::new(4, 0).is_err());
        fn is_send<T: Send>() {}
        is_send::<BlockPool>();
    }
}
