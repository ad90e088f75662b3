//! The blocks of one sequence, in order.

use super::{Block, BlockPool, Error};
use std::ops::Range;

/// Where the tokens of one sequence lie: position p in slot `blocks[p / block_size] · block_size + p % block_size`.
///
/// Dropping it gives the blocks back.
#[derive(Debug)]
pub struct BlockTable {
    pool: BlockPool,
    block_size: usize,
    blocks: Vec<Block>,
    len: usize,
}

impl BlockTable {
    /// An empty sequence.
    pub fn new(pool: &BlockPool) -> BlockTable {
        BlockTable::with_prefix(pool, Vec::new())
    }

    /// A sequence that starts with full blocks found by [`super::longest_prefix`].
    pub fn with_prefix(pool: &BlockPool, blocks: Vec<Block>) -> BlockTable {
        let block_size = pool.block_size();
        BlockTable { pool: pool.clone(), block_size, len: blocks.len() * block_size, blocks }
    }

    /// Tokens.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn block_size(&self) -> usize {
        self.block_size
    }

    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// For the block table operand of attention.
    pub fn block_ids(&self) -> Vec<u32> {
        self.blocks.iter().map(Block::id).collect()
    }

    /// How many blocks [`BlockTable::append`] would allocate for `n` more tokens.
    pub fn blocks_needed(&self, n: usize) -> usize {
        self.len.saturating_add(n).div_ceil(self.block_size).saturating_sub(self.blocks.len())
    }

    /// Slots of `n` new tokens at the end. All or nothing: without enough blocks the table is as before.
    ///
    /// A last block that is partly filled and shared with a fork must have been made writable.
    pub fn append(&mut self, n: usize) -> Result<Vec<u32>, Error> {
        let end = self.len.checked_add(n).ok_or(Error::TooLarge(format!("{n} more tokens")))?;
        let partial =
            (n > 0 && !self.len.is_multiple_of(self.block_size)).then(|| self.len / self.block_size);
        if let Some(last) = partial.map(|i| &self.blocks[i]).filter(|last| last.is_shared()) {
            return Err(Error::Shared { block: last.id(), from: self.len });
        }
        let fresh = self.pool.allocate(self.blocks_needed(n))?;
        if let Some(last) = partial {
            self.blocks[last].unpublish();
        }
        self.blocks.extend(fresh);
        let start = std::mem::replace(&mut self.len, end);
        self.slots(start..end)
    }

    /// Slots of the tokens at `range`.
    pub fn slots(&self, range: Range<usize>) -> Result<Vec<u32>, Error> {
        if range.start > range.end || range.end > self.len {
            return Err(Error::Range { start: range.start, end: range.end, len: self.len });
        }
        let slot = |p: usize| self.blocks[p / self.block_size].id() * self.block_size as u32;
        Ok(range.map(|p| slot(p) + (p % self.block_size) as u32).collect())
    }

    /// A second sequence with the same tokens so far, sharing every block. Whichever writes first copies
    /// ([`BlockTable::make_writable`]).
    pub fn fork(&self) -> BlockTable {
        BlockTable { pool: self.pool.clone(), blocks: self.blocks.clone(), ..*self }
    }

    /// Copy on write: gives this sequence its own blocks wherever a block under `range` is shared, and returns which
    /// slots the caller has to copy (from, to) before anything is written. Published blocks are withdrawn from the
    /// prefix index, since their content is about to change. `range` may reach past the end, where an append will
    /// write.
    ///
    /// All or nothing: without enough blocks the table is as before.
    pub fn make_writable(&mut self, range: Range<usize>) -> Result<Vec<(u32, u32)>, Error> {
        if range.is_empty() {
            return Ok(Vec::new());
        }
        let size = self.block_size;
        let last = range.end.div_ceil(size).min(self.blocks.len());
        let touched = (range.start / size).min(last)..last;
        let shared: Vec<usize> = touched.clone().filter(|&i| self.blocks[i].is_shared()).collect();
        let fresh = self.pool.allocate(shared.len())?;
        let mut copies = Vec::new();
        for (i, new) in shared.into_iter().zip(fresh) {
            let old = std::mem::replace(&mut self.blocks[i], new);
            let tokens = (self.len - i * size).min(size) as u32;
            let (from, to) = (old.id() * size as u32, self.blocks[i].id() * size as u32);
            copies.extend((0..tokens).map(|offset| (from + offset, to + offset)));
        }
        self.blocks[touched].iter().for_each(Block::unpublish);
        Ok(copies)
    }

    /// Forgets tokens from `len` on; no effect if there are none.
    pub fn truncate(&mut self, len: usize) {
        if len >= self.len {
            return;
        }
        self.len = len;
        self.drop_from(len.div_ceil(self.block_size));
    }

    /// Gives blocks back last first: of a prefix that nobody holds, the end is then evicted before the beginning, and
    /// what remains can still be found.
    fn drop_from(&mut self, keep: usize) {
        while self.blocks.len() > keep {
            self.blocks.pop();
        }
    }
}

impl Drop for BlockTable {
    fn drop(&mut self) {
        self.drop_from(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool() -> BlockPool {
        BlockPool::new(8, 4).unwrap()
    }

    #[test]
    fn append_and_truncate() {
        let pool = pool();
        let mut table = BlockTable::new(&pool);
        assert!(table.append(0).unwrap().is_empty());
        assert_eq!(table.append(3).unwrap(), [0, 1, 2]);
        assert_eq!(table.append(3).unwrap(), [3, 4, 5]);
        assert_eq!(table.block_ids(), [0, 1]);
        assert_eq!(table.slots(2..5).unwrap(), [2, 3, 4]);
        assert!(matches!(table.slots(2..7), Err(Error::Range { start: 2, end: 7, len: 6 })));
        assert!(matches!(table.append(100), Err(Error::OutOfBlocks { wanted: 25, free: 6, total: 8 })));
        assert!(table.append(usize::MAX).is_err());
        assert_eq!((table.len(), pool.used()), (6, 2));
        table.truncate(4);
        assert_eq!((table.len(), pool.used()), (4, 1));
        table.truncate(9);
        assert_eq!(table.len(), 4);
        assert_eq!(table.append(1).unwrap(), [4]);
        drop(table);
        assert_eq!(pool.used(), 0);
    }

    #[test]
    fn forks_share_until_written() {
        let pool = pool();
        let mut table = BlockTable::new(&pool);
        table.append(6).unwrap();
        let mut fork = table.fork();
        assert_eq!(pool.used(), 2);
        assert!(matches!(fork.append(1), Err(Error::Shared { block: 1, from: 6 })));
        // The full block stays shared, the tokens of the other are copied.
        assert_eq!(fork.make_writable(6..7).unwrap(), [(4, 8), (5, 9)]);
        assert_eq!(fork.append(1).unwrap(), [10]);
        assert!(fork.make_writable(6..7).unwrap().is_empty());
        assert_eq!(table.append(1).unwrap(), [6]);
        assert_eq!((table.block_ids(), fork.block_ids()), (vec![0, 1], vec![0, 2]));
        assert_eq!(fork.make_writable(3..4).unwrap(), [(0, 12), (1, 13), (2, 14), (3, 15)]);
        drop(table);
        assert_eq!(pool.used(), 2);
        drop(fork);
        assert_eq!(pool.used(), 0);
    }

    #[test]
    fn a_copy_without_room_changes_nothing() {
        let pool = BlockPool::new(3, 4).unwrap();
        let mut table = BlockTable::new(&pool);
        table.append(8).unwrap();
        let mut fork = table.fork();
        assert!(matches!(fork.make_writable(0..8), Err(Error::OutOfBlocks { wanted: 2, free: 1, total: 3 })));
        assert_eq!(fork.block_ids(), table.block_ids());
        drop(fork);
        assert_eq!(pool.used(), 2);
    }

    #[test]
    fn writing_withdraws_a_published_block() {
        let pool = pool();
        let hash = super::super::BlockHash([1; 32]);
        let mut table = BlockTable::new(&pool);
        table.append(4).unwrap();
        pool.publish(hash, &table.blocks()[0]);
        table.truncate(2);
        table.append(1).unwrap();
        assert!(pool.lookup(&hash).is_none());
        let mut whole = BlockTable::new(&pool);
        whole.append(4).unwrap();
        pool.publish(hash, &whole.blocks()[0]);
        whole.make_writable(1..2).unwrap();
        assert!(pool.lookup(&hash).is_none());
    }
}
