//! One model with the cache of one conversation: what the sharer and the receiver each have.

use super::Error;
use crate::{
    backend::{DType, Event, Graph, Queue, Tensor},
    cache::{BlockTable, Domain, KvColumns, PagedKv, Snapshot},
    model::{Activations, Batch, Decoder, Extent, Goal, Head, SequenceStep},
    ops::{self, MAX_RANKED, Pass, SampleOperands, SampleRow, SampledRow},
};
use std::sync::Arc;

/// Tokens of one pass: longer prompts are cut, so that activations stay small.
const MAX_PASS: usize = 512;

/// A decoder, its queue, its pages and one sequence in them.
pub struct Lane {
    pub decoder: Arc<Decoder>,
    pub queue: Queue,
    pub kv: PagedKv,
    activations: Activations,
    table: BlockTable,
    ids: Vec<u32>,
    /// Cache slot of each token.
    slots: Vec<u32>,
    next_position: u32,
    /// Row of the residual stream that holds the last token of the last pass.
    last_row: usize,
    /// Made by the first decode step.
    decode: Option<DecodeStep>,
}

/// A decode pass captured once: only what [`Batch::fill`] uploads changes from step to step.
struct DecodeStep {
    batch: Batch,
    head: Head,
    graph: Graph,
    draw: Option<Draw>,
}

/// Ranked tokens among which a nucleus is nearly always found.
const NUCLEUS: usize = 128;

/// What a device that draws needs for it.
struct Draw {
    row: Tensor,
    ids: Tensor,
    values: Tensor,
    scratch: Tensor,
    out: Tensor,
}

impl Draw {
    fn new(queue: &Queue, vocab: usize) -> Result<Option<Draw>, Error> {
        let backend = queue.backend();
        let Some(device) = backend.draw_tokens() else { return Ok(None) };
        let alloc = |dtype: DType, dims: &[usize]| backend.alloc(dtype, dims, "drawing tokens");
        Ok(Some(Draw {
            row: alloc(DType::U32, &[1, size_of::<SampleRow>() / 4])?,
            ids: alloc(DType::U32, &[MAX_RANKED])?,
            values: alloc(DType::F32, &[MAX_RANKED])?,
            scratch: alloc(DType::U32, &[device.scratch_len(1, vocab, MAX_RANKED)])?,
            out: alloc(DType::U32, &[1, size_of::<SampledRow>() / 4])?,
        }))
    }
}

impl Lane {
    /// A lane for up to `tokens` tokens.
    pub fn new(decoder: Arc<Decoder>, queue: Queue, kv: PagedKv, tokens: usize) -> Result<Lane, Error> {
        let table = BlockTable::new(kv.pool());
        let pass = tokens.clamp(1, MAX_PASS);
        let extent = Extent { tokens: pass, sequences: 1, context: tokens.next_multiple_of(kv.block_size()) };
        let activations = Activations::new(queue.backend(), &decoder.config, decoder.precision, extent)?;
        Ok(Lane {
            decoder,
            queue,
            kv,
            activations,
            table,
            ids: Vec::new(),
            slots: Vec::new(),
            next_position: 0,
            last_row: 0,
            decode: None,
        })
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
        let capacity = self.activations.extent().tokens;
        for (ids, positions) in ids.chunks(capacity).zip(positions.chunks(capacity)) {
            let slots = self.kv.append(&self.queue, &mut self.table, ids.len())?;
            self.slots.extend(&slots);
            self.ids.extend(ids);
            self.next_position = positions.last().map_or(self.next_position, |last| last + 1);
            let blocks = self.table.block_ids();
            let step =
                SequenceStep { ids, positions, slots: &slots, blocks: &blocks, context: self.slots.len() };
            let batch = Batch::new(&self.queue, &self.decoder.config, &[step])?;
            events.clear();
            self.decoder.forward(
                &self.queue,
                &batch,
                self.kv.layers(),
                &self.activations,
                goal,
                |layer| before_layer(&self.queue, layer),
                |_| events.push(self.queue.record()),
            )?;
            self.last_row = ids.len() - 1;
            after_pass(self, ids.len())?;
        }
        Ok(events)
    }

    /// Logits `[vocab]` after the last appended token.
    pub fn logits(&self) -> Result<Vec<f32>, Error> {
        Ok(self.decoder.logits(&self.queue, Pass::Decode, &self.activations, &[self.last_row as u32])?)
    }

    /// Logits `[tokens, vocab]` of all tokens of the last pass of `tokens`.
    pub fn pass_logits(&self, tokens: usize) -> Result<Vec<f32>, Error> {
        let rows: Vec<u32> = (0..tokens as u32).collect();
        Ok(self.decoder.logits(&self.queue, Pass::Prefill, &self.activations, &rows)?)
    }

    /// One decode step: appends `id` at the next position and returns the logits after it.
    pub fn step(&mut self, id: u32) -> Result<Vec<f32>, Error> {
        self.issue_step(id)?;
        self.step_logits()
    }

    /// The same on a device that draws: what it drew, while the logits stay there for [`Lane::step_logits`].
    ///
    /// `None`, and nothing is done, on a device that does not draw.
    pub fn step_drawn(&mut self, id: u32, row: &SampleRow) -> Result<Option<SampledRow>, Error> {
        if self.queue.backend().draw_tokens().is_none() {
            return Ok(None);
        }
        self.issue_step(id)?;
        let Some(step) = &self.decode else { return Ok(None) };
        let Some(draw) = &step.draw else { return Ok(None) };
        let greedy = row.temperature == 0.0;
        let k = match row.top_k {
            _ if greedy => 0,
            0 if row.top_p < 1.0 => NUCLEUS,
            k => k as usize,
        };
        let ranked = |all: &Tensor| all.narrow(0, k).and_then(|some| some.reshape(&[1, k]));
        let operands = SampleOperands {
            logits: step.head.logits.clone(),
            rows: (!greedy).then(|| draw.row.clone()),
            ranked: ranked(&draw.ids).zip(ranked(&draw.values)).filter(|_| k > 0),
            sums: !greedy && row.top_k == 0,
            scratch: draw.scratch.clone(),
            out: draw.out.clone(),
        };
        if !greedy {
            self.queue.upload::<u32>(bytemuck::cast_slice(std::slice::from_ref(row)), &draw.row);
        }
        ops::sample(&self.queue, &operands)?;
        let bytes = self.queue.download(&draw.out)?;
        Ok(Some(bytemuck::pod_read_unaligned(&bytes)))
    }

    /// Logits `[vocab]` after the last decode step.
    ///
    /// # Panics
    /// If there was none.
    pub fn step_logits(&self) -> Result<Vec<f32>, Error> {
        let step = self.decode.as_ref().expect("a decode step was made");
        Ok(self.queue.download_f32(&step.head.logits)?)
    }

    fn issue_step(&mut self, id: u32) -> Result<(), Error> {
        let (ids, positions) = ([id], [self.next_position]);
        let slots = self.kv.append(&self.queue, &mut self.table, 1)?;
        self.slots.extend(&slots);
        self.ids.push(id);
        self.next_position += 1;
        self.last_row = 0;
        let (decoder, queue) = (&self.decoder, &self.queue);
        let blocks = self.table.block_ids();
        let context = self.slots.len();
        let step = SequenceStep { ids: &ids, positions: &positions, slots: &slots, blocks: &blocks, context };
        let decode = match self.decode.take().filter(|decode| decode.batch.max_blocks >= blocks.len()) {
            Some(decode) => decode,
            None => {
                let room = self.activations.extent().context / self.kv.block_size();
                let room = room.max(blocks.len());
                let batch = Batch::with_room(queue.backend(), &decoder.config, Pass::Decode, 1, 1, room)?;
                let head = decoder.head(queue, 1)?;
                let (layers, activations) = (self.kv.layers(), &self.activations);
                let graph = queue.capture(|| decoder.decode(queue, &batch, layers, activations, &head))?;
                let draw = Draw::new(queue, decoder.weights.lm_head.rows())?;
                DecodeStep { batch, head, graph, draw }
            }
        };
        decode.batch.fill(queue, &decoder.config, &[step])?;
        queue.replay(&decode.graph);
        self.decode = Some(decode);
        Ok(())
    }

    /// Keys and values of layer `layer` for tokens `start..end`.
    pub fn read(&self, layer: usize, start: usize, end: usize) -> Result<KvColumns, Error> {
        Ok(self.kv.read(&self.queue, layer, &self.slots[start..end])?)
    }
}
