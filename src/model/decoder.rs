//! The one decoder. Families differ in data ([`ModelConfig`], which weights exist), not in code.

use super::{Batch, Error, LayerWeights, Loaded, ModelConfig, Weights};
use crate::{
    backend::{Backend, DType, Precision, Queue, Tensor},
    ops::{self, AttentionOperands, AttentionParams, KvPages, NormOutput, Pass, RopeOperands, RopeParams},
};
use std::sync::Arc;

/// A frozen language model on a device.
pub struct Decoder {
    pub config: ModelConfig,
    pub weights: Weights,
    pub precision: Precision,
}

/// What a pass is run for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Goal {
    /// Keys and values only: the last layer ends once its K and V are written.
    Cache,
    /// Also the residual stream after the last layer, from which [`Decoder::logits`] reads.
    Hidden,
}

/// Activations of up to [`Activations::capacity`] tokens, allocated once a lane.
pub struct Activations {
    capacity: usize,
    /// The residual stream, F32`[capacity, hidden]`.
    residual: Tensor,
    normed: Tensor,
    /// Output of a block whose result is normalised before it joins the stream (Gemma).
    block: Option<Tensor>,
    qkv: Tensor,
    attention: Tensor,
    gate_up: Tensor,
    activated: Tensor,
}

fn first(tensor: &Tensor, rows: usize) -> Tensor {
    tensor.narrow(0, rows).expect("passes are cut to the capacity")
}

impl Activations {
    pub fn new(
        backend: &Arc<dyn Backend>,
        config: &ModelConfig,
        capacity: usize,
    ) -> Result<Activations, Error> {
        let alloc = |width: usize, what: &str| backend.alloc(DType::F32, &[capacity, width], what);
        let (heads, kv_heads, dim) = (config.heads, config.kv_heads, config.head_dim);
        Ok(Activations {
            capacity,
            residual: alloc(config.hidden, "residual stream")?,
            normed: alloc(config.hidden, "normalised activations")?,
            block: config.post_norms.then(|| alloc(config.hidden, "block output")).transpose()?,
            qkv: alloc((heads + 2 * kv_heads) * dim, "qkv")?,
            attention: alloc(heads * dim, "attention output")?,
            gate_up: alloc(2 * config.ffn, "gate and up projections")?,
            activated: alloc(config.ffn, "ffn activations")?,
        })
    }

    /// Most tokens of one pass.
    pub fn capacity(&self) -> usize {
        self.capacity
    }
}

impl Decoder {
    pub fn new(loaded: Loaded, precision: Precision) -> Decoder {
        Decoder { config: loaded.config, weights: loaded.weights, precision }
    }

    /// Runs the batch through all layers.
    ///
    /// `before_layer(l)` is called before layer l touches its cache; `cached(l)` once its K and V are written and its
    /// attention has read them, so that they may be overwritten: the places to wait for and to record events.
    ///
    /// # Panics
    /// If the batch is larger than the activations' capacity.
    #[allow(clippy::too_many_arguments)]
    pub fn forward(
        &self,
        queue: &Queue,
        batch: &Batch,
        layers: &[KvPages],
        activations: &Activations,
        goal: Goal,
        mut before_layer: impl FnMut(usize),
        mut cached: impl FnMut(usize),
    ) -> Result<(), Error> {
        assert!(batch.tokens <= activations.capacity, "pass of {} tokens", batch.tokens);
        let a = &Activations {
            capacity: batch.tokens,
            residual: first(&activations.residual, batch.tokens),
            normed: first(&activations.normed, batch.tokens),
            block: activations.block.as_ref().map(|block| first(block, batch.tokens)),
            qkv: first(&activations.qkv, batch.tokens),
            attention: first(&activations.attention, batch.tokens),
            gate_up: first(&activations.gate_up, batch.tokens),
            activated: first(&activations.activated, batch.tokens),
        };
        ops::embed(queue, &batch.ids, &self.weights.embed, self.config.embed_scale, &a.residual)?;
        for (l, (weights, pages)) in self.weights.layers.iter().zip(layers).enumerate() {
            before_layer(l);
            self.write_cache(queue, batch, l, weights, pages, a)?;
            if goal == Goal::Cache && l + 1 == self.weights.layers.len() {
                cached(l);
                return Ok(());
            }
            self.attend(queue, batch, l, weights, pages, a)?;
            cached(l);
            self.feed_forward(queue, batch.pass, weights, a)?;
        }
        Ok(())
    }

    fn norm(
        &self,
        queue: &Queue,
        x: &Tensor,
        weight: &Tensor,
        output: NormOutput,
        out: &Tensor,
    ) -> Result<(), Error> {
        Ok(ops::rms_norm(queue, x, weight, self.config.norm_eps, self.config.norm_offset, output, out)?)
    }

    /// Normalises, projects to q, k, v, rotates, and writes K and V.
    fn write_cache(
        &self,
        queue: &Queue,
        batch: &Batch,
        layer: usize,
        weights: &LayerWeights,
        pages: &KvPages,
        a: &Activations,
    ) -> Result<(), Error> {
        let config = &self.config;
        self.norm(queue, &a.residual, &weights.attn_norm, NormOutput::Assign, &a.normed)?;
        ops::linear(queue, batch.pass, &a.normed, &weights.qkv, self.precision, false, &a.qkv)?;
        let local = config.local[layer];
        let p = RopeParams {
            tokens: batch.tokens as u32,
            heads: config.heads as u32,
            kv_heads: config.kv_heads as u32,
            head_dim: config.head_dim as u32,
            norm_eps: config.norm_eps,
            norm_offset: config.norm_offset,
            interleaved: config.interleaved_rope.into(),
        };
        let cos_sin = batch.cos_sin_local.as_ref().filter(|_| local).unwrap_or(&batch.cos_sin);
        let operands = RopeOperands {
            qkv: a.qkv.clone(),
            q_norm: weights.q_norm.clone(),
            k_norm: weights.k_norm.clone(),
            cos_sin: cos_sin.clone(),
            slots: batch.slots.clone(),
            pages: pages.clone(),
        };
        Ok(ops::rope_kv_write(queue, p, &operands)?)
    }

    fn attend(
        &self,
        queue: &Queue,
        batch: &Batch,
        layer: usize,
        weights: &LayerWeights,
        pages: &KvPages,
        a: &Activations,
    ) -> Result<(), Error> {
        let config = &self.config;
        let p = AttentionParams {
            tokens: batch.tokens as u32,
            sequences: batch.sequences as u32,
            heads: config.heads as u32,
            kv_heads: config.kv_heads as u32,
            head_dim: config.head_dim as u32,
            q_stride: ((config.heads + 2 * config.kv_heads) * config.head_dim) as u32,
            max_blocks: batch.max_blocks as u32,
            scale: config.attention_scale,
            soft_cap: config.attention_soft_cap,
            window: config.windows[layer],
        };
        let operands = AttentionOperands {
            q: a.qkv.clone(),
            pages: pages.clone(),
            cu_q: batch.cu_q.clone(),
            context: batch.context.clone(),
            block_tables: batch.block_tables.clone(),
            out: a.attention.clone(),
        };
        ops::paged_attention(queue, p, &operands)?;
        self.join(queue, batch.pass, &a.attention, &weights.attn_out, weights.post_attn_norm.as_ref(), a)
    }

    fn feed_forward(
        &self,
        queue: &Queue,
        pass: Pass,
        weights: &LayerWeights,
        a: &Activations,
    ) -> Result<(), Error> {
        self.norm(queue, &a.residual, &weights.ffn_norm, NormOutput::Assign, &a.normed)?;
        ops::linear(queue, pass, &a.normed, &weights.gate_up, self.precision, false, &a.gate_up)?;
        ops::glu(queue, &a.gate_up, self.config.activation, &a.activated)?;
        self.join(queue, pass, &a.activated, &weights.down, weights.post_ffn_norm.as_ref(), a)
    }

    /// Projects a block's result back and adds it, normalised where the family does, to the residual stream.
    fn join(
        &self,
        queue: &Queue,
        pass: Pass,
        x: &Tensor,
        weight: &ops::Weight,
        post_norm: Option<&Tensor>,
        a: &Activations,
    ) -> Result<(), Error> {
        match (post_norm, &a.block) {
            (Some(norm), Some(block)) => {
                ops::linear(queue, pass, x, weight, self.precision, false, block)?;
                self.norm(queue, block, norm, NormOutput::Add, &a.residual)
            }
            _ => Ok(ops::linear(queue, pass, x, weight, self.precision, true, &a.residual)?),
        }
    }

    /// Logits `[rows, vocab]` of chosen rows of the last pass (which ran with [`Goal::Hidden`]): `Pass::Decode` for
    /// each sequence's last token, `Pass::Prefill` for a whole prompt's.
    ///
    /// # Panics
    /// If a row is past the activations' capacity.
    pub fn logits(
        &self,
        queue: &Queue,
        pass: Pass,
        activations: &Activations,
        rows: &[u32],
    ) -> Result<Vec<f32>, Error> {
        let backend = queue.backend();
        let n = rows.len();
        assert!(rows.iter().all(|&row| (row as usize) < activations.capacity), "row past the pass");
        let index = queue.tensor(rows, &[n], "logit rows")?;
        let hidden = backend.alloc(DType::F32, &[n, self.config.hidden], "final hidden states")?;
        let out = backend.alloc(DType::F32, &[n, self.weights.lm_head.rows()], "logits")?;
        ops::gather_rows(queue, &activations.residual, &index, &hidden)?;
        self.norm(queue, &hidden, &self.weights.final_norm, NormOutput::Assign, &hidden)?;
        ops::linear(queue, pass, &hidden, &self.weights.lm_head, self.precision, false, &out)?;
        if self.config.final_soft_cap > 0.0 {
            ops::soft_cap(queue, self.config.final_soft_cap, &out)?;
        }
        Ok(queue.download_f32(&out)?)
    }
}
