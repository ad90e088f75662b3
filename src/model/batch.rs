//! What one forward pass runs on: the tokens of any mix of sequences, with where they go in the cache.

use super::{Error, ModelConfig};
use crate::{
    backend::{Backend, DType, Queue, Tensor},
    ops::{AttentionParams, Pass, RopeParams},
};
use std::sync::Arc;

/// The new tokens of one sequence.
#[derive(Clone, Debug)]
pub struct SequenceStep<'a> {
    pub ids: &'a [u32],
    /// Rotary position of each new token.
    pub positions: &'a [u32],
    /// Cache slot of each new token.
    pub slots: &'a [u32],
    /// Blocks that hold the sequence, in order.
    pub blocks: &'a [u32],
    /// Tokens in the cache once the new ones are written.
    pub context: usize,
}

/// The device's side of a list of [`SequenceStep`]s, in one piece of memory: one upload brings a pass everything it needs.
pub struct Batch {
    pub pass: Pass,
    pub tokens: usize,
    pub sequences: usize,
    pub max_blocks: usize,
    /// U32`[tokens]`
    pub ids: Tensor,
    pub slots: Tensor,
    /// F32`[tokens, head_dim]`: cosines then sines, for global and (where the model has its own) for local layers.
    pub cos_sin: Tensor,
    pub cos_sin_local: Option<Tensor>,
    /// U32`[sequences + 1]`, `[sequences]`, `[sequences, max_blocks]`: see [`crate::ops::AttentionOperands`].
    pub cu_q: Tensor,
    pub context: Tensor,
    pub block_tables: Tensor,
    /// U32, all of the above.
    memory: Tensor,
}

/// Words of the memory of a [`Batch`] that its parts start at multiples of: kernels read them in vectors.
const PART: usize = 64;

impl Batch {
    /// Uploads `steps`.
    ///
    /// # Errors
    /// Token ids past the vocabulary, no tokens at all, or sequences with one new token beside others with more: those
    /// are a decode pass and a prefill pass.
    pub fn new(queue: &Queue, config: &ModelConfig, steps: &[SequenceStep]) -> Result<Batch, Error> {
        let tokens: usize = steps.iter().map(|step| step.ids.len()).sum();
        let decode = steps.iter().all(|step| step.ids.len() == 1);
        if !decode && steps.iter().any(|step| step.ids.len() == 1) {
            return Err(Error::MixedBatch);
        }
        let pass = if decode { Pass::Decode } else { Pass::Prefill };
        let max_blocks = steps.iter().map(|step| step.blocks.len()).max().unwrap_or(0);
        let batch = Batch::with_room(queue.backend(), config, pass, tokens, steps.len(), max_blocks)?;
        batch.fill(queue, config, steps)?;
        Ok(batch)
    }

    /// Memory for batches of just this extent; [`Batch::fill`] says which.
    pub fn with_room(
        backend: &Arc<dyn Backend>,
        config: &ModelConfig,
        pass: Pass,
        tokens: usize,
        sequences: usize,
        max_blocks: usize,
    ) -> Result<Batch, Error> {
        if tokens == 0 {
            return Err(Error::EmptyBatch);
        }
        let max_blocks = max_blocks.max(1);
        let rotation = tokens * config.head_dim;
        let local = config.rope_local.is_some();
        let lengths = [tokens, tokens, sequences + 1, sequences, sequences * max_blocks, rotation, rotation];
        let lengths = &lengths[..if local { 7 } else { 6 }];
        let words = lengths.iter().map(|len| len.next_multiple_of(PART)).sum();
        let memory = backend.alloc(DType::U32, &[words], "inputs of a pass")?;
        let mut start = 0;
        let mut parts = lengths.iter().map(|&len| {
            let part = memory.narrow(start, len).expect("a part of the sum");
            start += len.next_multiple_of(PART);
            part
        });
        let mut part = |dims: &[usize]| {
            let part = parts.next().expect("as many parts as lengths");
            part.reshape(dims).expect("lengths are products of dimensions")
        };
        let (ids, slots) = (part(&[tokens]), part(&[tokens]));
        let (cu_q, context) = (part(&[sequences + 1]), part(&[sequences]));
        let block_tables = part(&[sequences, max_blocks]);
        let mut table = || part(&[tokens, config.head_dim]).reinterpret(DType::F32);
        let (cos_sin, cos_sin_local) = (table(), local.then(table));
        Ok(Batch {
            pass,
            tokens,
            sequences,
            max_blocks,
            ids,
            slots,
            cos_sin,
            cos_sin_local,
            cu_q,
            context,
            block_tables,
            memory,
        })
    }

    /// Uploads `steps`, which have as many tokens and sequences as there is room for and at most as many blocks.
    ///
    /// # Panics
    /// If they have not.
    pub fn fill(&self, queue: &Queue, config: &ModelConfig, steps: &[SequenceStep]) -> Result<(), Error> {
        let ids: Vec<u32> = steps.iter().flat_map(|step| step.ids).copied().collect();
        assert_eq!((ids.len(), steps.len()), (self.tokens, self.sequences), "steps of another extent");
        if let Some(&id) = ids.iter().find(|&&id| id as usize >= config.vocab) {
            return Err(Error::TokenOutOfRange { id, vocab: config.vocab });
        }
        if let Some(step) = steps.iter().find(|step| step.context > config.context_length) {
            return Err(Error::ContextExceeded { tokens: step.context, limit: config.context_length });
        }
        let positions: Vec<u32> = steps.iter().flat_map(|step| step.positions).copied().collect();
        let slots: Vec<u32> = steps.iter().flat_map(|step| step.slots).copied().collect();
        let context: Vec<u32> = steps.iter().map(|step| step.context as u32).collect();
        let mut cu_q = vec![0u32];
        for step in steps {
            cu_q.push(cu_q[cu_q.len() - 1] + step.ids.len() as u32);
        }
        let mut tables = vec![0u32; steps.len() * self.max_blocks];
        for (row, step) in tables.chunks_exact_mut(self.max_blocks).zip(steps) {
            row[..step.blocks.len()].copy_from_slice(step.blocks);
        }
        let mut words = Vec::with_capacity(self.memory.elements());
        let mut push = |part: &[u32]| {
            words.extend_from_slice(part);
            words.resize(words.len().next_multiple_of(PART), 0);
        };
        [&ids, &slots, &cu_q, &context, &tables].into_iter().for_each(|part| push(part));
        push(bytemuck::cast_slice(&rotation_table(config, false, &positions)));
        if self.cos_sin_local.is_some() {
            push(bytemuck::cast_slice(&rotation_table(config, true, &positions)));
        }
        queue.upload(&words, &self.memory);
        Ok(())
    }
}

impl Batch {
    /// The angles of a layer, which may be a local one.
    pub fn angles(&self, config: &ModelConfig, layer: usize) -> Tensor {
        self.cos_sin_local.as_ref().filter(|_| config.local[layer]).unwrap_or(&self.cos_sin).clone()
    }
}

/// Parameters of the ops of a pass.
impl ModelConfig {
    pub fn rope_params(&self, batch: &Batch) -> RopeParams {
        RopeParams {
            tokens: batch.tokens as u32,
            heads: self.heads as u32,
            kv_heads: self.kv_heads as u32,
            head_dim: self.head_dim as u32,
            norm_eps: self.norm_eps,
            norm_offset: self.norm_offset,
            interleaved: self.interleaved_rope.into(),
        }
    }

    /// `q_stride`: see [`AttentionParams::q_stride`].
    pub fn attention_params(&self, batch: &Batch, layer: usize, q_stride: usize) -> AttentionParams {
        AttentionParams {
            pass: batch.pass,
            tokens: batch.tokens as u32,
            sequences: batch.sequences as u32,
            heads: self.heads as u32,
            kv_heads: self.kv_heads as u32,
            head_dim: self.head_dim as u32,
            q_stride: q_stride as u32,
            max_blocks: batch.max_blocks as u32,
            scale: self.attention_scale,
            soft_cap: self.attention_soft_cap,
            window: self.windows[layer],
        }
    }
}

/// `[tokens, head_dim]`: cosines of `position · inverse frequency`, then sines, both times the attention factor
/// (other than 1 for yarn only). Angles are rounded to f32 first, as Hugging Face transformers does.
fn rotation_table(config: &ModelConfig, local: bool, positions: &[u32]) -> Vec<f32> {
    let (frequencies, factor) = config.inverse_frequencies(local);
    let mut table = Vec::with_capacity(positions.len() * config.head_dim);
    for &position in positions {
        let angles = || frequencies.iter().map(|f| position as f32 * f);
        table.extend(angles().map(|angle| angle.cos() * factor));
        table.extend(angles().map(|angle| angle.sin() * factor));
    }
    table
}
