//! Decode passes: one new token of each of several lanes.

use super::{Error, Lane};
use crate::{
    backend::{DType, Graph, Queue, Tensor},
    model::{Batch, Head, SequenceStep},
    ops::{self, MAX_RANKED, Pass, SampleOperands, SampleRow, SampledRow},
};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

/// Ranked tokens among which a nucleus is nearly always found.
const NUCLEUS: usize = 128;
/// Blocks of a sequence that a captured pass has room for, unless its lanes have none for as many.
const BLOCKS: usize = 64;

/// The decode passes of one queue, captured with the first step of so many lanes: only what [`Batch::fill`] uploads changes from
/// step to step.
#[derive(Default)]
pub(super) struct Steps(Mutex<BTreeMap<usize, Arc<Step>>>);

struct Step {
    batch: Batch,
    head: Head,
    graph: Graph,
    draw: Option<Draw>,
}

/// What a device that draws needs for it.
struct Draw {
    params: Tensor,
    ids: Tensor,
    values: Tensor,
    scratch: Tensor,
    out: Tensor,
}

impl Draw {
    fn new(queue: &Queue, rows: usize, vocab: usize) -> Result<Option<Draw>, Error> {
        let backend = queue.backend();
        let Some(device) = backend.draw_tokens() else { return Ok(None) };
        let alloc = |dtype: DType, dims: &[usize]| backend.alloc(dtype, dims, "drawing tokens");
        Ok(Some(Draw {
            params: alloc(DType::U32, &[rows, size_of::<SampleRow>() / 4])?,
            ids: alloc(DType::U32, &[rows * MAX_RANKED])?,
            values: alloc(DType::F32, &[rows * MAX_RANKED])?,
            scratch: alloc(DType::U32, &[device.scratch_len(rows, vocab, MAX_RANKED)])?,
            out: alloc(DType::U32, &[rows, size_of::<SampledRow>() / 4])?,
        }))
    }
}

impl Steps {
    fn get(&self, lanes: usize) -> Option<Arc<Step>> {
        // A step is put in whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&lanes).cloned()
    }

    /// A pass of as many lanes, with room for `blocks` blocks each.
    fn ready(&self, lane: &Lane, lanes: usize, blocks: usize) -> Result<Arc<Step>, Error> {
        if let Some(step) = self.get(lanes).filter(|step| step.batch.max_blocks >= blocks) {
            return Ok(step);
        }
        let (decoder, queue, activations) = (&lane.decoder, &lane.queue, &lane.passes.activations);
        let most = activations.extent().context / lane.kv.block_size();
        let room = blocks.next_power_of_two().max(BLOCKS).min(most).max(blocks);
        let batch = Batch::with_room(queue.backend(), &decoder.config, Pass::Decode, lanes, lanes, room)?;
        let head = decoder.head(queue, lanes)?;
        let layers = lane.kv.layers();
        let graph = queue.capture(|| decoder.decode(queue, &batch, layers, activations, &head))?;
        let draw = Draw::new(queue, lanes, decoder.weights.lm_head.rows())?;
        let step = Arc::new(Step { batch, head, graph, draw });
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(lanes, step.clone());
        Ok(step)
    }

    /// Logits `[lanes, vocab]` of the last pass of as many lanes.
    ///
    /// # Panics
    /// If there was none.
    pub fn logits(&self, queue: &Queue, lanes: usize) -> Result<Vec<f32>, Error> {
        let step = self.get(lanes).expect("a decode step was made");
        Ok(queue.download_f32(&step.head.logits)?)
    }
}

/// Appends `ids[i]` to `lanes[i]` and runs the model over all of them in one pass. Each gets what it would get alone.
///
/// # Panics
/// If there are no lanes, more than [`Lane::for_several`] made room for, not an id for each, or lanes of several models.
pub fn decode(lanes: &mut [&mut Lane], ids: &[u32]) -> Result<Decoded, Error> {
    assert_eq!(lanes.len(), ids.len(), "an id for each lane");
    let same = |lane: &&mut Lane| Arc::ptr_eq(&lane.passes, &lanes[0].passes);
    assert!(lanes.iter().all(same), "lanes of several models or queues");
    for (row, (lane, &id)) in lanes.iter_mut().zip(ids).enumerate() {
        lane.push(id)?;
        lane.last_row = row;
    }
    let first: &Lane = lanes[0];
    let blocks: Vec<Vec<u32>> = lanes.iter().map(|lane| lane.table().block_ids()).collect();
    let positions: Vec<u32> = lanes.iter().map(|lane| lane.next_position() - 1).collect();
    let sequences: Vec<SequenceStep> = (lanes.iter().enumerate())
        .map(|(i, lane)| SequenceStep {
            ids: &ids[i..=i],
            positions: &positions[i..=i],
            slots: &lane.slots()[lane.slots().len() - 1..],
            blocks: &blocks[i],
            context: lane.slots().len(),
        })
        .collect();
    let most = blocks.iter().map(Vec::len).max().unwrap_or(0);
    let step = first.passes.steps.ready(first, lanes.len(), most)?;
    step.batch.fill(&first.queue, &first.decoder.config, &sequences)?;
    first.queue.replay(&step.graph);
    Ok(Decoded { queue: first.queue.clone(), step })
}

/// A decode pass that was issued.
pub struct Decoded {
    queue: Queue,
    step: Arc<Step>,
}

impl Decoded {
    /// Logits `[lanes, vocab]`.
    pub fn logits(&self) -> Result<Vec<f32>, Error> {
        Ok(self.queue.download_f32(&self.step.head.logits)?)
    }

    /// What a device that draws drew for each lane; `None` on one that does not.
    ///
    /// # Panics
    /// If there are not as many rows as lanes.
    pub fn draw(&self, rows: &[SampleRow]) -> Result<Option<Vec<SampledRow>>, Error> {
        let Some(draw) = &self.step.draw else { return Ok(None) };
        assert_eq!(rows.len(), self.step.batch.sequences, "a row for each lane");
        let greedy = |row: &SampleRow| row.temperature == 0.0;
        let all_greedy = rows.iter().all(greedy);
        let ranked = |row: &SampleRow| match row.top_k {
            _ if greedy(row) => 0,
            0 if row.top_p < 1.0 => NUCLEUS,
            k => k as usize,
        };
        let k = rows.iter().map(ranked).max().unwrap_or(0);
        let n = rows.len();
        let ranking = |all: &Tensor| all.narrow(0, n * k).and_then(|some| some.reshape(&[n, k]));
        let operands = SampleOperands {
            logits: self.step.head.logits.clone(),
            rows: (!all_greedy).then(|| draw.params.clone()),
            ranked: ranking(&draw.ids).zip(ranking(&draw.values)).filter(|_| k > 0),
            sums: rows.iter().any(|row| !greedy(row) && row.top_k == 0),
            scratch: draw.scratch.clone(),
            out: draw.out.clone(),
        };
        if !all_greedy {
            self.queue.upload::<u32>(bytemuck::cast_slice(rows), &draw.params);
        }
        ops::sample(&self.queue, &operands)?;
        let bytes = self.queue.download(&draw.out)?;
        let drawn = bytes.chunks_exact(size_of::<SampledRow>()).map(bytemuck::pod_read_unaligned);
        Ok(Some(drawn.collect()))
    }
}
