//! Order between blocks of one launch, from fences and atomics.
//!
//! A block that fences and then changes a word by an atomic hands over what it did before the fence; a block
//! whose atomic comes upon that word later takes it over, and hands it on (PTX ISA, "Memory Consistency
//! Model": release and acquire patterns). That is how the last block to finish may read what all others wrote.

use std::collections::HashMap;

/// By block: the time before which its accesses are ordered before this block's.
pub type Taken = HashMap<u32, u32>;

#[derive(Default)]
pub struct Handover {
    /// By address of the word: what was handed over there.
    words: HashMap<u64, Taken>,
    /// What the running block took over.
    pub taken: Taken,
    /// The running block's time at its last fence.
    fenced: Option<u32>,
}

impl Handover {
    /// A new block runs; all are blocks of one launch.
    pub fn begin_block(&mut self) {
        self.taken.clear();
        self.fenced = None;
    }

    /// What the block did before `time` can be handed over from now on.
    pub fn fence(&mut self, time: u32) {
        self.fenced = Some(time);
    }

    /// An atomic of the running block on a word of global memory.
    pub fn atomic(&mut self, address: u64, block: u32) {
        if self.words.is_empty() && self.fenced.is_none() {
            return;
        }
        let word = self.words.entry(address).or_default();
        for (&other, &time) in word.iter() {
            let own = self.taken.entry(other).or_default();
            *own = (*own).max(time);
        }
        let Some(fenced) = self.fenced else { return };
        word.insert(block, fenced);
        for (&other, &time) in &self.taken {
            let there = word.entry(other).or_default();
            *there = (*there).max(time);
        }
    }
}
