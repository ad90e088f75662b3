//! One model with the cache of one conversation: what the sharer and the receiver each have.

use super::{Error, decode::Steps};
use crate::{
    backend::{Event, Queue},
    cache::{Block, BlockTable, Domain, KvColumns, PagedKv, Snapshot},
    model::{Activations, Batch, Decoder, Extent, Goal, SequenceStep},
    ops::{Pass, SampleRow, SampledRow},
};
use std::sync::Arc;

/// Tokens of one pass: longer prompts are cut, so that activations stay small.
pub(super) const MAX_PASS: usize = 512;

/// A decoder, its queue, its pages and one sequence in them.
pub struct Lane {
    pub decoder: Arc<Decoder>,
    pub queue: Queue,
    pub kv: Arc<PagedKv>,
    pub(super) passes: Arc<Passes>,
    table: BlockTable,
    ids: Vec<u32>,
    /// Cache slot of each token.
    slots: Vec<u32>,
    next_position: u32,
    /// Row of the residual stream that holds the last token of the last pass.
    pub(super) last_row: usize,
}

/// Memory for the passes of one queue, which run one after the other.
pub(super) struct Passes {
    pub activations: Activations,
    pub steps: Steps,
}

/// How many of `left` tokens the next piece of at most `most` takes. No piece but the only one is a single token, which would be
/// a decode pass, and its sums in another order.
pub(super) fn piece(left: usize, most: usize) -> usize {
    if left.checked_sub(1) == Some(most) && most > 2 { most - 1 } else { left.min(most) }
}

impl Lane {
    /// A lane for up to `tokens` tokens.
    pub fn new(decoder: Arc<Decoder>, queue: Queue, kv: PagedKv, tokens: usize) -> Result<Lane, Error> {
        Lane::for_several(decoder, queue, kv, tokens, 1)
    }

    /// The same with memory for decode passes of up to `sequences` lanes: this one and [others](Lane::another) in its pages.
    pub fn for_several(
        decoder: Arc<Decoder>,
        queue: Queue,
        kv: PagedKv,
        tokens: usize,
        sequences: usize,
    ) -> Result<Lane, Error> {
        let pass = tokens.clamp(1, MAX_PASS).max(sequences);
        let context = tokens.next_multiple_of(kv.block_size());
        let extent = Extent { tokens: pass, sequences, context };
        let activations = Activations::new(queue.backend(), &decoder.config, decoder.precision, extent)?;
        let passes = Arc::new(Passes { activations, steps: Steps::default() });
        Ok(Lane::empty(decoder, queue, Arc::new(kv), passes))
    }

    fn empty(decoder: Arc<Decoder>, queue: Queue, kv: Arc<PagedKv>, passes: Arc<Passes>) -> Lane {
        let table = BlockTable::new(kv.pool());
        let (ids, slots) = (Vec::new(), Vec::new());
        Lane { decoder, queue, kv, passes, table, ids, slots, next_position: 0, last_row: 0 }
    }

    /// An empty lane of the same model, in the same pages and on the same queue.
    ///
    /// What [`Lane::logits`] reads is there until any of them runs its next pass.
    pub fn another(&self) -> Lane {
        Lane::empty(self.decoder.clone(), self.queue.clone(), self.kv.clone(), self.passes.clone())
    }

    /// Begins with full blocks that hold the cache of `ids`, the last of which has rotary position `next_position − 1`.
    ///
    /// # Panics
    /// If the lane is not empty, or the blocks have not as many tokens as there are ids.
    pub fn begin_with(&mut self, blocks: Vec<Block>, ids: &[u32], next_position: u32) -> Result<(), Error> {
        assert!(self.ids.is_empty(), "a lane that has begun");
        self.table = BlockTable::with_prefix(self.kv.pool(), blocks);
        assert_eq!(self.table.len(), ids.len(), "blocks of other tokens");
        self.slots = self.table.slots(0..ids.len())?;
        self.ids = ids.to_vec();
        self.next_position = next_position;
        Ok(())
    }

    /// Where the tokens lie.
    pub fn table(&self) -> &BlockTable {
        &self.table
    }

    /// Token ids in the cache.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Cache slot of each token.
    pub fn slots(&self) -> &[u32] {
        &self.slots
    }

    /// Rotary position that follows the last token's.
    pub fn next_position(&self) -> u32 {
        self.next_position
    }

    /// Forgets all but the first `len` tokens, whose last had rotary position `next_position − 1`.
    pub fn truncate(&mut self, len: usize, next_position: u32) {
        self.table.truncate(len);
        self.ids.truncate(len);
        self.slots.truncate(len);
        self.next_position = next_position;
    }

    /// A copy of the cache, whose tokens sit at `positions`.
    pub fn capture(&self, domain: Domain, positions: &[u32]) -> Result<Snapshot, Error> {
        Ok(Snapshot::capture(&self.kv, &self.queue, &self.table, domain, &self.ids, positions)?)
    }

    /// Puts a cache that was computed before in the place of all there is.
    pub fn restore(&mut self, snapshot: &Snapshot) -> Result<(), Error> {
        self.truncate(0, 0);
        let table = snapshot.restore(&self.kv, &self.queue)?;
        self.slots = table.slots(0..table.len())?;
        self.table = table;
        self.ids.clone_from(&snapshot.token_ids);
        self.next_position = snapshot.position_ids.last().map_or(0, |last| last + 1);
        Ok(())
    }

    /// Lets the next decoded token sit at rotary position `position`.
    pub fn continue_at(&mut self, position: u32) {
        self.next_position = position;
    }

    /// Appends `ids` at `positions` and runs the model over them.
    ///
    /// `before_layer(l)` is called where waits for layer l's cache belong; the returned events say, for each layer,
    /// when K and V of all appended tokens are written. With [`Goal::Hidden`], [`Lane::logits`] may follow.
    pub fn append(
        &mut self,
        ids: &[u32],
        positions: &[u32],
        goal: Goal,
        before_layer: impl Fn(&Queue, usize),
    ) -> Result<Vec<Event>, Error> {
        self.append_observed(ids, positions, goal, before_layer, |_, _| Ok(()))
    }

    /// As [`Lane::append`]; `after_pass` sees the residual stream of every pass (at most 512 tokens each).
    pub fn append_observed(
        &mut self,
        ids: &[u32],
        positions: &[u32],
        goal: Goal,
        before_layer: impl Fn(&Queue, usize),
        mut after_pass: impl FnMut(&Lane, usize) -> Result<(), Error>,
    ) -> Result<Vec<Event>, Error> {
        let mut events = Vec::new();
        let (mut left, mut places) = (ids, positions);
        while !left.is_empty() {
            let n = piece(left.len(), self.passes.activations.extent().tokens.min(MAX_PASS));
            let (ids, positions);
            (ids, left) = left.split_at(n);
            (positions, places) = places.split_at(n);
            events.clear();
            self.pass(ids, positions, goal, &before_layer, |lane, _| events.push(lane.queue.record()))?;
            after_pass(self, ids.len())?;
        }
        Ok(events)
    }

    /// Appends `ids` at `positions` and returns what the attention of each layer says of them, before its output map:
    /// `[tokens, heads · head_dim]` a layer. Waits for the device in every layer.
    pub fn append_attending(&mut self, ids: &[u32], positions: &[u32]) -> Result<Vec<Vec<f32>>, Error> {
        let mut said = vec![Vec::new(); self.kv.layers().len()];
        let (mut left, mut places) = (ids, positions);
        while !left.is_empty() {
            let n = piece(left.len(), self.pass_capacity().min(MAX_PASS));
            let (ids, positions);
            (ids, left) = left.split_at(n);
            (positions, places) = places.split_at(n);
            let mut failed = None;
            self.pass(
                ids,
                positions,
                Goal::Hidden,
                |_, _| {},
                |lane, layer| {
                    let rows = lane.passes.activations.attention(n);
                    match lane.queue.download_f32(&rows) {
                        Ok(rows) => said[layer].extend(rows),
                        Err(error) => failed = Some(error),
                    }
                },
            )?;
            if let Some(error) = failed {
                return Err(error.into());
            }
        }
        Ok(said)
    }

    /// One pass over `ids`; `cached(lane, l)` is called where layer l's cache is written and read.
    fn pass(
        &mut self,
        ids: &[u32],
        positions: &[u32],
        goal: Goal,
        before_layer: impl Fn(&Queue, usize),
        mut cached: impl FnMut(&Lane, usize),
    ) -> Result<(), Error> {
        let slots = self.take(ids, positions)?;
        let blocks = self.table.block_ids();
        let step = SequenceStep { ids, positions, slots: &slots, blocks: &blocks, context: self.slots.len() };
        let batch = Batch::new(&self.queue, &self.decoder.config, &[step])?;
        self.decoder.forward(
            &self.queue,
            &batch,
            self.kv.layers(),
            &self.passes.activations,
            goal,
            |layer| before_layer(&self.queue, layer),
            |layer| cached(self, layer),
        )?;
        self.last_row = ids.len() - 1;
        Ok(())
    }

    /// Takes slots for `ids` at `positions`, whose keys and values somebody else writes there: [`Lane::pass_over`] runs
    /// the model over them. The slots; on other queues they may be written once this one has come here.
    pub fn take(&mut self, ids: &[u32], positions: &[u32]) -> Result<Vec<u32>, Error> {
        let slots = self.kv.append(&self.queue, &mut self.table, ids.len())?;
        self.slots.extend(&slots);
        self.ids.extend(ids);
        self.next_position = positions.last().map_or(self.next_position, |last| last + 1);
        Ok(slots)
    }

    /// Runs the model over the last tokens in the cache, one for each of `positions`: they attend to the keys and values
    /// that lie there. Those that the pass itself computes go to `aside`, slots of the same pages that no sequence has.
    ///
    /// # Panics
    /// If there are more tokens than a pass has room for, fewer in the cache, or not as many slots.
    pub fn pass_over(
        &mut self,
        positions: &[u32],
        aside: &[u32],
        before_layer: impl Fn(&Queue, usize),
    ) -> Result<(), Error> {
        assert_eq!(positions.len(), aside.len(), "a slot for each token");
        let ids = &self.ids[self.ids.len() - positions.len()..];
        let blocks = self.table.block_ids();
        let step = SequenceStep { ids, positions, slots: aside, blocks: &blocks, context: self.slots.len() };
        let batch = Batch::new(&self.queue, &self.decoder.config, &[step])?;
        self.decoder.forward(
            &self.queue,
            &batch,
            self.kv.layers(),
            &self.passes.activations,
            Goal::Hidden,
            |layer| before_layer(&self.queue, layer),
            |_| {},
        )?;
        self.last_row = positions.len() - 1;
        Ok(())
    }

    /// Most tokens of one pass.
    pub fn pass_capacity(&self) -> usize {
        self.passes.activations.extent().tokens
    }

    /// Logits `[vocab]` after the last appended token.
    pub fn logits(&self) -> Result<Vec<f32>, Error> {
        let row = [self.last_row as u32];
        Ok(self.decoder.logits(&self.queue, Pass::Decode, &self.passes.activations, &row)?)
    }

    /// Logits `[tokens, vocab]` of all tokens of the last pass of `tokens`.
    pub fn pass_logits(&self, tokens: usize) -> Result<Vec<f32>, Error> {
        let rows: Vec<u32> = (0..tokens as u32).collect();
        Ok(self.decoder.logits(&self.queue, Pass::Prefill, &self.passes.activations, &rows)?)
    }

    /// One decode step: appends `id` at the next position and returns the logits after it.
    pub fn step(&mut self, id: u32) -> Result<Vec<f32>, Error> {
        super::decode(&mut [self], &[id])?.logits()
    }

    /// The same on a device that draws: what it drew, while the logits stay there for [`Lane::step_logits`].
    ///
    /// `None`, and nothing is done, on a device that does not draw.
    pub fn step_drawn(&mut self, id: u32, row: &SampleRow) -> Result<Option<SampledRow>, Error> {
        if self.queue.backend().draw_tokens().is_none() {
            return Ok(None);
        }
        let drawn = super::decode(&mut [self], &[id])?.draw(std::slice::from_ref(row))?;
        Ok(drawn.map(|rows| rows[0]))
    }

    /// Logits `[vocab]` after the last decode step, which was of this lane alone.
    ///
    /// # Panics
    /// If there was none.
    pub fn step_logits(&self) -> Result<Vec<f32>, Error> {
        self.passes.steps.logits(&self.queue, 1)
    }

    /// A place for `id` at the next position.
    pub(super) fn push(&mut self, id: u32) -> Result<(), Error> {
        self.slots.extend(self.kv.append(&self.queue, &mut self.table, 1)?);
        self.ids.push(id);
        self.next_position += 1;
        Ok(())
    }

    /// Keys and values of layer `layer` for tokens `start..end`.
    pub fn read(&self, layer: usize, start: usize, end: usize) -> Result<KvColumns, Error> {
        Ok(self.kv.read(&self.queue, layer, &self.slots[start..end])?)
    }
}
