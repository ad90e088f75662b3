//! The caches of a batch of samples: pages that are used again from batch to batch.

use super::{Error, PromptStore};
use crate::{
    backend::{DType, Queue},
    cache::{BlockTable, Domain, PagedKv, Snapshot},
    model::{Activations, Batch, Decoder, Extent, Goal, SequenceStep},
    ops::Pass,
};

/// Tokens of a block.
pub(super) const BLOCK_SIZE: usize = 16;

/// One model's caches of the sequences of a batch.
pub struct BatchCache {
    pub kv: PagedKv,
    dtype: DType,
    tables: Vec<BlockTable>,
    /// Cache slot of each token of each sequence.
    pub slots: Vec<Vec<u32>>,
    activations: Option<Activations>,
}

/// New tokens of one sequence.
#[derive(Clone, Copy)]
pub struct Piece<'a> {
    pub ids: &'a [u32],
    pub positions: &'a [u32],
}

impl BatchCache {
    /// Without room yet. `dtype`: F32 or BF16.
    pub fn new(queue: &Queue, decoder: &Decoder, dtype: DType) -> Result<BatchCache, Error> {
        let kv = decoder.config.paged_kv(queue.backend(), 1, BLOCK_SIZE, dtype)?;
        Ok(BatchCache { kv, dtype, tables: Vec::new(), slots: Vec::new(), activations: None })
    }

    /// Forgets everything and makes room for sequences of these lengths.
    pub fn begin(&mut self, queue: &Queue, decoder: &Decoder, lengths: &[usize]) -> Result<(), Error> {
        self.tables.clear();
        let blocks: usize = lengths.iter().map(|len| len.div_ceil(BLOCK_SIZE)).sum();
        if self.kv.pool().total() < blocks {
            self.kv = decoder.config.paged_kv(queue.backend(), blocks, BLOCK_SIZE, self.dtype)?;
        }
        self.tables = lengths.iter().map(|_| BlockTable::new(self.kv.pool())).collect();
        self.slots = vec![Vec::new(); lengths.len()];
        Ok(())
    }

    /// Takes slots for the next tokens of every sequence; the batch that a pass over them runs on.
    pub fn append(&mut self, queue: &Queue, decoder: &Decoder, pieces: &[Piece]) -> Result<Batch, Error> {
        let mut taken = Vec::new();
        for ((piece, table), slots) in pieces.iter().zip(&mut self.tables).zip(&mut self.slots) {
            let new = self.kv.append(queue, table, piece.ids.len())?;
            slots.extend(&new);
            taken.push(new);
        }
        self.batch(queue, decoder, pieces, &taken)
    }

    /// The batch of a pass over the last tokens of every sequence, whose keys and values lie in the cache already. Those that
    /// the pass itself computes go to slots aside: [`BatchCache::begin`] was given one sequence more, as long as all these
    /// tokens, that nothing was appended to.
    pub fn over(&mut self, queue: &Queue, decoder: &Decoder, pieces: &[Piece]) -> Result<Batch, Error> {
        let table = self.tables.last_mut().expect("a sequence more than there are samples");
        let mut aside = Vec::new();
        for piece in pieces {
            aside.push(self.kv.append(queue, table, piece.ids.len())?);
        }
        self.batch(queue, decoder, pieces, &aside)
    }

    /// The batch of a pass whose keys and values go to `slots`, a list for each piece.
    fn batch(
        &self,
        queue: &Queue,
        decoder: &Decoder,
        pieces: &[Piece],
        slots: &[Vec<u32>],
    ) -> Result<Batch, Error> {
        let blocks: Vec<Vec<u32>> = self.tables.iter().map(BlockTable::block_ids).collect();
        let mut steps = Vec::new();
        for (i, piece) in pieces.iter().enumerate() {
            if piece.ids.is_empty() {
                continue;
            }
            steps.push(SequenceStep {
                ids: piece.ids,
                positions: piece.positions,
                slots: &slots[i],
                blocks: &blocks[i],
                context: self.slots[i].len(),
            });
        }
        let tokens = steps.iter().map(|step| step.ids.len()).sum();
        let most = steps.iter().map(|step| step.blocks.len()).max().unwrap_or(0);
        // Single tokens too are learned from as a prompt's are.
        let (backend, config) = (queue.backend(), &decoder.config);
        let batch = Batch::with_room(backend, config, Pass::Prefill, tokens, steps.len(), most)?;
        batch.fill(queue, config, &steps)?;
        Ok(batch)
    }

    /// Fills the caches of whole prompts, from disk where they are kept there; the number of tokens that had to be read.
    pub fn read(
        &mut self,
        queue: &Queue,
        decoder: &Decoder,
        store: Option<&PromptStore>,
        mut pieces: Vec<Piece>,
    ) -> Result<usize, Error> {
        for (i, piece) in pieces.iter_mut().enumerate() {
            let kept = store.filter(|_| !piece.ids.is_empty()).and_then(|store| store.get(*piece));
            if let Some(kept) = kept {
                self.restore(queue, i, &kept)?;
                *piece = Piece { ids: &[], positions: &[] };
            }
        }
        let missing: usize = pieces.iter().map(|piece| piece.ids.len()).sum();
        if missing > 0 {
            self.prefill(queue, decoder, &pieces)?;
        }
        for (i, piece) in pieces.iter().enumerate().filter(|(_, piece)| !piece.ids.is_empty()) {
            if let Some(store) = store {
                let snapshot = self.capture(queue, i, store.domain().clone(), *piece)?;
                store.put(*piece, &snapshot)?;
            }
        }
        Ok(missing)
    }

    /// Runs the model over the next tokens of every sequence, which nobody learns from.
    pub fn prefill(&mut self, queue: &Queue, decoder: &Decoder, pieces: &[Piece]) -> Result<(), Error> {
        let batch = self.append(queue, decoder, pieces)?;
        self.pass(queue, decoder, &batch, Goal::Cache)
    }

    /// The same, and the logits `[vocab]` after the last token of the last sequence.
    pub fn logits(&mut self, queue: &Queue, decoder: &Decoder, pieces: &[Piece]) -> Result<Vec<f32>, Error> {
        let batch = self.append(queue, decoder, pieces)?;
        self.logits_of(queue, decoder, &batch)
    }

    /// The logits `[vocab]` after the last token of a batch of this cache.
    pub fn logits_of(&mut self, queue: &Queue, decoder: &Decoder, batch: &Batch) -> Result<Vec<f32>, Error> {
        self.pass(queue, decoder, batch, Goal::Hidden)?;
        let last = batch.tokens - 1;
        let activations = self.activations.as_ref().expect("a pass leaves them");
        Ok(decoder.logits(queue, Pass::Decode, activations, &[last as u32])?)
    }

    /// Copies a sequence out, which `piece` says the tokens of.
    pub fn capture(
        &self,
        queue: &Queue,
        sequence: usize,
        domain: Domain,
        piece: Piece,
    ) -> Result<Snapshot, Error> {
        let table = &self.tables[sequence];
        Ok(Snapshot::capture(&self.kv, queue, table, domain, piece.ids, piece.positions)?)
    }

    /// Puts a sequence that was computed before in the place of an empty one.
    pub fn restore(&mut self, queue: &Queue, sequence: usize, snapshot: &Snapshot) -> Result<(), Error> {
        let table = snapshot.restore(&self.kv, queue)?;
        self.slots[sequence] = table.slots(0..table.len())?;
        self.tables[sequence] = table;
        Ok(())
    }

    fn pass(&mut self, queue: &Queue, decoder: &Decoder, batch: &Batch, goal: Goal) -> Result<(), Error> {
        let extent = Extent { tokens: batch.tokens, sequences: 1, context: BLOCK_SIZE };
        let activations = match self.activations.take().filter(|a| a.extent().tokens >= batch.tokens) {
            Some(activations) => activations,
            None => Activations::new(queue.backend(), &decoder.config, decoder.precision, extent)?,
        };
        decoder.forward(queue, batch, self.kv.layers(), &activations, goal, |_| {}, |_| {})?;
        self.activations = Some(activations);
        Ok(())
    }
}
