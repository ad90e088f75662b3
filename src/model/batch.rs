//! What one forward pass runs on: the tokens of any mix of sequences, with where they go in the cache.

use super::{Error, ModelConfig};
use crate::{
    backend::{Queue, Tensor},
    ops::Pass,
};

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

/// The device's side of a list of [`SequenceStep`]s.
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
}

impl Batch {
    /// # Errors
    /// Token ids past the vocabulary, no tokens at all, or sequences with one new token beside others with more: those
    /// are a decode pass and a prefill pass.
    pub fn new(queue: &Queue, config: &ModelConfig, steps: &[SequenceStep]) -> Result<Batch, Error> {
        let tokens: usize = steps.iter().map(|step| step.ids.len()).sum();
        if tokens == 0 {
            return Err(Error::EmptyBatch);
        }
        let decode = steps.iter().all(|step| step.ids.len() == 1);
        if !decode && steps.iter().any(|step| step.ids.len() == 1) {
            return Err(Error::MixedBatch);
        }
        let ids: Vec<u32> = steps.iter().flat_map(|step| step.ids).copied().collect();
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
        let max_blocks = steps.iter().map(|step| step.blocks.len()).max().unwrap_or(0).max(1);
        let mut tables = vec![0u32; steps.len() * max_blocks];
        for (row, step) in tables.chunks_exact_mut(max_blocks).zip(steps) {
            row[..step.blocks.len()].copy_from_slice(step.blocks);
        }
        let rotation = |local: bool| -> Result<Tensor, Error> {
            let table = rotation_table(config, local, &positions);
            Ok(queue.tensor(&table, &[tokens, config.head_dim], "rotary table")?)
        };
        Ok(Batch {
            pass: if decode { Pass::Decode } else { Pass::Prefill },
            tokens,
            sequences: steps.len(),
            max_blocks,
            ids: queue.tensor(&ids, &[tokens], "token ids")?,
            slots: queue.tensor(&slots, &[tokens], "slots")?,
            cos_sin: rotation(false)?,
            cos_sin_local: config.rope_local.as_ref().map(|_| rotation(true)).transpose()?,
            cu_q: queue.tensor(&cu_q, &[steps.len() + 1], "sequence starts")?,
            context: queue.tensor(&context, &[steps.len()], "context lengths")?,
            block_tables: queue.tensor(&tables, &[steps.len(), max_blocks], "block tables")?,
        })
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
